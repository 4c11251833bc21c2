"""Which expert serves which row of the batch in flight. Knows nothing of routers or of models.

A composed model holds one `ActiveRouting`, shared by all of its expert layers. It is set once per
batch, before the first of them is reached, and read by every one at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2**30  # of what layers make of one routing
Kept = tuple[Tensor, ...] | None


class ActiveRouting:
    """The weights of the batch in flight.

    Attributes:
        weights: (B, N) float32, or (B, L, N) where each of L expert layers has its own; a row sums to 1, or to 0
            where the base answers alone. None: no batch.
        index: (B, k) or (B, L, k) int64, the experts with weight, k the largest number of them in any row.
        gains: of index's shape, float32, their weights (0 where a row has fewer than k).
        experts: index as lists, -1 where gains are 0.
        kept: tensors that layers made of this routing, by who made them; see `keep`. They stay when a block ends, for
            the next one with the very same tensor of weights.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.index: Tensor = torch.empty(0, 0, dtype=torch.long)
        self.gains: Tensor = torch.empty(0, 0)
        self.experts: list[Any] = []
        self.kept: dict[Any, Kept] = {}
        self._last: tuple[Tensor, Tensor, Tensor, list[Any], dict[Any, Kept]] | None = None

    @contextmanager
    def using(self, weights: Tensor | None) -> Iterator[None]:
        """Sets `weights`, (B, N) or (B, L, N), for the forward passes inside the block; with None, `set` may later."""
        before = (self.weights, self.index, self.gains, self.experts, self.kept)
        try:
            if weights is not None:
                self.set(weights)
            yield
        finally:
            self.weights, self.index, self.gains, self.experts, self.kept = before

    def set(self, weights: Tensor) -> None:
        """Sets `weights`, (B, N) or (B, L, N), until the block that this is in ends."""
        if self._last is None or self._last[0] is not weights:
            k = max(1, int((weights != 0).sum(dim=-1).max().item())) if weights.numel() else 1
            gains, index = weights.topk(k, dim=-1)
            self._last = (weights, index, gains, index.masked_fill(gains == 0, -1).tolist(), {})
        self.weights, self.index, self.gains, self.experts, self.kept = self._last

    def forget(self) -> None:
        """Drops what layers made: they are others now."""
        self._last = None

    def keep(self, maker: Any, made: Kept) -> None:
        """Holds what a layer made until the routing changes, unless all that is held would be too much."""
        if sum(t.nbytes for tensors in (*self.kept.values(), made) for t in tensors or ()) <= KEPT_BYTES:
            self.kept[maker] = made
