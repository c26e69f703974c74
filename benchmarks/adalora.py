"""AdaLoRA (Zhang et al., 2023) as PEFT has it: what it needs beside an adapter, in a loop of our own.

It begins with one and a half times the ranks that the budget pays and masks the least important ones on the way. Its
budget counts ranks, which cost more in some layers than in others; so the parameters that remain are near the goal, not
at it. PEFT adds its regulariser, which keeps P and Q orthonormal, only to a loss that the model returns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from torch import Tensor, nn

from florapeft.train.fitting import attached, exactly

_MORE = 1.5  # initial ranks, of those in the end; the paper's choice, as are 0.85 and PEFT's weight of 0.5
_BETA = 0.85
_WEIGHT = 0.5


def attach(model: nn.Module, layers: list[str], goal: int, steps: int, **fields: object) -> PeftModel:
    """AdaLoRA on linear layers, to come down to about `goal` parameters within `steps` optimizer steps.

    Ranks fall between a tenth and seven tenths of the steps, in twenty rounds.
    """
    ranks = round(goal * len(layers) / sum(_cost(model.get_submodule(name)) for name in layers))
    first = round(_MORE * ranks / len(layers))
    schedule = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "deltaT": max(1, steps // 33), "total_step": steps}
    config = AdaLoraConfig(
        init_r=first,
        target_r=ranks // len(layers),
        lora_alpha=first,
        beta1=_BETA,
        beta2=_BETA,
        target_modules=exactly(layers),
        **schedule,
        **fields,
    )
    model = attached(model, config)
    model.base_model.rankallocator.target_bgt = ranks  # which need not be as many in every layer
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.register_hook(_regularised(parameter, "lora_A" in name, _count(model)))
    return model


def after_steps(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """What AdaLoRA does after every optimizer step; None of any other method."""
    if not isinstance(getattr(model, "base_model", None), AdaLoraModel):
        return None
    steps = count(1)
    return lambda model: model.base_model.update_and_allocate(next(steps))


def kept_parameters(model: PeftModel) -> int:
    """Entries of P, Q and the singular values that are not masked."""
    return sum(
        int((module.lora_E["default"] != 0).sum()) * _cost(module.get_base_layer())
        for module in model.modules()
        if hasattr(module, "lora_E")
    )


def _cost(layer: nn.Linear) -> int:
    """Parameters per rank."""
    return layer.in_features + layer.out_features + 1


def _count(model: nn.Module) -> int:
    return sum("lora_A" in name or "lora_B" in name for name, _ in model.named_parameters())


def _regularised(parameter: nn.Parameter, is_rows: bool, count: int) -> Callable[[Tensor], Tensor]:
    """Adds the gradient of the regulariser, the mean over matrices of `‖P Pᵀ - I‖`, to one that arrives."""

    def add(gradient: Tensor) -> Tensor:
        rows = parameter.detach() if is_rows else parameter.detach().mT
        off = rows @ rows.mT - torch.eye(len(rows))
        slope = 2 * (off @ rows) / off.norm().clamp_min(1e-12)
        return gradient + _WEIGHT / count * (slope if is_rows else slope.mT)

    return add
