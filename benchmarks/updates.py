"""Real updates to measure structure on: networks fine-tuned in full on the tasks of `tasks.py`, before and after.

Fine-tuning takes some minutes; its result is kept in a folder that git ignores, and read from there the next time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tasks
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

KEPT = Path(__file__).resolve().parents[1] / "runs" / "updates"


@dataclass(frozen=True)
class Setting:
    """AdamW on all parameters, the new head faster; cosine decay to zero after a warm-up of 5% of the steps."""

    epochs: int
    batch_size: int
    rate: float
    head_rate: float


SETTINGS = {"cifar100": Setting(8, 64, 1e-3, 1e-2), "cola": Setting(2, 16, 5e-5, 1e-3)}
LOADED = {
    "cifar100": tasks.cifar100,
    "cola": lambda data: tasks.cola(data, train_sentences=2000),
}


@dataclass(frozen=True)
class Pair:
    """A network before and after full fine-tuning, and what fine-tuning was worth.

    `score_base` is the score with the tuned head, batch norms and all else, but the adapted weights of the base.
    """

    task: tasks.Task
    base: nn.Module
    tuned: nn.Module
    score: float
    seconds: float


def pair(name: str, data: Path) -> Pair:
    """The pair of one task; seed 0."""
    task, path = LOADED[name](data), KEPT / f"{name}.safetensors"
    base, tuned = task.model(seed=0), task.model(seed=0)
    if not path.exists():
        began = time.perf_counter()
        _tune(task, tuned, SETTINGS[name])
        seconds = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in tuned.state_dict().items()}
        save_file(state, path, {"score": repr(task.score(tuned, task.test)), "seconds": repr(seconds)})
    tuned.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        measured = file.metadata()
    return Pair(task, base.eval(), tuned.eval(), float(measured["score"]), float(measured["seconds"]))


def _tune(task: tasks.Task, model: nn.Module, setting: Setting) -> None:
    head = {id(parameter) for parameter in model.get_submodule(task.head).parameters()}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[id(parameter) in head].append(parameter)
    rates = [{"params": groups[False], "lr": setting.rate}, {"params": groups[True], "lr": setting.head_rate}]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
    tasks.fit(model.train(), optimizer, task.train, setting.epochs, setting.batch_size, task.augmented_loss)
