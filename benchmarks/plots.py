"""Draws the figures of docs/evidence.md from the files under benchmarks/results/.

python benchmarks/plots.py      # for every task that has results docs/images/accuracy-TASK.png, maybe budgets-TASK.png
"""

from __future__ import annotations

from typing import Any

import matplotlib
import record
from cases import SETTINGS
from matplotlib.figure import Figure

from florapeft.report.figures import THEME

IMAGES = record.RESULTS.parents[1] / "docs" / "images"


def figure(results: dict[str, Any]) -> Figure:
    """Per method, best first: the score of every seed and their mean; and the seconds of a run."""
    rows = dict(sorted(results["methods"].items(), key=lambda row: row[1]["test_mean"]))
    ours, others, ink = (THEME[role][0] for role in ("series-0", "series-1", "ink"))
    colours = [ours if name.startswith("FLoRA") else others for name in rows]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = Figure(figsize=(8.4, 0.7 + 0.27 * len(rows)), layout="constrained")
        scores, seconds = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        for place, row in enumerate(rows.values()):
            seeds = [100 * value for value in row["tests"]]
            scores.plot(seeds, [place] * len(seeds), "o", color=colours[place], alpha=0.45)
            scores.plot(100 * row["test_mean"], place, "|", color=ink, markersize=12, markeredgewidth=1.6)
        seconds.barh(range(len(rows)), [row["seconds"] + row["start_seconds"] for row in rows.values()], color=colours)
        scores.set_yticks(range(len(rows)), list(rows))
        scores.grid(axis="x", color=THEME["line"][0])
        scores.set_axisbelow(True)
        scores.set_xlabel(f"{results['score']} on the test split x 100: seeds, and their mean")
        seconds.set_xlabel("seconds of one core")
    return drawn


def budgets(results: dict[str, Any]) -> Figure:
    """Score against adapter parameters, a line for each method that was measured at several budgets."""
    tables = [results["methods"], *results["other_budgets"].values()]
    methods = [method for method in tables[0] if all(method in rows for rows in tables)]
    methods.sort(key=lambda method: -tables[0][method]["test_mean"])
    colours = matplotlib.colormaps["tab10"].colors
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = Figure(figsize=(8.4, 4.2), layout="constrained")
        axes = drawn.subplots()
        for place, method in enumerate(methods):
            points = sorted((rows[method]["parameters"], 100 * rows[method]["test_mean"]) for rows in tables)
            style = "-o" if method.startswith("FLoRA") else "--s"
            axes.plot(
                *zip(*points, strict=True), style, color=colours[place % len(colours)], label=method, markersize=4
            )
        if full := tables[0].get("full fine-tuning"):
            style = {"color": THEME["ink"][0], "linewidth": 1, "linestyle": ":"}
            axes.axhline(100 * full["test_mean"], label="full fine-tuning", **style)
        axes.set_xscale("log")
        axes.set_xlabel("adapter parameters")
        axes.set_ylabel(f"{results['score']} on the test split x 100")
        axes.grid(color=THEME["line"][0])
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return drawn


def main() -> None:
    for name in SETTINGS:
        path = record.RESULTS / f"accuracy_{name}.json"
        if path.exists() and (results := record.read(path)).get("methods"):
            figure(results).savefig(IMAGES / f"accuracy-{name}.png", dpi=130)
            if results["other_budgets"]:
                budgets(results).savefig(IMAGES / f"budgets-{name}.png", dpi=130)
            print(f"wrote {IMAGES / path.with_suffix('.png').name.replace('_', '-')}")


if __name__ == "__main__":
    main()
