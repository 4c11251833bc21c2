"""Vectors to domains: balanced k-means (section 3.2 of the paper) and its ablations. Knows no terms and no models."""

from collections.abc import Callable
from typing import Any, assert_never, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.balance import Prices, balanced_labels
from lora_lexicon.domains.vectors import Vectors, blocks
from lora_lexicon.errors import DataError
from lora_lexicon.recipe import DomainsRecipe

Report = Callable[[float], None]
FLOW_PAIRS = 100_000  # rows times domains that k-means-constrained clusters; beyond, its flow takes too long
SAMPLE = 20_000  # rows that are searched for where to begin
KMEANS_ROWS = 100_000  # rows that k-means++ and Elkan cluster; the others go to the nearest centroid
STARTS = 3  # k-means runs from so many seedings and keeps the tightest
LEAST_GAIN = 1e-4  # of the inertia; an iteration over many rows that gains less is the last
JITTER = 1e-5  # added to squared distances at random, so that equal prompts can go to two domains


def cluster(vectors: Vectors, recipe: DomainsRecipe, progress: Report | None = None) -> NDArray[np.int32]:
    """(n,) int32 domain numbers for vectors (n, d) of unit length, every domain with a member.

    `balanced` and `lexical`: constrained k-means, sizes differ by at most one. To 100,000 pairs of a
    row and a domain k-means-constrained does it; for more, Lloyd's iterations with an assignment of
    the same kind and linear time, from the tightest of three starts on 20,000 rows, then on all, till
    one gains less than `tolerance` or 1e-4 of the inertia. `kmeans`: k-means++ and Elkan, on at most
    100,000 rows. `random`: sizes differ by at most one. `none`: one domain.

    `vectors` may be a memory map larger than the memory: it is read in blocks, and what is held beside
    it is 4 * n * N bytes of distances, and some hundred MB.

    Args:
        progress: told of the inertia a row after each of Lloyd's iterations over all rows.

    Raises:
        DataError: fewer different vectors than domains.
    """
    count = 1 if recipe.method == "none" else recipe.domains
    if count < 1:
        raise DataError(f"domains is {count}; it must be at least 1")
    if recipe.max_iterations < 1:
        raise DataError(f"max_iterations is {recipe.max_iterations}; it must be at least 1")
    if recipe.tolerance < 0:
        raise DataError(f"tolerance is {recipe.tolerance}; it must not be negative")
    if recipe.top_k > count:
        raise DataError(f"top_k is {recipe.top_k}, and there are {count} domains to choose from")
    different = len(np.unique(vectors, axis=0)) if len(vectors) < SAMPLE else len(vectors)
    if different < count:
        raise DataError(f"{different} different prompts cannot make {count} domains: give more data or fewer --domains")
    match recipe.method:
        case "balanced" | "lexical":
            return _balanced(vectors, count, recipe, progress)
        case "kmeans":
            return _kmeans(vectors, count, recipe)
        case "random" | "none":
            return np.random.default_rng(recipe.seed).permutation(np.arange(len(vectors), dtype=np.int32) % count)
        case never:
            assert_never(never)


def _kmeans(vectors: Vectors, count: int, recipe: DomainsRecipe) -> NDArray[np.int32]:
    from sklearn.cluster import KMeans

    model = cast(Any, KMeans)(
        count,
        algorithm="elkan",
        n_init=STARTS,
        max_iter=recipe.max_iterations,
        tol=recipe.tolerance,
        random_state=recipe.seed,
    )
    if len(vectors) <= KMEANS_ROWS:
        return model.fit_predict(vectors).astype(np.int32)
    model.fit(_sample(vectors, KMEANS_ROWS, recipe.seed))
    return _squared_distances(vectors, model.cluster_centers_, recipe.seed).argmin(axis=0).astype(np.int32)


def _balanced(vectors: Vectors, count: int, recipe: DomainsRecipe, progress: Report | None) -> NDArray[np.int32]:
    if len(vectors) * count <= FLOW_PAIRS:
        return _constrained(vectors, count, recipe)
    from sklearn.cluster import kmeans_plusplus

    some = _sample(vectors, SAMPLE, recipe.seed)
    seeds = [some[kmeans_plusplus(some, count, random_state=recipe.seed + i)[1]] for i in range(STARTS)]
    best = min((_lloyd(some, seed, None, recipe) for seed in seeds), key=lambda found: found[0])
    return (best if len(vectors) <= SAMPLE else _lloyd(vectors, best[1], best[2], recipe, progress))[3]


def _constrained(vectors: Vectors, count: int, recipe: DomainsRecipe) -> NDArray[np.int32]:
    from k_means_constrained import KMeansConstrained

    model = cast(Any, KMeansConstrained)(
        count,
        size_min=len(vectors) // count,
        size_max=-(-len(vectors) // count),
        n_init=STARTS,
        max_iter=recipe.max_iterations,
        tol=recipe.tolerance,
        random_state=recipe.seed,
    )
    labels = np.empty(len(vectors), dtype=np.int32)
    order = np.random.default_rng(recipe.seed).permutation(len(vectors))
    labels[order] = model.fit_predict(vectors[order])
    return labels


def _lloyd(
    vectors: Vectors,
    centroids: Vectors,
    prices: Prices | None,
    recipe: DomainsRecipe,
    progress: Report | None = None,
) -> tuple[float, Vectors, Prices | None, NDArray[np.int32]]:
    """Inertia, centroids (N, d), their prices and labels (n,) after Lloyd's iterations with balanced assignments."""
    inertia, labels = np.inf, np.empty(0, dtype=np.int32)
    for _ in range(recipe.max_iterations):
        before = inertia
        labels, prices = balanced_labels(_squared_distances(vectors, centroids, recipe.seed), prices)
        centroids, inertia = _means(vectors, labels, len(centroids))
        if progress:
            progress(inertia / len(vectors))
        if before - inertia <= max(recipe.tolerance, LEAST_GAIN) * inertia:
            break
    return inertia, centroids, prices, labels


def _squared_distances(vectors: Vectors, centroids: Vectors, seed: int) -> NDArray[np.float32]:
    """(N, n) squared distances, without the rows' own squared lengths and with a jitter below 1e-5."""
    result = np.empty((len(centroids), len(vectors)), dtype=np.float32)
    own, generator = (centroids * centroids).sum(axis=1)[:, None], np.random.default_rng(seed)
    for rows in blocks(*vectors.shape):
        part = centroids @ vectors[rows].T
        jitter = generator.random(part.shape, dtype=np.float32) * np.float32(JITTER)
        result[:, rows] = own - 2 * part + jitter
    return result


def _means(vectors: Vectors, labels: NDArray[np.int32], count: int) -> tuple[Vectors, float]:
    """The domains' means (N, d), and the inertia: the sum of the rows' squared distances to their own."""
    sums, squares = np.zeros((count, vectors.shape[1])), 0.0
    for rows in blocks(*vectors.shape):
        part = vectors[rows]
        sums += np.eye(count, dtype=np.float32)[labels[rows]].T @ part
        squares += float(np.vdot(part, part))
    sizes = np.bincount(labels, minlength=count)[:, None]
    return (sums / sizes).astype(np.float32), squares - float((sums * sums / sizes).sum())


def _sample(vectors: Vectors, rows: int, seed: int) -> Vectors:
    """At most so many of the rows, drawn at random, in their order."""
    return vectors[np.sort(np.random.default_rng(seed).permutation(len(vectors))[:rows])]
