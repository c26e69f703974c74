"""Forward passes without gradients: merged, with several unmerged adapters, and with a mixed batch.

All share the frozen weights and run interleaved, as in speed.py; every figure is relative to the base model's pass.

    python benchmarks/inference.py             # writes benchmarks/results/inference.json
    python benchmarks/inference.py --quick     # three repetitions, nothing is written
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import measure
import record
import torch
from methods import METHODS
from networks import NETWORKS, Network
from peft import LoraConfig, get_peft_model
from torch import nn

from florapeft import FloraConfig
from florapeft.train.fitting import exactly, fitting, shared, trainable

ON = ("resnet18-32", "diffusion", "bert", "llama")
COUNTS = (1, 2, 4)  # of adapters, at once on the whole batch or each on a part of it


def adapters(config: type, model: nn.Module, layers: list[str], rank: int) -> nn.Module:
    """The model with `max(COUNTS)` adapters whose updates are not zero."""
    settings = {"r": rank, "target_modules": exactly(layers)}
    start = {"init_weights": False} if config is FloraConfig else {"init_lora_weights": False}
    model = get_peft_model(model, config(**settings, **start), adapter_name="a0")
    for i in range(1, max(COUNTS)):
        model.add_adapter(f"a{i}", config(**settings, **start))
    return model.eval()


def examine(network: Network, repetitions: int) -> dict[str, Any]:
    base = network.model().eval()
    loss, layers = network.loss(), network.target_names(base)
    goal = trainable(METHODS["FLoRA"].variants[0](shared(base), layers, network.rank, []))
    ranks = {"FLoRA": network.rank, "LoRA": fitting(METHODS["LoRA"].variants, base, layers, goal).rank}
    models = {
        name: adapters(config, shared(base), layers, ranks[name])
        for name, config in (("FLoRA", FloraConfig), ("LoRA", LoraConfig))
    }
    merged = {name: METHODS[f"{name}:merged"].variants[0](base, layers, ranks[name], []) for name in ("FLoRA",)}
    steps: dict[str, measure.Step] = {"base": lambda: _without_gradients(loss, base)}
    steps["FLoRA, merged"] = lambda: _without_gradients(loss, merged["FLoRA"])
    for name, model in models.items():
        for count in COUNTS:
            chosen = [f"a{i}" for i in range(count)]
            steps[f"{name}, {count} active"] = partial(_active, loss, model, chosen)
            if network.shape[0] >= count:
                rows = [chosen[i * count // network.shape[0]] for i in range(network.shape[0])]
                steps[f"{name}, {count} in one batch"] = partial(_mixed, loss, model, rows)
    seconds = measure.interleaved(steps, repetitions, 2, time.process_time)
    return {name: measure.ratio(taken, seconds["base"]) for name, taken in seconds.items()}


@torch.no_grad()
def _without_gradients(loss: Any, model: Any) -> None:
    loss(model)


def _active(loss: Any, model: nn.Module, names: list[str]) -> None:
    model.base_model.set_adapter(names)
    _without_gradients(loss, model)


def _mixed(loss: Any, model: nn.Module, rows: list[str]) -> None:
    _without_gradients(loss, partial(model, adapter_names=rows))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repetitions, and nothing is written")
    parser.add_argument("--network", nargs="+", choices=ON, default=list(ON), metavar="NAME")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    logging.getLogger("florapeft").setLevel(logging.ERROR)
    path = record.RESULTS / "inference.json"
    results = {"networks": {}} | record.read(path)
    for name in arguments.network:
        rows = examine(NETWORKS[name], 3 if arguments.quick else 7)
        results["networks"][name] = rows
        for key, row in rows.items():
            low, high = row["quartiles"]
            print(f"{name:14} {key:24} x{row['ratio']:.2f} ({low:.2f}-{high:.2f})", flush=True)
    if not arguments.quick:
        results["environment"] = record.environment()
        record.write(path, results)


if __name__ == "__main__":
    main()
