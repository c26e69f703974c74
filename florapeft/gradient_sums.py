"""One pass of gradients over a frozen model: the sum of each weight's gradients, none of which is kept at full size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from math import prod
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed
from peft.utils.quantization_utils import Bnb4bitBackend
from torch import Tensor, nn

from florapeft.contract import without_autocast
from florapeft.kinds import quantized_as, weight_shape
from florapeft.layer import FloraLayer, parameter_shape, quantization_backend, stop_repacking, weight_of
from florapeft.rank import count_parameters
from florapeft.tucker import Tucker, hosvd, mode_dot, mode_energies, unfold

logger = logging.getLogger("florapeft")

Loss = Callable[[nn.Module, Any], Tensor]

# The most directions per mode that a compressed sum keeps, unless more are asked for.
_DIRECTIONS = 128


class Weight(NamedTuple):
    """A weight whose gradient is wanted: of which module, and by which name there."""

    module: nn.Module
    name: str


class GradientSum:
    """The sum of the gradients of one weight, in float32.

    Where that saves at least half, it is kept in Tucker form: compressed anew with every gradient that is added, to the
    leading directions of each mode, one mode after the other (Vannieuwenhoven, Vandebril, Meerbergen (2012), "A New
    Truncation Strategy for the Higher-Order Singular Value Decomposition", SIAM J. Sci. Comput. 34(2)).

    Args:
        shape: of the weight.
        rank: the least number of directions to keep in each mode.

    Attributes:
        value: the sum, a tensor or with orthonormal factors; None while there is none.
        lost: the energy that compression has taken from it.
        count: of batches that had a gradient.
        energies: the sum of the energies of the batches' gradients.
    """

    def __init__(self, shape: Sequence[int], rank: Sequence[int] | None = None) -> None:
        self.shape = tuple(shape)
        least = rank or [1] * len(shape)
        self.kept = tuple(min(d, max(r, _DIRECTIONS)) for d, r in zip(shape, least, strict=True))
        self.is_compressed = 2 * count_parameters(shape, self.kept) < prod(shape)
        self.value: Tucker | None = None
        self.lost = 0.0
        self.count = 0
        self.energies = 0.0
        self._start: tuple[Tucker | None, float, float] | None = None  # value, lost, energies before this batch

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of this batch, or one of several parts, where backward passes the weight more than once."""
        with without_autocast(gradient.device.type):
            total = (gradient.to_dense() if gradient.is_sparse else gradient).float()
            energy = _energy(total)
            if self.value is not None:
                total = total + self.value.to_tensor()
            if self._start is None:
                self._start = self.value, self.lost, self.energies
            else:  # of the parts together: what the sum has grown by, with what compression has taken of it so far
                value, lost, _ = self._start
                energy = _energy(total if value is None else total - value.to_tensor()) + self.lost - lost
            self.energies = self._start[2] + energy
            self._keep(total)

    def end_batch(self) -> None:
        """What was added since the last call was the gradient of one batch, if anything was."""
        if self._start is not None:
            self.count, self._start = self.count + 1, None

    def add_processes(self, device: torch.device) -> None:
        """Add the sums of the other processes of a distributed job, all of which call this for the same weight."""
        facts = torch.tensor([self.count, self.energies, self.lost], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(facts)
        count, self.energies, self.lost = facts.tolist()
        self.count = int(count)
        if self.count:
            with without_autocast(device.type):
                total = torch.zeros(self.shape, device=device) if self.value is None else self.value.to_tensor()
                total = total.contiguous()
                torch.distributed.all_reduce(total)
                self._keep(total)

    def _keep(self, total: Tensor) -> None:
        """Let `total` be the value, compressed if that saves enough."""
        if not self.is_compressed:
            self.value = Tucker(total, (None,) * total.ndim)
            return
        core, factors = total, []
        for mode, (size, kept) in enumerate(zip(total.shape, self.kept, strict=True)):
            factors.append(None if kept == size else _leading_directions(unfold(core, mode), kept))
            core = core if factors[-1] is None else mode_dot(core, factors[-1].mT, mode)
        self.lost += max(0.0, float(total.double().square().sum() - core.double().square().sum()))
        self.value = Tucker(core, tuple(factors))

    def agreement(self) -> float | None:
        """The share of the sum's energy that is the gradients' common part; None of fewer than two batches.

        Of n gradients, a mean `m` plus independent noise, `‖sum‖² - Σ‖g‖²` has the expectation `n (n - 1) ‖m‖²`, and
        the common part of the sum the energy `n² ‖m‖²`. An estimate: at most 1, near or below 0 for noise; what
        compression has taken counts as noise.
        """
        energy = float(self.value.core.double().square().sum()) + self.lost
        if self.count < 2 or not energy:
            return None
        return (energy - self.energies) * self.count / (self.count - 1) / energy

    def spectra(self) -> list[list[float]]:
        """Per mode the squared singular values of the unfolding; what compression has lost is spread over the rest."""
        spectra = []
        for mode, (size, kept) in enumerate(zip(self.shape, self.value.rank, strict=True)):
            spectrum = mode_energies(self.value.core, mode).tolist()
            if kept < size:
                spectrum += [0.0] * (kept - len(spectrum)) + [self.lost / (size - kept)] * (size - kept)
            elif self.lost:
                spectrum = [energy + self.lost / len(spectrum) for energy in spectrum]
            spectra.append(spectrum)
        return spectra

    def bases(self, rank: Sequence[int]) -> tuple[Tensor | None, ...]:
        """For every mode that is not whole the `r` leading directions of the sum, orthonormal, of shape `(d, r)`."""
        core, factors = self.value
        found: list[Tensor | None] = []
        with without_autocast(core.device.type):
            inner = hosvd(core, [min(r, kept) for r, kept in zip(rank, core.shape, strict=True)]).factors
            for size, r, outer, turned in zip(self.shape, rank, factors, inner, strict=True):
                if r == size:
                    found.append(None)
                elif outer is None:
                    found.append(turned)
                else:
                    found.append(_completed(outer if turned is None else outer @ turned, r))
        return tuple(found)


def gradient_sums(
    model: nn.Module,
    weights: Mapping[str, Weight],
    batches: Iterable[Any],
    loss: Loss,
    ranks: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, GradientSum]:
    """The sums of the weights' gradients over all batches; afterwards the model is as it was.

    Adapters of ours are passed by. Modules are in eval mode, but for those that checkpoint their activations, which do
    so in train mode alone; random numbers are the same in every pass. Every gradient is freed as soon as it is added.
    In a distributed job every process calls this with the same weights and with batches of its own, as many as it has;
    all get the sums over all of them.

    Args:
        model: the model, with or without adapters.
        weights: what to collect, by name.
        batches: anything that `loss` takes; all of them are used.
        loss: `loss(model, batch)`, one number.
        ranks: how many directions to keep of each weight at least.

    Returns:
        By name; without those that no gradient reached, which a log line counts.

    Raises:
        TypeError, ValueError: no batch; a loss that is not one finite number, or on which no weight has an influence;
            a gradient that is not finite; processes with different weights. The message says where.
    """
    sums = {name: GradientSum(_shape(weight), (ranks or {}).get(name)) for name, weight in weights.items()}
    count = 0

    def add(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise ValueError(f"the gradient of {name} is not finite in batch {count}")
        sums[name].add(gradient)

    with _collecting(model, weights, add):
        for batch in batches:
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise TypeError(f"loss(model, batch) must be one number, a tensor; for batch {count} it is {given}")
            if not torch.isfinite(value):
                raise ValueError(f"the loss is {value.item()} for batch {count}")
            if not value.requires_grad:
                raise ValueError("no weight to adapt has an influence on the loss, which has no gradient")
            value.backward()
            for total in sums.values():
                total.end_batch()
            count += 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = _add_processes(sums, weights, count)
    if count == 0:
        raise ValueError("a gradient pass needs at least one batch, and there is none: batches may be used up already")
    found = {name: total for name, total in sums.items() if total.value is not None}
    if not found:
        raise ValueError(f"no gradient reached any of the {len(sums)} weights to adapt")
    if missing := [name for name in sums if name not in found]:
        logger.warning(f"no gradient reached {len(missing)} of {len(sums)} weights to adapt, as {missing[0]}")
    return found


def _add_processes(sums: Mapping[str, GradientSum], weights: Mapping[str, Weight], count: int) -> int:
    """Add up the sums of all processes, weight by weight, and return the number of all their batches.

    Only now: gradients come in the order in which each process's data reach the weights, which may differ.
    """
    devices = [next(chain(w.module.parameters(), w.module.buffers())).device for w in weights.values()]
    facts = torch.zeros(torch.distributed.get_world_size(), 2, dtype=torch.int64, device=devices[0])
    facts[torch.distributed.get_rank(), 0] = crc32(repr([(name, total.shape) for name, total in sums.items()]).encode())
    facts[torch.distributed.get_rank(), 1] = count
    torch.distributed.all_reduce(facts)
    codes, counts = facts.T.tolist()
    if others := [process for process, code in enumerate(codes) if code != codes[0]]:
        raise ValueError(
            f"processes 0 and {others[0]} have different weights to adapt, this one {len(sums)}, of which the first is "
            f"{next(iter(sums))}: every process of the job needs the same model and configuration"
        )
    for total, device in zip(sums.values(), devices, strict=True):
        total.add_processes(device)
    return sum(counts)


@contextmanager
def _collecting(model: nn.Module, weights: Mapping[str, Weight], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context lasts, the backward pass hands the weights' gradients, and no others, to `add`."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    layers = [(module, module._disable_adapters) for module in model.modules() if isinstance(module, FloraLayer)]
    names: dict[int, list[str]] = {}
    handles, repacking = [], []

    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        for name in names[id(parameter)]:
            add(name, gradient)

    with ExitStack() as stack:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        try:
            torch.manual_seed(0)
            for layer, _ in layers:
                layer._disable_adapters = True
            for module, was_training in modes:
                module.training = was_training and bool(getattr(module, "gradient_checkpointing", False))
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            for name, weight in weights.items():
                if quantized_as(weight.module) is not None:
                    if isinstance(quantization_backend(weight.module), Bnb4bitBackend) and stop_repacking(
                        weight.module
                    ):
                        repacking.append(weight.module)
                    handles.append(weight.module.register_forward_hook(_linear_hook(name, add)))
                    continue
                parameter = weight_of(weight.module, weight.name)
                parameter.requires_grad_(True)
                if id(parameter) not in names:
                    handles.append(parameter.register_post_accumulate_grad_hook(take))
                names.setdefault(id(parameter), []).append(name)
            handles += _input_hooks(model)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, wanted, gradient in parameters:
                parameter.requires_grad_(wanted)
                parameter.grad = gradient
            for module, was_training in modes:
                module.training = was_training
            for layer, disabled in layers:
                layer._disable_adapters = disabled
            for module in repacking:
                module.support_avx512bf16_for_cpu = True


def _linear_hook(name: str, add: Callable[[str, Tensor], None]) -> Callable[..., Tensor]:
    """Of a quantised linear layer, whose weight has no gradient: it is that of the output times the input."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the first run of a checkpointed part
            return output
        x = arguments[0].detach()
        version = x._version
        output = _with_gradient(output)

        def backward(gradient: Tensor) -> None:
            if x._version != version:
                raise ValueError(f"no gradient of {name}: the layer's input was changed in place after its use")
            with without_autocast(x.device.type):
                add(name, gradient.detach().flatten(0, -2).float().mT @ x.flatten(0, -2).float())

        output.register_hook(backward)
        return output

    return hook


def _input_hooks(model: nn.Module) -> list[Any]:
    """Let gradients begin at the token embeddings: parts that are checkpointed have none where no input wants one."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        begins = torch.is_grad_enabled() and isinstance(output, Tensor) and output.is_floating_point()
        return _with_gradient(output) if begins else output

    return [] if embeddings is None else [embeddings.register_forward_hook(hook)]


def _with_gradient(output: Tensor) -> Tensor:
    """The same numbers, with a gradient; no leaf, for a model may change them in place."""
    return output if output.requires_grad else output + output.new_zeros((), requires_grad=True)


def _shape(weight: Weight) -> tuple[int, ...]:
    if quantized_as(weight.module) is not None:
        return weight_shape(weight.module)
    return parameter_shape(weight_of(weight.module, weight.name))


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _leading_directions(matrix: Tensor, count: int) -> Tensor:
    """An orthonormal basis, shape `(rows, count)`, near the leading left singular vectors; always the same one.

    Source: Halko, Martinsson, Tropp (2011), SIAM Review 53(2), algorithms 4.4 and 5.1.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(count + 8, *matrix.shape)
    probes = torch.randn(matrix.shape[1], width, generator=generator)
    basis = torch.linalg.qr(matrix @ probes.to(matrix.device)).Q
    for _ in range(2 if width < min(matrix.shape) else 0):  # else the basis spans all columns already
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    projected = (basis.mT @ matrix).double()
    vectors = torch.linalg.eigh(projected @ projected.mT).eigenvectors.flip(1)
    return _completed((basis @ vectors.float())[:, :count], count)


def _completed(basis: Tensor, count: int) -> Tensor:
    """The orthonormal columns of `basis`, with further ones, always the same, up to `count`."""
    missing = count - basis.shape[1]
    if missing <= 0:
        return basis
    more = torch.randn(basis.shape[0], missing, generator=torch.Generator().manual_seed(0)).to(basis)
    for _ in range(2):  # twice, for the first leaves a rounding's share of the basis
        more = torch.linalg.qr(more - basis @ (basis.mT @ more)).Q
    return torch.cat((basis, more), 1)
