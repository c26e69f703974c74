"""The tables of docs/extraction.md, from results/structure.json and extraction*.json; tables.py writes them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from performance import Lines, read

_STRUCTURES = {
    "lora": "LoRA, (out, in·k·k)",
    "lora_taps": "LoRA, (out·k, in·k)",
    "tucker_1": "Tucker, kernel rank 1",
    "tucker_2": "Tucker, kernel rank 2",
    "tucker_3": "Tucker, kernel rank 3",
    "tucker": "Tucker, any ranks",
}
_FORMS = {"update": "", "permuted": "taps permuted: ", "noise": "noise: "}
_TASKS = {"cifar100": "ResNet-20, convolutions", "cola": "MiniLM, linear layers"}
_METHODS = {
    "flora": "FLoRA",
    "lora": "LoRA, (out, in·k·k)",
    "lora_taps": "LoRA, (out·k, in·k)",
}


def curves() -> Lines:
    """Mean relative error over the convolutions of ResNet-20, and over their controls."""
    record = read("structure")
    rows = record["tasks"]["cifar100"]["weights"].values()
    lines = []
    for form, prefix in _FORMS.items():
        for structure in _STRUCTURES if form == "update" else ("lora", "lora_taps", "tucker"):
            means = [
                statistics.mean(row[form]["errors"][structure][place] for row in rows)
                for place in range(len(record["shares"]))
            ]
            lines.append([prefix + _STRUCTURES[structure], *(f"{mean:.3f}" for mean in means)])
    return ["structure", *_percent(record["shares"])], lines


def ranks() -> Lines:
    """How much of each mode holds how much of the energy, means over weights."""
    record = read("structure")
    lines = []
    for task, label in _TASKS.items():
        rows = list(record["tasks"][task]["weights"].values())
        modes = ("out", "in", "kernel height", "kernel width")[: len(rows[0]["shape"])]
        for form in ("update", "noise"):
            for mode, name in enumerate(modes):
                line = [f"{label}: {name}" + (" (noise)" if form == "noise" else "")]
                for share in record["energies"]:
                    parts = [row[form]["ranks"][str(share)][mode] / row["shape"][mode] for row in rows]
                    line.append(f"{100 * statistics.mean(parts):.0f}%")
                lines.append(line)
    return ["mode", *(f"{100 * share:g}% of the energy" for share in record["energies"])], lines


def taps() -> Lines:
    """Where in the kernel the energy of the updates lies, mean over the convolutions of ResNet-20."""
    rows = [row["taps"] for row in read("structure")["tasks"]["cifar100"]["weights"].values()]
    means = [[statistics.mean(row[i][j] for row in rows) for j in range(3)] for i in range(3)]
    header = ["", "left", "middle", "right"]
    return header, [
        [name, *(f"{100 * mean:.1f}%" for mean in line)]
        for name, line in zip(("top", "middle", "bottom"), means, strict=True)
    ]


def extraction(task: str) -> Callable[[], Lines]:
    """Error of the whole update, and the score with it, by method and budget."""

    def build() -> Lines:
        record = read("extraction")[task]
        lines = []
        for method in record["budgets"][0]["methods"]:
            name = "LoRA" if task == "cola" and method == "lora" else _METHODS[method]
            for what, digits in (("error", 3), ("score", 1)):
                values = [row["methods"][method][what] for row in record["budgets"]]
                shown = [f"{value:.{digits}f}" if what == "error" else f"{100 * value:.{digits}f}" for value in values]
                lines.append([f"{name}: {_score_name(record) if what == 'score' else 'error'}", *shown])
        return ["", *_percent([row["share"] for row in record["budgets"]])], lines

    return build


def layers() -> Lines:
    """In how many weights FLoRA's error is below the better of LoRA's, at each budget."""
    lines = []
    for task, label in _TASKS.items():
        record = read("structure")["tasks"][task]["weights"].values()
        line = [label]
        for place in range(len(read("structure")["shares"])):
            errors = [{name: errors[place] for name, errors in row["update"]["errors"].items()} for row in record]
            best = [min(error for name, error in row.items() if name.startswith("lora")) for row in errors]
            below = sum(row["tucker"] <= other + 1e-5 for row, other in zip(errors, best, strict=True))
            line.append(f"{below} of {len(best)}")
        lines.append(line)
    return ["weights", *_percent(read("structure")["shares"])], lines


def scores() -> Lines:
    """What full fine-tuning gave, and what is left without the update of the targets."""
    lines = []
    for task, label in _TASKS.items():
        record = read("extraction")[task]
        tuned, without = 100 * record["score_tuned"], 100 * record["score_without"]
        lines.append([f"{label} ({_score_name(record)})", f"{tuned:.1f}", f"{without:.1f}"])
    return ["", "tuned model", "without the targets' update"], lines


def tensorly() -> Lines:
    """By how much errors of convolutions are above those of TensorLy's `tucker` at the same ranks."""
    above = read("extraction")["cifar100"]["above_tensorly"].values()
    header = ["error minus that of TensorLy's `tucker`, same ranks", "largest", "smallest"]
    return header, [[_TASKS["cifar100"], f"{max(above):+.1e}", f"{min(above):+.1e}"]]


def cost() -> Lines:
    """Time and memory of extracting from folders."""
    row = read("extraction_cost")
    environment = row["environment"]
    return ["", ""], [
        ["model", f"{row['model']}, {row['parameters'] / 1e6:.0f} million parameters, {row['targets']} targets"],
        ["machine", f"{environment['device']}, {environment['threads']} threads"],
        ["processor time, of all threads", f"{row['cpu_seconds']:.0f} s"],
        ["time on the clock", f"{row['seconds']:.0f} s"],
        *([f"of it {stage}", f"{seconds:.0f} s"] for stage, seconds in row["seconds_by_stage"].items()),
        ["largest weight", f"{row['largest_weight_bytes'] / 1e6:.0f} MB"],
        ["the adapter itself", f"{row['adapter_bytes'] / 1e6:.0f} MB"],
        ["peak memory beyond what there was before", f"{row['peak_bytes'] / 1e6:.0f} MB"],
        ["for comparison: one of the two models", f"{row['model_bytes'] / 1e6:.0f} MB"],
    ]


TABLES: dict[str, Callable[[], Lines]] = {
    "structure-curves": curves,
    "structure-layers": layers,
    "structure-ranks": ranks,
    "structure-taps": taps,
    "extraction-scores": scores,
    "extraction-cifar100": extraction("cifar100"),
    "extraction-cola": extraction("cola"),
    "extraction-tensorly": tensorly,
    "extraction-cost": cost,
}


def _score_name(record: dict[str, Any]) -> str:
    return "accuracy, %" if record["score_name"] == "accuracy" else "100 × MCC"


def _percent(shares: list[float]) -> list[str]:
    return [f"{100 * share:g}%" for share in shares]
