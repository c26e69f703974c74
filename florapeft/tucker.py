"""The algebra of Tucker tensors: mode products, unfoldings, and the two classical decompositions.

Notation (Kolda and Bader, 2009, "Tensor Decompositions and Applications"): a tensor of order N has modes 0 … N-1 (the
literature counts from 1); `×ₙ` is the mode-n product; a Tucker tensor is `core ×₀ U₀ ×₁ U₁ …`. Every function is
differentiable and works in the dtype and on the device of its input, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tucker(NamedTuple):
    """A tensor of order N in Tucker form, `core ×₀ U₀ … ×ₙ₋₁ Uₙ₋₁`; unpacks as `core, factors`.

    Attributes:
        core: shape `rank = (r_0, …, r_{N-1})`.
        factors: one per mode; `factors[n]` has shape `(d_n, r_n)`, or is `None` where mode n is kept whole: then
            `r_n = d_n` and the factor is the identity, absorbed by the core.
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    @property
    def rank(self) -> tuple[int, ...]:
        """The multilinear rank `(r_0, …, r_{N-1})`."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(d_0, …, d_{N-1})` of the tensor that this stands for."""
        return tuple(
            size if factor is None else factor.shape[0]
            for size, factor in zip(self.core.shape, self.factors, strict=True)
        )

    @property
    def parameters(self) -> int:
        """Number of entries of core and factors together."""
        return self.core.numel() + sum(factor.numel() for factor in self.factors if factor is not None)

    def to_tensor(self) -> Tensor:
        """The tensor itself, of shape `shape`: the core multiplied by its factor in every mode."""
        return multi_mode_dot(self.core, self.factors)


def validate_tucker(core: Tensor, factors: Sequence[Tensor | None]) -> Tucker:
    """Return `Tucker(core, factors)`.

    Raises:
        ValueError: the number of factors is not the order of the core, or a factor is not a matrix whose columns
            number the core's size in that mode; the message names the mode and both shapes.
    """
    if len(factors) != core.ndim:
        raise ValueError(
            f"a core of order {core.ndim} (shape {tuple(core.shape)}) needs {core.ndim} factors, got {len(factors)}"
        )
    for mode, factor in enumerate(factors):
        if factor is not None and (factor.ndim != 2 or factor.shape[1] != core.shape[mode]):
            raise ValueError(
                f"factors[{mode}] has shape {tuple(factor.shape)}; the core of shape {tuple(core.shape)} "
                f"needs (d, {core.shape[mode]}) in mode {mode}"
            )
    return Tucker(core, tuple(factors))


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding: mode n becomes the rows, the other modes in their order, row-major, the columns.

    The columns are ordered as in `tensor.movedim(mode, 0).reshape(d_n, -1)`: the last mode varies fastest. Kolda and
    Bader let the first one do so; the two differ by a permutation of columns, which no rank or singular value sees.

    Args:
        tensor: shape `(d_0, …, d_{N-1})`.
        mode: `0 ≤ mode < N`.

    Returns:
        Shape `(d_mode, Π_{m≠mode} d_m)`; a view where possible.
    """
    _check_mode(tensor, mode)
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """The inverse of `unfold`: `fold(unfold(x, mode), mode, x.shape)` is `x`; a view where possible.

    Raises:
        ValueError: the matrix does not have the shape of the mode-n unfolding of a tensor of shape `shape`.
    """
    others = [size for other, size in enumerate(shape) if other != mode]
    expected = (shape[mode], torch.Size(others).numel())
    if tuple(matrix.shape) != expected:
        raise ValueError(
            f"the mode-{mode} unfolding of a tensor of shape {tuple(shape)} has shape {expected}, "
            f"got {tuple(matrix.shape)}"
        )
    return matrix.reshape(shape[mode], *others).movedim(0, mode)


def mode_dot(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Mode-n product `tensor ×ₙ matrix`: every mode-n fibre is multiplied by `matrix` from the left.

    Args:
        tensor: shape `(d_0, …, d_{N-1})`.
        matrix: shape `(m, d_mode)`.
        mode: `0 ≤ mode < N`.

    Returns:
        `tensor` with `d_mode` replaced by `m`.

    Raises:
        ValueError: the sizes do not match; the message names both shapes and the mode.
    """
    _check_mode(tensor, mode)
    if matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]:
        raise ValueError(
            f"shapes {tuple(tensor.shape)} and {tuple(matrix.shape)} do not align in a mode-{mode} product: "
            f"mode {mode} of the tensor has size {tensor.shape[mode]}, the matrix needs as many columns"
        )
    return torch.tensordot(tensor, matrix, dims=([mode], [1])).movedim(-1, mode)


def multi_mode_dot(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """`tensor ×₀ matrices[0] ×₁ matrices[1] …`; `None` leaves its mode alone.

    The modes are taken in the order that keeps intermediates small: those that shrink most (grow least) first.
    """
    growth = [(m.shape[0] / m.shape[1], mode) for mode, m in enumerate(matrices) if m is not None]
    for _, mode in sorted(growth):
        tensor = mode_dot(tensor, matrices[mode], mode)
    return tensor


def orthonormalize(tucker: Tucker) -> Tucker:
    """The same tensor with orthonormal factors (QR of each, the triangles moved into the core), not built.

    Norm, inner products and the singular values of every unfolding are then the core's. A mode kept whole stays so.

    Args:
        tucker: a tensor in Tucker form, in a dtype that QR is implemented for.
    """
    bases: list[Tensor | None] = []
    triangles: list[Tensor | None] = []
    for factor in tucker.factors:
        basis, triangle = (None, None) if factor is None else torch.linalg.qr(factor)
        bases.append(basis)
        triangles.append(triangle)
    return Tucker(multi_mode_dot(tucker.core, triangles), tuple(bases))


def hosvd(tensor: Tensor, rank: Sequence[int]) -> Tucker:
    """Truncated higher-order SVD: factor n spans the leading `r_n` left singular vectors of the mode-n unfolding.

    `X ≈ G ×₀ U₀ … ×ₙ₋₁ Uₙ₋₁` with `‖X − X̂‖² ≤ Σₙ Σ_{i>rₙ} σᵢ(X₍ₙ₎)²`.

    Args:
        tensor: shape `(d_0, …, d_{N-1})`, floating point; half precision is computed in float32 and cast back.
        rank: `(r_0, …, r_{N-1})`, `1 ≤ r_n ≤ d_n`.

    Returns:
        `core` of shape `rank`; `factors[n]` of shape `(d_n, r_n)` with orthonormal columns, `None` where
        `r_n = d_n` (the projection onto a whole mode is the identity).

    Raises:
        ValueError: `rank` has the wrong length or is out of range; the message names the mode and both numbers.

    Source: De Lathauwer, De Moor, Vandewalle (2000), SIAM J. Matrix Anal. Appl. 21(4).
    """
    rank = _validate_rank(rank, tensor.shape)
    working = _working_dtype(tensor)
    factors = tuple(
        None if r == d else _leading_left_singular_vectors(unfold(working, mode), r)
        for mode, (d, r) in enumerate(zip(tensor.shape, rank, strict=True))
    )
    return _project(working, factors, tensor.dtype)


def hooi(tensor: Tensor, rank: Sequence[int], *, iterations: int = 25, tolerance: float = 1e-7) -> Tucker:
    """Higher-order orthogonal iteration: the best rank-`rank` Tucker tensor found by alternating over the modes.

    Starts from `hosvd` and replaces one factor at a time by the leading left singular vectors of the tensor
    projected in all other modes. The error never increases from one sweep to the next.

    Args:
        tensor: shape `(d_0, …, d_{N-1})`, floating point; half precision is computed in float32 and cast back.
        rank: `(r_0, …, r_{N-1})`, `1 ≤ r_n ≤ d_n`.
        iterations: the most sweeps over all modes.
        tolerance: stop when a sweep raises `‖core‖ / ‖tensor‖` by less than this.

    Returns:
        As `hosvd`, with an error at most that of `hosvd`.

    Raises:
        ValueError: `rank` has the wrong length or is out of range.

    Source: De Lathauwer, De Moor, Vandewalle (2000), SIAM J. Matrix Anal. Appl. 21(4), algorithm 4.2.
    """
    rank = _validate_rank(rank, tensor.shape)
    working = _working_dtype(tensor)
    first = hosvd(working, rank)
    factors = list(first.factors)
    truncated = [mode for mode, factor in enumerate(factors) if factor is not None]
    norm = working.norm()
    captured = first.core.norm()
    is_optimal = len(truncated) < 2 or tensor.ndim == 2  # by the theorem of Eckart and Young
    for _ in range(0 if is_optimal else iterations):
        for mode in truncated:
            others = [None if m == mode or f is None else f.mT for m, f in enumerate(factors)]
            projected = multi_mode_dot(working, others)
            factors[mode] = _leading_left_singular_vectors(unfold(projected, mode), rank[mode])
        previous, captured = captured, _project(working, factors, working.dtype).core.norm()
        if captured - previous <= tolerance * norm:
            break
    return _project(working, factors, tensor.dtype)


def hosvd_core(tensor: Tensor) -> Tensor:
    """The core of the untruncated HOSVD: the tensor in the basis of its own left singular vectors, in every mode.

    Its slices along a mode are orthogonal, and their norms the singular values of that mode's unfolding, descending.
    Cutting it to a corner of size `rank` keeps the energy that `hosvd(tensor, rank)` keeps, so that one core tells the
    errors of all ranks.

    Args:
        tensor: shape `(d_0, …, d_{N-1})`, floating point.

    Returns:
        Shape `(m_0, …, m_{N-1})` with `m_n = min(d_n, Π_{m≠n} d_m)`: a mode's unfolding has no more singular values. In
        float64; of a matrix, the singular values on the diagonal.

    Source: De Lathauwer, De Moor, Vandewalle (2000), SIAM J. Matrix Anal. Appl. 21(4), theorem 2.
    """
    working = _working_dtype(tensor)
    if tensor.ndim == 2:
        return torch.diag(mode_energies(working, 0).sqrt())
    core = working
    for mode, size in enumerate(tensor.shape):
        others = tensor.numel() // max(size, 1)
        if tensor.ndim > 1:
            basis = _leading_left_singular_vectors(unfold(working, mode), min(size, others))
            core = mode_dot(core, basis.mT, mode)
    return core.double()


def mode_energies(tensor: Tensor, mode: int) -> Tensor:
    """The squared singular values of the mode-n unfolding, descending, in float64; their sum is `‖tensor‖²`.

    Returns:
        Shape `(min(d_mode, Π_{m≠mode} d_m),)`.
    """
    matrix = unfold(tensor, mode).double()
    return torch.linalg.eigvalsh(_smaller_gram(matrix)).flip(0).clamp_min(0.0)


def captured_energy(core: Tensor, grid: Sequence[Sequence[int]]) -> Tensor:
    """For every rank of a grid the energy that `hosvd` at that rank keeps of a tensor: `‖core[:r_0, …, :r_{N-1}]‖²`.

    Args:
        core: `hosvd_core` of the tensor.
        grid: per mode the ranks, from 1; those above the core's size keep as much as that.

    Returns:
        Shape `(len(grid[0]), …, len(grid[N-1]))`, in float64.
    """
    energy = core.double().square()
    for mode, ranks in enumerate(grid):
        last = torch.tensor([min(r, core.shape[mode]) - 1 for r in ranks], device=energy.device)
        energy = energy.cumsum(mode).index_select(mode, last)
    return energy


def _project(tensor: Tensor, factors: Sequence[Tensor | None], dtype: torch.dtype) -> Tucker:
    """The Tucker tensor with these orthonormal factors that is nearest to `tensor`."""
    core = multi_mode_dot(tensor, [None if f is None else f.mT for f in factors])
    return Tucker(core.to(dtype), tuple(None if f is None else f.to(dtype) for f in factors))


def _leading_left_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """The `count` leading left singular vectors of `matrix`, as columns; shape `(rows, count)`.

    Of float32 by the eigenvectors of the smaller Gram matrix, much less work on wide unfoldings. In float64 it has the
    digits of a float32 matrix squared; in float32 it would lose those below `√ε` of the largest singular value.
    """
    rows, columns = matrix.shape
    if matrix.dtype == torch.float32 and min(rows, columns) > 0:
        exact = matrix.double()
        vectors = torch.linalg.eigh(_smaller_gram(exact)).eigenvectors.flip(1)
        # Of a tall matrix those are the right ones, which it maps to the left ones.
        left = vectors if rows <= columns else torch.linalg.qr(exact @ vectors[:, :count]).Q
    else:
        left = torch.linalg.svd(matrix, full_matrices=False).U
    if left.shape[1] < count:  # fewer columns than asked for: complete to an orthonormal basis
        left = torch.linalg.qr(left, mode="complete").Q
    return left[:, :count].to(matrix.dtype).contiguous()


def _smaller_gram(matrix: Tensor) -> Tensor:
    """`M Mᵀ` or `Mᵀ M`, whichever is smaller."""
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def _working_dtype(tensor: Tensor) -> Tensor:
    """`tensor` in a dtype that linear algebra is implemented for."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _validate_rank(rank: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    rank, shape = tuple(rank), tuple(shape)
    if len(rank) != len(shape):
        raise ValueError(f"rank {rank} has {len(rank)} entries; a tensor of shape {shape} needs {len(shape)}")
    for mode, (r, d) in enumerate(zip(rank, shape, strict=True)):
        if not 1 <= r <= d:
            raise ValueError(f"rank[{mode}] = {r} is not between 1 and the size {d} of mode {mode} (shape {shape})")
    return rank


def _check_mode(tensor: Tensor, mode: int) -> None:
    if not 0 <= mode < tensor.ndim:
        raise ValueError(f"mode {mode} does not exist in a tensor of order {tensor.ndim} (shape {tuple(tensor.shape)})")
