"""The tasks of benchmarks/accuracy.py as all methods meet them: how each is trained, its warm heads, its budget."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import tasks
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from florapeft import FloraConfig
from florapeft.train.fitting import adapted


@dataclass(frozen=True)
class Setting:
    """How a task is trained: AdamW, a warm-up of 5% of the steps and cosine decay; batch norms in eval mode.

    Attributes:
        targets: FLoRA's `target_modules`; the other methods adapt the same layers.
        share: adapter parameters, of the network's without its head.
        rate: where the search for a rate begins, the same for all methods.
        head_rate: of the head, in its first epoch; later where the search for its rate begins.
        gradient_batches: how many batches a start from gradients sees.
        data: arguments of the task's data.
        bf16: whether forward passes run under autocast to bfloat16; what is trained stays in float32.
    """

    targets: str | list[str]
    share: float
    epochs: int
    batch_size: int
    rate: float
    head_rate: float
    gradient_batches: int
    data: dict[str, int]
    bf16: bool = False


_PAIR = r"image\..*conv\d|text\.encoder\.layer\.[45]\..*(query|key|value|dense)"
_BERT = ["query", "key", "value", "dense"]
SETTINGS = {
    "cifar100": Setting(r".*conv\d", 0.10, 4, 64, 1e-2, 3.2e-2, 8, {"per_class": 25}, bf16=True),
    "captions": Setting(_PAIR, 0.0072, 4, 64, 1e-2, 1e-2, 8, {"per_class": 25}, bf16=True),
    "digits": Setting("all-weights", 0.05, 12, 64, 1e-2, 1e-2, 8, {}),
    "experts": Setting("all-weights", 0.05, 1, 16, 1e-2, 1e-2, 8, {}),
    # not bf16: torch 2.13's gradient of a 3-D kernel over 2 x 2 x 2 voxels is not a number then
    "volumes": Setting(r".*conv\d", 0.10, 6, 64, 1e-2, 3.2e-2, 8, {}),
    "cola": Setting(_BERT, 0.01, 3, 16, 1e-3, 3.2e-3, 16, {"train_examples": 3000}, bf16=True),
    "rte": Setting(_BERT, 0.01, 2, 16, 1e-3, 3.2e-3, 16, {"train_examples": 800, "held_out_examples": 500}, bf16=True),
    "mrpc": Setting(_BERT, 0.01, 2, 16, 1e-3, 3.2e-3, 16, {"train_examples": 800, "held_out_examples": 500}, bf16=True),
    "sst2": Setting(
        _BERT, 0.01, 2, 16, 3.2e-3, 3.2e-3, 16, {"train_examples": 1000, "held_out_examples": 500}, bf16=True
    ),
}

# What the size for a GPU changes: more examples, longer training.
FOR_GPU: dict[str, dict[str, Any]] = {
    "cifar100": {"epochs": 30, "data": {"per_class": 40}},
    "captions": {"epochs": 20, "data": {"per_class": 50}},
    "digits": {"epochs": 40},
    "experts": {"epochs": 4},
    "volumes": {"epochs": 20},
    "cola": {"epochs": 5, "data": {"train_examples": 5700}},
    "rte": {"epochs": 5, "data": {"train_examples": 1600, "held_out_examples": 800}},
    "mrpc": {"epochs": 5, "data": {"train_examples": 2400, "held_out_examples": 1200}},
    "sst2": {"epochs": 3, "data": {"train_examples": 40000, "held_out_examples": 2000}},
}


def setting(name: str, device: str = "cpu") -> Setting:
    """Of a task, at the size for a device."""
    return replace(SETTINGS[name], **({} if device == "cpu" else FOR_GPU[name]))


class Case:
    """A task, how it is trained, and what all methods share: warm heads, targets, the number of parameters."""

    def __init__(self, name: str, setting: Setting, data: Path, device: str = "cpu") -> None:
        self.name, self.setting, self.device = name, setting, device
        self.task = tasks.TASKS[name](data, **setting.data).to(device)
        self.heads: dict[int, dict[str, Tensor]] = {}
        self.fits: dict[str, Any] = {}  # what `accuracy.fitted` has found

    def model(self, seed: int) -> nn.Module:
        """The frozen network; a new head is drawn from `seed` and has trained alone for one epoch."""
        model = self.task.model(seed).requires_grad_(False).to(self.device)
        if self.task.head is None:
            return model
        head = model.get_submodule(self.task.head)
        if seed not in self.heads:
            head.requires_grad_(True)
            fit(self, model, [(self.setting.head_rate, list(head.parameters()))], 1, seed)
            self.heads[seed] = {key: value.clone() for key, value in head.state_dict().items()}
            head.requires_grad_(False)
        head.load_state_dict(self.heads[seed])
        return model

    def train_for(self, epochs: int | None) -> str:
        """Trains for so many epochs instead of the task's own, if any are given; returns what its records add."""
        if not epochs:
            return ""
        self.setting = replace(self.setting, epochs=epochs)
        return f"_{epochs}_epochs"

    def at(self, share: float) -> Case:
        """The same at another budget."""
        other = copy.copy(self)
        other.setting, other.fits = replace(self.setting, share=share), {}
        other.__dict__.pop("goal", None)
        return other

    @cached_property
    def goal(self) -> int:
        """Adapter parameters."""
        with torch.random.fork_rng(devices=[]):
            model = self.task.model(0)
        body = [p.numel() for name, p in model.named_parameters() if not self.in_head(name)]
        return round(self.setting.share * sum(body))

    @cached_property
    def layers(self) -> list[str]:
        """The layers that FLoRA adapts, and the parameters that no layer stands for."""
        return adapted(get_peft_model(self.task.model(0), self.config()).get_base_model())

    @property
    def steps(self) -> int:
        """Of the optimizer, in a run."""
        return tasks.count_steps(self.task.train, self.setting.epochs, self.setting.batch_size)

    def in_head(self, parameter: str) -> bool:
        """Whether a parameter of this name, in a model with or without an adapter, is one of the new head's."""
        return self.task.head in parameter.split(".")

    @property
    def trained_along(self) -> list[str] | None:
        return None if self.task.head is None else [self.task.head]

    def config(self, **fields: Any) -> FloraConfig:
        given = {"target_modules": self.setting.targets, "modules_to_save": self.trained_along, "budget": self.goal}
        return FloraConfig(**given, **fields)

    def loss(self, model: nn.Module, batch: tasks.Batch) -> Tensor:
        with self.precision():
            return self.task.loss(model, batch)

    def score(self, model: nn.Module, split: tasks.Batch) -> float:
        with self.precision():
            return self.task.score(model, split)

    def further(self, model: nn.Module) -> dict[str, float]:
        with self.precision():
            return self.task.further(model)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.setting.bf16)

    def seconds(self) -> float:
        """Of the processor since some moment, for the machine may be shared; with a GPU, of the clock."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def batches(self, seed: int) -> list[tasks.Batch]:
        """Some of the training batches, for what starts from gradients."""
        order = torch.randperm(len(self.task.train["labels"]), generator=torch.Generator().manual_seed(seed))
        count = self.setting.gradient_batches
        return tasks.batches(self.task.train, self.setting.batch_size, order)[:count]


def prepare(threads: int) -> None:
    """For runs of this process; what is capped or left out stands in their records, and is not said on the way."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("florapeft").setLevel(logging.ERROR)


def available(names: Iterable[str], data: Path, device: str = "cpu") -> Iterator[Case]:
    """The tasks whose data are there; the others are named, with the reason."""
    for name in names:
        try:
            yield Case(name, setting(name, device), data, device)
        except FileNotFoundError as missing:
            print(f"{name} is left out: {missing}", flush=True)


def fit(
    case: Case,
    model: nn.Module,
    groups: list[tuple[float | None, list[nn.Parameter]]],
    epochs: int,
    seed: int,
    every_step: Callable[[nn.Module, torch.optim.Optimizer, int], None] | None = None,
    keep: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
) -> float:
    """Trains groups of parameters, each at its rate, in place, maybe kept orthonormal; returns the last loss."""
    torch.manual_seed(seed)
    parts = [{"params": parameters, "lr": rate} for rate, parameters in groups if parameters]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.0)
    if every_step is not None:
        steps = count(1)
        optimizer.register_step_post_hook(lambda optimizer, *_: every_step(model, optimizer, next(steps)))
    if keep is not None:
        keep(model, optimizer)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return tasks.fit(model, optimizer, case.task.train, epochs, case.setting.batch_size, case.loss)
