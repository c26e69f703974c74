"""Whether FLoRA can adapt a module or a parameter, and if not, why not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from florapeft.kinds import Embedding, adapted_kind, quantized_as, weight_shape
from florapeft.layer import parameter_shape, weight_of
from florapeft.parameters import attention_weights

# Methods that read weights for another purpose than computing with them.
_SETUP_METHODS = ("__init__", "_init", "init_", "tie_", "_tie", "set_", "resize", "_resize", "reset_", "load", "_load")


def is_supported_kind(module: nn.Module) -> bool:
    """Whether the module is of a kind that `target_modules` can name; see `why_not` for what else it takes."""
    return isinstance(module, nn.MultiheadAttention) or adapted_kind(module) is not None


def why_not(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why FLoRA cannot adapt this module, or None if it can."""
    if not is_supported_kind(module):
        return f"a {type(module).__name__} is not a supported kind"
    sharded = _why_not_sharded(module)
    if sharded is not None:
        return sharded
    dead = _why_no_gradient(name, model)
    if dead is not None:
        return dead
    if isinstance(module, nn.MultiheadAttention):
        if quantized_as(module.out_proj) is not None:
            return "the weight of its out_proj is quantised"
        for weight in attention_weights(module):
            if not _is_parameter(module, weight):
                return f"its {weight} is computed from other parameters (a parametrization)"
            if 0 in (shape := parameter_shape(weight_of(module, weight))):
                return f"its {weight} is empty (shape {shape})"
        return None
    quantized = quantized_as(module)
    if quantized is not None and quantized != "linear":
        return "its weight is quantised, and it is no linear layer"
    if quantized is not None and is_read(name, model):
        return "its weight is quantised, and the module around it computes with it"
    if quantized is not None:
        return None
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (a parametrization)"
    if is_lazy(module.weight):
        return "its weight is not initialised yet: run the model once before"
    if 0 in (shape := weight_shape(module)):
        return f"its weight is empty (shape {shape})"
    if not module.weight.is_floating_point() or module.weight.itemsize == 1:
        return f"its weight has dtype {module.weight.dtype}, of a quantisation that PEFT does not know"
    if adapted_kind(module)[1] is Embedding and module.max_norm is not None:
        return "max_norm rewrites the base weight in forward"
    return None


def why_not_parameter(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why FLoRA cannot adapt this parameter, which is the module's own, or None if it can."""
    module_name, _, parameter_name = name.rpartition(".")
    parameter = module._parameters[parameter_name]
    if is_lazy(parameter):
        return "it is not initialised yet: run the model once before"
    if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
        return f"it is an entry of a {type(module).__name__}, which is read without being called"
    if not parameter.is_floating_point() or quantized_as(module) is not None:
        return f"it is quantised (stored as {parameter.dtype})"
    if parameter.ndim == 0:
        return "it is a single number"
    if 0 in (shape := parameter_shape(parameter)):
        return f"it is empty (shape {shape})"
    sharded = _why_not_sharded(module)
    if sharded is not None:
        return sharded
    return _why_no_gradient(module_name, model)


def shared_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Those of the named weights that are tied: another module has them, too.

    An adapter acts where its target is called; merged, it acts wherever the weight is used.

    Args:
        model: the model that they are part of.
        weights: by the name of their layer, or by their own where no layer stands for them.

    Returns:
        `{name: the other names}`.
    """
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():  # one module in two places is one module
        for parameter_name, parameter in module.named_parameters(module_name, recurse=False):
            name = parameter_name.removesuffix(".weight").replace(".base_layer", "")
            owners.setdefault(id(parameter), []).append(name)
    others = {
        name: [other for other in owners.get(id(weight), ()) if other != name.removesuffix(".weight")]
        for name, weight in weights.items()
    }
    return {name: also for name, also in others.items() if also}


def _why_not_sharded(module: nn.Module) -> str | None:
    """Under tensor parallelism every process has a part of the weight; an adapter would have to be cut likewise."""
    plan = getattr(module, "_hf_tp_plan", None)
    for parameter in module.parameters(recurse=False):
        mesh = getattr(parameter, "device_mesh", None)
        cut = mesh is not None and "tp" in (mesh.mesh_dim_names or ("tp",))
        if plan is not None or cut or getattr(parameter, "tensor_model_parallel", False):
            return "its weight is cut over several processes (tensor parallelism), which FLoRA does not support"
    return None


def is_read(name: str, model: nn.Module) -> bool:
    """Whether the module around the one of this name computes with its weight, besides or instead of calling it.

    Fused kernels do (Mamba's and its successors', peft#2556), torch's attention, lookups in codebooks, and queries that
    are kept in an embedding. Not counted is torch's encoder layer, whose way of doing so `FloraModel` turns off.
    """
    parent_name, _, own_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    while isinstance(parent, (nn.ModuleList, nn.ModuleDict)) and parent_name:
        parent_name, _, own_name = parent_name.rpartition(".")
        parent = model.get_submodule(parent_name)
    return own_name in _weights_read(type(parent)) and not isinstance(parent, nn.TransformerEncoderLayer)


def _why_no_gradient(name: str, model: nn.Module) -> str | None:
    """Nothing learns in a module whose forward, or that of one around it, is decorated so that it has no gradient."""
    while True:
        module = type(model.get_submodule(name))
        if _runs_without_gradient(module):
            return f"{module.__name__}.forward runs without gradients"
        if not name:
            return None
        name = name.rpartition(".")[0]


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where modules that stand in several places do: `{id(module): [(parent, its name there), …]}`."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return {module: where for module, where in found.items() if len(where) > 1}


def _is_parameter(module: nn.Module, name: str) -> bool:
    owner_name, _, attribute = name.rpartition(".")
    return attribute in module.get_submodule(owner_name)._parameters


@cache
def _weights_read(parent: type[nn.Module]) -> frozenset[str]:
    """Names of the submodules (or lists of them) whose weight the methods of such a module compute with.

    From the source of the class; one without source counts as reading none.
    """
    methods = [
        method
        for cls in parent.__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith(_SETUP_METHODS)
    ]
    source = "\n".join(map(_source, methods))
    module = r"self\.(\w+)(?:\[[^\]]+\])?"
    return frozenset(
        re.findall(
            rf"(?<!isinstance\(){module}\.weight\b(?!\.(?:dtype|device|shape|size|data|requires_grad)\b)", source
        )
    )


@cache
def _runs_without_gradient(module: type[nn.Module]) -> bool:
    return re.match(r"(\s*@.*\n)*?\s*@torch\.(no_grad|inference_mode)\b", _source(module.forward)) is not None


def _source(function: Any) -> str:
    """With its decorators; empty where there is none, as for what is built in."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
