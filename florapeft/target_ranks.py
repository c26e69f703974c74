"""The rank of every target: as configured, or solved from a parameter budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from florapeft.budget import describe_spending, spend_on_energy, uniform_choices
from florapeft.config import FloraConfig
from florapeft.kinds import quantized_as, weight_shape
from florapeft.rank import cap_rank, resolve_rank
from florapeft.targets import Target, listed

logger = logging.getLogger("florapeft")


def resolve_ranks(targets: Iterable[Target], config: FloraConfig) -> dict[str, tuple[int, ...]]:
    """The rank of every target as configured, before capping: `ranks`, else `rank_pattern`, else `r`.

    Raises:
        ValueError: a list of ranks does not have one entry per mode of a target.
    """
    resolved = {}
    for target in targets:
        if config.ranks is not None:
            r = config.ranks[target.name]
        else:
            r = from_pattern(config.rank_pattern, target, config.r)
        resolved[target.name] = resolve_rank(target.shape, r, config.kernel_r, target.channel_modes, target.name)
    return resolved


def from_pattern(pattern: dict[str, Any], target: Target, default: Any) -> Any:
    """The value for a target: what matches its name, else what matches its module's, else the default."""
    for name in (target.name, target.module):
        key = get_pattern_key(pattern.keys(), name)
        if key in pattern:
            return pattern[key]
    return default


def unmatched_patterns(pattern: dict[str, Any], targets: Iterable[Target]) -> list[str]:
    """Keys of a pattern that no target takes its value from."""
    names = {name for target in targets for name in (target.name, target.module)}
    return sorted(pattern.keys() - {get_pattern_key(pattern.keys(), name) for name in names})


def solve_budget(targets: Iterable[Target], config: FloraConfig, budget: int) -> dict[str, list[int]]:
    """Ranks for every target, spending `budget` as `config.allocation` says; what it cannot pay is left out.

    Raises:
        ValueError: the budget does not suffice for rank 1 in any target; or the rule needs data.
    """
    if config.allocation != "uniform":
        raise ValueError(
            f"allocation={config.allocation!r} needs gradients: attach the configuration that "
            "florapeft.allocate(model, config, batches, loss) returns"
        )
    choices = {t.name: uniform_choices(t.shape, t.channel_modes, config.kernel_r, is_stack=t.is_stack) for t in targets}
    ranks = spend_on_energy(choices, budget)
    if problem := describe_spending(choices, ranks, budget):
        logger.warning(problem)
    return {name: list(rank) for name, rank in ranks.items()}


def budget_in_parameters(model: nn.Module, budget: int | float) -> int:
    """A budget as a count; a share is one of the model's parameters without adapters.

    Raises:
        ValueError: it is more than the model has.
    """
    total = count_base_parameters(model)
    if budget > total:
        raise ValueError(f"a budget of {budget} parameters is more than the {total} of the base model")
    return int(budget * total) if isinstance(budget, float) else budget


def describe_caps(targets: Iterable[Target], ranks: dict[str, tuple[int, ...]]) -> str | None:
    """One sentence on the ranks that exceed their mode's size, or None."""
    capped = [
        f"{t.name} mode {mode}: {r} -> {d}"
        for t in targets
        for mode, (r, d) in enumerate(zip(ranks[t.name], cap_rank(ranks[t.name], t.shape), strict=True))
        if r > d
    ]
    return f"Ranks above a mode's size are capped: {listed(capped)}" if capped else None


def count_base_parameters(model: nn.Module) -> int:
    """Parameters of the model without its adapters; tied ones count once, and packed ones by their layer's shape."""
    adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in module.adapter_layer_names
        for parameter in getattr(module, attribute).parameters()
    }
    quantized = [m for m in model.modules() if not isinstance(m, BaseTunerLayer) and quantized_as(m) == "linear"]
    packed = {id(p) for m in quantized for name, p in m.named_parameters(recurse=False) if name != "bias"}
    logical = sum(math.prod(weight_shape(module)) for module in quantized)
    return logical + sum(p.numel() for p in model.parameters() if id(p) not in adapters | packed)
