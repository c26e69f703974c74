"""Does structure matter? How well matrices and Tucker tensors fit real updates, at equal parameters.

The updates are those of full fine-tuning: of all convolutions of ResNet-20 (CIFAR-10 to CIFAR-100), and of all linear
layers of MiniLM (to CoLA). Controls are the same updates with the taps of every kernel permuted, and Gaussian noise.

    python benchmarks/structure.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record
import torch
import updates

from florapeft.structure import (
    energy_per_tap,
    error_curves,
    matched_noise,
    multilinear_ranks,
    taps_permuted,
)

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
ENERGIES = (0.9, 0.95, 0.99)
PATH = record.RESULTS / "structure.json"


def targets(pair: updates.Pair) -> dict[str, torch.Tensor]:
    """The updates of all convolutions, or of all linear layers of the encoder, by name."""
    order = 4 if pair.task.name == "cifar100" else 2
    before, after = pair.base.state_dict(), pair.tuned.state_dict()
    names = [name for name, weight in before.items() if weight.ndim == order and pair.task.head not in name]
    return {name: after[name] - before[name] for name in names if "embeddings" not in name}


def measure(update: torch.Tensor) -> dict[str, Any]:
    """Error curves of one update and of its controls, the ranks that hold its energy, and where its taps have it."""
    budgets = [int(share * update.numel()) for share in SHARES]
    forms = {"update": update, "noise": matched_noise(update)}
    if update.ndim > 2:
        forms["permuted"] = taps_permuted(update)
    row: dict[str, Any] = {"shape": list(update.shape), "norm": update.norm().item()}
    for name, form in forms.items():
        curves = error_curves(form, budgets)
        row[name] = {
            "errors": {structure: [fit.error for fit in fits] for structure, fits in curves.items()},
            "fits": {structure: [_sizes(fit.rank) for fit in fits] for structure, fits in curves.items()},
            "ranks": {str(share): list(rank) for share, rank in multilinear_ranks(form, ENERGIES).items()},
        }
    if update.ndim > 2:
        row["taps"] = (energy_per_tap(update) / update.square().sum()).tolist()
    return row


def _sizes(rank: tuple[int, ...]) -> str:
    return " x ".join(map(str, rank))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    results: dict[str, Any] = {"environment": record.environment(), "shares": SHARES, "energies": ENERGIES, "tasks": {}}
    for name, setting in updates.SETTINGS.items():
        pair = updates.pair(name, data)
        rows = {}
        for target, update in targets(pair).items():
            rows[target] = measure(update)
            print(name, target, flush=True)
        results["tasks"][name] = {
            "setting": asdict(setting),
            "score": pair.score,
            "score_name": pair.task.score_name,
            "weights": rows,
        }
        record.write(PATH, results)


if __name__ == "__main__":
    main()
