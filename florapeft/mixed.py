"""Mixed batches: another adapter for each sample, by the argument `adapter_names` of a PeftModel's forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import islice
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from florapeft.kinds import WeightLayer
from florapeft.layer import FloraWrapper, check_samples, in_order, samples_of
from florapeft.updated import standing_in

_NO_ADAPTER = "__base__"  # PEFT's name for it

# Embeddings of the distances between positions, which are looked up once for all samples.
_RELATIVE = re.compile(r"relative|distance|\brel_|_bias$")


@contextmanager
def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str] | None, arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """While the context lasts, every adapted layer gets `adapter_names` with its input.

    Args:
        model: the model with adapters.
        adapter_names: one name per sample, "__base__" for none; None does nothing.
        arguments: of the model's forward or `generate`, which repeats every sample for beams, but not in an encoder.

    Raises:
        ValueError: the model is in train mode, an adapter is merged, there is no adapter of such a name, or the number
            of names is not that of the samples; this last where the model runs, within the context.
        TypeError: `adapter_names` is not a list or tuple of names.
        NotImplementedError: an adapted layer's samples are not on its first axis.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list of one name per sample, got {adapter_names!r}")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (FloraWrapper, AuxiliaryTrainingWrapper))}
    tuners = {name: layer for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    known = {_NO_ADAPTER}.union(*(layer._get_available_adapters() for layer in tuners.values()))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if any(layer.merged for layer in tuners.values()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    _check_axes(model, [n for n, m in tuners.items() if m._get_available_adapters() & set(adapter_names)])

    copies = _copies(arguments or {})
    repeated = [name for name in adapter_names for _ in range(copies)]
    in_encoder = {id(module) for module in _encoder_modules(model)} if copies > 1 else set()
    names = {layer: list(adapter_names) if id(layer) in in_encoder else repeated for layer in layers.values()}
    handles = [
        layer.register_forward_pre_hook(partial(_pass, adapter_names=own), with_kwargs=True)
        for layer, own in names.items()
        if isinstance(layer, FloraWrapper)
    ]
    others = [(m, "forward", partial(_forward, m, own)) for m, own in names.items() if not isinstance(m, FloraWrapper)]
    # What torch makes of padded samples is no batch that could be cut.
    others += [(m, "use_nested_tensor", False) for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    if not _has_samples_second(model):
        entries = [model, *islice(_encoder_modules(model), 1)]  # `generate` calls the encoder by itself
        others += [(m, "forward", _not_of_one_sample(m.forward, adapter_names)) for m in entries]
    try:
        with standing_in(others):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _check_axes(model: nn.Module, adapted: Sequence[str]) -> None:
    """Raise for layers that are known to have no samples on their first axis, where their number fits by chance."""
    for name in adapted:
        layer, (parent_name, _, own_name) = model.get_submodule(name), name.rpartition(".")
        if isinstance(layer, WeightLayer) and layer.is_read:
            raise NotImplementedError(
                f"`adapter_names` and an adapted {name}, whose weight the module around it reads: one weight cannot "
                "serve several adapters"
            )
        if isinstance(layer.get_base_layer(), nn.Embedding) and _RELATIVE.search(own_name):
            raise NotImplementedError(
                f"`adapter_names` and an adapted {name}: what it looks up is the same for all samples of a batch"
            )
        parent = model.get_submodule(parent_name)
        block = isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if block and isinstance(layer, WeightLayer) and not parent.self_attn.batch_first:
            raise NotImplementedError(
                f"`adapter_names` and an adapted {name}: its block, without batch_first, has samples on the second axis"
            )


def _has_samples_second(model: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())


def _not_of_one_sample(forward: Callable[..., Any], adapter_names: Sequence[str]) -> Callable[..., Any]:
    """A model's forward that takes no single sample for several adapters, as in PEFT's other methods.

    Layers inside do: what is the same for all samples, such as positions, is computed once.
    """

    @wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0]
        if given and all(value.size(0) == 1 for value in given):
            check_samples(given[0], adapter_names)
        return forward(*args, **kwargs)

    return checked


def _pass(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _forward(module: AuxiliaryTrainingWrapper, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a module that is trained in full, or by some of its rows, with each sample's own version of it.

    PEFT's does so for few classes of modules, and not where the active adapter has no version.
    """
    count, given = len(adapter_names), [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not any(_has_samples(value, count) for value in given):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {count} for "
            f"{type(module.original_module).__name__} with inputs of shapes {[tuple(value.shape) for value in given]}"
        )
    own = set() if module.disable_adapters else module._adapters
    outputs, samples = [], samples_of([name if name in own else _NO_ADAPTER for name in adapter_names])
    for name, rows in samples.items():
        part = [value[rows] if _has_samples(value, count) else value for value in args]
        named = {key: value[rows] if _has_samples(value, count) else value for key, value in kwargs.items()}
        if name == _NO_ADAPTER:
            outputs.append(module.original_module(*part, **named))
        elif isinstance(module, ModulesToSaveWrapper):
            outputs.append(module.modules_to_save[name](*part, **named))
        else:
            outputs.append(module._forward_wrapped_mixed_batch(*part, active_adapter=name, **named))
    if not all(isinstance(output, Tensor) for output in outputs):
        kind = type(module.original_module).__name__
        raise NotImplementedError(f"`adapter_names` and a {kind} in modules_to_save, whose output is no tensor")
    return in_order(outputs, samples)


def _has_samples(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


def _copies(arguments: Mapping[str, Any]) -> int:
    """How often transformers' `generate` repeats each sample."""
    config = arguments.get("generation_config")
    values = [arguments.get(n, getattr(config, n, None)) for n in ("num_beams", "num_return_sequences")]
    return max([1, *(value for value in values if isinstance(value, int))])


def _encoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a transformers encoder-decoder's encoder, itself first; of other models nothing."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    # transformers 5 answers with the model itself where there is no encoder.
    return iter(()) if encoder is None or encoder is model else encoder.modules()
