"""Where the weights of a model come from: a module, or safetensors on disk, which are read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from florapeft.kinds import quantized_as

Source = nn.Module | str | PathLike

_FLOATING = ("F64", "F32", "F16", "BF16")
_ADAPTER_FILE = "adapter_model.safetensors"


class Entry(NamedTuple):
    """What is known of a tensor before it is read; `is_floating` is false for the codes of a quantisation too."""

    shape: tuple[int, ...]
    is_floating: bool


class Weights(Protocol):
    """The tensors of a model by name, as in its state dict.

    Attributes:
        entries: what there is.
        label: how messages call it.
    """

    entries: dict[str, Entry]
    label: str

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        """The tensor, on the device (None: where it is); not to be written to."""


class ModuleWeights:
    """The tensors of a module, not copied."""

    def __init__(self, module: nn.Module, label: str) -> None:
        self.label = label
        self._state = module.state_dict()
        self.entries = {
            name: Entry(tuple(tensor.shape), tensor.is_floating_point() and tensor.itemsize > 1)
            for name, tensor in self._state.items()
        }

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        return self._state[name].to(device)


class FileWeights:
    """The tensors of safetensors files: a folder with one of them, or with several and their index, or one file.

    A file is open only while a tensor is read, so that what is mapped into memory is given back.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.label = f"{label} ({path})"
        self._files: dict[str, Path] = {}
        self.entries: dict[str, Entry] = {}
        files, index = _files(path)
        for file in files:
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 -- an opened file is no mapping
                    if index is None or index.get(name) == file.name:
                        tensor = opened.get_slice(name)
                        self.entries[name] = Entry(tuple(tensor.get_shape()), tensor.get_dtype() in _FLOATING)
                        self._files[name] = file
        if index is not None and (missing := sorted(index.keys() - self.entries.keys())):
            raise ValueError(f"{path}: the index places {missing[0]} in {index[missing[0]]}, which does not have it")

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        with _opened(self._files[name]) as opened:
            return opened.get_tensor(name).to(device, copy=True)


def open_weights(source: Source, label: str) -> Weights:
    """The weights of a module, or of a folder or file of safetensors.

    Args:
        source: where they are.
        label: how messages call it, "base" or "tuned".

    Raises:
        ValueError, OSError, TypeError: no such folder, none of safetensors in it, a part that cannot be read; a module
            that is quantised, or that has adapters.
    """
    if isinstance(source, nn.Module):
        for name, module in source.named_modules():
            if isinstance(module, BaseTunerLayer):
                raise ValueError(f"{label} has an adapter on {name}: merge it (merge_and_unload) or unload it first")
            if quantized_as(module) is not None:
                raise ValueError(f"{label} is quantised, as in {name}: an update needs the weights themselves")
        return ModuleWeights(source, label)
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"{label} must be a module, or a folder of safetensors, got {type(source).__name__}")
    return FileWeights(Path(source).expanduser(), label)


def module_from_config(folder: Path) -> nn.Module:
    """The model that a folder of transformers' describes, on the meta device: structure without weights.

    Only a class name is taken from the folder, and only transformers is searched for it.

    Raises:
        ValueError: no config.json, one that transformers cannot use, or that of a quantised model.
    """
    import transformers  # PEFT's own dependency; needed for folders alone

    given = read_config(folder)
    if given is None:
        raise ValueError(f"{folder} has no config.json to make the model from: give a module in its place")
    if given.get("quantization_config"):
        raise ValueError(f"{folder} is quantised (by its config.json): an update needs the weights themselves")
    architecture = (given.get("architectures") or [""])[0]
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which is no transformers' model"
        )
    try:
        config = cls.config_class.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot make {architecture} from {folder}: {' '.join(str(error).split())}") from error
    model.tie_weights()
    return model


def read_config(folder: Path) -> dict[str, Any] | None:
    """What a model folder's config.json says, None if there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    return _read_json(path)


def find(weights: Weights, aliases: Iterable[str], prefix: str) -> str | None:
    """The name under which a tensor stands in `weights`, or None.

    Args:
        weights: where to look.
        aliases: the names that the tensor has in the model; several if it is tied.
        prefix: what a transformers model with a head puts before the names of the model without, or nothing.
    """
    for name in aliases:
        other = name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
        for candidate in (name, other) if prefix else (name,):
            if candidate in weights.entries:
                return candidate
    return None


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold a checkpoint's tensors, and of a sharded one which file has which."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path], None
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor a .safetensors file")
    if (path / _ADAPTER_FILE).is_file():
        raise ValueError(f"{path} is an adapter, not a model: merge it into its base first (flora merge)")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        index = _read_json(indices[0]).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{indices[0]} has no weight_map of names of files")
        files = sorted(set(index.values()))
        for name in files:
            if Path(name).name != name or not (path / name).is_file():
                raise FileNotFoundError(f"{indices[0]} names {name}, which is no file of {path}")
        return [path / name for name in files], index
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1 or indices:
        found = f"{len(files)} safetensors files and {len(indices)} indices" if files else "no safetensors"
        hint = "; only safetensors are read" if any(path.glob("*.bin")) else ""
        raise ValueError(f"{path} has {found}; one file, or several and their index, are needed{hint}")
    return files, None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: a JSON object is needed")
    return content
