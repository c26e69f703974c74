"""AdaLoRA (Zhang et al., 2023) as PEFT has it: what it needs beside an adapter, in a loop of our own.

It begins with one and a half times the ranks that the budget pays and masks the least important ones on the way. Its
budget counts ranks, which cost more in some layers than in others; so the parameters that remain are near the goal, not
at it. PEFT adds its regulariser, which keeps the rows of A and the columns of B orthonormal, only to a loss that the
model returns; ours do not, and their gradients get it from hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from torch import Tensor, nn

from florapeft.train.fitting import attached, exactly

_MORE = 1.5  # initial ranks, of those in the end: section 4 of the paper


def refused(model: nn.Module, layers: list[str]) -> dict[str, str]:
    """The layers that it cannot adapt, with the reason: grouped convolutions attach, and fail in the forward."""
    modules, found = dict(model.named_modules()), {}
    for name in layers:
        if not isinstance(modules.get(name), (nn.Linear, nn.Conv2d)):
            found[name] = "AdaLoRA takes linear layers and Conv2d alone"
        elif getattr(modules[name], "groups", 1) > 1:
            found[name] = "AdaLoRA fails on grouped convolutions"
    return found


def attach(model: nn.Module, layers: list[str], goal: int, steps: int, **fields: Any) -> PeftModel:
    """AdaLoRA on these layers, to come down to about `goal` parameters within `steps` optimizer steps.

    Ranks fall after the first tenth of the steps, in some twenty rounds; the last three tenths train what remains.
    """
    ranks = round(goal * len(layers) / sum(_cost(model.get_submodule(name)) for name in layers))
    first = ceil(_MORE * ranks / len(layers))
    schedule = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "deltaT": max(1, steps // 33), "total_step": steps}
    config = AdaLoraConfig(init_r=first, lora_alpha=first, target_modules=exactly(layers), **schedule, **fields)
    model = attached(model, config)
    model.base_model.rankallocator.target_bgt = ranks  # target_r has the same number in every layer on average
    regularised = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    for name, parameter in regularised.items():
        weight = config.orth_reg_weight / len(regularised)
        parameter.register_hook(_regulariser(parameter, weight, is_rows="lora_A" in name))
    return model


def after_steps(model: nn.Module) -> Callable[..., None] | None:
    """What AdaLoRA does after every optimizer step; None of any other method."""
    if not is_adalora(model):
        return None
    return lambda model, optimizer, step: model.base_model.update_and_allocate(step)


def is_adalora(model: nn.Module) -> bool:
    return isinstance(getattr(model, "base_model", None), AdaLoraModel)


def kept_parameters(model: PeftModel) -> int:
    """Entries of A, B and the singular values between them that are not masked."""
    return sum(
        int((module.lora_E["default"] != 0).sum()) * _cost(module.get_base_layer())
        for module in model.modules()
        if hasattr(module, "lora_E")
    )


def _cost(layer: nn.Module) -> int:
    """Parameters per rank, of the weight as a matrix of `(out, rest)`."""
    return len(layer.weight) + layer.weight[0].numel() + 1


def _regulariser(parameter: nn.Parameter, weight: float, *, is_rows: bool) -> Callable[[Tensor], Tensor]:
    """Adds the gradient of `weight * ‖P Pᵀ - I‖` (Frobenius norm) to one that arrives."""

    def add(gradient: Tensor) -> Tensor:
        rows = parameter.detach().flatten(1) if is_rows else parameter.detach().flatten(1).mT
        off = rows @ rows.mT - torch.eye(len(rows), device=rows.device)
        slope = 2 * weight * (off @ rows) / off.norm().clamp_min(1e-12)
        return gradient + (slope if is_rows else slope.mT).view_as(gradient)

    return add
