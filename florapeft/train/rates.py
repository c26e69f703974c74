"""Two learning rates in one training: that of an adapter, and that of what is trained whole beside it."""

from collections.abc import Iterable
from typing import Any

import peft
import torch
import transformers
from torch import nn

from florapeft.train.job import Job
from florapeft.train.model import trained_whole


def trained_beside(job: Job, model: nn.Module) -> list[nn.Parameter]:
    """What is trained of an adapted model and is not its adapter's: heads, biases; of any other model, its heads."""
    if isinstance(model, peft.PeftModel):
        own = f".{model.base_model.prefix}"
        return [p for name, p in model.named_parameters() if p.requires_grad and own not in name]
    heads = [model.get_submodule(name) for name in trained_whole(job, model)]
    return [p for head in heads for p in head.parameters() if p.requires_grad]


def optimizer_of_two_rates(
    job: Job, model: nn.Module, arguments: transformers.TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """What a Trainer takes as `optimizer_cls_and_kwargs`; None, which leaves all to it, where the job has one rate.

    Raises:
        ValueError: an optimizer that takes no groups of parameters.
    """
    if job.head_learning_rate is None:
        return None
    cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    takes_groups = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if not takes_groups or "model" in options or "optimizer_dict" in options:
        raise ValueError(f"head_learning_rate does not work with train.optim={arguments.optim.value}")
    beside = frozenset(map(id, trained_beside(job, model)))
    return _in_two(cls, beside, job.head_learning_rate), options


def check_two_rates(job: Job, model: nn.Module) -> None:
    """Raises ValueError if the job has a rate for what is trained beside the adapter, and nothing is."""
    if job.head_learning_rate is not None and not trained_beside(job, model):
        raise ValueError(
            f"head_learning_rate={job.head_learning_rate:g} is for heads, adapter.modules_to_save and adapter.bias, "
            "and this job trains none"
        )


def check_not_sharded(job: Job, trainer: transformers.Trainer) -> None:
    """Raises ValueError with DeepSpeed and FSDP, which put other parameters into the place of the model's."""
    if job.head_learning_rate is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError("head_learning_rate works in one process or several (DDP), not with DeepSpeed or FSDP")


def _in_two(cls: type[torch.optim.Optimizer], beside: frozenset[int], rate: float) -> type[torch.optim.Optimizer]:
    """The optimizer with each of the Trainer's groups in two; the adapter's first, whose rate the Trainer logs."""

    def split(self: torch.optim.Optimizer, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        groups = list(groups)
        own = [{**group, "params": [p for p in group["params"] if id(p) not in beside]} for group in groups]
        rest = [{**group, "params": [p for p in group["params"] if id(p) in beside], "lr": rate} for group in groups]
        cls.__init__(self, [*own, *rest], **options)

    # The Trainer takes classes alone, and knows those of bitsandbytes by their module.
    return type(cls.__name__, (cls,), {"__init__": split, "__module__": cls.__module__, "__doc__": cls.__doc__})
