"""Time of training steps and of forward passes, method by method at equal parameters, on the networks of networks.py.

In every repetition each method runs once, in random order, in this one process; what is reported is the median over the
repetitions of its time relative to the frozen network's, and to LoRA's, in the same repetition.

    python benchmarks/speed.py                                # writes benchmarks/results/speed.json (long; resumes)
    python benchmarks/speed.py --quick --network resnet20     # a look, nothing is written
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import measure
import per_network
import torch
from methods import Attached
from networks import Network


def examine(network: Network, methods: dict[str, Attached], repetitions: int, clock: measure.Clock) -> per_network.Rows:
    """Seconds of attaching, merging, a training step and a forward pass, these two also as ratios; a step's flops."""
    loss, rows = network.loss(), {name: {} for name in methods}

    def forward_of(model: torch.nn.Module) -> measure.Step:
        def forward() -> None:
            with torch.no_grad():
                loss(model)

        return forward

    def compare(key: str, step_of: Callable[[torch.nn.Module], measure.Step]) -> None:
        steps = {name: step_of(attached.model) for name, attached in methods.items()}
        seconds = measure.interleaved(steps, repetitions, min(2, repetitions - 2), clock)
        for name, taken in seconds.items():
            rows[name][key] = {"seconds": statistics.median(taken), **measure.ratio(taken, seconds["frozen"])}
            if "LoRA" in seconds:
                rows[name][key]["to_lora"] = measure.ratio(taken, seconds["LoRA"])

    compare("step", lambda model: measure.step_of(model.train(), loss))
    compare("forward", lambda model: forward_of(model.eval()))
    for name, attached in methods.items():
        rows[name]["flops"] = measure.flops(measure.step_of(attached.model.train(), loss))
        merges = [attached.merge_seconds() for _ in range(min(3, repetitions))]
        rows[name]["merge_seconds"] = statistics.median(merges)
    return rows


def show(name: str, row: dict[str, Any]) -> str:
    def part(key: str) -> str:
        found = row[key]
        low, high = found["quartiles"]
        lora = f" LoRA x{found['to_lora']['ratio']:.2f}" if "to_lora" in found else ""
        return f"{key} {1e3 * found['seconds']:6.1f} ms x{found['ratio']:.2f} ({low:.2f}-{high:.2f}){lora}"

    equal = f"{100 * row['off']:+.1f}%" if "off" in row else ""
    note = " without grouped" if "without_grouped" in row else ""
    return (
        f"{row['parameters']:>10,} {equal:6} {part('step')}  {part('forward')}  "
        f"attach {1e3 * row['attach_seconds']:.0f} ms merge {1e3 * row['merge_seconds']:.0f} ms{note}"
    )


def main(given: Sequence[str] | None = None) -> None:
    per_network.run(__doc__, "speed", examine, show, given)


if __name__ == "__main__":
    main()
