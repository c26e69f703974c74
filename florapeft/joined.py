"""A frozen layer and its updates as one step of autograd.

Written as separate operations, an update costs more than its arithmetic: a full-size tensor for what it adds to the
output and one for what it adds to the gradient of the input, each written and read once more, and intermediates that
are kept until the backward pass. Here both are added in place, into the output and the gradient that the base operation
has just made; kept are the layer's input and, unless it is to be computed again, one intermediate, `r` channels wide.

    forward     y = W ∗ x + b        h = x A        y += (K ∗ h) Bᵀ
    backward    gx = W ∗ᵀ g          gk = g B       gh, gK = …(gk, h)       gx += gh Aᵀ,  gA = xᵀ gh,  gB = gᵀ (K ∗ h)

`A`, `K`, `B` are what `contract.split` makes of core and factors for a route. The reference is
`operation.apply(x, W, b) + contract.contract(…)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from florapeft.contract import Conv, ConvTranspose, Linear, Operation, Parts, pointwise, seen


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
        recompute: keep nothing but `x` for the backward pass.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        linear = isinstance(operation, Linear)
        groups = [_two_matrices(operation, update) if linear else update for update in updates]
        tensors = [None if tensor is None else tensor.to(weight.dtype) for group in groups for tensor in group]
        function = _JoinedLinear if linear else _JoinedConvolution
        return function.apply(operation, recompute, x, weight, bias, *tensors)


def _two_matrices(operation: Linear, update: Parts) -> tuple[Tensor, Tensor]:
    """A linear update as `(d_in, r)` and `(d_out, r)`, the core in the smaller of them."""
    entering, kernel, leaving = update
    kernel = kernel if operation.input_mode == 1 else kernel.mT  # (output, input)
    if leaving is None and entering is None:
        leaving = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    if entering is None:
        return kernel.mT, leaving
    if leaving is None:
        return entering, kernel
    if len(entering) < len(leaving):
        return entering @ kernel.mT, leaving
    return entering, leaving @ kernel


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


class _JoinedLinear(torch.autograd.Function):
    """With narrow matrices it matters to a CPU which operand is transposed: the narrow one comes first throughout."""

    @staticmethod
    def forward(
        ctx: Any, operation: Linear, recompute: bool, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        given = x.to(weight.dtype)
        y = operation.apply(given, weight, bias).contiguous()
        rows = given.reshape(-1, given.shape[-1])
        kept = []
        for first, second in _groups(tensors, 2):
            h = first.mT @ rows.mT  # (r, positions)
            y.view(-1, y.shape[-1]).addmm_(h.mT, second.mT)
            kept.append(h)
        ctx.operation, ctx.recompute = operation, recompute
        ctx.save_for_backward(x, weight, *tensors, *(() if recompute else kept))
        # What a linear layer returns can be a view of a temporary, in which nobody could then write.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # Every step of it is an operation that autograd records, so that it can be differentiated again.
        operation, (x, weight, *tensors) = ctx.operation, ctx.saved_tensors
        tensors, kept = _and_kept(tensors, ctx.recompute, 2)
        needs_x = ctx.needs_input_grad[2]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
            gradient = gradient.reshape(-1, gradient.shape[-1])
            for_x = operation.input_gradient(gradient, rows, weight) if needs_x else None
            results = []
            for (first, second), h in zip(_groups(tensors, 2), kept, strict=True):
                h = first.mT @ rows.mT if h is None else h
                for_h = second.mT @ gradient.mT
                results += [(for_h @ rows).mT, (h @ gradient).mT]
                if needs_x:
                    for_x.addmm_(for_h.mT, first.mT)
        return (None, None, for_x.view(x.shape).to(x.dtype) if needs_x else None, None, None, *results)


class _JoinedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operation: Conv, recompute: bool, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Any
    ) -> Tensor:
        given = x.to(weight.dtype)
        y = operation.apply(given, weight, bias)
        ctx.operation, ctx.recompute = operation, recompute
        operation, given = _seen(operation, given, weight)
        kept = []
        for entering, kernel, leaving in _groups(tensors, 3):
            h = given if entering is None else _enter(given, entering)
            k = operation.apply(h, kernel)
            if leaving is None:
                y += k
            else:
                _add_product(y, k, leaving)
            # Of the two small intermediates one is kept, from which the other is soon made.
            kept.append(k if entering is None else h)
        ctx.save_for_backward(x, weight, *tensors, *(() if recompute else kept))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        operation, (x, weight, *tensors) = ctx.operation, ctx.saved_tensors
        tensors, kept = _and_kept(tensors, ctx.recompute, 3)
        needs_x = ctx.needs_input_grad[2]
        with torch.autocast(x.device.type, enabled=False):
            given = x.to(weight.dtype)
            for_x = operation.input_gradient(gradient, given, weight) if needs_x else None
            target = seen(operation, for_x, weight.shape)[1] if needs_x else None
            operation, given = _seen(operation, given, weight)
            results: list[Tensor | None] = []
            for (entering, kernel, leaving), intermediate in zip(_groups(tensors, 3), kept, strict=True):
                if entering is None:
                    h, k = given, intermediate
                else:
                    h, k = _enter(given, entering) if intermediate is None else intermediate, None
                for_leaving, for_k = None, gradient
                if leaving is not None:
                    for_leaving = _cross(gradient, operation.apply(h, kernel) if k is None else k)
                    for_k = _enter(gradient, leaving)
                for_h, for_kernel = operation.gradients(for_k, h, kernel, needs_x or entering is not None)
                for_entering = None
                if entering is not None:
                    for_entering = _cross(given, for_h)
                    if needs_x:
                        _add_product(target, for_h, entering)
                elif needs_x:
                    target += for_h
                results += [for_entering, for_kernel, for_leaving]
        return (None, None, for_x.to(x.dtype) if needs_x else None, None, None, *results)


def _seen(operation: Conv, x: Tensor, weight: Tensor) -> tuple[Conv, Tensor]:
    inner, part = seen(operation, x, weight.shape)
    return inner, part if part is x else part.clone()  # dense again, in the same memory format


def _groups(tensors: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    return [tuple(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _and_kept(tensors: Sequence[Any], recompute: bool, size: int) -> tuple[Sequence[Any], Sequence[Tensor | None]]:
    """The updates' own tensors, `size` of each, and for each the intermediate that was kept, or None.

    Differentiating again needs to know how the intermediates were made.
    """
    count = len(tensors) // (size if recompute else size + 1)
    own, kept = tensors[: size * count], tensors[size * count :]
    return own, [None] * count if recompute or torch.is_grad_enabled() else kept


def _enter(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` with its channels multiplied by `matrix` `(d, r)`; channels-last, which small kernels need."""
    if _channels_last(x):
        return pointwise(x, matrix.mT, x.ndim - 2)
    h = torch.bmm(matrix.mT.expand(len(x), *matrix.mT.shape), x.flatten(2))
    return h.mT.contiguous().unflatten(1, x.shape[2:]).movedim(-1, 1)


def _add_product(y: Tensor, h: Tensor, matrix: Tensor) -> None:
    """`y += h · matrixᵀ` over the channels, in place, for `matrix` of shape `(d, r)`."""
    if y.is_contiguous():
        y.flatten(2).baddbmm_(matrix.expand(len(y), *matrix.shape), h.flatten(2))
    elif _channels_last(y):
        y.movedim(1, -1).view(-1, y.shape[1]).addmm_(h.movedim(1, -1).reshape(-1, h.shape[1]), matrix.mT)
    else:
        y += pointwise(h, matrix, h.ndim - 2)


def _cross(wide: Tensor, narrow: Tensor) -> Tensor:
    """`Σ wide ⊗ narrow` over all positions: `(d, r)`; computed as a pointwise convolution's gradient, which is fast."""
    ones = (1,) * (wide.ndim - 2)
    kernel = wide.new_empty(narrow.shape[1], wide.shape[1], *ones)
    _, gradient = Conv(ones, (0,) * len(ones), ones, 1, "zeros", ()).gradients(narrow, wide, kernel, False)
    return gradient.flatten(1).mT


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
