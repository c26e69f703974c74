"""LoRA with what FLoRA is given: its start and its ranks from the gradients of a few batches.

PEFT's LoRA-GA and EVA take linear layers alone. Here A is the leading right singular vectors of the gradient of the
weight, flattened to a matrix of `(out, rest)`, B is zero, and ranks go to the singular values that hold most energy
per parameter, with every layer's energy scaled to its number of weights. A stack of experts, `(experts, out, in)`, is a
matrix per expert, all of one rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from florapeft.gradient_sums import GradientSum
from florapeft.gradients import mean_agreement
from florapeft.retraction import nearest_orthonormal
from florapeft.train.fitting import attached, exactly, is_parameter, place, targeting

Loss = Callable[[nn.Module, Any], Tensor]


class Gradients(NamedTuple):
    """The summed gradients of weights, as matrices `(out, rest)` or stacks of them, `(experts, out, in)`.

    `agreement` is the share of their energy that the batches have in common, as FLoRA counts it.
    """

    sums: dict[str, Tensor]
    agreement: float | None


def gradients(model: nn.Module, layers: list[str], batches: Iterable[Any], loss: Loss) -> Gradients:
    """The gradients of the layers' weights, over all batches; the model is as it was afterwards."""
    was = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    weights = {n: model.get_parameter(n if is_parameter(model, n) else f"{n}.weight") for n in layers}
    model.eval().requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    totals = {n: GradientSum(weight.shape, weight.shape) for n, weight in weights.items()}  # kept in full
    for batch in batches:
        loss(model, batch).backward()
        for name, weight in weights.items():
            totals[name].add(weight.grad)
            totals[name].end_batch()
            weight.grad = None
    values = {name: total.value.to_tensor() for name, total in totals.items()}
    found = {n: value if is_parameter(model, n) else value.flatten(1) for n, value in values.items()}
    for parameter, wanted in was.items():
        parameter.grad = None
        parameter.requires_grad_(wanted)
    for module, training in modes.items():
        module.training = training
    return Gradients(found, mean_agreement(totals))


def spectrum_ranks(found: dict[str, Tensor], budget: int) -> dict[str, int]:
    """The rank of every layer by the energy per parameter of its gradient's singular values; 0 leaves a layer out."""
    ranks, spent, queue = dict.fromkeys(found, 0), 0, []
    energies = {}
    for name, gradient in found.items():
        energy = torch.linalg.svdvals(gradient).square()
        energy = energy.reshape(-1, energy.shape[-1]).sum(0)  # over experts
        energies[name] = (energy / energy.sum() * gradient.numel() / _cost(gradient)).tolist()
        heapq.heappush(queue, (-energies[name][0], name))
    while queue:
        _, name = heapq.heappop(queue)
        if spent + _cost(found[name]) > budget:
            continue
        spent += _cost(found[name])
        ranks[name] += 1
        if ranks[name] < len(energies[name]):
            heapq.heappush(queue, (-energies[name][ranks[name]], name))
    return ranks


def attach_with(model: nn.Module, ranks: dict[str, int], **fields: Any) -> PeftModel:
    """LoRA with alpha = r, at these ranks."""
    ranks = {name: rank for name, rank in ranks.items() if rank}
    patterns = {exactly([name]): rank for name, rank in ranks.items()}
    fields |= {**targeting(model, list(ranks)), "rank_pattern": patterns, "alpha_pattern": patterns}
    return attached(model, LoraConfig(**fields))


@torch.no_grad()
def start_from_gradients(model: PeftModel, found: dict[str, Tensor]) -> None:
    """A of every layer becomes the leading right singular vectors; B stays zero."""
    for name, module in model.get_base_model().named_modules():
        name = place(name, module)
        if name in found and hasattr(module, "lora_A"):
            weight = module.lora_A["default"].weight  # of a stack, the rows of one expert after those of another
            directions = torch.linalg.svd(found[name], full_matrices=False).Vh
            weight.copy_(directions[..., : module.r["default"], :].reshape(weight.shape))


def keep_orthonormal(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """After every step the rows of A are brought back to orthonormal ones, as `florapeft.keep_orthonormal` does."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]

    @torch.no_grad()
    def retract(*_: Any) -> None:
        for layer in layers:
            weight, rank = layer.lora_A["default"].weight, layer.r["default"]
            columns = weight.reshape(-1, rank, weight[0].numel()).mT  # of a stack, a matrix per expert
            weight.copy_(nearest_orthonormal(columns).mT.reshape(weight.shape))

    optimizer.register_step_post_hook(retract)


def _cost(gradient: Tensor) -> int:
    """Parameters per rank."""
    *experts, out, rest = gradient.shape
    return prod(experts) * (out + rest)
