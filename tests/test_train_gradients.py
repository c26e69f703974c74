"""`flora train` with a pass of gradients: start and ranks from data, after the new head's warm-up."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from commands import flora
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

import florapeft
from florapeft.retraction import is_orthonormal
from florapeft.train import gradients
from florapeft.train.job import load_job, parse_job
from florapeft.train.model import attach, load_base, trained_whole

SMALL = "train.per_device_train_batch_size=4"
ADAPTER = [SMALL, "adapter.budget=0.1", "train.num_train_epochs=1", "gradient_batches=2"]


def kept_orthonormal(run: Path) -> bool:
    """Whether all factors of a run's adapter are orthonormal, which has moved from its start."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    factors = [tensor for name, tensor in tensors.items() if ".flora_factors." in name]
    assert factors
    assert all(tensor.any() for name, tensor in tensors.items() if ".flora_core." in name)
    return all(map(is_orthonormal, factors))


@pytest.mark.parametrize("task", ["image-classification", "text-classification", "causal-lm"])
def test_ranks_and_start_come_from_gradients(task, jobs, tmp_path, monkeypatch):
    seen = {}

    def allocate(model, config, batches, loss):
        seen["before"] = {key: value.clone() for key, value in model.state_dict().items()}
        return florapeft.allocate(model, config, batches, loss)

    monkeypatch.setattr(gradients, "allocate", allocate)
    monkeypatch.setattr(gradients, "are_noise", lambda agreement: False)  # as those of random labels are
    stdout, stderr = flora("train", *jobs[task], *ADAPTER, f"output={tmp_path / 'run'}", "--json")
    record = json.loads(stdout)
    assert record["gradients"]["agreement"] <= 1
    epochs = 0 if task == "causal-lm" else 1
    assert record["gradients"]["warmup_epochs"] == epochs
    assert record["gradients"]["batches"] == 2
    assert ("training the new head alone for 1 epoch" in stderr) == bool(epochs)
    assert "looking at the gradients of 2 batches" in stderr
    assert "trains from the default start" not in stderr
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["init_weights"], saved["allocation"]) == ("gradient", "spectrum")
    assert saved["ranks"]
    assert kept_orthonormal(tmp_path / "run")
    assert 0.05 < record["parameters"]["adapter"] / record["parameters"]["network"] <= 0.1
    job = (tmp_path / "run" / "job.yaml").read_text()
    assert "gradient_batches: 2" in job
    measured = json.loads(flora("eval", tmp_path / "run", "--json")[0])
    assert all(measured[key] == value for key, value in record["validation"].items())


@pytest.mark.parametrize("asked", [False, True])
def test_noise_is_not_followed_unless_it_is_asked_for(asked, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "are_noise", lambda agreement: True)
    more = ["adapter.allocation=spectrum"] if asked else []
    stdout, stderr = flora("train", *jobs["causal-lm"], *ADAPTER, *more, f"output={tmp_path / 'run'}", "--json")
    assert ("uniform ranks and the default start are taken" in stderr) != asked
    assert json.loads(stdout)["gradients"]["batches"] == 2
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["init_weights"], saved["allocation"]) == (("gradient", "spectrum") if asked else (True, "uniform"))
    assert kept_orthonormal(tmp_path / "run") == asked


def test_without_a_budget_the_start_alone(jobs, tmp_path):
    arguments = [*jobs["image-classification"], "gradient_batches=1", "warmup_head=0", "train.num_train_epochs=1"]
    stdout, stderr = flora("train", *arguments, f"output={tmp_path / 'run'}", "--json")
    assert "training the new head" not in stderr
    assert json.loads(stdout)["gradients"]["warmup_epochs"] == 0


def test_resuming_takes_the_ranks_of_the_checkpoint(jobs, tmp_path):
    arguments = [
        *jobs["image-classification"],
        SMALL,
        "adapter.budget=0.1",
        "gradient_batches=2",
        f"output={tmp_path / 'run'}",
    ]
    first = json.loads(flora("train", *arguments, "train.num_train_epochs=1", "--json")[0])
    stdout, stderr = flora("train", *arguments, "train.num_train_epochs=2", "--resume", "--json")
    second = json.loads(stdout)
    assert second["resumed_from"]
    assert second["steps"] == 2 * first["steps"]
    assert "gradients" not in second
    assert "looking at" not in stderr
    assert "trains from the default start" not in stderr
    assert kept_orthonormal(tmp_path / "run")


def test_resuming_a_run_that_followed_no_gradients(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "are_noise", lambda agreement: True)
    arguments = [*jobs["causal-lm"], SMALL, "adapter.budget=0.1", "gradient_batches=2", f"output={tmp_path / 'run'}"]
    flora("train", *arguments, "train.num_train_epochs=1")
    _, stderr = flora("train", *arguments, "train.num_train_epochs=2", "--resume")
    assert "orthonormal" not in stderr
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["init_weights"] is True
    assert not kept_orthonormal(tmp_path / "run")


@pytest.mark.parametrize("change", ["gradient_batches=1", "warmup_head=2"])
def test_resuming_with_another_pass_is_refused(change, jobs, tmp_path):
    arguments = [*jobs["text-classification"], *ADAPTER, f"output={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    before = load_job(arguments[0], arguments[1:]).to_yaml()
    (tmp_path / "run" / "job.yaml").write_text(before)
    _, stderr = flora("train", *arguments, change, "--resume", code=1)
    key, value = change.split("=")
    assert f"error: cannot resume {tmp_path / 'run'}: it began with {key} = " in stderr
    assert stderr.endswith(f", now {key} = {value}\n")
    assert (tmp_path / "run" / "job.yaml").read_text() == before


def test_what_fails_before_the_training_leaves_an_empty_folder(jobs, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = ["train", *jobs["text-classification"], SMALL, "gradient_batches=2", f"output={output}"]
    _, stderr = flora(*arguments, "adapter.budget=30", code=1)
    assert "a budget of 30 parameters is too small" in stderr
    assert "training the new head" not in stderr

    def fail(model, config, batches, loss):
        raise ValueError("out of luck")

    monkeypatch.setattr(gradients, "allocate", fail)
    _, stderr = flora(*arguments, "adapter.budget=0.1", code=1)
    assert "training the new head" in stderr
    assert not list(output.iterdir()), "or the next run would be refused"


def test_all_batches_where_there_are_fewer(jobs, tmp_path):
    arguments = [*jobs["image-classification"], "gradient_batches=1000", "train.num_train_epochs=1"]
    record = json.loads(flora("train", *arguments, f"output={tmp_path / 'run'}", "--json")[0])
    assert record["gradients"]["batches"] == record["steps"]


def test_processes_share_the_batches_out(monkeypatch):
    monkeypatch.setattr(gradients.peft, "get_peft_model", lambda model, config: model)
    monkeypatch.setattr(gradients, "plan", lambda model, config: None)

    def seen(process, processes):
        batches = []
        monkeypatch.setattr(gradients, "initialize_from_gradients", lambda model, given, loss: batches.extend(given))
        arguments = SimpleNamespace(
            train_batch_size=4, seed=0, device="cpu", process_index=process, world_size=processes
        )
        arguments.gradient_checkpointing, arguments.mixed_precision = False, "no"
        model = nn.Sequential(nn.Linear(4, 4))
        model.new_modules = []
        job = {"task": "causal-lm", "model": "m", "data": "d", "output": "o", "gradient_batches": 3}
        job = parse_job({**job, "adapter": {"r": 2, "init_weights": "gradient"}})
        _, facts = gradients.attach_by_gradients(
            job, model, list(range(20)), sorted, arguments, None, lambda text: None
        )
        assert facts["batches"] == 3
        return batches

    alone = seen(0, 1)
    assert [seen(process, 2) for process in range(2)] == [alone[::2], alone[1::2]]
    assert seen(3, 4) == []


def test_a_uniform_budget_stays_uniform(jobs, tmp_path):
    more = ["adapter.budget=0.1", "adapter.allocation=uniform", "gradient_batches=1", "train.num_train_epochs=1"]
    flora("train", *jobs["image-classification"], SMALL, *more, f"output={tmp_path / 'run'}")
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["init_weights"], saved["allocation"]) == ("gradient", "uniform")


@pytest.mark.parametrize(
    ("adapter", "batches", "budget"),
    [
        ({}, 8, 0.01),
        ({"budget": 0.1}, 8, 0.1),
        ({"budget": 0.1, "allocation": "uniform"}, 0, 0.1),
        ({"budget": 0.1, "init_weights": "released"}, 0, 0.1),
        ({"r": 4}, 0, None),
        ({"r": 4, "init_weights": "gradient"}, 8, None),
    ],
)
def test_what_a_job_does_not_say(adapter, batches, budget):
    job = parse_job({"task": "text-classification", "model": "m", "data": "d", "output": "o", "adapter": adapter})
    assert (job.gradient_batches, job.adapter.get("budget")) == (batches, budget)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_batches": -1}, "gradient_batches must be a whole number from 0, got -1"),
        ({"gradient_batches": "many"}, "gradient_batches must be a whole number from 0, got 'many'"),
        (
            {"gradient_batches": 0, "warmup_head": 1},
            "warmup_head is for a pass of gradients; give gradient_batches too",
        ),
        ({"gradient_batches": 1, "warmup_head": -1}, "warmup_head must be a whole number from 0, got -1"),
        (
            {"gradient_batches": 1, "warmup_head": 1, "task": "causal-lm"},
            "warmup_head is for a new head, and task causal-lm has none",
        ),
        (
            {"gradient_batches": 1, "adapter": {"init_weights": "released"}},
            "gradient_batches and adapter.init_weights='released' contradict each other",
        ),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=re.escape(f"job: {message}")):
        parse_job({"task": "text-classification", "model": "m", "data": "d", "output": "o", **changes})


def test_the_warm_up_moves_the_head_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.classifier = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    model = Model().train()
    model.body.bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with gradients._only_trained(model, ["classifier"]):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert [id(p) for p in trained] == [id(p) for p in model.classifier.parameters()]
        optimizer = torch.optim.SGD(trained, 0.1)
        model.classifier(model.norm(model.body(torch.randn(8, 4)))).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        "classifier.weight",
        "classifier.bias",
    ]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert model.norm.momentum == 0.1


TEXT = {"task": "text-classification", "data": "d.csv", "output": "o"}


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("BertForSequenceClassification", {}, ["classifier"]),
        ("BertForMaskedLM", {}, ["bert.pooler.dense", "classifier"]),  # whose checkpoint lacks both
        ("BartForSequenceClassification", {}, []),  # the checkpoint's own head, which PEFT does not know
        ("BartForSequenceClassification", {"modules_to_save": ["classification_head"]}, ["classification_head"]),
    ],
)
def test_what_is_warmed_up_is_what_is_saved(name, more, expected, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    cls = getattr(transformers, name)
    cls(cls.config_class(vocab_size=20, num_labels=2, **sizes)).save_pretrained(tmp_path)
    job = parse_job({**TEXT, "model": str(tmp_path), "adapter": {"r": 2, **more}})
    base = load_base(job.task, job.model, ["a", "b"])
    assert trained_whole(job, base) == expected
    adapted = attach(job, base).get_base_model()
    assert [n for n, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)] == expected


def test_a_head_that_is_not_found_is_to_be_named():
    with pytest.raises(
        ValueError, match=r"no new head found in Linear to be trained .* adapter\.modules_to_save=\[…\], or"
    ):
        gradients.warm_heads(nn.Linear(2, 2), [], 1, None, None)


def test_bf16_is_that_of_the_pass_and_of_the_training_after_the_warm_up(jobs, tiny, tmp_path, monkeypatch):
    """With a base in bf16, images in float32 fail wherever autocast is not on."""
    shutil.copytree(tiny / "image" / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    monkeypatch.setattr(gradients, "are_noise", lambda agreement: False)
    more = [f"model={tmp_path / 'model'}", "train.bf16=true", "train.max_steps=1", f"output={tmp_path / 'run'}"]
    record = json.loads(flora("train", *jobs["image-classification"], *ADAPTER, *more, "--json")[0])
    assert record["gradients"]["batches"] == 2
    assert record["steps"] == 1


@pytest.mark.parametrize(("precision", "dtype", "scale"), [("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 1024)])
def test_loss_in_mixed_precision(precision, dtype, scale, monkeypatch):
    layer, seen = nn.Linear(4, 2), []

    def loss(model, batch):
        seen.append(model(batch))
        return seen[-1].float().square().sum()

    monkeypatch.setattr(gradients, "_loss", loss)
    x = torch.randn(3, 4)
    found = {}
    for given in ("no", precision):
        arguments = SimpleNamespace(mixed_precision=given, device=torch.device("cpu"))
        found[given] = gradients._under_autocast(arguments)(layer, x)
    assert [output.dtype for output in seen] == [torch.float32, dtype]
    torch.testing.assert_close(found[precision], found["no"] * scale, rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [[], ["train.gradient_checkpointing_kwargs={use_reentrant: true}"]])
def test_activations_are_checkpointed_in_the_pass_too(options, jobs, tmp_path, monkeypatch):
    calls = []

    def allocate(model, config, batches, loss):
        handle = model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        found = florapeft.allocate(model, config, batches, loss)
        handle.remove()
        return found

    monkeypatch.setattr(gradients, "allocate", allocate)
    arguments = [*jobs["causal-lm"], SMALL, "gradient_batches=1", "adapter.budget=0.4", "train.max_steps=1"]
    flora("train", *arguments, "train.gradient_checkpointing=true", *options, f"output={tmp_path / 'run'}")
    assert len(calls) == 2  # once more in the backward pass
