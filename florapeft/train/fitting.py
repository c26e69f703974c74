"""PEFT's other methods, each at the rank at which it has as many trainable parameters as FLoRA.

The rank is the largest common one that stays below, and one more in as many layers, spread over the depth, as come
closest.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

WITHIN = 0.02  # how far from FLoRA's number of parameters counts as equal

# Attaches an adapter to the layers of these names at rank r, and r + 1 in those of the second list.
Attach = Callable[[nn.Module, list[str], int, list[str]], nn.Module]


class Rival(NamedTuple):
    """A method of PEFT: its name in tables, its config, the field of its alpha, and settings to try in turn."""

    label: str
    config: type
    alpha: str
    variants: tuple[dict[str, Any], ...] = ({},)


RIVALS = {
    "lora": Rival("LoRA", LoraConfig, "lora_alpha"),
    "rslora": Rival("rsLoRA", LoraConfig, "lora_alpha", ({"use_rslora": True},)),
    "dora": Rival("DoRA", LoraConfig, "lora_alpha", ({"use_dora": True},)),
    "loha": Rival("LoHa", LoHaConfig, "alpha", ({}, {"use_effective_conv2d": True})),
    "lokr": Rival("LoKr", LoKrConfig, "alpha", tuple({"decompose_factor": factor} for factor in (-1, 16, 8, 4, 2))),
}


class Fit(NamedTuple):
    """How a method comes nearest to a number of parameters."""

    attach: Attach
    rank: int
    raised: list[str]
    parameters: int


def attaches(name: str, **fields: Any) -> tuple[Attach, ...]:
    """The variants of a method of `RIVALS`, with alpha = r and these further fields of its config."""
    rival = RIVALS[name]

    def attach(
        settings: dict[str, Any], model: nn.Module, layers: list[str], rank: int, raised: list[str]
    ) -> nn.Module:
        given = {"r": rank, rival.alpha: rank, "target_modules": exactly(layers), **settings, **fields}
        if raised:
            given["rank_pattern"] = given["alpha_pattern"] = {exactly(raised): rank + 1}
        return get_peft_model(model, rival.config(**given))

    return tuple(partial(attach, settings) for settings in rival.variants)


def fitting(variants: Sequence[Attach], base: nn.Module, layers: list[str], goal: int) -> Fit:
    """The first variant within 2% of `goal` parameters at its best rank, or the one that comes closest."""
    best: Fit | None = None
    for attach in variants:
        found = Fit(attach, *_ranks(partial(_counts, attach, base, layers), layers, goal))
        if best is None or abs(found.parameters - goal) < abs(best.parameters - goal):
            best = found
        if abs(best.parameters / goal - 1) <= WITHIN:
            break
    return best


def adaptable(attach: Attach, base: nn.Module, layers: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those of the layers that a method can adapt, and by kind of layer why not the others.

    One layer of each kind, by class and by whether it is grouped, is tried.
    """
    kinds: dict[tuple[type, bool], list[str]] = {}
    for name in layers:
        layer = base.get_submodule(name)
        kinds.setdefault((type(layer), getattr(layer, "groups", 1) > 1), []).append(name)
    refused = {}
    for (kind, is_grouped), names in kinds.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attach(shared(base), names[:1], 1, [])
        except Exception as error:  # whatever a library raises is what its users meet
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            refused["grouped " * is_grouped + kind.__name__] = (names, reason)
    left_out = {name for names, _ in refused.values() for name in names}
    return [name for name in layers if name not in left_out], {kind: why for kind, (_, why) in refused.items()}


def shared(model: nn.Module) -> nn.Module:
    """A copy of the model around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def trainable(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def exactly(names: list[str]) -> str:
    """A regular expression that matches these names and no others."""
    return "^(?:" + "|".join(map(re.escape, names)) + ")$"


def _ranks(counts: Callable[[int], dict[str, int]], layers: list[str], goal: int) -> tuple[int, list[str], int]:
    known: dict[int, dict[str, int]] = {}

    def total(rank: int) -> int:
        known.setdefault(rank, counts(rank))
        return sum(known[rank].values())

    low, high = 1, 2
    while total(high) <= goal and high < 1024:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= goal else (low, middle)
    have, raised = total(low), []
    total(low + 1)
    stride = max(1, len(layers) // 5)  # neighbours are alike: go over the depth in strides
    for layer in [layer for first in range(stride) for layer in layers[first::stride]]:
        more = known[low + 1][layer] - known[low][layer]
        if have < goal and abs(have + more - goal) < abs(have - goal):
            raised.append(layer)
            have += more
    return low, raised, have


def _counts(attach: Attach, base: nn.Module, layers: list[str], rank: int) -> dict[str, int]:
    """Trainable parameters by layer."""
    model = attach(shared(base), layers, rank, [])
    counts = dict.fromkeys(layers, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removeprefix("adapters.").replace("/", ".")
            owners = [layer for layer in layers if name.startswith(f"{layer}.")]
            if owners:  # a head that is trained too has none
                counts[max(owners, key=len)] += parameter.numel()
    return counts
