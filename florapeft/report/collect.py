"""Everything that a report says of an adapter, read from its folder, its run's folder and its base model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from florapeft._peft_type import FLORA
from florapeft.checkpoint import PREFIX
from florapeft.config import FloraConfig
from florapeft.report.base import Slot, Weights, find_base, reading, skeleton, unknown_slot
from florapeft.report.measure import Measures, measure
from florapeft.report.run import Run, read_run
from florapeft.train.evaluate import adapter_folder
from florapeft.tucker import Tucker, validate_tucker

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass
class Layer:
    """An adapted weight. `weight_norm` is ‖W‖, None where the base's weight is not at hand."""

    slot: Slot
    module: str
    rank: tuple[int, ...]
    parameters: int
    scale: float
    measures: Measures
    weight_norm: float | None = None

    @property
    def share(self) -> float:
        """Its parameters as a share of the weight's entries."""
        return self.parameters / prod(self.slot.shape)

    @property
    def relative(self) -> float | None:
        """‖dW‖ / ‖W‖."""
        return self.measures.norm / self.weight_norm if self.weight_norm else None


@dataclass
class Other:
    """A weight without an update; `is_saved` where the adapter has it in full, as it has a new head."""

    slot: Slot
    is_saved: bool


@dataclass
class Report:
    """What a page shows.

    Attributes:
        folder: of the adapter.
        config: the adapter's configuration.
        network: adapted and other weights, in the network's order where it is known, else by name.
        base: what the base model is called, if anything says so.
        base_size: entries of the base model without what the adapter saves in full; None where it is not at hand.
        saved: entries of what the adapter holds besides its updates, by what that is.
        is_ordered: whether that order is known.
        file_size: of the adapter's weights, in bytes.
        run: what the folder of the training run holds.
        notes: what a reader has to know to read the numbers right.
    """

    folder: Path
    config: FloraConfig
    network: list[Layer | Other]
    base: str | None
    base_size: int | None
    saved: dict[str, int]
    file_size: int
    run: Run
    is_ordered: bool
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[Layer]:
        return [part for part in self.network if isinstance(part, Layer)]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def is_relative(self) -> bool:
        """Whether updates can be compared with their weights."""
        return any(layer.relative is not None for layer in self.layers)

    def strength(self, layer: Layer) -> float | None:
        """What the map is coloured by: ‖dW‖ / ‖W‖ if the base is at hand, else ‖dW‖."""
        return layer.relative if self.is_relative else layer.measures.norm


def collect(path: Path, *, base: str | None = None, say: Callable[[str], None] = lambda text: None) -> Report:
    """Reads and measures an adapter.

    Args:
        path: an adapter folder, or the output folder of a run.
        base: folder, safetensors file or hub id of the base model; by default the one the adapter names, if it is on
            this machine.
        say: called with a line at each stage.

    Raises:
        ValueError, OSError: no adapter, one of another method, a file that is broken or does not fit; one line each.
    """
    folder = adapter_folder(path)
    config = read_config(folder)
    tensors, others = read_tensors(folder / WEIGHTS_FILE)
    name = base or config.base_model_name_or_path
    found = find_base(name, ask_hub=base is not None) if name else None
    if base is not None and found is None:
        raise FileNotFoundError(f"base model not found: {base}; a folder, a safetensors file or a hub id is needed")
    bare = {f"{module}.{weight}" for module, weight in tensors if weight is not None}
    built = skeleton(found, config, bare, say) if found is not None and found.is_dir() else None
    weights = Weights(found) if found is not None else None
    saved_names = {key.rpartition(".")[0] for key in others}
    network = _network(tensors, built[0] if built else None, weights, saved_names)
    say(f"measuring {len(tensors)} updates")
    parts: list[Layer | Other] = []
    for slot, key in network:
        if key is None:
            parts.append(Other(slot, slot.name in saved_names))
            continue
        parts.append(_layer(slot, *key, tensors[key], config))
        if weights is not None and (place := weights.find(slot.name, slot.shape)) is not None:
            parts[-1].weight_norm = weights.norm(place)
    sizes = built[1] if built else {key: prod(shape) for key, (_, shape) in weights.places.items()} if weights else {}
    base_size = sum(size for key, size in sizes.items() if key.rpartition(".")[0] not in saved_names)
    report = Report(
        folder=folder,
        config=config,
        network=parts,
        base=name,
        base_size=base_size or None,
        saved=_saved(others),
        file_size=(folder / WEIGHTS_FILE).stat().st_size,
        run=read_run(path, folder),
        is_ordered=built is not None and [slot for slot, _ in network] == built[0],
    )
    report.notes += _notes(report, found)
    return report


def read_config(folder: Path) -> FloraConfig:
    """The configuration of a FLoRA adapter.

    Raises:
        ValueError: not JSON, of another method, or not one that this release can read.
    """
    file = folder / "adapter_config.json"
    try:
        method = json.loads(file.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"cannot read {file}: {type(error).__name__}: {error}") from None
    if method != FLORA.value:
        raise ValueError(f"{folder} holds an adapter of the method {method}; a FLoRA adapter is needed")
    try:
        return FloraConfig.from_pretrained(str(folder))
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from None


def read_tensors(file: Path) -> tuple[dict[tuple[str, str | None], Tucker], dict[str, Tensor]]:
    """The updates and the other tensors of an adapter's file.

    Returns:
        Tucker tensors without their scale, by module and, for a weight that no layer stands for, its name there with
        dots as underscores (else None); and what else is saved, by key without PEFT's prefix.

    Raises:
        ValueError, OSError: missing, broken, not finite, or core and factors that do not fit each other.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; only safetensors are read")
    cores: dict[tuple[str, str | None], Tensor] = {}
    factors: dict[tuple[str, str | None], dict[int, Tensor]] = {}
    others: dict[str, Tensor] = {}
    with reading(file) as handle:
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            value = handle.get_tensor(key)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"{file}: {key} has values that are not finite")
            name = key.removeprefix(PREFIX)
            if match := re.fullmatch(r"(.+)\.flora_core\.(?:([^.]+)\.)?weight", name):
                cores[match[1], match[2]] = value
            elif match := re.fullmatch(r"(.+)\.flora_factors\.(?:([^.]+)\.)?(\d+)\.weight", name):
                factors.setdefault((match[1], match[2]), {})[int(match[3])] = value
            else:
                others[name] = value
    if not cores:
        raise ValueError(f"{file} holds no update of FLoRA's")
    tuckers = {}
    for key, core in cores.items():
        own = factors.pop(key, {})
        modes = max(core.ndim, max(own, default=-1) + 1)
        try:
            tuckers[key] = validate_tucker(core, [own.get(mode) for mode in range(modes)])
        except ValueError as error:
            raise ValueError(f"{file}: {'.'.join(filter(None, key))}: {error}") from None
    if factors:
        raise ValueError(f"{file}: {'.'.join(filter(None, next(iter(factors))))} has factors but no core")
    return tuckers, others


def _network(
    tensors: dict[tuple[str, str | None], Tucker],
    skeleton_slots: list[Slot] | None,
    weights: Weights | None,
    saved: set[str],
) -> list[tuple[Slot, tuple[str, str | None] | None]]:
    """The weights to show with the key of their update: in the network's order, else in that of their names."""
    flat = {".".join(filter(None, key)): key for key in tensors}
    adapted = {
        key: unknown_slot(_spelled(key, weights), tensors[key].shape, is_bare=key[1] is not None)
        for key in flat.values()
    }
    if skeleton_slots is not None:
        placed = [(slot, _key_of(slot, flat)) for slot in skeleton_slots]
        if all(key is None or slot.shape == tensors[key].shape for slot, key in placed) and (
            len([key for _, key in placed if key is not None]) == len(adapted)
        ):
            return placed
    names = {slot.name: (slot, key) for key, slot in adapted.items()}
    if weights is not None:
        taken = {weights.find(slot.name, slot.shape) for slot in adapted.values()}
        for place, (_, shape) in weights.places.items():
            name = place.removesuffix(".weight")
            if place not in taken and name != place and sum(size > 1 for size in shape) >= 2:
                names.setdefault(name, (unknown_slot(name, shape, is_bare=False), None))
    return [names[name] for name in sorted(names, key=_natural)]


def _spelled(key: tuple[str, str | None], weights: Weights | None) -> str:
    """The name of an update's weight, with the dots that its key has no place for, where the base's files have it."""
    module, weight = key
    if weight is None:
        return module
    places = weights.places if weights is not None else {}
    inside = (name.removeprefix(f"{module}.") for name in places if name.startswith(f"{module}."))
    return f"{module}.{next((name for name in inside if name.replace('.', '_') == weight), weight)}"


def _key_of(slot: Slot, flat: dict[str, tuple[str, str | None]]) -> tuple[str, str | None] | None:
    """The update of a weight: by its name, in which an adapter's key may have underscores for dots at the end."""
    if slot.name in flat:
        return flat[slot.name]
    head, _, tail = slot.name.rpartition(".")
    return flat.get(f"{head}_{tail}")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts numbers in names by their value."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _layer(slot: Slot, module: str, weight: str | None, tucker: Tucker, config: FloraConfig) -> Layer:
    pattern = config.scale_pattern
    keys = [get_pattern_key(pattern.keys(), name) for name in (slot.name, module)]
    scale = float(next((pattern[key] for key in keys if key in pattern), config.scale))
    core, factors = tucker.core.double(), list(tucker.factors)
    if slot.padding is not None:  # as the layer has it
        if factors[0] is None:
            core = core.clone()
            core[slot.padding] = 0
        else:
            factors[0] = factors[0].clone()
            factors[0][slot.padding] = 0
    scaled = Tucker(core * scale, tuple(factors))
    measures = measure(scaled, has_kernel=slot.has_kernel, output_mode=slot.output_mode)
    return Layer(slot, module, tucker.rank, tucker.parameters, scale, measures)


def _saved(others: dict[str, Tensor]) -> dict[str, int]:
    """Entries of what is saved besides the updates, by what it is."""
    counts: dict[str, int] = {}
    for key, value in others.items():
        if ".flora_statistics." in key:
            kind = "batch norm statistics"
        elif key.endswith(".base_layer.bias"):
            kind = "biases"
        else:
            kind = key.rpartition(".")[0].rpartition(".")[2] or key
        counts[kind] = counts.get(kind, 0) + value.numel()
    return counts


def _notes(report: Report, found: Path | None) -> list[str]:
    notes = []
    if not any(layer.measures.norm for layer in report.layers):
        notes.append("Every update is zero: this adapter has not been trained.")
    if found is None:
        called = (
            f"The base model ({report.base})" if report.base else "The base model, which the adapter does not name,"
        )
        notes.append(
            f"{called} is not on this machine: updates are not compared with their weights. Name it with --base."
        )
    elif missing := [layer.slot.name for layer in report.layers if layer.weight_norm is None]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.append(
            f"The base has no readable weight of the same name and shape for {missing[0]}{more}: not compared there."
        )
    return notes
