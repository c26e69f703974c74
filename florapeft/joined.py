"""A frozen layer and its updates as one step of autograd.

Written as separate operations, an update costs more than its arithmetic: a full-size tensor for what it adds to the
output and one for what it adds to the gradient of the input, each written and read once more, and intermediates that
are kept until the backward pass. Here both are added in place, into the output and the gradient that the base operation
has just made; kept are the layer's input and, unless it is to be computed again, one intermediate, `r` channels wide.

    forward     y = W ∗ x + b        h = x A        y += (K ∗ h) Bᵀ
    backward    gx = W ∗ᵀ g          gk = g B       gh, gK = …(gk, h)       gx += gh Aᵀ,  gA = xᵀ gh,  gB = gᵀ (K ∗ h)

`A`, `K`, `B` are what `contract.split` makes of core and factors for a route. Where the weight is small against the
data, even these additions cost more than the sum of the weights, made once for the forward and once for the backward:

    forward     y = (W + dW) ∗ x + b
    backward    gx = (W + dW) ∗ᵀ g,  and the gradients of A, K, B as above, with h = x A made here

The reference of both is `operation.apply(x, W, b) + contract.contract(…)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from florapeft.contract import Conv, ConvTranspose, Linear, Operation, Parts, pointwise, seen, without_autocast


def joined(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Parts],
    *,
    masks: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
    summed: bool = False,
) -> Tensor:
    """`operation.apply(x, weight, bias)` plus the updates; `weight` and `bias` get no gradient.

    Args:
        operation: for which `can_join` holds; if it has groups, with updates whose middle is all of dW.
        x: its input, in the dtype of the weight, or under autocast in any but float64, which it leaves alone.
        weight: the frozen weight.
        bias: the frozen bias, or None.
        updates: at least one.
        masks: which entries of `x` an update sees, bool and shaped like it, for each update; None for all entries.
        recompute: keep nothing but `x`, and masks, for the backward pass.
        summed: compute with W + dW, in the precision of the weight, dW being the sum of the updates without a mask;
            nothing but `x` and masks is kept then.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(device):
        linear = isinstance(operation, Linear)
        tensors: list[Tensor | None] = []
        for update, mask in zip(updates, masks or [None] * len(updates), strict=True):
            own = _two_matrices(operation, update) if linear else _without_middle(operation, update, weight)
            tensors += [*(None if tensor is None else tensor.to(weight.dtype) for tensor in own), mask]
        function = _JoinedLinear if linear else _JoinedConvolution
        return function.apply(operation, recompute, summed, x, weight, bias, *tensors)


def _two_matrices(operation: Linear, update: Parts) -> tuple[Tensor, Tensor | None]:
    """A linear update as `(d_in, r)` and `(d_out, r)`, the core in the smaller of them; or as `(d_in, d_out)`."""
    entering, kernel, leaving = update
    kernel = kernel if operation.input_mode == 1 else kernel.mT  # (output, input)
    if entering is None:
        return kernel.mT, leaving
    if leaving is None:
        return entering, kernel
    if len(entering) < len(leaving):
        return entering @ kernel.mT, leaving
    return entering, leaving @ kernel


def _without_middle(operation: Operation, update: Parts, weight: Tensor) -> tuple[Tensor | None, ...]:
    """A pointwise convolution's update with the core folded into the input factor: there is nothing in the middle."""
    entering, kernel, leaving = update
    pointwise = isinstance(operation, Conv) and prod(weight.shape[2:]) == 1 and not any(operation.padding)
    if not pointwise or entering is None or leaving is None:
        return update
    return entering @ kernel.flatten(1).mT, None, leaving


def can_join(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `joined` computes this: no unusual padding, plain tensors, frozen or without gradients, no transform.

    A compiler sees through the separate operations and joins them by itself; what `torch.jit.trace` records must not
    call Python, and forward-mode differentiation needs a formula of its own.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if x.is_nested or not torch.amp.is_autocast_available(x.device.type):
        return False
    if isinstance(operation, Linear):
        plain = True
    elif isinstance(operation, Conv):
        plain = operation.padding_mode == "zeros" and not isinstance(operation.padding, str)
    else:
        plain = isinstance(operation, ConvTranspose)
    dimensions = 0 if isinstance(operation, Linear) else len(operation.stride) + 2
    double = torch.float64 in (x.dtype, weight.dtype)
    return (
        plain
        and x.ndim == (dimensions or max(x.ndim, 1))
        and x.numel() > 0
        and (x.dtype == weight.dtype or (torch.is_autocast_enabled(x.device.type) and not double))
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias)))
        and not torch._C._are_functorch_transforms_active()
    )


_PLAIN = (Tensor, nn.Parameter)


class _JoinedLinear(torch.autograd.Function):
    """With narrow matrices it matters to a CPU which operand is transposed: the narrow one comes first throughout."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Linear,
        recompute: bool,
        summed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        given = x.to(weight.dtype)
        updates = _groups(tensors, 3)
        y = operation.apply(given, _sum_of_linear(operation, weight, updates) if summed else weight, bias).contiguous()
        rows = given.reshape(-1, given.shape[-1])
        kept = []
        for first, second, mask in _added(updates, summed):
            h = first.mT @ _masked(rows, mask).mT  # (r, positions)
            if second is None:
                y.view(-1, y.shape[-1]).add_(h.mT)
            else:
                y.view(-1, y.shape[-1]).addmm_(h.mT, second.mT)
            kept.append(None if second is None else h)
        ctx.operation, ctx.recompute, ctx.summed = operation, recompute or summed, summed
        ctx.save_for_backward(x, weight, *tensors, *(() if ctx.recompute else kept))
        # What a linear layer returns can be a view of a temporary, in which nobody could then write.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # Every step of it is an operation that autograd records, so that it can be differentiated again.
        operation, (x, weight, *tensors) = ctx.operation, ctx.saved_tensors
        tensors, kept = _and_kept(tensors, ctx.recompute, 3)
        updates, needs_x = _groups(tensors, 3), ctx.needs_input_grad[3]
        with without_autocast(x.device.type):
            rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
            gradient = gradient.reshape(-1, gradient.shape[-1])
            if ctx.summed and needs_x:
                weight = _sum_of_linear(operation, weight, updates)
            for_x = operation.input_gradient(gradient, rows, weight) if needs_x else None
            results = []
            for (first, second, mask), h in zip(updates, kept, strict=True):
                seen_rows = _masked(rows, mask)
                for_h, for_second = gradient.mT, None
                if second is not None:
                    for_second = (first.mT @ seen_rows.mT if h is None else h) @ gradient
                    for_h = second.mT @ gradient.mT
                results += [(for_h @ seen_rows).mT, None if for_second is None else for_second.mT, None]
                if needs_x and mask is not None:
                    for_x += _masked(for_h.mT @ first.mT, mask)
                elif needs_x and not ctx.summed:
                    for_x.addmm_(for_h.mT, first.mT)
        return (None, None, None, for_x.view(x.shape).to(x.dtype) if needs_x else None, None, None, *results)


class _JoinedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operation: Conv,
        recompute: bool,
        summed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        given = x.to(weight.dtype)
        updates = _groups(tensors, 4)
        y = operation.apply(given, _sum_of_convolution(operation, weight, updates) if summed else weight, bias)
        ctx.operation, ctx.recompute, ctx.summed = operation, recompute or summed, summed
        kept, added = [], _added(updates, summed)
        if added:
            outer, (operation, given) = operation, _seen(operation, given, weight)
        for entering, kernel, leaving, mask in added:
            h = _masked(given, mask if mask is None else seen(outer, mask, weight.shape)[1])
            h = h if entering is None else _enter(h, entering)
            k = h if kernel is None else operation.apply(h, kernel)
            if leaving is None:
                y += k
            else:
                _add_product(y, k, leaving)
            # Of the two small intermediates one is kept, from which the other is soon made.
            kept.append(h if entering is not None else k if leaving is not None else None)
        ctx.save_for_backward(x, weight, *tensors, *(() if ctx.recompute else kept))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        operation, (x, weight, *tensors) = ctx.operation, ctx.saved_tensors
        tensors, kept = _and_kept(tensors, ctx.recompute, 4)
        updates, needs_x = _groups(tensors, 4), ctx.needs_input_grad[3]
        with without_autocast(x.device.type):
            given = x.to(weight.dtype)
            if ctx.summed and needs_x:
                weight = _sum_of_convolution(operation, weight, updates)
            for_x = operation.input_gradient(gradient, given, weight) if needs_x else None
            target = seen(operation, for_x, weight.shape)[1] if needs_x else None
            outer, (operation, given) = operation, _seen(operation, given, weight)
            results: list[Tensor | None] = []
            for (entering, kernel, leaving, mask), intermediate in zip(updates, kept, strict=True):
                adds = needs_x and (mask is not None or not ctx.summed)
                mask = mask if mask is None else seen(outer, mask, weight.shape)[1]
                part = _masked(given, mask)
                if entering is None:
                    h, k = part, intermediate
                else:
                    h, k = _enter(part, entering) if intermediate is None else intermediate, None
                for_leaving, for_k = None, gradient
                if leaving is not None:
                    k = h if kernel is None else operation.apply(h, kernel) if k is None else k
                    for_leaving = _cross(gradient, k)
                    for_k = _enter(gradient, leaving)
                for_h, for_kernel = for_k, None
                if kernel is not None:
                    for_h, for_kernel = operation.gradients(for_k, h, kernel, adds or entering is not None)
                for_entering = None if entering is None else _cross(part, for_h)
                if adds and entering is not None and mask is None:
                    _add_product(target, for_h, entering)
                elif adds:
                    for_part = for_h if entering is None else pointwise(for_h, entering, for_h.ndim - 2)
                    target += _masked(for_part, mask)
                results += [for_entering, for_kernel, for_leaving, None]
        return (None, None, None, for_x.to(x.dtype) if needs_x else None, None, None, *results)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.reshape(x.shape)


def _sum_of_linear(operation: Linear, weight: Tensor, updates: Sequence[tuple[Any, ...]]) -> Tensor:
    for first, second, mask in updates:
        if mask is not None:
            continue
        if second is None:
            weight = weight + (first.mT if operation.output_mode == 0 else first)
        else:
            rows, columns = (second, first) if operation.output_mode == 0 else (first, second)
            weight = torch.addmm(weight, rows, columns.mT)
    return weight


def _sum_of_convolution(operation: Conv, weight: Tensor, updates: Sequence[tuple[Any, ...]]) -> Tensor:
    """W + dW in W's memory format, every dW added by one product of matrices."""
    channels_last = _channels_last(weight)
    total = weight.movedim(1, -1) if channels_last else weight.contiguous()
    shape, total = total.shape, total.flatten(1)
    for entering, kernel, leaving, mask in updates:
        if mask is not None:
            continue
        first, second = (leaving, entering) if operation.output_mode == 0 else (entering, leaving)
        if kernel is None:
            total = torch.addmm(total, first, second.mT)
            continue
        columns = kernel.movedim(1, -1) if channels_last else kernel.flatten(2)
        # Not by `@` over three axes: without gradients it rounds otherwise, and a reloaded adapter must be equal.
        if second is not None and channels_last:
            columns = columns.reshape(-1, columns.shape[-1]) @ second.mT
        elif second is not None:
            columns = torch.bmm(second.expand(len(columns), *second.shape), columns)
        columns = columns.reshape(len(kernel), -1)
        total = total + columns if first is None else torch.addmm(total, first, columns)
    total = total.view(shape)
    return total.movedim(-1, 1) if channels_last else total


def _seen(operation: Conv, x: Tensor, weight: Tensor) -> tuple[Conv, Tensor]:
    inner, part = seen(operation, x, weight.shape)
    return inner, part if part is x else part.clone()  # dense again, in the same memory format


def _added(updates: Sequence[tuple[Any, ...]], summed: bool) -> list[tuple[Any, ...]]:
    """Those that are not part of W + dW."""
    return [update for update in updates if not summed or update[-1] is not None]


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
