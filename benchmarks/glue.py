"""Sentences of GLUE (Wang et al., 2018) for MiniLM: CoLA, RTE, MRPC and SST-2, from local files or the hub."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import Batch, Task, minilm

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Source:
    """Where a task's examples are, in GLUE's own files and on the hub, and how many tokens they may have.

    Attributes:
        folder: of the files.
        columns: of the texts, in the files.
        label: column of the label, in the files.
        positive: the label that counts as 1, in the files and on the hub.
        has_header: whether the files begin with one.
        fields: of the texts, on the hub.
        length: tokens of all texts together.
    """

    folder: str
    columns: tuple[int, ...]
    label: int
    positive: tuple[str, int]
    has_header: bool
    fields: tuple[str, ...]
    length: int


PAIR = ("sentence1", "sentence2")
SOURCES = {
    "cola": Source("CoLA", (3,), 1, ("1", 1), False, ("sentence",), 32),
    "rte": Source("RTE", (1, 2), 3, ("entailment", 0), True, PAIR, 128),
    "mrpc": Source("MRPC", (3, 4), 0, ("1", 1), True, PAIR, 96),
    "sst2": Source("SST-2", (0,), 1, ("1", 1), True, ("sentence",), 48),
}

Example = tuple[tuple[str, ...], int]  # texts and label


def glue(name: str, data: Path, train_examples: int = 3000, held_out_examples: int = 1000) -> Task:
    """A task of GLUE: a part of its training examples, others for validation, and its dev examples for the test.

    At most two thirds of the training examples are used for training.
    """
    from transformers import AutoTokenizer

    tokenizer, source = AutoTokenizer.from_pretrained(minilm()), SOURCES[name]

    def split(examples: Sequence[Example]) -> Batch:
        texts = [list(column) for column in zip(*(texts for texts, _ in examples), strict=True)]
        encoded = tokenizer(*texts, padding=True, truncation=True, max_length=source.length, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([label for _, label in examples])}

    read = _from_files if (data / "glue").is_dir() else _from_hub
    examples, dev = read(name, data, "train"), read(name, data, "dev")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    first = min(train_examples, 2 * len(examples) // 3)
    chosen, held_out = order[:first], order[first : first + held_out_examples]
    score = "Matthews correlation" if name == "cola" else "accuracy"
    parts = ([examples[i] for i in chosen], [examples[i] for i in held_out], dev)
    return Task(name, data, "classifier", *map(split, parts), score)


def _from_files(name: str, data: Path, part: str) -> list[Example]:
    source = SOURCES[name]
    with (data / "glue" / source.folder / f"{part}.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[int(source.has_header) :]
    return [(tuple(row[c] for c in source.columns), int(row[source.label] == source.positive[0])) for row in rows]


def _from_hub(name: str, data: Path, part: str) -> list[Example]:
    import datasets

    source = SOURCES[name]
    try:
        rows = datasets.load_dataset(HUB, name, split={"train": "train", "dev": "validation"}[part])
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no folder {data / 'glue'}, and the hub's {HUB} cannot be had: {reason}") from error
    texts = zip(*(rows[field] for field in source.fields), strict=True)
    return [(text, int(label == source.positive[1])) for text, label in zip(texts, rows["label"], strict=True)]
