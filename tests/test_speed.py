"""benchmarks/speed.py and memory.py run, and compare what they say they compare."""

import json

import memory
import methods
import networks
import per_network
import pytest
import retraction
import speed
import torch
from methods import METHODS, prepare
from torch import nn

from florapeft.contract import Conv, contract
from florapeft.train.fitting import WITHIN
from florapeft.tucker import Tucker

LYCORIS = {"LoCon", "LoCon:bypass"}  # not among our dependencies


class Tiny(nn.Module):
    """One layer of each kind that the networks have."""

    def __init__(self, grouped=True):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32) if grouped else nn.Identity()
        self.linear = nn.Linear(32, 24)

    def forward(self, x):
        return self.linear(self.depthwise(self.conv(x).relu()).relu().mean((2, 3)))


TINY = networks.Network(Tiny, (2, 16, 8, 8), 3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(per_network.NETWORKS, "tiny", TINY)


@pytest.mark.parametrize("script", [speed, memory])
def test_quick(script, tiny, capsys, monkeypatch):
    monkeypatch.setattr(per_network.record, "write", None)
    script.main(["--quick", "--network", "tiny"])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert set(METHODS) <= set(lines)
    assert "x1.00" in lines["frozen"]
    assert "Error" not in "".join(lines[name] for name in set(METHODS) - LYCORIS)


def test_keeping_factors_orthonormal():
    rows = retraction.examine(TINY, 3)
    assert set(rows) == set(retraction.WAYS)
    assert rows["not kept"]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())


def test_results_are_written_once(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(per_network.record, "RESULTS", tmp_path)
    speed.main(["--network", "tiny", "--repetitions", "3"])
    capsys.readouterr()
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["networks"]["tiny"]["methods"]
    assert rows["frozen"]["step"]["ratio"] == rows["LoRA"]["step"]["to_lora"]["ratio"] == 1
    speed.main(["--network", "tiny"])
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        speed.main(["--network", "tiny", "--methods", "LoRA"])


def test_equal_parameters():
    names = [name for name in METHODS if name not in LYCORIS]
    network = networks.Network(lambda: Tiny(grouped=False), (2, 16, 8, 8), 6)
    found = {name: attached.facts for name, attached in prepare(network, names).items()}
    for name in ("LoRA", "DoRA", "LoHa", "released"):
        assert abs(found[name]["parameters"] / found["FLoRA"]["parameters"] - 1) <= 0.1
        assert found[name]["off"] == found[name]["parameters"] / found["FLoRA"]["parameters"] - 1
    assert found["frozen"]["parameters"] == found["FLoRA:merged"]["parameters"] == 0
    assert found["FLoRA:dense"]["parameters"] == found["FLoRA"]["parameters"]


def test_equal_parameters_on_a_network_of_the_benchmark():
    assert abs(prepare(networks.CPU["resnet20"], ["LoRA"], 1)["LoRA"].facts["off"]) <= WITHIN


def test_what_a_method_cannot_do_is_recorded():
    found = prepare(TINY, ["LoRA", "FLoRA"])
    assert "groups" in found["LoRA"].facts["without_grouped"]
    assert found["LoRA"].facts["layers"] == found["FLoRA"].facts["layers"] - 1
    volume = networks.Network(lambda: nn.Sequential(nn.Conv3d(4, 8, 3)), (1, 4, 5, 5, 5), 2)
    assert "Conv3d" in prepare(volume, ["LoHa"])["LoHa"].facts["error"]


@pytest.mark.parametrize("shape", [(6, 4, 3, 2), (6, 4)])
def test_released_computation(shape):
    base = nn.Linear(4, 6) if len(shape) == 2 else nn.Conv2d(4, 6, shape[2:], padding=1)
    x = torch.randn(2, *shape[1:2], *(5,) * (len(shape) - 2))
    layer = methods.Released(base, 2)
    nn.init.normal_(layer.core)
    tucker = Tucker(layer.core, tuple(layer.factors))
    operation = methods.F.linear(x, layer.delta()) if len(shape) == 2 else contract(Conv.of(base), tucker, x)
    torch.testing.assert_close(layer(x), base(x) + operation)
    before = layer(x)
    layer.merge(1)
    torch.testing.assert_close(base(x), before)


def test_methods_share_the_frozen_weights():
    found = prepare(TINY, ["FLoRA", "LoRA", "full"])
    flora, lora = (found[name].model.base_model.model.linear.base_layer for name in ("FLoRA", "LoRA"))
    assert flora.weight is lora.weight
    assert found["full"].model.linear.weight is not lora.weight


def test_what_the_forward_lets_go_is_not_saved():
    def loss(model):
        (model.weight * 2).exp().sum().detach()
        return model(x).sum()

    x, model = torch.randn(3, 4, requires_grad=True), nn.Linear(4, 8)
    assert memory.measure.saved_bytes(model, loss) == 4 * x.numel()


def test_the_bound_counts_the_inputs_that_a_frozen_network_does_not_keep():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    saved = memory.measure.saved_bytes
    assert saved(model, lambda m: m(x).sum()) == 0
    assert saved(model, lambda m: m(x).sum(), model) == 4 * (x.numel() + 3 * 8)
