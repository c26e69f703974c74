"""What an adapter would be, before there is one: which weights, at which ranks, at what cost."""

from __future__ import annotations

import copy
import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from florapeft.batch_norm import forget_warning
from florapeft.config import FloraConfig
from florapeft.kinds import WeightLayer, adapted_kind
from florapeft.layer import FloraLayer
from florapeft.rank import count_parameters
from florapeft.support import shared_weights, why_not
from florapeft.target_ranks import count_base_parameters
from florapeft.targets import Target, adapted_targets, find_targets, task_heads, token_modules

logger = logging.getLogger("florapeft")

ADAPTER = "default"


@dataclass(frozen=True)
class PlannedWeight:
    """A weight that would be adapted.

    Attributes:
        name: of its layer; of the weight itself where no layer stands for it.
        kind: the class of the layer, or of the module that holds the weight.
        shape: of the weight.
        rank: one entry per mode.
        parameters: of its update.
        share: `parameters` relative to the weight's entries.
        flops: those of the update in a training step relative to the layer's own, on the route `factored`: three passes
            (output, gradient of the input, gradient of the adapter) against two; None where the layer has none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    parameters: int
    share: float
    flops: float | None

    @property
    def order(self) -> int:
        """The number of modes."""
        return len(self.shape)


@dataclass(frozen=True)
class Memory:
    """Bytes that training with AdamW holds on one device.

    Attributes:
        weights: of the model with its adapter, buffers too.
        gradients: of what is trained.
        optimizer: two moments of what is trained.
        activations: what is kept between a forward and its backward pass, in train mode; None where no inputs were
            given or the forward cannot run without values.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """Of what is known."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `str()` of it is a table.

    Attributes:
        layers: the weights that would be adapted.
        skipped: the layers and bare parameters of order two or more that would not, with the reason.
        parameters: of all updates together.
        trained: of everything that would be trained: heads, tokens and biases too.
        base_parameters: of the model itself.
        memory: of training.
        notes: what else there is to say, such as a budget that cannot be met.
    """

    layers: tuple[PlannedWeight, ...]
    skipped: dict[str, str]
    parameters: int
    trained: int
    base_parameters: int
    memory: Memory
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        layers = [{**asdict(layer), "order": layer.order} for layer in self.layers]
        for layer in layers:
            layer["shape"], layer["rank"] = list(layer["shape"]), list(layer["rank"])
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "layers": layers, "memory": memory, "notes": list(self.notes)}

    def __str__(self) -> str:
        header = ("weight", "kind", "shape", "rank", "parameters", "of the weight", "FLOPs of the layer's")
        rows = [
            (
                layer.name,
                layer.kind,
                _sizes(layer.shape),
                _sizes(layer.rank),
                f"{layer.parameters:,}",
                f"{layer.share:.1%}",
                "" if layer.flops is None else f"{layer.flops:.1%}",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        share = self.parameters / self.base_parameters if self.base_parameters else 0.0
        trained = f", {self.trained:,} are trained in all" if self.trained != self.parameters else ""
        lines += [
            "",
            f"{self.parameters:,} parameters in {len(self.layers)} weights: {share:.2%} of {self.base_parameters:,}",
        ]
        lines[-1] += trained
        memory = self.memory
        parts = [f"weights {_bytes(memory.weights)}", f"gradients {_bytes(memory.gradients)}"]
        parts += [f"AdamW {_bytes(memory.optimizer)}"]
        parts += [] if memory.activations is None else [f"activations {_bytes(memory.activations)}"]
        rest = " before activations" if memory.activations is None else ""
        lines.append(f"memory of training{rest}: {_bytes(memory.total)} ({', '.join(parts)})")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"not adapted: {', '.join(names[:3])}{more} ({reason})")
        return "\n".join(line.rstrip() for line in (*lines, *(f"note: {note}" for note in self.notes)))


def plan(model: nn.Module, config: FloraConfig, *, inputs: Any = None) -> Plan:
    """What attaching an adapter with this configuration would do, from shapes alone; nothing is changed.

    Args:
        model: the base model, on any device, the meta device too.
        config: the adapter's configuration.
        inputs: what a training step gives the model, to estimate activations: a tensor, a tuple of arguments or a
            dict of keyword arguments. Only shapes and dtypes matter: where the forward asks for a value, as whether a
            mask masks anything, it gets 1.

    Raises:
        ValueError: what attaching would raise; or the model has an adapter already.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> found = plan(model, FloraConfig(budget=0.1, target_modules="all-weights"))
        >>> [(layer.name, layer.rank, layer.parameters) for layer in found.layers]
        [('0', (2, 2), 260), ('2', (2, 2), 140)]
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("plan takes a base model, and this one has an adapter already")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(on_meta(model), copy.deepcopy(config), ADAPTER, low_cpu_mem_usage=True)
    notes = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    # PEFT names the head of a task model by itself.
    given = replace(config, modules_to_save=adapted.peft_config[ADAPTER].modules_to_save)
    targets = adapted_targets(adapted.get_base_model())
    modules = dict(adapted.get_base_model().named_modules())
    layers = tuple(_planned(target, modules[target.module]) for target in targets)
    activations = None
    if inputs is not None:
        try:
            forget_warning(adapted.modules())
            with _ValuesAreOne():
                activations = saved_bytes(adapted, _forward(adapted.train(), inputs))
        except (RuntimeError, NotImplementedError, AssertionError) as error:  # the last by torchao
            first = str(error).strip().splitlines()[0]
            notes.append(f"activations are not known: the forward does not run without values ({first})")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    held = {id(tensor): tensor.nbytes for tensor in (*adapted.parameters(), *adapted.buffers())}
    return Plan(
        layers=layers,
        skipped=left_out(model, targets, given),
        parameters=sum(layer.parameters for layer in layers),
        trained=sum(parameter.numel() for parameter in trained),
        base_parameters=count_base_parameters(model),
        memory=Memory(sum(held.values()), gradients, 2 * gradients, activations),
        notes=tuple(notes),
    )


def selected_targets(model: nn.Module, config: FloraConfig) -> list[Target]:
    """The weights that the configuration selects, as attaching finds them, whatever its budget; nothing is changed."""
    least = replace(config, budget=None, allocation="uniform", init_weights=True)
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it would say is about this one's ranks
    try:
        return adapted_targets(get_peft_model(on_meta(model), least, ADAPTER, low_cpu_mem_usage=True).get_base_model())
    finally:
        logger.setLevel(level)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers have shapes but no values; tied ones stay tied.

    Packed weights of quantised layers are not copied but shared, for their classes carry what they are.
    """
    empty: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (nn.Parameter, Tensor):
            empty[id(tensor)] = tensor
        elif isinstance(tensor, nn.Parameter):
            empty[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        else:
            empty[id(tensor)] = tensor.detach().to("meta")
    return copy.deepcopy(model, empty)


def saved_bytes(model: nn.Module, run: Callable[[], Any], inputs_of: Iterable[nn.Module] = ()) -> int:
    """Bytes that autograd keeps between forward and backward pass, each storage once, parameters not counted.

    Args:
        model: the model, on any device.
        run: the forward pass; what it returns is what the backward pass would begin with.
        inputs_of: modules whose inputs count as kept, too.
    """
    # A storage is known by its place in torch, for on the meta device it has none in memory.
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # weak: what is computed and let go within the forward is not kept

    def pack(tensor: Tensor) -> _Kept:
        kept.add(holder := _Kept(tensor))
        return holder

    inputs: list[_Kept] = []
    handles = [m.register_forward_pre_hook(lambda _, given: inputs.extend(map(pack, given))) for m in inputs_of]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        value = run()
    for handle in handles:
        handle.remove()
    storages = {s._cdata: s.nbytes() for s in (holder.tensor.untyped_storage() for holder in kept)}
    del value
    return sum(size for place, size in storages.items() if place not in own)


class _Kept:
    """A tensor that a graph holds, which lives as long as its place in the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # lest it holds the graph that holds this


def left_out(model: nn.Module, targets: Iterable[Target], config: FloraConfig) -> dict[str, str]:
    """The layers, and the parameters of modules that are no layers, which are not adapted, each with the reason.

    Those with a weight of order two or more: the scales and shifts of norms have nothing to decompose.

    Args:
        model: the base model.
        targets: what is adapted.
        config: by which it is, as given: without the ranks that a budget was solved to.
    """
    modules, adapted = dict(model.named_modules()), {f"{target.module}.{target.weight}" for target in targets}
    heads = tuple(f"{head}." for head in task_heads(model))
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    selected = {f"{target.module}.{target.weight}" for target in find_targets(model, replace(config, ranks=None))}
    tokens = token_modules(model, config)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in adapted:
            continue
        # Parametrized, as under weight norm, a layer's weight is computed from parameters in a module inside it.
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        if any(owner == key or owner.endswith(f".{key}") for key in config.modules_to_save or ()):
            found[owner] = "trained in full, by modules_to_save"
        elif owner in tokens:
            found[owner] = "some of its rows are trained in full, by trainable_token_indices"
        elif name in selected:
            found[owner] = "not in `ranks`" if config.budget is None else "the budget does not pay for it"
        elif output is not None and parameter is output.weight:
            found[owner] = "output embedding, or tied to it"
        elif name.startswith(heads):
            found[owner] = "head"
        elif adapted_kind(modules[owner]) is None:
            found[name] = f"parameter of {type(modules[owner]).__name__} itself"
        elif reason := why_not(owner, modules[owner], model):
            found[owner] = reason
        else:
            shared = shared_weights(model, {owner: parameter})
            found[owner] = "its weight has other names too" if shared else "not selected"
    return found


def kind_of(module: nn.Module) -> str:
    """The kind of layer, or the class of a module that is none and has parameters of its own adapted."""
    found = adapted_kind(module)
    return type(module).__name__ if found is None else found[0].__name__


def _planned(target: Target, layer: FloraLayer) -> PlannedWeight:
    rank = layer.tuckers(ADAPTER)[target.weight].rank
    parameters, base = count_parameters(target.shape, rank), layer.get_base_layer()
    return PlannedWeight(
        target.name,
        kind_of(base),
        tuple(target.shape),
        rank,
        parameters,
        parameters / math.prod(target.shape),
        _relative_flops(target.shape, rank, layer),
    )


def _relative_flops(shape: tuple[int, ...], rank: tuple[int, ...], layer: FloraLayer) -> float | None:
    """Multiply-adds of the update in a training step, on the route `factored`, relative to those of the layer."""
    if len(shape) < 2 or (isinstance(layer, WeightLayer) and layer.lookup):
        return None
    if not isinstance(layer, WeightLayer):  # matrices, and stacks of them: a token passes through some of the stack
        before = middle = after = 1.0
        source, target, kernel = len(shape) - 2, len(shape) - 1, 1
    else:
        base = layer.get_base_layer()
        stride, groups = math.prod(getattr(base, "stride", ())), getattr(base, "groups", 1)
        if groups > 1:  # computed as the layer itself, with W + dW: one more pass
            return 1 / 2
        source, target = layer.modes_of(base)
        kernel = math.prod(shape) // (shape[source] * shape[target])
        # Vectors of channels per position of the middle step, where the operation itself takes place.
        example = torch.empty(shape[source] * stride, device="meta")
        before, middle, after = layer.operation(example).positions(example, shape)
    steps = middle * kernel * rank[source] * rank[target]
    steps += before * shape[source] * rank[source] if rank[source] < shape[source] else 0.0
    steps += after * shape[target] * rank[target] if rank[target] < shape[target] else 0.0
    return 3 * steps / (2 * middle * kernel * shape[source] * shape[target])


def _forward(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """The model's forward with these inputs, on the meta device."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("meta").requires_grad_(value.requires_grad)

    if isinstance(inputs, Mapping):
        named = {key: tree_map(moved, value) for key, value in inputs.items()}
        return lambda: model(**named)
    arguments = tree_map(moved, inputs if isinstance(inputs, (tuple, list)) else (inputs,))
    return lambda: model(*arguments)


class _ValuesAreOne(TorchDispatchMode):
    """Tensors without values answer 1, or True, when they are asked for one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def _sizes(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _bytes(count: float) -> str:
    """`count` bytes in a unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
