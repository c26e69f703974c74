"""Which weights of a model a configuration selects."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from peft.utils.other import _get_input_embeddings_name
from torch import Tensor, nn

from florapeft.config import ALL_WEIGHTS, FloraConfig
from florapeft.kinds import SUPPORTED_KINDS, WeightLayer, adapted_kind, quantized_as, weight_shape
from florapeft.layer import FloraLayer, parameter_shape
from florapeft.parameters import (
    FloraParameters,
    MultiheadAttention,
    attention_weights,
    expert_stacks,
)
from florapeft.support import is_supported_kind, shared_weights, why_not, why_not_parameter
from florapeft.tucker import Tucker

# Begins a full name in a list of `target_modules`, whose other entries are suffixes too.
FULL_NAME = "^"
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
    "lm_head",  # also of classes for CTC, where it is no output embedding
)


class Target(NamedTuple):
    """A weight to adapt.

    Attributes:
        name: of its layer; of the weight itself where no layer stands for it.
        module: name of the module that the adapter is put around.
        weight: name of the weight in that module.
        layer: the class that adapts it.
        shape: the weight's shape.
        channel_modes: its modes that are channels.
        bare: whether it is named by `target_parameters`, not through its module.
    """

    name: str
    module: str
    weight: str
    layer: type[FloraLayer]
    shape: tuple[int, ...]
    channel_modes: tuple[int, ...]
    bare: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether it is taken for a stack of matrices: a bare parameter of order 3, as those of experts are."""
        return self.bare and len(self.shape) == 3


def find_targets(model: nn.Module, config: FloraConfig) -> list[Target]:
    """The weights that `config` selects in `model`, modules before bare parameters. Changes nothing.

    Raises:
        ValueError: nothing matches (the closest names are suggested), or something matches that cannot be adapted (its
            reason is given); with the shorthands "all-weights" and "all-linear" such modules are left out instead.
    """
    modules = dict(candidates(model))
    names = _select(model, config, modules)
    parameters = _select_parameters(model, config, modules)
    refused = {name: reason for name in names if (reason := why_not(name, modules[name], model))}
    for name in names:
        parent = name.rpartition(".")[0]
        if parent in names and _in_attention(name, modules):
            refused[name] = f"it is a part of {parent}, which is adapted as a whole"
    targets = [target for name in names if name not in refused for target in describe(name, modules[name])]
    for name in parameters:
        module_name, _, weight = name.rpartition(".")
        if reason := _why_not_parameter(name, modules[module_name], model, targets):
            refused[name] = reason
        else:
            targets.append(describe_parameter(name, module_name, weight, modules[module_name]))
    weights = {t.name: w for t in targets if (w := _weight(modules[t.module], t.weight)) is not None}
    shared = shared_weights(model, weights)
    if is_shorthand(config.target_modules):
        refused |= {name: f"its weight is also that of {listed(others)}" for name, others in shared.items()}
        targets = [target for target in targets if target.name not in shared]
    elif shared:
        name, others = next(iter(shared.items()))
        warnings.warn(
            f"{_count(shared, 'target')} with a weight that another module has too, as {name} and {listed(others)}: "
            "the adapter acts where the target is called, but merging it changes the other module as well",
            RuntimeWarning,
            stacklevel=2,
        )
    asked = [name for name in refused if _matches(name, config.target_parameters or ())]
    if asked or (refused and not (is_shorthand(config.target_modules) and targets)):
        fields = {"target_modules": config.target_modules, "target_parameters": config.target_parameters}
        given = ", ".join(f"{field}={_shown(value)}" for field, value in fields.items() if value)
        raise ValueError(
            f"{given} matches {_count(refused, 'target')} that FLoRA cannot adapt: "
            f"{listed(f'{name} ({reason})' for name, reason in refused.items())}. "
            f"Supported kinds: {', '.join(SUPPORTED_KINDS)}, and bare parameters by target_parameters"
        )
    if config.ranks is not None:
        _check_names(config.ranks, [target.name for target in targets])
        targets = [target for target in targets if target.name in config.ranks]
    return targets


def exact_targets(targets: Iterable[Target], model: nn.Module) -> set[str]:
    """A value of `target_modules` that selects these targets' modules and no others: full names.

    `FULL_NAME` begins those that PEFT would also take for the suffix of another module's name, and those by which it
    would save a whole base embedding beside the adapter.
    """
    names = {target.module for target in targets if not target.bare}
    others = [name for name, _ in model.named_modules() if name not in names]
    suffixes = {other[place + 1 :] for other in others for place, sign in enumerate(other) if sign == "."}
    return {f"{FULL_NAME}{name}" if name in suffixes.union(EMBEDDING_LAYER_NAMES) else name for name in names}


def is_selected(config: FloraConfig, name: str) -> Any:
    """What PEFT says of whether the fields of `config` select a module; its full name selects it too."""
    found = check_target_module_exists(config, name)
    if found or isinstance(found, _ExcludedModule) or isinstance(config.target_modules, str):
        return found
    return f"{FULL_NAME}{name}" in (config.target_modules or ())


def bare_parameters(targets: Iterable[Target]) -> list[str]:
    """A value of `target_parameters` that selects those targets that it is to select."""
    return [target.name for target in targets if target.bare]


def describe(name: str, module: nn.Module) -> list[Target]:
    """The targets that a supported module has."""
    if isinstance(module, nn.MultiheadAttention):
        weights = {weight: tuple(module.get_parameter(weight).shape) for weight in attention_weights(module)}
        return [Target(f"{name}.{w}", name, w, MultiheadAttention, shape, (0, 1)) for w, shape in weights.items()]
    _, layer = adapted_kind(module)
    return [Target(name, name, "weight", layer, weight_shape(module), layer.modes_of(module))]


def describe_parameter(name: str, module_name: str, weight: str, module: nn.Module) -> Target:
    """The target that a bare parameter is. All its modes are channels."""
    layer = MultiheadAttention if isinstance(module, nn.MultiheadAttention) else FloraParameters
    shape = parameter_shape(module.get_parameter(weight))
    return Target(name, module_name, weight, layer, shape, tuple(range(len(shape))), bare=True)


def adapted_targets(model: nn.Module) -> list[Target]:
    """The targets of all adapters that the model has."""
    targets = []
    for name, layer in model.named_modules():
        if isinstance(layer, WeightLayer):
            targets += describe(name, layer.get_base_layer())
        elif isinstance(layer, FloraParameters):
            base, bare = layer.get_base_layer(), set(layer.weight_names.values())
            if isinstance(base, nn.MultiheadAttention):
                targets += [target for target in describe(name, base) if target.weight in bare]
                bare -= set(attention_weights(base))
            targets += [describe_parameter(f"{name}.{w}", name, w, base) for w in sorted(bare)]
    return targets


def adapter_tuckers(model: PeftModel, adapter_name: str | None) -> tuple[str, list[tuple[Target, Tucker]]]:
    """An adapter's name, which is the active one's for None, and its targets with their tensors.

    Raises:
        ValueError: no model of PEFT's, or no such adapter of FLoRA.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"this needs the PeftModel itself, not a {type(model).__name__}")
    name = model.active_adapter if adapter_name is None else adapter_name
    if not isinstance(model.peft_config.get(name), FloraConfig):
        raise ValueError(f"the model has no FLoRA adapter {name!r}; it has {sorted(model.peft_config)}")
    base, found = model.get_base_model(), []
    for target in adapted_targets(base):
        layer = base.get_submodule(target.module)
        if name in layer.flora_core and (tucker := layer.tuckers(name).get(target.weight)) is not None:
            found.append((target, tucker))
    return name, found


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


def own_parameters(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The full names of the modules' own parameters, each with its module's."""
    return {
        f"{name}.{parameter}": name
        for name, module in modules.items()
        for parameter, _ in module.named_parameters(recurse=False)
    }


def token_modules(model: nn.Module, config: FloraConfig) -> list[str]:
    """Names of the modules that `trainable_token_indices` trains rows of, found by the ends of names, as PEFT does."""
    indices = config.trainable_token_indices
    if indices is None:
        return []
    ends = tuple(indices) if isinstance(indices, dict) else (_get_input_embeddings_name(model, "embed_tokens"),)
    return [name for name, _ in candidates(model) if name.endswith(ends)]


def task_heads(model: nn.Module) -> list[str]:
    """Names of the heads of a transformers task model: its own children of a usual name, or timm's classifier."""
    heads = [name for name in _HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
    get_classifier = getattr(getattr(model, "timm_model", None), "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        heads += [name for name, module in model.named_modules() if module is classifier]
    return heads


def _select(model: nn.Module, config: FloraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that `target_modules` and `exclude_modules` select."""
    if not config.target_modules and config.target_parameters:
        return []
    if is_shorthand(config.target_modules, ALL_WEIGHTS):
        left_to_the_user = _is_head(model)
        chosen = {
            name
            for name, module in modules.items()
            if is_supported_kind(module) and not left_to_the_user(name) and not _in_attention(name, modules)
        }
    elif is_shorthand(config.target_modules):
        chosen = _maybe_include_all_linear_layers(replace(config), model).target_modules
        # PEFT passes over quantised layers that are no nn.Linear, such as HQQ's.
        left_to_the_user = _is_head(model)
        chosen = chosen | {n for n, m in modules.items() if quantized_as(m) == "linear" and not left_to_the_user(n)}
    else:
        chosen = None
    if chosen is not None:
        chosen = chosen - set(token_modules(model, config))
    resolved = config if chosen is None else replace(config, target_modules=chosen)
    selected = [name for name in modules if is_selected(resolved, name)]
    if not selected and config.target_modules != DUMMY_TARGET_MODULES:
        # Where everything that matches is excluded, PEFT says so itself.
        unrestricted = replace(resolved, exclude_modules=None, modules_to_save=None)
        if not any(is_selected(unrestricted, name) for name in modules):
            raise ValueError(_nothing_matches(model, config, modules))
    return selected


def _in_attention(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module is a part of an `nn.MultiheadAttention`, whose weights are adapted together."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def _select_parameters(model: nn.Module, config: FloraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Names of the bare parameters that `target_parameters` selects, and with "all-weights" the stacks of experts."""
    own = own_parameters(modules)
    asked = config.target_parameters or []
    selected = {name for name in own if _matches(name, asked)}
    for key in asked:
        if not any(_matches(name, [key]) for name in selected):
            if key in dict(model.named_parameters(recurse=False)):
                raise ValueError(
                    f"target_parameters has {key!r}, a parameter of the outermost module, which PEFT cannot wrap: put "
                    "the model into another nn.Module"
                )
            raise ValueError(f"target_parameters has {key!r}, which no module has{_closest(key, own)}")
    if is_shorthand(config.target_modules, ALL_WEIGHTS):
        left_to_the_user = _is_head(model)
        selected |= {
            f"{name}.{stack}"
            for name, module in modules.items()
            if not is_supported_kind(module) and not left_to_the_user(name)
            for stack in expert_stacks(module)
        }
    allowed = replace(config, target_modules=".*", layers_to_transform=None, layers_pattern=None)
    return [
        name
        for name, module_name in own.items()
        if name in selected
        and all(check_target_module_exists(allowed, excludable) for excludable in (name, module_name))
    ]


def _why_not_parameter(name: str, module: nn.Module, model: nn.Module, targets: list[Target]) -> str | None:
    """Why this parameter cannot be adapted, beside the targets that there are already."""
    module_name = name.rpartition(".")[0]
    for other in targets:
        if other.module == module_name and not other.bare:
            return f"its module {module_name} is adapted as a layer; for a layer's bias there is bias='flora_only'"
        if other.module.startswith(f"{module_name}."):
            return f"its module holds other targets, as {other.name}, which PEFT would not find again inside a wrapper"
        if module_name.startswith(f"{other.module}."):
            return f"its module is inside that of {other.name}, and PEFT would not find it again inside a wrapper"
    return why_not_parameter(name, module, model)


def _matches(name: str, keys: Iterable[str]) -> bool:
    """Whether the name, or the end of it after a dot, is one of the keys."""
    return any(name == key or name.endswith(f".{key}") for key in keys)


def _weight(module: nn.Module, name: str) -> Tensor | None:
    """The weight itself; None where a quantised layer keeps it under another name."""
    owner_name, _, attribute = name.rpartition(".")
    return module.get_submodule(owner_name)._parameters.get(attribute)


def _is_head(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module, by name, is or lies in one that "all-weights" leaves to the user."""
    heads = _heads(model)
    return lambda name: any(name == head or name.startswith(f"{head}.") for head in heads)


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
            f"select: {listed(missing)}{hint}"
        )


def unmatched_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of `names` that none of the known ones is, nor ends with, each with a suggestion."""
    return [
        name + _closest(name, known)
        for name in sorted(names)
        if not any(_matches(other, [name]) or name == f"{FULL_NAME}{other}" for other in known)
    ]


def _nothing_matches(model: nn.Module, config: FloraConfig, modules: dict[str, nn.Module]) -> str:
    asked = config.target_modules
    problem = f"Target modules {_shown(asked)} not found in the base model"
    if not modules:
        return f"{problem}: the {type(model).__name__} has no module inside it to adapt; wrap it in an nn.Module"
    if not any(is_supported_kind(module) for module in modules.values()):
        kinds = sorted({type(m).__name__ for m in modules.values() if not next(m.children(), None)})
        supported = ", ".join(SUPPORTED_KINDS)
        return f"{problem}: no layer of it is of a supported kind. It has: {', '.join(kinds)}. Supported: {supported}"
    if config.layers_to_transform is not None:
        restriction = f"layers_to_transform={config.layers_to_transform}, layers_pattern={config.layers_pattern}"
        return f"{problem} with {restriction}"
    if isinstance(asked, str):
        problem += ": a string is a regular expression over full names"
        if any(_matches(name, [asked]) for name in modules):
            return f"{problem}; for a name give a list: [{asked!r}]"
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


def _shown(target_modules: Iterable[str] | str | None) -> str:
    """As given, but for the most of a long list or expression, such as those of a saved adapter."""
    if target_modules is None or isinstance(target_modules, str):
        shown = repr(target_modules)
        return f"{shown[:200]}… ({len(shown) - 200} more characters)" if len(shown) > 200 else shown
    names = sorted(target_modules)
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _count(items: Iterable[object], noun: str) -> str:
    count = len(list(items))
    return f"{count} {noun}" + ("s" if count > 1 else "")


def listed(items: Iterable[str], most: int = 3) -> str:
    items = list(items)
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
