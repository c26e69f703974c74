"""How near `florapeft.plan` comes to the memory of a real training step, on the networks of networks.py.

Measured is the most that a step with AdamW holds at once: weights, moments, and what forward, backward and the
optimizer's step allocate, by torch's profiler.

    python benchmarks/plan_memory.py            # writes benchmarks/results/plan_memory.json
    python benchmarks/plan_memory.py --quick    # two networks, nothing is written
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import measure
import peft
import record
import torch
from networks import NETWORKS, Network

import florapeft

CHOSEN = ("resnet20", "resnet18-32", "resnet18-96", "convnextv2", "bert", "llama", "unet3d")
BUDGET = 0.01


def examine(network: Network) -> dict[str, Any]:
    """Bytes as planned and as measured, and the error of the plan's total."""
    model = network.model()
    x = torch.randn(network.shape).requires_grad_()
    config = florapeft.FloraConfig(budget=BUDGET, target_modules=network.target_names(model))
    memory = florapeft.plan(model, config, inputs=x if network.keyword is None else {network.keyword: x}).memory
    model = peft.get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, loss = torch.optim.AdamW(trained), network.loss()

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    total = weights + moments + measure.peak_bytes(step)
    return {"planned": {**asdict(memory), "total": memory.total}, "measured": total, "error": memory.total / total - 1}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(given).quick
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers for it
    logging.getLogger("florapeft").setLevel(logging.ERROR)
    rows = {}
    for name in CHOSEN[:2] if quick else CHOSEN:
        rows[name] = examine(NETWORKS[name])
        planned, measured = rows[name]["planned"]["total"], rows[name]["measured"]
        print(
            f"{name:16} planned {planned / 1e6:7.1f} MB  measured {measured / 1e6:7.1f} MB  {rows[name]['error']:+.1%}"
        )
    if not quick:
        path = record.RESULTS / "plan_memory.json"
        record.write(path, {"environment": record.environment(), "budget": BUDGET, "networks": rows})


if __name__ == "__main__":
    main()
