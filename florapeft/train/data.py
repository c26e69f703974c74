"""The examples of a job: found, split, checked against the task; labels become class numbers."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import datasets

from florapeft.train.job import ROLES, DataSpec, Job, closest

_FILE_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
LABEL_ID = "florapeft_label"  # the column of class numbers that `load_examples` adds


@dataclasses.dataclass(frozen=True)
class Examples:
    """Checked examples. `splits` maps "train", "validation", "test" (those that there are) to rows."""

    splits: dict[str, datasets.Dataset]
    labels: list[str] | None  # class names in the order of their numbers; None for causal-lm


def load_examples(job: Job, roles: tuple[str, ...], required: tuple[str, ...]) -> Examples:
    """Loads the splits `roles` of a job's data; those in `required` must be there.

    Class names come from `job.labels` if it is set, else from the data's own class list, else from the values in the
    training split, in sorted order.

    Raises:
        ValueError, OSError: nothing found, a split or column missing, no examples, labels that do not fit.
    """
    splits = _load_splits(job, roles, required)
    for role, rows in splits.items():
        _check_rows(job, role, rows)
        if job.task == "image-classification":
            splits[role] = _with_folders(job, role, rows)
    if job.task == "causal-lm":
        return Examples(splits, None)
    column = job.data.columns["label"]
    names = {role: _label_names(rows, column, role) for role, rows in splits.items()}
    labels = job.labels or _all_labels(splits, names, column)
    if len(labels) < 2:
        raise ValueError(f"data column '{column}' has the one label '{labels[0]}'; classification needs at least two")
    number = {label: index for index, label in enumerate(labels)}
    for role, rows in splits.items():
        for row, name in enumerate(names[role]):
            if name not in number:
                raise ValueError(
                    f"label '{name}' (split {role}, row {row}) is not one of the {len(labels)} labels: {_some(labels)}"
                )
        splits[role] = rows.add_column(LABEL_ID, [number[name] for name in names[role]])
    return Examples(splits, labels)


def _load_splits(job: Job, roles: tuple[str, ...], required: tuple[str, ...]) -> dict[str, datasets.Dataset]:
    everything = _load(job.data)
    needs_holdout = job.data.holdout and _pick(job.data, "validation", everything, is_required=False) is None
    if needs_holdout and not {"train", "validation"}.isdisjoint(roles):  # the same parts whichever of them is asked for
        train = _pick(job.data, "train", everything, is_required=True)
        parts = train.train_test_split(test_size=job.data.holdout, seed=job.train.get("seed", 42))
        held_out = {"train": parts["train"], "validation": parts["test"]}
    else:
        held_out = {}
    found = {role: held_out.get(role) or _pick(job.data, role, everything, role in required) for role in roles}
    return {role: found[role] for role in ROLES if found.get(role) is not None}


def _pick(data: DataSpec, role: str, everything: dict, is_required: bool) -> datasets.Dataset | None:
    """The rows that play `role`, by default those of the split of that name; None if there is no such split."""
    name = data.splits.get(role, role)
    bare = name.split("[")[0]
    if bare in everything:
        return everything[bare] if bare == name else _load(data, name)
    if role in data.splits or is_required:
        raise ValueError(
            f"data {_shown(data)} has no split '{bare}' (it has: {', '.join(everything)}); "
            f"say which one to use with data.splits.{role}"
        )
    return None


def _load(data: DataSpec, split: str | None = None) -> Any:
    """All splits as a dict, or the one that `split` describes (with a slice such as `train[:80%]`)."""
    kind, arguments = _source(data)
    try:
        loaded = datasets.load_dataset(kind, name=data.subset, split=split, **arguments)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        text = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in text or "No columns to parse" in text:
            raise ValueError(f"data {_shown(data)} is empty: no examples") from None
        raise ValueError(f"cannot read data {_shown(data)}: {text}") from error
    return loaded


def _source(data: DataSpec) -> tuple[str, dict[str, Any]]:
    """What to give to `datasets.load_dataset` for a path, checked to exist where it is a local one."""
    files = data.path if isinstance(data.path, dict) else {"train": data.path}
    suffixes = {Path(file).suffix.lower() for file in files.values()}
    if isinstance(data.path, dict) or suffixes <= set(_FILE_KINDS):
        for role, file in files.items():
            if role not in ROLES:
                raise ValueError(f"data.path: unknown split '{role}'{closest(str(role), ROLES)}")
            if not Path(file).is_file():
                raise FileNotFoundError(f"data file not found: {file}")
        kinds = {_FILE_KINDS.get(suffix) for suffix in suffixes}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(
                f"data.path: files must be all of one kind of {', '.join(_FILE_KINDS)}; got {_some(suffixes)}"
            )
        return kinds.pop(), {"data_files": {role: str(file) for role, file in files.items()}}
    path = os.path.expanduser(data.path)
    if Path(path).is_dir():
        if not any(file.is_file() for file in Path(path).rglob("*")):
            raise ValueError(f"data {_shown(data)} is empty: no examples")
        return path, {}
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise FileNotFoundError(f"data folder not found: {path}")
    return path, {}


def _check_rows(job: Job, role: str, rows: datasets.Dataset) -> None:
    if len(rows) == 0:
        raise ValueError(f"data {_shown(job.data)}, split {role}, is empty: no examples")
    for key, column in job.data.columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"data {_shown(job.data)}, split {role}, has no column '{column}' (data.columns.{key}); "
                f"it has: {', '.join(rows.column_names)}{closest(column, rows.column_names)}"
            )
        missing = rows.data.column(column).null_count
        if missing:
            raise ValueError(f"data {_shown(job.data)}, split {role}: column '{column}' has {missing} empty values")
        dtype = getattr(rows.features[column], "dtype", None)
        if key in ("text", "text_pair", "prompt") and dtype not in ("string", "large_string"):
            raise ValueError(f"data {_shown(job.data)}, split {role}: column '{column}' holds {dtype}, not text")


def _with_folders(job: Job, role: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows whose paths of images, if they have these, count from the folder of the file that the rows came from."""
    column = job.data.columns["image"]
    if isinstance(rows.features[column], datasets.Image):
        return rows
    files = job.data.path if isinstance(job.data.path, dict) else {"train": job.data.path}
    name = job.data.splits.get(role, role).split("[")[0]
    folder = Path(files.get(name, next(iter(files.values())))).parent  # what is held out comes from the training split
    return rows.remove_columns(column).add_column(column, [str(folder / path) for path in rows[column]])


def with_images(job: Job, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of `load_examples` whose image column is decoded to PIL images; in a CSV or JSONL file it holds paths."""
    column = job.data.columns["image"]
    if isinstance(rows.features[column], datasets.Image):
        return rows
    for path in rows[column]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"image file not found: {path} (column '{column}' of data {_shown(job.data)})")
    return rows.cast_column(column, datasets.Image())


def _label_names(rows: datasets.Dataset, column: str, role: str) -> list[str]:
    """The label of each row as a text: a class list's name, else the value itself."""
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(value) if value >= 0 else str(value) for value in rows[column]]
    if str(getattr(feature, "dtype", feature)).startswith(("float", "double")):
        raise ValueError(
            f"data column '{column}' (split {role}) holds decimal numbers; class names or whole numbers are needed"
        )
    return [str(value) for value in rows[column]]


def _all_labels(splits: dict[str, datasets.Dataset], names: dict[str, list[str]], column: str) -> list[str]:
    role = next(iter(splits))
    feature = splits[role].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    distinct = set(names[role])
    is_number = all(name.lstrip("-").isdecimal() for name in distinct)
    return sorted(distinct, key=int if is_number else None)


def _shown(data: DataSpec) -> str:
    if isinstance(data.path, dict):
        return "'" + ", ".join(str(path) for path in data.path.values()) + "'"
    return f"'{data.path}'" + (f" ({data.subset})" if data.subset else "")


def _some(items: Any, limit: int = 10) -> str:
    shown = [str(item) for item in items]
    return ", ".join(shown[:limit]) + (", …" if len(shown) > limit else "")
