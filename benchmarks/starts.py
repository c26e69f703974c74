"""Which start should be the default? Starts compared at equal parameters on a convolutional and on a linear task.

For every start the learning rate is chosen on the validation split with seed 0; the score of the chosen rate is then
reported on the test split over all seeds. Afterwards, how each start behaves over rates and widths on a made-up task
whose only purpose is to diverge where a start is unstable.

    python benchmarks/starts.py --data ../shared/data            # everything; resumes where it was stopped
    python benchmarks/starts.py --data ../shared/data cifar100   # one part
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
import tasks
import torch
from peft import get_peft_model
from torch import nn

from florapeft import FloraConfig
from florapeft.config import STARTS as ALL_STARTS

SEEDS = (0, 1, 2)
STARTS = tuple(start for start in ALL_STARTS if start != "gradient")  # which needs data; see allocation.py


@dataclass(frozen=True)
class Setting:
    """How a task is trained: AdamW, cosine decay to zero after a warm-up of 5% of the steps."""

    rates: tuple[float, ...]
    epochs: int
    batch_size: int
    adapter: dict[str, Any]
    head_rate: float
    weight_decay: float = 0.0


SETTINGS = {
    "cifar100": Setting((1e-3, 3e-3, 1e-2), 6, 64, {"r": 8, "target_modules": r".*(conv1|conv2)"}, 1e-2),
    "cola": Setting((3e-4, 1e-3, 3e-3), 3, 16, {"r": 8, "target_modules": ["query", "key", "value", "dense"]}, 1e-3),
}


def train(task: tasks.Task, setting: Setting, start: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: adapter and head trained, scores on the validation and the test split."""
    config = FloraConfig(init_weights=start, modules_to_save=[task.head], **setting.adapter)
    model = get_peft_model(task.model(seed), config)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["flora_" in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "lr": rate}, {"params": groups[False], "lr": setting.head_rate}],
        weight_decay=setting.weight_decay,
    )
    began = time.perf_counter()
    loss = tasks.fit(model.train(), optimizer, task.train, setting.epochs, setting.batch_size, task.augmented_loss)
    return {
        "start": start,
        "rate": rate,
        "seed": seed,
        "validation": task.score(model, task.validation),
        "test": task.score(model, task.test),
        "final_loss": loss,
        "adapter_parameters": sum(p.numel() for p in groups[True]),
        "seconds": round(time.perf_counter() - began, 1),
    }


def compare(name: str, data: Path, path: Path) -> None:
    """Choose a rate per start, then run the other seeds with it; every finished run is kept in `path`."""
    task, setting = tasks.TASKS[name](data), SETTINGS[name]
    results = record.read(path)
    runs = results.setdefault(name, {"score": task.score_name, "runs": []})["runs"]
    results[name]["setting"] = asdict(setting)

    def run(start: str, rate: float, seed: int) -> dict[str, Any]:
        for done in runs:
            if (done["start"], done["rate"], done["seed"]) == (start, rate, seed):
                return done
        runs.append(train(task, setting, start, rate, seed))
        print(name, runs[-1], flush=True)
        record.write(path, results)
        return runs[-1]

    summary = {}
    for start in reversed(STARTS):
        tried = [run(start, rate, SEEDS[0]) for rate in setting.rates]
        best = max(tried, key=lambda r: (r["validation"], -r["final_loss"]))
        final = [run(start, best["rate"], seed) for seed in SEEDS]
        scores = [r["test"] for r in final]
        summary[start] = {
            "rate": best["rate"],
            "validation_mean": statistics.mean(r["validation"] for r in final),
            "test_mean": statistics.mean(scores),
            "test_std": statistics.stdev(scores),
            "seeds": len(scores),
            "adapter_parameters": best["adapter_parameters"],
        }
    results[name]["summary"] = summary
    record.write(path, results)


class Residual(nn.Module):
    """Four normalised residual layers of one width, linear or 3x3 convolutions, drawn at the usual scale."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width, width) if kind == "linear" else nn.Conv2d(width, width, 3, padding=1) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(torch.relu(nn.functional.layer_norm(x, x.shape[1:])))
        return x


def stability(kind: str, width: int, start: str, rate: float, steps: int = 60) -> float:
    """Loss after training on a target 5% away from the frozen network, relative to the loss before.

    The target is the same network with every weight moved by 5% of its norm in random directions, of which a low-rank
    update can follow a part: a ratio below 1 is learning, above 1 (or not finite) is divergence.
    """
    torch.manual_seed(0)
    base = Residual(kind, width)
    target = Residual(kind, width)
    target.load_state_dict(base.state_dict())
    for parameter in target.parameters():
        if parameter.ndim > 1:
            low_rank = torch.randn(parameter.shape[0], 4) @ torch.randn(4, parameter[0].numel())
            parameter.data += 0.05 * parameter.norm() / low_rank.norm() * low_rank.view_as(parameter)
    target.requires_grad_(False)
    model = get_peft_model(base, FloraConfig(init_weights=start, target_modules="all-weights"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    shape = (64, width) if kind == "linear" else (4, width, 8, 8)

    def loss() -> torch.Tensor:
        x = torch.randn(shape)
        return (model(x) - target(x)).square().mean()

    with torch.no_grad():
        before = statistics.mean(loss().item() for _ in range(4))
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        return statistics.mean(loss().item() for _ in range(4)) / before


STABILITY = {
    "linear": {"widths": (64, 256, 1024, 4096), "rates": (1e-4, 3e-4, 1e-3, 2e-3)},
    "conv": {"widths": (64, 256, 512), "rates": (1e-4, 1e-3, 3e-3, 1e-2)},
}


def sweep(path: Path) -> None:
    """`stability` over starts, widths and rates."""
    results = record.read(path)
    rows = results.setdefault("stability", {"steps": 60, "rows": []})["rows"]
    done = {(r["kind"], r["width"], r["start"], r["rate"]) for r in rows}
    for kind, grid in STABILITY.items():
        for width in grid["widths"]:
            for start in STARTS:
                for rate in grid["rates"]:
                    if (kind, width, start, rate) in done:
                        continue
                    ratio = stability(kind, width, start, rate)
                    rows.append({"kind": kind, "width": width, "start": start, "rate": rate, "loss_ratio": ratio})
                    print(rows[-1], flush=True)
                    record.write(path, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {[*SETTINGS, 'stability']}; default: all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.parts or [*SETTINGS, "stability"]:
        path = record.RESULTS / f"starts_{part}.json"
        if part == "stability":
            sweep(path)
        else:
            compare(part, arguments.data, path)


if __name__ == "__main__":
    main()
