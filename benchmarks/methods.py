"""The ways of training a network that are compared, each with as many trainable parameters as FLoRA at its rank.

`METHODS` names them. `florapeft.train.fitting` searches for the rank at which each has FLoRA's number.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import Network
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from florapeft import FloraConfig
from florapeft.contract import ROUTES
from florapeft.train.fitting import RIVALS, Attach, attaches, exactly, fitting, shared, trainable


@dataclass(frozen=True)
class Method:
    """How to attach an adapter to the layers of these names at rank r, or r + 1 in some of them, in a few variants."""

    variants: tuple[Attach, ...]
    merge: Callable[[nn.Module], None] = lambda model: model.merge_adapter()
    unmerge: Callable[[nn.Module], None] = lambda model: model.unmerge_adapter()
    save: Callable[[nn.Module, Path], None] = lambda model, folder: model.save_pretrained(folder)
    fitted: bool = True  # whether a rank is searched for


@dataclass
class Attached:
    """A method on a network, ready to be measured; or the error that says why it is not."""

    method: Method
    model: nn.Module | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def merge_seconds(self) -> float:
        began = time.perf_counter()
        self.method.merge(self.model)
        taken = time.perf_counter() - began
        self.method.unmerge(self.model)
        return taken

    def file_bytes(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.method.save(self.model, Path(folder))
            return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def prepare(network: Network, names: list[str], attaches: int = 3) -> dict[str, Attached]:
    """The named methods on one network, all around the same frozen weights.

    Args:
        network: the network.
        names: of methods.
        attaches: how often attaching is timed.
    """
    base, loss = network.model(), network.loss()
    targets = network.target_names(base)
    goal = trainable(METHODS["FLoRA"].variants[0](shared(base), targets, network.rank, []))

    def attach(method: Method, layers: list[str]) -> Attached:
        fit = (method.variants[0], network.rank, [])
        if method.fitted:
            fit = fitting(method.variants, base, layers, goal)[:3]
        seconds = []
        for _ in range(attaches):
            model, began = shared(base), time.perf_counter()
            model = fit[0](model, layers, *fit[1:])
            seconds.append(time.perf_counter() - began)
        loss(model).backward()
        model.zero_grad(set_to_none=True)
        facts = {"parameters": trainable(model), "rank": fit[1], "one_more_in": len(fit[2]), "layers": len(layers)}
        return Attached(method, model, {**facts, "attach_seconds": sorted(seconds)[attaches // 2]})

    def attempt(name: str) -> Attached:
        """With all layers, or else with those that are not grouped."""
        method = METHODS[name]
        try:
            return attach(method, targets)
        except Exception as error:  # whatever a library raises is what its users meet
            message = f"{type(error).__name__}: {error}".splitlines()[0]
        rest = [layer for layer in targets if getattr(base.get_submodule(layer), "groups", 1) == 1]
        if rest == targets:
            return Attached(method, None, {"error": message})
        try:
            attached = attach(method, rest)
        except Exception:
            return Attached(method, None, {"error": message})
        attached.facts["without_grouped"] = message
        return attached

    result = {name: attempt(name) for name in names}
    for attached in result.values():
        if attached.method.fitted and attached.model is not None:
            attached.facts["off"] = attached.facts["parameters"] / goal - 1
    return result


# PEFT's methods, FLoRA among them


def flora_at(model: nn.Module, layers: list[str], rank: int, raised: list[str]) -> nn.Module:
    pattern = {"rank_pattern": {exactly(raised): rank + 1}} if raised else {}
    return get_peft_model(model, FloraConfig(r=rank, target_modules=exactly(layers), **pattern))


def flora(route: str = "auto", *, lean: bool = False) -> Method:
    def attach(*given: Any) -> nn.Module:
        model = flora_at(*given)
        model.base_model.set_route(route)
        model.base_model.set_recompute(lean)
        return model

    return Method((attach,), fitted=False)


def merged_flora(model: nn.Module, *given: Any) -> nn.Module:
    return flora_at(copy.deepcopy(model), *given).merge_and_unload().requires_grad_(False)


# Methods that are not PEFT's


class Released(nn.Module):
    """What FLoRA's released code computes: base(x) + op(x, dW), with dW built in full at every forward.

    Written from the formula, with the modes in the weight's order and a factor for every mode. Unlike the released
    code it takes the modes' sizes from the weight, so that it is right for grouped convolutions too.
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        shape = base.weight.shape
        ranks = [min(rank, d) if mode < 2 else d for mode, d in enumerate(shape)]
        like = {"device": base.weight.device}
        self.core = nn.Parameter(torch.zeros(ranks, **like))
        self.factors = nn.ParameterList(torch.randn(d, r, **like) / r**0.5 for d, r in zip(shape, ranks, strict=True))

    def delta(self) -> Tensor:
        delta = self.core
        for factor in self.factors:  # takes the first mode away and puts the factor's last
            delta = torch.tensordot(delta, factor, ([0], [1]))
        return delta

    def forward(self, x: Tensor) -> Tensor:
        base, delta = self.base_layer, self.delta().to(x.dtype)
        update = F.linear(x, delta) if isinstance(base, nn.Linear) else base._conv_forward(x, delta, None)
        return base(x) + update

    @torch.no_grad()
    def merge(self, sign: int) -> None:
        self.base_layer.weight += sign * self.delta().to(self.base_layer.weight.dtype)


def released(model: nn.Module, layers: list[str], rank: int, raised: list[str]) -> nn.Module:
    for layer in layers:
        model.set_submodule(layer, Released(model.get_submodule(layer), rank + (layer in raised)))
    return model


def _merge_released(sign: int) -> Callable[[nn.Module], None]:
    return lambda model: [module.merge(sign) for module in model.modules() if isinstance(module, Released)] and None


class WithLycoris(nn.Module):
    """A model and LyCORIS' modules, which put their forward in the place of the layers' own."""

    def __init__(self, model: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.adapters = model, adapters
        for adapter in adapters.values():
            adapter.apply_to()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def locon(*, bypass: bool) -> Attach:
    """LyCORIS' LoCon in Tucker form; `bypass` computes it from the input, without the weight's update."""

    def attach(model: nn.Module, layers: list[str], rank: int, raised: list[str]) -> nn.Module:
        from lycoris.modules.locon import LoConModule

        adapters = nn.ModuleDict()
        for layer in layers:
            r = rank + (layer in raised)
            settings = {"use_tucker": True, "bypass_mode": bypass}
            adapter = LoConModule(layer, model.get_submodule(layer), 1.0, lora_dim=r, alpha=r, **settings)
            adapters[layer.replace(".", "/")] = adapter
        return WithLycoris(model, adapters)

    return attach


def _merge_lycoris(model: WithLycoris) -> None:
    for adapter in model.adapters.values():
        adapter.merge_to(1.0)


# Neither


def full(model: nn.Module, *_: Any) -> nn.Module:
    return copy.deepcopy(model).requires_grad_()


def frozen(model: nn.Module, *_: Any) -> nn.Module:
    return model


def _save(model: nn.Module, folder: Path) -> None:
    kept = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(kept, folder / "adapter.safetensors")


def _nothing(_: nn.Module) -> None:
    pass


_BY_HAND = {"merge": _nothing, "unmerge": _nothing, "save": _save}
METHODS: dict[str, Method] = {
    "frozen": Method((frozen,), fitted=False, **_BY_HAND),
    "full": Method((full,), fitted=False, **_BY_HAND),
    "FLoRA": flora(),
    "FLoRA:lean": flora(lean=True),
    **{f"FLoRA:{route}": flora(route) for route in ROUTES},
    "FLoRA:merged": Method((merged_flora,), fitted=False, **_BY_HAND),
    "released": Method((released,), _merge_released(1), _merge_released(-1), _save),
    **{RIVALS[name].label: Method(attaches(name)) for name in ("lora", "dora", "loha", "lokr")},
    "LoCon": Method((locon(bypass=False),), _merge_lycoris, _nothing, _save),
    "LoCon:bypass": Method((locon(bypass=True),), _merge_lycoris, _nothing, _save),
}
