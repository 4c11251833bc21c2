"""Definitions in flight: rows that are decoded together, may join at any step, and leave when they are done.

Continuous batching. Knows nothing of requests, of how rows were routed, or of what is done with their tokens.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lora_lexicon.domains.routing import Routing
from lora_lexicon.inference.sampling import Decoding, choose

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from lora_lexicon.compose.system import System

GATE_TOLERANCE = 1e-4  # two logits of a gate closer than this may change places with the batch's shape
FULL = 0.6  # of a batch's places are in use, or the rows that are left are laid together anew


@dataclass(eq=False)
class Row:
    """One definition being written.

    Attributes:
        weights: (N,) or (L, N), how experts serve it; None where there is nothing to choose, or where it is chosen
            when the row joins a batch of a system that `routes_in_passing`.
        uniform: (max_new_tokens,) the numbers it is sampled by.
        written: its tokens so far, EOS included.
        margin: the least by which one of them was safe (see `sampling.choose`).
        score: the sum of their log-probabilities, in nats, before temperature and penalties; 0 unless asked for.
        alone: no other row was ever computed beside it.
        similarities: (N,) to the domains' centroids, where a router chose.
    """

    prompt: list[int]
    weights: NDArray[np.float32] | None
    uniform: NDArray[np.float64]
    decoding: Decoding
    written: list[int] = field(default_factory=list)
    margin: float = np.inf
    score: float = 0.0
    done: bool = False
    alone: bool = True
    similarities: NDArray[np.float32] | None = None

    def again(self) -> "Row":
        """The same, with nothing written."""
        return Row(self.prompt, self.weights, self.uniform, self.decoding, similarities=self.similarities)


class Space(DynamicLayer):
    """A layer's keys and values with room for the tokens to come, so that none are copied as they come."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Both (B, heads, capacity, d), filled up to `length`."""
        super().__init__()
        self.space = (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (held[:, :, :length] for held in self.space)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, T, d) of each; returns all."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for held, new in zip(self.space, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        self._show(end)
        return cast(Tensor, self.keys), cast(Tensor, self.values)


@dataclass
class _Laid:
    """Rows side by side, padded on the left.

    Attributes:
        ids: (B, T) tokens, the last of them not read yet.
        mask: (B, T), 0 where there is padding.
        layers: of each the keys and values (B, heads, T - 1, d).
        padded: whether any is.
    """

    rows: list[Row]
    ids: Tensor
    mask: Tensor
    layers: list[Any]
    padded: bool = True

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)


class Batch:
    """The rows in flight on one system.

    Args:
        scored: rows get a `score`.
    """

    def __init__(self, system: "System", scored: bool = False) -> None:
        self.system, self.scored = system, scored
        self.device: torch.device = cast(Any, system.model).get_input_embeddings().weight.device
        self.ends = end_tokens(system)
        self._laid: _Laid | None = None
        self._cache: Cache | None = None
        self._weights: Tensor | None = None

    @property
    def rows(self) -> list[Row]:
        """Those that are not done."""
        return [] if self._laid is None else [row for row in self._laid.rows if not row.done]

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Takes rows in, each of which then has its first token. Rows of one prompt and one routing read it once."""
        if not rows:
            return
        kinds: dict[tuple[Any, ...], int] = {}
        places = [
            kinds.setdefault((*row.prompt, row.weights if row.weights is None else row.weights.tobytes()), len(kinds))
            for row in rows
        ]
        firsts = [rows[places.index(kind)] for kind in range(len(kinds))]
        width = max(len(row.prompt) for row in firsts)
        # A prompt's last token, so that padding adds none that the repetition penalty would not know.
        ids = torch.tensor([[r.prompt[-1]] * (width - len(r.prompt)) + r.prompt for r in firsts], device=self.device)
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in firsts], device=self.device)
        with self._routed(firsts) as decided:
            logits, cache, leads = self._forward(ids, mask, _is_padded(firsts), None)
        if decided:
            asked = [place for place, row in enumerate(firsts) if row.weights is None]
            for row, place in zip(rows, places, strict=True):
                if place in asked:
                    row.weights = decided[0].weights[asked.index(place)]
                    row.similarities = decided[0].similarities[asked.index(place)]
        pick = torch.tensor(places, device=self.device)
        layers = [(layer.keys[pick], layer.values[pick]) for layer in cast(Any, cache).layers]
        joined = _Laid(list(rows), ids[pick], mask[pick], layers)
        for row in rows:
            row.alone &= len(firsts) == 1
        joined.append(self._choose(joined, logits[pick], None if leads is None else leads[pick]))
        self._lay([*([self._laid] if self._laid else []), joined])

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for each row."""
        laid = self._laid
        if laid is None:
            return
        with self.system.routed(self._weights):
            logits, _, leads = self._forward(laid.ids[:, -1:], laid.mask, laid.padded, self._cache)
        for row in laid.rows:
            row.alone &= len(laid.rows) == 1
        laid.append(self._choose(laid, logits, leads))
        self._close_up()

    def leave(self, rows: Collection[Row]) -> None:
        """Drops rows, whether they are done or not."""
        for row in rows:
            row.done = True
        self._close_up()

    def _close_up(self) -> None:
        if self._laid is not None and len(self.rows) <= FULL * len(self._laid.rows):
            self._lay([self._laid])

    def _routed(self, rows: Sequence[Row]) -> AbstractContextManager[list[Routing] | None]:
        """Sets the routing of a pass that reads prompts, or has the pass set it and tell."""
        weights = [row.weights for row in rows]
        if any(own is None for own in weights) and self.system.routes_in_passing:
            return self.system.routing_in_passing([row.prompt for row in rows], weights)
        return self.system.routed(self._routing(rows))

    def _forward(
        self, ids: Tensor, mask: Tensor, padded: bool, cache: Cache | None
    ) -> tuple[Tensor, Cache, Tensor | None]:
        """(the (B, V) float32 logits after the last of `ids`, the cache, (B,) the least lead in any token's gate)."""
        read = ids.shape[1]
        with self.system.token_gates() as gates:
            out = cast(Any, self.system.model).get_decoder()(
                input_ids=ids,
                attention_mask=mask if padded else None,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -read:],
                past_key_values=cache,
                use_cache=True,
            )
        logits = cast(Any, self.system.model).get_output_embeddings()(out.last_hidden_state[:, -1]).float()
        return logits, out.past_key_values, gate_leads(gates, mask[:, -read:]) if gates else None

    def _choose(self, laid: _Laid, logits: Tensor, leads: Tensor | None) -> Tensor:
        """(B,) the next token of each row; one that is done already gets its last again."""
        found = laid.ids[:, -1].clone()
        groups: dict[Decoding, list[int]] = {}
        for place, row in enumerate(laid.rows):
            if not row.done:
                groups.setdefault(row.decoding, []).append(place)
        for decoding, places in groups.items():
            own = torch.tensor(places, device=self.device)
            some = logits if len(places) == len(laid.rows) else logits[own]
            rows = [laid.rows[place] for place in places]
            uniform = torch.tensor([row.uniform[len(row.written)] for row in rows], device=self.device)
            tokens, margins = choose(some, laid.ids[own], uniform, decoding)
            if leads is not None:  # another expert would change a logit by more than rounding does
                margins = margins.where(leads[own] > GATE_TOLERANCE, 0)
            scores = torch.zeros_like(margins)
            if self.scored:
                scores = some.gather(1, tokens[:, None]).squeeze(1) - some.logsumexp(1)
            found[own] = tokens
            for row, token, margin, score in zip(rows, tokens.tolist(), margins.tolist(), scores.tolist(), strict=True):
                row.written.append(token)
                row.margin = min(row.margin, margin)
                row.score += score
                row.done = token in self.ends or len(row.written) == decoding.max_new_tokens
        return found

    def _lay(self, parts: list[_Laid]) -> None:
        """Lays what is not done side by side, without columns that are padding in all rows, with room to go on."""
        kept = [(part, [place for place, row in enumerate(part.rows) if not row.done]) for part in parts]
        kept = [(part, places) for part, places in kept if places]
        if not kept:
            self._laid = self._cache = self._weights = None
            return
        rows = [part.rows[place] for part, places in kept for place in places]
        ids, masks, layers = [], [], []
        for part, places in kept:
            own = torch.tensor(places, device=self.device)
            mask = part.mask[own]
            unused = int(mask.any(dim=0).int().argmax())
            ids.append(part.ids[own, unused:])
            masks.append(mask[:, unused:])
            held = [(layer.keys, layer.values) if isinstance(layer, Space) else layer for layer in part.layers]
            layers.append([tuple((cast(Tensor, states)[:, :, unused:], own) for states in pair) for pair in held])
        width = max(part.shape[1] for part in ids)
        room = max(row.decoding.max_new_tokens - len(row.written) for row in rows)
        spaces = []
        for own in zip(*layers, strict=True):  # of one layer: (keys, values) of each part
            keys, values = (_beside(states, width - 1, room) for states in zip(*own, strict=True))
            spaces.append(Space(keys, values, width - 1))
        self._cache = Cache(layers=spaces)
        filled = [torch.cat([i[:, -1:].expand(-1, width - i.shape[1]), i], dim=1) for i in ids]
        masked = [torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in masks]
        mask = torch.cat(masked)
        self._laid = _Laid(rows, torch.cat(filled), mask, spaces, padded=not bool(mask.all()))
        self._weights = self._routing(rows)

    def _routing(self, rows: Sequence[Row]) -> Tensor | None:
        if rows[0].weights is None:
            return None
        return torch.from_numpy(np.stack([cast(Any, row.weights) for row in rows])).float().to(self.device)


def _beside(parts: Sequence[tuple[Tensor, Tensor]], width: int, room: int) -> Tensor:
    """(B, heads, width + room, d): rows of parts (b, heads, w, d), each after zeros that fill it up to `width`."""
    count, (_, heads, _, size) = sum(len(own) for _, own in parts), parts[0][0].shape
    # Not of zeros: what comes after `width` is written before it is read.
    found = parts[0][0].new_empty(count, heads, width + room, size)
    start = 0
    for part, own in parts:
        place = found[start : start + len(own)]
        place[:, :, : width - part.shape[2]] = 0
        place[:, :, width - part.shape[2] : width] = part if len(own) == len(part) else part.index_select(0, own)
        start += len(own)
    return found


def _is_padded(rows: Sequence[Row]) -> bool:
    return len({len(row.prompt) for row in rows}) > 1


def gate_leads(gates: Sequence[Tensor], mask: Tensor) -> Tensor:
    """(B,) the least difference between two of a token's logits (B, T, N) in any gate, where `mask` (B, T) is true."""
    sorted_logits = torch.stack([gate.sort(dim=-1).values for gate in gates])
    leads = sorted_logits.diff(dim=-1).masked_fill(~mask.bool()[..., None], torch.inf)
    return leads.amin(dim=(0, 2, 3)) if leads.shape[-1] else leads.new_full((len(mask),), torch.inf)


def end_tokens(system: "System") -> set[int]:
    """The tokens that end a definition: the tokenizer's EOS and those of the model's generation config."""
    return ends_of(system.tokenizer, system.model.generation_config)


def ends_of(tokenizer: "PreTrainedTokenizerBase", generation: "GenerationConfig | None") -> set[int]:
    """The same, of a model that is not here."""
    ends = {cast(int, tokenizer.eos_token_id)}
    configured = getattr(generation, "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return ends
