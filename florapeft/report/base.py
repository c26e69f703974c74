"""The base model of an adapter as its files show it: which weights there are, in which order, and how large."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from florapeft.kinds import Conv, ConvTranspose, Embedding, Linear, adapted_kind
from florapeft.sources import Weights, find
from florapeft.train.model import load_skeleton

_CHUNK = 2**22  # entries that are summed at a time
_CHANNELS = {Linear: ("out", "in"), Conv: ("out", "in"), ConvTranspose: ("in", "out"), Embedding: ("num", "dim")}
_KERNEL = {1: ("tap",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class Slot(NamedTuple):
    """A weight of the network that FLoRA could adapt, or adapts.

    Attributes:
        name: of its layer; of the weight itself where no layer stands for it.
        kind: in words.
        modes: a name for each mode.
        shape: its shape.
        has_kernel: whether modes 2 and up are a convolution's kernel.
        output_mode: a convolution's output mode, if known.
        padding: the row of an embedding whose update is zero.
    """

    name: str
    kind: str
    modes: tuple[str, ...]
    shape: tuple[int, ...]
    has_kernel: bool = False
    output_mode: int | None = None
    padding: int | None = None


def unknown_slot(name: str, shape: tuple[int, ...], is_bare: bool) -> Slot:
    """What the shape alone tells of an adapted weight; layers of order 3 and up are convolutions, bare ones stacks."""
    order = len(shape)
    modes = tuple(f"mode {mode}" for mode in range(order))
    if order == 1:
        return Slot(name, "vector", ("entry",), shape)
    if order == 2:
        return Slot(name, "matrix", modes, shape)
    if is_bare:
        return Slot(name, f"stack of order {order}", modes, shape)
    return Slot(name, f"conv {order - 2}-D", modes[:2] + _kernel_modes(order - 2), shape, has_kernel=True)


def find_base(name: str, *, ask_hub: bool) -> Path | None:
    """The folder, or the one safetensors file, of a base model; None where it is not on this machine.

    Args:
        name: a folder, a safetensors file, or a hub id, which is looked up in the cache.
        ask_hub: download a hub id that is not in the cache.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    import huggingface_hub

    files = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, local_files_only=not ask_hub))
    except (OSError, ValueError):  # not cached, no such id, no network
        return None


class Network(NamedTuple):
    """A base model without its weights.

    Attributes:
        model: the name of its class.
        slots: its weights that FLoRA could adapt, or adapts, in order.
        sizes: the entries of every parameter, by name.
        prefix: what its names have in front that those of the model without a head lack.
    """

    model: str
    slots: list[Slot]
    sizes: dict[str, int]
    prefix: str


def build_network(path: Path, adapted: set[str]) -> Network:
    """The base model as its config describes it, with the names that an adapter has for its weights.

    An adapter of a model with a head calls the weights `bert.encoder…` that the model without one calls `encoder…`.

    Args:
        path: the base model's folder.
        adapted: names of the adapted layers, and of the adapted weights that no layer stands for, in which dots below
            the adapted module are underscores.

    Raises:
        Exception: whatever transformers and the model's own code raise.
    """
    model = load_skeleton(str(path))
    prefix = model.base_model_prefix
    flat = {flat_name(name, model) for name, _ in model.named_parameters()}
    known = flat | {name for name, _ in model.named_modules()}
    changes = [("", ""), (f"{prefix}.", ""), ("", f"{prefix}.")] if prefix else [("", "")]
    cut, added = max(changes, key=lambda change: len({_renamed(name, *change) for name in known} & adapted))
    bare = {name for name in flat if _renamed(name, cut, added) in adapted}
    return Network(
        type(model).__name__,
        [slot._replace(name=_renamed(slot.name, cut, added)) for slot in slots(model, bare)],
        {_renamed(name, cut, added): parameter.numel() for name, parameter in model.named_parameters()},
        prefix,
    )


def _renamed(name: str, cut: str, added: str) -> str:
    return added + name.removeprefix(cut)


def find_weight(weights: Weights, slot: Slot, prefix: str) -> str | None:
    """Under which name a file holds a weight; None where there is none of this shape and of numbers."""
    name = find(weights, (slot.name, f"{slot.name}.weight"), prefix)
    if name is None or not weights.entries[name].is_floating or weights.entries[name].shape != slot.shape:
        return None
    return name


def weight_norm(weights: Weights, name: str) -> float | None:
    """Frobenius norm of a tensor, which is read alone and summed in pieces; None where it is not finite."""
    total = sum(piece.double().square().sum() for piece in weights.read(name).flatten().split(_CHUNK))
    return total.sqrt().item() if torch.isfinite(total) else None


def slots(model: nn.Module, bare: set[str]) -> Iterator[Slot]:
    """Every weight of `model` that FLoRA could adapt, in order; vectors, flat ones too, only those in `bare`."""
    for name, parameter in model.named_parameters():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        shape = tuple(parameter.shape)
        if flat_name(name, model) in bare:
            yield unknown_slot(name, shape, is_bare=True)
        elif attribute == "weight" and adapted_kind(owner) is not None:
            yield layer_slot(owner_name, owner)
        elif sum(size > 1 for size in shape) >= 2:
            yield unknown_slot(name, shape, is_bare=True)


def flat_name(name: str, model: nn.Module) -> str:
    """The name of a weight as an adapter's keys have it, whose part below the adapted module has no dots."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.MultiheadAttention):
            return ".".join([*parts[:depth], "_".join(parts[depth:])])
    return name


def layer_slot(name: str, module: nn.Module) -> Slot:
    """The slot of a supported layer."""
    _, adapter = adapted_kind(module)
    shape = tuple(module.weight.shape)
    _, output_mode = adapter.modes_of(module)
    channels = _CHANNELS[adapter]
    if adapter is Linear:
        return Slot(name, "linear", channels if output_mode == 0 else channels[::-1], shape)
    if adapter is Embedding:
        return Slot(name, "embedding", channels, shape, padding=module.padding_idx)
    dimensions = len(shape) - 2
    grouping = "" if module.groups == 1 else "depthwise " if module.groups == module.in_channels else "grouped "
    kind = f"{grouping}{'transposed ' if adapter is ConvTranspose else ''}conv {dimensions}-D"
    return Slot(name, kind, channels + _kernel_modes(dimensions), shape, has_kernel=True, output_mode=output_mode)


def _kernel_modes(dimensions: int) -> tuple[str, ...]:
    return _KERNEL.get(dimensions, tuple(f"axis {axis}" for axis in range(dimensions)))
