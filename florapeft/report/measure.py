"""What an update does to its weight, in numbers: from core and factors, never from dW itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from florapeft.structure import energy_per_mode, energy_per_tap, multilinear_ranks
from florapeft.tucker import Tucker, multi_mode_dot, orthonormalize, unfold

SHARES = (0.90, 0.95, 0.99)  # of the energy, for which the ranks that keep them are given
STRONGEST = 4  # output filters that are shown


class Filter(NamedTuple):
    """What an update adds to one output channel of a convolution.

    Attributes:
        index: the channel.
        norm: of its slice of dW.
        pattern: shape `(*kernel)`; the slice's leading spatial pattern, signed as the mean over input channels is. Its
            norm, times the root of their number, is the leading singular value; of one input channel it is the slice.
    """

    index: int
    norm: float
    pattern: Tensor


class Measures(NamedTuple):
    """Numbers of one update dW.

    Attributes:
        norm: ‖dW‖, Frobenius.
        energies: by mode, the squared singular values of dW's unfolding that may not be zero, descending; none for a
            vector.
        ranks: for each of `SHARES` how many of them make it up, by mode; none for a vector or an update of zero.
        taps: shape `(*kernel)`, root mean square of dW over both channel modes; None for what is no convolution.
        filters: the strongest output filters, strongest first; empty where the output mode is not known.
    """

    norm: float
    energies: tuple[Tensor, ...]
    ranks: dict[float, tuple[int, ...]]
    taps: Tensor | None
    filters: tuple[Filter, ...]


def measure(tucker: Tucker, *, has_kernel: bool, output_mode: int | None) -> Measures:
    """Measures `dW = tucker`, its scale included, in float64.

    Args:
        tucker: the update.
        has_kernel: whether modes 2 and up are a convolution's kernel.
        output_mode: the convolution's output mode, if known.
    """
    double = Tucker(tucker.core.double(), tuple(None if f is None else f.double() for f in tucker.factors))
    small = orthonormalize(double)
    norm = small.core.norm().item()
    has_modes = small.core.ndim > 1
    energies = energy_per_mode(double) if has_modes else ()
    ranks = multilinear_ranks(double, SHARES) if has_modes and norm else {}
    if not has_kernel:
        return Measures(norm, energies, ranks, None, ())
    taps = (energy_per_tap(double) / (tucker.shape[0] * tucker.shape[1])).sqrt()
    kernels = multi_mode_dot(small.core, (None, None, *small.factors[2:]))  # (r_0, r_1, *kernel)
    return Measures(norm, energies, ranks, taps, () if output_mode is None else _strongest(small, kernels, output_mode))


def _strongest(small: Tucker, kernels: Tensor, output_mode: int) -> tuple[Filter, ...]:
    """The output channels whose slices of dW are largest; `kernels` is dW in the bases of its channel modes."""
    rows = unfold(kernels, output_mode)
    outputs, inputs = small.factors[output_mode], small.factors[1 - output_mode]
    gram = rows @ rows.mT
    squares = gram.diagonal() if outputs is None else ((outputs @ gram) * outputs).sum(1)
    found = []
    for index in squares.topk(min(STRONGEST, len(squares))).indices.tolist():
        row = rows[index] if outputs is None else outputs[index] @ rows
        left, values, right = torch.linalg.svd(row.reshape(kernels.shape[1 - output_mode], -1), full_matrices=False)
        loading = left[:, 0] if inputs is None else inputs @ left[:, 0]
        sign = -1.0 if loading.sum() < 0 else 1.0
        pattern = sign * values[0] * right[0] / len(loading) ** 0.5
        found.append(Filter(index, squares[index].clamp_min(0).sqrt().item(), pattern.reshape(kernels.shape[2:])))
    return tuple(found)
