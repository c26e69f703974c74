"""The built-in job: a new head alone, FLoRA and full fine-tuning on real data, over several seeds.

The data and the network come with the package (`florapeft.train.digits`, `florapeft/train/builtin`).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from torch import nn

from florapeft import FloraConfig
from florapeft.train.digits import BUILTIN_SETTINGS, DigitsTask, builtin_model_path, load_digits_task
from florapeft.train.job import adapter_fields, apply_overrides, dump_yaml, hint
from florapeft.train.model import find_heads, load_pretrained, muted
from florapeft.train.record import commit, versions
from florapeft.train.run import check_finite, count_parameters
from florapeft.train.save import JOB_FILE, atomic_folder, atomic_write, first_free, prepare_output, write_json

METHODS = {"head": "new head only", "flora": "FLoRA", "full": "full fine-tuning"}
DEFAULT_OUTPUT = "runs/digits"
_KEYS = ("output", "seeds", "max_steps", "adapter")
_BATCH = 256  # for measuring; the same for a trained and a reloaded adapter, so that both round alike


@dataclasses.dataclass
class Settings:
    """What can be changed of the built-in job; the rest stands in BUILTIN_SETTINGS."""

    output: Path
    seeds: list[int]
    max_steps: int
    adapter: dict[str, Any]

    def to_yaml(self, labels: Sequence[str]) -> str:
        """The job file of the output folder; its task name is how `flora eval` and `flora merge` know it."""
        record = {"task": "builtin", "labels": list(labels), **dataclasses.asdict(self), "output": str(self.output)}
        return dump_yaml(record)


def run_builtin(
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    track: Callable[[str], transformers.TrainerCallback] | None = None,
) -> dict[str, Any]:
    """Runs every method with every seed and measures on the test split; returns and writes `results.json`.

    FLoRA's adapter of the first seed is `<output>/adapter`; those of the others are `<output>/adapter-seed-N`. Each is
    read back into a fresh base, and its accuracy compared.

    Args:
        overrides: `key=value` with the keys output, seeds, max_steps and adapter.*.
        overwrite: an earlier run in `output` is renamed instead of being an error.
        say: called with a line at each stage.
        track: makes a Trainer callback that shows the progress of the run with the given name.

    Raises:
        ValueError, OSError: an unknown key or an output that exists; one line.
    """
    settings, is_default = _settings(overrides)
    if is_default and settings.output.exists() and not overwrite:
        free = first_free(settings.output, "-", start=2)
        say(f"{settings.output} exists, so this run goes to {free}")
        settings.output = free
    note = prepare_output(settings.output, overwrite=overwrite, can_resume=False)
    if note:
        say(note)
    task = load_digits_task("target")
    atomic_write(settings.output / JOB_FILE, settings.to_yaml(task.labels))
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in settings.seeds:
        for method, label in METHODS.items():
            callbacks = [track(f"{label}, seed {seed}")] if track else []
            with muted("florapeft"):  # which ranks are capped is news to no one here
                runs[method].append(_run_one(method, seed, task, settings, callbacks))
    record = _summary(task, settings, runs)
    write_json(settings.output / "results.json", record)
    return record


def load_network(path: str, labels: Sequence[str]) -> transformers.PreTrainedModel:
    """The pretrained network with a new head for `labels`, drawn from torch's current random state."""
    model = load_pretrained(
        transformers.AutoModelForImageClassification,
        path,
        ignore_mismatched_sizes=True,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    for name in find_heads(model):  # also where the old head has the same size: it was for other classes
        for module in model.get_submodule(name).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def evaluate_builtin(folder: Path, split: str = "test") -> dict[str, Any]:
    """Accuracy of a saved adapter of this job, loaded into a fresh base, on a split of the target task."""
    task = load_digits_task("target")
    data = getattr(task, split)
    with muted("florapeft"):
        model = peft.PeftModel.from_pretrained(load_network(str(builtin_model_path()), task.labels), str(folder))
    return {"task": task.name, "split": split, "examples": len(data["labels"]), "accuracy": accuracy(model, data)}


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, torch.Tensor]) -> float:
    """Share of right answers; `data` holds `pixel_values` of shape (n, channels, height, width) and `labels` (n,)."""
    model.eval()
    right = 0
    for images, labels in zip(data["pixel_values"].split(_BATCH), data["labels"].split(_BATCH), strict=True):
        right += int((model(pixel_values=images).logits.argmax(dim=-1) == labels).sum())
    return right / len(data["labels"])


class _Rows(torch.utils.data.Dataset):
    """Tensors as the rows that a Trainer asks for."""

    def __init__(self, data: dict[str, torch.Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.data.items()}


def _run_one(method: str, seed: int, task: DigitsTask, settings: Settings, callbacks: list) -> dict[str, Any]:
    """One method with one seed: trained, measured, and for FLoRA saved and measured again after reloading."""
    transformers.set_seed(seed)  # the same new head for every method
    model = attach(method, load_network(str(builtin_model_path()), task.labels), settings.adapter)
    started = time.perf_counter()
    losses = _train(model, method, seed, task, settings, callbacks)
    seconds = time.perf_counter() - started
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    run = {
        "seed": seed,
        "accuracy": accuracy(model, task.test),
        "validation_accuracy": accuracy(model, task.validation),
        "seconds": seconds,
        "losses": losses,
        **_count(method, model),
        "bytes": len(safetensors.torch.save({name: p.detach().contiguous() for name, p in trained.items()})),
    }
    if method == "flora":
        check_finite(model, settings.output)
        is_first = seed == settings.seeds[0]
        folder = settings.output / ("adapter" if is_first else f"adapter-seed-{seed}")
        with atomic_folder(folder) as partial:
            model.save_pretrained(partial)
            (partial / JOB_FILE).write_text(settings.to_yaml(task.labels), encoding="utf-8")
        run["bytes"] = (folder / "adapter_model.safetensors").stat().st_size
        run["adapter"] = str(folder)
        transformers.set_seed(seed + 1)  # so that the fresh base's own head is another one than the saved one
        run["accuracy_reloaded"] = evaluate_builtin(folder)["accuracy"]
    return run


def attach(method: str, base: transformers.PreTrainedModel, adapter: dict[str, Any]) -> nn.Module:
    """The network with just that trainable which `method` trains."""
    heads = find_heads(base)
    if method == "flora":
        return peft.get_peft_model(base, FloraConfig(**{"modules_to_save": heads, **adapter}))
    if method == "head":
        base.requires_grad_(False)
        for name in heads:
            base.get_submodule(name).requires_grad_(True)
    return base


def _train(
    model: nn.Module, method: str, seed: int, task: DigitsTask, settings: Settings, callbacks: list
) -> list[tuple[int, float]]:
    """Trains in place; returns steps and the mean losses since the step before."""
    fields = dict(BUILTIN_SETTINGS["train"])
    fields["learning_rate"] = fields["learning_rate"][method]
    arguments = transformers.TrainingArguments(
        output_dir=str(settings.output / "unused"),  # nothing is written: no checkpoints, no reports
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=20,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,  # small images in a small network; and the figures do not depend on the machine's GPU
        seed=seed,
        max_steps=settings.max_steps,
        **fields,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Rows(task.train), callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    Path(arguments.output_dir).rmdir()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def _count(method: str, model: nn.Module) -> dict[str, int]:
    """Trained parameters without and with the new head, and those of the network without its head."""
    counts = count_parameters(model)
    network = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    modules = [network.get_submodule(name) for name in find_heads(network)]
    modules = [getattr(module, "original_module", module) for module in modules]
    head = sum(parameter.numel() for module in modules for parameter in module.parameters())
    body = counts["network"] - head
    return {
        "parameters": {"head": 0, "flora": counts["adapter"], "full": body}[method],
        "head_parameters": head,
        "network_parameters": body,
    }


def _summary(task: DigitsTask, settings: Settings, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    methods = []
    for method, results in runs.items():
        accuracies = [result["accuracy"] for result in results]
        first = results[0]
        methods.append(
            {
                "method": method,
                "label": METHODS[method],
                "accuracy_mean": statistics.mean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                "seconds_mean": statistics.mean(result["seconds"] for result in results),
                "parameters": first["parameters"],
                "head_parameters": first["head_parameters"],
                "share_of_network": first["parameters"] / first["network_parameters"],
                "bytes": first["bytes"],
                "runs": results,
            }
        )
    head, flora, full = (method["accuracy_mean"] for method in methods)
    return {
        "description": f"Digits, {task.name} task, {len(task.labels)} classes, {len(task.test['labels'])} test images",
        "examples": {name: len(getattr(task, name)["labels"]) for name in ("train", "validation", "test")},
        "seeds": settings.seeds,
        "max_steps": settings.max_steps,
        "settings": {**BUILTIN_SETTINGS, "adapter": settings.adapter},
        "methods": methods,
        "gap_closed": (flora - head) / (full - head) if full > head else None,
        "adapter": str(settings.output / "adapter"),
        "reload": {
            "accuracy_before": runs["flora"][0]["accuracy"],
            "accuracy": runs["flora"][0]["accuracy_reloaded"],
            "equal": all(run["accuracy"] == run["accuracy_reloaded"] for run in runs["flora"]),
        },
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def _settings(overrides: Sequence[str]) -> tuple[Settings, bool]:
    """The settings, and whether the output folder is the default one."""
    values: dict[str, Any] = {"adapter": dict(BUILTIN_SETTINGS["adapter"])}
    apply_overrides(values, overrides)
    for key in values:
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise ValueError(
                f"the built-in job has no key '{key}'{hint(key, _KEYS)} (known: {known}); "
                "for a job of your own give a job file"
            )
    values = {key: value for key, value in values.items() if value is not None}
    seeds = values.get("seeds", [0, 1, 2])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds must be a list of whole numbers such as [0,1,2], got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ from each other, got {seeds}")
    max_steps = values.get("max_steps", -1)
    if not isinstance(max_steps, int):
        raise ValueError(f"max_steps must be a whole number, got {max_steps!r}")
    adapter = adapter_fields(values.get("adapter"), "adapter")
    output = str(values.get("output", DEFAULT_OUTPUT))
    return Settings(Path(output), seeds, max_steps, adapter), "output" not in values
