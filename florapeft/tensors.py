"""The tensors that an adapter of one weight is made of: a core and factors, each in a module of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from florapeft.tucker import Tucker


class AdapterWeight(nn.Module):
    """One tensor of an adapter, in a leaf module of its own because sharding engines wrap leaf modules."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tuple(shape)))

    def tensor(self) -> Tensor:
        """The parameter itself; where accelerate, whose hook waits for a call, keeps it elsewhere, a copy of it."""
        if not (self.weight.is_meta and hasattr(self, "_hf_hook")):
            return self.weight
        return self._hf_hook.weights_map["weight"].to(self._hf_hook.execution_device)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def adapter_tensors(shape: Sequence[int], rank: Sequence[int]) -> tuple[AdapterWeight, nn.ModuleDict]:
    """A core and, by mode, the factors of the modes that are not kept whole; not initialised."""
    factors = {str(mode): AdapterWeight((d, r)) for mode, (d, r) in enumerate(zip(shape, rank, strict=True)) if r < d}
    return AdapterWeight(rank), nn.ModuleDict(factors)


def as_tucker(core: AdapterWeight, factors: nn.ModuleDict) -> Tucker:
    """The parameters themselves, not copies, in Tucker form."""
    modes = map(str, range(core.weight.ndim))
    return Tucker(core.tensor(), tuple(factors[mode].tensor() if mode in factors else None for mode in modes))
