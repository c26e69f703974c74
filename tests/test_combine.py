"""The algebra of weighted sums of adapters: exact, and compressed without building the sum."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from florapeft import Tucker, hooi
from florapeft.combine import compress, concatenate


def tucker(shape, rank, dtype=torch.float64):
    """A random Tucker tensor; modes of full rank are whole."""
    factors = [None if r == d else torch.randn(d, r, dtype=dtype) for d, r in zip(shape, rank, strict=True)]
    return Tucker(torch.randn(rank, dtype=dtype), tuple(factors))


@st.composite
def parts(draw, most=4):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    ranks = [tuple(draw(st.integers(1, d)) for d in shape) for _ in range(draw(st.integers(1, most)))]
    weights = [draw(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0])) for _ in ranks]
    return shape, ranks, weights


class TestConcatenate:
    @given(parts())
    def test_is_the_weighted_sum(self, given):
        shape, ranks, weights = given
        tuckers = [tucker(shape, rank) for rank in ranks]
        result = concatenate(tuckers, weights)
        assert_close(result.to_tensor(), sum(w * t.to_tensor() for w, t in zip(weights, tuckers, strict=True)))
        sums = [sum(rank[mode] for rank in ranks) for mode in range(len(shape))]
        assert result.rank == tuple(map(min, sums, shape))
        assert [f is None for f in result.factors] == [r == d for r, d in zip(result.rank, shape, strict=True)]

    @pytest.mark.parametrize(
        ("dtypes", "expected"),
        [
            ([torch.bfloat16, torch.bfloat16], torch.float32),
            ([torch.float16, torch.float32], torch.float32),
            ([torch.float32, torch.float64], torch.float64),
            ([torch.float64, torch.bfloat16], torch.float64),
        ],
    )
    @pytest.mark.parametrize("rank", [(2, 2), (5, 2), (5, 4)])
    def test_in_at_least_float32(self, dtypes, expected, rank):
        tuckers = [tucker((5, 4), rank, dtype) for dtype in dtypes]
        result = concatenate(tuckers, [0.3, -1.7])
        assert {t.dtype for t in (result.core, *result.factors) if t is not None} == {expected}
        exact = [Tucker(t.core.double(), tuple(f if f is None else f.double() for f in t.factors)) for t in tuckers]
        assert_close(result.to_tensor().double(), concatenate(exact, [0.3, -1.7]).to_tensor(), rtol=1e-5, atol=1e-6)

    def test_leaves_its_parts_alone(self):
        given = [tucker((5, 4), (5, 2)), tucker((5, 4), (5, 4))]
        kept = copy.deepcopy(given)
        concatenate(given, [2.0, 3.0]).core.add_(1)
        concatenate(given[:1], [1.0]).core.add_(1)
        assert all(torch.equal(a.to_tensor(), b.to_tensor()) for a, b in zip(given, kept, strict=True))


class Largest(TorchDispatchMode):
    """The most entries that any tensor has."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            self.entries = max(self.entries, value.numel() if isinstance(value, torch.Tensor) else 0)
        return result


class TestCompress:
    @given(parts(), st.data())
    def test_is_as_good_as_hooi_of_the_tensor(self, given, data):
        shape, ranks, weights = given
        exact = concatenate([tucker(shape, rank) for rank in ranks], weights)
        rank = [data.draw(st.integers(1, d)) for d in shape]
        result, dense = compress(exact, rank), exact.to_tensor()
        assert result.shape == tuple(shape)
        assert result.rank == tuple(map(min, rank, exact.rank))
        assert [f is None for f in result.factors] == [r == d for r, d in zip(result.rank, shape, strict=True)]
        errors = [(t.to_tensor() - dense).norm() for t in (result, hooi(dense, rank))]
        assert errors[0] <= errors[1] + 1e-6 * max(1.0, dense.norm())

    @given(parts())
    def test_of_full_rank_is_exact(self, given):
        shape, ranks, weights = given
        exact = concatenate([tucker(shape, rank) for rank in ranks], weights)
        assert_close(compress(exact, shape).to_tensor(), exact.to_tensor())
        assert_close(compress(exact, exact.rank).to_tensor(), exact.to_tensor())

    def test_never_builds_the_tensor(self):
        exact = concatenate([tucker((300, 200, 3, 3), (4, 5, 2, 3)) for _ in range(3)], [1.0, -2.0, 0.5])
        with Largest() as largest:
            compress(exact, (6, 6, 2, 2))
        assert largest.entries <= 300 * 15
