"""Two models side by side: whether they are of one architecture, and what changed from one to the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from florapeft.extracted import Lost
from florapeft.sources import Weights, find
from florapeft.targets import Target

# Called with what is being done ("reading", "measuring", "fitting"), how many weights are done, and of how many.
Progress = Callable[[str, int, int], None]


class Survey(NamedTuple):
    """What reading everything once has told.

    Attributes:
        places: for every tensor of the model its names in base and tuned; None where it is missing.
        norms: of the change of every target, by the target's name.
        relative: the same, relative to the base's weight.
        fingerprints: of the same changes, signed; other changes of the same norm have others.
        lost: what changed and is not kept.
    """

    places: dict[str, tuple[str | None, str | None]]
    norms: dict[str, float]
    relative: dict[str, float | None]
    fingerprints: dict[str, float]
    lost: list[Lost]

    def as_lost(self, target: Target) -> Lost:
        return Lost(f"{target.module}.{target.weight}", self.norms[target.name], self.relative[target.name])


def read_all(
    model: nn.Module,
    targets: list[Target],
    kept: dict[str, str],
    weights: dict[str, Weights],
    device: torch.device | None,
    progress: Progress,
) -> Survey:
    """Read and check every tensor of both models, one at a time.

    Raises:
        ValueError: a tensor is missing, of another shape, quantised, or not finite; or tied in one model alone.
    """
    of_target = {f"{target.module}.{target.weight}": target for target in targets}
    groups = tied_names(model)
    places = _places(groups, set(kept.values()), weights, getattr(model, "base_model_prefix", ""))
    survey = Survey(places, {}, {}, {}, [])
    for count, (name, aliases) in enumerate(groups.items()):
        progress("reading", count, len(groups))
        target = next((of_target[alias] for alias in aliases if alias in of_target), None)
        is_kept = any(alias in kept.values() for alias in aliases)
        places.update(dict.fromkeys(aliases, places[name]))
        before, after = (
            None if place is None else _read(weights[side], place, device)
            for side, place in zip(("base", "tuned"), places[name], strict=True)
        )
        if after is not None:
            for alias in aliases[1:]:
                if alias in weights["tuned"].entries and not torch.equal(_read(weights["tuned"], alias, device), after):
                    raise ValueError(f"{name} and {alias} are one tied weight in base, but differ in tuned")
        if before is None or after is None or (is_kept and target is None):
            continue
        if not before.is_floating_point():
            if norm := (after.to(before.device, torch.float64) - before.double()).norm().item():
                survey.lost.append(Lost(name, norm, None))
            continue
        change = difference(before, after)
        norm, size = change.norm().item(), before.float().norm().item()
        relative = norm / size if size > 0 else None
        if target is not None:
            survey.fingerprints[target.name] = _fingerprint(change)
            survey.norms[target.name], survey.relative[target.name] = norm, relative
        elif norm > 0:
            survey.lost.append(Lost(name, norm, relative))
    progress("reading", len(groups), len(groups))
    return survey


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """The names in the model's state dict, those of one tied weight together under the first of them."""
    owners = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for number, name in enumerate(model.state_dict()):
        key = id(owners[name]) if name in owners else -number
        groups.setdefault(key, []).append(name)
    return {names[0]: names for names in groups.values()}


def _places(
    groups: dict[str, list[str]], kept: set[str], weights: dict[str, Weights], prefix: str
) -> dict[str, tuple[str | None, str | None]]:
    """Where every tensor stands in base and tuned, after checking names, shapes and kinds of all of them.

    Raises:
        ValueError: what `read_all` says of names and shapes.
    """
    base, tuned = weights["base"], weights["tuned"]
    places = {}
    for name, aliases in groups.items():
        before, after = find(base, aliases, prefix), find(tuned, aliases, prefix)
        is_kept, entries = any(alias in kept for alias in aliases), []
        if after is None and (before is None or not base.entries[before].is_floating):
            places[name] = (before, None)  # such as a counter of batches, which older files lack
            continue
        if after is None:
            raise ValueError(f"{tuned.label} lacks {name}, which base has: are they of one architecture?")
        entries.append(tuned.entries[after])
        if before is None and not is_kept and entries[0].is_floating:
            raise ValueError(f"{base.label} lacks {name}, which tuned has; modules_to_save keeps what is new in full")
        if before is not None and base.entries[before].shape != entries[0].shape:
            if not is_kept:
                raise ValueError(
                    f"{name} has shape {base.entries[before].shape} in base and {entries[0].shape} in tuned; "
                    "modules_to_save keeps what is new in full"
                )
            before = None
        if before is not None and base.entries[before].is_floating != entries[0].is_floating:
            raise ValueError(f"{name} is of a quantised or integer type in one of base and tuned, but not in the other")
        places[name] = (before, after)
    found = {after for _, after in places.values()} | {alias for names in groups.values() for alias in names}
    extra = [n for n, entry in tuned.entries.items() if n not in found and entry.is_floating]
    if extra:
        count = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ValueError(f"{tuned.label} has {extra[0]}{count}, which base lacks: are they of one architecture?")
    return places


def _read(weights: Weights, name: str, device: torch.device | None) -> Tensor:
    """A tensor, after checking that it is finite."""
    tensor = weights.read(name, device)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} of {weights.label} has values that are not finite (NaN or infinity)")
    return tensor


def read_kept(place: tuple[str | None, str | None], weights: dict[str, Weights], device: torch.device | None) -> Tensor:
    """A tensor that is kept: tuned's; a counter that tuned lacks is base's, or zero."""
    for side, name in zip(("tuned", "base"), reversed(place), strict=True):
        if name is not None:
            return weights[side].read(name, device)
    return torch.zeros((), dtype=torch.int64, device=device)


def difference(before: Tensor, after: Tensor) -> Tensor:
    """`after − before`, on the device of `before`, in at least float32; a new tensor."""
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return after.to(before.device, dtype) - before.to(dtype)


def _fingerprint(change: Tensor) -> float:
    """`uᵀ M v` of the change's first unfolding M, with vectors drawn from a fixed seed."""
    matrix = change.reshape(change.shape[0], math.prod(change.shape[1:]))
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(size, generator=generator).to(change) for size in matrix.shape)
    return (u @ (matrix @ v)).item()
