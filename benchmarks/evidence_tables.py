"""The tables of docs/evidence.md, from results/accuracy_*.json and studies_*.json; tables.py writes them."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from compared import GRADIENT_RIVALS, RECIPE, RIVALS, WITHOUT_BUDGET
from performance import RESULTS, Lines, read

Captioned = tuple[list[str], list[list[Any]], str]
WITHIN = 0.02  # of the goal
_CONVOLUTIONAL = ("cifar100", "volumes")
_NAMES = {
    "cifar100": "ResNet-20 to CIFAR-100",
    "volumes": "3-D network to moulds of digits",
    "captions": "ResNet-20 and MiniLM to captions",
    "digits": "ConvNeXt V2 to middle digits",
    "experts": "mixture of experts to prose",
    "cola": "MiniLM to CoLA",
    "rte": "MiniLM to RTE",
    "mrpc": "MiniLM to MRPC",
    "sst2": "MiniLM to SST-2",
}


def accuracy(task: str) -> Callable[[], Captioned]:
    """Methods at equal parameters on a task, best first, with their differences from FLoRA's recipe."""

    def build() -> Captioned:
        results = read(f"accuracy_{task}")
        rows = sorted(results["methods"].items(), key=lambda row: -row[1]["test_mean"])
        further = list(rows[0][1].get("further", {}))
        score = f"{results['score']}, %" if results["score"].endswith("accuracy") else f"100 × {results['score']}"
        named = [f"{name}, %" for name in further]
        header = ["method", score, "difference (95% interval)", *named, "rates", "parameters", "CPU seconds", "seeds"]
        lines = [
            [
                method,
                _mean(row),
                _interval(row.get("difference")),
                *(f"{100 * row['further'][name]:.1f}" for name in further),
                " / ".join("–" if rate is None else f"{rate:g}" for rate in (row["rate"], row["head_rate"])),
                f"{row['parameters']:,}",
                f"{row['seconds'] + row['start_seconds']:.0f}",
                row["seeds"],
            ]
            for method, row in rows
        ]
        return header, lines, _caption(results)

    return build


def _caption(results: dict[str, Any]) -> str:
    parts = ", ".join(f"{count:,} for {part}" for part, count in results["examples"].items())
    setting, searched = results["setting"], sorted(set(results["search_seeds"].values()))
    warm = " after one of the head alone" if any(row["head_rate"] for row in results["methods"].values()) else ""
    caption = (
        f"Examples: {parts}. {setting['epochs']} epoch{'s' if setting['epochs'] > 1 else ''}{warm}, batches of "
        f"{setting['batch_size']}; {results['layers']} layers adapted. Rates were searched "
        f"with {' or '.join(map(str, searched))} seed{'s' if searched != [1] else ''} on the validation split"
    )
    tuned = {method for method, row in results["methods"].items() if row["rate"]}
    if fine := set(results.get("fine", [])) & tuned:
        caption += ", those of adapters once more on the finer grid"
        caption += "" if fine == tuned else f" (not for {', '.join(sorted(tuned - fine))})"
    caption += "."
    if warm and not any(len(row["head_rates_tried"]) > 1 for row in results["methods"].values()):
        caption += f" The head's rate was not: it is {setting['head_rate']:g}."
    if "source_accuracy" in results:
        caption += f" Before, the network names {100 * results['source_accuracy']:.1f}% in its source task."
    goal, rows = results["goal"], results["methods"]
    if unequal := [
        m for m, row in rows.items() if m not in WITHOUT_BUDGET and abs(row["parameters"] / goal - 1) > WITHIN
    ]:
        caption += f" Not within {WITHIN:.0%} of the {goal:,} parameters: {', '.join(unequal)}."
    left_out: dict[str, list[str]] = {}
    for method, reason in results.get("left_out", {}).items():
        left_out.setdefault(html.escape(reason, quote=False), []).append(method)
    for reason, methods in left_out.items():
        caption += f" Left out: {', '.join(methods)} ({reason})."
    return caption


def budgets(task: str) -> Callable[[], Lines]:
    """Scores of the methods that have a budget, at several of them."""

    def build() -> Lines:
        results = read(f"accuracy_{task}")
        main = results["setting"]["share"]
        tables = {float(share): rows for share, rows in results["other_budgets"].items()} | {main: results["methods"]}
        shares = sorted(tables)
        others = results["other_budgets"].values()
        methods = [method for method in results["methods"] if all(method in rows for rows in others)]
        methods.sort(key=lambda method: -results["methods"][method]["test_mean"])
        lines = [[method, *(f"{_mean(tables[share][method])}" for share in shares)] for method in methods]
        return ["method", *(f"{100 * share:g}% of the network" for share in shares)], lines

    return build


_LEADS = ["LoRA", "best rival measured", "best LoRA with gradients", "full fine-tuning"]


def summary() -> Lines:
    """Per task, by how much FLoRA's recipe is ahead of the others, at equal parameters but for full fine-tuning."""
    found = {task: read(f"accuracy_{task}")["methods"] for task in _NAMES}
    lines = [[_NAMES[task], *_leads(rows)] for task, rows in found.items()]
    pairs = ([_ahead(found[task], method) for method in _compared(found[task])] for task in _CONVOLUTIONAL)
    means = [_interval(_mean_of(differences)) for differences in zip(*pairs, strict=True)]
    lines.append(["mean of the convolutional tasks", "", *means])
    return ["task", "FLoRA", *_LEADS], lines


def length() -> Lines:
    """The same where training was longer too."""
    lines = []
    for task in _NAMES:
        longer = sorted((read(path.stem) for path in RESULTS.glob(f"accuracy_{task}_[0-9]*_epochs.json")), key=_epochs)
        for results in [read(f"accuracy_{task}"), *longer] if longer else []:
            lines.append([_NAMES[task], _epochs(results), *_leads(results["methods"])])
    return ["task", "epochs", "FLoRA", *_LEADS], lines


def _epochs(results: dict[str, Any]) -> int:
    return results["setting"]["epochs"]


def _leads(rows: dict[str, Any]) -> list[str]:
    """The recipe's score, and by how much it is ahead of those in `_LEADS`."""
    compared = _compared(rows)
    _, best, with_gradients, _ = compared
    lora, rival, informed, full = (_interval(_ahead(rows, method)) for method in compared)
    measured = sum(method in rows for method in RIVALS)
    rival = f"{best}, of {measured}: {rival}" if measured > 1 else "LoRA alone"
    informed = f"{GRADIENT_RIVALS[with_gradients]}: {informed}" if informed else ""
    return [_mean(rows[RECIPE]), lora, rival, informed, full]


def _compared(rows: dict[str, Any]) -> tuple[str, str | None, str | None, str]:
    """Of several the one with the best score on the test split, which favours them."""
    return "LoRA", _best(RIVALS, rows), _best(GRADIENT_RIVALS, rows), "full fine-tuning"


def _best(methods: Iterable[str], rows: dict[str, Any]) -> str | None:
    return max((m for m in methods if m in rows), key=lambda method: rows[method]["test_mean"], default=None)


def _ahead(rows: dict[str, Any], method: str | None) -> dict[str, float | None] | None:
    return _turned(rows[method]["difference"]) if method in rows else None


def _mean_of(given: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """The mean of independent differences. Half its interval: theirs added in quadrature, wide rather than narrow."""
    mean = statistics.mean(difference["mean"] for difference in given)
    half = math.hypot(*((difference["high"] - difference["low"]) / 2 for difference in given)) / len(given)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _turned(given: dict[str, float | None]) -> dict[str, float | None]:
    """The difference the other way round."""
    mean, low, high = (None if value is None else -value for value in given.values())
    return {"mean": mean, "low": high, "high": low}


def study(name: str) -> Callable[[], Lines]:
    """The variants of a study of benchmarks/studies.py, on the tasks that it was made on."""

    def build() -> Lines:
        tables = {studied: studies[name] for studied, studies in _STUDIED.items() if name in studies}
        variants = list(dict.fromkeys(variant for rows in tables.values() for variant in rows))
        header, lines = [name], [[variant] for variant in variants]
        for studied, rows in tables.items():
            header += [f"{studied}: validation, %", "test, %", "rate", "parameters", "seeds"]
            for line, row in zip(lines, map(rows.get, variants), strict=True):
                line += [""] * 5
                if row:
                    chosen = f"{100 * row['validation_mean']:.1f}"
                    line[-5:] = [chosen, _mean(row), f"{row['rate']:g}", f"{row['parameters']:,}", row["seeds"]]
        return header, lines

    return build


def rates() -> Lines:
    """Accuracy by task, budget and rate, the best rate of a budget on the validation split in bold."""
    lines, columns = [], []
    for studied, studies in _STUDIED.items():
        budgets: dict[str, dict[str, dict[str, Any]]] = {}
        for variant, row in studies.get("rates", {}).items():
            budget, rate = variant.split(", rate ")
            budgets.setdefault(budget, {})[rate] = row
        for budget, found in budgets.items():
            columns = list(found)
            best = max(columns, key=lambda rate: found[rate]["validation_mean"])
            cells = [f"**{_mean(found[rate])}**" if rate == best else _mean(found[rate]) for rate in columns]
            lines.append([studied, budget, *cells])
    return ["task", "budget", *(f"rate {rate}" for rate in columns)], lines


def agreement() -> Lines:
    """The share of the summed gradients' energy that the batches have in common, by task."""
    lines = [
        [
            _NAMES[task],
            f"{row['batches']} of {row['batch_size']}",
            ", ".join(f"{share:.2f}" for share in sorted(row["agreement"])),
        ]
        for task, row in read("agreement")["tasks"].items()
    ]
    return ["task", "batches", "common share of the energy, by seed"], lines


def noise() -> Lines:
    """CoLA with gradients that are noise, followed by an earlier version of the recipe, and not followed."""
    rows = read("accuracy_cola")["methods"]
    named = {"recipe, gradients followed": read("noise_followed"), "recipe, as it is now": rows[RECIPE]}
    named |= {method: rows[method] for method in ("FLoRA", "LoRA")}
    lines = [[name, _mean(row), f"{row['rate']:g} / {row['head_rate']:g}", row["seeds"]] for name, row in named.items()]
    return ["CoLA", "100 × Matthews correlation", "rates", "seeds"], lines


def _mean(row: dict[str, Any]) -> str:
    return f"{100 * row['test_mean']:.1f} ± {100 * row['test_std']:.1f}"


def _interval(given: dict[str, float | None] | None) -> str:
    if given is None:
        return ""
    mean, low, high = (None if value is None else 100 * value for value in given.values())
    return f"{mean:+.1f}" if low is None else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _studied() -> dict[str, dict[str, Any]]:
    """The studies by what they were made on: a task, and how long it was trained if that is not its own length."""
    found = {}
    for task, name in _NAMES.items():
        for path in sorted(RESULTS.glob(f"studies_{task}*.json")):
            results = read(path.stem)
            longer = "" if path.stem == f"studies_{task}" else f", {_epochs(results)} epochs"
            found[name + longer] = results["studies"]
    return found


_STUDIED = _studied()
_STUDIES = {name for studies in _STUDIED.values() for name in studies} - {"rates"}
CAPTIONED = {f"accuracy-{task}": accuracy(task) for task in _NAMES}
TABLES = {
    "evidence": summary,
    "agreement": agreement,
    "noise": noise,
    "length": length,
    **{f"budgets-{task}": budgets(task) for task in _NAMES if read(f"accuracy_{task}")["other_budgets"]},
    **{f"study-{name}": study(name) for name in _STUDIES},
    "study-rates": rates,
}
