"""What makes FLoRA adapt well? Its start, its ranks, locality and rates, each varied alone on one convolutional task.

ResNet-20 is adapted to CIFAR-100 as in benchmarks/accuracy.py, at the same budget; a variant differs from "FLoRA,
gradient start" in one thing. Every variant is trained at each of its rates; the one that is best on the validation
split is reported, by its score on the test split.

    python benchmarks/studies.py --data ../shared/data             # writes benchmarks/results/studies.json (resumes)
    python benchmarks/studies.py start ranks                       # some of the studies
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import record
import tasks
import torch
from accuracy import changing, flora
from cases import SETTINGS, Case, fit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from florapeft import FloraLayer
from florapeft.budget import choices_from_energies, rank_grid, spend_on_energy
from florapeft.gradient_sums import GradientSum, Weight, gradient_sums
from florapeft.init import start_from_bases
from florapeft.train.trials import spread
from florapeft.tucker import Tucker, captured_energy, hosvd, hosvd_core, unfold

RATE = 1.8e-2
Build = Callable[[Case, nn.Module, int], nn.Module]


def layers(model: PeftModel) -> dict[str, FloraLayer]:
    return {n: module for n, module in model.get_base_model().named_modules() if isinstance(module, FloraLayer)}


def gradient_start(case: Case, model: nn.Module, seed: int, **fields: Any) -> PeftModel:
    """FLoRA at the case's budget with its start from gradients: factors the leading HOSVD bases, core zero."""
    return flora({"init_weights": "gradient", **fields}, case, model, seed)[0]


def plain(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """FLoRA without data."""
    return flora({}, case, model, seed)[0]


def sums(case: Case, model: nn.Module, batches: list[tasks.Batch]) -> dict[str, GradientSum]:
    """The summed gradients of the weights that are adapted."""
    weights = {name: Weight(model.get_submodule(name), "weight") for name in case.layers}
    return gradient_sums(model, weights, batches, case.loss)


@torch.no_grad()
def zero_output(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """The bases of gradients in all modes but the output's, whose factor is zero; the core's rows orthonormal."""
    model = gradient_start(case, model, seed)
    for layer in layers(model).values():
        core, factors = layer.tucker("default")
        if factors[0] is not None:
            nn.init.orthogonal_(unfold(core, 0))
            factors[0].zero_()
    return model


def gram(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """Bases of the unfolded gradients' Gram matrices, summed over batches, instead of those of the summed gradient."""
    found: dict[tuple[str, int], Tensor] = {}
    for batch in case.batches(seed):
        for name, total in sums(case, model, [batch]).items():
            for mode in range(4):
                unfolded = unfold(total.value.to_tensor(), mode)
                found[name, mode] = found.get((name, mode), 0) + unfolded @ unfolded.mT
    model = get_peft_model(model, case.config())
    for name, layer in layers(model).items():
        tucker = layer.tucker("default")
        leading = [torch.linalg.eigh(found[name, mode]).eigenvectors.flip(1) for mode in range(4)]
        start_from_bases(tucker, [basis[:, :r] for basis, r in zip(leading, tucker.rank, strict=True)])
    return model


def exact_energies(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """Ranks by the energy of the gradient that each keeps, not by its estimate from the spectra of the unfoldings."""
    totals = sums(case, model, case.batches(seed))
    choices = {}
    for name, total in totals.items():
        gradient = total.value.to_tensor()
        grid = rank_grid(gradient.shape)
        energies = captured_energy(hosvd_core(gradient), grid)
        energies *= gradient.numel() / energies.max()
        choices[name] = choices_from_energies(gradient.shape, energies.flatten().tolist())
    ranks = spend_on_energy(choices, case.goal)
    config = replace(case.config(init_weights="gradient"), ranks={name: list(rank) for name, rank in ranks.items()})
    config.gradient_bases = {name: totals[name].bases(rank) for name, rank in ranks.items()}
    return get_peft_model(model, config)


class Permuted(nn.Module):
    """A weight plus an update in Tucker form whose kernel taps stand in another order."""

    def __init__(self, core: Tensor, factors: list[Tensor | None], taps: Tensor) -> None:
        super().__init__()
        self.core = nn.Parameter(core)
        self.factors = nn.ParameterDict({str(n): nn.Parameter(f) for n, f in enumerate(factors) if f is not None})
        self.register_buffer("taps", taps)

    def forward(self, weight: Tensor) -> Tensor:
        factors = [self.factors.get(str(n)) for n in range(weight.ndim)]
        with torch.autocast("cpu", enabled=False):
            update = Tucker(self.core, tuple(factors)).to_tensor()
        return weight + update.flatten(2)[..., self.taps].view_as(weight)


def taps(case: Case, model: nn.Module, seed: int, *, permuted: bool, kernel_r: int) -> nn.Module:
    """FLoRA on kernels whose taps are permuted, per layer at random, before they are unfolded; or in the same way not.

    A permutation leaves number and shape of the parameters alone, and takes from the kernel modes what they mean.
    """
    totals = sums(case, model, case.batches(seed))
    ranks = get_peft_model(case.task.model(0), case.config(kernel_r=kernel_r)).peft_config["default"].ranks
    generator = torch.Generator().manual_seed(seed)
    for name, total in totals.items():
        gradient = total.value.to_tensor()
        count = gradient[0, 0].numel()
        order = torch.randperm(count, generator=generator) if permuted else torch.arange(count)
        back = gradient.flatten(2)[..., order.argsort()].view_as(gradient)
        core, factors = hosvd(back, ranks[name])
        update = Permuted(torch.zeros_like(core), list(factors), order)
        parametrize.register_parametrization(model.get_submodule(name), "weight", update)
    for parameter in model.get_submodule(case.task.head).parameters():
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.endswith("original"):
            parameter.requires_grad_(False)
    return model


@torch.no_grad()
def retract(model: PeftModel) -> None:
    """Factors back to orthonormal columns, by QR."""
    for layer in layers(model).values():
        for factor in layer.tucker("default").factors:
            if factor is not None:
                basis, triangle = torch.linalg.qr(factor)
                factor.copy_(basis * triangle.diagonal().sign())


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        build: attaches the adapter.
        rates: of the adapter.
        factor_rate: rate of the factors, of the core's.
        every_step: called after every step.
        setting: fields of the task's setting.
    """

    build: Build = gradient_start
    rates: tuple[float, ...] = (RATE,)
    factor_rate: float = 1.0
    every_step: Callable[[nn.Module], None] | None = None
    setting: dict[str, Any] = field(default_factory=dict)


_GRID = (3.2e-3, 1e-2, 3.2e-2)
STUDIES: dict[str, dict[str, Variant]] = {
    "start": {
        "core zero, bases of the summed gradient": Variant(),
        "output factor zero, core orthonormal": Variant(zero_output, (5.6e-3, 1e-2, RATE)),
        "bases of the batches' Gram matrices": Variant(gram),
        "gradients of 1 batch": Variant(setting={"gradient_batches": 1}),
        "gradients of all batches": Variant(setting={"gradient_batches": 1000}),
        "no gradients (default start)": Variant(plain, (1e-2,)),
    },
    "rates of the factors": {
        "factors fixed": Variant(factor_rate=0.0),
        "factors fixed, of 25% of the network": Variant(factor_rate=0.0, setting={"share": 0.25}),
        "a third of the core's": Variant(factor_rate=1 / 3),
        "as the core": Variant(),
        "three times the core's": Variant(factor_rate=3.0, rates=(5.6e-3,)),
        "as the core, factors kept orthonormal": Variant(every_step=retract),
    },
    "ranks": {
        "uniform": Variant(),
        **{f"uniform, kernel rank {r}": Variant(partial(gradient_start, kernel_r=r)) for r in (1, 2, 3)},
        "spectrum": Variant(partial(gradient_start, allocation="spectrum")),
        "spectrum, kernel rank 2": Variant(partial(gradient_start, allocation="spectrum", kernel_r=2)),
        "exact energies of the gradient": Variant(exact_energies),
    },
    "locality": {
        f"kernel rank {r}, taps {'permuted' if permuted else 'in place'}": Variant(
            partial(taps, permuted=permuted, kernel_r=r)
        )
        for r in (1, 2)
        for permuted in (False, True)
    },
    "rates": {
        f"{100 * share:g}% of the network, rate {rate:g}": Variant(rates=(rate,), setting={"share": share})
        for share in (0.025, 0.05, 0.1, 0.2)
        for rate in _GRID
    },
}


def run(case: Case, name: str, variant: Variant, rate: float, seed: int) -> dict[str, Any]:
    """One run of a variant: its scores on the validation and the test split."""
    case = case.at(variant.setting.get("share", case.setting.share))
    case.setting = replace(case.setting, **variant.setting)
    model = case.model(seed)
    torch.manual_seed(seed)
    model = variant.build(case, model, seed)
    began = time.process_time()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts: dict[str, list[nn.Parameter]] = {"head": [], "core": [], "factors": []}
    for key, parameter in trained.items():
        parts["head" if case.in_head(key) else "core" if "core" in key else "factors"].append(parameter)
    if not variant.factor_rate:
        for parameter in parts["factors"]:
            parameter.requires_grad_(False)
        parts["factors"] = []
    groups = [
        (case.setting.head_rate, parts["head"]),
        (rate, parts["core"]),
        (variant.factor_rate * rate, parts["factors"]),
    ]
    fit(case, model, groups, case.setting.epochs, seed, variant.every_step)
    return {
        "variant": name,
        "rate": rate,
        "seed": seed,
        "validation": case.score(model, case.task.validation),
        "test": case.score(model, case.task.test),
        "parameters": sum(p.numel() for part in ("core", "factors") for p in parts[part]),
        "seconds": round(time.process_time() - began, 2),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per variant, at the rate that is best on the validation split: mean and deviation on the test split."""
    rows = {}
    for name in dict.fromkeys(run["variant"] for run in runs):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for found in runs:
            if found["variant"] == name:
                by_rate.setdefault(found["rate"], []).append(found)
        rate = max(by_rate, key=lambda rate: statistics.mean(run["validation"] for run in by_rate[rate]))
        scores = [run["test"] for run in by_rate[rate]]
        rows[name] = {
            "rate": rate,
            "rates_tried": sorted(by_rate),
            "test_mean": statistics.mean(scores),
            "test_std": spread(scores),
            "seeds": len(scores),
            "parameters": by_rate[rate][0]["parameters"],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if unknown := set(given.studies) - set(STUDIES):
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    torch.set_num_threads(given.threads)
    logging.getLogger("florapeft").setLevel(logging.ERROR)
    path, case = record.RESULTS / "studies.json", Case("cifar100", SETTINGS["cifar100"], given.data)
    for study in given.studies or STUDIES:
        for variant in STUDIES[study].values():
            name = first_name(variant)
            for rate, seed in product(variant.rates, range(given.seeds)):
                done = record.read(path).get("runs", [])
                if any((r["variant"], r["rate"], r["seed"]) == (name, rate, seed) for r in done):
                    continue
                found = run(case, name, variant, rate, seed)
                print(found, flush=True)
                with changing(path) as results:
                    results.setdefault("runs", []).append(found)
        with changing(path) as results:
            results["setting"] = asdict(case.setting)
            rows = summary(results["runs"])
            names = {label: first_name(variant) for label, variant in STUDIES[study].items()}
            results.setdefault("studies", {})[study] = {label: rows[name] for label, name in names.items()}


def first_name(variant: Variant) -> str:
    """The variant's first name of those in `STUDIES`: what occurs in several of them is run once."""
    return next(f"{study}: {name}" for study, all_ in STUDIES.items() for name, v in all_.items() if v == variant)


if __name__ == "__main__":
    main()
