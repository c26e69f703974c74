"""The adapted layer: what holds adapters of one or several frozen weights, and their life cycle.

              ┌───────────────── base_layer (frozen W) ─────────────────┐
x ────────────┤                                                         (+)──▶ y
              └─ dropout ─ U_in ─▶ core · kernel factors ─▶ U_out · s ──┘

    W: (out, in, kh, kw)         core:      (r_out, r_in, r_kh, r_kw)
                                 factors:   (out, r_out) (in, r_in) (kh, r_kh) (kw, r_kw), none for a whole mode
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import Bnb4bitBackend, QuantizationBackend
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from florapeft import contract
from florapeft.config import FloraConfig
from florapeft.tucker import Tucker
from florapeft.updated import standing_before


class FloraWrapper(nn.Module, BaseTunerLayer):
    """Any module of this package that stands in the place of one of the model's.

    Args:
        base_layer: the module in whose place it stands, or another tuner's layer around it.
        adapter_name: name of the first adapter.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def __getattr__(self, name: str) -> Any:
        """What the code around the layer asks of the base layer, such as `stride` or `num_experts`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not how it is copied, nor accelerate's hook on it, which is moved about by these names. And `base_layer`
            # is not there yet while the layer is copied or unpickled.
            if name in ("base_layer", "_hf_hook", "_old_forward") or name.startswith("__"):
                raise
            return self.of_base_layer(getattr(self.base_layer, name))

    def of_base_layer(self, value: Any) -> Any:
        """What is handed out for an attribute of the base layer."""
        return value

    def unmerge_if_disabled(self) -> None:
        """PEFT disables merged adapters without unmerging them, which is left to whoever uses the layer next."""
        if self.disable_adapters and self.merged:
            self.unmerge()

    def __repr__(self) -> str:
        return "flora." + super().__repr__()


class FloraLayer(FloraWrapper):
    """A module with frozen weights of any order and, per adapter, a Tucker update of each.

    Subclasses say which weights those are and how the updates act. Everything else is written once, here.

    Args:
        base_layer: the module to adapt, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        model: the model that the module is a part of, which knows how its weights were quantised.

    Attributes:
        route: which route computes the update: "auto", or one of `florapeft.contract.ROUTES`.
        recompute: whether the backward pass makes the update's small intermediates again, instead of keeping one.
        is_read: whether the module around this one reads the weight, besides or instead of calling the layer.
    """

    adapter_layer_names = ("flora_core", "flora_factors")
    other_param_names = ("flora_dropout", "scaling", "initial_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, model: nn.Module) -> None:
        super().__init__(base_layer, adapter_name)
        self.flora_core = nn.ModuleDict()
        self.flora_factors = nn.ModuleDict()
        self.flora_dropout = nn.ModuleDict()
        self.quantization_backend = quantization_backend(self.get_base_layer(), model)
        # Whether the base layer did, before it got adapters.
        self._repacks = isinstance(self.quantization_backend, Bnb4bitBackend) and stop_repacking(self.get_base_layer())
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self._merged_scaling: dict[str, float] = {}
        self._before_merge: Kept | None = None
        self.cast_input_dtype_enabled = True
        self.route = "auto"
        self.recompute = False
        self.is_read = False

    def update_layer(
        self, adapter_name: str, weight_name: str, rank: Sequence[int], config: FloraConfig, scale: float
    ) -> None:
        """Create the adapter's tensors for one weight, start them, and bring them to the weight's device.

        Args:
            adapter_name: the adapter.
            weight_name: the weight, by its name in the base layer.
            rank: one rank per mode, at most the mode's size.
            config: the adapter's configuration.
            scale: its multiplier here, where `config.scale_pattern` overrides `config.scale`.
        """
        raise NotImplementedError

    def tuckers(self, adapter_name: str) -> dict[str, Tucker]:
        """The adapter's core and factors, without its scale, of every weight, by its name in the base layer."""
        raise NotImplementedError

    def target_name(self, module_name: str, weight_name: str) -> str:
        """The name of one of the weights as a target, for a layer of this name."""
        return module_name

    def scale_of(self, adapter_name: str, weight_name: str) -> float:
        """The multiplier of this adapter's update of this weight."""
        return self.scaling[adapter_name]

    def adapted_forward(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with the updates of the adapters `active`, at least one, all of which are here."""
        raise NotImplementedError

    def updated(self, active: Sequence[str]) -> AbstractContextManager[None]:
        """While the context lasts, the base layer's weights are those with the updates of these adapters."""
        raise NotImplementedError

    def acting(self) -> list[str]:
        """The adapters that act now: active, here, neither merged nor disabled."""
        if self.merged or self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.flora_core]

    def of_base_layer(self, value: Any) -> Any:
        """A method of the base layer, which may be a second way to its output, runs with the updates."""
        if not inspect.ismethod(value):
            return value
        self.unmerge_if_disabled()
        if self.quantization_backend is not None or not self.acting():
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self.updated(self.acting()):
                return value(*args, **kwargs)

        return method

    def mixed_forward(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """As `adapted_forward`, with the n-th adapter for the n-th sample; one that is not here changes nothing."""
        raise NotImplementedError

    def start_adapter(self, adapter_name: str, config: FloraConfig, scale: float) -> None:
        """What remains to be done when the adapter's tensors are there."""
        dropout = config.flora_dropout
        self.flora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = float(scale)
        # PEFT itself would not find the device of every base, such as HQQ's layers.
        first = next(self.get_base_layer().parameters(), None)
        self._move_adapter_to_device_of_base_layer(adapter_name, None if first is None else first.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def release(self) -> None:
        """Let the base layer go back to what it did before it got adapters."""
        if self._repacks:
            self.get_base_layer().support_avx512bf16_for_cpu = True

    def delta_weights(self, adapter_name: str) -> dict[str, Tensor]:
        """`scale · dW` in the base weights' shapes, in at least float32, on the adapter's device."""
        return {
            name: self.expand(name, tucker, self.scale_of(adapter_name, name))
            for name, tucker in self.tuckers(adapter_name).items()
        }

    def expand(self, weight_name: str, tucker: Tucker, scale: float) -> Tensor:
        """`scale ·` the update that `tucker` stands for, in at least float32."""
        return contract.expand_exactly(tucker, scale)

    def summed(self, weight_name: str, adapter_names: Sequence[str]) -> Tensor:
        """The base weight with the updates of these adapters, as merging would make it; differentiable."""
        weight = weight_of(self.get_base_layer(), weight_name)
        for name in adapter_names:
            tucker = self.tuckers(name).get(weight_name)
            if tucker is not None:
                weight = add_update(weight, self.expand(weight_name, tucker, self.scale_of(name, weight_name)))
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output, with the updates of all active adapters."""
        adapter_names = kwargs.pop("adapter_names", None)
        self.unmerge_if_disabled()
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return self.mixed_forward(adapter_names, *args, **kwargs)
        active = self.acting()
        return self.adapted_forward(active, *args, **kwargs) if active else self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weights, in at least float32.

        Args:
            safe_merge: check that the merged weights are finite before a base weight is touched.
            adapter_names: adapters to merge; None takes the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite, or the base is quantised in a way that cannot
                be undone.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.flora_core:
                continue
            self.check_merge([name], finite=safe_merge)
            if self.quantization_backend is not None and self._before_merge is None:
                self._before_merge = Kept.of(self.get_base_layer())
            for weight_name, delta in self.delta_weights(name).items():
                self._set_base(weight_name, add_update(self._get_base(weight_name), delta.detach()))
            self.merged_adapters.append(name)
            self._merged_scaling[name] = self.scaling[name]

    def check_merge(self, adapter_names: list[str] | None = None, *, finite: bool) -> None:
        """Raise what merging would raise, and change nothing."""
        backend = self.quantization_backend
        asked = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in asked if name in self.flora_core and name not in self.merged_adapters]
        if names and backend is not None and not backend.supports_merge:
            raise ValueError(
                f"cannot merge into a layer quantised with {backend.backend_name}, whose weight cannot be read back: "
                "keep the adapter beside it, or merge into the base model before it is quantised"
            )
        if names and getattr(backend, "get_apply_tensor_subclass", None) is _unknown_torchao:
            raise ValueError(
                "cannot merge into a layer quantised with torchao without knowing how: only models that transformers "
                "loaded with a TorchAoConfig say so"
            )
        merged: dict[str, Tensor] = {}
        for name in names if finite else ():
            for weight_name, delta in self.delta_weights(name).items():
                weight = merged[weight_name] if weight_name in merged else self._get_base(weight_name)
                merged[weight_name] = add_update(weight, delta.detach())
                if not torch.isfinite(merged[weight_name]).all():
                    # PEFT's own message, which its users know.
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def unmerge(self) -> None:
        """Take all merged updates out of the base weights again.

        A quantised base is put back as it was, bit for bit. Another is the original up to two roundings in its dtype
        per adapter: each entry to within `u · Σ (|Wₖ₋₁| + |Wₖ|)`, to first order in `u`, half of the dtype's `eps`;
        Wₖ is the weight with the first k adapters merged, W₀ the original.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._before_merge is not None:
            self._before_merge.put_back()
            self._before_merge = None
            self.merged_adapters.clear()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name not in self.flora_core:
                continue
            # What was merged is taken out, whatever the adapter's multiplier has become since.
            scale, self.scaling[name] = self.scaling[name], self._merged_scaling[name]
            for weight_name, delta in self.delta_weights(name).items():
                self._set_base(weight_name, add_update(self._get_base(weight_name), -delta.detach()))
            self.scaling[name] = scale

    def _innermost(self) -> BaseTunerLayer:
        """The tuner layer that holds the base layer itself: this one, or one that this one is around."""
        layer: BaseTunerLayer = self
        while isinstance(layer.base_layer, BaseTunerLayer):
            layer = layer.base_layer
        return layer

    def _get_base(self, weight_name: str) -> Tensor:
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        return weight_of(self.get_base_layer(), weight_name).data

    def _set_base(self, weight_name: str, value: Tensor) -> None:
        base = self.get_base_layer()
        if self.quantization_backend is None:
            weight_of(base, weight_name).data.copy_(value)
            return
        holder = self._innermost()
        self.quantization_backend.set_base_weight(holder, value)
        if holder.base_layer is not base:  # HQQ's new layer lacks the bias, the mode and the hooks of the old one
            base.W_q, base.meta = holder.base_layer.W_q, holder.base_layer.meta
            holder.base_layer = base

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


def samples_of(adapter_names: Sequence[str]) -> dict[str, list[int]]:
    """Of a mixed batch, which samples each adapter has."""
    samples: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        samples.setdefault(name, []).append(row)
    return samples


def in_order(parts: Sequence[Tensor], samples: dict[str, list[int]], axis: int = 0) -> Tensor:
    """The outputs of each adapter's samples, in the order of `samples`, as one batch in its own order."""
    order = [row for rows in samples.values() for row in rows]
    joined = torch.cat(tuple(parts), axis)
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=joined.device)
    return joined.index_select(axis, back)


def check_samples(x: Tensor, adapter_names: Sequence[str]) -> None:
    """Raise a ValueError, worded as PEFT's, if there is not one name per sample."""
    if len(x) != len(adapter_names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
            f"and {len(x)} respectively (where a model folds other axes into the first, mixed batches cannot work)"
        )


def parameter_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where it is sharded."""
    return tuple(getattr(weight, "ds_shape", weight.shape))  # ds_shape: under DeepSpeed's ZeRO-3


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The module's weight, or a submodule's, whatever a thread has in its place; under FSDP it is no nn.Parameter."""
    owner_name, _, attribute = name.rpartition(".")
    return standing_before(module.get_submodule(owner_name), attribute)


def quantization_backend(module: nn.Module, model: nn.Module | None = None) -> QuantizationBackend | None:
    """How PEFT reads and writes the module's weight if it is quantised, else None.

    Args:
        module: a base layer.
        model: the model that it is a part of; without it, torchao's layers cannot be merged into.
    """
    if is_parametrized(module):  # to look at the weight would compute it, which moves the vectors of spectral norm
        return None
    how = {"get_apply_tensor_subclass": _unknown_torchao}
    return resolve_quantization_backend(module, **(how if model is None else how | get_quantization_kwargs(model)))


def _unknown_torchao() -> None:
    """In the place of what would quantise a torchao layer again."""


def add_update(weight: Tensor, delta: Tensor) -> Tensor:
    """`weight + delta` in the dtype of `delta`, rounded once to the dtype of `weight`; a new tensor."""
    return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)


def stop_repacking(linear: nn.Module) -> bool:
    """Keep a 4-bit layer of bitsandbytes from repacking its weight for the CPU, undo it, and return whether it does it.

    Called in eval mode on a CPU with AVX512-BF16, bitsandbytes (0.50) brings the weight into a layout that has no
    gradients, also afterwards in training, and that PEFT reads as if it were the usual one.
    """
    if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        linear.state_dict()  # undoes it in place
    repacks = getattr(linear, "support_avx512bf16_for_cpu", False)
    linear.support_avx512bf16_for_cpu = False
    return repacks


class Kept(NamedTuple):
    """A quantised layer's weight as it is before an update is merged into it; the tensors are not copied.

    Attributes:
        module: the layer.
        parameters: its parameters, each with its attributes: bitsandbytes resets some of those of the old weight.
        attributes: what else of the layer belongs to the weight, of bitsandbytes and of HQQ.
    """

    module: nn.Module
    parameters: dict[str, tuple[nn.Parameter, dict[str, Any]]]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Kept:
        parameters = {name: (p, dict(vars(p))) for name, p in module._parameters.items() if p is not None}
        attributes = {name: vars(module)[name] for name in ("quant_state", "meta") if name in vars(module)}
        if "state" in vars(module):  # of 8-bit layers, which change it in place
            attributes["state"] = copy.copy(module.state)
        return cls(module, parameters, attributes)

    def put_back(self) -> None:
        for name, (parameter, attributes) in self.parameters.items():
            vars(parameter).update(attributes)
            self.module._parameters[name] = parameter
        vars(self.module).update(self.attributes)
