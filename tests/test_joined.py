"""The joined step of autograd equals the separate operations, is really taken, and keeps what it says it keeps."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close

from florapeft import FloraConfig, joined, kinds
from florapeft.contract import ROUTES, Conv, ConvTranspose, Linear, contract, split
from florapeft.tucker import Tucker

# name: module, input shape
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "linear of one vector": (lambda: nn.Linear(12, 10, bias=False), (12,)),
    "conv1d": (lambda: nn.Conv1d(12, 10, 3, padding=1), (2, 12, 7)),
    "conv2d": (lambda: nn.Conv2d(12, 10, 3, stride=2, padding=1), (2, 12, 7, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(12, 10, (3, 2), dilation=(2, 1), bias=False), (2, 12, 7, 6)),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(12, 10, 1, stride=(2, 3), bias=False), (2, 12, 5, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(12, 10, 1), (2, 12, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(12, 10, (1, 2, 3), padding=1), (2, 12, 3, 4, 4)),
    "conv2d grouped": (lambda: nn.Conv2d(12, 10, 3, stride=2, padding=1, groups=2), (2, 12, 7, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(12, 12, (5, 7), padding=(2, 3), groups=12, bias=False), (2, 12, 6, 7)),
    "conv2d depthwise strided": (
        lambda: nn.Conv2d(12, 12, 5, stride=(2, 1), padding=3, dilation=(1, 2), groups=12),
        (2, 12, 8, 7),
    ),
    "conv2d grouped, large kernel": (lambda: nn.Conv2d(12, 6, 5, padding=2, groups=6), (2, 12, 6, 7)),
    "conv2d depthwise, large image": (lambda: nn.Conv2d(12, 12, 5, padding=2, groups=12), (1, 12, 5, 12)),
    "conv transposed grouped": (lambda: nn.ConvTranspose1d(12, 10, 3, stride=2, groups=2), (2, 12, 5)),
    "conv transposed": (lambda: nn.ConvTranspose2d(12, 10, 3, stride=2, output_padding=1), (2, 12, 3, 4)),
}
WAYS = {"kept": {}, "recomputed": {"recompute": True}, "summed": {"summed": True}}
RANKS = [(3, 4), (10, 4), (3, 12), (10, 12)]  # output, input; whole modes have no factor


def transposed(x):
    """The same values, the axes of its memory in the other order."""
    return x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])


def operation_of(module, x):
    if isinstance(module, nn.Linear):
        return Linear()
    return ConvTranspose.of(module, x, None) if "Transpose" in type(module).__name__ else Conv.of(module)


def build(name, rank, dtype=torch.float64, channels_last=False):
    make, shape = LAYERS[name]
    module, x = make().to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype)
    if channels_last:
        form = {4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim]
        module, x = module.to(memory_format=form), x.to(memory_format=form)
    operation = operation_of(module, x)
    r = [0] * module.weight.ndim
    r[operation.output_mode], r[operation.input_mode] = rank  # capped, where there are groups
    r = [min(n or 2, d) for n, d in zip(r, module.weight.shape, strict=True)]
    factors = [
        torch.randn(d, n, dtype=dtype).requires_grad_() if n < d else None
        for d, n in zip(module.weight.shape, r, strict=True)
    ]
    return module, operation, x.requires_grad_(), Tucker(torch.randn(r, dtype=dtype).requires_grad_(), tuple(factors))


def both(module, operation, x, tuckers, route, **given):
    """Output and gradients of the joined step, and of the separate operations."""
    inputs = [x, *(t for tucker in tuckers for t in (tucker.core, *tucker.factors) if t is not None)]
    parts = [split(operation, tucker, route, 0.5) for tucker in tuckers]
    results = []
    for y in (
        joined.joined(operation, x, module.weight, module.bias, parts, **given),
        sum((contract(operation, t, x, route=route, scale=0.5) for t in tuckers), module(x)),
    ):
        weights = torch.arange(y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
        results.append((y, torch.autograd.grad((y * weights).sum(), inputs)))
    return results


@pytest.mark.parametrize("name", LAYERS)
class TestEqualsTheSeparateOperations:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("route", ROUTES)
    def test_value_and_gradients(self, name, route, rank, way):
        module, operation, x, tucker = build(name, rank)
        mine, reference = both(module, operation, x, [tucker], route, **WAYS[way])
        assert_close(mine, reference)

    @pytest.mark.parametrize("way", WAYS)
    def test_two_updates(self, name, way):
        module, operation, x, tucker = build(name, (3, 4))
        mine, reference = both(module, operation, x, [tucker, build(name, (2, 12))[3]], "factored", **WAYS[way])
        assert_close(mine, reference)

    @pytest.mark.parametrize("order", [torch.Tensor.contiguous, transposed])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("rank", RANKS)
    def test_masks(self, name, rank, way, order):
        module, operation, x, tucker = build(name, rank)
        x = order(x.detach()).requires_grad_()
        mask, parts = torch.rand_like(x) < 0.7, [split(operation, tucker, "factored", 0.5)] * 2
        inputs = [x, *(t for t in (tucker.core, *tucker.factors) if t is not None)]
        results = []
        for y in (
            joined.joined(operation, x, module.weight, module.bias, parts, masks=[mask, None], **WAYS[way]),
            module(x) + sum(contract(operation, tucker, given, scale=0.5) for given in (x * mask, x)),
        ):
            (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            results.append((y, gradient, torch.autograd.grad(gradient.square().sum() + y.square().sum(), inputs)))
        assert_close(*results)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_channels_last_and_dtypes(self, name, dtype, way):
        module, operation, x, tucker = build(name, (3, 4), dtype, channels_last=LAYERS[name][1].__len__() > 3)
        mine, reference = both(module, operation, x, [tucker], "factored", **WAYS[way])
        for a, b in zip((mine[0], *mine[1]), (reference[0], *reference[1]), strict=True):
            assert (a - b).abs().max() <= b.abs().max() * (0.05 if dtype == torch.bfloat16 else 1e-5)
        assert mine[0].dtype == dtype
        assert mine[0].stride() == module(x).stride()

    @pytest.mark.parametrize("way", WAYS)
    def test_double_backward(self, name, way):
        module, operation, x, tucker = build(name, (3, 4))
        parts, results = [split(operation, tucker, "factored", 1.0)], []
        for y in (
            joined.joined(operation, x, module.weight, module.bias, parts, **WAYS[way]),
            module(x) + contract(operation, tucker, x, route="factored"),
        ):
            (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum(), [x, tucker.core]))
        assert_close(results[0], results[1])

    @pytest.mark.parametrize("way", WAYS)
    def test_without_a_gradient_of_the_input(self, name, way):
        module, operation, x, tucker = build(name, (3, 4))
        parts = [split(operation, tucker, "factored", 1.0)]
        joined.joined(operation, x.detach(), module.weight, module.bias, parts, **WAYS[way]).sin().sum().backward()
        mine, tucker.core.grad = tucker.core.grad, None
        (module(x) + contract(operation, tucker, x, route="factored")).sin().sum().backward()
        assert_close(mine, tucker.core.grad)

    def test_what_is_kept(self, name):
        module, operation, x, tucker = build(name, (3, 4))
        parts = [split(operation, tucker, "factored", 1.0)]
        for way, given in WAYS.items():
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
                joined.joined(operation, x, module.weight, module.bias, parts, **given)
            given = {t.data_ptr() for t in (x, module.weight, *(p for p in parts[0] if p is not None))}
            others = [t for t in kept if t.data_ptr() not in given]
            if operation.groups > 1:  # one step: there is nothing between
                assert not others
                continue
            # The core of a linear layer or a pointwise convolution is folded into a factor, which is kept instead.
            if isinstance(operation, Linear) or "1x1" in name:
                others = [t for t in others if t.shape not in ((10, 4), (12, 3))]
            assert len(others) == (1 if way == "kept" else 0)
            assert all(t.numel() < x.numel() or t.shape[1] in (3, 4) or t.shape[-1] in (3, 4) for t in others)

    def test_the_output_can_be_written_to(self, name):
        module, operation, x, tucker = build(name, (3, 4))
        y = joined.joined(operation, x, module.weight, module.bias, [split(operation, tucker, "factored", 1.0)])
        y.relu_().sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("join", [True, False])
def test_strided_pointwise_convolutions_of_few_channels(join, monkeypatch):
    """torch's own gradient of such a weight, channels-last, corrupts memory: neither way may ask for it."""
    monkeypatch.setattr(kinds, "can_join", lambda *args: join)
    model, layer = attach(nn.Conv2d(64, 32, 1, stride=2).to(memory_format=torch.channels_last), init_weights=False)
    x = torch.randn(2, 64, 96, 96).to(memory_format=torch.channels_last)
    for _ in range(3):
        layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def attach(layer, **given):
    model = get_peft_model(nn.ModuleDict({"layer": layer}), FloraConfig(r=3, target_modules=["layer"], **given))
    model.base_model.set_route("factored")
    return model, model.base_model.model["layer"]


class TestIsTaken:
    @pytest.fixture(autouse=True)
    def count(self, monkeypatch):
        self.calls = []
        real = kinds.joined
        monkeypatch.setattr(kinds, "joined", lambda *args, **given: self.calls.append(1) or real(*args, **given))

    @pytest.mark.parametrize(
        ("layer", "shape", "taken"),
        [
            (lambda: nn.Linear(6, 5), (2, 6), True),
            (lambda: nn.Conv2d(6, 5, 3), (2, 6, 4, 4), True),
            (lambda: nn.ConvTranspose1d(6, 5, 3), (2, 6, 4), True),
            (lambda: nn.Conv2d(6, 5, 3), (6, 4, 4), False),  # without a batch
            (lambda: nn.Conv2d(6, 5, 3, padding="same"), (2, 6, 4, 4), False),
            (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (2, 6, 4, 4), False),
            (lambda: nn.Conv2d(6, 6, 3, groups=2), (2, 6, 4, 4), True),
        ],
    )
    def test_by_kind(self, layer, shape, taken):
        _, adapted = attach(layer())
        adapted(torch.randn(shape))
        assert bool(self.calls) == taken

    def test_not_with_hooks_or_a_trained_base(self):
        for change in ("hook", "bias", "weight"):
            model, layer = attach(nn.Linear(6, 5))
            base = layer.get_base_layer()
            if change == "hook":
                base.register_forward_hook(lambda *args: None)
            else:
                getattr(base, change).requires_grad_(True)
            model.train()
            layer(torch.randn(2, 6)).sum().backward()
            assert not self.calls, change
            assert (base.weight.grad is not None) == (change == "weight")
            with torch.no_grad():  # then it matters to nobody that the base could be trained, as under FSDP
                layer(torch.randn(2, 6))
            assert bool(self.calls) == (change != "hook"), change
            self.calls.clear()

    @pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
    def test_not_past_a_hook(self, kind):
        _, layer = attach(nn.Linear(6, 5))
        seen = []
        getattr(layer.get_base_layer(), f"register_{kind}_hook")(lambda *args: seen.append(1))
        layer(torch.randn(2, 6, requires_grad=True)).sum().backward()
        assert seen
        assert not self.calls

    @pytest.mark.parametrize(("module", "shape"), [(nn.Linear(6, 5), (2, 6)), (nn.Conv2d(6, 5, 3), (2, 6, 4, 4))])
    def test_dropout_keeps_a_mask_and_no_second_input(self, module, shape):
        model, layer = attach(module, flora_dropout=0.4, init_weights=False)
        model.base_model.set_recompute(True)
        model.train()
        x, kept = torch.randn(shape), []
        torch.manual_seed(3)
        expected = layer.base_layer(x) + layer._update("default", layer.operation(x), x, "factored")
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            assert_close(layer(x), expected)
        assert self.calls
        assert [t.dtype for t in kept if t.shape == shape and t.data_ptr() != x.data_ptr()] == [torch.bool]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_under_autocast(self, dtype):
        _, layer = attach(nn.Conv2d(6, 5, 3), init_weights=False)
        x = torch.randn(2, 6, 4, 4, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            expected = layer.base_layer(x) + layer._update("default", layer.operation(x), x, "factored")
        assert self.calls
        assert y.dtype == expected.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert x.grad.dtype == dtype
        assert_close(y, expected, rtol=0.05, atol=0.1)

    @pytest.mark.parametrize(("module", "shape"), [(nn.Linear(6, 5), (2, 6)), (nn.Conv2d(6, 5, 3), (2, 6, 4, 4))])
    def test_autocast_leaves_float64(self, module, shape):
        _, layer = attach(module.double(), init_weights=False)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert layer.base_layer(x).dtype == torch.float64
            with pytest.raises(RuntimeError, match=r"dtype|type"):  # as without an adapter
                layer(x.float())
        assert len(self.calls) == 2
        assert_close((y, *torch.autograd.grad(y.sum(), x)), (expected, *torch.autograd.grad(expected.sum(), x)))


def test_set_recompute_reaches_every_layer():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), FloraConfig(r=3, target_modules="all-weights")
    )
    model.base_model.set_route("factored")
    x, kept = torch.randn(2, 6), []
    for recompute in (False, True):
        model.base_model.set_recompute(recompute)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):  # noqa: B023
            model(x)
        kept.append(shapes.count((3, 2)))
    assert kept == [2, 0]
