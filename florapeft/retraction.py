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

_STEPS = 12  # bring squared singular values of a thousandth of the largest and more to 1 within rounding
_ORTHONORMAL = 1e-2  # what rounding in bfloat16 does to a basis is less


def keep_orthonormal(
    model: PeftModel, optimizer: torch.optim.Optimizer, *, adapter_name: str | None = None
) -> RemovableHandle:
    """After every step of an optimizer, bring an adapter's factors back to orthonormal columns.

    It is meant for starts from gradients (`florapeft.allocate`, `florapeft.initialize_from_gradients`), and holds for
    the weights whose factors are all orthonormal when it is called. The core, and whatever else is trained, is left to
    the optimizer. What weight decay does to the factors is undone. In several processes (DDP) every one calls it.

    Args:
        model: with a FLoRA adapter; itself, not a wrapper around it.
        optimizer: one that trains the adapter by calls of `step`; accelerate's wrapper around one is right too, after
            `prepare`. What is done to the parameters in other ways (LOMO's steps, SAM's second ones) is not noticed.
        adapter_name: the adapter; None takes the active one.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        ValueError: no such model or adapter; an optimizer whose own state would contradict what is done here
            (schedule-free ones, LBFGS), or that does not step the parameters themselves (DeepSpeed, FSDP); or no weight
            with orthonormal factors. Nothing is changed.
    """
    name, adapted = adapter_tuckers(model, adapter_name)
    inner = _checked(optimizer)
    stepped = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    groups: dict[tuple, list[Tensor]] = {}
    by_weight = [[factor for factor in tucker.factors if factor is not None] for _, tucker in adapted]
    for factors in by_weight:
        if all(map(is_orthonormal, factors)):
            for factor in factors:
                if id(factor) in stepped:
                    groups.setdefault((factor.shape, factor.dtype, factor.device), []).append(factor)
    if any(by_weight) and not groups:
        raise ValueError(
            f"adapter {name!r} has no weight with orthonormal factors that this {type(inner).__name__} steps: "
            "keep_orthonormal is for a start from gradients, before the training, and not for sharded parameters"
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
    see Higham, Functions of Matrices (2008), chapter 8. It runs on the small Gram matrices, and a last step on the
    factors themselves takes their rounding away. It is made of products alone, so that many factors of one shape cost a
    few kernels on a GPU, where QR would cost some for each.

    Args:
        factors: (…, d, r), of rank r.

    Returns:
        The same shape, in at least float32.
    """
    x = factors.to(torch.promote_types(factors.dtype, torch.float32))
    with without_autocast(x.device.type):
        gram = x.mT @ x
        # The largest singular value, squared, is at most the largest sum over a row.
        bound = gram.abs().sum(-1).amax(-1)[..., None, None]
        gram = gram / bound
        identity = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        product = identity / bound.sqrt()
        for _ in range(_STEPS):
            step = 1.5 * identity - 0.5 * gram
            product, gram = product @ step, step @ gram @ step
        x = x @ product
        return 1.5 * x - 0.5 * x @ (x.mT @ x)


@torch.no_grad()
def is_orthonormal(factor: Tensor) -> bool:
    """Whether the columns are, as nearly as half precision can say; not of a piece that a sharding engine has left."""
    if factor.ndim != 2 or factor.is_meta or hasattr(factor, "placements"):
        return False
    gram = factor.float().mT @ factor.float()
    return bool((gram - torch.eye(len(gram), device=gram.device)).abs().max() < _ORTHONORMAL)


def _checked(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer whose steps change the parameters: itself, or what accelerate has wrapped."""
    if "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):  # accelerate's wrapper has none itself
        optimizer = getattr(optimizer, "optimizer", optimizer)
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"keep_orthonormal needs an optimizer of torch, not {kind}")
    if isinstance(optimizer, torch.optim.LBFGS) or callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"keep_orthonormal does not work with {kind}, which steps from parameters that it keeps itself"
        )
    return optimizer
