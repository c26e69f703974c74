"""Starts: the update is zero, something has a gradient, and after a few steps everything has moved."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from florapeft import FloraConfig
from florapeft.config import STARTS
from florapeft.contract import ROUTES
from florapeft.init import DEFAULT_START, initialize
from florapeft.tucker import Tucker, unfold

# name: module, input shape
KINDS = {
    "linear": (lambda: nn.Linear(10, 12), (5, 10)),
    "linear stored (in, out)": (lambda: Conv1D(12, 10), (5, 10)),
    "linear to two": (lambda: nn.Linear(10, 2), (5, 10)),  # its output mode is whole
    "conv1d": (lambda: nn.Conv1d(10, 12, 3), (2, 10, 7)),
    "conv2d": (lambda: nn.Conv2d(10, 12, 3, padding=1), (2, 10, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(10, 12, 2), (2, 10, 3, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), (2, 12, 7, 7)),
    "conv transposed 1d": (lambda: nn.ConvTranspose1d(10, 12, 3), (2, 10, 7)),
    "conv transposed 2d": (lambda: nn.ConvTranspose2d(10, 12, 3, stride=2), (2, 10, 5, 5)),
    "conv transposed 3d": (lambda: nn.ConvTranspose3d(10, 12, 2), (2, 10, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=3), (4, 5)),
}


def adapt(module, **config):
    model = get_peft_model(nn.ModuleDict({"layer": module}), FloraConfig(target_modules=["layer"], **config))
    return model.base_model.model.layer


def adapted(name, **config):
    build, shape = KINDS[name]
    module = build()
    x = torch.randint(20, shape) if isinstance(module, nn.Embedding) else torch.randn(shape)
    return adapt(module, **{"r": 4, "kernel_r": 2, **config}), x


def tensors(layer):
    core, factors = layer.tucker("default")
    return [t for t in (core, *factors) if t is not None]


def is_orthonormal(matrix):
    gram = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    return torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-5)


@pytest.mark.parametrize("start", [True, *STARTS])
@pytest.mark.parametrize("name", KINDS)
class TestZeroStarts:
    def test_the_output_is_the_bases_bit_for_bit(self, name, start):
        layer, x = adapted(name, init_weights=start)
        expected = layer.base_layer(x)
        for route in ("auto", *ROUTES):
            layer.route = route
            assert torch.equal(layer(x), expected)
        assert not layer.get_delta_weight("default").any()

    def test_something_has_a_gradient_and_nothing_is_broken(self, name, start):
        layer, x = adapted(name, init_weights=start)
        output = layer(x)
        output.backward(torch.randn_like(output))
        gradients = [t.grad for t in tensors(layer)]
        assert all(torch.isfinite(t).all() for t in (*tensors(layer), *gradients))
        assert any(gradient.abs().max() > 1e-3 for gradient in gradients)

    def test_everything_moves_within_three_steps(self, name, start):
        layer, x = adapted(name, init_weights=start)
        before = [t.detach().clone() for t in tensors(layer)]
        optimizer = torch.optim.SGD(tensors(layer), lr=0.1)
        seed = torch.randn_like(layer(x))
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).backward(seed)
            optimizer.step()
        assert all((t - b).abs().max() > 1e-4 for t, b in zip(tensors(layer), before, strict=True))


def test_the_default():
    torch.manual_seed(1)
    default, _ = adapted("conv2d")
    torch.manual_seed(1)
    named, _ = adapted("conv2d", init_weights=DEFAULT_START)
    assert all(torch.equal(a, b) for a, b in zip(tensors(default), tensors(named), strict=True))


class TestZeroOutput:
    @pytest.mark.parametrize("name", [name for name in KINDS if name not in ("linear to two", "embedding")])
    def test_zero_is_the_output_factor_alone(self, name):
        layer, _ = adapted(name, init_weights="zero_output")
        output_mode = 1 if "transposed" in name or "stored" in name else 0
        core, factors = layer.tucker("default")
        assert not factors[output_mode].any()
        others = [f for mode, f in enumerate(factors) if mode != output_mode and f is not None]
        assert others
        assert all(is_orthonormal(f) for f in others)
        assert is_orthonormal(3**0.5 * unfold(core, output_mode))

    @pytest.mark.parametrize(("r", "kernel_r"), [([12, 4, 2, 2], None), ([12, 10, 2, 3], None), ([12, 3, 3, 3], None)])
    def test_the_core_where_the_output_mode_is_whole(self, r, kernel_r):
        layer, _ = adapted("conv2d", init_weights="zero_output", r=r, kernel_r=kernel_r)
        core, factors = layer.tucker("default")
        assert factors[0] is None
        assert not core.any()
        assert all(is_orthonormal(f) for f in factors if f is not None)

    def test_an_embeddings_rows_have_entries_of_unit_variance(self):
        layer = adapt(nn.Embedding(500, 32), r=16, init_weights="zero_output")
        rows = layer.tucker("default").factors[0]
        assert_close(rows.mT @ rows, 500 * torch.eye(16), rtol=0, atol=1e-2)
        assert rows.square().mean().item() == pytest.approx(1.0, rel=1e-4)

    @pytest.mark.parametrize("width", [64, 512])
    def test_the_first_step_of_adam_is_as_large_as_loras(self, width):
        lr, r = 1e-2, 8
        layer = adapt(nn.Linear(width, width), r=r, init_weights="zero_output")
        optimizer = torch.optim.AdamW(tensors(layer), lr=lr)
        layer(torch.randn(4 * width, width)).square().mean().backward()
        optimizer.step()
        first_step = torch.linalg.matrix_norm(layer.get_delta_weight("default").detach(), 2).item()
        bound = lr * (width * r / 3) ** 0.5
        assert 0.3 * bound < first_step <= 1.2 * bound


class TestZeroCore:
    @pytest.mark.parametrize(("start", "gain"), [("released", 0.5), ("variance", 1.0)])
    @pytest.mark.parametrize("r", [4, 25])
    def test_sizes(self, start, gain, r):
        layer = adapt(nn.Linear(4000, 3000), r=r, init_weights=start)
        core, factors = layer.tucker("default")
        assert not core.any()
        for factor in factors:
            assert factor.var().item() == pytest.approx(gain / r, rel=0.06)
            assert factor.mean().abs().item() < 0.02

    def test_released_is_kaiming_normal_of_the_released_code(self):
        layer = adapt(nn.Linear(4000, 3000), r=9, init_weights="released")
        expected = nn.init.kaiming_normal_(torch.empty(4000, 9), a=3**0.5)
        assert layer.tucker("default").factors[1].std().item() == pytest.approx(expected.std().item(), rel=0.03)


class TestRandomStart:
    @pytest.mark.parametrize("name", KINDS)
    def test_is_visible_finite_and_moderate(self, name):
        layer, x = adapted(name, init_weights=False)
        change = (layer(x) - layer.base_layer(x)).detach()
        assert torch.isfinite(change).all()
        assert 1e-2 < change.square().mean().sqrt() < 1.0

    @pytest.mark.parametrize("width", [64, 1024])
    def test_does_not_grow_with_the_width(self, width):
        layer = adapt(nn.Linear(width, width), r=16, init_weights=False)
        x = torch.randn(64, width)
        assert 1e-2 < (layer(x) - layer.base_layer(x)).std() < 1.0


class TestElsewhere:
    @pytest.mark.parametrize("start", [True, False, *STARTS])
    def test_meta_tensors_are_left_alone(self, start):
        core = torch.empty(2, 3, device="meta")
        initialize(Tucker(core, (None, None)), start, input_mode=1, output_mode=0, lookup=False)
        assert core.is_meta

    @pytest.mark.parametrize("start", [True, False, *STARTS])
    @pytest.mark.parametrize("cast", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["linear", "linear to two", "conv2d", "embedding"])
    def test_half_precision_bases(self, name, dtype, cast, start):
        build, shape = KINDS[name]
        module = build().to(dtype)
        x = torch.randint(20, shape) if isinstance(module, nn.Embedding) else torch.randn(shape, dtype=dtype)
        expected = module(x)
        config = FloraConfig(r=4, target_modules=["layer"], init_weights=start)
        model = get_peft_model(nn.ModuleDict({"layer": module}), config, autocast_adapter_dtype=cast)
        layer = model.base_model.model.layer
        assert {t.dtype for t in tensors(layer)} == {torch.float32 if cast else dtype}
        assert all(torch.isfinite(t).all() for t in tensors(layer))
        assert layer(x).dtype == dtype
        assert torch.equal(layer(x), expected) == (start is not False)

    @pytest.mark.parametrize("start", [True, False, *STARTS])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_tensors(self, dtype, start):
        tucker = Tucker(torch.empty(3, 4, dtype=dtype), tuple(torch.empty(9, r, dtype=dtype) for r in (3, 4)))
        initialize(tucker, start, input_mode=1, output_mode=0, lookup=False)
        assert torch.isfinite(tucker.core).all()
        assert all(torch.isfinite(factor).all() for factor in tucker.factors)
        assert tucker.to_tensor().any() == (start is False)

    def test_the_seed_decides(self):
        torch.manual_seed(3)
        first, _ = adapted("conv2d", init_weights=False)
        torch.manual_seed(3)
        second, _ = adapted("conv2d", init_weights=False)
        third, _ = adapted("conv2d", init_weights=False)
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
        assert not torch.equal(tensors(first)[0], tensors(third)[0])
