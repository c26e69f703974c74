"""`UpdatedWeight` acts as `W + dW` in whatever is computed with it, and products with it never build dW."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from florapeft.tucker import Tucker
from florapeft.updated import Update, UpdatedWeight, standing_before, standing_in


def tucker(shape, rank):
    factors = [torch.randn(d, r, dtype=torch.float64) if r < d else None for d, r in zip(shape, rank, strict=True)]
    return Tucker(torch.randn(rank, dtype=torch.float64), tuple(factors))


def updated(shape, *ranks, dropout=None):
    """An `UpdatedWeight` with trainable updates of these ranks, and the plain tensor that it stands for."""
    weight = torch.randn(shape, dtype=torch.float64)
    tuckers = [tucker(shape, rank) for rank in ranks]
    for core, factors in tuckers:
        for tensor in (core, *factors):
            if tensor is not None:
                tensor.requires_grad_()
    updates = [Update.of(t, 0.5 + i, dropout or nn.Identity()) for i, t in enumerate(tuckers)]
    plain = weight + sum((0.5 + i) * t.to_tensor() for i, t in enumerate(tuckers))
    return UpdatedWeight(weight, updates), plain, [t.core for t in tuckers]


STACK, MATRIX = (5, 8, 12), (8, 12)
RANKS = {
    STACK: [(2, 3, 4), (5, 3, 4), (2, 8, 4), (2, 3, 12), (5, 8, 12), (1, 1, 1)],
    MATRIX: [(3, 4), (8, 4), (3, 12), (8, 12), (1, 1)],
}
OFFS = torch.tensor([2, 2, 5, 6, 9], dtype=torch.int32)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


torch.manual_seed(0)  # for the inputs in these tables

# name: the weight's shape, an input, and what is computed; `transformers` has all of these in its experts and routers.
PRODUCTS = {
    "linear": (MATRIX, random(3, 12), lambda x, w: F.linear(x, w)),
    "linear with bias": (MATRIX, random(2, 3, 12), lambda x, w: F.linear(x, w, torch.arange(8.0).double())),
    "linear of one expert": (STACK, random(3, 12), lambda x, w: F.linear(x, w[torch.tensor(2)])),
    "linear of the transpose": (MATRIX, random(3, 8), lambda x, w: F.linear(x, w.t())),
    "x @ w": (MATRIX, random(3, 8), lambda x, w: x @ w),
    "w @ x": (MATRIX, random(12, 3), lambda x, w: w @ x),
    "w @ vector": (MATRIX, random(12), lambda x, w: w @ x),
    "x @ w.T": (MATRIX, random(3, 12), lambda x, w: x @ w.T),
    "mm": (MATRIX, random(3, 8), lambda x, w: torch.mm(x, w)),
    "x @ one expert": (STACK, random(3, 8), lambda x, w: x @ w[1]),
    "matmul, broadcast": (STACK, random(3, 8), lambda x, w: torch.matmul(x, w)),
    "bmm": (STACK, random(5, 3, 8), lambda x, w: torch.bmm(x, w)),
    "method bmm": (STACK, random(5, 3, 12), lambda x, w: x.bmm(w.mT)),
    "bmm of chosen experts": (STACK, random(4, 1, 8), lambda x, w: torch.bmm(x, w[torch.tensor([0, 3, 3, 1])])),
    "chosen experts bmm": (STACK, random(4, 12, 1), lambda x, w: torch.bmm(w[torch.tensor([0, 3, 3, 1])], x)),
    "slice of the experts": (STACK, random(2, 3, 8), lambda x, w: x @ w[1:3]),
    "grouped": (STACK, random(9, 8), lambda x, w: F.grouped_mm(x.float(), w.to(torch.float32), offs=OFFS).double()),
    "grouped, transposed": (
        STACK,
        random(9, 12),
        lambda x, w: torch._grouped_mm(x.float(), w.transpose(-2, -1).to(torch.float32), offs=OFFS).double(),
    ),
    "grouped by transformers": (
        STACK,
        random(9, 8),
        lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w, offs=OFFS),
    ),
}
GROUPED = {
    "grouped": lambda x, w: F.grouped_mm(x, w, offs=OFFS),
    "grouped, transposed": lambda x, w: torch._grouped_mm(x, w.transpose(-2, -1), offs=OFFS),
}
# What no product of the above is, is asked of the plain tensor.
OTHERS = {
    "sum": (MATRIX, None, lambda x, w: w.sum()),
    "einsum": (STACK, random(3, 8), lambda x, w: torch.einsum("na,eab->enb", x, w)),
    "chunk": (MATRIX, random(3, 12), lambda x, w: F.linear(x, w.chunk(2)[1])),
    "entry": (MATRIX, None, lambda x, w: w[1, 2]),
    "mask": (MATRIX, None, lambda x, w: w[torch.tensor([True, False, True, True, False, False, True, True])]),
    "another transpose": (STACK, None, lambda x, w: w.transpose(0, 1)),
    "product with a tensor": (MATRIX, random(8, 12), lambda x, w: x * w),
    "stack of both": (MATRIX, None, lambda x, w: torch.stack([w, w])),
    "scaled": (MATRIX, None, lambda x, w: 2 * w / w.norm()),
    "embedding": (MATRIX, torch.tensor([1, 4]), lambda x, w: F.embedding(x, w)),
    "keyword": (MATRIX, random(3, 12), lambda x, w: F.linear(input=x, weight=w)),
    "rows": (STACK, random(3, 12), lambda x, w: torch.stack([F.linear(x, part) for part in w])),
}
# Every operator of a tensor that has no product's factored form, with the weight on either side.
OPERATORS = {
    "-w": lambda x, w: -w,
    "+w": lambda x, w: +w,
    "abs(w)": lambda x, w: abs(w),
    "w + x": lambda x, w: w + x,
    "1 + w": lambda x, w: 1 + w,
    "w - 1": lambda x, w: w - 1,
    "1 - w": lambda x, w: 1 - w,
    "x - w": lambda x, w: x - w,
    "w * x": lambda x, w: w * x,
    "2 * w": lambda x, w: 2 * w,
    "w / x": lambda x, w: w / x,
    "1 / w": lambda x, w: 1 / w,
    "w ** 2": lambda x, w: w**2,
    "2 ** w": lambda x, w: 2**w,
    "w // 2": lambda x, w: w // 2,
    "2 // w": lambda x, w: 2 // w,
    "w % 2": lambda x, w: w % 2,
    "2 % w": lambda x, w: 2 % w,
    "w + w": lambda x, w: w + w,
    "w == 0": lambda x, w: w == 0,
    "w == w": lambda x, w: w == w,
    "x != w": lambda x, w: x != w,
    "w != x": lambda x, w: w != x,
    "w < 0": lambda x, w: w < 0,
    "w <= x": lambda x, w: w <= x,
    "w > 0": lambda x, w: w > 0,
    "x >= w": lambda x, w: x >= w,
    "0.5 in w": lambda x, w: 0.5 in w,
}
CASES = [(name, rank) for name, (shape, *_) in {**PRODUCTS, **OTHERS}.items() for rank in RANKS[shape]]


@pytest.mark.parametrize(("name", "rank"), CASES)
class TestActsAsTheSum:
    def test_value_and_gradients(self, name, rank):
        shape, x, compute = {**PRODUCTS, **OTHERS}[name]
        weight, plain, cores = updated(shape, rank, [max(1, r - 1) for r in rank])
        loose = {"rtol": 1e-3, "atol": 1e-2} if name.startswith("grouped") else {}  # those are in float32
        results = []
        for value in (weight, plain):
            own = None if x is None else x.clone().requires_grad_(x.is_floating_point())
            result = compute(own, value)
            inputs = [*cores, *([own] if own is not None and own.requires_grad else [])]
            results.append((result, torch.autograd.grad(result.square().sum(), inputs, retain_graph=True)))
        assert_close(results[0][0], results[1][0], **loose)
        assert_close(results[0][1], results[1][1], **loose)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    weight, plain, _ = updated(MATRIX, (3, 4))
    expected = OPERATORS[name](x := random(8, 12), plain)
    result = OPERATORS[name](x, weight)
    assert type(result) is type(expected)
    assert_close(result, expected)


@pytest.mark.parametrize("one", [0.0, 1.0])
def test_a_single_entry_is_a_number(one):
    weight = UpdatedWeight(torch.full((1, 1), one), [])
    assert (bool(weight), float(weight), int(weight), one in weight) == (bool(one), one, int(one), True)


def test_is_hashed_by_identity():
    weight, twin = (UpdatedWeight(torch.ones(1, 1), []) for _ in range(2))
    assert len({weight, twin, weight}) == 2


class NothingLike(TorchDispatchMode):
    """Fails where a tensor of one of these shapes is made."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes = {tuple(shape) for shape in shapes}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = (
            "select",
            "transpose",
            "slice",
            "detach",
            "t.default",
            "unsqueeze",
            "view",
            "expand",
            "permute",
            "alias",
        )
        if isinstance(result, torch.Tensor) and not any(name in str(func) for name in views):
            assert tuple(result.shape) not in self.shapes, f"{func} made {tuple(result.shape)}"
        return result


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_do_not_build_the_update(name):
    shape, x, compute = PRODUCTS[name]
    if "chosen" in name:  # the base itself copies the experts that it chooses
        pytest.skip("the chosen experts' weights are copied by the base")
    weight, plain, _ = updated(shape, [2] * len(shape))
    if name.startswith("grouped"):
        weight = UpdatedWeight(weight.weight.float(), weight.updates)
        x = x.float()
        compute = {"grouped by transformers": compute}.get(name, GROUPED.get(name))
    with NothingLike(shape, shape[1:], shape[-2:], shape[-2:][::-1], (shape[0], *shape[:0:-1])):
        compute(x, weight)
    with pytest.raises(AssertionError, match="made"), NothingLike(shape, shape[-2:], shape[-2:][::-1]):
        compute(x, plain + 0)  # that the check can fail


class TestTensorLike:
    def test_metadata_costs_nothing(self):
        weight, plain, _ = updated(STACK, (2, 3, 4))
        with NothingLike(STACK):
            assert weight.shape == plain.shape
            assert (weight.dtype, weight.device, weight.ndim, weight.dim()) == (plain.dtype, plain.device, 3, 3)
            assert weight.size(1) == 8
            assert len(weight) == 5
            assert weight.numel() == plain.numel()

    def test_dropout_acts_on_the_input_of_the_update(self):
        torch.manual_seed(0)
        weight, plain, _ = updated(MATRIX, (3, 4), dropout=nn.Dropout(0.5))
        x = random(3, 12)
        base = F.linear(x, weight.weight)
        outputs = {F.linear(x, weight).sum().item() for _ in range(4)}
        assert len(outputs) == 4
        weight, plain, _ = updated(MATRIX, (3, 4), dropout=lambda value: value * 0)
        assert_close(F.linear(x, weight), F.linear(x, weight.weight))
        assert not torch.equal(F.linear(x, plain), base)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_small_updates_survive_half_precision(self, dtype):
        """They vanish in the rounded sum of the weights; products are of each by itself."""
        w, small = torch.eye(4, dtype=dtype), torch.full((4, 4), 1e-4) - torch.diag(torch.full((4,), 1e-4))
        weight = UpdatedWeight(w + 1, [Update.of(Tucker(small, (None, None)), 1.0, nn.Identity())])
        assert torch.equal(weight.dense(), w + 1)
        weight.weight = w * 0  # nothing that the update could vanish beside
        x = torch.eye(4, dtype=dtype)
        assert_close(F.linear(x, weight), small.T.to(dtype))
        kernel = UpdatedWeight(
            torch.zeros(4, 4, 1, 1, dtype=dtype),
            [Update.of(Tucker(small[..., None, None], (None,) * 4), 1.0, nn.Identity())],
        )
        assert_close(F.conv2d(x[:, :, None, None], kernel)[:, :, 0, 0], small.T.to(dtype))

    def test_autocast(self):
        weight, plain, _ = updated(STACK, (2, 3, 4))
        (update,) = weight.updates
        single = Update(*(tensor.float() for tensor in update[:3]), nn.Identity())
        weight = UpdatedWeight(weight.weight.float(), [single])
        x = random(4, 12).float()
        with torch.autocast("cpu", torch.bfloat16):
            result = F.linear(x, weight[1])
        assert result.dtype == torch.bfloat16
        assert_close(result.double(), F.linear(x.double(), plain[1]), rtol=0.05, atol=0.2)

    def test_copies(self):
        weight, plain, _ = updated(MATRIX, (3, 4))
        assert_close(UpdatedWeight(weight.weight, weight.updates).dense(), plain)
        (update,) = weight.updates
        detached = UpdatedWeight(weight.weight, [Update(*(tensor.detach() for tensor in update[:3]), nn.Identity())])
        assert_close(copy.deepcopy(detached).dense(), plain.detach())
        assert_close(pickle.loads(pickle.dumps(detached)).dense(), plain.detach())


class TestStandingIn:
    def test_while_it_lasts(self):
        layer, other = nn.Linear(2, 2), torch.ones(2, 2)
        weight, keys = layer.weight, list(layer.state_dict())
        with standing_in([(layer, "weight", other)]):
            assert layer.weight is other
            assert list(layer.state_dict()) == keys
            assert dict(layer.named_parameters())["weight"] is weight
        assert layer.weight is weight

    @pytest.mark.parametrize("own", [False, True])  # FSDP has one
    @pytest.mark.parametrize("first", [0, 1])
    def test_contexts_that_overlap(self, first, own):
        """As those of two threads that run one model."""
        layer = nn.Linear(2, 2)
        if own:
            vars(layer)["weight"] = torch.zeros(2, 2)
        weight, values = layer.weight, [torch.ones(2, 2), torch.ones(2, 2)]
        contexts = [standing_in([(layer, "weight", value)]) for value in values]
        for context, value in zip(contexts, values, strict=True):
            context.__enter__()
            assert layer.weight is value
            assert standing_before(layer, "weight") is weight
        contexts[first].__exit__(None, None, None)
        assert layer.weight is values[1 - first]
        assert standing_before(layer, "weight") is weight
        contexts[1 - first].__exit__(None, None, None)
        assert layer.weight is weight
        assert ("weight" in vars(layer)) == own

    def test_after_an_error(self):
        layer = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="stop"), standing_in([(layer, "weight", None), (layer, "bias", None)]):
            raise ValueError("stop")
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(layer.bias, nn.Parameter)
