"""The adapted layers: one class that holds adapters and their life cycle, one small class per kind of layer.

              ┌───────────────── base_layer (frozen W) ─────────────────┐
x ────────────┤                                                         (+)──▶ y
              └─ dropout ─ U_in ─▶ core · kernel factors ─▶ U_out · s ──┘

    W: (out, in, kh, kw)         core:      (r_out, r_in, r_kh, r_kw)
                                 factors:   (out, r_out) (in, r_in) (kh, r_kh) (kw, r_kw), none for a whole mode
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, Conv1D, check_adapters_to_merge
from torch import Tensor, nn

from florapeft import contract
from florapeft.config import FloraConfig
from florapeft.init import initialize
from florapeft.tucker import Tucker


class AdapterWeight(nn.Module):
    """One tensor of an adapter, in a leaf module of its own because sharding engines wrap leaf modules."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tuple(shape)))

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class FloraLayer(nn.Module, BaseTunerLayer):
    """A layer with a frozen weight of any order and, per adapter, a Tucker update of it.

    Subclasses say which linear map the layer computes. Everything else is written once, here.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        rank: its rank per mode, at most the mode's size.
        config: its configuration.
        scale: its multiplier, where `config.scale_pattern` overrides `config.scale`.

    Attributes:
        route: which route computes the update: "auto", or one of `florapeft.contract.ROUTES`.
    """

    adapter_layer_names = ("flora_core", "flora_factors")
    other_param_names = ("flora_dropout", "scaling", "initial_scaling")

    # Forward functions of the torch classes whose output is bias + operation(x, weight) and nothing else.
    plain_forwards: ClassVar[tuple[Any, ...]] = ()

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, rank: Sequence[int], config: FloraConfig, scale: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.flora_core = nn.ModuleDict()
        self.flora_factors = nn.ModuleDict()
        self.flora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self.route = "auto"
        self._active_adapter = adapter_name
        modes = self.modes_of(self.get_base_layer())
        shape = self.get_base_layer().weight.shape
        # Under the names that PEFT and its users look for.
        self.in_features, self.out_features = shape[modes[0]], shape[modes[1]]
        self.update_layer(adapter_name, rank, config, scale)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        """Input and output mode of the weight of such a layer."""
        raise NotImplementedError

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Operation:
        """The base layer's linear map, with the settings that the base layer has now, for these arguments."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, rank: Sequence[int], config: FloraConfig, scale: float) -> None:
        """Create the adapter's tensors, start them, and bring them to the base layer's device."""
        shape = self.get_base_layer().weight.shape
        self.flora_core[adapter_name] = AdapterWeight(rank)
        self.flora_factors[adapter_name] = nn.ModuleDict(
            {str(mode): AdapterWeight((d, r)) for mode, (d, r) in enumerate(zip(shape, rank, strict=True)) if r < d}
        )
        dropout = config.flora_dropout
        self.flora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = float(scale)
        input_mode, output_mode = self.modes_of(self.get_base_layer())
        initialize(
            self.tucker(adapter_name),
            config.init_weights,
            input_mode=input_mode,
            output_mode=output_mode,
            lookup=isinstance(self, Embedding),
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tucker(self, adapter_name: str) -> Tucker:
        """The adapter's core and factors (the parameters themselves, not copies), without its scale."""
        factors = self.flora_factors[adapter_name]
        core = self.flora_core[adapter_name].weight
        return Tucker(
            core, tuple(factors[str(mode)].weight if str(mode) in factors else None for mode in range(core.ndim))
        )

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`scale · dW` in the base weight's shape, in at least float32, on the adapter's device."""
        tucker, dtype = self.tucker(adapter_name), self._delta_dtype(adapter_name)
        factors = tuple(None if f is None else f.to(dtype) for f in tucker.factors)
        return contract.expand(Tucker(tucker.core.to(dtype), factors), self.scaling[adapter_name])

    def _delta_dtype(self, adapter_name: str) -> torch.dtype:
        return torch.promote_types(self.flora_core[adapter_name].weight.dtype, torch.float32)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's shapes, with the updates of all active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.flora_core]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)

        operation = self.operation(x, *args, **kwargs)
        routes = {name: self._choose_route(name, operation, x) for name in active}
        fused = [name for name, route in routes.items() if route == "dense" and self._can_fuse(name)]
        if fused:
            base = self.get_base_layer()
            weight = base.weight
            for name in fused:
                # The sum keeps the first operand's memory format: the base weight's.
                weight = weight + self.get_delta_weight(name)
            result = operation.apply(x, weight, base.bias)
        else:
            result = self.base_layer(x, *args, **kwargs)
        for name, route in routes.items():
            if name not in fused:
                result = result + self._update(name, operation, x, route).to(result.dtype)
        return result

    def _update(self, name: str, operation: contract.Operation, x: Tensor, route: str) -> Tensor:
        """What the adapter adds to the base layer's output."""
        x = self.flora_dropout[name](x)
        return contract.contract(operation, self.tucker(name), x, route=route, scale=self.scaling[name])

    def _choose_route(self, name: str, operation: contract.Operation, x: Tensor) -> str:
        if self.route != "auto":
            return self.route if operation.groups == 1 else "dense"
        shape, rank = self.get_base_layer().weight.shape, self.flora_core[name].weight.shape
        return contract.choose_route(operation, shape, rank, x, fused=self._can_fuse(name))

    def _can_fuse(self, name: str) -> bool:
        """Whether the base operation can run with W + dW in place of W.

        Not with dropout on the adapter's input alone; not where the base layer is more than its weight (another tuner,
        a hook, a forward of its own); not in half precision, where the sum would swallow small updates.
        """
        base = self.base_layer
        return (
            type(base).forward in self.plain_forwards
            and "forward" not in vars(base)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not (self.training and isinstance(self.flora_dropout[name], nn.Dropout))
            and base.weight.dtype == self._delta_dtype(name)
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight, in at least float32.

        Args:
            safe_merge: check that the merged weight is finite before the base weight is touched.
            adapter_names: adapters to merge; None takes the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.flora_core:
                continue
            merged = self.merged_weight(name)
            if safe_merge:
                self._check_finite(merged, name)
            self.get_base_layer().weight.data.copy_(merged)
            self.merged_adapters.append(name)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise the error that `merge(safe_merge=True)` would, and change nothing."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.flora_core and name not in self.merged_adapters:
                self._check_finite(self.merged_weight(name), name)

    def merged_weight(self, adapter_name: str) -> Tensor:
        """The base weight with this adapter's update, in the base weight's dtype; a new tensor."""
        weight = self.get_base_layer().weight.data
        delta = self.get_delta_weight(adapter_name).detach().to(weight.device)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    @staticmethod
    def _check_finite(weight: Tensor, adapter_name: str) -> None:
        if not torch.isfinite(weight).all():
            # PEFT's own message, which its users know.
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again, up to rounding in its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.flora_core:
                weight = self.get_base_layer().weight.data
                delta = self.get_delta_weight(name).detach().to(weight.device)
                weight.copy_(weight.to(delta.dtype) - delta)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's multiplier to `scale` times its configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the multipliers of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the multipliers of the active adapters by `scale`; None restores the configured ones."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def __repr__(self) -> str:
        return "flora." + super().__repr__()


class Linear(FloraLayer):
    """`nn.Linear`, and transformers' `Conv1D`, whose weight is stored `(in, out)`."""

    plain_forwards = (nn.Linear.forward, Conv1D.forward)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return (0, 1) if isinstance(base_layer, Conv1D) else (1, 0)

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Linear:
        return contract.Linear(input_mode=self.modes_of(self.get_base_layer())[0])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Conv(FloraLayer):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

    plain_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return contract.Conv.input_mode, contract.Conv.output_mode

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Conv:
        return contract.Conv.of(self.get_base_layer())


class ConvTranspose(FloraLayer):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`."""

    plain_forwards = (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward)

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return contract.ConvTranspose.input_mode, contract.ConvTranspose.output_mode

    def operation(self, x: Tensor, output_size: Sequence[int] | None = None) -> contract.ConvTranspose:
        return contract.ConvTranspose.of(self.get_base_layer(), x, output_size)


class Embedding(FloraLayer):
    """`nn.Embedding`, plain or scaled (transformers' `embed_scale`). The padding row of dW is zero.

    `sparse` and `scale_grad_by_freq` are about the gradient of the base weight, which is frozen: they do not apply to
    the adapter.
    """

    @staticmethod
    def modes_of(base_layer: nn.Module) -> tuple[int, int]:
        return contract.Embedding.input_mode, contract.Embedding.output_mode

    def operation(self, x: Tensor, *args: Any, **kwargs: Any) -> contract.Embedding:
        return contract.Embedding()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """As in every layer; the padding row is zero."""
        delta = super().get_delta_weight(adapter_name)
        padding = self.get_base_layer().padding_idx
        if padding is None:
            return delta
        keep = torch.ones(delta.shape[0], 1, dtype=delta.dtype, device=delta.device)
        keep[padding] = 0
        return delta * keep

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


_KINDS: dict[type[nn.Module], type[FloraLayer]] = {
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
SUPPORTED_KINDS = tuple(kind.__name__ for kind in _KINDS)


def adapted_kind(module: nn.Module) -> tuple[type[nn.Module], type[FloraLayer]] | None:
    """The supported class that `module` is an instance of, and the class that adapts it; None if there is none."""
    for kind, layer in _KINDS.items():
        if isinstance(module, kind):
            return kind, layer
    return None
