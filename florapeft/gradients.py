"""Ranks and start of an adapter from gradients: what one pass over a few batches says of where the update will lie.

    allocate                    before attaching: a budget goes to the weights and modes whose gradients need it
    initialize_from_gradients   after attaching: the factors are the leading HOSVD bases of the gradient, the core zero

Either leaves the model as it was. The update stays exactly zero, so that the base weights need no correction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from florapeft.batch_norm import forget_warning
from florapeft.budget import Choice, choices_from_spectra, describe_spending, spend_on_energy
from florapeft.config import FloraConfig
from florapeft.gradient_sums import GradientSum, Loss, Weight, gradient_sums
from florapeft.init import start_from_bases
from florapeft.layer import FloraLayer
from florapeft.planning import selected_targets
from florapeft.target_ranks import budget_in_parameters
from florapeft.targets import Target, adapter_tuckers

logger = logging.getLogger("florapeft")

# Below this share of common energy, gradients are taken for noise: see docs/evidence.md.
_LEAST_AGREEMENT = 0.25


def allocate(model: nn.Module, config: FloraConfig, batches: Iterable[Any], loss: Loss) -> FloraConfig:
    """Spend `config.budget` by the rule `spectrum`: where the gradients' energy is, by one pass over some batches.

    From rank 1 everywhere, the next parameters go to the weight and modes whose rank captures most of the gradient's
    energy per parameter, by the spectra of its unfoldings; each weight's energy counts as its number of entries.

    Args:
        model: the base model; as it was afterwards. A new head is to be trained a little before, or the gradients that
            come through it say nothing.
        config: with a `budget`. With `init_weights="gradient"` the same pass also yields the start.
        batches: some batches of training data, all of which are used.
        loss: `loss(model, batch)`, one number.

    Returns:
        A copy of `config` with `ranks`, to be attached to this model, and `gradient_agreement`: the share of the summed
        gradients' energy that the batches have in common, at most 1. Where it is near 0, the ranks follow noise; a
        warning says so.

    Raises:
        ValueError: no budget; or see `florapeft.gradient_sums.gradient_sums`.
    """
    if config.budget is None:
        raise ValueError("allocate spends a budget, and config.budget is None: give a count or a share of the model")
    budget = budget_in_parameters(model, config.budget)
    targets = selected_targets(model, config)
    sums = gradient_sums(model, {t.name: _weight(model, t) for t in targets}, batches, loss)
    choices = {target.name: _choices(target, sums.get(target.name), config.kernel_r) for target in targets}
    ranks = spend_on_energy(choices, budget)
    if problem := describe_spending(choices, ranks, budget):
        logger.warning(problem)
    solved = replace(config, ranks={name: list(rank) for name, rank in ranks.items()}, allocation="spectrum")
    solved.gradient_agreement = mean_agreement(sums)
    if config.init_weights == "gradient":
        solved.gradient_bases = {name: sums[name].bases(rank) for name, rank in ranks.items() if name in sums}
    return solved


def initialize_from_gradients(
    model: PeftModel, batches: Iterable[Any], loss: Loss, *, adapter_name: str | None = None
) -> None:
    """Start an adapter from gradients: factors the leading HOSVD bases of the summed gradients, core zero.

    Targets that no gradient reaches keep the start that they have. Where batches have hardly anything in common, the
    bases follow noise; a warning says so.

    Args:
        model: with a FLoRA adapter that is not trained yet.
        batches: some batches of training data, all of which are used.
        loss: `loss(model, batch)`, one number.
        adapter_name: the adapter; None takes the active one.

    Raises:
        ValueError: no such adapter, one that is merged or whose update is not zero; or see
            `florapeft.gradient_sums.gradient_sums`. Nothing is changed.
    """
    name, adapted = adapter_tuckers(model, adapter_name)
    tuckers = {target.name: tucker for target, tucker in adapted}
    base = model.get_base_model()
    layers = dict(base.named_modules())
    if merged := [key for key, layer in layers.items() if isinstance(layer, FloraLayer) and layer.merged]:
        raise ValueError(f"adapters are merged into {merged[0]}: unmerge them first")
    for key, tucker in tuckers.items():
        if all(tensor.any() for tensor in (tucker.core, *tucker.factors) if tensor is not None):
            raise ValueError(f"the update of {key} is not zero: adapter {name!r} is trained already")
    weights = {target.name: _weight(base, target) for target, _ in adapted}
    sums = gradient_sums(model, weights, batches, loss, {key: tucker.rank for key, tucker in tuckers.items()})
    mean_agreement(sums)
    for key, found in sums.items():
        start_from_bases(tuckers[key], found.bases(tuckers[key].rank))
    forget_warning(layer for layer in layers.values() if isinstance(layer, FloraLayer))


def are_noise(agreement: float | None) -> bool:
    """Whether gradients with this share of common energy say nothing; with a single batch nobody knows."""
    return agreement is not None and agreement < _LEAST_AGREEMENT


def mean_agreement(sums: Mapping[str, GradientSum]) -> float | None:
    """The mean of the weights' agreements, none below 0, by their numbers of entries; None of a single batch.

    Warns where it is too low for the gradients to say anything.
    """
    found = [(prod(total.value.shape), share) for total in sums.values() if (share := total.agreement()) is not None]
    if not found:
        return None
    mean = sum(size * max(0.0, share) for size, share in found) / sum(size for size, _ in found)
    if are_noise(mean):
        logger.warning(
            f"the batches' gradients have {mean:.0%} of their energy in common: ranks and start from them follow "
            "noise; give more batches, or take the default start and allocation='uniform'"
        )
    return mean


def _weight(model: nn.Module, target: Target) -> Weight:
    module = model.get_submodule(target.module)
    return Weight(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, target.weight)


def _choices(target: Target, found: GradientSum | None, kernel_r: int | None) -> list[Choice]:
    """The weight's choices by the gradient's spectra, whose energy is scaled to the weight's number of entries."""
    spectra = [[0.0]] * len(target.shape) if found is None else found.spectra()
    scales = [prod(target.shape) / (sum(spectrum) or 1.0) for spectrum in spectra]
    scaled = [[energy * scale for energy in spectrum] for spectrum, scale in zip(spectra, scales, strict=True)]
    choices = choices_from_spectra(target.shape, scaled)
    kernel = [mode for mode in range(len(target.shape)) if mode not in target.channel_modes]
    if kernel_r is None or not kernel:
        return choices
    given = [c for c in choices if all(c.rank[mode] == min(kernel_r, target.shape[mode]) for mode in kernel)]
    return given or choices
