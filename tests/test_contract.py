"""Every route against the plain formula: torch's own module, with dW from one einsum in place of its weight."""

import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from florapeft import contract
from florapeft.contract import ROUTES
from florapeft.tucker import Tucker

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

# Relative to the largest entry of what is compared.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Case:
    """A module without bias, an input, and keyword arguments of its forward."""

    def __init__(self, module, shape, **kwargs):
        self.module, self.shape, self.kwargs = module, shape, kwargs

    def input(self, dtype):
        if isinstance(self.module, nn.Embedding):
            return torch.randint(self.module.num_embeddings, self.shape)
        return torch.randn(self.shape, dtype=dtype, requires_grad=True)

    def operation(self, x):
        if isinstance(self.module, (nn.Linear, Conv1D)):
            return contract.Linear(input_mode=0 if isinstance(self.module, Conv1D) else 1)
        if isinstance(self.module, nn.Embedding):
            return contract.Embedding()
        if isinstance(self.module, tuple(CONV_TRANSPOSE.values())):
            return contract.ConvTranspose.of(self.module, x, self.kwargs.get("output_size"))
        return contract.Conv.of(self.module)


def conv(order, shape, *args, **kwargs):
    return Case(CONV[order](6, 8, *args, bias=False, **kwargs), shape)


def transposed(order, shape, *args, output_size=None, **kwargs):
    arguments = {} if output_size is None else {"output_size": output_size}
    return Case(CONV_TRANSPOSE[order](6, 8, *args, bias=False, **kwargs), shape, **arguments)


def gpt2(x_dim, y_dim):
    module = Conv1D(y_dim, x_dim)
    nn.init.zeros_(module.bias)
    return module


CASES = {
    "linear": lambda: Case(nn.Linear(6, 8, bias=False), (5, 6)),
    "linear of a vector": lambda: Case(nn.Linear(6, 8, bias=False), (6,)),
    "linear of a sequence": lambda: Case(nn.Linear(6, 8, bias=False), (2, 3, 6)),
    "linear to one": lambda: Case(nn.Linear(6, 1, bias=False), (5, 6)),
    "linear stored (in, out)": lambda: Case(gpt2(6, 8), (2, 3, 6)),
    "embedding": lambda: Case(nn.Embedding(9, 4), (3, 5)),
    "embedding of one row": lambda: Case(nn.Embedding(9, 4), ()),
    "conv1d": lambda: conv(1, (2, 6, 9), 3),
    "conv2d": lambda: conv(2, (2, 6, 9, 8), 3),
    "conv3d": lambda: conv(3, (2, 6, 5, 4, 6), 2),
    "conv2d 1x1": lambda: conv(2, (2, 6, 4, 5), 1),
    "conv2d 1x1, stride 2": lambda: conv(2, (2, 6, 4, 5), 1, stride=2),
    "conv2d unequal sides": lambda: conv(2, (2, 6, 9, 8), (1, 4)),
    "conv3d unequal sides": lambda: conv(3, (2, 6, 5, 6, 7), (1, 2, 3)),
    "conv2d stride": lambda: conv(2, (2, 6, 9, 8), 3, stride=2),
    "conv2d stride per axis": lambda: conv(2, (2, 6, 9, 8), 3, stride=(1, 3)),
    "conv2d padding": lambda: conv(2, (2, 6, 5, 4), 3, padding=2),
    "conv2d padding per axis": lambda: conv(2, (2, 6, 5, 4), 3, padding=(0, 2)),
    "conv2d same": lambda: conv(2, (2, 6, 5, 4), 3, padding="same"),
    "conv2d same, even kernel": lambda: conv(2, (2, 6, 5, 7), (4, 2), padding="same"),
    "conv2d valid": lambda: conv(2, (2, 6, 5, 4), 3, padding="valid"),
    "conv2d dilation": lambda: conv(2, (2, 6, 9, 8), 3, dilation=2),
    "conv2d dilation per axis, same": lambda: conv(2, (2, 6, 9, 8), 3, dilation=(1, 3), padding="same"),
    "conv1d reflect": lambda: conv(1, (2, 6, 7), 3, padding=2, padding_mode="reflect"),
    "conv2d reflect per axis": lambda: conv(2, (2, 6, 5, 6), 3, padding=(1, 2), padding_mode="reflect"),
    "conv2d replicate": lambda: conv(2, (2, 6, 5, 6), 3, padding=1, stride=2, padding_mode="replicate"),
    "conv2d circular": lambda: conv(2, (2, 6, 5, 6), 3, padding=(2, 1), padding_mode="circular"),
    "conv2d circular same": lambda: conv(2, (2, 6, 5, 6), (2, 3), padding="same", padding_mode="circular"),
    "conv2d reflect valid": lambda: conv(2, (2, 6, 5, 6), 3, padding="valid", padding_mode="reflect"),
    "conv3d replicate": lambda: conv(3, (2, 6, 4, 4, 4), 3, padding=1, padding_mode="replicate"),
    "conv3d circular": lambda: conv(3, (1, 6, 4, 4, 4), 2, padding=(0, 1, 2), padding_mode="circular"),
    "conv2d groups": lambda: conv(2, (2, 6, 9, 8), 3, groups=2),
    "conv2d groups, reflect": lambda: conv(2, (2, 6, 9, 8), 3, groups=2, padding=1, padding_mode="reflect"),
    "conv2d depthwise": lambda: Case(nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "conv1d depthwise, multiplier": lambda: Case(nn.Conv1d(6, 12, 3, groups=6, bias=False), (2, 6, 5)),
    "conv1d unbatched": lambda: conv(1, (6, 9), 3),
    "conv2d unbatched": lambda: conv(2, (6, 9, 8), 3, padding=1),
    "conv2d unbatched circular": lambda: conv(2, (6, 5, 6), 3, padding=1, padding_mode="circular"),
    "conv3d unbatched": lambda: conv(3, (6, 3, 4, 5), 2),
    "conv transposed 1d": lambda: transposed(1, (2, 6, 5), 3),
    "conv transposed 2d": lambda: transposed(2, (2, 6, 4, 5), 3, stride=2),
    "conv transposed 3d": lambda: transposed(3, (2, 6, 3, 2, 3), (1, 2, 3), stride=(1, 2, 1)),
    "conv transposed 1x1": lambda: transposed(2, (2, 6, 4, 5), 1),
    "conv transposed padding, dilation": lambda: transposed(2, (2, 6, 4, 5), 3, stride=2, padding=(1, 2), dilation=2),
    "conv transposed output_padding": lambda: transposed(2, (2, 6, 4, 5), 3, stride=3, output_padding=(1, 2)),
    "conv transposed output_size": lambda: transposed(2, (2, 6, 4, 5), 3, stride=2, output_size=(10, 11)),
    "conv transposed groups": lambda: transposed(2, (2, 6, 4, 5), 3, stride=2, groups=2),
    "conv transposed depthwise": lambda: Case(nn.ConvTranspose1d(6, 6, 4, groups=6, bias=False), (2, 6, 5)),
    "conv transposed unbatched": lambda: transposed(2, (6, 4, 5), 3, stride=2, padding=1),
}


def delta_weight(core, factors):
    low, high = string.ascii_lowercase[: core.ndim], string.ascii_uppercase[: core.ndim]
    given = [(h + c, f) for h, c, f in zip(high, low, factors, strict=True) if f is not None]
    output = "".join(c if f is None else h for h, c, f in zip(high, low, factors, strict=True))
    return torch.einsum(",".join([low, *(term for term, _ in given)]) + f"->{output}", core, *(f for _, f in given))


def random_tucker(shape, rank, dtype):
    core = torch.randn(rank, dtype=dtype, requires_grad=True)
    factors = tuple(
        torch.randn(d, r, dtype=dtype, requires_grad=True) if r < d else None for d, r in zip(shape, rank, strict=True)
    )
    return Tucker(core, factors)


def assert_close_to_scale(actual, expected, dtype):
    tolerance = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def gradients(output, seed, x, tucker):
    inputs = [t for t in (x, tucker.core, *tucker.factors) if t is not None and t.is_floating_point()]
    return torch.autograd.grad(output, inputs, seed)


def check(case, route, rank, dtype=torch.float64, scale=1.0):
    """The output of the route and all its gradients are those of torch's module with weight `scale · dW`."""
    module, x = case.module.to(dtype), case.input(dtype)
    tucker = random_tucker(module.weight.shape, rank, dtype)
    actual = contract.contract(case.operation(x), tucker, x, route=route, scale=scale)

    exact = Tucker(
        *(tucker.core.detach().double(), tuple(None if f is None else f.detach().double() for f in tucker.factors))
    )
    for tensor in (exact.core, *exact.factors):
        if tensor is not None:
            tensor.requires_grad_()
    exact_x = x.detach().double().requires_grad_() if x.is_floating_point() else x
    expected = functional_call(module.double(), {"weight": scale * delta_weight(*exact)}, (exact_x,), case.kwargs)

    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert_close_to_scale(actual, expected, dtype)
    seed = torch.randn_like(expected)
    for mine, theirs in zip(
        gradients(actual, seed.to(dtype), x, tucker), gradients(expected, seed, exact_x, exact), strict=True
    ):
        assert_close_to_scale(mine, theirs, dtype)


def ranks_of(shape):
    """Truncated everywhere; whole somewhere; the kernel whole; everything whole."""
    truncated = tuple(max(1, (d + 1) // 2) for d in shape)
    return {
        "truncated": truncated,
        "output whole": (shape[0], *truncated[1:]),
        "input whole": (truncated[0], shape[1], *truncated[2:]),
        "kernel whole": (*truncated[:2], *shape[2:]),
        "whole": tuple(shape),
    }


# torch says so once per process, of its own layer too.
same_with_an_even_kernel = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@same_with_an_even_kernel
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_is_the_plain_formula(name, route):
    case = CASES[name]()
    for rank in ranks_of(case.module.weight.shape).values():
        check(CASES[name](), route, rank)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["linear", "linear stored (in, out)", "embedding", "conv2d", "conv transposed 2d"])
def test_scale(name, route):
    case = CASES[name]()
    check(case, route, ranks_of(case.module.weight.shape)["truncated"], scale=-2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "name",
    ["linear of a sequence", "linear stored (in, out)", "embedding", "conv1d reflect", "conv2d", "conv3d",
     "conv2d groups", "conv2d circular", "conv transposed 2d"],
)  # fmt: skip
def test_other_dtypes(name, route, dtype):
    case = CASES[name]()
    check(case, route, ranks_of(case.module.weight.shape)["truncated"], dtype)


@same_with_an_even_kernel
@pytest.mark.parametrize("name", CASES)
def test_apply_is_the_module_bit_for_bit(name):
    case = CASES[name]()
    x, module = case.input(torch.float32), case.module
    bias = getattr(module, "bias", None)
    assert torch.equal(case.operation(x).apply(x, module.weight, bias), module(x, **case.kwargs))


@pytest.mark.parametrize("module", [nn.Linear(6, 8), Conv1D(8, 6), nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(6, 8, 3)])
def test_apply_with_bias(module):
    nn.init.normal_(module.bias)
    x = torch.randn(2, 6, 6, 6)
    assert torch.equal(Case(module, x.shape).operation(x).apply(x, module.weight, module.bias), module(x))


@st.composite
def linears(draw):
    size = st.integers(1, 7)
    case = Case(nn.Linear(draw(size), draw(size), bias=False), tuple(draw(st.lists(st.integers(1, 3), max_size=3))))
    case.shape = (*case.shape, case.module.in_features)
    return case


@st.composite
def convolutions(draw):
    order = draw(st.integers(1, 3))

    def per_axis(strategy):
        return tuple(draw(st.lists(strategy, min_size=order, max_size=order)))

    kernel, dilation = per_axis(st.integers(1, 3)), per_axis(st.integers(1, 2))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    batch = () if draw(st.booleans()) else (draw(st.integers(1, 2)),)
    if draw(st.booleans()):
        stride, padding = per_axis(st.integers(1, 3)), [draw(st.integers(0, r // 2)) for r in reach]
        output_padding = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        module = CONV_TRANSPOSE[order](
            *channels, kernel, stride, tuple(padding), tuple(output_padding), groups, False, dilation
        )
        return Case(module, (*batch, channels[0], *per_axis(st.integers(1, 4))))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", None]))
    stride = (1,) * order if padding == "same" else per_axis(st.integers(1, 3))
    if padding is None:
        padding = per_axis(st.integers(0, 2))
    sides = [max(r + 1, 3) + draw(st.integers(0, 2)) for r in reach]
    module = CONV[order](*channels, kernel, stride, padding, dilation, groups, False, mode)
    return Case(module, (*batch, channels[0], *sides))


@same_with_an_even_kernel
@settings(max_examples=150)
@given(case=st.one_of(linears(), convolutions()), data=st.data(), route=st.sampled_from(ROUTES))
def test_property_all_shapes_ranks_and_options(case, data, route):
    rank = tuple(data.draw(st.integers(1, d)) for d in case.module.weight.shape)
    check(case, route, rank)
    x = case.input(torch.float64)
    shape = case.module.weight.shape
    for fused in (False, True):
        assert contract.choose_route(case.operation(x), shape, rank, x, fused=fused) in ROUTES


class TestDtypes:
    """Computed in the dtype of the input, whatever the adapter's; what is cast is the adapter's small tensors."""

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(
        "name", ["linear", "linear stored (in, out)", "conv2d", "conv2d groups", "conv transposed 2d"]
    )
    def test_half_precision_input_and_full_precision_adapter(self, name, route):
        case = CASES[name]()
        x = case.input(torch.bfloat16)
        tucker = random_tucker(case.module.weight.shape, ranks_of(case.module.weight.shape)["truncated"], torch.float32)
        output = contract.contract(case.operation(x), tucker, x, route=route)
        assert output.dtype == torch.bfloat16
        expected = functional_call(case.module.double(), {"weight": delta_weight(*tucker).double()}, (x.double(),))
        assert_close_to_scale(output, expected, torch.bfloat16)
        output.sum().backward()
        assert tucker.core.grad.dtype == torch.float32
        assert x.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize("route", ROUTES)
    def test_row_numbers_take_the_adapters(self, route):
        tucker = random_tucker((9, 4), (3, 2), torch.float16)
        assert contract.contract(contract.Embedding(), tucker, torch.tensor([1, 2]), route=route).dtype == torch.float16


class TestMemory:
    """What the backward pass keeps: nothing of the size of dW, and no second copy of the input."""

    CASES = {
        "linear": (nn.Linear(64, 48, bias=False), (8, 64), (4, 4)),
        "linear stored (in, out)": (gpt2(64, 48), (8, 64), (4, 4)),
        "conv2d": (nn.Conv2d(64, 48, 3, bias=False, padding=1), (1, 64, 6, 6), (4, 4, 2, 2)),
        "conv transposed 2d": (nn.ConvTranspose2d(64, 48, 3, bias=False), (1, 64, 6, 6), (4, 4, 2, 2)),
        "embedding": (nn.Embedding(64, 48), (8,), (4, 4)),
    }

    @staticmethod
    def kept(case, rank, route, dtype):
        """Entries of every distinct storage, other than the input's, that autograd keeps."""
        x = case.input(dtype)
        tucker = random_tucker(case.module.weight.shape, rank, torch.float32)
        own = {t.untyped_storage().data_ptr() for t in (x, tucker.core, *tucker.factors) if t is not None}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = contract.contract(case.operation(x), tucker, x, route=route, scale=2.0)
        del output
        return sorted(kept.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", CASES)
    def test_factored(self, name, dtype):
        module, shape, rank = self.CASES[name]
        case = Case(module, shape)
        limit = min(module.weight.numel(), case.input(dtype).numel() if name != "embedding" else 8 * 48)
        assert max(self.kept(case, rank, "factored", dtype)) < limit

    def test_dense_keeps_the_weight(self):
        module, shape, rank = self.CASES["linear"]
        assert max(self.kept(Case(module, shape), rank, "dense", torch.float32)) == 64 * 48


class TestChoice:
    @staticmethod
    def choose(module, shape, rank, fused=False):
        case = Case(module, shape)
        x = torch.empty(shape, device="meta")
        return contract.choose_route(case.operation(x), module.weight.shape, rank, x, fused=fused)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("name", CASES)
    def test_is_a_route(self, name, fused):
        case = CASES[name]()
        x, shape = case.input(torch.float32), case.module.weight.shape
        for rank in ranks_of(shape).values():
            assert contract.choose_route(case.operation(x), shape, rank, x, fused=fused) in ROUTES

    def test_groups_are_dense(self):
        assert self.choose(nn.Conv2d(64, 64, 7, groups=64), (1, 64, 9, 9), (8, 1, 7, 7)) == "dense"
        assert self.choose(nn.ConvTranspose1d(64, 64, 7, groups=2), (1, 64, 9), (8, 8, 7)) == "dense"

    def test_a_wide_linear_layer_is_not_built(self):
        assert self.choose(nn.Linear(1024, 1024), (8, 128, 1024), (8, 8)) == "input_folded"

    def test_a_conv_with_many_channels_is_not_built(self):
        assert self.choose(nn.Conv2d(256, 256, 3, padding=1), (8, 256, 14, 14), (8, 8, 3, 3), fused=True) == "factored"

    def test_a_weight_larger_than_the_data_is_never_built(self):
        module, rank = nn.Linear(8, 8), (7, 7)
        assert self.choose(module, (8, 8), rank, fused=True) == "dense"
        assert self.choose(module, (7, 8), rank, fused=True) != "dense"

    def test_a_tiny_weight_rides_with_the_base(self):
        assert self.choose(nn.Conv2d(3, 16, 3), (64, 3, 32, 32), (16, 3, 3, 3), fused=True) == "dense"
