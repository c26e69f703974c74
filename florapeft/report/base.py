"""The base model of an adapter as its files show it: which weights there are, in which order, and how large."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft.config import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from florapeft.kinds import Conv, ConvTranspose, Embedding, Linear, adapted_kind

_CHUNK = 2**24  # entries that are read at a time
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


class Weights:
    """The tensors of a folder's safetensors files, or of one file, read piece by piece."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        self.places: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for file in files:
            if file.name != "adapter_model.safetensors":
                with reading(file) as tensors:
                    for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                        self.places[key] = file, tuple(tensors.get_slice(key).get_shape())

    def find(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The key of a weight, where one model is saved inside the other too; None where none or several fit."""
        for key in (name, f"{name}.weight"):
            if key in self.places:
                return key if self.places[key][1] == shape else None
        wanted = (f".{name}", f".{name}.weight")
        found = [
            key
            for key, (_, found) in self.places.items()
            if found == shape and (f".{key}".endswith(wanted) or any(w.endswith(f".{key}") for w in wanted))
        ]
        return found[0] if len(found) == 1 else None

    def norm(self, key: str) -> float | None:
        """Frobenius norm of a tensor; None where it is stored packed or has values that are not finite."""
        file, shape = self.places[key]
        total = torch.zeros((), dtype=torch.float64)
        with reading(file) as tensors:
            rows = tensors.get_slice(key)
            step = max(1, _CHUNK // max(1, torch.Size(shape[1:]).numel()))
            for start in range(0, shape[0] if shape else 0, step):
                piece = rows[start : start + step]
                if not piece.is_floating_point():
                    return None
                total += piece.float().square().sum(dtype=torch.float64)
        return total.sqrt().item() if torch.isfinite(total) else None


class reading:  # noqa: N801 - used like a function
    """`with reading(file) as tensors`: safetensors' handle; what cannot be read is one line that names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> safe_open:
        try:
            self.handle = safe_open(self.file, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {self.file}: {error}") from None
        return self.handle.__enter__()

    def __exit__(self, *exception: object) -> None:
        self.handle.__exit__(*exception)


def skeleton(
    path: Path, config: PeftConfig, bare: set[str], say: Callable[[str], None]
) -> tuple[list[Slot], dict[str, int]] | None:
    """The weights of the base model in the network's order, from its configuration alone.

    Args:
        path: the base model's folder.
        config: the adapter's configuration, which names the model's class.
        bare: names of adapted weights that no layer stands for; with dots as underscores after the module's name.
        say: called with the reason where the network cannot be built.

    Returns:
        The slots, and the number of entries of every parameter by name; None where transformers cannot build it.
    """
    import transformers

    try:
        model_config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        wanted = (
            (config.auto_mapping or {}).get("base_model_class"),
            *(getattr(model_config, "architectures", ()) or ()),
        )
        classes = [getattr(transformers, name, None) for name in wanted if name]
        found = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)]
        if not found:
            return None
        with torch.device("meta"):
            model = found[0](model_config)
    except Exception as error:  # whatever a model's own code raises: the page does without its order of layers
        say(f"the network of {path} cannot be built, so layers stand in the order of their names: {error}")
        return None
    return list(slots(model, bare)), {name: parameter.numel() for name, parameter in model.named_parameters()}


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
