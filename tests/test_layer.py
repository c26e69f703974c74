"""The adapted layer is the base layer with W + dW, over every kind, option, route and part of its life."""

import copy
import pickle
import string
import threading
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from florapeft import FloraConfig, contract
from florapeft.contract import ROUTES

ROWS = (3, 5)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT and ResNet-V2."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class Causal(nn.Conv3d):
    """Padded in front, along time, as in video VAEs."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 0, 0, 2, 0)))


class Positions(nn.Embedding):
    """With an offset, as BART's and OPT's."""

    def forward(self, x):
        return super().forward(x + 1)


# name: module, input shape (row numbers for embeddings), keyword arguments of its forward
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear, no bias, sequence": (lambda: nn.Linear(6, 8, bias=False), (2, 3, 6)),
    "linear stored (in, out)": (lambda: Conv1D(8, 6), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 7)),
    "conv1d unbatched": (lambda: nn.Conv1d(6, 8, 3), (6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 7, 6)),
    "conv2d, no bias, dilation": (lambda: nn.Conv2d(6, 8, 3, dilation=(1, 2), bias=False), (2, 6, 7, 6)),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(6, 8, 1, stride=2), (2, 6, 5, 4)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 3, 3)),
    "conv2d unequal sides": (lambda: nn.Conv2d(6, 8, (1, 4), padding=(0, 2)), (2, 6, 4, 5)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 4, 5)),
    "conv2d valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid"), (2, 6, 4, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 4, 5)),
    "conv2d replicate same": (
        lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="replicate"),
        (2, 6, 4, 5),
    ),
    "conv2d circular": (lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="circular"), (2, 6, 4, 5)),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 4, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (1, 2, 3)), (2, 6, 2, 3, 4)),
    "conv transposed 1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), (2, 6, 4)),
    "conv transposed 2d": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=3, output_padding=1), (2, 6, 3, 4)),
    "conv transposed 2d, output_size": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, bias=False),
        (2, 6, 3, 4),
        {"output_size": (6, 7)},
    ),
    "conv transposed 2d, groups": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=2), (2, 6, 3, 4)),
    "conv transposed 3d": (lambda: nn.ConvTranspose3d(6, 8, (1, 2, 1)), (2, 6, 2, 2, 2)),
    "embedding": (lambda: nn.Embedding(9, 6), ROWS),
    "embedding with padding": (lambda: nn.Embedding(9, 6, padding_idx=2), ROWS),
    "embedding with padding from the end": (lambda: nn.Embedding(9, 6, padding_idx=-1), ROWS),
    "embedding scaled by a float": (lambda: BartScaledWordEmbedding(9, 6, 1, embed_scale=2.5), ROWS),
    "embedding scaled by a buffer": (lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5), ROWS),
    "own forward, linear": (lambda: Scaled(6, 8), (5, 6)),
    "own forward, conv2d standardised": (lambda: Standardised(6, 8, 3), (2, 6, 4, 5)),
    "own forward, conv3d causal": (lambda: Causal(6, 8, (3, 1, 3)), (2, 6, 2, 2, 3)),
    "own forward, embedding": (lambda: Positions(12, 6, padding_idx=2), ROWS),
}
# One of each class of layer, for what does not depend on the options.
KINDS = ["linear", "linear stored (in, out)", "conv1d", "conv2d", "conv2d groups", "conv3d"]
KINDS += ["conv transposed 1d", "conv transposed 2d", "conv transposed 3d", "embedding with padding"]


def build(name, dtype=torch.float64):
    """A module with random parameters, an input and the keyword arguments of its forward."""
    make, shape, *rest = LAYERS[name]
    module = make().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if isinstance(module, nn.Embedding):
        x = torch.randint(9, shape)
        x.view(-1)[:2] = torch.tensor([module.padding_idx or 0, 3])
    else:
        x = torch.randn(shape, dtype=dtype)
    return module, x, (rest[0] if rest else {})


def attach(module, r=3, kernel_r=2, **config):
    """A PeftModel around this one module, and its FLoRA layer; a random update unless said otherwise."""
    config = FloraConfig(target_modules=["layer"], r=r, kernel_r=kernel_r, **{"init_weights": False, **config})
    model = get_peft_model(nn.ModuleDict({"layer": module}), config)
    return model, model.base_model.model.layer


def add(model, name, **config):
    model.add_adapter(name, FloraConfig(target_modules=["layer"], **{"init_weights": False, **config}))


def reference(module, layer, scales=None):
    """W + Σ scale · dW by einsum; the padding row of dW is zero."""
    weight = module.weight.detach().clone()
    for name, scale in (scales or {"default": 1.0}).items():
        core, factors = layer.tucker(name)
        low, high = string.ascii_lowercase[: core.ndim], string.ascii_uppercase[: core.ndim]
        whole = [torch.eye(d, dtype=core.dtype) if f is None else f for d, f in zip(core.shape, factors, strict=True)]
        terms = ",".join(h + c for h, c in zip(high, low, strict=True))
        delta = torch.einsum(f"{low},{terms}->{high}", core, *whole).detach()
        if getattr(module, "padding_idx", None) is not None:
            delta[module.padding_idx] = 0
        weight += scale * delta
    return weight


def expected(module, layer, x, scales=None, **kwargs):
    return functional_call(module, {"weight": reference(module, layer, scales)}, (x,), kwargs)


@pytest.mark.parametrize("name", LAYERS)
class TestForward:
    @pytest.mark.parametrize("route", ["auto", *ROUTES])
    @pytest.mark.parametrize("scale", [1.0, -1.5])
    def test_is_the_base_with_another_weight(self, name, route, scale):
        module, x, kwargs = build(name)
        model, layer = attach(module, scale=scale)
        model.base_model.set_route(route)
        assert_close(layer(x, **kwargs), expected(module, layer, x, {"default": scale}, **kwargs))

    @pytest.mark.parametrize("route", ["auto", *ROUTES])
    def test_gradient_of_the_input_and_none_of_the_base(self, name, route):
        module, x, kwargs = build(name)
        model, layer = attach(module)
        model.base_model.set_route(route)
        if x.is_floating_point():
            theirs = x.clone().requires_grad_()
            expected(module, layer, theirs, **kwargs).square().sum().backward()
            mine = x.clone().requires_grad_()
            layer(mine, **kwargs).square().sum().backward()
            assert_close(mine.grad, theirs.grad)
        else:
            layer(x, **kwargs).square().sum().backward()
        assert all(p.grad is None for p in module.parameters())
        assert all(p.grad is not None for n, p in layer.named_parameters() if "flora_" in n)

    def test_two_active_adapters_add_up(self, name):
        module, x, kwargs = build(name)
        model, layer = attach(module)
        add(model, "second", r=2, kernel_r=None, scale=0.5)
        model.base_model.set_adapter(["default", "second"])
        both = {"default": 1.0, "second": 0.5}
        for route in ("auto", *ROUTES):
            model.base_model.set_route(route)
            assert_close(layer(x, **kwargs), expected(module, layer, x, both, **kwargs))

    def test_of_full_rank(self, name):
        module, x, kwargs = build(name)
        _, layer = attach(module, r=99, kernel_r=None)
        assert len(list(layer.flora_factors["default"].children())) == 0
        assert_close(layer(x, **kwargs), expected(module, layer, x, **kwargs))


@pytest.mark.parametrize("name", LAYERS)
class TestMerge:
    def test_there_and_back(self, name):
        module, x, kwargs = build(name)
        _, layer = attach(module, scale=0.7)
        original, adapted = module.weight.detach().clone(), layer(x, **kwargs)
        weight = reference(module, layer, {"default": 0.7})
        layer.merge()
        assert layer.merged
        assert_close(module.weight, weight)
        assert_close(layer(x, **kwargs), adapted)
        layer.unmerge()
        assert not layer.merged
        assert_close(module.weight.detach(), original)
        assert_close(layer(x, **kwargs), adapted)

    def test_and_unload(self, name):
        module, x, kwargs = build(name)
        model, layer = attach(module)
        adapted = layer(x, **kwargs)
        plain = model.merge_and_unload()["layer"]
        assert plain is module
        assert_close(plain(x, **kwargs), adapted)

    def test_unload(self, name):
        module, x, kwargs = build(name)
        expected = module(x, **kwargs)
        model, _ = attach(module)
        plain = model.unload()["layer"]
        assert plain is module
        assert torch.equal(plain(x, **kwargs), expected)


class TestMergeOfSeveral:
    def test_one_after_the_other(self):
        module, _, _ = build("conv2d")
        model, layer = attach(module)
        add(model, "second", r=2)
        weights = [reference(module, layer, dict.fromkeys(n, 1.0)) for n in (["second"], ["default", "second"])]
        layer.merge(adapter_names=["second"])
        assert_close(module.weight.detach(), weights[0])
        with pytest.warns(UserWarning, match="Already following adapters were merged second"):
            layer.merge(adapter_names=["default"])
        assert layer.merged_adapters == ["second", "default"]
        assert_close(module.weight.detach(), weights[1])
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            layer.merge(adapter_names=["second"])
        assert_close(module.weight.detach(), weights[1])

    def test_twice_is_once(self):
        module, _, _ = build("linear")
        _, layer = attach(module)
        layer.merge()
        weight = module.weight.detach().clone()
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            layer.merge()
        assert torch.equal(module.weight, weight)

    def test_unmerge_with_nothing_merged(self):
        _, layer = attach(build("linear")[0])
        with pytest.warns(UserWarning, match=r"Already unmerged\. Nothing to do\."):
            layer.unmerge()

    def test_disabling_unmerges(self):
        module, x, _ = build("conv2d")
        plain = module(x)
        model, layer = attach(module)
        layer.merge()
        with model.disable_adapter():
            assert_close(layer(x), plain)
        assert_close(layer(x), expected(module, layer, x))

    def test_keeps_channels_last(self):
        module = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
        strides = module.weight.stride()
        _, layer = attach(module)
        layer.merge()
        assert module.weight.stride() == strides
        layer.unmerge()
        assert module.weight.stride() == strides

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_into_half_precision_rounds_once(self, dtype):
        module, _, _ = build("linear", dtype)
        _, layer = attach(module)
        exact = module.weight.float() + layer.get_delta_weight("default")
        layer.merge()
        assert torch.equal(module.weight, exact.to(dtype))

    def test_keeps_the_parameter(self):
        module, _, _ = build("linear")
        parameter, address = module.weight, module.weight.data_ptr()
        _, layer = attach(module)
        layer.merge()
        assert module.weight is parameter
        assert module.weight.data_ptr() == address


class TestSafeMerge:
    @staticmethod
    def two_layers(value):
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
        before = [p.detach().clone() for p in base.parameters()]
        model = get_peft_model(base, FloraConfig(r=2, target_modules=["0", "1"], init_weights=False))
        model.base_model.model[1].tucker("default").core.data[0, 0, 0, 0] = value
        return model, before

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_refuses_before_any_layer_is_touched(self, merge, value):
        model, before = self.two_layers(value)
        if value == 1e38:  # finite, but the base weight is not after adding it
            model.base_model.model[1].scaling["default"] = 1e3
        with pytest.raises(
            ValueError, match=r"^NaNs detected in the merged weights. The adapter default seems to be broken"
        ):
            getattr(model, merge)(safe_merge=True)
        after = [p for n, p in model.named_parameters() if "flora_" not in n]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert not any(m.merged for m in model.base_model.model)

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_unsafe_merges_it(self, merge):
        model, _ = self.two_layers(float("nan"))
        weight = model.base_model.model[1].get_base_layer().weight
        getattr(model, merge)()
        assert torch.isnan(weight).any()

    def test_overflow_of_half_precision(self):
        module = nn.Linear(6, 8).half()
        model, layer = attach(module, scale=1e6)
        before = module.weight.detach().clone()
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(module.weight, before)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            layer.merge(safe_merge=True)
        assert torch.equal(module.weight, before)

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_overflow_of_two_adapters_together(self, merge):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
        before = [p.detach().clone() for p in base.parameters()]
        config = FloraConfig(r=4, target_modules=["0", "1"])
        model = get_peft_model(base, config)
        model.add_adapter("b", copy.copy(config))
        for name in ("default", "b"):  # each is finite by itself
            base[1].tucker(name).core.data.fill_(40000)
        model.base_model.set_adapter(["default", "b"])
        with pytest.raises(ValueError, match=r"The adapter b seems to be broken"):
            getattr(model, merge)(safe_merge=True)
        after = [p for n, p in model.named_parameters() if "flora_" not in n]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert not any(layer.merged for layer in model.base_model.model)

    @pytest.mark.parametrize("name", KINDS)
    def test_is_the_same_merge(self, name):
        module, _, _ = build(name)
        other = copy.deepcopy(module)
        _, layer = attach(module)
        _, twin = attach(other)
        twin.load_state_dict(layer.state_dict())
        layer.merge(safe_merge=True)
        twin.merge()
        assert torch.equal(module.weight, other.weight)

    def test_a_broken_adapter_that_is_not_merged_does_not_matter(self):
        model, layer = attach(build("linear")[0])
        add(model, "broken", r=2)
        layer.tucker("broken").core.data.fill_(float("nan"))
        model.merge_adapter(safe_merge=True)
        assert layer.merged_adapters == ["default"]


class TestDropout:
    def test_is_off_in_evaluation(self):
        module, x, _ = build("conv2d")
        model, layer = attach(module, flora_dropout=0.5)
        model.eval()
        assert_close(layer(x), expected(module, layer, x))

    @pytest.mark.parametrize("name", KINDS)
    def test_is_on_in_training_and_right_on_average(self, name):
        module, x, kwargs = build(name, torch.float32)
        model, layer = attach(module, flora_dropout=0.4)
        model.train()
        assert not torch.equal(layer(x, **kwargs), layer(x, **kwargs))
        if name.startswith("embedding"):
            many = layer(x.expand(4000, *x.shape).contiguous()).mean(0)
        elif x.ndim == len(module.weight.shape):
            many = layer(x.repeat(2000, *(1,) * (x.ndim - 1))).unflatten(0, (2000, -1)).mean(0)
        else:
            many = layer(x.expand(4000, *x.shape).contiguous()).mean(0)
        exact = expected(module, layer, x, **kwargs)
        spread = (exact - layer.base_layer(x)).detach().std().item()
        assert_close(many, exact, rtol=0, atol=0.25 * spread)

    @pytest.mark.parametrize("route", ["auto", *ROUTES])
    @pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d depthwise", "conv transposed 2d"])
    def test_acts_on_the_adapters_input(self, name, route):
        module, x, _ = build(name)
        model, layer = attach(module, flora_dropout=0.5)
        model.train()
        model.base_model.set_route(route)
        torch.manual_seed(7)
        actual = layer(x)
        torch.manual_seed(7)
        dropped = nn.functional.dropout(x, 0.5)
        delta = reference(module, layer) - module.weight
        zero_bias = {"weight": delta, "bias": torch.zeros_like(module.bias)}
        assert_close(actual, module(x) + functional_call(module, zero_bias, (dropped,)))

    def test_of_an_embedding_drops_whole_positions(self):
        module, _, _ = build("embedding")
        model, layer = attach(module, flora_dropout=0.5)
        model.train()
        x = torch.randint(9, (400,))
        change = layer(x) - module(x)
        full = nn.functional.embedding(x, layer.get_delta_weight("default"))
        kept = change.abs().sum(1) > 0
        assert 0.35 < kept.double().mean() < 0.65
        assert_close(change[kept], 2 * full[kept])

    def test_merging_is_deterministic_in_training(self):
        module, _, _ = build("linear")
        model, layer = attach(module, flora_dropout=0.5)
        model.train()
        assert torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("default"))

    def test_of_one_of_two_adapters(self):
        """The other one runs with the base; this one beside it."""
        module, x, _ = build("conv2d")
        model, layer = attach(module, flora_dropout=0.5)
        add(model, "second", r=2)
        model.base_model.set_adapter(["default", "second"])
        model.base_model.set_route("dense")
        model.train()
        torch.manual_seed(7)
        actual = layer(x)
        torch.manual_seed(7)
        delta = {"weight": reference(module, layer) - module.weight, "bias": torch.zeros_like(module.bias)}
        dropped = functional_call(module, delta, (nn.functional.dropout(x, 0.5),))
        assert_close(actual, expected(module, layer, x, {"second": 1.0}) + dropped)
        assert convolutions(layer, x) == 2


class TestEmbedding:
    @pytest.mark.parametrize("route", ["auto", *ROUTES])
    def test_the_padding_row_stays(self, route):
        module, x, _ = build("embedding with padding")
        model, layer = attach(module)
        model.base_model.set_route(route)
        assert not layer.get_delta_weight("default")[2].any()
        padding = x == 2
        assert padding.any()
        assert torch.equal(layer(x)[padding], module(x)[padding])
        layer(x)[padding].sum().backward()
        assert all(p.grad is None or not p.grad.any() for n, p in layer.named_parameters() if "flora_" in n)

    @pytest.mark.parametrize("name", ["embedding scaled by a float", "embedding scaled by a buffer"])
    def test_scaled(self, name):
        module, x, _ = build(name)
        _, layer = attach(module)
        padding = (x == module.padding_idx).unsqueeze(-1)
        change = nn.functional.embedding(x, layer.get_delta_weight("default")).masked_fill(padding, 0)
        assert_close(layer(x), module(x) + 2.5 * change)

    @pytest.mark.parametrize("arguments", [{"sparse": True}, {"scale_grad_by_freq": True}])
    def test_options_about_the_bases_gradient_do_not_apply(self, arguments):
        module, x = nn.Embedding(9, 6, **arguments).double(), torch.randint(9, ROWS)
        _, layer = attach(module)
        assert_close(layer(x), expected(module, layer, x))
        layer(x).sum().backward()
        assert not layer.tucker("default").factors[0].grad.is_sparse


class TestScale:
    def test_pattern(self):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = FloraConfig(r=2, target_modules=["0", "1"], scale=2.0, scale_pattern={"1": 0.5})
        first, second = get_peft_model(base, config).base_model.model
        assert (first.scaling, second.scaling) == ({"default": 2.0}, {"default": 0.5})

    def test_pattern_that_matches_nothing_warns(self):
        config = FloraConfig(r=2, target_modules=["0"], scale_pattern={"nope": 0.5})
        with pytest.warns(RuntimeWarning, match=r"scale_pattern has keys that match no target: \['nope'\]"):
            get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)

    @pytest.mark.parametrize(
        ("act", "scale"),
        [
            (lambda layer: None, 2.0),
            (lambda layer: layer.set_scale("default", 3), 6.0),
            (lambda layer: layer.set_scale("unknown", 3), 2.0),
            (lambda layer: layer.scale_layer(3), 6.0),
            (lambda layer: layer.scale_layer(1), 2.0),
            (lambda layer: (layer.scale_layer(3), layer.unscale_layer(2)), 3.0),
            (lambda layer: (layer.scale_layer(3), layer.unscale_layer()), 2.0),
            (lambda layer: layer.scale_layer(0), 0.0),
        ],
    )
    @pytest.mark.parametrize("name", ["linear", "conv2d", "embedding with padding"])
    def test_at_run_time(self, name, act, scale):
        module, x, _ = build(name)
        _, layer = attach(module, scale=2.0)
        act(layer)
        assert_close(layer(x), expected(module, layer, x, {"default": scale}))
        layer.merge()
        adapted = layer(x)
        layer.unmerge()
        assert_close(adapted, layer(x))

    def test_of_the_active_adapters_only(self):
        model, layer = attach(build("linear")[0])
        add(model, "second", r=2)
        layer.scale_layer(3)
        assert layer.scaling == {"default": 3.0, "second": 1.0}


class Operations(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def convolutions(layer, x):
    with Operations() as counter, torch.no_grad():
        layer(x)
    return counter.calls["convolution"]


class TestFused:
    """The dense route runs the base operation once, with W + dW, where that is the same thing."""

    @staticmethod
    def dense(module, **config):
        model, layer = attach(module, **config)
        model.base_model.set_route("dense")
        return layer

    def test_runs_one_operation(self):
        assert convolutions(self.dense(nn.Conv2d(6, 8, 3)), torch.randn(2, 6, 5, 5)) == 1

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda layer: layer.base_layer.register_forward_hook(lambda module, args, output: output + 1),
            lambda layer: layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
            lambda layer: setattr(layer.base_layer, "forward", lambda x: nn.Conv2d.forward(layer.base_layer, x) * 2),
        ],
        ids=["hook", "pre-hook", "forward"],
    )
    def test_not_where_the_base_is_more_than_its_weight(self, spoil):
        module, x, _ = build("conv2d")
        layer = self.dense(module)
        change = layer(x) - module(x)
        spoil(layer)
        assert_close(layer(x), module(x) + change)
        assert convolutions(layer, x) == 2

    def test_with_dropout_only_in_evaluation(self):
        layer = self.dense(nn.Conv2d(6, 8, 3), flora_dropout=0.1)
        x = torch.randn(2, 6, 5, 5)
        assert convolutions(layer.train(), x) == 2
        assert convolutions(layer.eval(), x) == 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_not_in_half_precision(self, dtype):
        """W + dW would swallow an update that is small next to W."""
        module = nn.Conv2d(6, 8, 3).to(dtype)
        layer = self.dense(module, scale=1e-3)
        x = torch.randn(2, 6, 5, 5, dtype=dtype)
        assert convolutions(layer, x) == 2
        assert layer(x).dtype == dtype

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # that is the point
    def test_not_around_another_tuner(self):
        base = nn.ModuleDict({"layer": nn.Conv2d(6, 8, 3)})
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), base)
        inject_adapter_in_model(FloraConfig(r=2, target_modules=["layer"], init_weights=False), base)
        layer, x = base["layer"], torch.randn(2, 6, 5, 5)
        layer.route = "dense"
        change = nn.functional.conv2d(x, layer.get_delta_weight("default"))
        assert_close(layer(x), layer.base_layer(x) + change)

    def test_two_adapters_run_one_operation(self):
        model, layer = attach(nn.Conv2d(6, 8, 3))
        add(model, "second", r=2)
        model.base_model.set_adapter(["default", "second"])
        model.base_model.set_route("dense")
        assert convolutions(layer, torch.randn(2, 6, 5, 5)) == 1

    def test_keeps_channels_last(self, monkeypatch):
        seen = []

        def spy(x, weight, *args):
            seen.append(weight)
            return nn.functional.conv2d(x, weight, *args)

        monkeypatch.setitem(contract._CONV, 2, spy)
        module = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
        layer = self.dense(module)
        output = layer(torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last))
        (weight,) = seen
        assert weight.stride() == module.weight.stride()
        assert output.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("route", ["nope", "", None, "Dense"])
    def test_unknown_route(self, route):
        model, layer = attach(nn.Conv2d(6, 8, 3))
        with pytest.raises(ValueError, match=r"route must be 'auto' or one of \['factored', .*\], got "):
            model.base_model.set_route(route)
        assert layer.route == "auto"


def test_two_threads_run_one_model():
    """The first one to come is the first one to go, while the other is still in the layer."""
    inside, leave = ({name: threading.Event() for name in ("a", "b")} for _ in range(2))

    class Waiting(nn.Conv1d):
        def forward(self, x):
            weight, name = self.weight, threading.current_thread().name
            if name in inside:
                inside[name].set()
                assert leave[name].wait(10)
            return nn.functional.conv1d(x, weight, self.bias)

    base, x = Waiting(3, 3, 1), torch.randn(2, 3, 4)
    expected_base = base(x)
    model, layer = attach(base)
    expected, outputs = layer(x), {}
    threads = [threading.Thread(target=lambda n=n: outputs.update({n: layer(x)}), name=n, daemon=True) for n in inside]
    for thread in threads:
        thread.start()
        assert inside[thread.name].wait(10)
    for thread in threads:
        leave[thread.name].set()
        thread.join(10)
    assert torch.equal(outputs["a"], expected)
    assert torch.equal(outputs["b"], expected)
    with model.disable_adapter():
        assert torch.equal(layer(x), expected_base)
    assert "weight" not in vars(base)


@pytest.mark.parametrize("name", KINDS)
class TestInPyTorch:
    @pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, name, twin_of):
        module, x, _ = build(name)
        model, layer = attach(module)
        twin = twin_of(model).base_model.model.layer
        assert torch.equal(twin(x), layer(x))
        before = layer(x).detach().clone()
        twin.tucker("default").core.data.add_(1)
        assert torch.equal(layer(x), before)

    @pytest.mark.parametrize("route", ["auto", "dense"])
    def test_compiles_without_graph_breaks(self, name, route):
        module, x, _ = build(name, torch.float32)
        model, layer = attach(module)
        model.base_model.set_route(route)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_close(compiled(x), layer(x))

    def test_autocast(self, name):
        module, x, _ = build(name, torch.float32)
        _, layer = attach(module)
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base = module(x)
            for route in ("auto", *ROUTES):
                layer.route = route
                output = layer(x)
                assert output.dtype == base.dtype
                assert_close(output.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, name, use_reentrant):
        module, x, _ = build(name)
        _, layer = attach(module, flora_dropout=0.3)
        parameters = [p for n, p in layer.named_parameters() if "flora_" in n]
        carrier = torch.zeros((), dtype=torch.float64, requires_grad=True)  # reentrant: an input must need a gradient

        def run(carrier):
            return layer(x) + carrier

        torch.manual_seed(5)
        plain = torch.autograd.grad(run(carrier).square().sum(), parameters)
        torch.manual_seed(5)
        checkpoint(run, carrier, use_reentrant=use_reentrant).square().sum().backward()
        for parameter, gradient in zip(parameters, plain, strict=True):
            assert_close(parameter.grad, gradient)

    def test_double_backward(self, name):
        module, x, _ = build(name)
        _, layer = attach(module)
        core = layer.tucker("default").core
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), core, create_graph=True)
        first.square().sum().backward()
        assert core.grad.abs().max() > 0
        assert torch.isfinite(core.grad).all()


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_compiled_gradients(name):
    module, x, _ = build(name, torch.float32)
    _, layer = attach(module)
    parameters = [p for n, p in layer.named_parameters() if "flora_" in n]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(x).square().sum(), parameters)
    assert_close(mine, torch.autograd.grad(layer(x).square().sum(), parameters))


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding with padding"])
class TestRecorded:
    """What records a forward pass, and what differentiates it along with the values."""

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_with_a_batch_of_any_size(self, name, strict):
        module, x, _ = build(name, torch.float32)
        _, layer = attach(module)
        sizes = ({0: torch.export.Dim("batch", min=1, max=128)},)
        exported = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=sizes, strict=strict).module()
        for batch in (x, x[:1], torch.cat([x] * 20)):
            assert_close(exported(batch), layer(batch))

    @pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own lookup compares sizes
    def test_traced_and_saved(self, name, tmp_path):
        module, x, _ = build(name, torch.float32)
        _, layer = attach(module)
        torch.jit.save(torch.jit.trace(layer, (x,)), tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
        for batch in (x, torch.cat([x] * 20)):
            assert_close(loaded(batch), layer(batch))

    @pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
    def test_forward_mode(self, name):
        module, x, _ = build(name)
        _, layer = attach(module)
        core = layer.tucker("default").core
        direction = torch.randn_like(core)
        with forward_ad.dual_level():
            dual = {"flora_core.default.weight": forward_ad.make_dual(core.detach(), direction)}
            tangent = forward_ad.unpack_dual(functional_call(layer, dual, (x,))).tangent
        y = layer(x)
        weights = torch.randn_like(y)
        (gradient,) = torch.autograd.grad((y * weights).sum(), core)
        assert_close((tangent * weights).sum(), (gradient * direction).sum())


class TestNames:
    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("linear", "flora.Linear("),
            ("linear stored (in, out)", "flora.Linear("),
            ("conv2d", "flora.Conv("),
            ("conv transposed 1d", "flora.ConvTranspose("),
            ("embedding", "flora.Embedding("),
        ],
    )
    def test_repr(self, name, shown):
        _, layer = attach(build(name)[0])
        assert repr(layer).startswith(shown)

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("linear", (6, 8)),
            ("linear stored (in, out)", (6, 8)),
            ("conv2d", (6, 8)),
            ("conv transposed 2d", (6, 8)),
            ("embedding", (9, 6)),
        ],
    )
    def test_features(self, name, sizes):
        _, layer = attach(build(name)[0])
        assert (layer.in_features, layer.out_features) == sizes

    def test_factors_stand_under_their_mode(self):
        _, layer = attach(build("conv2d")[0], r=[3, 6, 2, 3])
        assert layer.flora_core["default"].weight.shape == (3, 6, 2, 3)
        shapes = {mode: tuple(f.weight.shape) for mode, f in layer.flora_factors["default"].items()}
        assert shapes == {"0": (8, 3), "2": (3, 2)}

    def test_weight_and_bias_of_the_base(self):
        module, _, _ = build("conv2d")
        _, layer = attach(module)
        assert layer.weight is module.weight
        assert layer.bias is module.bias
