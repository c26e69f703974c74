"""Does FLoRA adapt better? Methods at equal trainable parameters on real networks and data.

Every method begins with the same head, trained alone for one epoch, and takes its learning rate from the same grid, by
its score on the validation split; the test split is measured at that rate, over all seeds.

    python benchmarks/accuracy.py cifar100                  # one task; goes on where it was stopped
    python benchmarks/accuracy.py cola --seeds 3            # fewer seeds; more of them can be added later
    python benchmarks/accuracy.py --smoke                   # all tasks, cut short; nothing is written
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import gradient_lora
import record
import tasks
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from florapeft import FloraConfig, FloraLayer, allocate, initialize_from_gradients
from florapeft.train.fitting import RIVALS, Fit, adaptable, attaches, fitting
from florapeft.train.trials import climb, difference, spread

REFERENCE = "FLoRA, gradient start, ranks by spectrum"


@dataclass(frozen=True)
class Setting:
    """How a task is trained: AdamW, a warm-up of 5% of the steps and cosine decay; batch norms in eval mode.

    Attributes:
        targets: FLoRA's `target_modules`; the other methods adapt the same layers.
        share: adapter parameters, of the network's without its head.
        rate: where the search for a rate begins, the same for all methods.
        head_rate: of the head, in its first epoch and later.
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


_BERT = ["query", "key", "value", "dense"]
SETTINGS = {
    "cifar100": Setting(r".*conv\d", 0.10, 3, 64, 1e-2, 1e-2, 8, {"per_class": 25}, bf16=True),
    "digits": Setting("all-weights", 0.05, 12, 64, 1e-2, 1e-2, 8, {}),
    "cola": Setting(_BERT, 0.01, 3, 16, 2e-3, 1e-3, 16, {"train_examples": 3000}),
    "rte": Setting(_BERT, 0.01, 3, 16, 2e-3, 1e-3, 16, {"train_examples": 1600}),
    "mrpc": Setting(_BERT, 0.01, 3, 16, 2e-3, 1e-3, 16, {"train_examples": 2400}),
    "sst2": Setting(_BERT, 0.01, 3, 16, 2e-3, 1e-3, 16, {"train_examples": 3000}),
}


class Case:
    """A task, how it is trained, and what all methods share: warm heads, targets, the number of parameters."""

    def __init__(self, name: str, setting: Setting, data: Path) -> None:
        self.name, self.setting = name, setting
        self.task = tasks.TASKS[name](data, **setting.data)
        self.heads: dict[int, dict[str, Tensor]] = {}
        self.fits: dict[str, Fitted] = {}

    def model(self, seed: int) -> nn.Module:
        """The frozen network; a new head is drawn from `seed` and has trained alone for one epoch."""
        model = self.task.model(seed).requires_grad_(False)
        if self.task.head is None:
            return model
        head = model.get_submodule(self.task.head)
        if seed not in self.heads:
            head.requires_grad_(True)
            fit(self, model, {self.setting.head_rate: list(head.parameters())}, 1, seed)
            self.heads[seed] = {key: value.clone() for key, value in head.state_dict().items()}
            head.requires_grad_(False)
        head.load_state_dict(self.heads[seed])
        return model

    @cached_property
    def goal(self) -> int:
        """Adapter parameters."""
        body = [p.numel() for name, p in self.task.model(0).named_parameters() if not self.in_head(name)]
        return round(self.setting.share * sum(body))

    @cached_property
    def layers(self) -> list[str]:
        """The layers that FLoRA adapts."""
        model = get_peft_model(self.task.model(0), self.config()).get_base_model()
        return [name for name, module in model.named_modules() if isinstance(module, FloraLayer)]

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

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.setting.bf16)

    def batches(self, seed: int) -> list[tasks.Batch]:
        """Some of the training batches, for what starts from gradients."""
        order = torch.randperm(len(self.task.train["labels"]), generator=torch.Generator().manual_seed(seed))
        count = self.setting.gradient_batches
        return tasks.batches(self.task.train, self.setting.batch_size, order)[:count]


class NothingToTrainError(Exception):
    """A method that has no place on a task's network; the message says why."""


# Each takes a case, the network with its warm head, and the seed; returns the network with what is trained, and facts.
Method = Callable[[Case, nn.Module, int], tuple[nn.Module, dict[str, Any]]]


def head_only(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.in_head(name))
    return model, {}


def bitfit(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or case.in_head(name))
    return model, {}


def full(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    return model.requires_grad_(True), {}


class Fitted(NamedTuple):
    """A method of PEFT at `Case.goal` parameters, on those of the layers that it can adapt."""

    fit: Fit
    layers: list[str]
    facts: dict[str, Any]


def fitted(name: str, case: Case, model: nn.Module) -> Fitted:
    if name not in case.fits:
        variants = attaches(name, modules_to_save=case.trained_along)
        layers, left_out = adaptable(variants[0], model, case.layers)
        if not layers:
            raise NothingToTrainError("; ".join(left_out.values()))
        fit = fitting(variants, model, layers, case.goal)
        facts = {"rank": fit.rank, "one_more_in": len(fit.raised), **({"left_out": left_out} if left_out else {})}
        case.fits[name] = Fitted(fit, layers, facts)
    return case.fits[name]


def rival(name: str, case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A method of PEFT at its own start."""
    fit, layers, facts = fitted(name, case, model)
    return fit.attach(model, layers, fit.rank, fit.raised), facts


def gradient_rival(spectrum: bool, case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """LoRA with a start, and maybe with ranks, from gradients."""
    _, layers, facts = fitted("lora", case, model)
    found = gradient_lora.gradients(model, layers, case.batches(seed), case.loss)
    if spectrum:
        ranks = gradient_lora.spectrum_ranks(found, case.goal)
        model, facts = gradient_lora.attach_with(model, ranks, modules_to_save=case.trained_along), {"ranks": ranks}
    else:
        model, facts = rival("lora", case, model, seed)
    gradient_lora.start_from_gradients(model, found)
    return model, facts


def flora(fields: dict[str, Any], case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """FLoRA; fields of its config, and `allocation="spectrum"`, which takes the ranks from gradients."""
    config = case.config(**fields)
    if config.allocation == "spectrum":
        config = allocate(model, config, case.batches(seed), case.loss)
        return get_peft_model(model, config), {"ranks": config.ranks}
    model = get_peft_model(model, config)
    if config.init_weights == "gradient":
        initialize_from_gradients(model, case.batches(seed), case.loss)
    return model, {"ranks": model.peft_config["default"].ranks}


METHODS: dict[str, Method] = {
    "head only": head_only,
    "BitFit": bitfit,
    "full fine-tuning": full,
    **{said.label: partial(rival, name) for name, said in RIVALS.items()},
    "LoRA, gradient start": partial(gradient_rival, False),
    "LoRA, gradient start, ranks by spectrum": partial(gradient_rival, True),
    "FLoRA, released start": partial(flora, {"init_weights": "released", "kernel_r": 2, "scale": 4.0}),
    "FLoRA": partial(flora, {}),
    "FLoRA, gradient start": partial(flora, {"init_weights": "gradient"}),
    REFERENCE: partial(flora, {"init_weights": "gradient", "allocation": "spectrum"}),
}


def fit(case: Case, model: nn.Module, groups: dict[float, list[nn.Parameter]], epochs: int, seed: int) -> float:
    """Trains parameters by their rate, in place; returns the last loss."""
    torch.manual_seed(seed)
    parts = [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return tasks.fit(model, optimizer, case.task.train, epochs, case.setting.batch_size, case.loss)


def train(case: Case, method: str, rate: float, seed: int) -> dict[str, Any]:
    """One run, from the warm head to the scores on the validation and the test split.

    Its seconds are the processor's, for the machine may be shared.
    """
    task, setting = case.task, case.setting
    model = case.model(seed)
    torch.manual_seed(seed)
    began = time.process_time()
    model, facts = METHODS[method](case, model, seed)
    started = time.process_time()
    head = [p for n, p in model.named_parameters() if p.requires_grad and case.in_head(n)]
    body = [p for n, p in model.named_parameters() if p.requires_grad and not case.in_head(n)]
    if not head + body:
        raise NothingToTrainError("the network has no such parameters")
    groups = {rate: body, setting.head_rate: head} if body else {rate: head}
    if rate == setting.head_rate:
        groups = {rate: body + head}
    loss = fit(case, model, groups, setting.epochs, seed)
    seconds = time.process_time() - started
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "validation": case.score(model, task.validation),
        "test": case.score(model, task.test),
        "final_loss": loss if math.isfinite(loss) else None,
        "parameters": sum(parameter.numel() for parameter in body),
        "start_seconds": round(started - began, 2),
        "seconds": round(seconds, 2),
        **facts,
    }


def compare(case: Case, methods: list[str], seeds: int, search_seeds: int, path: Path) -> None:
    """Searches a rate per method, then runs the other seeds at it; every finished run is kept in `path`.

    Several processes, each with methods of its own, may work on one file.
    """
    with changing(path) as results:
        results["task"], results["score"], results["setting"] = case.name, case.task.score_name, asdict(case.setting)
        results["goal"], results["layers"], results["search_seeds"] = case.goal, len(case.layers), search_seeds
        results["examples"] = {p: len(getattr(case.task, p)["labels"]) for p in ("train", "validation", "test")}
        runs = results.setdefault("runs", [])

    def run(method: str, rate: float, seed: int) -> dict[str, Any]:
        for done in runs:
            if (done["method"], done["rate"], done["seed"]) == (method, rate, seed):
                return done
        runs.append(train(case, method, rate, seed))
        print(case.name, {key: value for key, value in runs[-1].items() if key != "ranks"}, flush=True)
        with changing(path) as results:
            results["runs"].append(runs[-1])
        return runs[-1]

    for method in methods:
        score = lambda rate, method=method: statistics.mean(  # noqa: E731
            run(method, rate, seed)["validation"] for seed in range(search_seeds)
        )
        try:
            rate = climb(case.setting.rate, score)
        except NothingToTrainError as reason:
            with changing(path) as results:
                results.setdefault("left_out", {})[method] = str(reason)
            continue
        for seed in range(seeds):
            run(method, rate, seed)
        with changing(path) as results:
            results.setdefault("rates", {})[method] = rate
            results["methods"] = summary(results)


@contextmanager
def changing(path: Path) -> Iterator[dict[str, Any]]:
    """The record at `path`, for this process alone, written at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = record.read(path)
        yield results
        record.write(path, results)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Per method at its rate: scores, their mean and deviation, and paired differences to `REFERENCE`."""
    chosen = {
        method: [run for run in results["runs"] if run["method"] == method and run["rate"] == results["rates"][method]]
        for method in METHODS
        if method in results["rates"]
    }
    tests = {method: {run["seed"]: run["test"] for run in runs} for method, runs in chosen.items()}
    rows = {}
    for method, runs in chosen.items():
        scores = [run["test"] for run in runs]
        rows[method] = {
            "rate": results["rates"][method],
            "rates_tried": sorted({run["rate"] for run in results["runs"] if run["method"] == method}),
            "test_mean": statistics.mean(scores),
            "test_std": spread(scores),
            "validation_mean": statistics.mean(run["validation"] for run in runs),
            "seeds": len(runs),
            "parameters": round(statistics.mean(run["parameters"] for run in runs)),
            "seconds": statistics.median(run["seconds"] for run in runs),
            "start_seconds": statistics.median(run["start_seconds"] for run in runs),
        }
        if REFERENCE in tests and method != REFERENCE:
            rows[method]["difference"] = difference(tests[method], tests[REFERENCE])._asdict()
    return rows


def cut_short(case: Case) -> None:
    """Leaves 64 examples of each split and one epoch, for a test of the script itself."""
    parts = {part: tasks.batches(getattr(case.task, part), 64)[0] for part in ("train", "validation", "test")}
    case.task = replace(case.task, **parts)
    case.setting = replace(case.setting, epochs=1, gradient_batches=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(SETTINGS)}; default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="of the figures on the test split")
    parser.add_argument("--search-seeds", type=int, default=2, help="of the search for a rate")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="64 examples, one epoch, one seed; nothing is written")
    given = parser.parse_args(arguments)
    if unknown := set(given.tasks) - set(SETTINGS):
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("florapeft").setLevel(logging.ERROR)  # what is capped or left out stands in the results
    for name in given.tasks or SETTINGS:
        case = Case(name, SETTINGS[name], given.data)
        if given.smoke:
            cut_short(case)
            for method in given.methods:
                try:
                    print(name, train(case, method, case.setting.rate, 0)["method"], "runs", flush=True)
                except NothingToTrainError as reason:
                    print(name, method, f"is left out: {reason}", flush=True)
        else:
            compare(case, given.methods, given.seeds, given.search_seeds, record.RESULTS / f"accuracy_{name}.json")


if __name__ == "__main__":
    main()
