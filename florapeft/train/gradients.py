"""Start and ranks of a job's adapter from the gradients of its first batches, after its new head has been warmed up."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from florapeft import FloraConfig, allocate, initialize_from_gradients, plan
from florapeft.batch_norm import has_statistics
from florapeft.gradients import are_noise
from florapeft.train.job import Job
from florapeft.train.model import adapter_config, muted, trained_whole

Train = Callable[[nn.Module, transformers.TrainingArguments], Any]


def attach_by_gradients(
    job: Job,
    base: transformers.PreTrainedModel,
    rows: Any,
    collator: Callable[[list[dict]], dict[str, torch.Tensor]],
    arguments: transformers.TrainingArguments,
    train: Train,
    say: Callable[[str], None],
) -> tuple[peft.PeftModel, dict[str, Any]]:
    """Warm the head up, look at `job.gradient_batches` batches, and attach the adapter that they call for.

    Args:
        job: what to do; with `adapter.budget`, the gradients also choose the ranks, unless it says how to spend it.
        base: the base model with a new head, if it has one; the head is trained, everything else is left as it is.
        rows: the training examples.
        collator: makes batches of them.
        arguments: of the training itself; the warm-up trains likewise.
        train: trains what wants gradients in a model, with these arguments.
        say: called with a line at each stage.

    Returns:
        The model, and what this has cost: epochs of the head, batches (all there are, where those are fewer), seconds;
        and, of ranks from gradients, how far the batches agree. Where that is too little, ranks are uniform and the
        start is the default, unless the job asks for `allocation: spectrum`.
    """
    with muted("florapeft"):  # what does not fit is found before the head is trained; what is noted is said later
        plan(base, adapter_config(job, base, allocation="uniform"))
    started, epochs = time.perf_counter(), warmup_epochs(job)
    size = arguments.train_batch_size
    count = min(job.gradient_batches, math.ceil(len(rows) / size))
    warm_heads(base, trained_whole(job, base), epochs, arguments, train, say)
    say(f"looking at the gradients of {count} batch" + ("es" if count > 1 else ""))
    base.to(arguments.device)
    if arguments.gradient_checkpointing:
        _checkpoint_activations(base, arguments)
    loader = torch.utils.data.DataLoader(
        rows, size, shuffle=True, collate_fn=collator, generator=torch.Generator().manual_seed(arguments.seed)
    )
    batches = itertools.islice(loader, arguments.process_index, count, arguments.world_size)
    loss = _under_autocast(arguments)
    config, facts = adapter_config(job, base, init_weights="gradient"), {}
    if config.budget is not None and config.ranks is None and job.adapter.get("allocation") != "uniform":
        config = allocate(base, config, batches, loss)
        facts = {"agreement": config.gradient_agreement}
        if are_noise(config.gradient_agreement) and job.adapter.get("allocation") != "spectrum":
            say("these batches' gradients have too little in common: uniform ranks and the default start are taken")
            config = adapter_config(job, base)
        model = peft.get_peft_model(base, config)
    else:
        model = peft.get_peft_model(base, config)
        initialize_from_gradients(model, batches, loss)
    seconds = time.perf_counter() - started
    return model, {"warmup_epochs": epochs, "batches": count, "seconds": seconds, **facts}


def warm_heads(
    base: nn.Module,
    heads: Sequence[str],
    epochs: int,
    arguments: transformers.TrainingArguments,
    train: Train,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Trains the heads of a base model, modules with these names, alone for so many epochs, in place."""
    if epochs:
        if not heads:
            raise ValueError(
                f"no new head found in {type(base).__name__} to be trained before the pass of gradients; name it with "
                "adapter.modules_to_save=[…], or leave it out with warmup_head=0"
            )
        say(f"training the new head alone for {epochs} epoch" + ("s" if epochs > 1 else ""))
        with _only_trained(base, heads):
            train(base, _warmup_arguments(arguments, epochs))


def attach_as_in(job: Job, base: transformers.PreTrainedModel, checkpoint: Path) -> peft.PeftModel:
    """The adapter with the ranks and the kind of start of a checkpoint, whose weights are to be loaded into it."""
    began = FloraConfig.from_pretrained(str(checkpoint))
    return peft.get_peft_model(base, adapter_config(job, base, init_weights=began.init_weights, ranks=began.ranks))


def warmup_epochs(job: Job) -> int:
    """Epochs in which a new head is trained alone: as the job says, else one for a classifier."""
    if job.warmup_head is not None:
        return job.warmup_head
    return 0 if job.task == "causal-lm" else 1


def _warmup_arguments(arguments: transformers.TrainingArguments, epochs: int) -> transformers.TrainingArguments:
    """Those of the training, for so many epochs, with nothing saved, logged or measured."""
    changed = copy.deepcopy(arguments)
    changed.num_train_epochs, changed.max_steps, changed.report_to = epochs, -1, []
    changed.eval_strategy = transformers.IntervalStrategy.NO
    changed.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    changed.load_best_model_at_end = False
    return changed


@contextmanager
def _only_trained(model: nn.Module, heads: Sequence[str]) -> Iterator[None]:
    """While the context lasts, only the heads want gradients, and batch norms keep their statistics."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    norms = [module for module in model.modules() if has_statistics(module)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        model.requires_grad_(False)
        for head in heads:
            model.get_submodule(head).requires_grad_(True)
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _checkpoint_activations(base: transformers.PreTrainedModel, arguments: transformers.TrainingArguments) -> None:
    """Turns on what the Trainer is going to turn on; it acts in train mode alone."""
    enable = getattr(base, "activation_checkpointing_enable", None)
    enable = enable or base.gradient_checkpointing_enable  # its name before transformers 5.23
    options = dict(arguments.gradient_checkpointing_kwargs or {})
    own = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
    enable(options or None, **own)
    base.train()


def _under_autocast(arguments: transformers.TrainingArguments) -> Callable[[nn.Module, Any], torch.Tensor]:
    """`_loss` in the mixed precision of the training; of fp16 a multiple, without which small gradients would be 0."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision)
    scale = 1024 if dtype is torch.float16 else 1  # ranks and start do not depend on it

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(arguments.device.type, dtype, enabled=dtype is not None):
            return _loss(model, batch) * scale

    return loss


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of a classifier's classes or of a language model's next tokens."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    if batch["labels"].ndim > 1:
        return model(**batch).loss
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits.float(), labels)
