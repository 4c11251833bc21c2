"""Equal sizes at the least cost: scipy's assignment and k-means-constrained are the references."""

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from k_means_constrained import KMeansConstrained
from scipy.optimize import linear_sum_assignment

from lora_lexicon.domains import balance
from lora_lexicon.domains import cluster as clustering
from lora_lexicon.domains.balance import balanced_labels
from lora_lexicon.domains.cluster import cluster
from lora_lexicon.domains.vectors import unit
from lora_lexicon.recipe import DomainsRecipe


def least(costs: np.ndarray, sizes: np.ndarray) -> float:
    """The least sum of costs (N, n) with exactly these sizes."""
    repeated = np.repeat(costs.astype(np.float64), sizes, axis=0)
    return repeated[linear_sum_assignment(repeated)].sum()


@given(
    st.integers(0, 9999),
    st.integers(1, 8),
    st.integers(0, 40),
    st.sampled_from(["real", "tied", "far"]),
    st.booleans(),
    st.sampled_from([None, 0.01, 100.0]),
)
@settings(deadline=None, max_examples=60)
def test_sizes_are_equal_and_the_cost_is_the_least(seed, domains, more, kind, small_parts, spread):
    rng, rows = np.random.default_rng(seed), domains + more
    costs = rng.random((domains, rows)).astype(np.float32)
    if kind == "tied":
        costs = np.round(2 * costs)
    elif kind == "far":
        costs[0] -= 50  # every row's nearest domain is the same
    with pytest.MonkeyPatch.context() as patch:
        if small_parts:
            patch.setattr(balance, "BLOCK", 16)
            patch.setattr(balance, "COARSE_ROWS", 10)
            patch.setattr(balance, "CANDIDATES", 1)
        labels, prices = balanced_labels(costs, spread and spread * rng.normal(size=domains))
    assert prices.shape == (domains,)
    sizes = np.bincount(labels, minlength=domains)
    assert len(sizes) == domains
    assert sizes.max() - sizes.min() <= 1
    assert costs[labels, np.arange(rows)].sum(dtype=np.float64) == pytest.approx(least(costs, sizes), abs=1e-6)


@pytest.mark.parametrize("prices", [np.array([-2.0, 0.0, 0.0, 0.0]), np.array([0.3, -0.2, 0.0, -0.1])])
def test_rows_are_moved_from_any_prices_at_the_least_cost(prices):
    costs = np.random.default_rng(1).random((4, 40)).astype(np.float32)
    labels = (costs + prices[:, None]).argmin(axis=0).astype(np.int32)
    assert balance.move_to_balance(costs, labels) > 0
    assert np.bincount(labels).tolist() == [10] * 4
    assert costs[labels, np.arange(40)].sum(dtype=np.float64) == pytest.approx(least(costs, np.full(4, 10)), abs=1e-6)


def inertia(vectors: np.ndarray, labels: np.ndarray) -> float:
    groups = [vectors[labels == i].astype(np.float64) for i in range(labels.max() + 1)]
    return sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups)


def blobs(rows: int, kinds: int, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(5)
    kind = rng.choice(kinds, rows, p=(weights := np.arange(1, kinds + 1)) / weights.sum())
    return unit(rng.normal(size=(rows, width)) * 0.6 + rng.normal(size=(kinds, width))[kind])


@pytest.mark.parametrize("sample", [200, 900])
def test_as_tight_as_k_means_constrained(monkeypatch, sample):
    monkeypatch.setattr(clustering, "FLOW_PAIRS", 0)
    monkeypatch.setattr(clustering, "SAMPLE", sample)
    vectors = blobs(900, 7)
    sizes = {"size_min": 180, "size_max": 180}
    peer = cast(Any, KMeansConstrained)(5, **sizes, n_init=3, max_iter=1000, tol=1e-8, random_state=42)
    theirs = inertia(vectors, peer.fit_predict(vectors))
    told: list[float] = []
    labels = cluster(vectors, DomainsRecipe(domains=5), told.append)
    assert np.bincount(labels).tolist() == [180] * 5
    assert inertia(vectors, labels) < 1.01 * theirs
    assert told == sorted(told, reverse=True)
    assert told[-1:] == ([] if sample == 900 else [pytest.approx(inertia(vectors, labels) / 900, rel=1e-4)])


def test_equal_prompts_can_go_to_two_domains(monkeypatch):
    monkeypatch.setattr(clustering, "FLOW_PAIRS", 0)
    vectors = np.concatenate([np.repeat(blobs(1, 1), 150, axis=0), blobs(51, 3)])
    sizes = np.bincount(cluster(vectors, DomainsRecipe(domains=3)), minlength=3)
    assert sizes.tolist() == [67] * 3


def two_points(rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.eye(6)[rng.integers(0, 2, 19_994)], unit(rng.normal(size=(6, 6)))]).astype(np.float32)


def half_equal(rng: np.random.Generator) -> np.ndarray:
    return unit(rng.normal(size=(15_001, 16)))[np.maximum(np.arange(30_001) - 15_000, 0)]


@pytest.mark.parametrize(("made", "domains"), [(two_points, 8), (half_equal, 4)])
def test_prices_part_equal_prompts(monkeypatch, made, domains):
    def few(costs: np.ndarray, labels: np.ndarray) -> int:
        sizes = np.bincount(labels, minlength=len(costs))
        assert np.abs(sizes - len(labels) / len(costs)).sum() / 2 < len(labels) / 20
        return move(costs, labels)

    move = balance.move_to_balance  # a path a row: with thousands to move this takes minutes
    monkeypatch.setattr(balance, "move_to_balance", few)
    labels = cluster(made(np.random.default_rng(0)), DomainsRecipe(domains=domains))
    sizes = np.bincount(labels, minlength=domains)
    assert len(sizes) == domains
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("method", ["balanced", "kmeans"])
def test_a_memory_map_gives_what_memory_gives(monkeypatch, tmp_path, method):
    monkeypatch.setattr(clustering, "FLOW_PAIRS", 0)
    monkeypatch.setattr(clustering, "SAMPLE", 100)
    monkeypatch.setattr(clustering, "KMEANS_ROWS", 100)
    monkeypatch.setattr("lora_lexicon.domains.vectors._BLOCK", 12 * 64)
    vectors = blobs(333, 4)
    vectors.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float32, "r", shape=vectors.shape)
    recipe = DomainsRecipe(domains=4, method=method)
    found = cluster(vectors, recipe)
    assert np.array_equal(cluster(mapped, recipe), found)
    assert set(found.tolist()) == set(range(4))
