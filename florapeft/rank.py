"""One rank per mode: from an int, or from one number per mode; and how many parameters it takes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Shape = Sequence[int]


def validate_rank(rank: object, name: str) -> None:
    """Check that `rank` is a positive int or a non-empty sequence of them.

    Raises:
        TypeError, ValueError: what was given and what is needed; `name` is how the message calls the value.
    """
    entries = rank if isinstance(rank, (list, tuple)) else [rank]
    if any(isinstance(r, bool) or not isinstance(r, int) for r in entries):
        raise TypeError(f"{name} must be a positive integer or one per mode, got {rank!r}")
    if not entries or any(r < 1 for r in entries):
        raise ValueError(f"{name} must be a positive integer or one per mode, got {rank!r}")


def resolve_rank(
    shape: Shape, r: int | Sequence[int], kernel_r: int | None, channel_modes: Sequence[int], name: str
) -> tuple[int, ...]:
    """The rank of one weight, before capping.

    Args:
        shape: the weight's shape `(d_0, …, d_{N-1})`.
        r: an int is the rank of every channel mode; a sequence has one rank per mode, in the weight's axis order.
        kernel_r: rank of each other mode (a convolution's spatial modes); None keeps them whole.
        channel_modes: which modes are channels.
        name: of the weight's module, for the message.

    Returns:
        One rank per mode; possibly above the mode's size, see `cap_rank`. A vector is always whole.

    Raises:
        ValueError: a sequence whose length is not the order of the weight.
    """
    if not isinstance(r, int):
        if len(r) != len(shape):
            raise ValueError(
                f"rank {list(r)} has {len(r)} entries, but the weight of {name!r} has order {len(shape)} "
                f"(shape {tuple(shape)}): give an int, or one rank per mode for targets of one order only"
            )
        return tuple(r)
    if len(shape) == 1:
        return tuple(shape)
    return tuple(
        r if mode in channel_modes else (size if kernel_r is None else kernel_r) for mode, size in enumerate(shape)
    )


def cap_rank(rank: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """`rank` with every entry at most the size of its mode."""
    return tuple(min(r, d) for r, d in zip(rank, shape, strict=True))


def count_parameters(shape: Shape, rank: Sequence[int]) -> int:
    """Entries of a Tucker tensor: the core, and a factor for every mode that is not kept whole."""
    return prod(rank) + sum(d * r for d, r in zip(shape, rank, strict=True) if r < d)
