"""Running statistics of batch norms, which every adapter of PEFT's leaves behind.

In train mode a batch norm moves its running statistics, adapted or not; they are buffers of the base model, and an
adapter's file does not have them. With `save_batch_norm`, each adapter has a set of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from florapeft.layer import FloraWrapper, check_samples, samples_of
from florapeft.updated import standing_in

logger = logging.getLogger("florapeft")

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Statistics(nn.Module):
    """A copy of a batch norm's running statistics."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def write_to(self, norm: nn.Module) -> None:
        """Overwrite the batch norm's running statistics with these."""
        for name in _BUFFERS:
            getattr(norm, name).copy_(getattr(self, name))


class FloraBatchNorm(FloraWrapper):
    """A batch norm with its own running statistics for each adapter.

    Of several active adapters, the first one's are used. They start as the base's.

    Args:
        base_layer: the batch norm.
        adapter_name: name of the first adapter.
    """

    adapter_layer_names = ("flora_statistics",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.flora_statistics = nn.ModuleDict()
        self._before_merge: tuple[Statistics, ...] = ()  # a tuple, so that it is no submodule

    def update_layer(self, adapter_name: str) -> None:
        """Give the adapter a copy of the base's statistics."""
        self.flora_statistics[adapter_name] = Statistics(self.get_base_layer())

    def forward(self, input: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """The batch norm's output, with the statistics of the first active adapter that has some."""
        self.unmerge_if_disabled()
        if self.disable_adapters:
            return self.base_layer(input)
        if adapter_names is not None:
            return self._mixed_forward(input, adapter_names)
        name = self._first_of()
        return self.base_layer(input) if self.merged or name is None else self._forward_with(name, input)

    def _forward_with(self, adapter_name: str, x: Tensor) -> Tensor:
        base, statistics = self.get_base_layer(), self.flora_statistics[adapter_name]
        # In train mode a batch norm writes to its statistics: here to the adapter's.
        with standing_in([(base, name, getattr(statistics, name)) for name in _BUFFERS]):
            return self.base_layer(x)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        check_samples(x, adapter_names)
        result = self.base_layer(x)
        for name, rows in samples_of(adapter_names).items():
            if name in self.flora_statistics:
                index = torch.tensor(rows, device=x.device)
                result = result.index_copy(0, index, self._forward_with(name, x[index]))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the statistics of the first of the adapters that has some into the base."""
        self.check_merge(adapter_names, finite=safe_merge)
        name = self._first_of(adapter_names)
        if name is not None and not self.merged:
            self._before_merge = (Statistics(self.get_base_layer()),)
            self.flora_statistics[name].write_to(self.get_base_layer())
            self.merged_adapters.append(name)

    def check_merge(self, adapter_names: list[str] | None = None, *, finite: bool) -> None:
        """Raise what merging would raise, and change nothing."""
        name = self._first_of(adapter_names)
        own = self.flora_statistics[name].buffers() if finite and name is not None else ()
        if not all(torch.isfinite(statistic).all() for statistic in own):
            # PEFT's own message, which its users know.
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def _first_of(self, adapter_names: list[str] | None = None) -> str | None:
        """Of these adapters, or of the active ones, the first that has statistics."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return next((name for name in names if name in self.flora_statistics), None)

    def unmerge(self) -> None:
        """Put the base's own statistics back, bit for bit."""
        if self.merged:
            self._before_merge[0].write_to(self.get_base_layer())
            self._before_merge = ()
            self.merged_adapters.clear()


def has_statistics(module: nn.Module) -> bool:
    """Whether the module is a batch norm (or instance norm) that keeps running statistics."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and getattr(module, "running_mean", None) is not None


def norms_with_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all batch norms but those in `modules_to_save`, which are saved in full."""
    inside: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside += (f"{name}.",)
        elif has_statistics(module) and not name.startswith(inside):
            yield name, module


def warn_when_trained(model: nn.Module) -> None:
    """Say once, at the first training step in train mode, that the model's batch norms move and are not saved."""
    norms = [module for _, module in norms_with_statistics(model)]
    if not any(_warnings_of(norm) for norm in norms):
        warn_at_first_step(
            norms,
            f"{len(norms)} batch norms are in train mode: their running statistics change with training and are not "
            "saved with the adapter. Set save_batch_norm=True, keep them in eval mode, or save the merged model",
        )


def warn_at_first_step(modules: Iterable[nn.Module], message: str) -> None:
    """Say this once, when the first of these modules is run in train mode and with gradients."""
    warning = _Warning(message)
    warning.handles = [module.register_forward_pre_hook(warning) for module in modules]


def forget_warning(modules: Iterable[nn.Module]) -> None:
    """Take back what these modules would say at the first step."""
    for module in modules:
        for warning in _warnings_of(module):
            warning.remove()


class _Warning:
    """A hook of several modules, which the first one to be trained takes off again.

    Not in a compiled model, where it would break the graph.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.handles: list[RemovableHandle] = []

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        # Not where an adapter's own statistics stand in for a batch norm's.
        if module.training and torch.is_grad_enabled() and "running_mean" not in vars(module):
            self.remove()
            logger.warning(self.message)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _warnings_of(module: nn.Module) -> list[_Warning]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Warning)]
