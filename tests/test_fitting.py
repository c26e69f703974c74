"""Other methods at FLoRA's number of parameters."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from florapeft import FloraConfig
from florapeft.train.fitting import (
    RIVALS,
    WITHIN,
    adaptable,
    adapted,
    attaches,
    exactly,
    fitting,
    place,
    shared,
    trainable,
)


def network():
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.Flatten(),
        nn.Linear(48, 24),
    )


LAYERS = ["0", "2", "4"]


@pytest.mark.parametrize("name", RIVALS)
def test_equal_parameters(name):
    best = fitting(attaches(name), network(), LAYERS, 2000)
    model = best.attach(network(), LAYERS, best.rank, best.raised)
    assert trainable(model) == best.parameters
    assert abs(best.parameters / 2000 - 1) <= (0.1 if name in ("loha", "lokr") else 2.5 * WITHIN)
    scalings = {s for module in model.modules() for s in getattr(module, "scaling", {}).values()}
    ranks = {best.rank, best.rank + bool(best.raised)}
    expected = sorted(r**0.5 for r in ranks) if name == "rslora" else [1.0]  # alpha = r
    assert sorted(scalings) == pytest.approx(expected)


def test_the_first_variant_that_is_near_enough_is_taken():
    tried = []

    def variant(width):
        def attach(model, layers, rank, raised):
            tried.append(width)
            model.requires_grad_(False)
            for name in layers:
                layer = model.get_submodule(name)
                layer.extra = nn.Parameter(torch.zeros(width * (rank + (name in raised))))
            return model

        return attach

    best = fitting([variant(70), variant(10), variant(1)], network(), LAYERS, 100)
    assert (best.rank, len(best.raised), best.parameters) == (3, 1, 100)
    assert set(tried) == {70, 10}


def test_a_kind_of_layer_that_a_method_refuses_is_left_out():
    able, left_out = adaptable(attaches("lora")[0], network(), ["0", "1", "2", "4"])
    assert able == LAYERS
    assert list(left_out) == ["grouped Conv2d"]
    assert "ValueError" in left_out["grouped Conv2d"]


def test_a_head_that_is_trained_too_is_not_counted():
    best = fitting(attaches("lora", modules_to_save=["4"]), network(), ["0", "2"], 1500)
    assert trainable(best.attach(network(), ["0", "2"], best.rank, best.raised)) == best.parameters + 48 * 24 + 24


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 24, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 12))


class TestStacksOfExperts:
    """Parameters of order 3, which of PEFT's methods LoRA alone adapts, at one rank for all experts."""

    LAYERS = ["0.gate_up_proj", "0.down_proj", "1"]

    def network(self):
        return nn.Sequential(Experts(), nn.Linear(16, 16))

    @pytest.mark.parametrize(
        ("goal", "raised"), [(800, ["0.gate_up_proj", "1"]), (768, ["0.gate_up_proj"]), (640, ["1"])]
    )
    def test_equal_parameters(self, goal, raised):
        best = fitting(attaches("lora"), self.network(), self.LAYERS, goal)
        model = best.attach(self.network(), self.LAYERS, best.rank, best.raised)
        assert (best.rank, best.raised, best.parameters) == (2, raised, goal)
        assert trainable(model) == goal
        ranks = {
            place(name, m): m.r["default"] for name, m in model.get_base_model().named_modules() if hasattr(m, "r")
        }
        assert ranks == {layer: 2 + (layer in raised) for layer in self.LAYERS}

    def test_what_cannot_adapt_them_leaves_them_out(self):
        for name, reason in {"dora": "ParamWrapper does not work", "loha": "target_parameters"}.items():
            able, left_out = adaptable(attaches(name)[0], self.network(), self.LAYERS)
            assert able == ["1"]
            assert list(left_out) == ["Experts, parameters of order 3"]
            assert reason in left_out["Experts, parameters of order 3"]

    def test_floras_layers_by_these_names(self):
        config = FloraConfig(r=2, target_modules=["1"], target_parameters=["gate_up_proj", "down_proj"])
        assert adapted(get_peft_model(self.network(), config).get_base_model()) == self.LAYERS


def test_shared_and_exactly():
    base = network()
    assert shared(base)[0].weight is base[0].weight
    assert exactly(["a.b", "c"]) == r"^(?:a\.b|c)$"
