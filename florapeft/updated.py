"""A weight with its updates, for code that computes with the weight itself instead of calling a layer.

Stacks of experts, `nn.MultiheadAttention`, routers and convolutions with a forward of their own read `self.weight`.
While they run, an `UpdatedWeight` stands in the weight's place. Products with it are computed as the sum of a product
with `W` and one with the update in its factored form, so that for a stack of experts nothing of dW's size exists:

    W (E, a, b)     core ×₀ U₀ → cores (E, r_a, r_b)     x @ W[e] + x @ dW[e],   dW[e] = U_a cores[e] U_bᵀ

Anything else that is asked of it is asked of the plain tensor `W + dW`, which is always right, and large.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florapeft.contract import expand, expand_exactly
from florapeft.tucker import Tucker


class Update(NamedTuple):
    """One adapter's update of the last two modes `(a, b)` of a weight, with cores for the modes before them.

    Attributes:
        cores: shape `(…, r_a, r_b)`, the scale included.
        left: factor `(a, r_a)`, or None where that mode is whole.
        right: factor `(b, r_b)`, or None.
        dropout: acts on what is multiplied with the update.
    """

    cores: Tensor
    left: Tensor | None
    right: Tensor | None
    dropout: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, tucker: Tucker, scale: float, dropout: Callable[[Tensor], Tensor]) -> Update:
        core, factors = tucker
        return cls(expand(Tucker(core, (*factors[:-2], None, None)), scale), factors[-2], factors[-1], dropout)

    def transposed(self) -> Update:
        return Update(self.cores.mT, self.right, self.left, self.dropout)

    def dense(self) -> Tensor:
        """Shape `(…, a, b)`, in at least float32."""
        batch = (None,) * (self.cores.ndim - 2)
        return expand_exactly(Tucker(self.cores, (*batch, self.left, self.right)), 1.0)

    def after(self, x: Tensor) -> Tensor:
        """`x @ dW` for `x` of shape `(…, n, a)`."""
        h = self.enter(x) @ self.cores.to(x.dtype)
        return h if self.right is None else h @ self.right.to(x.dtype).mT

    def after_grouped(self, x: Tensor, group: Tensor) -> Tensor:
        """`x[i] @ dW[group[i]]` for `x` of shape `(n, a)` and cores of shape `(groups, r_a, r_b)`."""
        h = torch.bmm(self.enter(x).unsqueeze(1), self.cores.to(x.dtype)[group]).squeeze(1)
        return h if self.right is None else h @ self.right.to(x.dtype).mT

    def enter(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return x if self.left is None else x @ self.left.to(x.dtype)


class UpdatedWeight:
    """`W + Σ dW` of order 2 or more, in a tensor's place; see the module's docstring.

    Args:
        weight: W, shape `(…, a, b)`.
        updates: one per active adapter.
    """

    def __init__(self, weight: Tensor, updates: Sequence[Update]) -> None:
        self.weight = weight
        self.updates = tuple(updates)

    def dense(self) -> Tensor:
        """The plain tensor `W + Σ dW`, in the dtype of `W`, rounded once."""
        total = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        for update in self.updates:
            total = total + update.dense()
        return total.to(self.weight.dtype)

    def transpose(self, first: int, second: int) -> Any:
        ndim = self.weight.ndim
        if {first % ndim, second % ndim} == {ndim - 2, ndim - 1}:
            return UpdatedWeight(self.weight.mT, [update.transposed() for update in self.updates])
        return self.dense().transpose(first, second)

    @property
    def mT(self) -> UpdatedWeight:  # noqa: N802, the tensor's own name for it
        return self.transpose(-2, -1)

    def t(self) -> Any:
        return self.transpose(0, 1)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.transpose(0, 1) if self.weight.ndim == 2 else self.dense().T

    def to(self, *args: Any, **kwargs: Any) -> UpdatedWeight:
        return UpdatedWeight(self.weight.to(*args, **kwargs), self.updates)

    def __getitem__(self, index: Any) -> Any:
        whole = isinstance(index, (int, slice)) or (isinstance(index, Tensor) and index.dtype != torch.bool)
        if whole and self.weight.ndim > 2:
            return UpdatedWeight(self.weight[index], [u._replace(cores=u.cores[index]) for u in self.updates])
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self.weight)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "updates") or name.startswith("__"):  # asked by whoever copies or pickles it
            raise AttributeError(name)
        return getattr(self.weight if name in _METADATA else self.dense(), name)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)

    __hash__ = object.__hash__  # a class with `__eq__` has none

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # transformers' own operator for grouped products is no attribute of torch to look up.
        own = getattr(func, "_qualified_op_name", None) == "transformers::grouped_mm_fallback"
        product = _grouped if own else _PRODUCTS.get(func)
        given = {name: value for name, value in kwargs.items() if value is not None}
        if product is not None and given.keys() <= {"bias", "offs"}:
            result = product(func, *args, **given)
            if result is not None:
                return result
        return func(*_dense(args), **_dense(kwargs))


def _of_dense(name: str) -> Callable[..., Any]:
    def operator(self: UpdatedWeight, *others: Any) -> Any:
        return getattr(self.dense(), name)(*others)

    return operator


# Python looks operators up in the class. Those that write into the weight are left out.
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_OF_ONE = ("neg", "pos", "abs", "bool", "int", "float")
for _name in (*_ARITHMETIC, *(f"r{_name}" for _name in _ARITHMETIC), *_COMPARISONS, *_OF_ONE, "contains"):
    setattr(UpdatedWeight, f"__{_name}__", _of_dense(f"__{_name}__"))


_METADATA = {"shape", "dtype", "device", "ndim", "layout", "size", "dim", "numel", "requires_grad", "data_ptr"}
_METADATA |= {"is_cuda", "is_meta", "is_floating_point", "element_size", "names", "is_sparse", "is_quantized"}


def _dense(value: Any) -> Any:
    if isinstance(value, UpdatedWeight):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    return {key: _dense(item) for key, item in value.items()} if isinstance(value, dict) else value


def _linear(func: Callable[..., Tensor], x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """`F.linear`: `x @ weightᵀ + bias`."""
    if not isinstance(weight, UpdatedWeight) or not isinstance(x, Tensor) or weight.weight.ndim != 2:
        return None
    return _add(func(x, weight.weight, bias), (update.transposed().after(x) for update in weight.updates))


def _matmul(func: Callable[..., Tensor], first: Any, second: Any) -> Tensor | None:
    """`x @ weight` or `weight @ x`, also batched."""
    if isinstance(first, Tensor) and isinstance(second, UpdatedWeight):
        return _add(func(first, second.weight), (update.after(first) for update in second.updates))
    if isinstance(first, UpdatedWeight) and isinstance(second, Tensor):
        turned = [update.transposed() for update in first.updates]  # (weight @ x)ᵀ = xᵀ @ weightᵀ
        if second.ndim == 1:
            return _add(func(first.weight, second), (update.after(second) for update in turned))
        return _add(func(first.weight, second), (update.after(second.mT).mT for update in turned))
    return None


def _grouped(func: Callable[..., Tensor], x: Any, weight: Any, offs: Any = None) -> Tensor | None:
    """`x[i] @ weight[g]` for rows sorted by their group g, which ends at row `offs[g]`."""
    if not (isinstance(x, Tensor) and isinstance(weight, UpdatedWeight)) or x.ndim != 2 or weight.weight.ndim != 3:
        return None
    if offs is None or any(update.left is None or update.right is None for update in weight.updates):
        return None  # the cores are then as wide as the weight: one product with the sum
    rows = torch.arange(len(x), device=x.device, dtype=offs.dtype)
    # Rows after the last group belong to no expert here; the base leaves them undefined too.
    group = torch.searchsorted(offs, rows, right=True).clamp(max=len(weight) - 1)
    return _add(func(x, weight.weight, offs=offs), (update.after_grouped(x, group) for update in weight.updates))


def _convolution(func: Callable[..., Tensor], x: Any, weight: Any, bias: Any = None, *args: Any) -> Tensor | None:
    """A convolution; with the sum of the weights, unless that would lose small updates or pass by their dropout."""
    if not (isinstance(x, Tensor) and isinstance(weight, UpdatedWeight)):
        return None
    exact = all(update.cores.dtype == weight.dtype for update in weight.updates)
    if exact and not any(isinstance(update.dropout, nn.Dropout) for update in weight.updates):
        return None
    return _add(
        func(x, weight.weight, bias, *args),
        (func(update.dropout(x), update.dense().to(x.dtype), None, *args) for update in weight.updates),
    )


def _add(result: Tensor, updates: Iterator[Tensor]) -> Tensor:
    for update in updates:
        result = result + update.to(result.dtype)
    return result


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
    Tensor.bmm: _matmul,
    torch._grouped_mm: _grouped,  # what F.grouped_mm calls
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
}


@contextmanager
def standing_in(places: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """While the context lasts, `module.name` is `value`; the module's parameters stay registered as they are.

    An instance's own attribute is found before nn.Module looks for a parameter of that name. FSDP puts one there, too.

    Threads that run one model at the same time all see the value that came last, so the same adapters must be active in
    all of them. When the last of them leaves, the module is as it was.
    """
    own = [(module, name, _Value(value)) for module, name, value in places]
    with _lock():
        for module, name, value in own:
            before = _Value(vars(module).get(name, _NOTHING))
            _STANDING.setdefault((id(module), name), [before]).append(value)
            vars(module)[name] = value.value
    try:
        yield
    finally:
        with _lock():
            for module, name, value in own:
                values = _STANDING[id(module), name]
                values.remove(value)
                if len(values) == 1:
                    del _STANDING[id(module), name]
                if values[-1].value is _NOTHING:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = values[-1].value


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """While the context lasts, these modules' own weights are there that accelerate keeps on the CPU or the disk.

    Its hook would bring them when a module is called, and would take what stands in for a weight for the weight.
    """
    away = [module for module in modules if _is_offloaded(module)]
    for module in away:
        module._hf_hook.pre_forward(module)
    try:
        with standing_in([(module, "forward", module._old_forward) for module in away]):
            yield
    finally:
        for module in away:
            module._hf_hook.post_forward(module, None)


def _is_offloaded(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False))


def standing_before(module: nn.Module, name: str) -> Any:
    """`module.name` as it is where nothing stands in for it."""
    with _lock():
        values = _STANDING.get((id(module), name))
        if values is None:
            return getattr(module, name)
        return nn.Module.__getattr__(module, name) if values[0].value is _NOTHING else values[0].value


def _lock() -> AbstractContextManager[Any]:
    # torch.compile knows no locks; what it has compiled does not come here again.
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


class _Value:
    """One context's value, told from an equal one of another context."""

    def __init__(self, value: Any) -> None:
        self.value = value


_NOTHING = object()
_LOCK = threading.Lock()
# By module and name: what was there before, and then what stands in, in the order of its coming.
_STANDING: dict[tuple[int, str], list[_Value]] = {}
