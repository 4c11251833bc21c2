"""Arithmetic on rows of vectors. Knows nothing of what they stand for.

A row's result here depends on that row alone, to the bit: no BLAS call, whose blocking (and so
whose rounding) changes with the number of rows or columns. Routing one prompt and routing it in a
batch, before and after a domain was added, thus agree exactly.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_BLOCK = 2**19  # numbers in one block: 4 MB in float64, however many rows there are


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Row numbers 0 to `rows` in parts of some MB, for rows of `width` numbers; at least one part."""
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def unit(rows: NDArray[np.floating]) -> Vectors:
    """(n, d) rows of length one; a row of zeros stays zero."""
    result = np.empty(rows.shape, dtype=np.float32)
    for part in blocks(*rows.shape):
        exact = rows[part].astype(np.float64)
        length = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
        result[part] = exact / np.where(length == 0, 1.0, length)
    return result


def centred(rows: Vectors, mean: Vectors) -> Vectors:
    """(n, d) rows less a mean (d,), of length one; a mean of zeros takes nothing off."""
    return unit(rows - mean) if mean.any() else unit(rows)


def cosines(rows: Vectors, centroids: Vectors) -> Vectors:
    """(n, N) dot products of rows (n, d) with centroids (N, d), each summed in float64."""
    result = np.empty((len(rows), len(centroids)), dtype=np.float32)
    for part in blocks(*rows.shape):
        exact = rows[part].astype(np.float64)
        for column, centroid in enumerate(centroids.astype(np.float64)):
            result[part, column] = (exact * centroid).sum(axis=1)
    return result
