"""How a budget is spent: never above, within 1% where the choices allow it, never less for a larger budget."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from florapeft.budget import (
    Choice,
    choices_from_energies,
    choices_from_spectra,
    describe_spending,
    rank_grid,
    spend_on_energy,
    uniform_choices,
)
from florapeft.rank import count_parameters
from florapeft.tucker import captured_energy, hosvd, hosvd_core

CONV = (8, 6, 3, 3)


def total(choices, ranks):
    return sum(next(c.parameters for c in choices[name] if c.rank == rank) for name, rank in ranks.items())


def table(rows):
    """Choices from pairs of parameters and energy."""
    return [Choice((n + 1,), parameters, float(kept)) for n, (parameters, kept) in enumerate(rows)]


tables = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 50)), min_size=1, max_size=6).map(table),
    min_size=1,
    max_size=5,
).map(lambda lists: {str(n): options for n, options in enumerate(lists)})
shapes = st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


class TestSolver:
    def test_literal(self):
        choices = {"a": table([(10, 1), (20, 5), (30, 6)]), "b": table([(10, 1), (30, 11)])}
        spent = {budget: spend_on_energy(choices, budget) for budget in (20, 39, 40, 50, 99)}
        assert spent[20] == {"a": (1,), "b": (1,)}
        assert spent[39] == {"a": (2,), "b": (1,)}  # b's step of 20 gains most but does not fit
        assert spent[40] == {"a": (1,), "b": (2,)}
        assert spent[50] == {"a": (2,), "b": (2,)}
        assert spent[99] == {"a": (3,), "b": (2,)}

    def test_what_the_hull_leaves_out_fills(self):
        choices = {"a": table([(10, 0), (12, 1), (30, 20)])}  # 12 lies below the hull
        assert [spend_on_energy(choices, budget)["a"] for budget in (11, 12, 29, 30)] == [(1,), (2,), (2,), (3,)]

    def test_of_equal_choices_the_first(self):
        choices = {"a": [Choice((8, 2), 30, 1.0), Choice((2, 8), 30, 1.0), Choice((4, 4), 31, 1.0)]}
        assert spend_on_energy(choices, 100) == {"a": (8, 2)}

    def test_leaves_out_what_keeps_least_per_parameter(self):
        choices = {"a": table([(10, 1)]), "b": table([(10, 3)]), "c": table([(30, 6)])}
        assert list(spend_on_energy(choices, 50)) == ["a", "b", "c"]
        ranks = spend_on_energy(choices, 49)
        assert list(ranks) == ["b", "c"]
        assert describe_spending(choices, ranks, 49) == (
            "A budget of 49 parameters is too small for all 3 targets, which take 50 at least: not adapted are a"
        )

    def test_too_small_for_any(self):
        message = "a budget of 9 parameters is too small: of 2 targets, the cheapest takes 10"
        with pytest.raises(ValueError, match=message):
            spend_on_energy({"a": table([(10, 1)]), "b": table([(12, 3)])}, 9)

    def test_says_why_it_spends_less(self):
        choices = {"a": table([(10, 1), (100, 3)])}
        sentences = [describe_spending(choices, spend_on_energy(choices, b), b) for b in (10, 60, 100, 101, 200)]
        assert sentences == [
            None,
            "Of a budget of 60 parameters 10 are used: the next rank takes 90 more",
            None,
            None,
            "Of a budget of 200 parameters 100 are used: the targets cannot use more",
        ]

    @given(tables, st.integers(1, 300))
    def test_properties(self, choices, budget):
        try:
            ranks = spend_on_energy(choices, budget)
        except ValueError:
            assert all(c.parameters > budget for options in choices.values() for c in options)
            return
        spent = total(choices, ranks)
        assert spent <= budget
        if sum(min(c.parameters for c in options) for options in choices.values()) <= budget:
            assert ranks.keys() == choices.keys()
        for name, rank in ranks.items():  # nothing better fits any more
            own = next(c for c in choices[name] if c.rank == rank)
            room = own.parameters + budget - spent
            assert not [c for c in choices[name] if own.parameters < c.parameters <= room and c.kept > own.kept]
        assert total(choices, spend_on_energy(choices, budget + 1)) >= spent

    @settings(max_examples=30)
    @given(tables)
    def test_near_the_best(self, choices):
        least = sum(min(c.parameters for c in options) for options in choices.values())
        largest = max(c.kept for options in choices.values() for c in options)
        for budget in range(least, least + 100, 20):
            ranks = spend_on_energy(choices, budget)
            kept = sum(next(c.kept for c in choices[name] if c.rank == rank) for name, rank in ranks.items())
            every = itertools.product(*choices.values())
            best = max(sum(c.kept for c in some) for some in every if sum(c.parameters for c in some) <= budget)
            assert best - kept <= largest  # short by at most one step


class TestUniform:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((12,), [(12,)]),
            ((2, 2), [(2, 2)]),  # rank 1 takes 1 + 2 + 2
            ((8, 4), [(1, 1), (2, 2), (8, 4)]),  # rank 3 takes 9 + 36
            ((9, 1, 3, 3), [(1, 1, 1, 1), (4, 1, 2, 2), (9, 1, 3, 3)]),
        ],
    )
    def test_of_small_weights(self, shape, expected):
        assert [choice.rank for choice in uniform_choices(shape, (0, 1)) if choice.rank in expected] == expected
        assert uniform_choices(shape, (0, 1))[-1].rank == shape

    def test_one_share_of_every_mode(self):
        ranks = [choice.rank for choice in uniform_choices((40, 20, 5), (0, 1))]
        assert (4, 4, 1) in ranks  # a fifth, but (8, 4, 1) is no tensor's rank
        assert (16, 8, 2) in ranks
        assert (24, 12, 3) in ranks

    def test_kernel_rank_as_given(self):
        ranks = [choice.rank for choice in uniform_choices((40, 20, 5, 1), (0, 1), kernel_r=2)]
        assert {rank[2:] for rank in ranks} == {(2, 1)}
        assert ranks[0][:2] == (1, 1)
        assert ranks[-1][:2] == (40, 20)

    @pytest.mark.parametrize("kernel_r", [None, 2])
    def test_the_experts_of_a_stack_stay_apart(self, kernel_r):
        choices = uniform_choices((8, 40, 20), (0, 1, 2), kernel_r, is_stack=True)
        assert {choice.rank[0] for choice in choices} == {8}
        assert (8, 10, 5) in [choice.rank for choice in choices]
        assert all(choice.parameters == count_parameters((8, 40, 20), choice.rank) for choice in choices)

    @given(shapes, st.integers(1, 2000))
    def test_one_share_of_all_weights(self, shapes, budget):
        choices = {str(n): uniform_choices(shape, (0, 1)) for n, shape in enumerate(shapes)}
        for shape, options in zip(shapes, choices.values(), strict=True):
            for choice in options:
                assert choice.parameters == count_parameters(shape, choice.rank)
                assert all(1 <= r <= d for r, d in zip(choice.rank, shape, strict=True))
                assert choice.rank == shape or all(r * r <= math.prod(choice.rank) for r in choice.rank)
            assert [c.parameters for c in options] == sorted({c.parameters for c in options})

    def test_equal_weights_get_equal_ranks(self):
        choices = {str(n): uniform_choices((64, 32, 3, 3), (0, 1)) for n in range(8)}
        for budget in range(8_000, 20_000, 1_000):
            ranks = spend_on_energy(choices, budget).values()
            assert all(max(entries) - min(entries) <= 1 for entries in zip(*ranks, strict=True))

    def test_a_seven_billion_llama(self):
        d, f = 4096, 11008
        layer = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (f, d), "up": (f, d), "down": (d, f)}
        shapes = {f"{n}.{name}": shape for n in range(32) for name, shape in layer.items()}
        parameters = sum(map(math.prod, shapes.values()))
        for share in (0.001, 0.05, 0.9):
            started, budget = time.process_time(), int(share * parameters)
            choices = {name: uniform_choices(shape, (0, 1)) for name, shape in shapes.items()}
            ranks = spend_on_energy(choices, budget)
            assert time.process_time() - started < 2
            spent = sum(count_parameters(shapes[name], rank) for name, rank in ranks.items())
            assert 0.99 * budget <= spent <= budget


class TestEnergies:
    @pytest.mark.parametrize("shape", [CONV, (5, 2, 2), (7, 5)])  # mode 0 of the second has 4 singular values
    def test_table_is_what_truncation_keeps(self, shape):
        tensor = torch.randn(shape, dtype=torch.float64)
        energies = captured_energy(hosvd_core(tensor), [range(1, d + 1) for d in shape])
        assert energies.shape == shape
        assert energies.flatten()[-1].item() == pytest.approx(tensor.square().sum().item())
        for rank in itertools.islice(itertools.product(*(range(1, d + 1) for d in shape)), 0, None, 7):
            kept = hosvd(tensor, rank).to_tensor().square().sum()
            assert energies[tuple(r - 1 for r in rank)] == pytest.approx(kept.item())

    @pytest.mark.parametrize("shape", [(5,), (12, 7), (7, 12), CONV, (4, 6, 10), (1, 1), (6, 1, 3)])
    def test_of_a_tensor_whose_modes_are_independent(self, shape):
        """Where the energy is a product over the modes, spectra say as much as the table."""
        vectors = [torch.arange(d, 0, -1, dtype=torch.float64) for d in shape]
        core = torch.ones(())
        for vector in vectors:
            core = core.unsqueeze(-1) * vector
        spectra = [core.square().movedim(n, 0).reshape(d, -1).sum(1).tolist() for n, d in enumerate(shape)]
        exact = choices_from_energies(shape, captured_energy(core, rank_grid(shape)).flatten().tolist())
        estimated = choices_from_spectra(shape, spectra)
        assert [c[:2] for c in exact] == [c[:2] for c in estimated]
        assert [c.kept for c in estimated] == pytest.approx([c.kept for c in exact])
        assert all(c.parameters == count_parameters(shape, c.rank) for c in exact)
        assert exact[-1].rank == shape
        assert exact[-1].kept == pytest.approx(core.square().sum().item())

    def test_a_matrix_has_one_whole_mode(self):
        spectrum = [9.0, 4.0, 1.0]
        choices = choices_from_spectra((9, 3), [spectrum, spectrum])
        assert choices == [Choice((9, 1), 12, 9.0), Choice((9, 2), 24, 13.0), Choice((9, 3), 27, 14.0)]

    def test_nothing_to_keep(self):
        assert spend_on_energy({"a": choices_from_spectra((4, 4), [[0.0] * 4] * 2)}, 100) == {"a": (4, 1)}

    @pytest.mark.parametrize("shape", [(4096, 11008), (512, 512, 3, 3), (64, 2048, 768), (256, 256, 3, 3, 3)])
    def test_grids_are_small(self, shape):
        grid = rank_grid(shape)
        assert math.prod(map(len, grid)) <= 20_000
        assert [ranks[-1] for ranks in grid] == list(shape)
        assert all(ranks == tuple(sorted(set(ranks))) and ranks[0] >= 1 for ranks in grid)

    @given(shapes, st.integers(1, 2000), st.randoms(use_true_random=False))
    def test_within_one_percent_or_nothing_fits(self, shapes, budget, random):
        choices = {
            str(n): choices_from_spectra(
                shape, [sorted((random.random() for _ in range(d)), reverse=True) for d in shape]
            )
            for n, shape in enumerate(shapes)
        }
        try:
            ranks = spend_on_energy(choices, budget)
        except ValueError:
            return
        spent = total(choices, ranks)
        assert spent <= budget
        assert spent >= 0.99 * budget or describe_spending(choices, ranks, budget)
        assert total(choices, spend_on_energy(choices, budget + 1)) >= spent
