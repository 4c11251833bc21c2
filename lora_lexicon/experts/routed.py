"""Which expert serves which row of the batch in flight. Knows nothing of routers or of models.

A composed model holds one `ActiveRouting`, shared by all of its expert layers. It is set once per
batch, before decoding, and read by every layer at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ActiveRouting:
    """The weights of the batch in flight.

    Attributes:
        weights: (B, N) float32, or (B, L, N) where each of L expert layers has its own; a row sums to 1, or to 0
            where the base answers alone. None: no batch.
        index: (B, k) or (B, L, k) int64, the experts with weight, k the largest number of them in any row.
        gains: of index's shape, float32, their weights (0 where a row has fewer than k).
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.index: Tensor = torch.empty(0, 0, dtype=torch.long)
        self.gains: Tensor = torch.empty(0, 0)

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Sets `weights`, (B, N) or (B, L, N), for the forward passes inside the block."""
        before = (self.weights, self.index, self.gains)
        k = max(1, int((weights != 0).sum(dim=-1).max().item())) if weights.numel() else 1
        self.weights = weights
        self.gains, self.index = weights.topk(k, dim=-1)
        try:
            yield
        finally:
            self.weights, self.index, self.gains = before
