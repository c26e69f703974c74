"""Memory of training steps, method by method at equal parameters, on the networks of networks.py; and file sizes.

"bound" is what a method has to keep that keeps the input of every adapted layer and nothing else beyond what the frozen
network keeps.

    python benchmarks/memory.py                               # writes benchmarks/results/memory.json (resumes)
    python benchmarks/memory.py --quick --network resnet20    # a look, nothing is written
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import measure
import per_network
from methods import Attached
from networks import Network


def examine(network: Network, methods: dict[str, Attached], *_: Any) -> per_network.Rows:
    """Bytes kept for the backward pass, the most that a step holds, and the size of the saved adapter; exact."""
    loss, rows = network.loss(), {}
    for name, attached in methods.items():
        model = attached.model.train()
        rows[name] = {
            "saved": measure.saved_bytes(model, loss),
            "peak": measure.peak_bytes(measure.step_of(model, loss)),
            "file": attached.file_bytes(),
        }
    model = methods["frozen"].model
    inputs_of = [model.get_submodule(layer) for layer in network.target_names(model)]
    rows["bound"] = {"saved": measure.saved_bytes(model, loss, inputs_of)}
    for row in rows.values():
        for key in {"saved", "peak"} & row.keys():
            row[f"{key}_ratio"] = row[key] / rows["frozen"][key]
    return rows


def show(name: str, row: dict[str, Any]) -> str:
    peak = f"  peak {row['peak'] / 1e6:7.1f} MB x{row['peak_ratio']:.2f}" if "peak" in row else ""
    size = f"  file {row['file'] / 1e3:,.0f} kB" if "file" in row else ""
    return f"saved {row['saved'] / 1e6:7.1f} MB x{row['saved_ratio']:.2f}{peak}{size}"


def main(given: Sequence[str] | None = None) -> None:
    per_network.run(__doc__, "memory", examine, show, given)


if __name__ == "__main__":
    main()
