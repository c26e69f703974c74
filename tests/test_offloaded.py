"""Weights that accelerate keeps on the disk and brings when a module is called: forward, merging, and both undone."""

import accelerate
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close

from florapeft import FloraConfig


class OwnForward(nn.Conv1d):
    def forward(self, x):
        return nn.functional.conv1d(x, self.weight / self.weight.norm(), self.bias)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x @ self.matrix)


class Attention(nn.MultiheadAttention):
    """Which accelerate by itself cannot offload: it calls no module for its output projection."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


# By name: a module, a setting that adapts it, and an input.
KINDS = {
    "linear": (lambda: nn.Linear(6, 6), {"target_modules": ["layer"]}, (3, 6)),
    "own forward": (lambda: OwnForward(6, 6, 1), {"target_modules": ["layer"]}, (3, 6, 2)),
    "parameters": (Bare, {"target_parameters": ["layer.matrix"]}, (3, 6)),
    "attention": (lambda: Attention(6, 2), {"target_modules": ["layer"]}, (4, 3, 6)),
}


def offloaded(name, folder, *, adapter):
    """A model whose weights, or all but those of the adapter, are on the disk; an input and its output before."""
    make, config, shape = KINDS[name]
    base, x = nn.ModuleDict({"layer": make()}), torch.randn(shape)
    model = get_peft_model(base, FloraConfig(r=2, init_weights=False, **config)).eval()
    expected = model.base_model.model["layer"](x)
    owners = [module_name for module_name, module in model.named_modules() if module._parameters]
    devices = {owner: "disk" if adapter or "base_layer" in owner else "cpu" for owner in owners}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)
    assert {p.is_meta for n, p in model.named_parameters() if "flora_" not in n} == {True}
    assert {p.is_meta for n, p in model.named_parameters() if "flora_" in n} == {adapter}
    return model, x, expected


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_forward(name, adapter, tmp_path):
    model, x, expected = offloaded(name, tmp_path, adapter=adapter)
    layer = model.base_model.model["layer"]
    for _ in range(2):
        assert_close(layer(x), expected)
        assert all(parameter.is_meta for n, parameter in model.named_parameters() if "flora_" not in n)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", ["linear", "own forward", "parameters"])
@torch.no_grad()
def test_merging(name, safe_merge, tmp_path):
    model, x, expected = offloaded(name, tmp_path, adapter=False)
    layer = model.base_model.model["layer"]
    model.merge_adapter(safe_merge=safe_merge)
    assert layer.merged
    assert_close(layer(x), expected)
    model.unmerge_adapter()
    assert_close(layer(x), expected)


@torch.no_grad()
def test_safe_merge_finds_what_is_not_finite(tmp_path):
    model, _, _ = offloaded("linear", tmp_path, adapter=False)
    layer = model.base_model.model["layer"]
    layer.tucker("default").core.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
