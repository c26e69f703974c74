"""What benchmarks/studies.py varies: starts, ranks, the order of kernel taps, what is done to factors between steps.

A `Build` attaches an adapter to a case's network, for a seed; a `Between` changes it after an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradient_lora
import tasks
import torch
from accuracy import flora
from cases import Case
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from florapeft import FloraLayer, allocate
from florapeft.budget import choices_from_energies, rank_grid, spend_on_energy
from florapeft.gradient_sums import GradientSum, Weight, gradient_sums
from florapeft.init import start_from_bases
from florapeft.tucker import Tucker, captured_energy, hosvd, hosvd_core, multi_mode_dot, unfold

Build = Callable[[Case, nn.Module, int], nn.Module]
Between = Callable[[Case, nn.Module, torch.optim.Optimizer, int], None]  # the last is the number of steps so far


def layers(model: PeftModel) -> dict[str, FloraLayer]:
    return {n: module for n, module in model.get_base_model().named_modules() if isinstance(module, FloraLayer)}


def gradient_start(case: Case, model: nn.Module, seed: int, **fields: Any) -> PeftModel:
    """FLoRA at the case's budget with its start from gradients: factors the leading HOSVD bases, core zero."""
    return flora({"init_weights": "gradient", **fields}, case, model, seed)[0]


def plain(case: Case, model: nn.Module, seed: int, **fields: Any) -> PeftModel:
    """FLoRA without data."""
    return flora(fields, case, model, seed)[0]


def sums(case: Case, model: nn.Module, batches: list[tasks.Batch]) -> dict[str, GradientSum]:
    """The summed gradients of the weights that are adapted."""
    weights = {name: Weight(model.get_submodule(name), "weight") for name in case.layers}
    return gradient_sums(model, weights, batches, case.loss)


@torch.no_grad()
def zero_output(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """The bases of gradients in all modes but the output's, whose factor is zero; the core's rows orthonormal."""
    model = gradient_start(case, model, seed)
    for layer in layers(model).values():
        core, factors = layer.tucker("default")
        if factors[0] is not None:
            nn.init.orthogonal_(unfold(core, 0))
            factors[0].zero_()
    return model


@torch.no_grad()
def scaled(case: Case, model: nn.Module, seed: int, *, length: float) -> PeftModel:
    """The bases of gradients, with columns of another length than 1."""
    model = gradient_start(case, model, seed)
    for layer in layers(model).values():
        for factor in layer.tucker("default").factors:
            if factor is not None:
                factor.mul_(length)
    return model


def gram(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """Bases of the unfolded gradients' Gram matrices, summed over batches, instead of those of the summed gradient."""
    found: dict[tuple[str, int], Tensor] = {}
    for batch in case.batches(seed):
        for name, total in sums(case, model, [batch]).items():
            gradient = total.value.to_tensor()
            for mode in range(gradient.ndim):
                unfolded = unfold(gradient, mode)
                found[name, mode] = found.get((name, mode), 0) + unfolded @ unfolded.mT
    model = get_peft_model(model, case.config())
    for name, layer in layers(model).items():
        tucker = layer.tucker("default")
        grams = [found[name, mode] for mode in range(len(tucker.shape))]
        leading = [torch.linalg.eigh(matrix).eigenvectors.flip(1) for matrix in grams]
        start_from_bases(tucker, [basis[:, :r] for basis, r in zip(leading, tucker.rank, strict=True)])
    return model


def exact_energies(case: Case, model: nn.Module, seed: int) -> PeftModel:
    """Ranks by the energy of the gradient that each keeps, not by its estimate from the spectra of the unfoldings."""
    totals = sums(case, model, case.batches(seed))
    choices = {}
    for name, total in totals.items():
        gradient = total.value.to_tensor()
        grid = rank_grid(gradient.shape)
        energies = captured_energy(hosvd_core(gradient), grid)
        energies *= gradient.numel() / energies.max()
        choices[name] = choices_from_energies(gradient.shape, energies.flatten().tolist())
    ranks = spend_on_energy(choices, case.goal)
    config = replace(case.config(init_weights="gradient"), ranks={name: list(rank) for name, rank in ranks.items()})
    config.gradient_bases = {name: totals[name].bases(rank) for name, rank in ranks.items()}
    return get_peft_model(model, config)


class Updated(nn.Module):
    """A weight plus an update in Tucker form: its kernel taps in another order, or its magnitudes per output trained.

    Args:
        weight: of a convolution.
        core, factors: of the update.
        taps: for every tap of the kernel the one of the update that is added to it; None leaves them in place.
        decomposed: whether each output's weights are scaled to a magnitude of their own, as in DoRA (Liu et al. (2024),
            section 4.1), with no gradient through the norm that they have (4.3).
    """

    def __init__(
        self, weight: Tensor, core: Tensor, factors: list[Tensor | None], taps: Tensor | None, decomposed: bool
    ) -> None:
        super().__init__()
        self.core = nn.Parameter(core)
        self.factors = nn.ParameterDict({str(n): nn.Parameter(f) for n, f in enumerate(factors) if f is not None})
        self.register_buffer("taps", taps)
        self.magnitude = nn.Parameter(_norms(weight).clone()) if decomposed else None

    def forward(self, weight: Tensor) -> Tensor:
        factors = [self.factors.get(str(n)) for n in range(weight.ndim)]
        with torch.autocast("cpu", enabled=False):
            update = Tucker(self.core, tuple(factors)).to_tensor()
        if self.taps is not None:
            update = update.flatten(2)[..., self.taps].view_as(weight)
        total = weight + update
        return total if self.magnitude is None else total * (self.magnitude / _norms(total.detach()))


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def updated(
    case: Case, model: nn.Module, seed: int, orders: dict[str, Tensor], *, decomposed: bool, **fields: Any
) -> nn.Module:
    """FLoRA with its start from gradients, by `Updated` weights; `orders` has the taps of every layer, if they move."""
    totals = sums(case, model, case.batches(seed))
    config = replace(case.config(), **fields)
    if config.allocation == "spectrum":
        config = allocate(model, config, case.batches(seed), case.loss)
    ranks = get_peft_model(case.task.model(0), config).peft_config["default"].ranks
    for name in ranks:
        gradient, order = totals[name].value.to_tensor(), orders.get(name)
        if order is not None:
            gradient = gradient.flatten(2)[..., order.argsort()].view_as(gradient)
        core, factors = hosvd(gradient, ranks[name])
        layer = model.get_submodule(name)
        update = Updated(layer.weight, torch.zeros_like(core), list(factors), order, decomposed)
        parametrize.register_parametrization(layer, "weight", update)
    for parameter in model.get_submodule(case.task.head).parameters():
        parameter.requires_grad_(True)
    return model


def taps(case: Case, model: nn.Module, seed: int, *, permuted: bool, kernel_r: int) -> nn.Module:
    """FLoRA on kernels whose taps are permuted, per layer at random, before they are unfolded; or in the same way not.

    A permutation leaves number and shape of the parameters alone, and takes from the kernel modes what they mean.
    """
    generator, orders = torch.Generator().manual_seed(seed), {}
    for name in case.layers:
        count = model.get_submodule(name).weight[0, 0].numel()
        orders[name] = torch.randperm(count, generator=generator) if permuted else torch.arange(count)
    return updated(case, model, seed, orders, decomposed=False, kernel_r=kernel_r)


def form(case: Case, model: nn.Module, seed: int, *, decomposed: bool, **fields: Any) -> nn.Module:
    """FLoRA by `Updated` weights: as they are, or each output's magnitude trained too, at as many parameters in all."""
    magnitudes = sum(len(model.get_submodule(name).weight) for name in case.layers) if decomposed else 0
    return updated(case, model, seed, {}, decomposed=decomposed, budget=case.goal - magnitudes, **fields)


def factors(model: nn.Module) -> list[Tensor]:
    """Of all updates."""
    found = []
    for module in model.modules():
        if isinstance(module, FloraLayer):
            found += [f for tucker in module.tuckers("default").values() for f in tucker.factors if f is not None]
        elif isinstance(module, Updated):
            found += module.factors.values()
    return found


def positive_qr(factor: Tensor) -> tuple[Tensor, Tensor]:
    """QR with a positive diagonal: near orthonormal columns no column changes its sign."""
    basis, triangle = torch.linalg.qr(factor)
    signs = triangle.diagonal().sign()
    return basis * signs, signs[:, None] * triangle


@torch.no_grad()
def retract(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Factors back to orthonormal columns, by QR; those that began at zero are let be."""
    if step == 1:
        model.retracted = [factor for factor in factors(model) if factor.norm(dim=0).min() > 0.5]
    for factor in model.retracted:
        factor.copy_(positive_qr(factor)[0])


@torch.no_grad()
def absorb(case: Case, model: PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The same, and the core takes up what the factors lose: the update stays as the optimizer left it."""
    for layer in layers(model).values():
        core, bases = layer.tucker("default")
        parts = [(None, None) if factor is None else positive_qr(factor) for factor in bases]
        core.copy_(multi_mode_dot(core, [triangle for _, triangle in parts]))
        for factor, (basis, _) in zip(bases, parts, strict=True):
            if factor is not None:
                factor.copy_(basis)


@torch.no_grad()
def realign(case: Case, model: PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """After 5 and 20 steps, bases anew: of the update so far less the gradient there, both of norm 1.

    What the update has outside of the new bases is lost, and the optimizer begins anew.
    """
    if step not in (5, 20):
        return
    found = layers(model)
    weights = {name: f"base_model.model.{name}.base_layer" for name in found}
    model.merge_adapter()  # `sums` would take the gradients at the base weights
    with torch.enable_grad():
        gradients = gradient_lora.gradients(model, list(weights.values()), case.batches(step), case.loss).sums
    model.unmerge_adapter()
    for name, layer in found.items():
        core, factors = layer.tucker("default")
        update = Tucker(core, factors).to_tensor()
        gradient = gradients[weights[name]].view_as(update)
        wanted = update / update.norm() - gradient / gradient.norm()
        bases = hosvd(wanted, core.shape).factors
        core.copy_(multi_mode_dot(update, [None if basis is None else basis.mT for basis in bases]))
        for factor, basis in zip(factors, bases, strict=True):
            if factor is not None:
                factor.copy_(basis)
        for parameter in (core, *factors):
            optimizer.state.pop(parameter, None)
