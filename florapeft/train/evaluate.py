"""Measures a saved adapter on data, from its folder alone or on the data that a job file names."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import transformers
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from florapeft.sources import open_weights
from florapeft.train.data import load_examples, with_images
from florapeft.train.job import Job, apply_overrides, parse_job, parse_yaml
from florapeft.train.model import check_is_whole, load_base, load_collator
from florapeft.train.run import evaluate, make_trainer, training_arguments
from florapeft.train.save import JOB_FILE

_DEFAULT_SPLITS = ("test", "validation")


def adapter_folder(path: Path) -> Path:
    """The folder of a saved adapter: `path` itself, or the `adapter` in it where `path` is the output of a run.

    Raises:
        FileNotFoundError: neither holds an adapter_config.json.
        ValueError: its weights cannot be read, such as those of a download that was cut short.
    """
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            if (weights := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
                open_weights(weights, "adapter")  # reads its header; PEFT's error would not name the file
            return folder
    if not path.exists():
        raise FileNotFoundError(f"adapter not found: {path}")
    raise FileNotFoundError(f"{path} is not an adapter: it holds no adapter_config.json")


def read_job(folder: Path) -> dict[str, Any] | None:
    """The job that an adapter was trained by, as `flora train` left it in the folder; None for other adapters."""
    file = folder / JOB_FILE
    return parse_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def evaluate_adapter(
    path: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> dict[str, Any]:
    """Loss, and accuracy or perplexity, of the adapter at `path`.

    Args:
        path: an adapter folder, or the output folder of a run.
        config: a job file that says task, model and data; by default the one saved with the adapter.
        overrides: `key=value`, on top of either, such as `data.path=new.csv`.
        split: "train", "validation" or "test"; by default test, or validation where there is no test.
        say: called with a line at each stage.
        callbacks: Trainer callbacks, such as a progress display.

    Raises:
        ValueError, OSError: no adapter, no data, labels that the adapter does not know; one line each.
    """
    folder = adapter_folder(path)
    saved = read_job(folder)
    job = _job(folder, saved, config, overrides)
    if job is None:
        from florapeft.train.comparison import evaluate_builtin  # the built-in job's adapters need no data set

        return {"adapter": str(folder), **evaluate_builtin(folder, split or "test")}
    say("loading the data")
    examples = load_examples(job, (split,) if split else _DEFAULT_SPLITS, (split,) if split else ())
    if not examples.splits:
        raise ValueError("the data has neither a test nor a validation split; name one, such as data.splits.test=train")
    role = split or next(role for role in _DEFAULT_SPLITS if role in examples.splits)
    say(f"loading the model {job.model} and the adapter {folder}")
    base = load_base(job.task, job.model, examples.labels)
    collator = load_collator(job, base)
    model = peft.PeftModel.from_pretrained(base, str(folder))
    check_is_whole(model)
    rows = examples.splits[role]
    if job.task == "image-classification":
        rows = with_images(job, rows)
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer wants a folder, though it writes nothing here
        job.output = scratch
        trainer = make_trainer(job, model, collator, type(examples)({}, None), training_arguments(job), callbacks)
        say(f"measuring on {len(rows)} examples")
        metrics = evaluate(trainer, rows)
    return {"adapter": str(folder), "task": job.task, "split": role, "examples": len(rows), **metrics}


def _job(folder: Path, saved: dict | None, config: Path | None, overrides: Sequence[str]) -> Job | None:
    """The job to measure by, with the class names the adapter was trained with; None means the built-in one."""
    if config is None:
        if saved is None:
            raise ValueError(f"{folder} holds no {JOB_FILE}; give a job file that says task, model and data")
        if saved.get("task") == "builtin":
            if overrides:
                raise ValueError("the built-in job takes no overrides when it is measured")
            return None
        mapping, where = saved, str(folder / JOB_FILE)
    else:
        if not config.is_file():
            raise FileNotFoundError(f"job file not found: {config}")
        mapping, where = parse_yaml(config.read_text(encoding="utf-8"), str(config)), str(config)
        if not isinstance(mapping, dict):
            raise ValueError(f"{where}: needs keys such as task, model, data, output")
        if saved is not None and saved.get("labels") is not None:
            mapping = {"labels": saved["labels"], **mapping}
    job = parse_job(apply_overrides({"output": "unused", **mapping}, overrides), where)
    # Of `train` only what bears on measuring is kept: the rest would be checked against splits that are not loaded.
    kept = ("per_device_eval_batch_size", "bf16", "use_cpu", "seed", "dataloader_num_workers")
    job.train = {key: value for key, value in job.train.items() if key in kept} | {
        "report_to": "none",
        "disable_tqdm": True,
    }
    return job
