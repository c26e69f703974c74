"""A frozen layer and its updates as one step of autograd.

Written as separate operations, an update costs more than its arithmetic: a full-size tensor for what it adds to the
output and one for what it adds to the gradient of the input, each written and read once more, and intermediates that
are kept until the backward pass. Here both are added in place, into the output and the gradient that the base operation
has just made, and only the layer's input is kept; the intermediates, `r` channels wide, are computed again.

    forward     y = W ∗ x + b        h = x A        y += (K ∗ h) Bᵀ
    backward    gx = W ∗ᵀ g          gk = g B       gh, gK = …(gk, h)       gx += gh Aᵀ,  gA = xᵀ gh,  gB = gᵀ (K ∗ h)

`A`, `K`, `B` are what `contract.split` makes of core and factors for a route. The reference is
`operation.apply(x, W, b) + contract.contract(…)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florapeft.contract import Conv, ConvTranspose, Linear, Operation, Parts


def joined(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Parts],
    *,
    recompute: bool = False,
) -> Tensor:
    """`operation.apply(x, weight, bias)` plus the updates; `weight` and `bias` get no gradient.

    Args:
        operation: for which `can_join` holds.
        x: its input, in the dtype of the weight, or under autocast in any.
        weight: the frozen weight.
        bias: the frozen bias, or None.
        updates: at least one.
        recompute: keep nothing but `x` for the backward pass, and compute the intermediates again.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    tensors = [part if part is None else part.to(weight.dtype) for update in updates for part in update]
    with torch.autocast(device, enabled=False):
        return _Joined.apply(operation, recompute, x, weight, bias, *tensors)


def can_join(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `joined` computes this: no groups or unusual padding, plain frozen tensors, no functional transform.

    A compiler sees through the separate operations and joins them by itself.
    """
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(x.device.type):
        return False
    if isinstance(operation, Linear):
        plain = True
    elif isinstance(operation, Conv):
        plain = operation.groups == 1 and operation.padding_mode == "zeros" and not isinstance(operation.padding, str)
    else:
        plain = isinstance(operation, ConvTranspose) and operation.groups == 1
    dimensions = 0 if isinstance(operation, Linear) else len(operation.stride) + 2
    return (
        plain
        and x.ndim == (dimensions or max(x.ndim, 1))
        and x.numel() > 0
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not torch._C._are_functorch_transforms_active()
    )


_PLAIN = (Tensor, nn.Parameter)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operation: Operation, recompute: bool, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Any
    ) -> Tensor:
        given = x.to(weight.dtype)
        y = operation.apply(given, weight, bias)
        kept: list[Tensor | None] = []
        for entering, kernel, leaving in _triples(tensors):
            h = given if entering is None else _enter(operation, given, entering)
            k = operation.apply(h, kernel)
            if leaving is None:
                y += k
            else:
                _add_product(operation, y, k, leaving)
            if not recompute:
                kept += [None if entering is None else h, None if leaving is None else k]
        ctx.operation, ctx.recompute = operation, recompute
        ctx.save_for_backward(x, weight, *tensors, *kept)
        # What a linear layer returns can be a view of a temporary, in which nobody could then write.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # Every step of it is an operation that autograd records, so that it can be differentiated again.
        operation, (x, weight, *tensors) = ctx.operation, ctx.saved_tensors
        needs_x = ctx.needs_input_grad[2]
        # Differentiating again needs to know how the intermediates were made.
        recompute = ctx.recompute or torch.is_grad_enabled()
        count = len(tensors) if ctx.recompute else 3 * len(tensors) // 5
        tensors, kept = tensors[:count], tensors[count:]
        with torch.autocast(x.device.type, enabled=False):
            given = x.to(weight.dtype)
            for_x = operation.input_gradient(gradient, given, weight) if needs_x else None
            results: list[Tensor | None] = []
            for i, (entering, kernel, leaving) in enumerate(_triples(tensors)):
                h, k = (None, None) if recompute else kept[2 * i : 2 * i + 2]
                if h is None:
                    h = given if entering is None else _enter(operation, given, entering)
                for_leaving, for_k = None, gradient
                if leaving is not None:
                    for_leaving = _cross(operation, gradient, operation.apply(h, kernel) if k is None else k)
                    for_k = _enter(operation, gradient, leaving)
                for_h, for_kernel = operation.gradients(for_k, h, kernel, needs_x or entering is not None)
                for_entering = None
                if entering is not None:
                    for_entering = _cross(operation, given, for_h)
                    if needs_x:
                        _add_product(operation, for_x, for_h, entering)
                elif needs_x:
                    for_x += for_h
                results += [for_entering, for_kernel, for_leaving]
        return (None, None, None if for_x is None else for_x.to(x.dtype), None, None, *results)


def _triples(tensors: Sequence[Any]) -> list[tuple[Tensor | None, Tensor, Tensor | None]]:
    return [tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def _enter(operation: Operation, x: Tensor, matrix: Tensor) -> Tensor:
    """`x` with its channels multiplied by `matrix` `(d, r)`. Images come out channels-last, as small kernels need."""
    if isinstance(operation, Linear):
        return x @ matrix
    if _channels_last(x):
        return _pointwise(x, matrix.mT)
    h = torch.bmm(matrix.mT.expand(len(x), *matrix.mT.shape), x.flatten(2))
    return h.mT.contiguous().unflatten(1, x.shape[2:]).movedim(-1, 1)


def _add_product(operation: Operation, y: Tensor, h: Tensor, matrix: Tensor) -> None:
    """`y += h · matrixᵀ` over the channels, in place, for `matrix` of shape `(d, r)`."""
    if isinstance(operation, Linear):
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), matrix.mT)
    elif y.is_contiguous():
        y.flatten(2).baddbmm_(matrix.expand(len(y), *matrix.shape), h.flatten(2))
    elif _channels_last(y):
        y.movedim(1, -1).view(-1, y.shape[1]).addmm_(h.movedim(1, -1).reshape(-1, h.shape[1]), matrix.mT)
    else:
        y += _pointwise(h, matrix)


def _cross(operation: Operation, wide: Tensor, narrow: Tensor) -> Tensor:
    """`Σ wide ⊗ narrow` over all positions: `(d, r)`."""
    if isinstance(operation, Linear):
        return wide.reshape(-1, wide.shape[-1]).mT @ narrow.reshape(-1, narrow.shape[-1])
    # That is the gradient of a pointwise convolution's weight, for which there is a faster function than a product.
    ones = (1,) * (wide.ndim - 2)
    kernel = wide.new_empty(narrow.shape[1], wide.shape[1], *ones)
    _, gradient = Conv(ones, (0,) * len(ones), ones, 1, "zeros", ()).gradients(narrow, wide, kernel, False)
    return gradient.flatten(1).mT


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """A 1 x … x 1 convolution by `matrix` `(out, in)`."""
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return convolution(x, matrix.reshape(*matrix.shape, *(1,) * (x.ndim - 2)))
