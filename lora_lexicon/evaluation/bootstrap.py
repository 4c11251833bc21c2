"""Intervals and tests: is a difference between two systems more than the luck of the sample? Knows only numbers.

The bootstrap after Koehn (2004), "Statistical significance tests for machine translation evaluation"; approximate
randomisation after Riezler and Maxwell (2005), "On some pitfalls in automatic evaluation and significance testing for
MT". Rows that share a group (a headword) are drawn, or change sides, together, since they are not independent.
"""

from collections.abc import Callable, Hashable, Sequence
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
        p is twice the smaller share of resamples on either side of 0, at most 1, never below 2 / (samples + 1), nor
        below what the number of groups allows (see `interval_of`).

    Raises:
        ValueError: lengths that differ, or no rows.
    """
    rows = len(a)
    weights = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    if not rows or len(b) != rows or len(weights) != rows or (groups is not None and len(groups) != rows):
        raise ValueError(f"a paired bootstrap needs the same rows on both sides: {rows}, {len(b)}, {len(weights)}")
    rowwise = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    sums = np.stack([rowwise, weights], axis=1)
    if groups is not None:
        sums = grouped(sums, numbered(groups))
    found = resampled(sums, samples, seed)
    return interval_of(float(rowwise.sum() / weights.sum()), found[:, 0] / found[:, 1], len(sums))


def interval_of(difference: float, drawn: NDArray[np.float64], groups: int) -> Interval:
    """The interval and p of a difference, from those of (samples,) resamples of so many groups.

    p is never below 2 ** (1 - groups), the least that a paired test can find: a few groups differ alike by luck.
    """
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = max(2 * (int(tail) + 1) / (len(drawn) + 1), 2.0 ** (1 - groups))
    return Interval(difference, float(low), float(high), min(1.0, p))


def numbered(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """(n,) the number of each row's group, by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in groups], dtype=np.int64)


def grouped(rows: NDArray[np.float64], member: NDArray[np.int64]) -> NDArray[np.float64]:
    """(g, k) the sums of (n, k) rows over the groups that have any."""
    present, place = np.unique(member, return_inverse=True)
    sums = np.zeros((len(present), rows.shape[1]))
    for k in range(rows.shape[1]):
        sums[:, k] = np.bincount(place, rows[:, k], len(present))
    return sums


def resampled(sums: NDArray[np.float64], samples: int, seed: int = 42) -> NDArray[np.float64]:
    """(samples, k) the sums over groups drawn with replacement from (g, k), in blocks that fit the memory."""
    groups, columns = sums.shape
    rng = np.random.default_rng(seed)
    block = max(1, NUMBERS_AT_ONCE // (groups * columns))
    parts = []
    for start in range(0, samples, block):
        drawn = rng.integers(0, groups, size=(min(block, samples - start), groups))
        parts.append(sums[drawn].sum(axis=1))
    return np.concatenate(parts)


def randomised(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    difference: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    *,
    samples: int = 10_000,
    seed: int = 42,
) -> float:
    """The two-sided p of approximate randomisation: how often systems that swap groups at random differ as much.

    Args:
        a, b: (g, k) each group's sums.
        difference: of the metric, from two arrays (samples, k) of sums over all groups.

    Returns:
        (r + 1) / (samples + 1), where r counts the shuffles that differ at least as much as the systems do.
    """
    rng = np.random.default_rng(seed)
    total_a, total_b, apart = a.sum(axis=0), b.sum(axis=0), b - a
    seen = abs(float(difference(total_a[None], total_b[None])[0]))
    block, count = max(1, NUMBERS_AT_ONCE // len(a)), 0
    for start in range(0, samples, block):
        moved = (rng.random((min(block, samples - start), len(a))) < 0.5) @ apart
        # Rounding must not tell a shuffle that swaps nothing, or all, from the systems themselves.
        count += int((np.abs(difference(total_a + moved, total_b - moved)) >= seen - 1e-9).sum())
    return (count + 1) / (samples + 1)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm, 1979), in their order."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected
