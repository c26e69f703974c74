"""A fine-tuning job as a YAML file says it: read, overridden, checked; nothing is loaded or trained here."""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TASKS = ("image-classification", "text-classification", "causal-lm")
ROLES = ("train", "validation", "test")
COLUMNS = {
    "image-classification": {"image": "image", "label": "label"},
    "text-classification": {"text": "text", "label": "label"},
    "causal-lm": {"text": "text"},
}
OPTIONAL_COLUMNS = {"text-classification": ("text_pair",), "causal-lm": ("prompt",)}

# What the Trainer would otherwise take from its own defaults, chosen for adapters (docs/training.md says why).
TRAIN_DEFAULTS = {"learning_rate": 1e-3, "logging_steps": 10, "save_strategy": "epoch", "disable_tqdm": True}
# Of a job that says nothing of its adapter's ranks, and what chooses ranks and start where there is a budget
# (docs/evidence.md says why).
BUDGET, GRADIENT_BATCHES = 0.01, 8
# Which of the adapter's fields a field replaces that is changed on the command line: both say the ranks.
REPLACES = {
    "budget": ("r", "ranks", "rank_pattern"),
    "r": ("budget", "allocation", "ranks"),
    "rank_pattern": ("budget", "allocation", "ranks"),
    "ranks": ("budget", "allocation", "r", "rank_pattern"),
}
# Fields of TrainingArguments that this code sets, with where to say it instead.
TRAIN_RESERVED = {
    "output_dir": "use the job's own `output`",
    "resume_from_checkpoint": "use --resume",
    "remove_unused_columns": "columns are chosen by `data.columns`",
    "label_names": "columns are chosen by `data.columns`",
}
# The same of FloraConfig, and what LoRA calls otherwise.
ADAPTER_RESERVED = {
    **dict.fromkeys(("task_type", "inference_mode", "peft_type"), "it follows from the job"),
    "lora_alpha": "FLoRA has `scale`, which is not divided by r",
    "lora_dropout": "use `flora_dropout`",
}


def closest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `words`, else the empty string."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def hint(key: str, known: Collection[str]) -> str:
    """`; say train.x` where `known` has a group of keys that `x` belongs to, else what is `closest`."""
    from transformers import TrainingArguments

    from florapeft import FloraConfig

    groups = [("data", DataSpec, ()), ("adapter", FloraConfig, ADAPTER_RESERVED)]
    groups.append(("train", TrainingArguments, TRAIN_RESERVED))
    for group, cls, reserved in groups:
        if group in known and key not in reserved and key in {field.name for field in dataclasses.fields(cls)}:
            return f"; say {group}.{key}"
    return closest(key, known)


@dataclasses.dataclass
class DataSpec:
    """Where the examples are and what their parts are called; every field is explained in docs/training.md."""

    path: str | dict[str, str]
    subset: str | None = None
    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    holdout: float | None = None
    max_length: int = 512


@dataclasses.dataclass
class Job:
    """One fine-tuning job. `adapter` holds FloraConfig fields, `train` TrainingArguments fields.

    The gradients of `gradient_batches` batches choose the adapter's start, and its ranks where it has a budget; before
    that a new head is trained alone for `warmup_head` epochs. With 0 batches, the adapter starts without data. What is
    trained beside the adapter, in both, has `head_learning_rate`, or else the adapter's.
    `load_job` fills in what a job does not say of them.
    """

    task: str
    model: str
    data: DataSpec
    output: str
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: list[str] | None = None
    gradient_batches: int = 0
    warmup_head: int | None = None
    head_learning_rate: float | None = None

    def to_yaml(self) -> str:
        return dump_yaml(dataclasses.asdict(self))


def first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The key, such as data.path.test, under which two unlike values of a job's `key` differ first; and both values."""
    before, now = (dataclasses.asdict(value) if isinstance(value, DataSpec) else value for value in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return first_difference(f"{key}.{name}", before.get(name), now.get(name))
    return key, before, now


class _Loader(yaml.SafeLoader):
    """safe_load that reads values as YAML 1.2's core schema does, and for which a key given twice is an error.

    PyYAML follows YAML 1.1, where `1e-3` is a text, `no`, `off`, `yes`, `on` are booleans (`eval_strategy: no`), `010`
    is 8, `1:30` is 90, and `2024-01-01` a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{line}: a key is a text, here it is a {key_node.id}")
            if key_node.value in seen:
                raise ValueError(f"{line}: key '{key_node.value}' is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


class _Dumper(yaml.SafeDumper):
    """safe_dump that quotes a text which either version of YAML would read as something else."""


_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, 10.3.2; with null, and `<<`, as PyYAML has them. The first that matches counts.
_CORE = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind_of_value, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind_of_value}", re.compile(rf"^({_pattern})$"), list(_first))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """`yaml.safe_dump` of `mapping`, which `parse_yaml` reads as it was."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """`yaml.safe_load` of `text`; errors are one line that starts with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{where}: not valid YAML at line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def split_override(override: str) -> tuple[list[str], Any]:
    """`"train.learning_rate=1e-3"` → `(["train", "learning_rate"], 0.001)`; the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip("."):
        raise ValueError(f"override '{override}' is not of the form key=value")
    return key.split("."), parse_yaml(value, f"override '{override}'")


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets dotted keys of a job in nested mappings, in place; later overrides win. Returns `mapping`.

    Where the overrides say the adapter's ranks, what `mapping` says of them in another way (`REPLACES`) is dropped.
    """
    _set(mapping, overrides)
    changed = _set({}, overrides).get("adapter")
    if isinstance(changed, dict):
        for key, others in REPLACES.items():
            for other in others:
                if changed.get(key) and other not in changed:
                    mapping["adapter"].pop(other, None)
    return mapping


def _set(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        keys, value = split_override(override)
        place = mapping
        for key in keys[:-1]:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                raise ValueError(f"override '{override}': '{key}' holds a value, not a group of keys")
        place[keys[-1]] = value
    return mapping


def load_job(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Job:
    """Reads a job file and applies `key=value` overrides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or value does not fit; the message names the file, the key and what is possible.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"job file not found: {path}")
    mapping = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: needs keys such as task, model, data, output; it holds {_kind(mapping)}")
    return parse_job(apply_overrides(mapping, overrides), str(path))


def parse_job(mapping: Mapping[str, Any], where: str = "job") -> Job:
    """Checks a mapping as read from YAML and makes a `Job` of it, with the defaults filled in."""
    values = _fields(Job, mapping, where)
    task = values["task"]
    if task not in TASKS:
        raise ValueError(f"{where}: unknown task '{task}'{closest(str(task), TASKS)} (known: {', '.join(TASKS)})")
    for key in ("model", "output"):
        if not isinstance(values[key], str) or not values[key]:
            raise ValueError(f"{where}: {key} must be a text, got {_kind(values[key])}")
    data = {"path": values["data"]} if isinstance(values["data"], str) else values["data"]
    values["data"] = _data_spec(data, task, f"{where}: data")
    values["adapter"] = adapter_fields(values.get("adapter"), f"{where}: adapter")
    values["train"] = {**TRAIN_DEFAULTS, **train_fields(values.get("train"), f"{where}: train")}
    if values.get("labels") is not None:
        if not isinstance(values["labels"], list):
            raise ValueError(f"{where}: labels must be a list of class names, got {_kind(values['labels'])}")
        values["labels"] = [str(label) for label in values["labels"]]
    rate = values.get("head_learning_rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf):
        raise ValueError(f"{where}: head_learning_rate must be a positive number, got {rate!r}")
    complete_ranks(values, where)
    values["model"] = _absolute(values["model"])
    return Job(**values)


def complete_ranks(values: dict[str, Any], where: str) -> None:
    """Fills in a budget where a job gives no ranks, and a pass of gradients where it has a budget."""
    adapter = values["adapter"]
    if not any(adapter.get(key) is not None for key in ("r", "ranks", "rank_pattern", "budget")):
        values["adapter"] = adapter = {"budget": BUDGET, **adapter}
    start, batches, epochs = adapter.get("init_weights"), values.get("gradient_batches"), values.get("warmup_head")
    for key, value in (("gradient_batches", batches), ("warmup_head", epochs)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{where}: {key} must be a whole number from 0, got {value!r}")
    if batches and start not in (None, "gradient"):
        raise ValueError(f"{where}: gradient_batches and adapter.init_weights={start!r} contradict each other")
    if batches is None:
        is_spent_by_data = adapter.get("budget") is not None and adapter.get("allocation") != "uniform"
        wanted = start == "gradient" or (start is None and is_spent_by_data)
        batches = values["gradient_batches"] = GRADIENT_BATCHES if wanted else 0
    if epochs and not batches:
        raise ValueError(f"{where}: warmup_head is for a pass of gradients; give gradient_batches too")
    if epochs and values["task"] == "causal-lm":
        raise ValueError(f"{where}: warmup_head is for a new head, and task causal-lm has none")


def train_fields(mapping: Any, where: str) -> dict[str, Any]:
    """What a job's `train` gives (null gives nothing): TrainingArguments fields, checked as far as their types go."""
    from transformers import TrainingArguments

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    given = _given(mapping, fields, TRAIN_RESERVED, "TrainingArguments", where)
    for key, value in given.items():
        expected = fields[key].type
        accepts = {int: int, float: (int, float), bool: bool}.get(expected)
        if accepts and (not isinstance(value, accepts) or (isinstance(value, bool) and expected is not bool)):
            raise ValueError(f"{where}: {key} must be {_TYPE_NAMES[expected]}, got {value!r}")
    return given


def adapter_fields(mapping: Any, where: str) -> dict[str, Any]:
    """What a job's `adapter` gives (null gives nothing): FloraConfig fields, with values that FloraConfig accepts."""
    from florapeft import FloraConfig

    fields = {field.name for field in dataclasses.fields(FloraConfig) if field.init}
    given = _given(mapping, fields, ADAPTER_RESERVED, "FloraConfig", where)
    for key in ("r", "rank_pattern"):  # FloraConfig itself cannot tell an r that is its default from none
        if given.get("budget") and given.get(key) and not given.get("ranks"):
            raise ValueError(
                f"{where}: budget={given['budget']} and {key}={given[key]} contradict each other: "
                "a budget chooses the ranks, give one"
            )
    try:
        FloraConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    return given


def _given(
    mapping: Any, fields: Collection[str], reserved: Mapping[str, str], owner: str, where: str
) -> dict[str, Any]:
    """The keys of a group that are not null; all must be `fields` of `owner` that are not `reserved`."""
    for key in (group := _group(mapping or {}, where)):
        if key in reserved:
            raise ValueError(f"{where}: '{key}' cannot be set here: {reserved[key]}")
        if key not in fields:
            raise ValueError(f"{where}: {owner} has no field '{key}'{closest(str(key), fields)}")
    return {key: value for key, value in group.items() if value is not None}


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def _data_spec(mapping: Any, task: str, where: str) -> DataSpec:
    values = _fields(DataSpec, mapping, where)
    if not isinstance(values["path"], (str, dict)) or not values["path"]:
        raise ValueError(f"{where}: path must be a text or one file per split, got {_kind(values['path'])}")
    for key, known in (("splits", ROLES), ("columns", (*COLUMNS[task], *OPTIONAL_COLUMNS.get(task, ())))):
        values[key] = dict(_group(values.get(key) or {}, f"{where}.{key}"))
        for name in values[key]:
            if name not in known:
                raise ValueError(f"{where}.{key}: unknown key '{name}'{closest(str(name), known)}")
    values["columns"] = {**COLUMNS[task], **values["columns"]}
    if isinstance(values["path"], dict):
        values["path"] = {role: _absolute(str(file)) for role, file in values["path"].items()}
    else:
        values["path"] = _absolute(values["path"])
    holdout = values.get("holdout")
    if holdout is not None and not (isinstance(holdout, float) and 0 < holdout < 1):
        raise ValueError(f"{where}: holdout must be a share between 0 and 1, got {holdout!r}")
    length = values.get("max_length", 512)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{where}: max_length must be a positive whole number, got {length!r}")
    return DataSpec(**values)


def _absolute(path: str) -> str:
    """Local paths in full, so that the saved job can be used from any folder; hub ids as they are."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def _fields(cls: type, mapping: Any, where: str) -> dict[str, Any]:
    """A copy of `mapping`, whose keys must be fields of the dataclass `cls`, the required ones present."""
    values = dict(_group(mapping, where))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}: unknown key '{key}'{hint(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise ValueError(f"{where}: '{name}' is missing")
    return values


def _group(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a group of keys, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}"
