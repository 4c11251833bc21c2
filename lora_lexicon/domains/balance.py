"""Costs to domains of equal size: the transportation problem of n rows and N domains. Knows nothing of what costs.

Each row takes the domain with the smallest cost + price. The N prices are the problem's dual variables, found by
Newton's method on a smoothed dual. Whatever the prices, labels made so are optimal for their own sizes; the few rows by
which these are still uneven are moved along shortest paths between the domains (successive shortest paths), which keeps
them optimal.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

COARSE = (1.0, 3e-1, 1e-1, 3e-2, 1e-2)  # smoothings of the dual, in standard deviations of the costs
FINE = (1e-2, 1e-3)
COARSE_ROWS = 50_000  # the coarse prices are found on so many rows, the fine ones on all
NEWTON_STEPS = 30  # at each smoothing
LEAST_DAMPING = 1e-6  # of the curvature that a share of rows would have
CLOSE = 1e-3  # how far from its share, in parts of it, prices may leave a domain
FAR = 0.5  # how far, in parts of a share, prices `near` may leave a domain: from further off one begins anew
BLOCK = 2**19  # costs in one block: it stays in the processor's cache
CANDIDATES = 2**24  # costs held in float64 while rows are moved

Costs = NDArray[np.float32]
Prices = NDArray[np.float64]


def balanced_labels(costs: Costs, near: Prices | None = None) -> tuple[NDArray[np.int32], Prices]:
    """(n,) int32 domains for costs (N, n), N at most n, and their prices (N,).

    Sizes differ by at most one, and the sum of costs is the least; where N does not divide n it is the least for these
    sizes, and which domains have one row more is chosen step by step. Rows whose costs differ by the same, to less than
    the finest smoothing, make it slow: prices cannot part them, and they are moved one at a time.

    Args:
        near: prices of costs that were much the same.
    """
    labels = np.empty(costs.shape[1], dtype=np.int32)
    prices = balancing_prices(costs, near)
    for rows in _blocks(costs):  # in float64, so that no path below has a shortcut
        labels[rows] = (costs[:, rows] + prices[:, None]).argmin(axis=0)
    move_to_balance(costs, labels)
    return labels, prices


def balancing_prices(costs: Costs, near: Prices | None = None) -> Prices:
    """(N,) prices that make the domains' sizes nearly equal; their mean is zero.

    From one smoothing to the next the prices move little: where rows come in clumps, as equal prompts do, the dual has
    plateaus and cliffs, on which Newton's method from afar takes hundreds of steps. Good prices `near` spare the coarse
    smoothings.
    """
    some = np.ascontiguousarray(costs[:, :: max(1, costs.shape[1] // COARSE_ROWS)])
    scale, share = float(some.std()) or 1.0, some.shape[1] / len(costs)
    if near is not None and np.abs(_slope(some, near, FINE[0] * scale)[0] - share).max() > FAR * share:
        near = None
    prices = np.zeros(len(costs)) if near is None else near
    for smoothing in COARSE if near is None else ():
        prices = _maximise(some, prices, smoothing * scale)
    for smoothing in FINE:
        prices = _maximise(costs, prices, smoothing * scale)
    return prices


def _maximise(costs: Costs, prices: Prices, smoothing: float) -> Prices:
    """Newton's method on the smoothed dual, a concave function of the prices, damped after Levenberg and Marquardt.

    Where few rows hesitate about a domain its price has hardly a curvature: undamped, it would leap. A step is taken
    if the dual still rises at its end, or if it falls less steeply than it rose and the sizes are nearer to equal.
    """
    share, damping = costs.shape[1] / len(prices), LEAST_DAMPING
    sizes, curvature = _slope(costs, prices, smoothing)
    for _ in range(NEWTON_STEPS):
        off = sizes - share
        if np.abs(off).max() <= max(1.0, CLOSE * share):
            break
        # A constant on all prices changes nothing: without the first term there would be no one solution.
        ridge = curvature.trace() / len(prices) ** 2 + np.diag(np.full(len(prices), damping * share / smoothing))
        tried = prices + np.linalg.solve(curvature + ridge, off)
        tried -= tried.mean()
        found = _slope(costs, tried, smoothing)
        left, step = found[0] - share, tried - prices
        rise = left @ step
        if rise > 0 or (rise > -0.5 * off @ step and np.linalg.norm(left) < np.linalg.norm(off)):
            prices, (sizes, curvature) = tried, found
            damping = max(damping / 16, LEAST_DAMPING)
        else:
            damping *= 64
    return prices


def _slope(costs: Costs, prices: Prices, smoothing: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the smoothed dual at these prices: the domains' sizes (N,), and minus the Hessian (N, N).

    The gradient is the sizes less the equal shares.
    """
    sizes, together = np.zeros(len(prices)), np.zeros((len(prices), len(prices)))
    for rows in _blocks(costs):
        shares = costs[:, rows] + prices.astype(np.float32)[:, None]
        shares *= np.float32(-1 / smoothing)
        shares -= shares.max(axis=0)
        np.exp(shares, out=shares)
        shares /= shares.sum(axis=0)
        sizes += shares.sum(axis=1, dtype=np.float64)
        together += shares @ shares.T
    return sizes, (np.diag(sizes) - together) / smoothing


def move_to_balance(costs: Costs, labels: NDArray[np.int32]) -> int:
    """Moves rows, in place, till the sizes of labels that are optimal for theirs are equal; returns how many moved."""
    count, moved = len(costs), 0
    while True:
        sizes = np.bincount(labels, minlength=count)
        if sizes.max() - sizes.min() <= 1:
            return moved
        excess = int(np.maximum(sizes - len(labels) // count, 0).sum())
        paths = max(1, min(excess, CANDIDATES // count**3))
        moved += _along_paths(costs, labels, sizes, paths)


def _along_paths(costs: Costs, labels: NDArray[np.int32], sizes: NDArray[np.int64], paths: int) -> int:
    """Follows at most so many shortest paths; of each pair of domains, one row moves on each at most."""
    count, moved = len(costs), 0
    low, high = len(labels) // count, -(-len(labels) // count)
    pool = _cheapest(costs, labels, paths)
    cost, own = costs[:, pool].T.astype(np.float64), labels[pool]
    edges, movers = np.full((count, count), np.inf), np.zeros((count, count), dtype=np.int64)
    changed = list(range(count))
    for _ in range(paths):
        over, under = sizes > high, sizes < low
        if not over.any() and not under.any():
            break
        for domain in changed:  # the cheapest row to each other domain
            members = np.flatnonzero(own == domain)
            edges[domain] = np.inf
            if len(members):
                extra = cost[members] - cost[members, domain, None]
                best = extra.argmin(axis=0)
                movers[domain], edges[domain] = members[best], extra[best, np.arange(count)]
                edges[domain, domain] = np.inf
        changed = _shortest(edges, over if over.any() else sizes > low, under if under.any() else sizes < high)
        for here, there in pairwise(changed):
            own[movers[here, there]] = there
        sizes[changed[0]] -= 1
        sizes[changed[-1]] += 1
        moved += len(changed) - 1
    labels[pool] = own
    return moved


def _cheapest(costs: Costs, labels: NDArray[np.int32], each: int) -> NDArray[np.int64]:
    """The rows that are among the `each` cheapest to move from their own domain to any one other."""
    found = []
    for own in range(len(costs)):
        rows = np.flatnonzero(labels == own)
        if len(rows) > each:
            extra = costs[:, rows]
            extra -= extra[own].copy()
            rows = rows[np.unique(np.argpartition(extra, each - 1, axis=1)[:, :each])]
        found.append(rows)
    return np.concatenate(found)


def _shortest(edges: NDArray[np.float64], sources: NDArray[np.bool_], sinks: NDArray[np.bool_]) -> list[int]:
    """The cheapest path from any source to any sink, by Bellman and Ford: edges may be negative, cycles are not."""
    distance, before = np.where(sources, 0.0, np.inf), np.full(len(edges), -1)
    for _ in range(len(edges)):
        through = distance[:, None] + edges
        best = through.argmin(axis=0)
        reached = through[best, np.arange(len(edges))]
        better = reached < distance
        if not better.any():
            break
        distance, before = np.where(better, reached, distance), np.where(better, best, before)
    path = [int(np.where(sinks, distance, np.inf).argmin())]
    while before[path[-1]] >= 0 and len(path) < len(edges):
        path.append(int(before[path[-1]]))
    return path[::-1]


def _blocks(costs: Costs) -> Iterator[slice]:
    step = max(1, BLOCK // len(costs))
    for start in range(0, costs.shape[1], step):
        yield slice(start, start + step)
