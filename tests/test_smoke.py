"""benchmarks/accuracy.py --smoke: every method on every task, on data of the real layout where the real is not here."""

import accuracy
import glue
import numpy as np
import pretrained
import pytest
import tasks
import torch
from cases import SETTINGS, Case, setting
from safetensors.torch import save_file

ROWS = {
    "cola": ("gj04\t1\t\tthe book fell", "gj04\t0\t*\tbook the fell"),
    "rte": ("0\tit fell\tit fell down\tentailment", "1\tit fell\tit rose\tnot_entailment"),
    "mrpc": ("1\t1\t2\tit fell\tdown it fell", "0\t3\t4\tit fell\tit rose"),
    "sst2": ("a fine book\t1", "a dull book\t0"),
}

LEFT_OUT = {
    "cifar100": {"LoRA-GA"},
    "captions": {"LoRA-GA"},
    "digits": {"LoRA-GA"},
    "experts": {"head only", "BitFit", "LoRA-GA"},
    "volumes": {"AdaLoRA", "LoHa", "LoKr", "LoRA-GA"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise for CIFAR-100, ResNet-20 as it is initialised, and two sentences for each task of GLUE, over and over."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("cifar100", "resnet-cifar10"):
        (folder / name).mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), np.uint8)
    arrays = {f"{part}_images": noise for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(5000) % 100 for part in ("train", "test")}
    names = np.array([f"thing_{n}" for n in range(100)])
    np.savez(folder / "cifar100" / "cifar100_subset.npz", class_names=names, **arrays)
    save_file(tasks.ResNet20(10).state_dict(), folder / "resnet-cifar10" / "resnet20.safetensors")
    for name, source in glue.SOURCES.items():
        (folder / "glue" / source.folder).mkdir(parents=True)
        header = ["header"] if source.has_header else []
        for part, count in (("train", 100), ("dev", 40)):
            lines = [*header, *(count * ROWS[name])]
            (folder / "glue" / source.folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small(tiny, monkeypatch):
    """A text encoder of random weights in MiniLM's place; networks that a task pretrains stay as they are built."""
    monkeypatch.setattr(pretrained, "skipped", True)
    for module in ("tasks", "glue", "captions"):
        monkeypatch.setattr(f"{module}.minilm", lambda: tiny / "text" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("task", SETTINGS)
def test_every_method_runs_or_is_left_out_with_a_reason(task, data, small, capsys):
    torch.manual_seed(0)
    accuracy.main([task, "--smoke", "--data", str(data)])
    said = [line.removeprefix(f"{task} ") for line in capsys.readouterr().out.splitlines() if line.startswith(task)]
    assert [line.removesuffix(" runs") for line in said if line.endswith(" runs")] == [
        method for method in accuracy.METHODS if method not in LEFT_OUT.get(task, ())
    ]
    assert {line.split(" is left out: ")[0] for line in said if not line.endswith(" runs")} == LEFT_OUT.get(task, set())


@pytest.mark.slow
@pytest.mark.parametrize("task", SETTINGS)
def test_the_size_for_a_gpu_runs(task, data, small):
    ours, theirs = Case(task, setting(task), data), Case(task, setting(task, "cuda"), data)
    assert theirs.steps > ours.steps
    assert all(len(getattr(theirs.task, part)["labels"]) for part in ("train", "validation", "test"))
    accuracy.cut_short(theirs)
    run = accuracy.train(theirs, accuracy.RECIPE, accuracy.first_rates(theirs, accuracy.RECIPE), 0)
    assert run["parameters"] > 0
    assert -1 <= run["test"] <= 1
