"""benchmarks/glue.py: the same examples from GLUE's own files and from the hub, and none in two splits."""

import datasets
import glue
import pytest
import torch

HEADERS = {"rte": "index\tsentence1\tsentence2\tlabel", "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"}
HEADERS["sst2"] = "sentence\tlabel"
LABELS = {"rte": ("not_entailment", "entailment")}


def tokenizer(*columns, max_length, **_):
    """Every text is the number that it ends with."""
    return {"input_ids": torch.tensor([[int(text.split()[-1]) for text in row] for row in zip(*columns, strict=True)])}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Thirty training and six dev examples per task; the label is whether the number is odd."""
    monkeypatch.setattr(glue, "minilm", lambda: "MiniLM")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: tokenizer)

    def line(name, n):
        label = LABELS.get(name, ("0", "1"))[n % 2]
        return {
            "cola": f"gj04\t{label}\t\tso {n}",
            "rte": f'{n}\tit "was {n}\tso {n}\t{label}',
            "mrpc": f"{label}\t1\t2\tit was {n}\tso {n}",
            "sst2": f"so {n}\t{label}",
        }[name]

    for name, source in glue.SOURCES.items():
        folder = tmp_path / "glue" / source.folder
        folder.mkdir(parents=True)
        for part, numbers in (("train", range(30)), ("dev", range(30, 36))):
            header = [HEADERS[name]] if name in HEADERS else []
            (folder / f"{part}.tsv").write_text("\n".join([*header, *(line(name, n) for n in numbers)]) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", glue.SOURCES)
def test_no_example_is_in_two_splits_and_labels_go_with_their_texts(files, name):
    task = glue.glue(name, files, train_examples=100, held_out_examples=6)
    parts = [task.train, task.validation, task.test]
    assert [len(part["labels"]) for part in parts] == [20, 6, 6]
    numbers = torch.cat([part["input_ids"][:, -1] for part in parts])
    assert len(numbers.unique()) == 32
    for part in parts:
        assert torch.equal(part["input_ids"][:, 0], part["input_ids"][:, -1])
        assert torch.equal(part["labels"], part["input_ids"][:, 0] % 2)


@pytest.mark.parametrize("name", glue.SOURCES)
def test_the_hub_gives_the_same(files, name, monkeypatch, tmp_path):
    local = glue.glue(name, files)
    source = glue.SOURCES[name]

    def load_dataset(path, config, split):
        assert (path, config) == ("nyu-mll/glue", name)
        numbers = range(30) if split == "train" else range(30, 36)
        texts = {field: [f"so {n}" for n in numbers] for field in source.fields}
        labels = [n % 2 if name != "rte" else 1 - n % 2 for n in numbers]  # RTE's first label is entailment there
        return datasets.Dataset.from_dict({**texts, "label": labels})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = glue.glue(name, tmp_path / "elsewhere")
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(hub, part)["labels"], getattr(local, part)["labels"])
        assert torch.equal(getattr(hub, part)["input_ids"], getattr(local, part)["input_ids"])


def test_without_files_and_without_the_hub(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\nmore")

    monkeypatch.setattr(glue, "minilm", lambda: "MiniLM")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: tokenizer)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"no folder .*, and the hub's nyu-mll/glue cannot be had: Couldn't"):
        glue.glue("sst2", tmp_path)
