"""Writes the tables of README.md and docs/ from the files under benchmarks/results/; numbers are never typed.

A table stands between `<!-- table NAME -->` and `<!-- end -->`.

    python benchmarks/tables.py            # rewrite the tables
    python benchmarks/tables.py --check    # exit 1 if one is not what the results say
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import evidence_tables
import performance
import situations
import structure_tables
from performance import read

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo() -> str:
    """The built-in job of `flora train`."""
    record = read("builtin_job")
    rows = [
        (
            method["label"],
            f"{100 * method['accuracy_mean']:.1f} ± {100 * method['accuracy_std']:.1f}",
            f"{method['parameters']:,}",
            f"{100 * method['share_of_network']:.1f}%",
            f"{method['seconds_mean']:.1f}",
            f"{method['bytes'] / 1000:.0f} kB",
        )
        for method in record["methods"]
    ]
    header = ("method", "test accuracy, %", "trained parameters", "of the network", "seconds", "saved")
    gap = f"FLoRA closes {100 * record['gap_closed']:.0f}% of the gap between a new head alone and full fine-tuning."
    reload = record["reload"]
    same = (
        f"Read back from disk into a fresh base, the first adapter scores {100 * reload['accuracy']:.1f}%, as before."
    )
    if not reload["equal"]:
        raise ValueError("an adapter that was read back scores differently; the record is not fit to be shown")
    return f"{_table(header, rows)}\n\n{gap}\n{same}"


def starts() -> str:
    """Scores of the starts on the two real tasks."""
    cifar, cola = read("starts_cifar100")["cifar100"]["summary"], read("starts_cola")["cola"]["summary"]
    rows = [
        (
            f"`{name}`" + (" (default)" if name == "zero_output" else ""),
            f"{100 * cifar[name]['test_mean']:.1f} ± {100 * cifar[name]['test_std']:.1f}",
            f"{cifar[name]['rate']:g}",
            f"{100 * cola[name]['test_mean']:.1f} ± {100 * cola[name]['test_std']:.1f}",
            f"{cola[name]['rate']:g}",
        )
        for name in cifar
    ]
    header = ("start", "ResNet-20 to CIFAR-100, accuracy, %", "rate", "MiniLM on CoLA, 100 × MCC", "rate")
    return _table(header, rows)


def stability(kind: str) -> Callable[[], str]:
    """Loss after 60 steps relative to before, over widths and rates."""

    def build() -> str:
        rows = [row for row in read("starts_stability")["stability"]["rows"] if row["kind"] == kind]
        rates = sorted({row["rate"] for row in rows})
        found = {(row["width"], row["start"], row["rate"]): row["loss_ratio"] for row in rows}
        keys = sorted({(row["width"], row["start"]) for row in rows}, key=lambda key: (key[1], key[0]))
        lines = [(f"`{start}`", width, *(_ratio(found[width, start, rate]) for rate in rates)) for width, start in keys]
        return _table(("start", "width", *(f"{rate:g}" for rate in rates)), lines)

    return build


def peft_suite() -> str:
    """Counts of PEFT's own tests."""
    record = read("peft_suite")
    releases = record["releases"]
    kinds = ("passed", "failed", "skipped")
    suites = sorted({suite for release in releases.values() for suite in release["suites"]})
    counts = [
        [release["suites"].get(suite, {}).get(kind, 0) for release in releases.values() for kind in kinds]
        for suite in suites
    ]
    rows = [(f"`{suite}`", *numbers) for suite, numbers in zip(suites, counts, strict=True)]
    rows.append(("in all", *map(sum, zip(*counts, strict=True))))
    versions = record["environment"]["versions"]
    ran = f"torch {versions['torch']}, transformers {versions['transformers']}, Python {versions['python']}"
    header = ("PEFT's suite", *(f"{release}: {kind}" for release in releases for kind in kinds))
    return f"{_table(header, rows)}\n\nCounted on {record['date']} with {ran}."


def peft_skips() -> str:
    """Which of PEFT's own tests skip, with PEFT's reasons."""
    releases = read("peft_suite")["releases"]
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for release, record in releases.items():
        for skip in record["skips"]:
            counts.setdefault((skip["test"], skip["reason"]), {})[release] = skip["count"]
    rows = [
        (f"`{test}`", reason, *(by_release.get(release, 0) for release in releases))
        for (test, reason), by_release in counts.items()
    ]
    return _table(("test", "PEFT's reason", *releases), rows)


def architectures() -> str:
    """What "all-weights" adapts in each architecture and what it leaves out, and what does not hold."""
    rows = read("architectures")["rows"]
    lines = [
        (
            name,
            *(
                ", ".join(f"{kind['kind']} {kind['count']}" for kind in row["adapted"] if kind["order"] == order)
                for order in (2, 3, 4, 5)
            ),
            "; ".join(map(_left_out, row["left_out"])),
        )
        for name, row in rows.items()
    ]
    header = ("architecture", *(f"order {order}" for order in (2, 3, 4, 5)), "left out")
    fails = [
        f"* {name}, {check}: {problem}"
        for name, row in rows.items()
        for check, problem in row["checks"].items()
        if problem
    ]
    verdict = ["What does not hold:", "", *fails] if fails else [f"All checks hold in all {len(rows)} rows."]
    unused = [f"* {name}: {row['unused']}" for name, row in rows.items() if row["unused"]]
    notes = ["Adapters that no output depends on, and that therefore stay as they are:", "", *unused]
    return "\n".join([_table(header, lines), "", *verdict, "", *notes])


def experts() -> str:
    """One block of experts, adapted by FLoRA and by LoRA."""
    record = read("experts")
    rows = [
        (
            f"`{implementation}`",
            name,
            f"{row['parameters']:,}",
            f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})",
            f"{row['saved'] / 1e6:.1f} MB",
            f"{row['peak'] / 1e6:.1f} MB",
        )
        for implementation, methods in record["implementations"].items()
        for name, row in methods.items()
    ]
    sizes = record["sizes"]
    caption = (
        f"{sizes['experts']} experts of {sizes['hidden']} x {sizes['intermediate']}, {sizes['chosen']} per token, "
        f"{sizes['tokens']} tokens; medians, and quartiles in brackets."
    )
    header = ("computed by", "method", "parameters", "step, of frozen's", "saved for backward", "peak")
    return f"{_table(header, rows)}\n\n{caption}"


def plan_memory() -> str:
    """Memory of a training step as planned and as measured."""
    rows = [
        (
            name,
            *(f"{row['planned'][part] / 1e6:.1f}" for part in ("weights", "gradients", "optimizer", "activations")),
            f"{row['planned']['total'] / 1e6:.1f}",
            f"{row['measured'] / 1e6:.1f}",
            f"{row['error']:+.1%}",
        )
        for name, row in read("plan_memory")["networks"].items()
    ]
    parts = ("weights", "gradients", "AdamW", "activations", "planned, MB", "measured, MB", "error")
    return _table(("network", *parts), rows)


def allocation() -> str:
    """The rules that spend a budget, on one task."""
    record = read("allocation")
    rows = []
    for rule, row in record["summary"].items():
        runs = [run for run in record["runs"] if run["rule"] == rule]
        heads = [100 * run["head_only"] for run in runs]
        rows.append(
            (
                rule if rule == "common rank" else f"`{rule}`",
                f"{row['adapter_parameters']:,.0f}",
                f"{100 * row['test_mean']:.1f} ± {100 * row['test_std']:.1f}",
            )
        )
    note = f"The head alone, before: {sum(heads) / len(heads):.1f}."
    return f"{_table(('rule', 'adapter parameters', 'test accuracy, %'), rows)}\n\n{note}"


def _left_out(left: dict[str, Any]) -> str:
    example = ".".join(left["example"].split(".")[-2:])
    return f"{left['reason']} (" + (f"{left['count']}, as " if left["count"] > 1 else "") + f"`{example}`)"


_PARTS = performance.TABLES | situations.TABLES | structure_tables.TABLES | evidence_tables.TABLES
TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "starts": starts,
    "architectures": architectures,
    "experts": experts,
    "stability-linear": stability("linear"),
    "stability-conv": stability("conv"),
    "plan-memory": plan_memory,
    "allocation": allocation,
    "peft-suite": peft_suite,
    "peft-skips": peft_skips,
    **{name: lambda build=build: _table(*build()) for name, build in _PARTS.items()},
    **{name: lambda build=build: _captioned(*build()) for name, build in evidence_tables.CAPTIONED.items()},
}


def render(text: str) -> str:
    """`text` with every marked table rewritten from the results."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _captioned(header: Iterable[str], rows: Iterable[Iterable[Any]], caption: str) -> str:
    return f"{_table(header, rows)}\n\n{caption}"


def _ratio(value: float) -> str:
    return "diverged" if not value < 1e3 else f"{value:.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        before = page.read_text()
        after = render(before)
        if before != after:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    if stale:
        print(("out of date: " if check else "rewrote: ") + ", ".join(stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
