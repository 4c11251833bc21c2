"""Vectors to domains: balanced k-means (section 3.2 of the paper) and its ablations. Knows no terms and no models."""

from collections.abc import Callable
from typing import Any, assert_never, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.balance import Prices, balanced_labels
from lora_lexicon.domains.vectors import Vectors, blocks
from lora_lexicon.errors import DataError, RecipeError
from lora_lexicon.recipe import DomainsRecipe

Report = Callable[[float], None]
FLOW_PAIRS = 100_000  # rows times domains that k-means-constrained clusters; beyond, its flow takes too long
SAMPLE = 20_000  # rows that are searched for where to begin
KMEANS_ROWS = 100_000  # rows that k-means++ and Elkan cluster; the others go to the nearest centroid
STARTS = 3  # k-means runs from so many seedings and keeps the tightest
LEAST_GAIN = 1e-4  # of the inertia; an iteration over many rows that gains less is the last
JITTER = 1e-2  # in standard deviations of the squared distances; above `balance`'s finest smoothing
LEAST_SPREAD = 1e-3  # of squared distances: less is rounding


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
        RecipeError: settings that no clustering can have.
        DataError: NaN or infinity in a vector, fewer different vectors than domains, or a domain that k-means++
            leaves empty.
    """
    check_clustering(recipe)
    count = _count(recipe)
    if not all(np.isfinite(vectors[rows]).all() for rows in blocks(*vectors.shape)):
        raise DataError("vectors hold NaN or infinity, which cannot be clustered: give another --embedder or base")
    different = _different(vectors, count)
    if different < count:
        raise DataError(f"{different} different prompts cannot make {count} domains: give more data or fewer --domains")
    match recipe.method:
        case "balanced" | "lexical":
            return _balanced(vectors, count, recipe, progress)
        case "kmeans":
            labels = _kmeans(vectors, count, recipe)
            if empty := int((np.bincount(labels, minlength=count) == 0).sum()):
                raise DataError(f"k-means++ leaves {empty} of {count} domains empty: give fewer --domains")
            return labels
        case "random" | "none":
            return np.random.default_rng(recipe.seed).permutation(np.arange(len(vectors), dtype=np.int32) % count)
        case never:
            assert_never(never)


def check_clustering(recipe: DomainsRecipe) -> None:
    """Refuses settings that no clustering can have.

    Raises:
        RecipeError: naming the key, its value and what it must be.
    """
    count = _count(recipe)
    if count < 1:
        raise RecipeError(f"domains is {count}; it must be at least 1")
    if recipe.max_iterations < 1:
        raise RecipeError(f"max_iterations is {recipe.max_iterations}; it must be at least 1")
    if recipe.tolerance < 0:
        raise RecipeError(f"tolerance is {recipe.tolerance}; it must not be negative")
    if recipe.top_k > count:
        raise RecipeError(f"top_k is {recipe.top_k}, and there are {count} domains to choose from")
    if recipe.router != "centroid" and count < 2:
        raise RecipeError(f"router is {recipe.router!r}, which learns to tell domains apart, and there is but one")
    if not 0 <= recipe.seed < 2**32:
        raise RecipeError(f"seed is {recipe.seed}; it must be at least 0 and below 2**32")


def _count(recipe: DomainsRecipe) -> int:
    return 1 if recipe.method == "none" else recipe.domains


def _different(vectors: Vectors, most: int) -> int:
    """How many different vectors there are, counted no further than `most`."""
    found = vectors[:0]
    for rows in blocks(*vectors.shape):
        found = np.unique(np.concatenate([found, vectors[rows]]), axis=0)[:most]
        if len(found) == most:
            break
    return len(found)


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
    return _squared_distances(vectors, model.cluster_centers_).argmin(axis=0).astype(np.int32)


def _balanced(vectors: Vectors, count: int, recipe: DomainsRecipe, progress: Report | None) -> NDArray[np.int32]:
    if len(vectors) * count <= FLOW_PAIRS:
        return _constrained(vectors, count, recipe)
    from sklearn.cluster import kmeans_plusplus

    some = _sample(vectors, SAMPLE, recipe.seed)
    seeds = [some[kmeans_plusplus(some, count, random_state=(recipe.seed + i) % 2**32)[1]] for i in range(STARTS)]
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
        labels, prices = balanced_labels(_jittered(_squared_distances(vectors, centroids), recipe.seed), prices)
        centroids, inertia = _means(vectors, labels, len(centroids))
        if progress:
            progress(inertia / len(vectors))
        if before - inertia <= max(recipe.tolerance, LEAST_GAIN) * inertia:
            break
    return inertia, centroids, prices, labels


def _squared_distances(vectors: Vectors, centroids: Vectors) -> NDArray[np.float32]:
    """(N, n) squared distances, without the rows' own squared lengths."""
    result = np.empty((len(centroids), len(vectors)), dtype=np.float32)
    own = (centroids * centroids).sum(axis=1)[:, None]
    for rows in blocks(*vectors.shape):
        result[:, rows] = own - 2 * (centroids @ vectors[rows].T)
    return result


def _jittered(costs: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Costs (N, n), in place, less each row's mean, with something random added, so that prices can part equal prompts.

    Without the mean, float32 is fine enough for a jitter far below the distances themselves.
    """
    count, rows = costs.shape
    for part in blocks(rows, count):
        costs[:, part] -= costs[:, part].mean(axis=0)
    spread = float(costs[:, :: max(1, rows // SAMPLE)].std())
    generator, most = np.random.default_rng(seed), np.float32(JITTER * max(spread, LEAST_SPREAD))
    for part in blocks(rows, count):
        costs[:, part] += generator.random((count, len(range(rows)[part])), dtype=np.float32) * most
    return costs


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
