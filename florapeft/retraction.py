"""Factors that keep orthonormal columns while they are trained, as a start from gradients gives them.

A step of an optimizer moves a factor off the matrices with orthonormal columns (the Stiefel manifold); a retraction
takes it back to the nearest one. The core alone then holds how large the update is, and a step of the core moves the
update by as much at the end of the training as at its beginning.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from florapeft.contract import without_autocast
from florapeft.targets import adapter_tuckers

_STEPS = 8  # bring singular values of 0.2 and more to 1 within rounding
_ORTHONORMAL = 1e-2  # what rounding in bfloat16 does to a basis is less


def keep_orthonormal(
    model: PeftModel, optimizer: torch.optim.Optimizer, *, adapter_name: str | None = None
) -> RemovableHandle:
    """After every step of an optimizer, bring an adapter's factors back to orthonormal columns.

    It holds for the weights whose factors are all orthonormal now: those that start from gradients
    (`florapeft.allocate`, `florapeft.initialize_from_gradients`). The core, and whatever else is trained, is left to
    the optimizer. In several processes (DDP) every one calls it.

    Args:
        model: with a FLoRA adapter.
        optimizer: one that trains the adapter; accelerate's wrapper around one is right too.
        adapter_name: the adapter; None takes the active one.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        ValueError: no such adapter, an optimizer that does not step the parameters themselves (DeepSpeed, FSDP), or no
            weight with orthonormal factors.
    """
    name, tuckers = adapter_tuckers(model, adapter_name)
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(f"keep_orthonormal needs an optimizer of torch, not {type(inner).__name__}")
    stepped = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    groups: dict[tuple, list[Tensor]] = {}
    for tucker in tuckers.values():
        factors = [factor for factor in tucker.factors if factor is not None]
        own = [factor for factor in factors if id(factor) in stepped and not hasattr(factor, "placements")]
        if len(own) == len(factors) and all(map(is_orthonormal, factors)):
            for factor in factors:
                groups.setdefault((factor.shape, factor.dtype, factor.device), []).append(factor)
    if not groups:
        raise ValueError(
            f"adapter {name!r} has no weight whose factors are all orthonormal and all stepped whole by this "
            f"{type(inner).__name__}: keep_orthonormal is for a start from gradients, before the training, and not for "
            "sharded parameters"
        )

    @torch.no_grad()
    def retract(*_: object) -> None:
        for factors in groups.values():
            for factor, basis in zip(factors, nearest_orthonormal(torch.stack(factors)), strict=True):
                factor.copy_(basis)

    return inner.register_step_post_hook(retract)


def nearest_orthonormal(factors: Tensor) -> Tensor:
    """The matrices with orthonormal columns that are nearest to these: the orthogonal factors of their polar forms.

    By the iteration of Newton and Schulz, `X ← X (3 I - XᵀX) / 2`, from a multiple whose singular values are at most 1;
    see Higham, Functions of Matrices (2008), chapter 8. It is made of products alone, so that many small factors of one
    shape cost a few kernels on a GPU, where QR would cost some for each.

    Args:
        factors: (…, d, r), of rank r.

    Returns:
        The same shape, in at least float32.
    """
    x = factors.to(torch.promote_types(factors.dtype, torch.float32))
    # The largest singular value, squared, is at most the largest sum over a row of the Gram matrix.
    with without_autocast(x.device.type):
        x = x / (x.mT @ x).abs().sum(-1).amax(-1).sqrt()[..., None, None]
        for _ in range(_STEPS):
            x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


@torch.no_grad()
def is_orthonormal(factor: Tensor) -> bool:
    """Whether the columns are, as nearly as half precision can say."""
    gram = factor.float().mT @ factor.float()
    return bool((gram - torch.eye(len(gram), device=gram.device)).abs().max() < _ORTHONORMAL)
