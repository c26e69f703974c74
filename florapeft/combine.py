"""Weighted sums of adapters: exactly, by a block-diagonal core, or compressed to a rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor, nn

from florapeft.config import FloraConfig
from florapeft.kinds import Embedding
from florapeft.layer import FloraLayer
from florapeft.rank import validate_rank
from florapeft.tucker import Tucker, hooi, mode_dot, orthonormalize


def concatenate(tuckers: Sequence[Tucker], weights: Sequence[float]) -> Tucker:
    """`Σ wᵢ · tuckersᵢ`, exactly: factors side by side, cores along the diagonal.

    A mode becomes whole where it is whole in one of them, or where the ranks add up to its size or more; there the
    cores are added.

    Args:
        tuckers: tensors of one shape.
        weights: one per tensor.

    Returns:
        A Tucker tensor in at least float32, whose rank is at most the sum of theirs.
    """
    shape = tuckers[0].shape
    dtype = reduce(torch.promote_types, (tucker.core.dtype for tucker in tuckers), torch.float32)
    cores: list[Tensor] = [tucker.core.to(dtype) * weight for tucker, weight in zip(tuckers, weights, strict=True)]
    joined: list[Tensor | None] = []
    for mode, size in enumerate(shape):
        factors = [tucker.factors[mode] for tucker in tuckers]
        if all(f is not None for f in factors) and sum(f.shape[1] for f in factors) < size:
            joined.append(torch.cat([f.to(dtype) for f in factors], dim=1))
            continue
        joined.append(None)
        cores = [c if f is None else mode_dot(c, f.to(dtype), mode) for c, f in zip(cores, factors, strict=True)]

    core = cores[0].new_zeros([size if f is None else f.shape[1] for size, f in zip(shape, joined, strict=True)])
    starts = [list(accumulate((c.shape[mode] for c in cores), initial=0)) for mode in range(len(shape))]
    for i, part in enumerate(cores):
        block = tuple(
            slice(None) if joined[mode] is None else slice(starts[mode][i], starts[mode][i + 1])
            for mode in range(len(shape))
        )
        core[block] += part
    return Tucker(core, tuple(joined))


def compress(tucker: Tucker, rank: Sequence[int]) -> Tucker:
    """The best approximation of this rank that HOOI finds, without building the tensor.

    The factors are made orthonormal, which moves everything else into the core: the error of the core's approximation
    is then that of the tensor's.

    Args:
        tucker: a tensor in Tucker form.
        rank: one rank per mode; where it is not smaller than the tensor's own, the mode stays as it is.

    Returns:
        A Tucker tensor of that rank; modes of full size are whole.
    """
    core, bases = orthonormalize(tucker)
    small = hooi(core, [min(r, size) for r, size in zip(rank, core.shape, strict=True)])
    return Tucker(small.core, tuple(_product(basis, inner) for basis, inner in zip(bases, small.factors, strict=True)))


def _product(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:
    if outer is None or inner is None:
        return inner if outer is None else outer
    return outer @ inner


def check_combination(
    configs: Mapping[str, FloraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    r: object,
) -> None:
    """Check the arguments of `FloraModel.add_weighted_adapter`.

    Raises:
        TypeError, ValueError: what was given and what is needed.
    """
    if not isinstance(adapters, (list, tuple)):
        raise TypeError(f"adapters must be a list of names, got {adapters!r}")
    if not isinstance(weights, (list, tuple)) or not all(isinstance(weight, (int, float)) for weight in weights):
        raise TypeError(f"weights must be a list of numbers, got {weights!r}")
    if adapter_name in configs:
        raise ValueError(f"there is already an adapter {adapter_name!r}: delete it first, or choose another name")
    if missing := [name for name in adapters if name not in configs]:
        raise ValueError(f"there is no adapter {missing[0]!r}; there are {sorted(configs)}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"one weight per adapter is needed, got {len(adapters)} adapters and {len(weights)} weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite numbers, got {list(weights)}")
    if combination_type not in ("cat", "hooi"):
        raise ValueError(f"combination_type must be 'cat' (exact) or 'hooi' (to a rank), got {combination_type!r}")
    if (combination_type == "hooi") != (r is not None):
        raise ValueError(f"combination_type='hooi' takes a rank r, and 'cat' none; got {combination_type!r} and r={r}")
    if r is not None:
        validate_rank(r, "r")
    for name in adapters:
        config = configs[name]
        extra = {
            "modules_to_save": config.modules_to_save,
            "trainable_token_indices": config.trainable_token_indices,
            "bias": config.bias != "none",
            "save_batch_norm": config.save_batch_norm,
        }
        if used := [field for field, value in extra.items() if value]:
            raise ValueError(f"adapter {name!r} has {used[0]}, which is no update of a weight: only those add up")


@torch.no_grad()
def combined_tuckers(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, Tucker]:
    """The exact weighted sum of the adapters, their scales included, for every weight that one of them updates.

    Returns:
        By the name of the weight's layer, or its own where no layer stands for it (`FloraLayer.target_name`).
    """
    combined = {}
    for module_name, layer in model.named_modules():
        if not isinstance(layer, FloraLayer):
            continue
        parts: dict[str, list[tuple[Tucker, float]]] = {}
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.flora_core:
                for weight_name, tucker in layer.tuckers(adapter).items():
                    parts.setdefault(weight_name, []).append((tucker, weight * layer.scale_of(adapter, weight_name)))
        for weight_name, tuckers in parts.items():
            total = concatenate(*zip(*tuckers, strict=True))
            if isinstance(layer, Embedding) and (padding := layer.get_base_layer().padding_idx) is not None:
                (total.core if total.factors[0] is None else total.factors[0])[padding] = 0  # as its update has it
            combined[layer.target_name(module_name, weight_name)] = total
    return combined


def combined_config(
    config: FloraConfig, tuckers: Mapping[str, Tucker], targets: set[str] | str, bare: list[str]
) -> FloraConfig:
    """A configuration for the combination, from one of its parts."""
    defaults = {field: getattr(FloraConfig, field) for field in ("r", "kernel_r", "budget", "scale")}
    return replace(
        config,
        **defaults,
        ranks={name: list(tucker.rank) for name, tucker in tuckers.items()},
        rank_pattern={},
        scale_pattern={},
        target_modules=targets,
        target_parameters=bare or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_weights=True,
    )


@torch.no_grad()
def fill(model: nn.Module, adapter_name: str, tuckers: Mapping[str, Tucker]) -> None:
    """Copy core and factors into the tensors of an adapter of the same ranks; names as in `combined_tuckers`."""
    for module_name, layer in model.named_modules():
        if isinstance(layer, FloraLayer) and adapter_name in layer.flora_core:
            for weight_name, own in layer.tuckers(adapter_name).items():
                given = tuckers[layer.target_name(module_name, weight_name)]
                own.core.copy_(given.core)
                for mine, factor in zip(own.factors, given.factors, strict=True):
                    if mine is not None:
                        mine.copy_(factor)
