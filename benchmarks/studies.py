"""What makes FLoRA adapt well? Its start, factors, form, ranks, locality and rates, each varied alone on a task.

ResNet-20 is adapted to CIFAR-100 as in benchmarks/accuracy.py, or another network to its task, at the same budget; a
variant differs from "FLoRA, gradient start" in one thing. Every variant is trained at each of its rates; the one that
is best on the validation split is reported, by its score on the test split.

    python benchmarks/studies.py --data ../shared/data             # writes benchmarks/results/studies_*.json (resumes)
    python benchmarks/studies.py start ranks                       # some of the studies
    python benchmarks/studies.py factors --task volumes
    python benchmarks/studies.py recipe --epochs 12 --rates 3.2e-3 5.6e-3 1e-2   # longer, in a record of its own
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import record
import torch
from accuracy import changing
from cases import SETTINGS, Case, fit, prepare
from torch import nn
from variants import (
    Between,
    Build,
    absorb,
    exact_energies,
    form,
    gradient_start,
    gram,
    plain,
    realign,
    retract,
    scaled,
    taps,
    zero_output,
)

from florapeft.train.fitting import WITHIN
from florapeft.train.trials import spread

_AROUND = (1e-2, 1.8e-2, 3.2e-2)
# of a task, unless a variant has its own
RATES = {"cifar100": (1.8e-2,), "digits": _AROUND, "experts": _AROUND, "volumes": _AROUND}


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        build: attaches the adapter.
        rates: of the adapter; None for the task's in `RATES`.
        factor_rate: rate of the factors, of the core's.
        between: what is done after every step.
        setting: fields of the task's setting.
        unequal: whether it is meant to have another number of parameters.
    """

    build: Build = gradient_start
    rates: tuple[float, ...] | None = None
    factor_rate: float = 1.0
    between: Between | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    unequal: bool = False


_GRID = (3.2e-3, 1e-2, 3.2e-2, 1e-1)
SPECTRUM = partial(gradient_start, allocation="spectrum")
DECOMPOSED = partial(form, decomposed=True, allocation="spectrum")
GAINS = ["bn1.weight", "bn2.weight"]  # ResNet-20's norms
STUDIES: dict[str, dict[str, Variant]] = {
    "start": {
        "core zero, bases of the summed gradient": Variant(),
        "output factor zero, core orthonormal": Variant(zero_output, (5.6e-3, 1e-2, 1.8e-2, 3.2e-2)),
        "core zero, factors of half the length": Variant(partial(scaled, length=0.5), (3.2e-2, 5.6e-2, 1e-1)),
        "core zero, factors of twice the length": Variant(partial(scaled, length=2.0), (1e-3, 1.8e-3, 3.2e-3, 5.6e-3)),
        "bases of the batches' Gram matrices": Variant(gram),
        "gradients of 1 batch": Variant(setting={"gradient_batches": 1}),
        "gradients of all batches": Variant(setting={"gradient_batches": 1000}),
        "no gradients (default start)": Variant(plain, (5.6e-3, 1e-2, 1.8e-2)),
        "no gradients, all factors but the output's kept orthonormal": Variant(
            plain, (5.6e-3, 1e-2, 1.8e-2), between=retract
        ),
    },
    "factors": {
        "fixed": Variant(factor_rate=0.0, rates=_AROUND, unequal=True),
        "at a third of the core's rate": Variant(factor_rate=1 / 3, rates=(*_AROUND, 5.6e-2)),
        "at the core's rate": Variant(rates=_AROUND),
        "at three times the core's rate": Variant(factor_rate=3.0, rates=(3.2e-3, 5.6e-3, 1e-2)),
        "kept orthonormal": Variant(between=retract, rates=_AROUND),
        "taken anew after 5 and 20 steps": Variant(between=realign, rates=_AROUND),
    },
    "form": {
        "weight plus update": Variant(partial(form, decomposed=False), _AROUND),
        "magnitudes apart, as in DoRA": Variant(partial(form, decomposed=True), (*_AROUND, 5.6e-2)),
    },
    "ranks": {
        "uniform": Variant(),
        **{f"uniform, kernel rank {r}": Variant(partial(gradient_start, kernel_r=r)) for r in (1, 2, 3)},
        "spectrum": Variant(SPECTRUM),
        "spectrum, kernel rank 2": Variant(partial(SPECTRUM, kernel_r=2)),
        "exact energies of the gradient": Variant(exact_energies),
    },
    "factor-rates": {
        "at a tenth of the core's rate": Variant(SPECTRUM, (*_AROUND, 5.6e-2), 0.1),
        "at a third of the core's rate": Variant(SPECTRUM, (*_AROUND, 5.6e-2), 1 / 3),
        "at the core's rate": Variant(SPECTRUM, (5.6e-3, *_AROUND)),
    },
    "recipe": {
        "as it is": Variant(SPECTRUM, (5.6e-3, *_AROUND)),
        "factors kept orthonormal": Variant(SPECTRUM, (*_AROUND, 5.6e-2), between=retract),
        "magnitudes apart, as in DoRA": Variant(DECOMPOSED, (*_AROUND, 5.6e-2)),
        "factors kept orthonormal, what they lose taken up by the core": Variant(
            SPECTRUM, (*_AROUND, 5.6e-2), between=absorb
        ),
        "factors kept orthonormal and magnitudes apart": Variant(DECOMPOSED, (*_AROUND, 5.6e-2), between=retract),
        "factors kept orthonormal, gains of norms adapted too": Variant(
            partial(SPECTRUM, target_parameters=GAINS), (*_AROUND, 5.6e-2), between=retract
        ),
    },
    "locality": {
        f"kernel rank {r}, taps {'permuted' if permuted else 'in place'}": Variant(
            partial(taps, permuted=permuted, kernel_r=r)
        )
        for r in (1, 2)
        for permuted in (False, True)
    },
    "kernels": {
        f"{100 * share:g}% of the network, {label}": Variant(
            partial(plain, kernel_r=rank), (1e-2, 3.2e-2), setting={"share": share}
        )
        for share in (0.025, 0.05, 0.1)
        for rank, label in ((None, "as large a share of kernels as of channels"), (2, "kernel rank 2"), (3, "whole"))
    },
    "rates": {
        f"{100 * share:g}% of the network, rate {rate:g}": Variant(rates=(rate,), setting={"share": share})
        for share in (0.025, 0.05, 0.1, 0.2)
        for rate in _GRID
    },
}


class UnequalError(ValueError):
    """A variant has not as many parameters as the others."""


def run(case: Case, name: str, variant: Variant, rate: float, seed: int) -> dict[str, Any]:
    """One run of a variant: its scores on the validation and the test split."""
    case = case.at(variant.setting.get("share", case.setting.share))
    case.setting = replace(case.setting, **variant.setting)
    model = case.model(seed)
    torch.manual_seed(seed)
    model = variant.build(case, model, seed)
    began = case.seconds()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts: dict[str, list[nn.Parameter]] = {"head": [], "core": [], "factors": []}
    for key, parameter in trained.items():
        in_core = not {"core", "flora_core"}.isdisjoint(key.split("."))
        parts["head" if case.in_head(key) else "core" if in_core else "factors"].append(parameter)
    if not variant.factor_rate:
        for parameter in parts["factors"]:
            parameter.requires_grad_(False)
        parts["factors"] = []
    parameters = sum(p.numel() for part in ("core", "factors") for p in parts[part])
    if not variant.unequal and abs(parameters / case.goal - 1) > WITHIN:
        raise UnequalError(f"it has {parameters:,} parameters, not {case.goal:,}")
    groups = [
        (case.setting.head_rate, parts["head"]),
        (rate, parts["core"]),
        (variant.factor_rate * rate, parts["factors"]),
    ]
    between = variant.between and partial(variant.between, case)
    fit(case, model, groups, case.setting.epochs, seed, between)
    return {
        "commit": record.commit(),
        "variant": name,
        "rate": rate,
        "seed": seed,
        "validation": case.score(model, case.task.validation),
        "test": case.score(model, case.task.test),
        "parameters": parameters,
        "seconds": round(case.seconds() - began, 2),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one variant, at the rate that is best on the validation split: mean and deviation on the test split."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for found in runs:
        by_rate.setdefault(found["rate"], []).append(found)
    rate = max(by_rate, key=lambda rate: statistics.mean(run["validation"] for run in by_rate[rate]))
    scores = [run["test"] for run in by_rate[rate]]
    return {
        "rate": rate,
        "rates_tried": sorted(by_rate),
        "validation_mean": statistics.mean(run["validation"] for run in by_rate[rate]),
        "test_mean": statistics.mean(scores),
        "test_std": spread(scores),
        "seeds": len(scores),
        "parameters": by_rate[rate][0]["parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--task", choices=RATES, default="cifar100")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of the task's own; kept in a record apart")
    parser.add_argument("--rates", type=float, nargs="+", help="of all variants, instead of their own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if unknown := set(given.studies) - set(STUDIES):
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    prepare(given.threads)
    case = Case(given.task, SETTINGS[given.task], given.data)
    path = record.RESULTS / f"studies_{given.task}{case.train_for(given.epochs)}.json"
    for study in given.studies or STUDIES:
        rows = {}
        for label, variant in STUDIES[study].items():
            try:
                wanted = replace(variant, rates=tuple(given.rates)) if given.rates else variant
                rows[label] = summary(runs_of(case, path, wanted, given.seeds))
            except UnequalError as reason:
                print(f"{study}: {label} is left out: {reason}", flush=True)
        with changing(path) as results:
            results["setting"] = asdict(case.setting)
            results.setdefault("studies", {})[study] = rows


def runs_of(case: Case, path: Path, variant: Variant, seeds: int) -> list[dict[str, Any]]:
    """A variant at all of its rates and seeds: the runs that `path` has, and the others, which are kept there."""
    name, found = first_name(variant), []
    for rate, seed in product(variant.rates or RATES[case.name], range(seeds)):
        known = [
            r for r in record.read(path).get("runs", []) if (r["variant"], r["rate"], r["seed"]) == (name, rate, seed)
        ]
        if not known:
            known = [run(case, name, variant, rate, seed)]
            print(known[0], flush=True)
            with changing(path) as results:
                results.setdefault("runs", []).extend(known)
        found += known
    return found


def first_name(variant: Variant) -> str:
    """The first name in `STUDIES` of a variant, at any rates: what occurs in several of them is run once."""
    wanted = replace(variant, rates=None)
    named = [(f"{study}: {name}", v) for study, variants in STUDIES.items() for name, v in variants.items()]
    return next(name for name, v in named if replace(v, rates=None) == wanted)


if __name__ == "__main__":
    main()
