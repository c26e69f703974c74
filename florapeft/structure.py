"""How well matrix and tensor structures fit an update, and where its energy lies.

An update is a dense tensor, or an adapter's `Tucker`, which is then never expanded but in its kernel modes: with
orthonormal factors, norms and spectra are those of the core. Energy is the squared Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from florapeft.budget import Choice, choices_from_energies, rank_grid
from florapeft.tucker import (
    Tucker,
    captured_energy,
    hooi,
    hosvd,
    hosvd_core,
    mode_energies,
    multi_mode_dot,
    orthonormalize,
)

Update = Tensor | Tucker

CHANNEL_MODES = (0, 1)
# Of the ranks that fit a budget, so many of the best by HOSVD are improved by HOOI.
_CANDIDATES = 3


@dataclass(frozen=True)
class Fit:
    """The best approximation by one structure with at most some number of parameters.

    Attributes:
        rank: of a matrix its rank alone; of a Tucker tensor one entry per mode; `(0,)` where nothing fits the budget.
        parameters: that it has.
        error: Frobenius norm of what is missing, relative to the update's.
    """

    rank: tuple[int, ...]
    parameters: int
    error: float


@dataclass(frozen=True)
class Overlap:
    """How much of the spaces that two updates act in, in one mode, is common.

    Attributes:
        ranks: dimensions of the two spaces.
        shared: mean squared cosine of the angles between them: 1 where one contains the other, 0 where they are
            orthogonal.
        chance: what two random spaces of these dimensions have on average.
    """

    ranks: tuple[int, int]
    shared: float
    chance: float


NOTHING = Fit((0,), 0, 1.0)


def energy_per_mode(update: Update) -> tuple[Tensor, ...]:
    """For every mode the squared singular values of the unfolding, descending, in float64."""
    small = _compact(update)
    return tuple(mode_energies(small, mode) for mode in range(small.ndim))


def energy_per_tap(update: Update) -> Tensor:
    """The energy at every position of the kernel, over all pairs of channels; of the kernel's shape, in float64."""
    return _compact(update, expanded=_kernel_modes(update)).double().square().sum(CHANNEL_MODES)


def multilinear_ranks(update: Update, shares: Sequence[float] = (0.9, 0.95, 0.99)) -> dict[float, tuple[int, ...]]:
    """For every share of the energy how many dimensions each mode needs for it, by itself."""
    spectra = energy_per_mode(update)
    return {share: tuple(_dimensions(spectrum, share) for spectrum in spectra) for share in shares}


def lora_fits(update: Update, budgets: Sequence[int], row_modes: Sequence[int] = (0,)) -> list[Fit]:
    """The best matrices of low rank, by the truncated SVD, for every budget of parameters.

    Args:
        update: of any order above 1.
        budgets: the most parameters.
        row_modes: the modes that together are the rows of the matrix, the others its columns: `(0,)` is PEFT's LoRA of
            convolutions, `(out, in·kh·kw)`; `(0, 2)` of a 2-D convolution is `(out·kh, in·kw)`.
    """
    shape, columns = _shape(update), [mode for mode in range(len(_shape(update))) if mode not in row_modes]
    mixed = [mode for group in (row_modes, columns) if len(group) > 1 for mode in group]
    small = _compact(update, expanded=[mode for mode in mixed if mode in _kernel_modes(update)])
    matrix = small.permute(*row_modes, *columns).flatten(0, len(row_modes) - 1).flatten(1)
    spectrum = mode_energies(matrix, 0)
    missing = (spectrum.sum() - spectrum.cumsum(0)).clamp_min(0) / spectrum.sum()
    price = prod(shape[mode] for mode in row_modes) + prod(shape[mode] for mode in columns)
    fits = []
    for budget in budgets:
        r = min(budget // price, len(spectrum))
        fits.append(NOTHING if r == 0 else Fit((r,), r * price, missing[r - 1].sqrt().item()))
    return fits


def tucker_fits(update: Update, budgets: Sequence[int], kernel_rank: int | None = None) -> list[Fit]:
    """The best Tucker tensors for every budget of parameters: ranks by the energies of the HOSVD, improved by HOOI.

    Args:
        update: of any order.
        budgets: the most parameters.
        kernel_rank: rank of every kernel mode (at most the mode's size); None leaves it to the search.
    """
    return _tucker_fits(_compact(update), _choices(update), budgets, kernel_rank)


def error_curves(update: Update, budgets: Sequence[int]) -> dict[str, list[Fit]]:
    """What each structure makes of every budget of parameters: LoRA's matrices, and Tucker at every kernel rank.

    Returns:
        Of a convolution with a kernel of k taps per axis: `lora`, the matrix `(out, in·k·k)`; `lora_taps`, the matrix
        `(out·k, in·k)`; `tucker_1` … `tucker_k`, by the rank of the kernel modes; and `tucker`, each mode its own. Of
        other weights `lora` and `tucker`. Lists are in the order of `budgets`.
    """
    kernel = [_shape(update)[mode] for mode in _kernel_modes(update)]
    small, choices = _compact(update), _choices(update)
    curves = {"lora": lora_fits(update, budgets)}
    if max(kernel, default=1) > 1:
        curves["lora_taps"] = lora_fits(update, budgets, (0, *list(_kernel_modes(update))[: (len(kernel) + 1) // 2]))
        for rank in range(1, max(kernel) + 1):
            curves[f"tucker_{rank}"] = _tucker_fits(small, choices, budgets, rank)
    return curves | {"tucker": _tucker_fits(small, choices, budgets)}


def taps_permuted(update: Update, seed: int = 0) -> Tensor:
    """A control: the taps of every kernel in a random order of its own, so that neighbours are torn apart. Dense."""
    dense = _dense(update)
    flat = dense.flatten(2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(flat.shape, generator=generator).argsort(-1).to(dense.device)
    return flat.gather(-1, order).view_as(dense)


def matched_noise(update: Update, seed: int = 0) -> Tensor:
    """A control: Gaussian noise of the update's shape and norm. Dense."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(_shape(update), generator=generator)
    return noise * (_compact(update).norm().item() / noise.norm())


def subspace_overlap(first: Update, second: Update) -> tuple[Overlap | None, ...]:
    """For every mode, how much of the spaces that the two updates act in is common; None where one of them is whole.

    Raises:
        ValueError: the shapes differ.
    """
    shape = _shape(first)
    if shape != _shape(second):
        raise ValueError(f"updates of one shape are needed, got {shape} and {_shape(second)}")
    overlaps = []
    for mode, size in enumerate(shape):
        a, b = (_basis(update, mode) for update in (first, second))
        ranks = (a.shape[1], b.shape[1])
        if size in ranks:
            overlaps.append(None)
            continue
        shared = (a.mT @ b).square().sum().item() / min(ranks)
        overlaps.append(Overlap(ranks, shared, max(ranks) / size))
    return tuple(overlaps)


def _choices(update: Update) -> list[Choice]:
    """Every rank worth considering, with the energy that the HOSVD keeps at it."""
    shape = _shape(update)
    energies = captured_energy(hosvd_core(_compact(update)), rank_grid(shape)).flatten().tolist()
    return choices_from_energies(shape, energies)


def _tucker_fits(
    small: Tensor, choices: Sequence[Choice], budgets: Sequence[int], kernel_rank: int | None = None
) -> list[Fit]:
    """`tucker_fits`, of a tensor of the update's norms and spectra."""
    if kernel_rank is not None:
        whole = max(choices, key=lambda choice: choice.parameters).rank
        wanted = tuple(min(kernel_rank, size) for size in whole[len(CHANNEL_MODES) :])
        choices = [choice for choice in choices if choice.rank[len(CHANNEL_MODES) :] == wanted]
    fits: list[Fit] = []
    for budget in budgets:
        allowed = [choice for choice in choices if choice.parameters <= budget]
        best = sorted(allowed, key=lambda choice: -choice.kept)[:_CANDIDATES]
        found = [Fit(choice.rank, choice.parameters, _error(small, choice.rank)) for choice in best]
        fits.append(min(found, key=lambda fit: fit.error, default=NOTHING))
    return fits


def _basis(update: Update, mode: int) -> Tensor:
    """An orthonormal basis of the span of the mode-n fibres, of shape `(d_mode, dimension)`, in float64."""
    core, factors = orthonormalize(_double(update)) if isinstance(update, Tucker) else (_double(update), None)
    dimension = _dimensions(mode_energies(core, mode), 1 - 1e-12)
    rank = [dimension if m == mode else size for m, size in enumerate(core.shape)]
    inner = hosvd(core, rank).factors[mode]
    outer = None if factors is None else factors[mode]
    if inner is None:
        inner = torch.eye(core.shape[mode], dtype=core.dtype, device=core.device)
    return inner if outer is None else outer @ inner


def _compact(update: Update, expanded: Sequence[int] = ()) -> Tensor:
    """A tensor of the same norms and spectra: the update itself, or its core with orthonormal factors.

    Args:
        update: the update.
        expanded: modes in which it must be the update's own.
    """
    if not isinstance(update, Tucker):
        return update.detach()
    core, factors = orthonormalize(
        Tucker(update.core.detach(), tuple(f if f is None else f.detach() for f in update.factors))
    )
    return multi_mode_dot(core, [f if mode in expanded else None for mode, f in enumerate(factors)])


def _error(tensor: Tensor, rank: Sequence[int]) -> float:
    fit = hooi(tensor, [min(r, size) for r, size in zip(rank, tensor.shape, strict=True)])
    return ((tensor - fit.to_tensor()).norm() / tensor.norm()).item()


def _dimensions(spectrum: Tensor, share: float) -> int:
    """How many of the leading values make up this share of the sum; at least 1."""
    reached = spectrum.cumsum(0) >= share * spectrum.sum()
    return int(reached.int().argmax()) + 1 if reached.any() else len(spectrum)


def _dense(update: Update) -> Tensor:
    return update.to_tensor() if isinstance(update, Tucker) else update


def _double(update: Update) -> Update:
    if isinstance(update, Tucker):
        return Tucker(update.core.double(), tuple(None if f is None else f.double() for f in update.factors))
    return update.double()


def _shape(update: Update) -> tuple[int, ...]:
    return tuple(update.shape)


def _kernel_modes(update: Update) -> range:
    return range(len(CHANNEL_MODES), len(_shape(update)))
