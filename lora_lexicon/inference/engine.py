"""Definitions and losses of a system, in batches. Knows nothing of how the system was composed or of scores.

Routing is decided once per request, from its prompt alone, before anything is decoded. In float32 a
greedy definition is the same alone and in any batch: rounding differs with the batch's shape, so a
request whose choices were ever closer than rounding can reach is decoded again by itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import IGNORED, collate, pad_token_id
from lora_lexicon.domains.routing import heaviest, leads
from lora_lexicon.errors import LexiconError
from lora_lexicon.inference.batch import Batch, Row
from lora_lexicon.inference.sampling import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_lexicon.compose.system import System

Prompt = tuple[str, str]  # term, context
Progress = Callable[[int], object]  # is told how many more rows are done
Observer = Callable[[Tensor], object]  # is shown the (m, V) float32 logits of definition tokens, some at a time
GREEDY = Decoding()
LOGITS_AT_ONCE = 2**24  # how many float32 logits the loss holds at a time (64 MiB)


class Reader(Protocol):
    """What turns tokens into text; every system does."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...


@dataclass(frozen=True)
class Definition:
    """One answer. `domain` is the expert that wrote it: "base" where none did, "mixed" where each token had its own.

    `similarity` (cosine to the domain's centroid) and `margin` (its lead over the next domain) are None
    where no router chose. `tokens` counts what was generated, EOS included. `score` is what it was chosen by and
    `candidates` what it was chosen from, the best first, where `rerank.best_of` chose.
    """

    term: str
    context: str
    text: str
    domain: str
    similarity: float | None
    margin: float | None
    tokens: int
    score: float | None = None
    candidates: "tuple[Candidate, ...]" = ()


@dataclass(frozen=True)
class Candidate:
    """One of the texts that were sampled for a prompt.

    Attributes:
        domain: the expert that wrote it, routing's own where several did.
        count: how many samples read so.
        tokens: generated for them, EOS included.
        whole: it says something, and came to its end in one of them.
        score: what it was chosen by; higher is better.
    """

    text: str
    domain: str
    count: int
    tokens: int
    whole: bool
    score: float


@torch.inference_mode()
def define(
    system: "System",
    prompts: Sequence[Prompt],
    decoding: Decoding = GREEDY,
    *,
    batch_size: int = 64,
    weights: NDArray[np.float32] | None = None,
    progress: Progress | None = None,
) -> list[Definition]:
    """Defines each prompt, in the order given.

    Args:
        weights: over `system.experts`, in place of what the system chooses, (n, N) or (n, L, N).

    Raises:
        LexiconError: an empty term, or weights of another shape.
    """
    if any(not term.strip() for term, _ in prompts):
        raise LexiconError("a term is empty: every request needs a term to define")
    chosen, routing = weights, None
    if weights is not None:
        checked(system, weights, len(prompts))
    elif not system.routes_in_passing:
        chosen, routing = system.choose(prompts)
    rows: dict[Any, Row] = {}  # one for each request, which may be asked more than once
    asked = []
    for i, (term, context) in enumerate(prompts):
        own = None if chosen is None else chosen[i]
        request = (term, context, None if own is None else own.tobytes())
        if request not in rows:
            rows[request] = row_of(system, (term, context), decoding, own)
            rows[request].similarities = None if routing is None else routing.similarities[i]
        asked.append(rows[request])
    times = Counter(map(id, asked))
    told = None if progress is None else lambda done: progress(sum(times[id(row)] for row in done))
    write(system, list(rows.values()), batch_size=batch_size, progress=told)
    return [definition(system, prompt, row) for prompt, row in zip(prompts, asked, strict=True)]


def row_of(
    system: "System", prompt: Prompt, decoding: Decoding, weights: NDArray[np.float32] | None = None, sample: int = 0
) -> Row:
    """A row to be written for a prompt: its sample of that number, by experts of weights (N,) or (L, N)."""
    return Row(system.encoder.prompt(*prompt), weights, decoding.uniforms(*prompt, sample), decoding)


def write(
    system: "System",
    rows: Sequence[Row],
    *,
    batch_size: int = 64,
    scored: bool = False,
    progress: Callable[[Sequence[Row]], object] | None = None,
) -> None:
    """Decodes rows to their ends, `batch_size` at a time: others take the places of those that are done.

    Where experts come on demand, one expert's rows come together, those of experts in memory first.

    Args:
        scored: they get a `score`.
        progress: is told which rows have ended.
    """
    waiting = sorted(rows, key=lambda row: (-len(row.prompt), row.prompt))
    if system.residents is not None:
        waiting.sort(key=lambda row: _turn(system, row.weights))
    batch, start = Batch(system, scored), 0
    while start < len(waiting) or batch.rows:
        before = batch.rows
        free = batch_size - len(before)
        joining: list[Row] = []
        if start < len(waiting) and (free >= batch_size / 4 or not before):  # to join costs a copy of the cache
            joining = _admitted(system, waiting[start : start + free], before)
            start += len(joining)
        if joining:
            batch.join(joining)
            before = [*before, *joining]
        else:
            batch.step()
        if progress is not None:
            progress([row for row in before if row.done])
    for row in reversed(waiting):  # the last experts are in memory
        settle(system, row, scored)


def experts_of(weights: "NDArray[np.float32] | None") -> frozenset[int]:
    """The experts that serve a row of weights (N,) or (L, N)."""
    return frozenset() if weights is None else frozenset(np.nonzero(weights)[-1].tolist())


def _turn(system: "System", weights: "NDArray[np.float32] | None") -> tuple[bool, list[int]]:
    """Rows in this order need each expert loaded once."""
    experts = experts_of(weights)
    return system.residents is not None and not system.residents.has(experts), sorted(experts)


def _admitted(system: "System", waiting: list[Row], running: Sequence[Row]) -> list[Row]:
    """The first of the waiting rows, as many as have experts that there is room for beside those of running ones."""
    if system.residents is None:
        return waiting
    held = frozenset().union(*(experts_of(row.weights) for row in running))
    for count, row in enumerate(waiting):
        held |= experts_of(row.weights)
        if not system.residents.fit(held) and (count or running):  # alone it is told how much it needs
            return waiting[:count]
    return waiting


def settle(system: "System", row: Row, scored: bool = False) -> bool:
    """Decodes a row again by itself where its neighbours' rounding could have turned a choice; whether it changed."""
    if row.alone or row.margin >= row.decoding.tolerance or not _is_float32(system):
        return False
    batch, again = Batch(system, scored), row.again()
    batch.join([again])
    while batch.rows:
        batch.step()
    changed = row.written != again.written
    row.written, row.score, row.margin, row.alone = again.written, again.score, again.margin, True
    return changed


def definition(system: "System", prompt: Prompt, row: Row) -> Definition:
    """What a row says, which has joined a batch."""
    similarity, margin = certainty(row)
    return Definition(
        term=prompt[0],
        context=prompt[1],
        text=text_of(system, row.written),
        domain=domain_of(system, row),
        similarity=similarity,
        margin=margin,
        tokens=len(row.written),
    )


def certainty(row: Row) -> tuple[float | None, float | None]:
    """(the similarity to the chosen domain's centroid, its lead over the next), None where no router chose."""
    if row.similarities is None:
        return None, None
    return float(row.similarities.max()), float(leads(row.similarities[None])[0])


def domain_of(system: "System", row: Row) -> str:
    """Who writes a row that has joined a batch; see `domains_of`."""
    return domains_of(system, None if row.weights is None else row.weights[None], 1)[0]


def text_of(system: Reader, tokens: list[int]) -> str:
    """The words of generated tokens."""
    return str(system.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@torch.inference_mode()
def losses(
    system: "System",
    entries: Sequence[Entry],
    *,
    batch_size: int = 64,
    weights: NDArray[np.float32] | None = None,
    progress: Progress | None = None,
    observe: Observer | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per entry the negative log-likelihood (nats) summed over its definition's tokens and EOS, and their number.

    The head runs on those tokens alone. Routing sees the prompt, never the definition.

    Args:
        observe: sees the logits in an order that entries, tokenizer and `batch_size` alone decide.
    """
    prompts = [(entry.term, entry.context) for entry in entries]
    chosen = system.choose(prompts)[0] if weights is None else checked(system, weights, len(entries))
    encoded = [system.encoder.row(entry.term, entry.context, entry.definition) for entry in entries]
    rows: list[dict[str, Any]] = [{"input_ids": row.ids, "prompt_length": row.prompt_length} for row in encoded]
    total, count = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    pad, device = pad_token_id(system.tokenizer), _device(system)
    lengths = [len(row["input_ids"]) for row in rows]
    for batch in _batches(system, lengths, chosen, batch_size, by_expert=observe is None):
        tensors = collate([rows[i] for i in batch], pad)
        with system.routed(_of(chosen, batch, device)):
            # Padding is on the right, where causal attention never looks: no mask is needed.
            states = _decoder(system)(input_ids=tensors["input_ids"].to(device), use_cache=False).last_hidden_state
        labels = tensors["labels"][:, 1:]
        row, position = (labels != IGNORED).nonzero(as_tuple=True)
        nll = _nll(system, states[row.to(device), position.to(device)], labels[row, position].to(device), observe)
        np.add.at(total, np.array(batch)[row.numpy()], nll.cpu().double().numpy())
        np.add.at(count, np.array(batch)[row.numpy()], 1)
        if progress is not None:
            progress(len(batch))
    return total, count


def domains_of(system: "System", weights: NDArray[np.float32] | None, rows: int) -> list[str]:
    """The expert with the largest weight in each row, "base" where none has any or the system has no experts.

    A system that is one expert answers for all rows under its own name; "mixed" stands for experts chosen by token.
    """
    if weights is None:
        return [{"expert": system.name, "moe": "mixed"}.get(system.kind, "base")] * rows
    return [system.experts[i] if i >= 0 else "base" for i in heaviest(weights)]


def _nll(system: "System", states: Tensor, labels: Tensor, observe: Observer | None) -> Tensor:
    """(m,) negative log-likelihood of m labels given the m states before them."""
    head = _head(system)
    parts = max(1, LOGITS_AT_ONCE // int(head.weight.shape[0]))
    found = []
    for some, wanted in zip(states.split(parts), labels.split(parts), strict=True):
        logits = head(some).float()
        if observe is not None:
            observe(logits)
        found.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(found)


def _batches(
    system: "System", lengths: Sequence[int], weights: NDArray[np.float32] | None, size: int, by_expert: bool
) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, sorted by length so that little is padded; the longest first.

    Where experts come on demand, a batch holds rows whose experts there is room for at once.

    Args:
        by_expert: then one expert's rows come together, too.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if system.residents is None or weights is None:
        for start in range(0, len(order), size):
            yield order[start : start + size]
        return
    if by_expert:
        order.sort(key=lambda i: _turn(system, weights[i]))
    batch: list[int] = []
    held: frozenset[int] = frozenset()
    for i in order:
        held |= experts_of(weights[i])
        if batch and (len(batch) == size or not system.residents.fit(held)):
            yield batch
            batch, held = [], experts_of(weights[i])
        batch.append(i)
    if batch:
        yield batch


def checked(system: "System", weights: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """Routing weights as they were given, for so many prompts; LexiconError where they have another shape."""
    if weights.ndim not in (2, 3) or (weights.shape[0], weights.shape[-1]) != (rows, len(system.experts)):
        raise LexiconError(
            f"routing weights have shape {weights.shape}; {system.name!r} needs ({rows}, {len(system.experts)}):"
            " one row a prompt, one column an expert"
        )
    return weights


def _of(weights: NDArray[np.float32] | None, batch: list[int], device: torch.device | None = None) -> Tensor | None:
    return None if weights is None else torch.from_numpy(np.ascontiguousarray(weights[batch])).float().to(device)


def _decoder(system: "System") -> Any:
    return system.model.get_decoder()


def _head(system: "System") -> Any:
    return system.model.get_output_embeddings()


def _device(system: "System") -> torch.device:
    return _decoder(system).get_input_embeddings().weight.device


def _is_float32(system: "System") -> bool:
    return _decoder(system).get_input_embeddings().weight.dtype == torch.float32
