"""The algebra, against einsum, TensorLy and arrays written out by hand."""

import string
from math import prod

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker
from tensorly.tenalg import mode_dot as tensorly_mode_dot
from tensorly.tenalg import multi_mode_dot as tensorly_multi_mode_dot
from tensorly.tucker_tensor import tucker_to_tensor
from torch.testing import assert_close

from florapeft.tucker import (
    Tucker,
    fold,
    hooi,
    hosvd,
    hosvd_core,
    mode_dot,
    mode_energies,
    multi_mode_dot,
    orthonormalize,
    unfold,
    validate_tucker,
)

SHAPES = [(7,), (5, 4), (4, 3, 6), (6, 5, 3, 3), (4, 3, 2, 3, 2)]
RANKS = [(3,), (2, 3), (2, 3, 4), (3, 5, 2, 3), (2, 3, 1, 2, 2)]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def error(tensor, tucker):
    return (tensor - tucker.to_tensor()).norm().item()


def reference(core, factors):
    """Σ core[a, b, …] U₀[i, a] U₁[j, b] …, as one einsum."""
    low, high = string.ascii_lowercase[: core.ndim], string.ascii_uppercase[: core.ndim]
    factors = [torch.eye(d, dtype=core.dtype) if f is None else f for d, f in zip(core.shape, factors, strict=True)]
    terms = ",".join(h + c for h, c in zip(high, low, strict=True))
    return torch.einsum(f"{low},{terms}->{high}", core, *factors)


@st.composite
def shapes_and_ranks(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    return shape, tuple(draw(st.integers(1, d)) for d in shape)


class TestUnfold:
    # Kolda and Bader let the first mode vary fastest; here the last one does, as in TensorLy.
    LITERAL = torch.arange(24).reshape(3, 4, 2)

    @pytest.mark.parametrize(
        ("mode", "first_row"),
        [(0, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [0, 1, 8, 9, 16, 17]), (2, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22])],
    )
    def test_literal(self, mode, first_row):
        assert unfold(self.LITERAL, mode)[0].tolist() == first_row

    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_tensorlys(self, shape):
        tensor = randn(*shape)
        for mode in range(len(shape)):
            assert (unfold(tensor, mode).numpy() == tensorly.unfold(tensor.numpy(), mode)).all()

    @given(shapes_and_ranks())
    def test_fold_inverts_it(self, case):
        shape, _ = case
        tensor = randn(*shape)
        for mode in range(len(shape)):
            assert unfold(tensor, mode).shape == (shape[mode], prod(shape) // shape[mode])
            assert torch.equal(fold(unfold(tensor, mode), mode, shape), tensor)

    @pytest.mark.parametrize("mode", [-1, 3])
    def test_no_such_mode(self, mode):
        with pytest.raises(ValueError, match=rf"mode {mode} does not exist in a tensor of order 3 \(shape"):
            unfold(self.LITERAL, mode)

    def test_fold_of_a_wrong_shape(self):
        message = r"the mode-1 unfolding of a tensor of shape \(3, 4, 2\) has shape \(4, 6\), got \(6, 4\)"
        with pytest.raises(ValueError, match=message):
            fold(randn(6, 4), 1, (3, 4, 2))


class TestModeDot:
    def test_literal(self):
        tensor = torch.tensor([[1, 2, 3], [4, 5, 6]])
        assert mode_dot(tensor, torch.tensor([[1, 10]]), 0).tolist() == [[41, 52, 63]]
        assert mode_dot(tensor, torch.tensor([[1, 0, 1], [0, 2, 0]]), 1).tolist() == [[4, 4], [10, 10]]

    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_tensorlys(self, shape):
        tensor = randn(*shape)
        for mode, size in enumerate(shape):
            matrix = randn(3, size)
            expected = torch.from_numpy(tensorly_mode_dot(tensor.numpy(), matrix.numpy(), mode))
            assert_close(mode_dot(tensor, matrix, mode), expected)

    def test_products_in_different_modes_commute(self):
        tensor, a, b = randn(4, 3, 5), randn(2, 4), randn(6, 5)
        assert_close(mode_dot(mode_dot(tensor, a, 0), b, 2), mode_dot(mode_dot(tensor, b, 2), a, 0))

    def test_shapes_that_do_not_align(self):
        message = (
            r"shapes \(3, 4\) and \(2, 5\) do not align in a mode-1 product: mode 1 of the tensor has size 4, "
            "the matrix needs as many columns"
        )
        with pytest.raises(ValueError, match=message):
            mode_dot(randn(3, 4), randn(2, 5), 1)

    def test_matrix_must_be_a_matrix(self):
        with pytest.raises(ValueError, match="do not align in a mode-0 product"):
            mode_dot(randn(3, 4), randn(3), 0)

    def test_no_such_mode(self):
        with pytest.raises(ValueError, match=r"mode 2 does not exist in a tensor of order 2"):
            mode_dot(randn(3, 4), randn(2, 4), 2)


class TestMultiModeDot:
    @given(shapes_and_ranks())
    def test_is_einsum(self, case):
        shape, rank = case
        core, factors = randn(*rank), [randn(d, r) for d, r in zip(shape, rank, strict=True)]
        assert_close(multi_mode_dot(core, factors), reference(core, factors))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_tensorlys_where_modes_are_left_out(self, shape):
        tensor = randn(*shape)
        matrices = [randn(2, d) if mode % 2 == 0 else None for mode, d in enumerate(shape)]
        modes = [mode for mode, m in enumerate(matrices) if m is not None]
        given_matrices = [matrices[mode].numpy() for mode in modes]
        expected = tensorly_multi_mode_dot(tensor.numpy(), given_matrices, modes=modes)
        assert_close(multi_mode_dot(tensor, matrices), torch.from_numpy(expected))

    def test_nothing_to_do(self):
        tensor = randn(3, 4)
        assert multi_mode_dot(tensor, [None, None]) is tensor

    def test_gradients(self):
        tensors = [x.requires_grad_() for x in (randn(2, 3, 2), randn(4, 2), randn(5, 3))]
        assert torch.autograd.gradcheck(lambda core, u, v: multi_mode_dot(core, [u, v, None]), tensors)


class TestTucker:
    def test_properties(self):
        tucker = Tucker(randn(2, 3, 5), (randn(7, 2), randn(4, 3), None))
        assert tucker.rank == (2, 3, 5)
        assert tucker.shape == (7, 4, 5)
        assert tucker.parameters == 2 * 3 * 5 + 7 * 2 + 4 * 3
        core, factors = tucker
        assert_close(tucker.to_tensor(), reference(core, factors))

    def test_of_order_one_is_its_core(self):
        core = randn(6)
        assert torch.equal(Tucker(core, (None,)).to_tensor(), core)

    @pytest.mark.parametrize(("shape", "rank"), [*zip(SHAPES, RANKS, strict=True)])
    def test_to_tensor_is_tensorlys(self, shape, rank):
        core, factors = randn(*rank), tuple(randn(d, r) for d, r in zip(shape, rank, strict=True))
        expected = tucker_to_tensor((core.numpy(), [f.numpy() for f in factors]))
        assert_close(Tucker(core, factors).to_tensor(), torch.from_numpy(expected))

    def test_validate_accepts(self):
        tucker = validate_tucker(randn(2, 3), [randn(5, 2), None])
        assert isinstance(tucker, Tucker)
        assert tucker.shape == (5, 3)

    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            ([(5, 2)], r"a core of order 2 \(shape \(2, 3\)\) needs 2 factors, got 1"),
            ([(5, 3), None], r"factors\[0\] has shape \(5, 3\); the core of shape \(2, 3\) needs \(d, 2\) in mode 0"),
            ([None, (3,)], r"factors\[1\] has shape \(3,\); the core of shape \(2, 3\) needs \(d, 3\) in mode 1"),
            ([None, (3, 3, 3)], r"factors\[1\] has shape \(3, 3, 3\)"),
        ],
    )
    def test_validate_refuses(self, factors, message):
        with pytest.raises(ValueError, match=message):
            validate_tucker(randn(2, 3), [None if f is None else randn(*f) for f in factors])


@pytest.mark.parametrize("decompose", [hosvd, hooi])
class TestDecompositions:
    @given(case=shapes_and_ranks())
    def test_shapes_and_orthonormal_factors(self, decompose, case):
        shape, rank = case
        tucker = decompose(randn(*shape), rank)
        assert (tucker.shape, tucker.rank) == (shape, rank)
        for d, r, factor in zip(shape, rank, tucker.factors, strict=True):
            assert (factor is None) == (r == d)
            if factor is not None:
                assert_close(factor.mT @ factor, torch.eye(r, dtype=factor.dtype))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_full_rank_is_exact(self, decompose, shape):
        tensor = randn(*shape)
        tucker = decompose(tensor, shape)
        assert tucker.factors == (None,) * len(shape)
        assert torch.equal(tucker.to_tensor(), tensor)

    @pytest.mark.parametrize(("shape", "rank"), [*zip(SHAPES[1:], [(2, 2), (2, 2, 3), *RANKS[3:]], strict=True)])
    def test_recovers_a_tensor_of_that_rank(self, decompose, shape, rank):
        tensor = Tucker(randn(*rank), tuple(randn(d, r) for d, r in zip(shape, rank, strict=True))).to_tensor()
        assert_close(decompose(tensor, rank).to_tensor(), tensor)

    def test_of_a_matrix_is_its_truncated_svd(self, decompose):
        matrix = randn(8, 6)
        tail = torch.linalg.svdvals(matrix)[3:].norm().item()
        assert error(matrix, decompose(matrix, (3, 3))) == pytest.approx(tail)

    def test_more_rank_than_columns(self, decompose):
        tensor = randn(6, 2)  # its mode-0 unfolding has two columns, rank 4 asks for four
        tucker = decompose(tensor, (4, 2))
        assert_close(tucker.factors[0].mT @ tucker.factors[0], torch.eye(4, dtype=torch.float64))
        assert_close(tucker.to_tensor(), tensor)

    def test_zero_tensor(self, decompose):
        tucker = decompose(torch.zeros(4, 3, 2), (2, 2, 1))
        assert torch.equal(tucker.to_tensor(), torch.zeros(4, 3, 2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_the_dtype(self, decompose, dtype):
        tensor = randn(6, 5, 4)
        tucker = decompose(tensor.to(dtype), (3, 3, 4))
        assert {t.dtype for t in (tucker.core, *tucker.factors[:2])} == {dtype}
        exact = decompose(tensor, (3, 3, 4)).to_tensor()
        assert_close(tucker.to_tensor().double(), exact, rtol=0, atol=0.2 if dtype == torch.bfloat16 else 0.02)

    @pytest.mark.parametrize(
        ("rank", "message"),
        [
            ((2, 2), r"rank \(2, 2\) has 2 entries; a tensor of shape \(4, 3, 2\) needs 3"),
            ((2, 2, 2, 2), r"rank \(2, 2, 2, 2\) has 4 entries"),
            ((5, 2, 2), r"rank\[0\] = 5 is not between 1 and the size 4 of mode 0 \(shape \(4, 3, 2\)\)"),
            ((2, 0, 2), r"rank\[1\] = 0 is not between 1 and the size 3 of mode 1"),
            ((2, 2, -1), r"rank\[2\] = -1 is not between 1 and the size 2 of mode 2"),
        ],
    )
    def test_wrong_rank(self, decompose, rank, message):
        with pytest.raises(ValueError, match=message):
            decompose(randn(4, 3, 2), rank)


class TestErrors:
    @given(shapes_and_ranks())
    def test_hosvd_within_its_tail_and_hooi_within_hosvd(self, case):
        shape, rank = case
        tensor = randn(*shape)
        tails = [torch.linalg.svdvals(unfold(tensor, mode))[r:].square().sum().item() for mode, r in enumerate(rank)]
        first, improved = error(tensor, hosvd(tensor, rank)), error(tensor, hooi(tensor, rank))
        assert first**2 <= sum(tails) + 1e-9
        assert first**2 >= max(tails) - 1e-9  # no tensor of this rank is nearer than the best in one mode
        assert improved <= first + 1e-9

    @pytest.mark.parametrize(("shape", "rank"), [*zip(SHAPES[2:], RANKS[2:], strict=True)])
    def test_hooi_is_as_good_as_tensorlys(self, shape, rank):
        tensor = randn(*shape)
        core, factors = tensorly_tucker(tensor.numpy(), rank, n_iter_max=200, tol=1e-12, random_state=0)
        theirs = error(tensor, Tucker(torch.from_numpy(core), tuple(map(torch.from_numpy, factors))))
        ours = error(tensor, hooi(tensor, rank, iterations=200, tolerance=1e-14))
        assert ours == pytest.approx(theirs, rel=1e-3)

    def test_hooi_gains_on_hosvd(self):
        tensor = randn(8, 8, 8)
        assert error(tensor, hooi(tensor, (2, 2, 2))) < 0.999 * error(tensor, hosvd(tensor, (2, 2, 2)))

    def test_every_sweep_of_hooi_helps(self):
        tensor = randn(8, 8, 8)
        errors = [error(tensor, hooi(tensor, (2, 3, 2), iterations=n, tolerance=-1.0)) for n in range(6)]
        assert errors == sorted(errors, reverse=True)

    @pytest.mark.parametrize("shape", [(40, 30), (30, 400), (400, 30), (20, 18, 3, 3)])
    def test_in_float32_as_good_as_an_svd_in_float64(self, shape):
        """Also where little is cut off, of a tensor whose singular values span six orders of magnitude."""
        tensor = randn(*shape) * torch.logspace(0, -6, shape[0], dtype=torch.float64).reshape(-1, *[1] * len(shape[1:]))
        rank = (shape[0] - 2, shape[1] - 2, *shape[2:])
        exact, single = hosvd(tensor, rank), hosvd(tensor.float(), rank)
        factors = [None if f is None else f.double() for f in single.factors]
        got, best = error(tensor, Tucker(single.core.double(), tuple(factors))), error(tensor, exact)
        assert got == pytest.approx(best, abs=3e-7 * tensor.norm().item())


class TestHosvdCore:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_its_corners_hold_what_hosvd_captures(self, shape):
        tensor = randn(*shape)
        squares = hosvd_core(tensor).square()
        rank = tuple(max(1, d - 1) for d in shape)
        corner = squares[tuple(slice(r) for r in rank)].sum()
        assert_close(corner, hosvd(tensor, rank).core.square().sum() if len(shape) > 1 else squares[: rank[0]].sum())
        assert_close(squares.sum(), tensor.square().sum())

    @pytest.mark.parametrize("shape", SHAPES[1:])
    def test_its_slices_have_the_modes_energies(self, shape):
        tensor = randn(*shape)
        core = hosvd_core(tensor)
        for mode in range(len(shape)):
            gram = unfold(core, mode) @ unfold(core, mode).mT
            expected = torch.linalg.svdvals(unfold(tensor, mode)).square()
            assert_close(gram, torch.diag(expected), atol=1e-9, rtol=1e-9)
            assert_close(mode_energies(tensor, mode), expected)

    def test_long_modes_are_cut_to_the_singular_values_there_are(self):
        tensor = randn(50, 2, 3)
        assert hosvd_core(tensor).shape == (6, 2, 3)
        assert_close(hosvd_core(tensor).norm(), tensor.norm())


class TestOrthonormalize:
    @given(shapes_and_ranks())
    def test_same_tensor_whose_spectra_are_the_cores(self, case):
        shape, rank = case
        factors = tuple(None if r == d else randn(d, r) for d, r in zip(shape, rank, strict=True))
        given = Tucker(randn(*rank), factors)
        core, bases = orthonormalize(given)
        dense = given.to_tensor()
        assert_close(Tucker(core, bases).to_tensor(), dense)
        assert_close(core.norm(), dense.norm())
        for mode, (basis, r) in enumerate(zip(bases, rank, strict=True)):
            assert (basis is None) == (factors[mode] is None)
            values, tail = torch.linalg.svdvals(unfold(core, mode)), torch.linalg.svdvals(unfold(dense, mode))
            assert_close(values[:r], tail[: len(values)])
            if basis is not None:
                assert_close(basis.mT @ basis, torch.eye(r, dtype=basis.dtype))
