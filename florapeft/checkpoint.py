"""The tensors of a saved adapter: under which keys they stand, and whether they fit the model they are loaded into."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from florapeft.layer import FloraWrapper

PREFIX = "base_model.model."  # of the keys of a PeftModel; a model with injected layers alone has none
CONTAINERS = ("flora_core", "flora_factors", "flora_statistics")

_ADAPTER_KEY = re.compile(rf"\.({'|'.join(CONTAINERS)})\.")


def check_state_dict(
    given: dict[str, Tensor], expected: dict[str, Tensor], others: dict[str, Tensor], adapter_name: str
) -> None:
    """Check a checkpoint's tensors against the ones they are to be loaded into.

    Args:
        given: tensors by key.
        expected: the model's own tensors of this adapter, by key; only their shapes matter.
        others: what else of the model a checkpoint may hold (a new head, biases, embeddings), by key without PEFT's
            prefix. Their shapes are for PEFT to check, which can be told to pass over those that differ. A buffer among
            them, such as a mask, may be infinite.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, not floating point, or not finite.
    """

    def fail(problem: str, keys: list[str]) -> None:
        first = keys[0] + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
        raise ValueError(f"adapter {adapter_name!r} does not fit this model: {problem.format(key=first)}")

    own = {key: value for key, value in given.items() if _ADAPTER_KEY.search(key)}
    if missing := sorted(expected.keys() - own.keys()):
        fail("the checkpoint lacks {key}; is it for another base model?", missing)
    unknown = {key for key in given.keys() - own.keys() if key.removeprefix(PREFIX) not in others}
    if extra := sorted((own.keys() - expected.keys()) | unknown):
        fail("the checkpoint has {key}, for which the model has no place; is it for another base model?", extra)
    if wrong := [key for key in own if own[key].shape != expected[key].shape]:
        # A factor's rows are the base weight's; everything else is rank.
        other_base = [k for k in wrong if ".flora_factors." in k and own[k].shape[:1] != expected[k].shape[:1]]
        first = sorted(other_base or wrong)[0]
        shapes = f"{tuple(own[first].shape)} in the checkpoint and {tuple(expected[first].shape)} in the model"
        hint = "is it for another base model?" if other_base else "was it saved with other ranks than its config says?"
        fail(f"{{key}} has shape {shapes}; {hint}", [first, *(k for k in wrong if k != first)])
    floating = [key for key in given if others[key.removeprefix(PREFIX)].is_floating_point()]
    if integer := [key for key in floating if not given[key].is_floating_point()]:
        fail(f"{{key}} has dtype {given[integer[0]].dtype}, which is not floating point", integer)
    parameters = [key for key in given if isinstance(others[key.removeprefix(PREFIX)], nn.Parameter)]
    values = {key: given[key] for key in [*own, *parameters] if not given[key].is_meta}
    if broken := [key for key, value in values.items() if not torch.isfinite(value).all()]:
        fail("{key} has values that are not finite", broken)


def where_they_stand(given: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the model's own keys for those of layers that adapters wrap here, or did where they were saved.

    Args:
        given: tensors by key.
        others: the model's tensors by key without PEFT's prefix.
    """
    places = {_unwrapped(key): key for key in others}
    found = {}
    for key, value in given.items():
        bare = key.removeprefix(PREFIX)
        is_elsewhere = bare not in others and not _ADAPTER_KEY.search(key)
        place = places.get(_unwrapped(bare), bare) if is_elsewhere else bare
        found[key.removesuffix(bare) + place] = value
    return found


def _unwrapped(key: str) -> str:
    return key.replace(".base_layer.", ".")


def under_other_names(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of layers that stand in several places, for the places that a file does not name."""
    first: dict[int, str] = {}
    others = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FloraWrapper) and first.setdefault(id(module), name) != name:
            prefix = f"{first[id(module)]}.flora_"
            others |= {
                f"{name}.flora_{key.removeprefix(prefix)}": value
                for key, value in given.items()
                if key.startswith(prefix)
            }
    return others
