"""Mixed batches: another adapter for each sample, by the argument `adapter_names` of a PeftModel's forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from florapeft.layer import FloraWrapper

_NO_ADAPTER = "__base__"  # PEFT's name for it


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str] | None, num_beams: Any = None) -> Iterator[None]:
    """While the context lasts, every adapted layer gets `adapter_names` with its input.

    Args:
        model: the model with adapters.
        adapter_names: one name per sample, "__base__" for none; None does nothing.
        num_beams: of a beam search, which repeats every sample, but not in an encoder.

    Raises:
        ValueError: the model is in train mode, or there is no adapter of such a name.
        TypeError: `adapter_names` is not a list or tuple.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"adapter_names must be a list of one name per sample, got {adapter_names!r}")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [m for m in model.modules() if isinstance(m, (FloraWrapper, AuxiliaryTrainingWrapper))]
    known = {_NO_ADAPTER}.union(*(m._get_available_adapters() for m in layers if isinstance(m, BaseTunerLayer)))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    beams = num_beams if isinstance(num_beams, int) else 1
    repeated = [name for name in adapter_names for _ in range(beams)]
    in_encoder = {id(module) for module in _encoder_modules(model)} if beams > 1 else set()
    handles = [
        layer.register_forward_pre_hook(
            partial(_pass, adapter_names=list(adapter_names) if id(layer) in in_encoder else repeated),
            with_kwargs=True,
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a transformers encoder-decoder's encoder; of other models nothing."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    # transformers 5 answers with the model itself where there is no encoder.
    return iter(()) if encoder is None or encoder is model else encoder.modules()
