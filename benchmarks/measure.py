"""Time and memory of training steps, side by side in one process; these machines are too noisy for anything else."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Step = Callable[[], None]


def step_of(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> Step:
    """A forward and a backward pass of the model, which leaves no gradients behind."""

    def step() -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    return step


def side_by_side(
    steps: dict[str, Step], reference: str, repetitions: int, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """Time every step once per repetition, in random order.

    Returns:
        Per step the median of its seconds, the median of its ratio to the reference's in the same repetition, and the
        quartiles of that ratio.
    """
    shuffle, seconds = random.Random(0), {name: [] for name in steps}
    for repetition in range(warmup + repetitions):
        names = list(steps)
        shuffle.shuffle(names)
        for name in names:
            taken = timed(steps[name])
            if repetition >= warmup:
                seconds[name].append(taken)
    summary = {}
    for name, taken in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(taken, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        summary[name] = {"seconds": statistics.median(taken), "ratio": middle, "quartiles": [low, high]}
    return summary


def timed(step: Step) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    gc.disable()  # a collection would hit one method and not the next
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - began
    gc.enable()
    return taken


def saved_bytes(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward pass, each storage once, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, lest an address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model)
    total = sum(storage.nbytes() for storage in kept.values())
    del value
    return total


def peak_bytes(step: Step) -> int:
    """The most bytes that one call holds at once beyond what there was before it."""
    step()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [(event.start_ns(), event.nbytes()) for event in _events(profile) if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def _events(profile: torch.profiler.profile) -> list[Any]:
    return profile.profiler.kineto_results.events()
