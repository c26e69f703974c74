"""Runs a job: base model and adapter, transformers' Trainer, then the adapter alone to disk."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from transformers.integrations import TensorBoardCallback

from florapeft.train.data import Examples, load_examples, with_images
from florapeft.train.gradients import Train, attach_as_in, attach_by_gradients
from florapeft.train.job import Job, first_difference, load_job
from florapeft.train.model import attach, load_base, load_collator
from florapeft.train.orthonormal import OrthonormalFactors, starts_from_gradients
from florapeft.train.rates import check_not_sharded, check_two_rates, optimizer_of_two_rates
from florapeft.train.record import versions
from florapeft.train.save import (
    JOB_FILE,
    atomic_folder,
    atomic_write,
    check_output,
    last_checkpoint,
    set_aside,
    write_json,
)

Say = Callable[[str], None]


def run_job(
    job: Job,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda text: None,
    callbacks: Iterable[transformers.TrainerCallback] = (),
) -> dict[str, Any]:
    """Fine-tunes and saves; `<output>/adapter` is a PEFT folder, `<output>/results.json` what is returned.

    Runs as it is under `torchrun` or `accelerate launch`; only the first process writes.

    Args:
        job: what to do.
        resume: go on from the last complete checkpoint in `<output>/checkpoints`, or from the start if there is none.
        overwrite: an earlier run in `<output>` is renamed instead of being an error, once this one is about to train.
        say: called with a line at each stage.
        callbacks: further Trainer callbacks, such as a progress display.

    Raises:
        ValueError, OSError: the job, its data or its output do not fit; one line each.
    """
    output = Path(job.output)
    arguments = training_arguments(job)
    checkpoint = None
    if arguments.process_index == 0:
        check_output(output, resume=resume, overwrite=overwrite)
    if resume:
        check_same_job(job, output)
        checkpoint = last_checkpoint(output / "checkpoints")
        say(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint yet: starting over")
    say("loading the data")
    examples = load_examples(job, ("train", "validation"), ("train",))
    if arguments.load_best_model_at_end and "validation" not in examples.splits:
        raise ValueError("train.load_best_model_at_end needs a validation split; give one in `data`, or data.holdout")
    job.labels = examples.labels
    say(f"loading the model {job.model}")
    transformers.set_seed(arguments.seed)
    base = load_base(job.task, job.model, examples.labels)
    collator = load_collator(job, base)
    model, gradients = attach_adapter(job, base, collator, examples, arguments, callbacks, checkpoint, say)
    trainer = make_trainer(job, model, collator, examples, arguments, callbacks)
    if arguments.process_index == 0:  # not before: a job that fails up to here leaves an earlier run where it is
        if overwrite and (note := set_aside(output)):
            say(note)
        atomic_write(output / JOB_FILE, job.to_yaml())
    say(f"training on {len(examples.splits['train'])} examples")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    check_finite(model, output)
    save_adapter(trainer, job, output / "adapter")
    metrics = evaluate(trainer) if "validation" in examples.splits else {}
    record = describe(job, model, examples, trainer, metrics, checkpoint) | {"seconds": seconds}
    if gradients:
        record["gradients"] = gradients
    if arguments.process_index == 0:
        write_json(output / "results.json", record)
    return record


def training_arguments(job: Job) -> transformers.TrainingArguments:
    """TrainingArguments from the job's `train` fields, with its folders and what the collators need."""
    fields = {
        "output_dir": str(Path(job.output) / "checkpoints"),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # Without it, on a machine with no accelerator, bf16 is refused and torchrun's processes do not find each other.
        "use_cpu": not torch.accelerator.is_available(),
        "eval_strategy": "epoch",  # `make_trainer` takes it back where there is no validation split
        **job.train,
    }
    try:
        return transformers.TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"train: {' '.join(str(error).split())}") from error


def check_same_job(job: Job, output: Path, *more: str) -> None:
    """A run is resumed with the model, data, adapter and pass of gradients that it began with; `more` adds keys."""
    began = load_job(output / JOB_FILE)
    for key in ("task", "model", "data", "adapter", "gradient_batches", "warmup_head", "head_learning_rate", *more):
        if getattr(began, key) != getattr(job, key):
            name, before, now = first_difference(key, getattr(began, key), getattr(job, key))
            raise ValueError(f"cannot resume {output}: it began with {name} = {before}, now {name} = {now}")


def make_trainer(
    job: Job,
    model: torch.nn.Module,
    collator: Callable,
    examples: Examples,
    arguments: transformers.TrainingArguments,
    callbacks: Iterable[transformers.TrainerCallback],
    *,
    quiet: bool = False,
) -> transformers.Trainer:
    """A Trainer for the job; TensorBoard files go to `<output>/logs` unless the job names other reports, or `quiet`."""
    rows = _rows(job, examples)
    if "validation" not in rows and "eval_strategy" not in job.train:
        arguments.eval_strategy = transformers.IntervalStrategy.NO
    callbacks = list(callbacks)
    if "report_to" not in job.train and not quiet:
        board = TensorBoardCallback()
        board.logging_dir = str(Path(job.output) / "logs")
        callbacks.append(board)
    is_classifier = job.task != "causal-lm"
    if starts_from_gradients(model):
        callbacks.append(OrthonormalFactors())
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        compute_loss_func=classification_loss(arguments.label_smoothing_factor) if is_classifier else None,
        compute_metrics=_accuracy if is_classifier else None,
        preprocess_logits_for_metrics=_predicted_class if is_classifier else None,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_of_two_rates(job, model, arguments),
    )
    check_not_sharded(job, trainer)
    trainer.remove_callback(transformers.PrinterCallback)  # would print a dict for every logged step
    return trainer


def _rows(job: Job, examples: Examples) -> dict[str, Any]:
    """The splits as a Trainer reads them."""
    if job.task == "image-classification":
        return {role: with_images(job, split) for role, split in examples.splits.items()}
    return dict(examples.splits)


def attach_adapter(
    job: Job,
    base: transformers.PreTrainedModel,
    collator: Callable,
    examples: Examples,
    arguments: transformers.TrainingArguments,
    callbacks: Iterable[transformers.TrainerCallback],
    checkpoint: Path | None = None,
    say: Say = lambda text: None,
) -> tuple[peft.PeftModel, dict[str, Any] | None]:
    """The adapted model, and what its pass of gradients has cost, if there was one."""
    if not job.gradient_batches:
        model, gradients = attach(job, base), None
    elif checkpoint:  # it has been done when the run began
        model, gradients = attach_as_in(job, base, checkpoint), None
    else:
        train = trainer_of_heads(job, collator, examples, callbacks)
        model, gradients = attach_by_gradients(
            job, base, _rows(job, examples)["train"], collator, arguments, train, say
        )
    check_two_rates(job, model)
    return model, gradients


def trainer_of_heads(
    job: Job, collator: Callable, examples: Examples, callbacks: Iterable[transformers.TrainerCallback]
) -> Train:
    """What trains a base model's heads before anything is attached to it."""

    def train(model: torch.nn.Module, arguments: transformers.TrainingArguments) -> None:
        arguments.output_dir = job.output  # a Trainer makes this folder, and `checkpoints` is for the run itself
        own = dict(vars(model))
        trainer = make_trainer(job, model, collator, examples, arguments, callbacks, quiet=True)
        trainer.train()
        # In half precision accelerate puts its own forward there. Its way back (unwrap_model) would also take away
        # what transformers has wrapped around the model's. The mark, which an adapted model shows too, would keep that
        # from being prepared for half precision and for several processes.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
            if name in own:
                setattr(model, name, own[name])

    return train


def classification_loss(label_smoothing: float = 0.0) -> Callable:
    """Cross entropy as a Trainer's `compute_loss_func`: the mean over all processes and accumulated batches.

    Several of transformers' classifiers (BERT's among them) take but ignore `num_items_in_batch`; the Trainer then
    counts each process's and each accumulated batch's mean in full, so that loss and gradients grow with their number.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def evaluate(trainer: transformers.Trainer, rows: Any = None) -> dict[str, float]:
    """Loss, and accuracy or perplexity, on `rows` (by default the validation split)."""
    raw = trainer.evaluate(rows)
    metrics = {"loss": raw["eval_loss"]}
    if "eval_accuracy" in raw:
        metrics["accuracy"] = raw["eval_accuracy"]
    else:
        metrics["perplexity"] = math.exp(raw["eval_loss"]) if raw["eval_loss"] < 700 else math.inf
    return metrics


def save_adapter(trainer: transformers.Trainer, job: Job, path: Path) -> None:
    """Writes the adapter folder as a whole or not at all; called by every process, written by the first."""
    partial = path.with_name(f".{path.name}.partial")
    if trainer.args.process_index == 0:
        with atomic_folder(path, replace=True) as folder:
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(folder))
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; job.yaml says the same
            (folder / JOB_FILE).write_text(job.to_yaml(), encoding="utf-8")
    else:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(partial))  # sharded models gather their tensors from every process
    trainer.accelerator.wait_for_everyone()


def leave_other_processes() -> None:
    """Ends what a launcher's processes talk through, whose threads can abort a process that exits with them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_finite(model: torch.nn.Module, output: Path) -> None:
    """An adapter that diverged is not saved: nothing could load it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise ValueError(
                f"training diverged: {name} is not finite, so no adapter was saved; lower train.learning_rate "
                f"(checkpoints are in {output / 'checkpoints'})"
            )


def describe(
    job: Job,
    model: peft.PeftModel,
    examples: Examples,
    trainer: transformers.Trainer,
    metrics: dict[str, float],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """What a run says of itself, as plain data."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "task": job.task,
        "model": job.model,
        "adapter": str(Path(job.output) / "adapter"),
        "examples": {role: len(rows) for role, rows in examples.splits.items()},
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else None,  # the newest that was logged, also of a resumed run
        "validation": metrics,
        "parameters": count_parameters(model),
        "resumed_from": str(checkpoint) if checkpoint else None,
        "versions": versions(),
    }


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Trained parameters, FLoRA's apart from the rest (heads), and those of the base network with its head."""
    counts = {"adapter": 0, "head": 0, "network": 0}
    for name, parameter in model.named_parameters():
        if ".flora_" in name:
            counts["adapter"] += parameter.numel()
        elif parameter.requires_grad:
            counts["head"] += parameter.numel()
        if ".flora_" not in name and ".modules_to_save." not in name:
            counts["network"] += parameter.numel()
    return counts


def _predicted_class(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Keeps one number per example instead of all logits, which would fill the memory on large data sets."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}
