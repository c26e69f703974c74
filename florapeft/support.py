"""Whether FLoRA can adapt a module or a parameter, and if not, why not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from florapeft.kinds import Embedding, adapted_kind, quantized_as
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
    bypassed = _why_bypassed(name, model)
    if bypassed is not None:
        return bypassed
    if isinstance(module, nn.MultiheadAttention):
        if quantized_as(module.out_proj) is not None:
            return "the weight of its out_proj is quantised"
        computed = [w for w in attention_weights(module) if not _is_parameter(module, w)]
        return f"its {computed[0]} is computed from other parameters (a parametrization)" if computed else None
    quantized = quantized_as(module)
    if quantized is not None:
        return None if quantized == "linear" else "its weight is quantised, and it is no linear layer"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (a parametrization)"
    if is_lazy(module.weight):
        return "its weight is not initialised yet: run the model once before"
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
    if not parameter.is_floating_point() or quantized_as(module) is not None:
        return f"it is quantised (stored as {parameter.dtype})"
    if parameter.ndim == 0:
        return "it is a single number"
    sharded = _why_not_sharded(module)
    if sharded is not None:
        return sharded
    return _why_bypassed(module_name, model)


def shared_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Those of the named weights that have other names too: tied, or one module in two places.

    An adapter acts where its target is called; merged, it acts wherever the weight is used.

    Args:
        model: the model that they are part of.
        weights: by the name of their layer, or by their own where no layer stands for them.

    Returns:
        `{name: the other names}`.
    """
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key.removesuffix(".weight").replace(".base_layer", ""))
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


def _why_bypassed(name: str, model: nn.Module) -> str | None:
    """Why an adapter around the module of this name would not act, or None."""
    parent_name, _, own_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    while isinstance(parent, (nn.ModuleList, nn.ModuleDict)) and parent_name:
        parent_name, _, own_name = parent_name.rpartition(".")
        parent = model.get_submodule(parent_name)
    read, called = _weights_read(type(parent))
    if own_name in read and own_name not in called:
        return f"{type(parent).__name__} reads its weight and never calls it"
    if own_name in read and any(isinstance(getattr(parent, other, None), nn.Conv1d) for other in read):
        return f"{type(parent).__name__} has a fast path that reads its weight and does not call it"
    return None


def _is_parameter(module: nn.Module, name: str) -> bool:
    owner_name, _, attribute = name.rpartition(".")
    return attribute in module.get_submodule(owner_name)._parameters


@cache
def _weights_read(parent: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the submodules (or lists of them) whose weight such a module's methods read, and of those they call.

    From the source of the class: fused kernels (Mamba's and its successors', peft#2556), torch's attention, queries
    kept in an embedding. A class without source counts as reading none.
    """
    methods = [
        method
        for cls in parent.__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith(_SETUP_METHODS)
    ]
    try:
        source = "\n".join(inspect.getsource(method) for method in methods)
    except (OSError, TypeError):
        return frozenset(), frozenset()
    used = (
        r"(?<!isinstance\()self\.(\w+)(?:\[[^\]]+\])?\.weight\b(?!\.(?:dtype|device|shape|size|data|requires_grad)\b)"
    )
    called = r"self\.(\w+)(?:\[[^\]]+\])?\("
    return frozenset(re.findall(used, source)), frozenset(re.findall(called, source))
