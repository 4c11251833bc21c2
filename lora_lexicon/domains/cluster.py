"""Vectors to domains: balanced k-means (section 3.2 of the paper) and its ablations. Knows no terms and no models."""

from typing import Any, assert_never, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.vectors import Vectors
from lora_lexicon.errors import DataError
from lora_lexicon.recipe import DomainsRecipe

BALANCED_SAMPLE = 20_000  # rows that place the balanced centroids; all rows are then assigned at once
ROWS_PER_FLOW = 100_000  # rows in one balanced assignment: its memory and time stay bounded
STARTS = 3  # k-means runs from so many seedings and keeps the tightest


def cluster(vectors: Vectors, recipe: DomainsRecipe) -> NDArray[np.int32]:
    """(n,) int32 domain numbers for vectors (n, d) of unit length, every domain with a member.

    `balanced` and `lexical`: constrained k-means, sizes differ by at most one. The centroids are
    placed on a sample of 20,000 rows; every row is then assigned by minimum-cost flow, in shuffled
    parts of 100,000 rows, each part balanced. `kmeans`: k-means++ and Elkan. `random`: sizes differ
    by at most one. `none`: one domain.

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
    different = len(np.unique(vectors, axis=0)) if len(vectors) < BALANCED_SAMPLE else len(vectors)
    if different < count:
        raise DataError(f"{different} different prompts cannot make {count} domains: give more data or fewer --domains")
    match recipe.method:
        case "balanced" | "lexical":
            return _balanced(vectors, count, recipe)
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
    return model.fit_predict(vectors).astype(np.int32)


def _balanced(vectors: Vectors, count: int, recipe: DomainsRecipe) -> NDArray[np.int32]:
    from k_means_constrained import KMeansConstrained

    order = np.random.default_rng(recipe.seed).permutation(len(vectors))
    sample = vectors[order[:BALANCED_SAMPLE]]
    model = cast(Any, KMeansConstrained)(
        count,
        size_min=len(sample) // count,
        size_max=-(-len(sample) // count),
        n_init=STARTS,
        max_iter=recipe.max_iterations,
        tol=recipe.tolerance,
        random_state=recipe.seed,
    )
    labels = np.empty(len(vectors), dtype=np.int32)
    labels[order[:BALANCED_SAMPLE]] = model.fit_predict(sample)
    if len(vectors) > len(sample):
        step = ROWS_PER_FLOW // count * count  # so that only the last part can be uneven
        for start in range(0, len(vectors), step):
            part = order[start : start + step]
            sizes = len(part) // count, -(-len(part) // count)
            labels[part] = model.predict(vectors[part], size_min=sizes[0], size_max=sizes[1])
    return labels
