"""Whether FLoRA can adapt a module, and if not, why not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from functools import cache

from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.parameter import is_lazy

from florapeft.layer import Embedding, adapted_kind

# Methods that read weights for another purpose than computing with them.
_SETUP_METHODS = ("__init__", "_init", "init_", "tie_", "_tie", "set_", "resize", "_resize", "reset_", "load", "_load")


def why_not(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why FLoRA cannot adapt this module, or None if it can."""
    found = adapted_kind(module)
    if found is None:
        return f"a {type(module).__name__} is not a supported kind"
    if resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None) is not None:
        return "its weight is quantised"
    kind, layer = found
    parent_name, _, own_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    read, called = _weights_read(type(parent))
    if own_name in read and own_name not in called:
        return f"{type(parent).__name__} reads its weight and never calls it"
    if own_name in read and any(isinstance(getattr(parent, other, None), nn.Conv1d) for other in read):
        return f"{type(parent).__name__} has a fast path that reads its weight and does not call it"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (a parametrization)"
    if is_lazy(module.weight):
        return "its weight is not initialised yet: run the model once before"
    if layer is Embedding and module.max_norm is not None:
        return "max_norm rewrites the base weight in forward"
    scaled = layer is Embedding and hasattr(module, "embed_scale")
    inherited = all(
        getattr(type(module), method, None) is getattr(kind, method, None) for method in ("forward", "_conv_forward")
    )
    if not inherited and not scaled:
        return f"its class {type(module).__name__} has a forward of its own"
    return None


def shared_weights(model: nn.Module, modules: dict[str, nn.Module], names: Iterable[str]) -> dict[str, list[str]]:
    """Those of the named modules whose weight has other names too: tied, or one module in two places.

    An adapter acts where its target is called; merged, it acts wherever the weight is used.

    Returns:
        `{name: the other names}`.
    """
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key.removesuffix(".weight").removesuffix(".base_layer"))
    others = {name: [other for other in owners[id(modules[name].weight)] if other != name] for name in names}
    return {name: also for name, also in others.items() if also}


@cache
def _weights_read(parent: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the submodules whose weight the methods of such a module read, and of those that they call.

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
    used = r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|data|requires_grad)\b)"
    return frozenset(re.findall(used, source)), frozenset(re.findall(r"self\.(\w+)\(", source))
