"""PEFT's other methods, each at the rank at which it has as many trainable parameters as FLoRA.

The rank is the largest common one that stays below, and one more in as many layers, spread over the depth, as come
closest. A "layer" is a module or, such as a stack of experts, a parameter that no layer stands for, by its full name.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from florapeft.layer import FloraLayer
from florapeft.parameters import FloraParameters

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
        given = {"r": rank, rival.alpha: rank, **targeting(model, layers), **settings, **fields}
        if raised:
            given["rank_pattern"] = given["alpha_pattern"] = {exactly(raised): rank + 1}
        return attached(model, rival.config(**given))

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

    One layer of each kind is tried: by class and by whether it is grouped; parameters by owner and order.
    """
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(_kind(base, name), []).append(name)
    refused = {}
    for kind, names in kinds.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attach(shared(base), names[:1], 1, [])
        except Exception as error:  # whatever a library raises is what its users meet
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            refused[kind] = (names, reason)
    left_out = {name for names, _ in refused.values() for name in names}
    return [name for name in layers if name not in left_out], {kind: why for kind, (_, why) in refused.items()}


def adapted(model: nn.Module) -> list[str]:
    """What FLoRA adapts in a model: layers, and the parameters that no layer stands for."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FloraParameters) and not isinstance(module.get_base_layer(), nn.MultiheadAttention):
            found += [f"{name}.{weight}" for weight in module.weight_names.values()]
        elif isinstance(module, FloraLayer):
            found.append(name)
    return found


def targeting(model: nn.Module, layers: list[str]) -> dict[str, Any]:
    """The fields of a config of PEFT's that name these layers."""
    parameters = [name for name in layers if is_parameter(model, name)]
    modules = [name for name in layers if name not in parameters]
    fields: dict[str, Any] = {"target_modules": exactly(modules) if modules else []}
    return fields | ({"target_parameters": parameters} if parameters else {})


def attached(model: nn.Module, config: PeftConfig) -> PeftModel:
    """The model with an adapter, without PEFT's word that ranks of parameters are ignored, which they are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        return get_peft_model(model, config)


def is_parameter(model: nn.Module, name: str) -> bool:
    """Whether the name is that of a parameter, not of a module."""
    owner, _, leaf = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(owner), leaf), nn.Parameter)


def place(name: str, module: nn.Module) -> str:
    """What a module of PEFT's, at `name` in the model, adapts: itself, or a parameter of what it is wrapped around."""
    parameter = getattr(module, "parameter_name", None)
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"


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
    have = total(low)
    total(low + 1)
    more = {layer: known[low + 1][layer] - known[low][layer] for layer in layers}
    stride = max(1, len(layers) // 5)  # neighbours are alike: go over the depth in strides
    strided = [layer for first in range(stride) for layer in layers[first::stride]]
    # Where layers differ much, as stacks of experts and others do, the largest that fit go first.
    largest_first = sorted(strided, key=more.__getitem__, reverse=True)
    raised = _raised(strided, more, goal - have, 2)
    if abs(have + sum(more[layer] for layer in raised) - goal) > WITHIN * goal:
        raised = _raised(largest_first, more, goal - have, 1)
    return low, raised, have + sum(more[layer] for layer in raised)


def _raised(order: list[str], more: dict[str, int], room: int, most: int) -> list[str]:
    """Layers in this order that take less than `most` times what is left of the room; 2 is what comes closer to it."""
    raised = []
    for layer in order:
        if 0 < more[layer] < most * room:
            raised.append(layer)
            room -= more[layer]
    return raised


def _counts(attach: Attach, base: nn.Module, layers: list[str], rank: int) -> dict[str, int]:
    """Trainable parameters by layer."""
    model = attach(shared(base), layers, rank, [])
    counts = dict.fromkeys(layers, 0)
    owners = {layer: layer for layer in layers}
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            owners[_base_name(name)] = place(_base_name(name), module)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            within = [owner for owner in owners if _base_name(name).startswith(f"{owner}.")]
            if within:  # a head that is trained too has none
                counts[owners[max(within, key=len)]] += parameter.numel()
    return counts


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("adapters.").replace("/", ".")


def _kind(base: nn.Module, name: str) -> str:
    if is_parameter(base, name):
        owner, _, leaf = name.rpartition(".")
        owner = base.get_submodule(owner)
        return f"{type(owner).__name__}, parameters of order {getattr(owner, leaf).ndim}"
    layer = base.get_submodule(name)
    return "grouped " * (getattr(layer, "groups", 1) > 1) + type(layer).__name__
