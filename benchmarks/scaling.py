"""How step time, arithmetic and memory grow with rank, channels, kernel, image, batch and depth; one at a time.

The network is a stack of convolutions with ReLUs around one point, and every curve moves one of its sizes. Methods run
interleaved and at equal parameters, as in speed.py. Fitted is the exponent p of `size ** p`, by least squares of logs.

    python benchmarks/scaling.py             # writes benchmarks/results/scaling.json and scaling.svg (resumes)
    python benchmarks/scaling.py --quick     # a look at every curve's ends, nothing is written
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import measure
import record
import torch
from methods import prepare
from networks import Network
from torch import nn

POINT = {"rank": 8, "channels": 128, "kernel": 3, "image": 16, "batch": 8, "depth": 4}
CURVES = {
    "rank": (2, 4, 8, 16, 32),
    "channels": (32, 64, 128, 256),
    "kernel": (1, 3, 5, 7),
    "image": (8, 16, 32, 64),
    "batch": (2, 4, 8, 16, 32),
    "depth": (2, 4, 8, 16),
}
METHODS = ("frozen", "full", "FLoRA", "FLoRA:lean", "released", "LoRA")
QUANTITIES = ("seconds", "flops", "saved")


def network(rank: int, channels: int, kernel: int, image: int, batch: int, depth: int) -> Network:
    """Convolutions of one width, each followed by a ReLU."""

    def build() -> nn.Module:
        layers = [(nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU()) for _ in range(depth)]
        return nn.Sequential(*(module for pair in layers for module in pair))

    return Network(build, (batch, channels, image, image), rank)


def examine(sizes: dict[str, int], repetitions: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a step and their ratio to the frozen network's, multiply-adds twice, bytes kept; by method."""
    net = network(**sizes)
    loss, models = net.loss(), {name: found.model.train() for name, found in prepare(net, list(METHODS), 1).items()}
    steps = {name: measure.step_of(model, loss) for name, model in models.items()}
    seconds = measure.interleaved(steps, repetitions, 2, time.process_time)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            **measure.ratio(seconds[name], seconds["frozen"]),
            "flops": measure.flops(steps[name]),
            "saved": measure.saved_bytes(models[name], loss),
        }
        for name in METHODS
    }


def exponents(curve: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By method, the exponent of each quantity, and of the arithmetic beyond the frozen network's ("added")."""
    sizes = [math.log(float(size)) for size in curve]
    fits: dict[str, dict[str, float]] = {}
    for name in METHODS:
        rows = [methods[name] for methods in curve.values()]
        values = {key: [row[key] for row in rows] for key in QUANTITIES}
        if name != "frozen":
            frozen = [methods["frozen"]["flops"] for methods in curve.values()]
            values["added"] = [own - base for own, base in zip(values["flops"], frozen, strict=True)]
        fits[name] = {
            key: statistics.linear_regression(sizes, [math.log(value) for value in found]).slope
            for key, found in values.items()
        }
    return fits


def plot(curves: dict[str, Any], path: Any) -> None:
    """Step time relative to the frozen network's, one panel per curve."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "florapeft"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(10, 6), sharey=True, layout="constrained")
    for panel, (size, curve) in zip(panels.flat, curves.items(), strict=True):
        for name in METHODS[1:]:
            rows = [methods[name] for methods in curve["points"].values()]
            low, high = zip(*(row["quartiles"] for row in rows), strict=True)
            values = [float(value) for value in curve["points"]]
            panel.plot(values, [row["ratio"] for row in rows], marker="o", markersize=3, label=name)
            panel.fill_between(values, low, high, alpha=0.2)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.set_xlabel(size)
        panel.axhline(1, color="grey", linewidth=0.5)
    panels[0, 0].set_ylabel("step, of the frozen network's")
    panels[1, 0].set_ylabel("step, of the frozen network's")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repetitions of the ends, and nothing is written")
    parser.add_argument("--again", action="store_true", help="measure anew what the results have")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    logging.getLogger("florapeft").setLevel(logging.ERROR)
    path = record.RESULTS / "scaling.json"
    results = {"point": POINT, "curves": {}} if arguments.quick else {"point": POINT, "curves": {}} | record.read(path)
    for size, values in CURVES.items():
        if size in results["curves"] and not arguments.again:
            continue
        values = (values[0], values[-1]) if arguments.quick else values
        points = {str(v): examine(POINT | {size: v}, 3 if arguments.quick else 7) for v in values}
        results["curves"][size] = {"points": points, "exponents": exponents(points)}
        for name, fit in results["curves"][size]["exponents"].items():
            print(f"{size:9} {name:12}", " ".join(f"{key} {p:+.2f}" for key, p in fit.items()), flush=True)
        if not arguments.quick:
            results["environment"] = record.environment()
            record.write(path, results)
    if not arguments.quick:
        plot(results["curves"], path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
