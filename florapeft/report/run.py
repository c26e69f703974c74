"""What the folder of a training run holds beside its adapter: results, curves, the job itself."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florapeft.train.evaluate import read_job
from florapeft.train.save import JOB_FILE, last_checkpoint

RESULTS_FILE = "results.json"
_NO_TEXT = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2


@dataclass
class Curve:
    """A quantity over the steps of one training: `metric` by its name, `label` by whose it is."""

    metric: str
    label: str
    steps: list[int]
    values: list[float]


@dataclass
class Method:
    """A row of a comparison: one figure per seed, and what the method costs."""

    label: str
    values: dict[int, float]
    mean: float
    deviation: float
    parameters: int | None
    share: float | None
    seconds: float | None
    size: int | None


@dataclass
class Run:
    """`folder` is None, and all else empty, for an adapter that no run of `flora train` wrote."""

    folder: Path | None = None
    description: str = ""
    metric: str = ""
    methods: list[Method] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    facts: dict[str, int | float | str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    job: str = ""
    command: str = ""


def read_run(path: Path, folder: Path) -> Run:
    """What is known of the training of an adapter.

    Args:
        path: what the user gave, a run's folder or an adapter's.
        folder: the adapter's.

    Raises:
        ValueError: a results file or job file that cannot be read; one line that names it.
    """
    place = path if path != folder else folder.parent
    if not (place / JOB_FILE).is_file() or not (folder / JOB_FILE).is_file():
        return Run(curves=_from_state(folder / "trainer_state.json"))
    job = read_job(folder)
    run = Run(place, job=(folder / JOB_FILE).read_text(encoding="utf-8"), command=_command(job, folder, place))
    file = place / RESULTS_FILE
    results: dict[str, Any] = {}
    if file.is_file():
        try:
            results = dict(_clean(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"cannot read {file}: {error}") from None
    run.description = str(results.get("description", ""))
    run.versions = {str(key): str(value) for key, value in (results.get("versions") or {}).items() if value}
    if results.get("commit"):
        run.versions["commit"] = str(results["commit"])[:12]
    run.metric, run.methods = _methods(results.get("methods") or [])
    run.facts = _facts(results)
    run.curves = _from_methods(results.get("methods") or []) or _from_training(place)
    return run


def _clean(value: Any) -> Any:
    """The same with a sign in the place of every character that neither SVG nor a file in UTF-8 can hold."""
    if isinstance(value, str):
        return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_clean(key): _clean(entry) for key, entry in value.items()}
    return [_clean(entry) for entry in value] if isinstance(value, list) else value


def _methods(records: list[dict[str, Any]]) -> tuple[str, list[Method]]:
    """The comparison's metric, the one of which a mean is given, and its rows."""
    keys = [key for record in records for key in record if key.endswith("_mean") and key != "seconds_mean"]
    if not keys:
        return "", []
    metric = keys[0].removesuffix("_mean")
    methods = [
        Method(
            label=str(record.get("label", record.get("method", "?"))),
            values={
                run.get("seed", number): run[metric]
                for number, run in enumerate(record.get("runs", []))
                if run.get(metric) is not None
            },
            mean=record[f"{metric}_mean"],
            deviation=record.get(f"{metric}_std") or 0.0,
            parameters=record.get("parameters"),
            share=record.get("share_of_network"),
            seconds=record.get("seconds_mean"),
            size=record.get("bytes"),
        )
        for record in records
        if record.get(f"{metric}_mean") is not None
    ]
    return metric, methods


def _facts(results: dict[str, Any]) -> dict[str, int | float | str]:
    """The figures of a single run, by name."""
    facts = {f"{role} examples": count for role, count in (results.get("examples") or {}).items()}
    for key in ("steps", "seconds", "train_loss"):
        if results.get(key) is not None:
            facts[key.replace("_", " ")] = results[key]
    facts |= {f"validation {key}": value for key, value in (results.get("validation") or {}).items()}
    return {key: value for key, value in facts.items() if value is not None}


def _from_methods(records: list[dict[str, Any]]) -> list[Curve]:
    """The losses that a comparison keeps for every method and seed."""
    found = [
        _curve("training loss", str(record.get("label", "?")), run.get("losses") or [])
        for record in records
        for run in record.get("runs", [])
    ]
    return [curve for curve in found if curve.steps]


def _from_training(place: Path) -> list[Curve]:
    """From the Trainer's own state in the last checkpoint, or from its log, whichever goes further."""
    checkpoint = last_checkpoint(place / "checkpoints")
    found = [_from_state(checkpoint / "trainer_state.json") if checkpoint else [], _from_log(place / "logs")]
    return max(found, key=lambda curves: max((curve.steps[-1] for curve in curves), default=0))


def _from_state(file: Path) -> list[Curve]:
    if not file.is_file():
        return []
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {file}: {type(error).__name__}: {error}") from None
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            series.setdefault(key, []).append((entry["step"], value))
    return _named(series, {"loss": "training loss", "eval_loss": "validation loss", "eval_accuracy": "accuracy"})


def _from_log(folder: Path) -> list[Curve]:
    """The scalars of TensorBoard's files."""
    if not any(folder.glob("events.out.tfevents*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    log.Reload()
    series = {tag: sorted({e.step: e.value for e in log.Scalars(tag)}.items()) for tag in log.Tags()["scalars"]}
    return _named(series, {"train/loss": "training loss", "eval/loss": "validation loss", "eval/accuracy": "accuracy"})


def _named(series: dict[str, list[tuple[int, float]]], names: dict[str, str]) -> list[Curve]:
    found = [_curve(name, "", series.get(key, [])) for key, name in names.items()]
    return [curve for curve in found if curve.steps]


def _curve(metric: str, label: str, points: Sequence[Sequence[Any]]) -> Curve:
    """A curve of `(step, value)`; a value that was not finite, which JSON has as null, is left out."""
    known = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return Curve(metric, label, [step for step, _ in known], [value for _, value in known])


def _command(job: dict[str, Any] | None, folder: Path, place: Path) -> str:
    """What trains the adapter again, into a folder of its own."""
    output = f"output={place}-again"
    if not job or job.get("task") != "builtin":
        return shlex.join(["flora", "train", str(folder / JOB_FILE), output])
    from florapeft.train.digits import BUILTIN_SETTINGS

    changed = {
        f"adapter.{key}": value
        for key, value in (job.get("adapter") or {}).items()
        if BUILTIN_SETTINGS["adapter"].get(key) != value and key != "modules_to_save"
    }
    if job.get("max_steps", -1) != -1:
        changed["max_steps"] = job["max_steps"]
    changed = {"seeds": job.get("seeds"), **changed}
    return shlex.join(["flora", "train", *(f"{key}={json.dumps(value)}" for key, value in changed.items()), output])
