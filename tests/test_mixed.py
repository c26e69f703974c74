"""Mixed batches: every sample's output is the one that its adapter alone gives, in every kind of layer and model."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from florapeft import FloraConfig
from florapeft.contract import ROUTES

NAMES = ["two", "__base__", "one", "two", "all"]
TOKENS = torch.tensor([[1, 5, 0, 8], [3, 3, 2, 0], [7, 1, 6, 4], [2, 8, 8, 1], [4, 4, 1, 5]])


class Standardized(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * 2


class Doubled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 2


# name: module, shape of one sample (None: row numbers), keyword arguments of its forward
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (6,)),
    "linear, sequence": (lambda: nn.Linear(6, 8, bias=False), (3, 6)),
    "linear stored (in, out)": (lambda: Conv1D(8, 6), (3, 6)),
    "linear of its own": (lambda: DoubledLinear(6, 8), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 7, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"), (6, 4, 5)),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (6, 4, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 4, 5)),
    "conv2d of its own": (lambda: Standardized(6, 8, 3), (6, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (1, 2, 3)), (6, 2, 3, 4)),
    "conv transposed 1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), (6, 4)),
    "conv transposed 2d": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1),
        (6, 3, 4),
        {"output_size": (6, 7)},
    ),
    "conv transposed 2d, groups": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=2), (6, 3, 4)),
    "conv transposed 3d": (lambda: nn.ConvTranspose3d(6, 8, (1, 2, 1)), (6, 2, 2, 2)),
    "embedding": (lambda: nn.Embedding(9, 6), None),
    "embedding with padding": (lambda: nn.Embedding(9, 6, padding_idx=0), None),
    "embedding scaled by a float": (lambda: BartScaledWordEmbedding(9, 6, 1, embed_scale=2.5), None),
    "embedding scaled by a buffer": (lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5), None),
    "embedding of its own": (lambda: Doubled(9, 6), None),
}


def config(**arguments):
    return FloraConfig(**{"r": 3, "target_modules": ["layer"], "init_weights": False, **arguments})


def build(base, **targets):
    """A model in evaluation with the adapters one, two and all, of different ranks and scales."""
    model = get_peft_model(base, config(**targets), adapter_name="one")
    model.add_adapter("two", config(**{"r": 2, "scale": -1.5, **targets}))
    model.add_adapter("all", config(**{"r": 9, "scale": 0.5, **targets}))
    return model.eval()


def layer(module, dtype=torch.float64):
    torch.manual_seed(0)
    module = module.to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.ModuleDict({"layer": module})


def one_by_one(model, run, names, axis=0):
    """Sample by sample, what `run(model)` gives with only that sample's adapter active."""
    active, rows = model.active_adapters, []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                output = run(model)
        else:
            model.set_adapter(name)
            output = run(model)
        rows.append(output.select(axis, i))
    model.base_model.set_adapter(active)
    return torch.stack(rows, axis)


def out(model, x, **kwargs):
    with torch.no_grad():
        y = model(x, **kwargs)
    return y if isinstance(y, torch.Tensor) else y.logits


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


class Calls(nn.Module):
    """A model whose forward is that of its one layer."""

    def __init__(self, module, dtype=torch.float64):
        super().__init__()
        self.layer = layer(module, dtype)["layer"]

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def inputs(name, dtype=torch.float64, count=5):
    make, shape, *rest = LAYERS[name]
    x = TOKENS[:count] if shape is None else torch.randn(count, *shape, dtype=dtype)
    return make(), x, (rest[0] if rest else {})


@pytest.mark.parametrize("name", LAYERS)
class TestLayers:
    @pytest.mark.parametrize("names", [NAMES, ["all"] * 5, ["__base__"] * 5, ["one", "two", "one", "two", "one"]])
    def test_each_sample_has_its_adapter(self, name, names):
        module, x, kwargs = inputs(name)
        model = build(Calls(module))
        expected = one_by_one(model, lambda m: m(x, **kwargs), names)
        assert_close(model(x, adapter_names=names, **kwargs), expected)
        assert names != NAMES or not torch.allclose(expected, model(x, **kwargs))
        assert hooks(model) == []

    @pytest.mark.parametrize("route", ROUTES)
    def test_on_every_route(self, name, route):
        module, x, kwargs = inputs(name)
        model = build(Calls(module), kernel_r=2)
        expected = one_by_one(model, lambda m: m(x, **kwargs), NAMES)
        model.base_model.set_route(route)
        assert_close(model(x, adapter_names=NAMES, **kwargs), expected)

    def test_does_not_depend_on_the_order(self, name):
        module, x, kwargs = inputs(name)
        model, order = build(Calls(module)), [4, 2, 0, 3, 1]
        mixed = model(x, adapter_names=NAMES, **kwargs)
        assert_close(model(x[order], adapter_names=[NAMES[i] for i in order], **kwargs), mixed[order])

    def test_autocast(self, name):
        module, x, kwargs = inputs(name, torch.float32)
        model = build(Calls(module, torch.float32))
        exact = out(model, x, adapter_names=NAMES, **kwargs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = out(model, x, adapter_names=NAMES, **kwargs)
            assert output.dtype == out(model, x, **kwargs).dtype
        assert_close(output.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, name, dtype):
        module, x, kwargs = inputs(name, dtype)
        model = build(Calls(module, dtype))
        expected = one_by_one(model, lambda m: out(m, x, **kwargs), NAMES)
        output = out(model, x, adapter_names=NAMES, **kwargs)
        assert output.dtype == dtype
        assert_close(output, expected, rtol=0.02, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("packed", [True, False])
class TestAttention:
    @staticmethod
    def build(batch_first, packed):
        sizes = {} if packed else {"kdim": 6, "vdim": 4}
        model = build(Calls(nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes)), kernel_r=2)
        shapes = [(5, 3, 8), (5, 4, 8 if packed else 6), (5, 4, 8 if packed else 4)]
        x = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        return model, [tensor if batch_first else tensor.transpose(0, 1) for tensor in x]

    @pytest.mark.parametrize("padding", [False, True])
    @pytest.mark.parametrize("mask", [None, 2, 3])
    def test_masks(self, batch_first, packed, padding, mask):
        model, x = self.build(batch_first, packed)
        kwargs = {"key_padding_mask": torch.arange(4) > torch.tensor([[3], [1], [2], [3], [0]])} if padding else {}
        if mask is not None:
            kwargs["attn_mask"] = torch.rand((3, 4) if mask == 2 else (10, 3, 4)) > 0.8
            kwargs["attn_mask"][..., 0] = False
        axis = 0 if batch_first else 1
        output, weights = model(*x, adapter_names=NAMES, **kwargs)
        assert_close(output, one_by_one(model, lambda m: m(*x, **kwargs)[0], NAMES, axis))
        assert_close(weights, one_by_one(model, lambda m: m(*x, **kwargs)[1], NAMES))
        output, weights = model(*x, need_weights=False, adapter_names=NAMES, **kwargs)
        assert_close(output, one_by_one(model, lambda m: m(*x, **kwargs)[0], NAMES, axis))
        assert weights is None

    def test_of_one_tensor_with_itself(self, batch_first, packed):
        if not packed:
            pytest.skip("query and key differ in size")
        model, (x, *_) = self.build(batch_first, packed)
        expected = one_by_one(model, lambda m: m(x, x, x)[0], NAMES, 0 if batch_first else 1)
        assert_close(model(x, x, x, adapter_names=NAMES)[0], expected)
        with torch.no_grad():
            assert_close(model(query=x, key=x, value=x, adapter_names=NAMES)[0], expected)

    def test_of_one_position(self, batch_first, packed):
        model, x = self.build(batch_first, packed)
        query = x[0][:, :1] if batch_first else x[0][:1]
        expected = one_by_one(model, lambda m: m(query, *x[1:])[0], NAMES, 0 if batch_first else 1)
        assert_close(model(query, *x[1:], adapter_names=NAMES)[0], expected)
        if packed:
            expected = one_by_one(model, lambda m: m(query, query, query)[0], NAMES, 0 if batch_first else 1)
            assert_close(model(query, query, query, adapter_names=NAMES)[0], expected)

    def test_of_another_length(self, batch_first, packed):
        model, x = self.build(batch_first, packed)
        with pytest.raises(ValueError, match=r"Length of `adapter_names` .* got 4 for a query of shape"):
            model(*x, adapter_names=NAMES[:4])
        assert hooks(model) == []


class TestBareParameters:
    @pytest.mark.parametrize("parameters", [["layer.weight"], ["layer.weight", "layer.bias"]])
    @pytest.mark.parametrize("module", [lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(2, 6)])
    def test_of_a_norm(self, module, parameters):
        x = torch.randn(5, 6, 6, dtype=torch.float64)
        model = build(Calls(module()), target_modules=None, target_parameters=parameters)
        expected = one_by_one(model, lambda m: m(x), NAMES)
        assert_close(model(x, adapter_names=NAMES), expected)
        assert not torch.allclose(expected, model(x))
        with pytest.raises(NotImplementedError, match="first axis is the batch, here of 4"):
            model(x, adapter_names=NAMES[:4])

    def test_stacks_of_experts_cannot(self):
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 12, "num_local_experts": 4}
        base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
        model = build(base, target_modules="all-weights")
        expected = out(model, TOKENS)
        with pytest.raises(NotImplementedError, match="`adapter_names` and an adapted MixtralExperts: samples can be"):
            model(TOKENS, adapter_names=NAMES)
        assert hooks(model) == []
        assert torch.equal(out(model, TOKENS), expected)
