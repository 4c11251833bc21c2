"""The decision of a router for a list of prompts. Knows nothing of how it was made."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Routing:
    """Experts and weights for n prompts over N domains.

    Attributes:
        names: the N domains.
        similarities: (n, N) float32, cosines, or the scores of a learned router.
        weights: (n, N) float32; a row sums to 1, or to 0 where the router abstains to the base.
    """

    names: tuple[str, ...]
    similarities: NDArray[np.float32]
    weights: NDArray[np.float32]

    @property
    def top(self) -> NDArray[np.int64]:
        """(n,) the expert with the largest weight, -1 where the router abstains."""
        return heaviest(self.weights)

    @property
    def margin(self) -> NDArray[np.float32]:
        """(n,) how far the largest similarity leads the second (infinity for one domain)."""
        return leads(self.similarities)

    def name(self, row: int) -> str:
        """The chosen domain's name, or "base" where the router abstains."""
        index = int(self.top[row])
        return self.names[index] if index >= 0 else "base"


def leads(similarities: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) by how much the largest of each row (n, N) leads the second (infinity for N = 1)."""
    if similarities.shape[1] < 2:
        return np.full(len(similarities), np.inf, dtype=np.float32)
    ordered = np.sort(similarities, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def heaviest(weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) the expert with the largest weight of (n, N), or of the mean over layers of (n, L, N); -1 for all 0."""
    if weights.ndim == 3:
        weights = weights.mean(axis=1)
    return np.where(weights.any(axis=1), weights.argmax(axis=1), -1)
