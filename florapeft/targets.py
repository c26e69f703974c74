"""Which modules of a model a configuration selects, and at which ranks."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn

from florapeft.config import ALL_WEIGHTS, FloraConfig
from florapeft.layer import SUPPORTED_KINDS, FloraLayer, adapted_kind
from florapeft.rank import cap_rank, resolve_rank, spend_uniformly
from florapeft.support import shared_weights, why_not

SHORTHANDS = (ALL_WEIGHTS, INCLUDE_LINEAR_LAYERS_SHORTHAND)

# Names that transformers' classes for tasks give their heads, at the top of the model.
_HEAD_NAMES = (
    "classifier",
    "classifier_distill",
    "cls_classifier",
    "distillation_classifier",
    "classification_head",
    "score",
    "qa_outputs",
    "head",
    "fc",
)


class Target(NamedTuple):
    """A module to adapt: its full name, the class that adapts it, its weight's shape and channel modes."""

    name: str
    layer: type[FloraLayer]
    shape: tuple[int, ...]
    channel_modes: tuple[int, int]


def find_targets(model: nn.Module, config: FloraConfig) -> list[Target]:
    """The modules that `config` selects in `model`, in the model's order. Changes nothing.

    Raises:
        ValueError: nothing matches (the closest names are suggested), or a module matches that cannot be adapted (its
            reason is given); with the shorthands "all-weights" and "all-linear" such modules are left out instead.
    """
    modules = dict(candidates(model))
    names = _select(model, config, modules)
    refused = {name: reason for name in names if (reason := why_not(name, modules[name], model))}
    shared = shared_weights(model, modules, [name for name in names if name not in refused])
    if is_shorthand(config.target_modules):
        refused |= {name: f"its weight is also that of {_listed(others)}" for name, others in shared.items()}
    elif shared:
        name, others = next(iter(shared.items()))
        warnings.warn(
            f"{_count(shared, 'target')} with a weight that another module has too, as {name} and {_listed(others)}: "
            "the adapter acts where the target is called, but merging it changes the other module as well",
            RuntimeWarning,
            stacklevel=2,
        )
    adaptable = [name for name in names if name not in refused]
    if refused and not (is_shorthand(config.target_modules) and adaptable):
        raise ValueError(
            f"target_modules={_shown(config.target_modules)} matches {_count(refused, 'module')} that FLoRA cannot "
            f"adapt: {_listed(f'{name} ({reason})' for name, reason in refused.items())}. "
            f"Supported kinds: {', '.join(SUPPORTED_KINDS)}"
        )
    names = adaptable
    if config.ranks is not None:
        _check_names(config.ranks, names)
        names = [name for name in names if name in config.ranks]
    return [describe(name, modules[name]) for name in names]


def exact_targets(targets: Iterable[Target], model: nn.Module) -> set[str] | str:
    """A value of `target_modules` that selects these modules and no others, as PEFT matches names.

    The full names; or, where PEFT would also take one for the suffix of another module's name, a regular expression.
    """
    names = {target.name for target in targets}
    others = (name for name, _ in model.named_modules() if name not in names)
    if any(other.endswith(tuple(f".{name}" for name in names)) for other in others):
        return "|".join(map(re.escape, sorted(names)))
    return names


def describe(name: str, module: nn.Module) -> Target:
    """The `Target` of a supported module."""
    _, layer = adapted_kind(module)
    return Target(name, layer, tuple(module.weight.shape), layer.modes_of(module))


def resolve_ranks(targets: Iterable[Target], config: FloraConfig) -> dict[str, tuple[int, ...]]:
    """The rank of every target as configured, before capping: `ranks`, else `rank_pattern`, else `r`.

    Raises:
        ValueError: a list of ranks does not have one entry per mode of a target.
    """
    resolved = {}
    for name, _, shape, channel_modes in targets:
        if config.ranks is not None:
            r = config.ranks[name]
        else:
            key = get_pattern_key(config.rank_pattern.keys(), name)
            r = config.rank_pattern.get(key, config.r)
        resolved[name] = resolve_rank(shape, r, config.kernel_r, channel_modes, name)
    return resolved


def solve_budget(model: nn.Module, targets: list[Target], config: FloraConfig) -> dict[str, list[int]]:
    """Ranks for every target, spending `config.budget` as `config.allocation` says.

    Raises:
        ValueError: the budget does not suffice for rank 1.
    """
    budget = config.budget
    if isinstance(budget, float):
        budget = int(budget * count_base_parameters(model))
    ranks = spend_uniformly(
        {t.name: t.shape for t in targets}, {t.name: t.channel_modes for t in targets}, budget, config.kernel_r
    )
    return {name: list(rank) for name, rank in ranks.items()}


def describe_caps(targets: Iterable[Target], ranks: dict[str, tuple[int, ...]]) -> str | None:
    """One sentence on the ranks that exceed their mode's size, or None."""
    capped = [
        f"{t.name} mode {mode}: {r} -> {d}"
        for t in targets
        for mode, (r, d) in enumerate(zip(ranks[t.name], cap_rank(ranks[t.name], t.shape), strict=True))
        if r > d
    ]
    return f"Ranks above a mode's size are capped: {_listed(capped)}" if capped else None


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that could be a target, by full name; a tuner layer stands for the layer that it wraps.

    The insides of tuner layers and of `modules_to_save` wrappers are not the model's own.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
        if isinstance(module, BaseTunerLayer):
            yield name, module.get_base_layer()
        elif not isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module


def task_heads(model: nn.Module) -> list[str]:
    """Names of the heads of a transformers task model: its own children of a usual name, or timm's classifier."""
    heads = [name for name in _HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
    get_classifier = getattr(getattr(model, "timm_model", None), "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        heads += [name for name, module in model.named_modules() if module is classifier]
    return heads


def count_base_parameters(model: nn.Module) -> int:
    """Parameters of the model without its adapters; tied ones count once."""
    adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in module.adapter_layer_names
        for parameter in getattr(module, attribute).parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in adapters)


def _select(model: nn.Module, config: FloraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that `target_modules` and `exclude_modules` select."""
    if is_shorthand(config.target_modules, ALL_WEIGHTS):
        heads = _heads(model)
        chosen = {
            name
            for name, module in modules.items()
            if adapted_kind(module) is not None and not any(name == h or name.startswith(f"{h}.") for h in heads)
        }
    elif is_shorthand(config.target_modules):
        chosen = _maybe_include_all_linear_layers(replace(config), model).target_modules
    else:
        chosen = None
    resolved = config if chosen is None else replace(config, target_modules=chosen)
    selected = [name for name in modules if check_target_module_exists(resolved, name)]
    if not selected and config.target_modules != DUMMY_TARGET_MODULES:
        # Where everything that matches is excluded, PEFT says so itself.
        unrestricted = replace(resolved, exclude_modules=None, modules_to_save=None)
        if not any(check_target_module_exists(unrestricted, name) for name in modules):
            raise ValueError(_nothing_matches(model, config, modules))
    return selected


def _heads(model: nn.Module) -> list[str]:
    """Names of the modules that "all-weights" leaves to the user: output embedding, embeddings tied to it, and heads.

    On a model that is not transformers' nothing is taken for a head.
    """
    if not hasattr(model, "get_output_embeddings"):
        return []
    try:
        output = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # models without embeddings
        output = None
    weight = getattr(output, "weight", None)
    heads = [
        name
        for name, module in candidates(model)
        if module is output or (weight is not None and getattr(module, "weight", None) is weight)
    ]
    return heads + task_heads(model)


def _check_names(ranks: dict[str, list[int]], names: list[str]) -> None:
    missing = [name for name in ranks if name not in names]
    if missing:
        hint = _closest(missing[0], names)
        raise ValueError(
            f"ranks names {_count(missing, 'module')} that this model does not have, or that target_modules does not "
            f"select: {_listed(missing)}{hint}"
        )


def unmatched_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """Those of `names` that no module of the model has, nor ends with, each with a suggestion."""
    known = [name for name, _ in model.named_modules()]
    return [
        name + _closest(name, known)
        for name in sorted(names)
        if not any(other == name or other.endswith(f".{name}") for other in known)
    ]


def _nothing_matches(model: nn.Module, config: FloraConfig, modules: dict[str, nn.Module]) -> str:
    asked = config.target_modules
    problem = f"Target modules {_shown(asked)} not found in the base model"
    if not modules:
        return f"{problem}: the {type(model).__name__} has no module inside it to adapt; wrap it in an nn.Module"
    if not any(adapted_kind(module) for module in modules.values()):
        kinds = sorted({type(m).__name__ for m in modules.values() if not next(m.children(), None)})
        supported = ", ".join(SUPPORTED_KINDS)
        return f"{problem}: no layer of it is of a supported kind. It has: {', '.join(kinds)}. Supported: {supported}"
    if config.layers_to_transform is not None:
        restriction = f"layers_to_transform={config.layers_to_transform}, layers_pattern={config.layers_pattern}"
        return f"{problem} with {restriction}"
    first = asked if isinstance(asked, str) else min(asked, default="")
    return problem + _closest(first, [*modules, *SHORTHANDS])


def _closest(name: str, names: Iterable[str]) -> str:
    """`. Did you mean …?`, or nothing; full names before last parts of names."""
    names = list(names)
    lasts = sorted({known.rpartition(".")[2] for known in names})
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or difflib.get_close_matches(name.rpartition(".")[2], lasts, n=3, cutoff=0.5)
    return f". Did you mean {' or '.join(map(repr, close))}?" if close else ""


def is_shorthand(target_modules: object, *shorthands: str) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() in (shorthands or SHORTHANDS)


def _shown(target_modules: object) -> object:
    return sorted(target_modules) if isinstance(target_modules, (set, list, tuple)) else repr(target_modules)


def _count(items: Iterable[object], noun: str) -> str:
    count = len(list(items))
    return f"{count} {noun}" + ("s" if count > 1 else "")


def _listed(items: Iterable[str], most: int = 3) -> str:
    items = list(items)
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
