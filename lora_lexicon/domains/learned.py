"""Learned routers: a frozen map that makes a domain's row of its mean, learned on the prompts of all domains at once.

A domain that comes later gets its row from the same map: nothing is trained again, and no other row changes.
It knows neither models nor data, and leaves abstention and weights to the router.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.vectors import Vectors, cosines
from lora_lexicon.errors import DataError, RecipeError, RouterError
from lora_lexicon.recipe import DomainsRecipe

if TYPE_CHECKING:
    from lora_lexicon.domains.router import Described

ROWS = 20_000  # training rows that the map is learned on; of more, so many drawn at random
WIDTH = 8192  # numbers in a vector, above which a matrix of width x width is refused
MAX_VALUE = 1e12  # of any number; what is made of it must leave room in a float32
RIDGE = 1e-2  # of the projection: weight of half the squared length of what it adds to the identity (docs/lab-notes.md)
MAPS = {"projection": ("down", "up"), "linear": ("precision",)}  # the map's tensors, by method


@dataclass(frozen=True)
class Learned:
    """N domains' rows over vectors of length d, and the frozen map that made them.

    A score is `row . vector + offset`; scores / temperature are logits, where the temperature is the recipe's at
    fitting. So a softmax at that temperature is the domain's probability, and a margin over it a log of odds.

    Attributes:
        method: `projection` or `linear`, see `learn`.
        rows: (N, d) float32.
        offsets: (N,) float32; zeros for `projection`.
        map: of `projection`, `down` and `up` (r, d) float32; of `linear`, `precision` (d, d) float32.
    """

    method: str
    rows: Vectors
    offsets: Vectors
    map: dict[str, Vectors]

    def scores(self, vectors: Vectors) -> Vectors:
        """(n, N) float32 for vectors (n, d), prepared as the router's centroids were; each depends on its row alone."""
        return cosines(vectors, self.rows) + self.offsets

    def joined(self, centroid: Vectors, length: float) -> "Learned":
        """With one more domain, whose members' mean is `length` times its unit centroid (d,)."""
        row, offset = _row(self.method, self.map, centroid, length)
        return self.with_row(row, offset)

    def with_row(self, row: Vectors, offset: np.float32) -> "Learned":
        """With one more domain, whose row (d,) and offset the same map has made."""
        return replace(self, rows=np.concatenate([self.rows, row[None]]), offsets=np.append(self.offsets, offset))

    def kept(self, numbers: Sequence[int]) -> "Learned":
        """With these domains alone."""
        return replace(self, rows=self.rows[numbers], offsets=self.offsets[numbers])

    def same_map(self, other: "Learned | None") -> bool:
        """Whether the other's rows are made by the same map, to the bit."""
        if other is None or self.method != other.method:
            return False
        return all(np.array_equal(value, other.map[key]) for key, value in self.map.items())

    def check(self, count: int, width: int) -> None:
        """Raises RouterError unless it holds finite tensors for so many domains over vectors of this width."""
        rank = len(self.map["down"]) if self.method == "projection" and self.map["down"].ndim == 2 else width
        wanted = {"rows": (count, width), "offsets": (count,), **dict.fromkeys(MAPS[self.method], (rank, width))}
        for key, value in {"rows": self.rows, "offsets": self.offsets, **self.map}.items():
            if value.shape != wanted[key] or value.dtype != np.float32:
                raise RouterError(f"{key} is {value.dtype} {value.shape}; it must be float32 {wanted[key]}")
            if not np.isfinite(value).all() or np.abs(value).max(initial=0) > MAX_VALUE:
                raise RouterError(f"{key} holds values that are not finite, or above {MAX_VALUE:g}")


def learn(
    members: Vectors, labels: NDArray[np.int32], found: "Sequence[Described]", recipe: DomainsRecipe
) -> Learned | None:
    """What the recipe's `router` learns of members (n, d), of unit length, and their domains (n,); None: a centroid.

    `projection`: a domain's row is P of its centroid, P(c) = c + (c down') up, trained by cross-entropy of
    softmax(row . x / temperature) against the prompts' domains, with a penalty on what P adds to the identity. After
    Nexus (arXiv:2408.15901), whose P is an MLP: N centroids determine no more than a linear map on
    their span, where `down` is an orthonormal basis, and there the problem is convex.

    `linear`: linear discriminant analysis, a linear classifier of prompts as in MoDEM (Simonds et al., 2024), which
    fine-tunes an encoder: row = temperature S^-1 m and offset = -row . m / 2 for a domain of mean m, with one S, the
    Ledoit-Wolf estimate of the covariance within domains, for all.

    Every domain counts alike, whatever its size.

    Raises:
        RecipeError: `linear` over vectors too long for a matrix of their width.
        DataError: `linear` of one domain, or where no member differs from its domain's mean.
    """
    if recipe.router == "centroid":
        return None
    some = np.sort(np.random.default_rng(recipe.seed).permutation(len(members))[:ROWS])
    vectors, own = np.asarray(members[some]), labels[some]
    if recipe.router == "projection":
        learned = _projection(vectors, own, np.stack([part.centroid for part in found]), recipe.temperature)
    else:
        learned = {"precision": _precision(vectors, own) * np.float32(recipe.temperature)}
    return _made(recipe.router, learned, found)


def _made(method: str, learned: dict[str, Vectors], found: "Sequence[Described]") -> Learned:
    rows, offsets = zip(*(_row(method, learned, part.centroid, 1 - part.cohesion) for part in found), strict=True)
    return Learned(method, np.stack(rows), np.array(offsets, dtype=np.float32), learned)


def _row(method: str, learned: dict[str, Vectors], centroid: Vectors, length: float) -> tuple[Vectors, np.float32]:
    """The row (d,) and the offset that a map makes of a mean; in float64, as the inverse of a covariance needs."""
    exact = centroid.astype(np.float64)
    if method == "projection":
        return (exact + (learned["down"] @ exact) @ learned["up"]).astype(np.float32), np.float32(0)
    row = learned["precision"] @ (length * exact)
    return row.astype(np.float32), np.float32(-0.5 * length * (row @ exact))


def _projection(
    vectors: Vectors, labels: NDArray[np.int32], centroids: Vectors, temperature: float
) -> dict[str, Vectors]:
    """`down` and `up` (r, d), r at most N: the minimum of a convex function, found by L-BFGS."""
    import torch

    _, sizes, directions = np.linalg.svd(centroids, full_matrices=False)
    down = torch.from_numpy(directions[sizes > sizes[0] * 1e-5])
    rows, targets = torch.from_numpy(vectors), torch.from_numpy(labels).long()
    start = rows @ torch.from_numpy(centroids).T
    mixed = down @ torch.from_numpy(centroids).T  # (r, N)
    counts = torch.bincount(targets, minlength=len(centroids))
    up = torch.zeros_like(down, requires_grad=True)
    search = torch.optim.LBFGS([up], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        search.zero_grad()
        logits = (start + rows @ up.T @ mixed) / temperature
        loss = torch.nn.functional.cross_entropy(logits, targets, 1 / counts.clamp(min=1))
        loss = loss + RIDGE / 2 * up.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(cast(Any, closure))
    return {"down": down.numpy(), "up": up.detach().numpy()}


def _precision(vectors: Vectors, labels: NDArray[np.int32]) -> Vectors:
    """(d, d) the inverse of the covariance within domains."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    width, count = vectors.shape[1], int(labels.max()) + 1
    if width > WIDTH:
        raise RecipeError(
            f"the router 'linear' holds a matrix of {width} x {width} numbers, the most is {WIDTH} x {WIDTH}: use "
            "--router projection"
        )
    if count == 1:
        raise DataError("there is one domain alone, which --router linear tells from nothing: use centroid")
    priors = np.full(count, 1 / count)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors).fit(vectors, labels)
    covariance = cast(Any, fitted).covariance_.astype(np.float64)
    if not covariance.any():
        raise DataError("all prompts of a domain are alike, which --router linear cannot learn of: use centroid")
    return np.linalg.pinv(covariance, hermitian=True).astype(np.float32)
