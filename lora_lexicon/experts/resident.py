"""Which experts of a model are in memory: those asked for, within a budget; the least recently used make room.

Whoever made an expert's source checks it, each time that it is loaded. Knows nothing of packs, routers or batches.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.grouped import drop_adapter, linear_layers, put_adapter
from lora_lexicon.experts.lora import LoadedAdapter, check_fit
from lora_lexicon.experts.routed import ActiveRouting


@dataclass(frozen=True)
class Source:
    """An expert that can be loaded.

    Attributes:
        like: its name, layers, shapes and types: factors on the meta device.
        load: reads it, the same each time; a LexiconError where it is not there any more or has changed.
    """

    like: LoadedAdapter
    load: Callable[[], LoadedAdapter]

    @property
    def bytes(self) -> int:
        """Of its factors in memory."""
        return sum(f.a.nbytes + f.b.nbytes for f in self.like.factors.values())


class Residents:
    """The experts of one model, expert n of a routing being `sources[n]`.

    Args:
        budget: bytes that the factors of experts in memory may take. What loading one takes for a moment comes beside
            it, and so do the copies that a batch works with (see `ActiveRouting.keep`).
        together: how many experts one prompt may need.

    Attributes:
        loads: how often an expert was loaded.
        evictions: how often one made room for another.

    Raises:
        ExpertError: an expert that does not fit the model, or too small a budget for the experts of one prompt.
    """

    def __init__(
        self, model: nn.Module, active: ActiveRouting, sources: Sequence[Source], budget: int, together: int = 1
    ) -> None:
        self.budget, self.together, self.loads, self.evictions = budget, together, 0, 0
        self.sources: list[Source] = []
        self._model, self._active = model, active
        self._held: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._last: Tensor | None = None  # the weights that were held last
        self.change(sources)

    def change(self, sources: Sequence[Source]) -> None:
        """Has other experts, numbered anew; none of them is in memory. No batch may be in flight.

        Raises:
            ExpertError: as the class does; nothing is changed.
        """
        need_room(self.budget, sources, self.together)
        linear = linear_layers(self._model)
        for source in sources:
            check_fit(linear, source.like)
        for n in list(self._held):
            self._drop(n)
        self.sources = list(sources)

    @property
    def bytes(self) -> int:
        """What the experts in memory take."""
        return self._bytes(self._held)

    @property
    def names(self) -> list[str]:
        """The experts in memory, the least recently used first."""
        return [self.sources[n].like.name for n in self._held]

    def has(self, experts: Iterable[int]) -> bool:
        """Whether all of them are in memory."""
        return all(n in self._held for n in experts)

    def fit(self, experts: Collection[int]) -> bool:
        """Whether there is room for all of them at once."""
        return self._bytes(experts) <= self.budget

    def hold(self, experts: Collection[int]) -> None:
        """Has these in memory, and whatever else there is still room for.

        Raises:
            LexiconError: there is no room for all of them at once, or one cannot be loaded.
        """
        self._last = None
        if not self.fit(experts):
            raise ExpertError(_too_small(self.budget, f"{len(experts)} experts at once", self._bytes(experts)))
        for n in sorted(experts):
            if n in self._held:
                self._held.move_to_end(n)
        for n in sorted(experts):
            if n not in self._held:
                self._load(n, experts)

    def hold_weighted(self, weights: Tensor) -> None:
        """The same of all experts that have a weight in any row of (..., N)."""
        if weights is not self._last:
            self.hold((weights != 0).flatten(0, -2).any(dim=0).nonzero().flatten().tolist())
            self._last = weights

    def _load(self, n: int, wanted: Collection[int]) -> None:
        source = self.sources[n]
        for other in [m for m in self._held if m not in wanted]:
            if self.bytes + source.bytes <= self.budget:
                break
            self._drop(other)
            self.evictions += 1
        with torch.inference_mode(False):  # what lies on the model is used outside of it too
            loaded = source.load()
            if _shapes(loaded) != _shapes(source.like):
                raise ExpertError(f"expert {loaded.name!r} has other shapes than when it was first read: start again")
            try:
                put_adapter(self._model, n, loaded, self._active)
            except BaseException:  # no memory left on its device
                drop_adapter(self._model, n, self._active)
                raise
        self._held[n] = None
        self.loads += 1

    def _drop(self, n: int) -> None:
        drop_adapter(self._model, n, self._active)
        del self._held[n]

    def _bytes(self, experts: Iterable[int]) -> int:
        return sum(self.sources[n].bytes for n in experts)


def need_room(budget: int, sources: Sequence[Source], together: int) -> None:
    """Raises ExpertError unless the largest experts, so many as one prompt may need, have room at once."""
    least = sum(sorted((source.bytes for source in sources), reverse=True)[:together])
    if least > budget:
        what = "the largest expert" if together == 1 else f"the {min(together, len(sources))} experts of one prompt"
        raise ExpertError(_too_small(budget, what, least))


def _too_small(budget: int, what: str, least: int) -> str:
    return f"a memory of {budget:,} bytes for experts is too small for {what}: give at least {least:,} bytes"


def _shapes(adapter: LoadedAdapter) -> Any:
    return {name: (f.a.shape, f.b.shape, f.a.dtype, f.b.dtype) for name, f in adapter.factors.items()}
