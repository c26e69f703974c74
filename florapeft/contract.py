"""How a Tucker update acts on an input, without building the update where that can be avoided.

An *operation* is a layer's linear map as a function of its weight: linear, convolution, transposed convolution,
embedding. All are linear in the weight, so with `dW = G ×₀ U₀ … ×ₙ₋₁ Uₙ₋₁` the update's output `op(x, dW)` factors into

    x ── input factor ──▶ r_in channels ── core, kernel factors folded in ──▶ r_out channels ── output factor ──▶ y

and only the middle step is the operation itself, with its stride, padding, dilation and padding mode. A *route* says
which of the two channel factors are folded into the core before the data meets it:

    factored        neither: three small steps
    input_folded    the input factor: two steps
    output_folded   the output factor: two steps
    dense           both: the plain formula, one operation with dW; the reference that the other routes must equal

For grouped convolutions the factors do not separate from the groups, so `dense` is their only route; their weights are
small. `choose_route` picks by the estimated cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from math import prod
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florapeft.tucker import Tucker, multi_mode_dot

Route = Literal["factored", "input_folded", "output_folded", "dense"]
ROUTES: tuple[str, ...] = get_args(Route)

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Linear(NamedTuple):
    """`y = x Wᵀ`, or `y = x W` where the weight is stored `(in, out)` as in transformers' `Conv1D`."""

    input_mode: int = 1
    groups: int = 1

    @property
    def output_mode(self) -> int:
        return 1 - self.input_mode

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(…, in) → (…, out)`."""
        if self.input_mode == 1:
            return F.linear(x, weight, bias)
        if bias is None:
            return x @ weight
        # As transformers computes it, so that a zero update leaves the output bit for bit.
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    def project_in(self, x: Tensor, factor: Tensor) -> Tensor:
        return F.linear(x, factor.mT)

    def project_out(self, x: Tensor, factor: Tensor) -> Tensor:
        return F.linear(x, factor)

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `apply` with regard to `x`, from that of its result."""
        return gradient @ (weight if self.input_mode == 1 else weight.mT)

    def positions(self, x: Tensor, weight_shape: Sequence[int]) -> tuple[float, float, float]:
        """How many vectors of channels the input, the middle step and the output have."""
        count = x.numel() / weight_shape[self.input_mode]
        return count, count, count


# What convolutions and transposed ones have in common. The gradients are for padding by zeros, given as numbers.
def _project_in(self: Conv | ConvTranspose, x: Tensor, factor: Tensor) -> Tensor:
    return pointwise(x, factor.mT, len(self.stride))


def _project_out(self: Conv | ConvTranspose, x: Tensor, factor: Tensor) -> Tensor:
    return pointwise(x, factor, len(self.stride))


def _input_gradient(self: Conv | ConvTranspose, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _convolution_gradients(self, gradient, x, weight, (True, False))[0]


def _gradients(
    self: Conv | ConvTranspose, gradient: Tensor, x: Tensor, weight: Tensor, for_x: bool
) -> tuple[Tensor | None, Tensor]:
    return _convolution_gradients(self, gradient, x, weight, (for_x, True))


class Conv(NamedTuple):
    """`nn.Conv1d/2d/3d` over its whole option space; weight `(out, in / groups, *kernel)`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    explicit_padding: tuple[int, ...]  # for F.pad, last axis first

    input_mode = 1
    output_mode = 0

    @classmethod
    def of(cls, module: nn.Module) -> Conv:
        return cls(
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
            tuple(module._reversed_padding_repeated_twice),
        )

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(…, in, *positions) → (…, out, *positions)`."""
        padding: tuple[int, ...] | str | int = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.explicit_padding, mode=self.padding_mode), 0
        return _CONV[len(self.stride)](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    project_in, project_out = _project_in, _project_out
    input_gradient, gradients = _input_gradient, _gradients

    def positions(self, x: Tensor, weight_shape: Sequence[int]) -> tuple[float, float, float]:
        before = x.numel() / (weight_shape[1] * self.groups)
        after = before / prod(self.stride)
        return (after if prod(weight_shape[2:]) == 1 else before), after, after


class ConvTranspose(NamedTuple):
    """`nn.ConvTranspose1d/2d/3d`; weight `(in, out / groups, *kernel)`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    input_mode = 0
    output_mode = 1

    @classmethod
    def of(cls, module: nn.Module, x: Tensor, output_size: Sequence[int] | None) -> ConvTranspose:
        output_padding = module._output_padding(
            x,
            None if output_size is None else list(output_size),
            module.stride,
            module.padding,
            module.kernel_size,
            len(module.stride),
            module.dilation,
        )
        return cls(module.stride, module.padding, tuple(output_padding), module.dilation, module.groups)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(…, in, *positions) → (…, out, *positions)`."""
        operation = _CONV_TRANSPOSE[len(self.stride)]
        return operation(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    project_in, project_out = _project_in, _project_out
    input_gradient, gradients = _input_gradient, _gradients

    def positions(self, x: Tensor, weight_shape: Sequence[int]) -> tuple[float, float, float]:
        before = x.numel() / weight_shape[0]
        return before, before, before * prod(self.stride)


class Embedding(NamedTuple):
    """A lookup, `y = onehot(x) W` with `W` of shape `(num, dim)`; the input factor is looked up, not multiplied."""

    input_mode = 0
    output_mode = 1
    groups = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(…)` of row numbers, or `(…, r_in)` of rows looked up before `→ (…, dim)`."""
        if x.is_floating_point():
            return x @ weight
        return F.embedding(x, weight)

    def project_in(self, x: Tensor, factor: Tensor) -> Tensor:
        return F.embedding(x, factor)

    def project_out(self, x: Tensor, factor: Tensor) -> Tensor:
        return F.linear(x, factor)

    def positions(self, x: Tensor, weight_shape: Sequence[int]) -> tuple[float, float, float]:
        return x.numel(), x.numel(), x.numel()


Operation = Linear | Conv | ConvTranspose | Embedding


class Parts(NamedTuple):
    """An update as three operations, of which the outer two may be missing.

    Attributes:
        entering: `(d_in, r_in)`, or None.
        kernel: the operation's weight in the middle.
        leaving: `(d_out, r_out)`, or None.
    """

    entering: Tensor | None
    kernel: Tensor
    leaving: Tensor | None


def contract(operation: Operation, tucker: Tucker, x: Tensor, *, route: str = "dense", scale: float = 1.0) -> Tensor:
    """`operation(x, scale · dW)` for the update `dW` that `tucker` stands for.

    Computed in the dtype of `x`: what is cast is the adapter's own small tensors, never the input. (Row numbers of an
    embedding have no such dtype; there the adapter's own is used.)

    Args:
        operation: the base layer's linear map.
        tucker: core and factors over the base weight's axes.
        x: the base layer's input.
        route: one of `ROUTES`. All agree to rounding; `dense` is the plain formula.
        scale: a multiplier of the update, applied to the core.

    Returns:
        The base layer's output shape, without bias.
    """
    operation, x = seen(operation, x, tucker.shape)
    entering, kernel, leaving = split(operation, tucker, route, scale)
    dtype = x.dtype if x.is_floating_point() else tucker.core.dtype
    if entering is not None:
        x = operation.project_in(x, entering.to(dtype))
    x = operation.apply(x, kernel.to(dtype))
    if leaving is not None:
        x = operation.project_out(x, leaving.to(dtype))
    return x


def seen(operation: Operation, x: Tensor, weight_shape: Sequence[int]) -> tuple[Operation, Tensor]:
    """The part of `x` that a strided pointwise convolution sees, and the operation without its stride; others as given.

    It saves work. And torch 2.13's gradient of such a convolution's weight, with few channels and channels-last, writes
    past the end of its memory on a CPU.
    """
    pointwise = isinstance(operation, Conv) and prod(weight_shape[2:]) == 1
    if not pointwise or prod(operation.stride) == 1 or set(operation.padding) not in ({0}, set("valid")):
        return operation, x
    positions = (..., *(slice(None, None, stride) for stride in operation.stride))
    return operation._replace(stride=(1,) * len(operation.stride)), x[positions]


def split(operation: Operation, tucker: Tucker, route: str, scale: float) -> Parts:
    """The update as what a route computes: input factor, the operation's weight in the middle, output factor."""
    core, factors = tucker
    source, target = operation.input_mode, operation.output_mode
    entering = leaving = None
    folded = list(factors)
    if operation.groups == 1:
        if route in ("factored", "output_folded"):
            entering, folded[source] = factors[source], None
        if route in ("factored", "input_folded"):
            leaving, folded[target] = factors[target], None
    return Parts(entering, expand(Tucker(core, tuple(folded)), scale), leaving)


def expand(tucker: Tucker, scale: float) -> Tensor:
    """`scale ·` the tensor that `tucker` stands for; autocast, whose rounding would stay in it, is off."""
    core, factors = tucker
    with without_autocast(core.device.type):
        return multi_mode_dot(core if scale == 1.0 else core * scale, factors)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Autocast off, if it is on for this kind of device: to enter its context costs as much as a small operation."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def expand_exactly(tucker: Tucker, scale: float) -> Tensor:
    """As `expand`, in at least float32."""
    dtype = torch.promote_types(tucker.core.dtype, torch.float32)
    factors = tuple(None if factor is None else factor.to(dtype) for factor in tucker.factors)
    return expand(Tucker(tucker.core.to(dtype), factors), scale)


def choose_route(operation: Operation, shape: Sequence[int], rank: Sequence[int], x: Tensor, *, fused: bool) -> str:
    """The route with the least estimated cost for this input.

    Cost is counted in multiply-adds of one training step (forward, gradient of the input, gradient of the weight) plus
    `_TRAFFIC` for every activation written; in a convolution those with few channels count once per spatial axis, so
    much slower they run. `dense` is considered only where the weight has fewer entries than the input, so that building
    and keeping dW stays small against the data. Fitted to the layers of `benchmarks/networks.py` on a CPU.

    It is `factored`, without a cost to estimate, for a nested input, which has no size, and where a graph is recorded
    that will run with inputs of other sizes.

    Args:
        operation: the base layer's linear map.
        shape: the base weight's shape.
        rank: the update's multilinear rank.
        x: the base layer's input.
        fused: whether `dense` can run as the base operation itself with W + dW, which then costs only the gradient
            of the weight.
    """
    if operation.groups > 1:
        return "dense"
    if x.is_nested or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "factored"
    source, target = operation.input_mode, operation.output_mode
    d_in, d_out, r_in, r_out = shape[source], shape[target], rank[source], rank[target]
    kernel = prod(shape) // (d_in * d_out)
    before, middle, after = operation.positions(x, shape)

    def step(count: float, fan_in: int, fan_out: int, written: float) -> float:
        return narrow * (3 * count * fan_in * fan_out + _TRAFFIC * written * fan_out)

    narrow = 1.0 if isinstance(operation, (Linear, Embedding)) else float(len(operation.stride))
    entering = 0.0 if r_in == d_in else step(before, d_in, r_in, before)
    leaving = 0.0 if r_out == d_out else step(after, r_out, d_out, after)
    fold_in = 0.0 if r_in == d_in else 3.0 * kernel * d_in * r_in * r_out
    fold_out = 0.0 if r_out == d_out else 3.0 * kernel * r_in * r_out * d_out
    costs = {
        "factored": entering + step(middle * kernel, r_in, r_out, middle / kernel) + leaving,
        "input_folded": fold_in + step(middle * kernel, d_in, r_out, middle / kernel) + leaving,
        "output_folded": entering + fold_out + step(middle * kernel, r_in, d_out, middle / kernel),
    }
    if prod(shape) <= x.numel():
        build = fold_in + (0.0 if r_out == d_out else 3.0 * kernel * d_in * r_out * d_out)
        operate = middle * kernel * d_in * d_out
        costs["dense"] = build + (operate if fused else 3 * operate + _TRAFFIC * middle * d_out)
    best = "factored"
    for route in costs:  # not `min` with a key, at which torch.compile breaks the graph when sizes are symbolic
        if costs[route] < costs[best]:
            best = route
    return best


def sum_pays(operation: Operation, shape: Sequence[int], x: Tensor) -> bool:
    """Whether W + dW is cheaper to make than to do without: where W is smaller than the layer's input and output.

    They are what an update is otherwise added to, output by output and gradient by gradient.
    """
    _, _, after = operation.positions(x, shape)
    return prod(shape) <= x.numel() + after * shape[operation.output_mode]


# What writing one activation costs, in multiply-adds: small channel counts are bound by memory, not by arithmetic.
_TRAFFIC = 32.0


def _convolution_gradients(
    operation: Conv | ConvTranspose, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `x` and `weight`."""
    if wanted[1] and _is_large_depthwise(operation, weight):
        for_x = _torch_gradients(operation, gradient, x, weight, (True, False))[0] if wanted[0] else None
        return for_x, _depthwise_gradient(operation, gradient, x, weight)
    return _torch_gradients(operation, gradient, x, weight, wanted)


def _torch_gradients(
    operation: Conv | ConvTranspose, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `x` and `weight`, by torch's own function for it."""
    transposed = isinstance(operation, ConvTranspose)
    output_padding = operation.output_padding if transposed else (0,) * len(operation.stride)
    for_x, for_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, operation.stride, operation.padding, operation.dilation, transposed,
        output_padding, operation.groups, (*wanted, False),
    )  # fmt: skip
    return for_x, for_weight


def _is_large_depthwise(operation: Conv | ConvTranspose, weight: Tensor) -> bool:
    depthwise = operation.groups == weight.shape[0] > 1 == weight.shape[1]
    large = weight.ndim == 4 and min(weight.shape[2:]) >= 5
    return isinstance(operation, Conv) and depthwise and large and weight.device.type == "cpu"


def _depthwise_gradient(operation: Conv, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a large depthwise kernel, channels-last, where a CPU is at least twice as fast.

    For small images tap by tap: torch's own function takes several times as long there, and memory for its parts.
    """
    gradient, x = (t.contiguous(memory_format=torch.channels_last) for t in (gradient, x))
    sizes, kernel = gradient.shape[2:], weight.shape[2:]
    if max(sizes) > 2 * max(kernel):
        return _torch_gradients(operation, gradient, x, weight, (False, True))[1]
    gradient, padding = gradient.movedim(1, -1), operation.padding
    x = F.pad(x.movedim(1, -1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    taps = []
    for tap in product(*map(range, kernel)):
        starts = (i * d for i, d in zip(tap, operation.dilation, strict=True))
        rows, columns = (
            slice(start, start + stride * (size - 1) + 1, stride)
            for start, stride, size in zip(starts, operation.stride, sizes, strict=True)
        )
        taps.append((x[:, rows, columns] * gradient).sum((0, 1, 2)))
    return torch.stack(taps, 1).view(weight.shape)


def pointwise(x: Tensor, matrix: Tensor, spatial: int) -> Tensor:
    """A 1 x … x 1 convolution: `matrix` `(out, in)` applied to the channels at every position."""
    return _CONV[spatial](x, matrix.reshape(*matrix.shape, *(1,) * spatial))
