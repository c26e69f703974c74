"""Draws the figures of docs/evidence.md from the files under benchmarks/results/.

python benchmarks/plots.py      # writes docs/images/accuracy-TASK.png for every task that has results
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
        for place, (name, row) in enumerate(rows.items()):
            seeds = [r["test"] for r in results["runs"] if (r["method"], r["rate"]) == (name, row["rate"])]
            scores.plot([100 * value for value in seeds], [place] * len(seeds), "o", color=colours[place], alpha=0.45)
            scores.plot(100 * row["test_mean"], place, "|", color=ink, markersize=12, markeredgewidth=1.6)
        seconds.barh(range(len(rows)), [row["seconds"] + row["start_seconds"] for row in rows.values()], color=colours)
        scores.set_yticks(range(len(rows)), list(rows))
        scores.grid(axis="x", color=THEME["line"][0])
        scores.set_axisbelow(True)
        scores.set_xlabel(f"{results['score']} on the test split x 100: seeds, and their mean")
        seconds.set_xlabel("seconds of one core")
    return drawn


def main() -> None:
    for name in SETTINGS:
        path = record.RESULTS / f"accuracy_{name}.json"
        if path.exists() and (results := record.read(path)).get("methods"):
            figure(results).savefig(IMAGES / f"accuracy-{name}.png", dpi=130)
            print(f"wrote {IMAGES / path.with_suffix('.png').name.replace('_', '-')}")


if __name__ == "__main__":
    main()
