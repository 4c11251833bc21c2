"""How far raters agree: Fleiss's kappa and Krippendorff's alpha, with intervals. Knows only numbers.

Both read how many raters gave a unit each value. Where all ratings are the same, neither is defined: None.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NUMBERS_AT_ONCE = 2**22  # drawn counts held at a time (32 MiB)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval from a bootstrap over groups of units."""

    value: float | None
    low: float | None
    high: float | None
    units: int


def fleiss_kappa(counts: NDArray[np.generic]) -> float | None:
    """Fleiss (1971), "Measuring nominal scale agreement among many raters"; values are names, without an order.

    Args:
        counts: (n, k) how many raters gave unit i the value j; as many raters, at least two, for each unit.
    """
    return _number(_kappa(_kappa_parts(np.asarray(counts, dtype=np.float64)).sum(axis=0)))


def krippendorff_alpha(counts: NDArray[np.generic]) -> float | None:
    """Krippendorff's alpha for ordinal values ("Computing Krippendorff's alpha-reliability", 2011, section D).

    Args:
        counts: (n, k) as above, k in rising order; units with fewer than two ratings do not count.
    """
    return _number(_alpha(_alpha_parts(np.asarray(counts, dtype=np.float64)).sum(axis=0)))


def estimates(
    counts: NDArray[np.generic], groups: Sequence[Hashable], raters: int, *, samples: int = 2000, seed: int = 42
) -> tuple[Estimate, Estimate]:
    """(kappa, alpha) of (n, k) counts; kappa is of the units that all raters rated, alpha of those that two did.

    Args:
        groups: n keys; units of one key (definitions of one term in one context) are drawn together.
    """
    counts = np.asarray(counts, dtype=np.float64)
    found = []
    methods = ((raters, _kappa_parts, _kappa), (2, _alpha_parts, _alpha))
    for least, parts, measure in methods:
        used = counts.sum(axis=1) >= max(2, least)
        keys = [key for key, use in zip(groups, used, strict=True) if use]
        found.append(_bootstrap(parts(counts[used]), keys, measure, samples, seed))
    return found[0], found[1]


def _kappa_parts(counts: Floats) -> Floats:
    """(n, 2 + k) what kappa's sums are made of: agreement, one, and the counts of each unit."""
    raters = counts.sum(axis=1)
    agreement = (counts * (counts - 1)).sum(axis=1) / np.maximum(1, raters * (raters - 1))
    return np.column_stack([agreement, np.ones(len(counts)), counts])


def _kappa(sums: Floats) -> Floats:
    """(...) of sums (..., 2 + k) over units; NaN where it is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = sums[..., 2:] / sums[..., 2:].sum(axis=-1, keepdims=True)
        expected = (shares**2).sum(axis=-1)
        varied = (sums[..., 2:] > 0).sum(axis=-1) > 1
        return np.where(varied, (sums[..., 0] / sums[..., 1] - expected) / (1 - expected), np.nan)


def _alpha_parts(counts: Floats) -> Floats:
    """(n, k * k) each unit's share in the matrix of coincidences."""
    ratings = counts.sum(axis=1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    pairs[ratings < 2] = 0
    return (pairs / np.maximum(1, ratings - 1)[:, None, None]).reshape(len(counts), counts.shape[1] ** 2)


def _alpha(sums: Floats) -> Floats:
    """(...) of coincidences (..., k * k) summed over units; NaN where it is not defined."""
    k = round(sums.shape[-1] ** 0.5)
    coincidences = sums.reshape(*sums.shape[:-1], k, k)
    margins = coincidences.sum(axis=-1)
    below = np.cumsum(margins, axis=-1) - margins / 2  # so that a difference holds half of both ends
    distance = (below[..., :, None] - below[..., None, :]) ** 2
    total = margins.sum(axis=-1)
    varied = (margins > 1e-9).sum(axis=-1) > 1
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (coincidences * distance).sum(axis=(-1, -2))
        expected = (margins[..., :, None] * margins[..., None, :] * distance).sum(axis=(-1, -2))
        return np.where(varied, 1 - (total - 1) * observed / expected, np.nan)


def _bootstrap(
    parts: Floats, groups: Sequence[Hashable], measure: Callable[[Floats], Floats], samples: int, seed: int
) -> Estimate:
    """A measure of sums over units, and how it varies with the groups that are drawn."""
    numbers: dict[Hashable, int] = {}
    member = [numbers.setdefault(key, len(numbers)) for key in groups]
    if not member:
        return Estimate(None, None, None, 0)
    sums = np.zeros((len(numbers), parts.shape[1]))
    np.add.at(sums, member, parts)
    rng, n = np.random.default_rng(seed), len(numbers)
    block = max(1, NUMBERS_AT_ONCE // n)
    drawn = [
        measure(rng.multinomial(n, np.full(n, 1 / n), size=min(block, samples - start)) @ sums)
        for start in range(0, samples, block)
    ]
    defined = np.concatenate(drawn)
    defined = defined[np.isfinite(defined)]
    value = _number(measure(parts.sum(axis=0)))
    if value is None or not len(defined):
        return Estimate(value, None, None, len(member))
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(member))


def _number(value: Floats) -> float | None:
    return float(value) if np.isfinite(value) else None
