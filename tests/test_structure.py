"""Structure of updates: against their definitions on the dense tensor, and equal for a tensor and its Tucker form."""

import pytest
import torch
from torch.testing import assert_close

from florapeft.structure import (
    NOTHING,
    energy_per_mode,
    energy_per_tap,
    error_curves,
    lora_fits,
    matched_noise,
    multilinear_ranks,
    subspace_overlap,
    taps_permuted,
    tucker_fits,
)
from florapeft.tucker import Tucker, hooi, unfold


def adapter(*factors, core):
    """A Tucker tensor with factors that are not orthonormal; None keeps a mode whole."""
    sizes = zip(factors, core, strict=True)
    return Tucker(torch.randn(core), tuple(None if d is None else torch.randn(d, r) for d, r in sizes))


ADAPTERS = {
    "linear": lambda: adapter(14, None, core=(3, 10)),
    "conv": lambda: adapter(14, 12, None, 3, core=(4, 5, 3, 2)),
    "conv1d": lambda: adapter(14, 12, None, core=(4, 5, 3)),
    "stack": lambda: adapter(6, 9, 8, core=(2, 3, 4)),
}


@pytest.fixture(params=ADAPTERS)
def update(request):
    return ADAPTERS[request.param]()


def relative(missing, whole):
    return (missing.norm() / whole.norm()).item()


class TestEnergy:
    def test_per_mode_is_the_squared_singular_values(self, update):
        dense = update.to_tensor()
        for mode, (small, own) in enumerate(zip(energy_per_mode(update), energy_per_mode(dense), strict=True)):
            expected = torch.linalg.svdvals(unfold(dense, mode)).double().square()
            assert_close(own, expected, rtol=1e-3, atol=1e-4 * expected.sum().item())
            assert_close(small, own[: len(small)], rtol=1e-3, atol=1e-4 * expected.sum().item())

    @pytest.mark.parametrize("name", ["conv", "conv1d"])
    def test_per_tap(self, name):
        update = ADAPTERS[name]()
        dense = update.to_tensor()
        expected = dense.double().square().sum((0, 1))
        assert_close(energy_per_tap(dense), expected)
        assert_close(energy_per_tap(update), expected, rtol=1e-4, atol=1e-3)

    def test_multilinear_ranks(self):
        core = torch.zeros(4, 4)
        core[range(4), range(4)] = torch.tensor([0.9, 0.06, 0.03, 0.01]).sqrt()
        update = Tucker(core, (torch.linalg.qr(torch.randn(9, 4)).Q, None))
        assert multilinear_ranks(update, (0.89, 0.95, 0.98, 1 - 1e-9)) == {
            0.89: (1, 1),
            0.95: (2, 2),
            0.98: (3, 3),
            1 - 1e-9: (4, 4),
        }


class TestFits:
    def test_lora_is_the_truncated_svd(self, update):
        dense = update.to_tensor()
        matrix = dense.flatten(1)
        price = sum(matrix.shape)
        for form in (dense, update):
            fits = lora_fits(form, [price - 1, price, 2 * price + 1])
            assert fits[0] == NOTHING
            assert [fit.rank for fit in fits[1:]] == [(1,), (2,)]
            assert [fit.parameters for fit in fits[1:]] == [price, 2 * price]
            for fit in fits[1:]:
                assert fit.error == pytest.approx(
                    relative(torch.linalg.svdvals(matrix)[fit.rank[0] :], matrix), abs=1e-4
                )

    def test_lora_over_taps(self):
        update = ADAPTERS["conv"]()
        dense = update.to_tensor()
        matrix = dense.permute(0, 2, 1, 3).reshape(14 * 3, 12 * 3)
        for form in (dense, update):
            (fit,) = lora_fits(form, [300], (0, 2))
            assert (fit.rank, fit.parameters) == ((3,), 3 * 78)
            assert fit.error == pytest.approx(relative(torch.linalg.svdvals(matrix)[3:], matrix), abs=1e-4)

    def test_tucker_is_the_best_that_the_budget_pays(self):
        dense = ADAPTERS["conv"]().to_tensor() + 0.3 * torch.randn(14, 12, 3, 3)
        for fit in tucker_fits(dense, [60, 150, 400]):
            assert fit.error == pytest.approx(relative(dense - hooi(dense, fit.rank).to_tensor(), dense), abs=1e-5)
            assert 0.7 * fit.parameters <= hooi(dense, fit.rank).parameters == fit.parameters
        errors = [fit.error for fit in tucker_fits(dense, [20, 60, 150, 400, 1512])]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == 1.0, "not even rank 1 fits"
        assert errors[-1] == pytest.approx(0, abs=1e-6)

    def test_kernel_rank(self):
        dense = torch.randn(8, 6, 3, 2)
        assert all(fit.rank[2:] == (1, 1) for fit in tucker_fits(dense, [50, 100], kernel_rank=1))
        assert all(fit.rank[2:] == (3, 2) for fit in tucker_fits(dense, [80, 150], kernel_rank=3))

    def test_a_tensor_and_its_tucker_form_are_one(self, update):
        dense = update.to_tensor()
        budgets = [int(share * dense.numel()) for share in (0.1, 0.3, 0.6)]
        first, second = error_curves(dense, budgets), error_curves(update, budgets)
        assert first.keys() == second.keys()
        for name, fits in first.items():
            for one, other in zip(fits, second[name], strict=True):
                assert other.error == pytest.approx(one.error, abs=1e-3), name

    def test_curves_of_each_kind_of_weight(self):
        def names(*shape):
            return list(error_curves(torch.randn(shape), [100]))

        assert names(9, 8) == ["lora", "tucker"]
        assert names(9, 8, 1, 1) == ["lora", "tucker"]
        assert names(9, 8, 3) == ["lora", "lora_taps", "tucker_1", "tucker_2", "tucker_3", "tucker"]
        assert names(9, 8, 3, 3) == ["lora", "lora_taps", "tucker_1", "tucker_2", "tucker_3", "tucker"]

    def test_matrices_need_no_core(self):
        dense = torch.randn(20, 30)
        curves = error_curves(dense, [50, 120, 400])
        assert [fit.error for fit in curves["tucker"]] == pytest.approx([fit.error for fit in curves["lora"]], abs=1e-5)
        assert [fit.parameters for fit in curves["tucker"]] == [fit.parameters for fit in curves["lora"]]


class TestControls:
    def test_permuting_taps_keeps_every_kernels_values(self):
        update = ADAPTERS["conv"]()
        dense, permuted = update.to_tensor(), taps_permuted(update)
        assert_close(permuted.flatten(2).sort(-1).values, dense.flatten(2).sort(-1).values)
        assert not torch.equal(permuted, dense)
        assert torch.equal(permuted, taps_permuted(dense))
        order = permuted.flatten(2).argsort(-1) - dense.flatten(2).argsort(-1)
        assert len(order.flatten(0, 1).unique(dim=0)) > 20, "each kernel has an order of its own"

    def test_noise_has_the_updates_shape_and_norm(self, update):
        noise = matched_noise(update, seed=3)
        assert noise.shape == update.shape
        assert_close(noise.norm(), update.to_tensor().norm())
        assert not torch.equal(noise, matched_noise(update, seed=4))

    def test_structure_shows_against_both(self):
        update = ADAPTERS["conv"]()
        budget = [200]
        own = tucker_fits(update, budget)[0].error
        assert own < 0.7 * tucker_fits(taps_permuted(update), budget)[0].error
        assert own < 0.7 * tucker_fits(matched_noise(update), budget)[0].error


class TestOverlap:
    def test_of_an_update_with_itself_and_with_an_orthogonal_one(self):
        basis = torch.linalg.qr(torch.randn(12, 12)).Q
        first = Tucker(torch.randn(3, 3), (basis[:, :3] * 5, torch.randn(20, 3)))
        other = Tucker(torch.randn(3, 3), (basis[:, 3:6], torch.randn(20, 3)))
        for overlap in subspace_overlap(first, first):
            assert overlap.shared == pytest.approx(1, abs=1e-6)
        rows, columns = subspace_overlap(first, other)
        assert rows.shared == pytest.approx(0, abs=1e-6)
        assert (columns.ranks, columns.chance) == ((3, 3), 3 / 20)

    def test_of_random_ones_is_at_chance(self):
        found = [subspace_overlap(adapter(40, 30, core=(5, 8)), adapter(40, 30, core=(6, 4))) for _ in range(40)]
        for mode in (0, 1):
            mean = sum(overlaps[mode].shared for overlaps in found) / len(found)
            assert mean == pytest.approx(found[0][mode].chance, rel=0.15)

    def test_a_whole_mode_counts_what_is_used_of_it(self):
        lora = adapter(14, None, core=(3, 10))
        assert [overlap.ranks for overlap in subspace_overlap(lora, lora)] == [(3, 3), (3, 3)]
        conv = ADAPTERS["conv"]()
        assert [overlap is None for overlap in subspace_overlap(conv, conv)] == [False, False, True, False]

    def test_a_tensor_and_its_tucker_form_are_one(self, update):
        other = Tucker(torch.randn_like(update.core), update.factors)
        dense = subspace_overlap(update.to_tensor(), other)
        for one, two in zip(dense, subspace_overlap(update, other), strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                assert two.shared == pytest.approx(one.shared, abs=1e-4)

    def test_of_other_shapes(self):
        with pytest.raises(ValueError, match=r"updates of one shape are needed, got \(3, 2\) and \(2, 3\)"):
            subspace_overlap(torch.randn(3, 2), torch.randn(2, 3))
