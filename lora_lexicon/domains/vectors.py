"""Arithmetic on rows of vectors. Knows nothing of what they stand for.

A row's result here depends on that row alone, to the bit: no BLAS call, whose blocking (and so
whose rounding) changes with the number of rows or columns. Routing one prompt and routing it in a
batch, before and after a domain was added, thus agree exactly.
"""

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_ROWS_AT_ONCE = 8192


def unit(rows: NDArray[np.floating]) -> Vectors:
    """(n, d) rows of length one; a row of zeros stays zero."""
    exact = rows.astype(np.float64)
    length = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    return (exact / np.where(length == 0, 1.0, length)).astype(np.float32)


def cosines(rows: Vectors, centroids: Vectors) -> Vectors:
    """(n, N) dot products of rows (n, d) with centroids (N, d), each summed in float64."""
    result = np.empty((len(rows), len(centroids)), dtype=np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE].astype(np.float64)
        for column, centroid in enumerate(centroids.astype(np.float64)):
            result[start : start + len(part), column] = (part * centroid).sum(axis=1)
    return result
