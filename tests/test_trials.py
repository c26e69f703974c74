"""Searching a rate, and paired differences."""

import math
import statistics

import pytest

from florapeft.train.trials import climb, difference, rate_at, spread, student


class TestClimb:
    def walked(self, peak, **settings):
        tried = []

        def score(rate):
            tried.append(rate)
            return -abs(math.log10(rate / peak))

        return climb(1e-3, score, **settings), tried

    @pytest.mark.parametrize("peak", [1e-5, 1e-4, 1e-3, 3.2e-3, 1e-2, 1e-1])
    def test_finds_the_peak_and_looks_at_both_neighbours(self, peak):
        found, tried = self.walked(peak)
        assert found == pytest.approx(peak)
        assert len(set(tried)) == len(tried)
        beyond = [abs(math.log10(rate / peak)) for rate in tried if rate != found]
        assert sum(value < 0.6 for value in beyond) == (1 if peak in (1e-5, 1e-1) else 2)

    def test_goes_no_farther_than_its_reach(self):
        assert self.walked(1.0, reach=2) == (1e-2, [3.2e-3, 1e-3, 1e-2])

    def test_nan_is_the_lowest(self):
        assert climb(1e-3, lambda rate: math.nan if rate >= 1e-3 else -rate, reach=1) == 3.2e-4

    def test_the_grid(self):
        assert [rate_at(1e-2, step) for step in (-2, -1, 0, 1)] == [1e-3, 3.2e-3, 1e-2, 3.2e-2]


class TestDifferences:
    @pytest.mark.parametrize(
        ("freedom", "quantile"),
        [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (999, 1.962)],
    )
    def test_students_quantile(self, freedom, quantile):
        assert student(freedom) == pytest.approx(quantile, rel=2e-3)

    def test_pairs_by_seed(self):
        mean, low, high = difference({0: 3.0, 1: 5.0, 2: 9.0}, {2: 8.0, 1: 3.0, 0: 1.5, 7: 100.0})
        assert mean == pytest.approx(1.5)
        assert (low + high) / 2 == pytest.approx(mean)
        assert high - mean == pytest.approx(4.303 * statistics.stdev([1.5, 2.0, 1.0]) / math.sqrt(3))

    def test_one_pair_has_no_interval(self):
        assert difference({0: 1.0}, {0: 0.5}) == (0.5, None, None)
        assert spread([1.0]) == 0.0

    def test_no_pair(self):
        with pytest.raises(ValueError, match=r"no seed in common: \[0\] and \[1\]"):
            difference({0: 1.0}, {1: 1.0})
