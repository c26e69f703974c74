"""Weights that no layer stands for: bare parameters, stacks of experts, `nn.MultiheadAttention`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from florapeft.config import FloraConfig
from florapeft.init import initialize
from florapeft.layer import FloraLayer, in_order, parameter_shape, samples_of, weight_of
from florapeft.tensors import adapter_tensors, as_tucker
from florapeft.tucker import Tucker
from florapeft.updated import Update, UpdatedWeight, loaded, standing_in


class FloraParameters(FloraLayer):
    """A module of any class, of which some weights are adapted. While it runs, they are `W + dW`.

    The tensors of a weight lie under its name, with dots as underscores: `flora_core.<adapter>.<weight>`.

    Arguments as for every `FloraLayer`.
    """

    other_param_names = (*FloraLayer.other_param_names, "weight_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, model: nn.Module) -> None:
        super().__init__(base_layer, adapter_name, model)
        self.weight_names: dict[str, str] = {}  # by key in the containers
        self.weight_scaling: dict[str, dict[str, float]] = {}

    def update_layer(
        self, adapter_name: str, weight_name: str, rank: Sequence[int], config: FloraConfig, scale: float
    ) -> None:
        key = weight_name.replace(".", "_")
        self.weight_names[key] = weight_name
        weight = weight_of(self.get_base_layer(), weight_name)
        core, factors = adapter_tensors(parameter_shape(weight), rank)
        input_mode, output_mode = _input_and_output_mode(self.get_base_layer(), len(rank))
        tucker, start = as_tucker(core, factors), config.init_weights
        initialize(tucker, start, input_mode=input_mode, output_mode=output_mode, lookup=False)
        for container, tensors in ((self.flora_core, core), (self.flora_factors, factors)):
            if adapter_name not in container:
                container[adapter_name] = nn.ModuleDict()
            container[adapter_name][key] = tensors
        self.weight_scaling.setdefault(adapter_name, {})[weight_name] = float(scale)
        # The weights' own multipliers stand in `weight_scaling`; this one is what PEFT's users turn.
        self.start_adapter(adapter_name, config, scale=1.0)

    def tuckers(self, adapter_name: str) -> dict[str, Tucker]:
        cores, factors = self.flora_core[adapter_name], self.flora_factors[adapter_name]
        return {self.weight_names[key]: as_tucker(core, factors[key]) for key, core in cores.items()}

    def target_name(self, module_name: str, weight_name: str) -> str:
        return f"{module_name}.{weight_name}"

    def scale_of(self, adapter_name: str, weight_name: str) -> float:
        return self.scaling[adapter_name] * self.weight_scaling[adapter_name][weight_name]

    def get_delta_weight(self, adapter_name: str, weight_name: str | None = None) -> Tensor:
        """`scale · dW` of one weight, in its shape, in at least float32.

        Args:
            adapter_name: the adapter.
            weight_name: the weight, by its name in the base layer; None where there is only one.

        Raises:
            ValueError: the weight is not adapted, or it has to be said which.
        """
        tuckers = self.tuckers(adapter_name)
        if weight_name is None and len(tuckers) == 1:
            weight_name = next(iter(tuckers))
        if weight_name not in tuckers:
            given = f"name one, got {weight_name!r}"
            raise ValueError(f"adapter {adapter_name!r} has updates of {sorted(tuckers)}: {given}")
        return self.expand(weight_name, tuckers[weight_name], self.scale_of(adapter_name, weight_name))

    def adapted_forward(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with self.updated(active):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def updated(self, active: Sequence[str]) -> Iterator[None]:
        """While the context lasts, the adapters' updates are part of the base layer's weights."""
        base = self.get_base_layer()
        names = dict.fromkeys(weight_name for name in active for weight_name in self.tuckers(name))
        owners = [base.get_submodule(weight_name.rpartition(".")[0]) for weight_name in names]
        with loaded(*dict.fromkeys(owners)):
            places = [
                (owner, weight_name.rpartition(".")[2], self._updated_weight(weight_name, active))
                for owner, weight_name in zip(owners, names, strict=True)
            ]
            checkpoint = getattr(base, "_gradient_checkpointing_func", None)
            if checkpoint is not None:
                # transformers runs such a module once more in the backward pass, when this context is long gone.
                def checkpoint_updated(function: Callable[..., Any], *args: Any) -> Any:
                    def run(*args: Any) -> Any:
                        with standing_in(places[: len(owners)]):
                            return function(*args)

                    return checkpoint(run, *args)

                places.append((base, "_gradient_checkpointing_func", checkpoint_updated))
            with standing_in(places):
                yield

    def _updated_weight(self, weight_name: str, active: Sequence[str]) -> UpdatedWeight | Tensor:
        tuckers = {name: self.tuckers(name)[weight_name] for name in active if weight_name in self.tuckers(name)}
        weight = weight_of(self.get_base_layer(), weight_name)
        if self.route == "dense" or weight.ndim == 1 or not tuckers:
            return self.summed(weight_name, list(tuckers))
        return UpdatedWeight(
            weight,
            [Update.of(t, self.scale_of(name, weight_name), self.flora_dropout[name]) for name, t in tuckers.items()],
        )

    def mixed_forward(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Run the samples of each adapter by themselves."""
        if not any(name in self.flora_core for name in adapter_names):
            return self.base_layer(*args, **kwargs)
        take, axis = self._by_sample(len(adapter_names), args, kwargs)
        parts, samples = [], samples_of(adapter_names)
        for name, rows in samples.items():
            part_args, part_kwargs = take(rows)
            with self.updated([name] if name in self.flora_core else []):
                parts.append(self.base_layer(*part_args, **part_kwargs))
        if isinstance(parts[0], Tensor):
            return in_order(parts, samples, axis)
        # nn.MultiheadAttention: its output, and its weights, whose first axis is the batch, or None.
        outputs, weights = zip(*parts, strict=True)
        return in_order(outputs, samples, axis), None if weights[0] is None else in_order(weights, samples)

    def _by_sample(
        self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[[list[int]], tuple[tuple[Any, ...], dict[str, Any]]], int]:
        """A function that picks samples from the arguments, and the axis of the output that counts samples."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1 or len(tensors[0]) != count:
            raise NotImplementedError(
                f"`adapter_names` and an adapted {type(self.get_base_layer()).__name__}: samples can be told apart "
                f"only where a module takes one tensor whose first axis is the batch, here of {count}; this one took "
                f"shapes {[tuple(tensor.shape) for tensor in tensors]}"
            )

        def take(rows: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def part(value: Any) -> Any:
                return value[rows] if isinstance(value, Tensor) else value

            return tuple(map(part, args)), {name: part(value) for name, value in kwargs.items()}

        return take, 0

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = weight_of(self.get_base_layer(), next(iter(self.weight_names.values())))
        return weight.device, weight.dtype

    @property
    def weight(self) -> Any:
        """The base layer's; with its updates where it is one of the adapted ones."""
        self.unmerge_if_disabled()
        own = "weight" in self.weight_names.values()
        return self._updated_weight("weight", self.acting()) if own else super().weight

    def __getattr__(self, name: str) -> Any:
        """As in every layer; a weight comes with its updates."""
        if name not in vars(self).get("weight_names", {}).values():
            return super().__getattr__(name)
        self.unmerge_if_disabled()
        return self._updated_weight(name, self.acting())

    # Of a module that holds others in order, such as a subclass of nn.Sequential; Python looks these up in the class.
    def __len__(self) -> int:
        return len(self.base_layer)

    def __getitem__(self, index: Any) -> Any:
        return self.base_layer[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base_layer)

    def __bool__(self) -> bool:
        return bool(self.base_layer)


class MultiheadAttention(FloraParameters):
    """`nn.MultiheadAttention`: its input projections, packed or not, and its output projection."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, model: nn.Module) -> None:
        super().__init__(base_layer, adapter_name, model)
        # As PEFT has them for such a module.
        self.in_features, self.out_features = self.get_base_layer().embed_dim, 3 * self.get_base_layer().embed_dim

    def _by_sample(
        self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[[list[int]], tuple[tuple[Any, ...], dict[str, Any]]], int]:
        base = self.get_base_layer()
        given = inspect.signature(base.forward).bind(*args, **kwargs).arguments
        axis, query = 0 if base.batch_first else 1, given["query"]
        if query.ndim != 3 or query.shape[axis] != count:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {count} for a query "
                f"of shape {tuple(query.shape)}, whose batch axis is {axis}"
            )

        def take(rows: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            taken = {id(given[name]): given[name].movedim(axis, 0)[rows].movedim(0, axis) for name in _SEQUENCES}
            # One tensor stays one: where query, key and value are the same, they are projected at once.
            part = {**given, **{name: taken[id(given[name])] for name in _SEQUENCES}}
            if given.get("key_padding_mask") is not None:
                part["key_padding_mask"] = given["key_padding_mask"][rows]
            mask = given.get("attn_mask")
            if mask is not None and mask.ndim == 3:  # (batch · heads, target, source)
                part["attn_mask"] = mask.unflatten(0, (count, -1))[rows].flatten(0, 1)
            return (), part

        return take, axis


_SEQUENCES = ("query", "key", "value")


def attention_weights(module: nn.MultiheadAttention) -> list[str]:
    """Names of the weights of such a module that are matrices."""
    packed = module.in_proj_weight is not None
    projections = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return [*projections, "out_proj.weight"]


def expert_stacks(module: nn.Module) -> list[str]:
    """Names of the module's own parameters of order 3 or more that stack one weight per expert, in the first mode."""
    experts = [value for name, value in vars(module).items() if "expert" in name and isinstance(value, int)]
    named = "Expert" in type(module).__name__
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 3 and (named or parameter_shape(parameter)[0] in experts)
    ]


def _input_and_output_mode(module: nn.Module, order: int) -> tuple[int, int]:
    """Where the start puts its zero: a matrix is `(out, in)`; a stack's layout is known from transformers' classes."""
    if order < 2:
        return 0, 0
    transposed = order > 2 and getattr(module, "is_transposed", True)
    return (order - 2, order - 1) if transposed else (order - 1, order - 2)
