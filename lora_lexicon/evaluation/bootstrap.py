"""The paired bootstrap: is the difference between two systems more than the luck of the sample? Knows only numbers.

After Koehn (2004), "Statistical significance tests for machine translation evaluation". Rows that share
a group (a headword) are drawn together, since they are not independent of each other.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUMBERS_AT_ONCE = 2**22  # drawn counts held at a time (32 MiB)


@dataclass(frozen=True)
class Interval:
    """A difference a - b with its 95 % interval [low, high] and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    *,
    weights: NDArray[np.generic] | None = None,
    groups: Sequence[Hashable] | None = None,
    samples: int = 10_000,
    seed: int = 42,
) -> Interval:
    """Compares sum(a) / sum(weights) with sum(b) / sum(weights) over the same n rows.

    Args:
        a, b: (n,) a score of each row, or a sum over the row's tokens.
        weights: (n,) the row's tokens; 1 each unless given.
        groups: n keys; rows of one key are resampled together.

    Returns:
        p is twice the smaller share of resamples on either side of 0, at most 1 and never below 2 / (samples + 1).

    Raises:
        ValueError: lengths that differ, or no rows.
    """
    rows = len(a)
    weights = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    if not rows or len(b) != rows or len(weights) != rows or (groups is not None and len(groups) != rows):
        raise ValueError(f"a paired bootstrap needs the same rows on both sides: {rows}, {len(b)}, {len(weights)}")
    rowwise = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    difference, total = rowwise, weights
    if groups is not None:
        numbers: dict[Hashable, int] = {}
        member = np.array([numbers.setdefault(key, len(numbers)) for key in groups])
        difference, total = np.zeros(len(numbers)), np.zeros(len(numbers))
        np.add.at(difference, member, rowwise)
        np.add.at(total, member, weights)
    drawn = _resampled(difference, total, samples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Interval(
        difference=float(difference.sum() / total.sum()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (int(tail) + 1) / (samples + 1)),
    )


def _resampled(
    difference: NDArray[np.float64], total: NDArray[np.float64], samples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(samples,) the statistic of each resample, in blocks that fit the memory."""
    n = len(difference)
    block = max(1, NUMBERS_AT_ONCE // n)
    parts = []
    for start in range(0, samples, block):
        drawn = rng.integers(0, n, size=(min(block, samples - start), n))
        parts.append(difference[drawn].sum(axis=1) / total[drawn].sum(axis=1))
    return np.concatenate(parts)
