"""`add_weighted_adapter`: the new adapter is the sum of others, and otherwise one like any other."""

import pickle

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from florapeft import FloraConfig, FloraLayer, hooi


class Net(nn.Module):
    """Every kind of weight that is adapted."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose1d(6, 8, 2, stride=2)
        self.stored = Conv1D(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = self.norm(x + self.attn(x, x, x)[0])
        y = self.depthwise(self.conv(x.mT)).mT
        x = x + self.cross(x, y, y)[0]
        x = self.up(torch.relu(self.conv(x.mT))).mT.contiguous()
        return self.head(torch.relu(self.stored(x)).mean(1))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


X = torch.tensor([[1, 5, 0, 8], [3, 3, 2, 0]])
EVERYTHING = {"target_modules": "all-weights", "target_parameters": ["norm.weight", "norm.bias"]}


def config(**arguments):
    return FloraConfig(**{"r": 2, "kernel_r": 2, "init_weights": False, **EVERYTHING, **arguments})


def attach(base=net, **others):
    """A model with the adapters one and two, and those that are given."""
    model = get_peft_model(base(), config(), adapter_name="one")
    for name, arguments in ({"two": {"r": 3, "kernel_r": None, "scale": -1.5}} | others).items():
        model.add_adapter(name, config(**arguments))
    return model


def out(model, x=X):
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def updates(model, *names):
    """The updates of these adapters, by weight."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FloraLayer):
            for adapter in names:
                for weight, delta in layer.delta_weights(adapter).items() if adapter in layer.flora_core else ():
                    found.setdefault(adapter, {})[f"{name}.{weight}"] = delta.detach()
    return found


def weighted(model, names, weights):
    total = {}
    for name, weight in zip(names, weights, strict=True):
        for key, delta in updates(model, name)[name].items():
            total[key] = total.get(key, 0) + weight * delta
    return total


PAIRS = {
    "everywhere": {},
    "on different weights": {"two": {"target_modules": ["cross", "conv", "head"], "target_parameters": ["norm.bias"]}},
    "bare alone": {"two": {"target_modules": None, "target_parameters": ["norm.weight"]}},
    "some of an attention's": {"two": {"target_modules": ["attn"], "ranks": {"attn.out_proj.weight": [2, 8]}}},
    "patterns": {
        "two": {"rank_pattern": {"attn": 5, "conv": [1, 2, 3]}, "scale_pattern": {"attn": -3.0, "norm.bias": 2}}
    },
    "of full rank": {"two": {"r": 99, "kernel_r": 99}},
}
PAIRS["some of an attention's"]["two"]["target_parameters"] = None


@pytest.mark.parametrize("pair", PAIRS)
class TestCat:
    def test_is_the_sum(self, pair):
        model = attach(**PAIRS[pair])
        model.base_model.model.head.set_scale("one", 3)
        expected = weighted(model, ["one", "two"], [0.5, -2.0])
        before = out(model)
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
        assert torch.equal(out(model), before)
        actual = updates(model, "sum")["sum"]
        assert actual.keys() == expected.keys()
        assert_close(actual, expected)

    def test_gives_the_output_of_both(self, pair):
        model = attach(**PAIRS[pair])
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
        model.base_model.set_adapter(["one", "two"])
        both = out(model)
        model.set_adapter("sum")
        assert_close(out(model), both)

    def test_is_saved_and_loaded(self, pair, tmp_path):
        model = attach(**PAIRS[pair])
        model.add_weighted_adapter(["two", "one"], [0.5, -2.0], "sum")
        model.set_adapter("sum")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path / "sum", adapter_name="again")
        assert torch.equal(out(loaded), out(model))
        model.load_adapter(tmp_path / "sum", "again")
        model.set_adapter("again")
        assert torch.equal(out(model), out(loaded))

    def test_is_an_adapter_like_any_other(self, pair):
        model = attach(**PAIRS[pair])
        model.add_weighted_adapter(["two", "one"], [0.5, -2.0], "sum")
        model.set_adapter("sum")
        assert {name.split(".")[-2] != "one" for name, p in model.named_parameters() if p.requires_grad} == {True}
        expected, others = out(model), [out_of(model, name) for name in ("one", "two")]
        assert torch.equal(out(pickle.loads(pickle.dumps(model))), expected)
        model.merge_adapter()
        assert_close(out(model), expected)
        model.unmerge_adapter()
        model(X).square().sum().backward()
        moved = [p for n, p in model.named_parameters() if p.requires_grad]
        assert [
            n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or ".sum." not in n)
        ] == []
        torch.optim.SGD(moved, 0.1).step()
        assert not torch.allclose(out(model), expected)
        assert_close([out_of(model, name) for name in ("one", "two")], others)
        model.set_adapter("sum")
        model.add_weighted_adapter(["sum", "one"], [1.0, 2.0], "again")
        assert_close(updates(model, "again")["again"], weighted(model, ["sum", "one"], [1.0, 2.0]))
        model.set_adapter("one")
        model.delete_adapter("sum")
        assert not any(".sum." in name for name, _ in model.named_parameters())
        assert_close(out(model), others[0])

    @pytest.mark.parametrize("rank", [1, 3, 99])
    def test_to_a_rank(self, pair, rank):
        model = attach(**PAIRS[pair])
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", "hooi", rank)
        expected, actual = weighted(model, ["one", "two"], [0.5, -2.0]), updates(model, "sum")["sum"]
        assert actual.keys() == expected.keys()
        for name, delta in actual.items():
            kernel = 0 if ".norm" in name or ".attn" in name or ".cross" in name else 2
            ranks = [min(rank, d) if mode < 2 or not kernel else d for mode, d in enumerate(delta.shape)]
            ranks = list(delta.shape) if delta.ndim == 1 else ranks
            best = hooi(expected[name], ranks).to_tensor()
            assert (delta - expected[name]).norm() <= (best - expected[name]).norm() + 1e-6


def out_of(model, name):
    active = model.active_adapter
    model.set_adapter(name)
    result = out(model)
    model.set_adapter(active)
    return result


class TestMore:
    def test_of_one_and_of_one_twice(self):
        model = attach()
        model.add_weighted_adapter(["two"], [0.5], "less")
        assert_close(updates(model, "less")["less"], weighted(model, ["two"], [0.5]))
        model.add_weighted_adapter(("two", "two", "one"), (1, -1, 0), "none")
        assert all(not torch.count_nonzero(delta.abs() > 1e-12) for delta in updates(model, "none")["none"].values())

    def test_ranks_per_mode(self):
        model = attach(**{n: {"target_modules": ["stored", "head"], "target_parameters": None} for n in "xy"})
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "sum", "hooi", [2, 1])
        assert model.base_model.model.stored.tucker("sum").rank == (2, 1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtypes(self, dtype):
        model = attach(lambda: net(dtype))
        model.add_weighted_adapter(["one", "two"], [1.0, -1.0], "sum")
        assert {p.dtype for n, p in model.named_parameters() if ".sum." in n} == {torch.float32}
        assert_close(updates(model, "sum")["sum"], weighted(model, ["one", "two"], [1.0, -1.0]))

    def test_stacks_of_experts(self):
        sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 12, "num_local_experts": 4}
        base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
        model = get_peft_model(base, config(target_parameters=None), adapter_name="one")
        model.add_adapter("two", config(target_parameters=None, r=3, scale=2.0))
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
        assert any("experts" in name for name in updates(model, "sum")["sum"])
        model.base_model.set_adapter(["one", "two"])
        both = out(model)
        model.set_adapter("sum")
        assert_close(out(model), both)

    def test_while_merged(self):
        model = attach()
        expected = weighted(model, ["one", "two"], [1.0, -1.0])
        before = out(model)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):  # as PEFT's own methods that add one
            model.add_weighted_adapter(["one", "two"], [1.0, -1.0], "sum")
        assert_close(updates(model, "sum")["sum"], expected)
        assert_close(out(model), before)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((["one", "two"], [1.0, 1.0], "two"), ValueError, "there is already an adapter 'two': delete it first"),
            ((["one", "zwei"], [1.0, 1.0], "sum"), ValueError, r"no adapter 'zwei'; there are \['one', 'two'\]"),
            (
                (["one", "two"], [1.0], "sum"),
                ValueError,
                "one weight per adapter is needed, got 2 adapters and 1 weigh",
            ),
            (([], [], "sum"), ValueError, "one weight per adapter is needed, got 0 adapters and 0 weights"),
            (("one", [1.0, 1.0, 1.0], "sum"), TypeError, "adapters must be a list of names, got 'one'"),
            ((["one"], 1.0, "sum"), TypeError, "weights must be a list of numbers, got 1.0"),
            ((["one"], ["1"], "sum"), TypeError, r"weights must be a list of numbers, got \['1'\]"),
            ((["one", "two"], [1.0, float("nan")], "sum"), ValueError, "weights must be finite numbers, got"),
            ((["one", "two"], [1.0, float("inf")], "sum"), ValueError, "weights must be finite numbers, got"),
            ((["one"], [1.0], "sum", "svd"), ValueError, r"combination_type must be 'cat' \(exact\) or 'hooi'"),
            ((["one"], [1.0], "sum", "hooi"), ValueError, "combination_type='hooi' takes a rank r, and 'cat' none"),
            ((["one"], [1.0], "sum", "cat", 3), ValueError, "combination_type='hooi' takes a rank r, and 'cat' none"),
            ((["one"], [1.0], "sum", "hooi", 0), ValueError, "r must be a positive integer or one per mode, got 0"),
            ((["one"], [1.0], "sum", "hooi", 1.5), TypeError, "r must be a positive integer or one per mode, got 1.5"),
            ((["one"], [1.0], "sum", "hooi", [2, 2]), ValueError, r"rank \[2, 2\] has 2 entries, but the weight of"),
            ((["one"], [1.0], "weight"), ValueError, "adapter name 'weight' can be a part of the keys"),
            ((["one"], [1.0], "1"), ValueError, "adapter name '1' can be a part of the keys"),
            ((["one"], [1.0], "half"), ValueError, "adapter name 'half' cannot be that of a module"),
            ((["one"], [1.0], "a.b"), ValueError, r"adapter name 'a.b' cannot be that of a module"),
        ],
    )
    def test_come_before_anything_is_changed(self, arguments, error, message):
        model = attach()
        before, expected, names = out(model), dict(model.peft_config), list(model.state_dict())
        with pytest.raises(error, match=message):
            model.add_weighted_adapter(*arguments)
        assert model.peft_config == expected
        assert model.active_adapters == ["one"]
        assert list(model.state_dict()) == names
        assert torch.equal(out(model), before)

    @pytest.mark.parametrize(
        ("extra", "name"),
        [
            ({"modules_to_save": ["head"]}, "modules_to_save"),
            ({"bias": "all"}, "bias"),
            ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices"),
            ({"save_batch_norm": True}, "save_batch_norm"),
        ],
    )
    def test_of_what_does_not_add_up(self, extra, name):
        targets = {"target_modules": ["conv"], "target_parameters": None}
        model = get_peft_model(net(), config(**targets), adapter_name="one")
        model.add_adapter("three", config(**targets, **extra))
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=f"adapter 'three' has {name}, which is no update of a weight"):
            model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "sum")
        assert list(model.peft_config) == ["one", "three"]
        assert list(model.state_dict()) == names
