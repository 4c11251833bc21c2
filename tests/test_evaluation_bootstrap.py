"""The paired bootstrap: what its interval and p must be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lora_lexicon.evaluation import bootstrap
from lora_lexicon.evaluation.bootstrap import paired_bootstrap


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_swapping_the_sides_mirrors_the_result(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, weights = rng.normal(size=rows), rng.normal(size=rows), rng.integers(1, 9, rows)
    one = paired_bootstrap(a, b, weights=weights, samples=200)
    two = paired_bootstrap(b, a, weights=weights, samples=200)
    assert one.difference == pytest.approx((a.sum() - b.sum()) / weights.sum())
    assert (one.difference, one.low, one.high, one.p) == pytest.approx((-two.difference, -two.high, -two.low, two.p))
    assert one.low <= one.high
    assert 2 / 201 <= one.p <= 1


def test_it_agrees_with_the_normal_approximation_where_that_holds() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=2000)
    b = a + rng.normal(0.04, 1, 2000)
    found = paired_bootstrap(a, b)
    error = (a - b).std() / 2000**0.5
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)
    assert found.p == pytest.approx(2 * norm.sf(abs(found.difference) / error), abs=0.02)


def test_equal_systems_differ_by_nothing() -> None:
    rows = np.arange(5.0)
    found = paired_bootstrap(rows, rows)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_rows_of_a_group_are_drawn_together() -> None:
    """Ten copies of each row tell nothing new: with groups the interval is that of the single rows."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=30), rng.normal(size=30)
    single = paired_bootstrap(a, b)
    grouped = paired_bootstrap(np.repeat(a, 10), np.repeat(b, 10), groups=np.repeat(np.arange(30), 10).tolist())
    assert (grouped.low, grouped.high, grouped.p) == pytest.approx((single.low, single.high, single.p))


def test_blocks_of_resamples_are_still_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "NUMBERS_AT_ONCE", 70)
    drawn = bootstrap.resampled(np.ones((20, 2)), 101)
    assert drawn.shape == (101, 2)


def test_rows_that_do_not_pair_are_refused() -> None:
    for a, b in ((np.ones(3), np.ones(4)), (np.ones(0), np.ones(0))):
        with pytest.raises(ValueError, match="same rows"):
            paired_bootstrap(a, b)


@pytest.mark.parametrize("groups", [1, 2, 5, 30])
def test_few_groups_never_make_a_difference_sure(groups: int) -> None:
    """No paired test of g groups can find a p below that of all of them changing sides: 2 / 2 ** g."""
    a, b = np.full(groups, 1.0), np.zeros(groups)
    assert paired_bootstrap(a, b).p == pytest.approx(max(2 ** (1 - groups), 2 / 10_001))
