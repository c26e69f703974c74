"""Everything that a report says of an adapter, read from its folder, its run's folder and its base model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from florapeft._peft_type import FLORA
from florapeft.checkpoint import PREFIX
from florapeft.config import FloraConfig
from florapeft.layer import FloraLayer
from florapeft.report.base import Network, Slot, build_network, find_base, find_weight, unknown_slot, weight_norm
from florapeft.report.measure import Measures, measure
from florapeft.report.run import Run, read_run
from florapeft.sources import FileWeights, Weights, open_weights
from florapeft.target_ranks import from_pattern
from florapeft.targets import Target
from florapeft.train.evaluate import adapter_folder
from florapeft.tucker import Tucker, validate_tucker

WEIGHTS_FILE = "adapter_model.safetensors"

# An update's module, and its weight's name there, with dots as underscores, where no layer stands for it (else None).
Key = tuple[str, str | None]


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
        model: the name of its class, if known.
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
    model: str | None
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

    @property
    def strengths(self) -> list[float]:
        """The strengths that are known; of an adapter that nothing is known of, a zero."""
        return [value for layer in self.layers if (value := self.strength(layer)) is not None] or [0.0]

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
    network, weights, notes = _open_base(found, {_flat(key) for key in tensors}, must_read=base is not None)
    saved_names = {key.rpartition(".")[0] for key in others}
    say(f"measuring {len(tensors)} updates")
    parts: list[Layer | Other] = []
    places = _places(tensors, network, weights)
    for slot, key in places:
        if key is None:
            parts.append(Other(slot, slot.name in saved_names))
            continue
        parts.append(_layer(slot, *key, tensors[key], config))
        if weights is not None and (held := find_weight(weights, slot, network.prefix if network else "")) is not None:
            parts[-1].weight_norm = weight_norm(weights, held)
    sizes = network.sizes if network else {}
    if not sizes and weights is not None:
        sizes = {key: prod(entry.shape) for key, entry in weights.entries.items()}
    base_size = sum(size for key, size in sizes.items() if key.rpartition(".")[0] not in saved_names)
    report = Report(
        folder=folder,
        config=config,
        network=parts,
        base=name,
        model=(config.auto_mapping or {}).get("base_model_class") or (network.model if network else None),
        base_size=base_size or None,
        saved=_saved(others),
        file_size=(folder / WEIGHTS_FILE).stat().st_size,
        run=read_run(path, folder),
        is_ordered=network is not None and [slot for slot, _ in places] == network.slots,
    )
    report.notes += [*notes, *_notes(report, found, weights is not None)]
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


def read_tensors(file: Path) -> tuple[dict[Key, Tucker], dict[str, Tensor]]:
    """The updates and the other tensors of an adapter's file.

    Returns:
        Tucker tensors without their scale, by module and, for a weight that no layer stands for, its name there with
        dots as underscores (else None); and what else is saved, by key without PEFT's prefix.

    Raises:
        ValueError, OSError: missing, broken, not finite, or core and factors that do not fit each other.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; only safetensors are read")
    cores: dict[Key, Tensor] = {}
    factors: dict[Key, dict[int, Tensor]] = {}
    others: dict[str, Tensor] = {}
    saved = FileWeights(file, "adapter")
    for key in saved.entries:
        value = saved.read(key)
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
            raise ValueError(f"{file}: {_flat(key)}: {error}") from None
    if factors:
        raise ValueError(f"{file}: {_flat(next(iter(factors)))} has factors but no core")
    return tuckers, others


def _open_base(
    path: Path | None, adapted: set[str], must_read: bool
) -> tuple[Network | None, Weights | None, list[str]]:
    """The base's network and weights as far as they are here, and what to say where they are not."""
    network, weights, notes = None, None, []
    if path is None:
        return network, weights, notes
    if path.is_dir():
        try:
            network = build_network(path, adapted)
        except Exception as error:  # whatever a model's own code raises: the page does without the order of layers
            reason = " ".join(str(error).split()).rstrip(".")
            notes.append(f"The base's network cannot be built, so layers stand in the order of their names: {reason}.")
    try:
        weights = open_weights(path, "base")
    except (ValueError, OSError) as error:
        if must_read:
            raise
        notes.append(f"Updates are not compared with the base's weights: {error}.")
    return network, weights, notes


def _places(
    tensors: dict[Key, Tucker], network: Network | None, weights: Weights | None
) -> list[tuple[Slot, Key | None]]:
    """The weights to show with the key of their update: in the network's order, else in that of their names."""
    if network is not None:
        flat = {_flat(key): key for key in tensors}
        placed = [(slot, _key_of(slot, flat)) for slot in network.slots]
        keys = [key for _, key in placed if key is not None]
        if len(keys) == len(tensors) and all(key is None or slot.shape == tensors[key].shape for slot, key in placed):
            return placed
    names: dict[str, tuple[Slot, Key | None]] = {}
    for key, tucker in tensors.items():
        slot = unknown_slot(_spelled(key, weights), tucker.shape, is_bare=key[1] is not None)
        names[slot.name] = slot, key
    for place, entry in weights.entries.items() if weights is not None else ():
        name = place.removesuffix(".weight")
        if names.keys().isdisjoint((name, place)) and name != place and sum(size > 1 for size in entry.shape) >= 2:
            names[name] = unknown_slot(name, entry.shape, is_bare=False), None
    return [names[name] for name in sorted(names, key=_natural)]


def _flat(key: Key) -> str:
    return ".".join(filter(None, key))


def _spelled(key: Key, weights: Weights | None) -> str:
    """The name of an update's weight, with the dots that its key has no place for, where the base's files have it."""
    module, weight = key
    if weight is None:
        return module
    places = weights.entries if weights is not None else {}
    inside = (name.removeprefix(f"{module}.") for name in places if name.startswith(f"{module}."))
    return f"{module}.{next((name for name in inside if name.replace('.', '_') == weight), weight)}"


def _key_of(slot: Slot, flat: dict[str, Key]) -> Key | None:
    """The update of a weight: by its name, in which an adapter's key may have underscores for dots at the end."""
    if slot.name in flat:
        return flat[slot.name]
    head, _, tail = slot.name.rpartition(".")
    return flat.get(f"{head}_{tail}")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts numbers in names by their value."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _layer(slot: Slot, module: str, weight: str | None, tucker: Tucker, config: FloraConfig) -> Layer:
    target = Target(slot.name, module, weight or "weight", FloraLayer, slot.shape, channel_modes=())
    scale = float(from_pattern(config.scale_pattern, target, config.scale))
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


def _notes(report: Report, found: Path | None, has_weights: bool) -> list[str]:
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
    elif has_weights and (missing := [layer.slot.name for layer in report.layers if layer.weight_norm is None]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.append(
            f"The base has no readable weight of the same name and shape for {missing[0]}{more}: not compared there."
        )
    return notes
