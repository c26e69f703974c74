"""What it costs to keep factors orthonormal: training steps with and without, side by side, on networks.py's networks.

A step is a forward and a backward pass and AdamW's step, from a start of gradients. The plain way beside ours is a QR
of every factor.

    python benchmarks/retraction.py            # writes benchmarks/results/retraction.json
    python benchmarks/retraction.py --quick    # two networks, nothing is written
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import measure
import record
import torch
from networks import NETWORKS, Network
from peft import PeftModel, get_peft_model
from variants import factors, positive_qr

from florapeft import FloraConfig, initialize_from_gradients, keep_orthonormal
from florapeft.train.fitting import shared

CHOSEN = [name for name in NETWORKS if not name.endswith("-channels-last")]


def keep_by_qr(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    found = factors(model)

    @torch.no_grad()
    def retract(*_: object) -> None:
        for factor in found:
            factor.copy_(positive_qr(factor)[0])

    optimizer.register_step_post_hook(retract)


WAYS = {"not kept": lambda model, optimizer: None, "kept orthonormal": keep_orthonormal, "by QR": keep_by_qr}


def examine(network: Network, repetitions: int) -> dict[str, Any]:
    """Seconds of a step, and their ratio to those of one that keeps nothing orthonormal."""
    base, loss = network.model(), network.loss()
    config = {"r": network.rank, "init_weights": "gradient", "target_modules": network.target_names(base)}

    def step_of(way: str) -> measure.Step:
        model = get_peft_model(shared(base), FloraConfig(**config)).train()
        initialize_from_gradients(model, [None], lambda model, _: loss(model))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-4)
        WAYS[way](model, optimizer)

        def step() -> None:
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = measure.interleaved({way: step_of(way) for way in WAYS}, repetitions, clock=clock)
    return {
        way: {"seconds": statistics.median(taken), **measure.ratio(taken, seconds["not kept"])}
        for way, taken in seconds.items()
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int, default=25)
    arguments = parser.parse_args(given)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers for it
    logging.getLogger("florapeft").setLevel(logging.ERROR)
    rows = {}
    for name in CHOSEN[:2] if arguments.quick else CHOSEN:
        rows[name] = examine(NETWORKS[name], arguments.repetitions)
        print(name, {way: f"x{row['ratio']:.3f}" for way, row in rows[name].items()}, flush=True)
    if not arguments.quick:
        path = record.RESULTS / "retraction.json"
        record.write(path, {"environment": record.environment(), "networks": rows})


if __name__ == "__main__":
    main()
