"""The kinds of layers that are adapted: which operation each computes with its weight."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import Conv1D
from peft.utils import quantization_extra_repr
from peft.utils.quantization_utils import TorchaoBackend
from torch import Tensor, nn

from florapeft import contract
from florapeft.config import FloraConfig
from florapeft.contract import split
from florapeft.init import initialize
from florapeft.joined import can_join, joined
from florapeft.layer import (
    FloraLayer,
    check_samples,
    parameter_shape,
    quantization_backend,
    samples_of,
    weight_of,
)
from florapeft.tensors import adapter_tensors, as_tucker
from florapeft.tucker import Tucker
from florapeft.updated import Update, UpdatedWeight, loaded, standing_in


class WeightLayer(FloraLayer):
    """A layer that is one operation with its `weight`; arguments as for every `FloraLayer`."""

    # Forward functions of the torch classes whose output is bias + operation(x, weight) and nothing else.
    plain_forwards: ClassVar[tuple[Any, ...]] = ()
    lookup: ClassVar[bool] = False  # whether the input factor is looked up row by row

    def __init__(self, base_layer: nn.Module, adapter_name: str, model: nn.Module) -> None:
        super().__init__(base_layer, adapter_name, model)
        base = self.get_base_layer()
        self._own_forward = has_own_forward(base)
        modes, self._shape = self.modes_of(base), weight_shape(base)
        # Under the names that PEFT and its users look for.
        self.in_features, self.out_features = self._shape[modes[0]], self._shape[modes[1]]

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        """Input and output mode of the weight of such a layer."""
        raise NotImplementedError

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Operation:
        """The base layer's linear map, with the settings that the base layer has now, for these arguments."""
        raise NotImplementedError

    def update_layer(
        self, adapter_name: str, weight_name: str, rank: Sequence[int], config: FloraConfig, scale: float
    ) -> None:
        core, factors = adapter_tensors(self._shape, rank)
        self.flora_core[adapter_name], self.flora_factors[adapter_name] = core, factors
        input_mode, output_mode = self.modes_of(self.get_base_layer())
        tucker, start = as_tucker(core, factors), config.init_weights
        initialize(tucker, start, input_mode=input_mode, output_mode=output_mode, lookup=self.lookup)
        self.start_adapter(adapter_name, config, scale)

    def tucker(self, adapter_name: str) -> Tucker:
        """The adapter's core and factors (the parameters themselves, not copies), without its scale."""
        return as_tucker(self.flora_core[adapter_name], self.flora_factors[adapter_name])

    def tuckers(self, adapter_name: str) -> dict[str, Tucker]:
        return {"weight": self.tucker(adapter_name)}

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`scale · dW` in the base weight's shape, in at least float32, on the adapter's device."""
        return self.delta_weights(adapter_name)["weight"]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; with the updates for a parent that reads it to compute with it."""
        self.unmerge_if_disabled()
        return self.summed("weight", self.acting()) if self.is_read else super().weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in every layer; the input may be given by its name in the base layer's own forward."""
        if not args:
            first = next(iter(inspect.signature(self.get_base_layer().forward).parameters))
            args = (kwargs.pop(first),)
        return super().forward(*args, **kwargs)

    def adapted_forward(self, active: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._own_forward:  # whatever it does with its weight, it does with W + dW
            with self.updated(active):
                return self.base_layer(x, *args, **kwargs)
        operation = self.operation(x, *args, **kwargs)
        routes = {name: self._choose_route(name, operation, x) for name in active}
        base, can_sum = self.get_base_layer(), [name for name in active if self._can_sum(name)]
        if self._is_plain() and can_join(operation, x, base.weight, base.bias):
            pays = contract.sum_pays(operation, self._shape, x) or "dense" in routes.values()
            masks = [self._mask(name, x) for name in active]
            parts = [split(operation, self.tucker(name), routes[name], self._masked_scale(name)) for name in active]
            exact = all(name in can_sum or self._drops(name) for name in active)
            way = {"recompute": self.recompute, "summed": pays and exact}
            return joined(operation, x, base.weight, base.bias, parts, masks=masks, **way)
        others = [name for name in active if name not in can_sum or routes[name] != "dense"]
        if len(others) < len(active):
            # The sum keeps the first operand's memory format: the base weight's.
            weight = self.summed("weight", [name for name in active if name not in others])
            result = operation.apply(x, weight, base.bias)
        else:
            result = self._base_result(x, *args, **kwargs)
        for name in others:
            result = result + self._update(name, operation, x, routes[name]).to(result.dtype)
        return result

    def mixed_forward(self, adapter_names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        count = len(adapter_names)
        x = _repeated(x, count)
        check_samples(x, adapter_names)
        result = _repeated(self._base_result(x, *args, **kwargs), count)
        updated, updates = [], []
        for name, rows in samples_of(adapter_names).items():
            if name not in self.flora_core:
                continue
            if self._own_forward:
                index = torch.tensor(rows, device=x.device)
                with self.updated([name]):
                    own = _repeated(self.base_layer(x, *args, **kwargs), count)
                if len(own) != count:
                    raise NotImplementedError(
                        f"`adapter_names` and an adapted {type(self.get_base_layer()).__name__}, whose output of shape "
                        f"{tuple(own.shape)} does not have the {count} samples on its first axis"
                    )
                result = result.index_copy(0, index, own[index])
                continue
            part = _rows(x, rows)
            operation = self.operation(part, *args, **kwargs)
            update = self._update(name, operation, part, self._choose_route(name, operation, part, mixed=True))
            updated, updates = [*updated, *rows], [*updates, update.to(result.dtype)]
        if not updates:
            return result
        # One addition for all adapters, instead of one copy of the result for each.
        return result.index_add(0, torch.tensor(updated, device=x.device), torch.cat(updates))

    def _base_result(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        backend = self.quantization_backend
        return result if backend is None else backend.maybe_clone_base_result(result)

    @contextmanager
    def updated(self, active: Sequence[str]) -> Iterator[None]:
        base = self.get_base_layer()
        with loaded(base), standing_in([(base, "weight", self._updated_weight(active))]):
            yield

    def _updated_weight(self, active: Sequence[str]) -> UpdatedWeight | Tensor:
        updates = [Update.of(self.tucker(name), self.scaling[name], self.flora_dropout[name]) for name in active]
        return UpdatedWeight(weight_of(self.get_base_layer(), "weight"), updates)

    def _update(self, name: str, operation: contract.Operation, x: Tensor, route: str) -> Tensor:
        """What the adapter adds to the base layer's output."""
        x = self.flora_dropout[name](x)
        return contract.contract(operation, self.tucker(name), x, route=route, scale=self.scaling[name])

    def _choose_route(self, name: str, operation: contract.Operation, x: Tensor, *, mixed: bool = False) -> str:
        if self.route != "auto":
            return self.route if operation.groups == 1 else "dense"
        rank, fused = self.flora_core[name].weight.shape, not mixed and self._can_sum(name)
        return contract.choose_route(operation, self._shape, rank, x, fused=fused)

    def _can_sum(self, name: str) -> bool:
        """Whether the base operation can run with W + dW in place of W.

        Not with dropout on the adapter's input alone; not in half precision, where the sum would swallow small updates.
        """
        core = self.flora_core[name].weight
        exact = torch.promote_types(core.dtype, torch.float32)
        device = core.device.type
        rounded = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on "meta"
        return self._is_plain() and not self._drops(name) and self.base_layer.weight.dtype == exact and not rounded

    def _mask(self, name: str, x: Tensor) -> Tensor | None:
        """Which entries of the input this adapter's dropout keeps; None: all."""
        if not self._drops(name):
            return None
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.flora_dropout[name].p)

    def _masked_scale(self, name: str) -> float:
        """The adapter's scale, and dropout's for the entries that are kept."""
        return self.scaling[name] / (1 - self.flora_dropout[name].p) if self._drops(name) else self.scaling[name]

    def _drops(self, name: str) -> bool:
        return self.training and isinstance(self.flora_dropout[name], nn.Dropout)

    def _is_plain(self) -> bool:
        """Whether the base layer is its operation and nothing else: no other tuner, no hook, no quantised weight."""
        base = self.base_layer
        return (
            type(base).forward in self.plain_forwards
            and self.quantization_backend is None
            and "forward" not in vars(base)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base._backward_hooks
            and not base._backward_pre_hooks
        )

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class Linear(WeightLayer):
    """`nn.Linear`, its quantised forms, and transformers' `Conv1D`, whose weight is stored `(in, out)`."""

    plain_forwards = (nn.Linear.forward, Conv1D.forward)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return (0, 1) if isinstance(base_layer, Conv1D) else (1, 0)

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Linear:
        return contract.Linear(input_mode=self.modes_of(self.get_base_layer())[0])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Conv(WeightLayer):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

    plain_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return contract.Conv.input_mode, contract.Conv.output_mode

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Conv:
        return contract.Conv.of(self.get_base_layer())


class ConvTranspose(WeightLayer):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`."""

    plain_forwards = (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return contract.ConvTranspose.input_mode, contract.ConvTranspose.output_mode

    def operation(self, x: Tensor, output_size: Sequence[int] | None = None) -> contract.ConvTranspose:
        return contract.ConvTranspose.of(self.get_base_layer(), x, output_size)


class Embedding(WeightLayer):
    """`nn.Embedding`, plain or scaled (transformers' `embed_scale`). The padding row of dW is zero.

    `sparse` and `scale_grad_by_freq` are about the gradient of the base weight, which is frozen: they do not apply to
    the adapter.
    """

    lookup = True

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return contract.Embedding.input_mode, contract.Embedding.output_mode

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Embedding:
        return contract.Embedding()

    def expand(self, weight_name: str, tucker: Tucker, scale: float) -> Tensor:
        """As in every layer; the padding row is zero."""
        delta = super().expand(weight_name, tucker, scale)
        padding = self.get_base_layer().padding_idx
        if padding is None:
            return delta
        keep = torch.ones(delta.shape[0], 1, dtype=delta.dtype, device=delta.device)
        keep[padding] = 0
        return delta * keep

    def _updated_weight(self, active: Sequence[str]) -> Tensor:
        return self.summed("weight", active)

    def _update(self, name: str, operation: contract.Operation, x: Tensor, route: str) -> Tensor:
        update = contract.contract(operation, self.tucker(name), x, route=route, scale=self.scaling[name])
        padding, dropout = self.get_base_layer().padding_idx, self.flora_dropout[name]
        if padding is not None:
            update = update * (x != padding).unsqueeze(-1)
        if self.training and isinstance(dropout, nn.Dropout):
            # The input is a one-hot vector: dropping its entry drops the update of that position.
            update = update * dropout(torch.ones(x.shape, dtype=update.dtype, device=x.device)).unsqueeze(-1)
        embed_scale = self._get_embed_scale()
        return update if embed_scale is None else update * embed_scale.to(update.dtype)


def _rows(batch: Tensor, rows: Sequence[int]) -> Tensor:
    """These samples of the batch; a view of it where they lie together."""
    first, count = rows[0], len(rows)
    together = list(rows) == list(range(first, first + count))
    return batch.narrow(0, first, count) if together else batch[torch.tensor(rows, device=batch.device)]


def _repeated(batch: Tensor, count: int) -> Tensor:
    """One sample stands for `count`: what is the same for all of them, such as positions, is computed once."""
    return batch.expand(count, *batch.shape[1:]) if len(batch) == 1 else batch


_KINDS: dict[type[nn.Module], type[WeightLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    nn.ConvTranspose1d: ConvTranspose,
    nn.ConvTranspose2d: ConvTranspose,
    nn.ConvTranspose3d: ConvTranspose,
    nn.Embedding: Embedding,
}
SUPPORTED_KINDS = (*(kind.__name__ for kind in _KINDS), "MultiheadAttention")


def adapted_kind(module: nn.Module) -> tuple[type[nn.Module], type[WeightLayer]] | None:
    """The supported class that `module` is an instance of, and the class that adapts it; None if there is none."""
    for kind, layer in _KINDS.items():
        if isinstance(module, kind):
            return kind, layer
    # The backends' own linear layers, those of them that are no subclasses of nn.Linear.
    return (type(module), Linear) if quantized_as(module) == "linear" else None


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's class computes something else than the supported class that it is a subclass of.

    Not counted are transformers' scaled embeddings, whose scale is known, and the classes of quantisation backends;
    torchao has none, it changes the weight alone.
    """
    found = adapted_kind(module)
    if found is None or not isinstance(quantization_backend(module), (TorchaoBackend, type(None))):
        return False
    if found[1] is Embedding and hasattr(module, "embed_scale"):
        return False
    methods = ("forward", "_conv_forward")
    return any(getattr(type(module), method, None) is not getattr(found[0], method, None) for method in methods)


def quantized_as(module: nn.Module) -> str | None:
    """How PEFT knows this module to be quantised: as a "linear" layer, as one of an "other" kind, or not (None)."""
    backend = quantization_backend(module)
    if backend is None:
        return None
    # To PEFT, whatever has a weight of torchao's is linear.
    return "linear" if backend.layer_type == "linear" and hasattr(module, "out_features") else "other"


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, also where what is stored is packed or sharded."""
    if quantized_as(module) == "linear":
        return module.out_features, module.in_features
    return parameter_shape(module.weight)
