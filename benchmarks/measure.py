"""Time and memory of training steps, side by side in one process; these machines are too noisy for anything else."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from florapeft import planning

Step = Callable[[], None]
Clock = Callable[[], float]


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
    seconds = interleaved(steps, repetitions, warmup)
    return {
        name: {"seconds": statistics.median(taken), **ratio(taken, seconds[reference])}
        for name, taken in seconds.items()
    }


def interleaved(
    steps: dict[str, Step], repetitions: int, warmup: int = 2, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds of every step, once per repetition and in random order within it."""
    shuffle, seconds = random.Random(0), {name: [] for name in steps}
    for repetition in range(warmup + repetitions):
        names = list(steps)
        shuffle.shuffle(names)
        for name in names:
            taken = timed(steps[name], clock)
            if repetition >= warmup:
                seconds[name].append(taken)
    return seconds


def ratio(taken: list[float], reference: list[float]) -> dict[str, Any]:
    """The median, and the quartiles, of the ratios of two steps' seconds in the same repetitions."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(taken, reference, strict=True)), n=4)
    return {"ratio": middle, "quartiles": [low, high]}


def timed(step: Step, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, on a wall clock or, with `time.process_time`, of this process alone."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    gc.disable()  # a collection would hit one method and not the next
    began = clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = clock() - began
    gc.enable()
    return taken


def flops(step: Step) -> int:
    """Floating-point operations of one call: two for each multiply-add of its products and convolutions."""
    product, batched = flop_counter.mm_flop, flop_counter.bmm_flop

    def added(count: Callable[..., int]) -> Callable[..., int]:
        return lambda _, a, b, *__, **___: count(a, b)

    def backward(gradient: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
        transposed, wanted = rest[4], rest[7]
        positions = math.prod((x if transposed else gradient)[2:]) * gradient[0]
        return 2 * positions * math.prod(weight) * sum(wanted[:2])

    aten = torch.ops.aten
    # Torch's own table lacks the former two, and takes grouped convolutions for full ones in the latter.
    more = {aten.addmm_: added(product), aten.baddbmm_: added(batched), aten.convolution_backward: backward}
    with flop_counter.FlopCounterMode(display=False, custom_mapping=more) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(
    model: nn.Module, loss: Callable[[nn.Module], torch.Tensor], inputs_of: Iterable[nn.Module] = ()
) -> int:
    """Bytes that autograd keeps between forward and backward pass; see `florapeft.planning.saved_bytes`."""
    return planning.saved_bytes(model, lambda: loss(model), inputs_of)


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
