"""Definitions and losses of a system, in batches. Knows nothing of how the system was composed or of scores.

Routing is decided once per request, from its prompt alone, before anything is decoded. In float32 a
greedy definition is the same alone and in any batch: rounding differs with the batch's shape, so a
request whose choices were ever closer than rounding can reach is decoded again by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import IGNORED, collate, pad_token_id
from lora_lexicon.domains.routing import heaviest
from lora_lexicon.errors import LexiconError
from lora_lexicon.inference.sampling import Decoding, choose

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System

Prompt = tuple[str, str]  # term, context
Progress = Callable[[int], object]  # is told how many more rows are done
Observer = Callable[[Tensor], object]  # is shown the (m, V) float32 logits of definition tokens, some at a time
GREEDY = Decoding()
GATE_TOLERANCE = 1e-4  # two logits of a gate closer than this may change places with the batch's shape
LOGITS_AT_ONCE = 2**24  # how many float32 logits the loss holds at a time (64 MiB)


@dataclass(frozen=True)
class Definition:
    """One answer. `domain` is the expert that wrote it: "base" where none did, "mixed" where each token had its own.

    `similarity` (cosine to the domain's centroid) and `margin` (its lead over the next domain) are None
    where no router chose. `tokens` counts what was generated, EOS included.
    """

    term: str
    context: str
    text: str
    domain: str
    similarity: float | None
    margin: float | None
    tokens: int


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
        weights: over `system.experts`, in place of what `system.choose` decides, and of the same shape.

    Raises:
        LexiconError: an empty term, or weights of another shape.
    """
    if any(not term.strip() for term, _ in prompts):
        raise LexiconError("a term is empty: every request needs a term to define")
    chosen, routing = system.choose(prompts) if weights is None else (_checked(system, weights, len(prompts)), None)
    rows = [system.encoder.prompt(term, context) for term, context in prompts]
    written: list[list[int]] = [[] for _ in rows]
    for batch in _batches([len(row) for row in rows], batch_size):
        requests = [prompts[i] for i in batch]
        decoded, margins = _decode(system, [rows[i] for i in batch], requests, _of(chosen, batch), decoding)
        for i, tokens, margin in zip(batch, decoded, margins, strict=True):
            if margin < decoding.tolerance and len(batch) > 1 and _is_float32(system):
                tokens = _decode(system, [rows[i]], [prompts[i]], _of(chosen, [i]), decoding)[0][0]
            written[i] = tokens
        if progress is not None:
            progress(len(batch))
    names = domains_of(system, chosen, len(prompts))
    decode = system.tokenizer.decode
    return [
        Definition(
            term=term,
            context=context,
            text=str(decode(written[i], skip_special_tokens=True)).strip(),
            domain=names[i],
            similarity=None if routing is None else float(routing.similarities[i].max()),
            margin=None if routing is None else float(routing.margin[i]),
            tokens=len(written[i]),
        )
        for i, (term, context) in enumerate(prompts)
    ]


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
    chosen = system.choose(prompts)[0] if weights is None else _checked(system, weights, len(entries))
    encoded = [system.encoder.row(entry.term, entry.context, entry.definition) for entry in entries]
    rows: list[dict[str, Any]] = [{"input_ids": row.ids, "prompt_length": row.prompt_length} for row in encoded]
    total, count = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    pad, device = pad_token_id(system.tokenizer), _device(system)
    for batch in _batches([len(row["input_ids"]) for row in rows], batch_size):
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


def _decode(
    system: "System", rows: list[list[int]], requests: list[Prompt], weights: Tensor | None, decoding: Decoding
) -> tuple[list[list[int]], list[float]]:
    """Generated tokens (EOS included) and the smallest margin of each row's choices.

    Rows are padded on the left. Finished rows leave the batch, so that a long one does not hold them.
    """
    device, ends = _device(system), _end_tokens(system)
    width = max(len(row) for row in rows)
    # A prompt ends in EOS, so as padding it adds no token that the repetition penalty would not know.
    ids = torch.tensor([[row[-1]] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    padded = not bool(mask.all())
    uniform = torch.tensor(np.stack([decoding.uniforms(*request) for request in requests]), device=device)
    alive = torch.arange(len(rows), device=device)
    written: list[list[int]] = [[] for _ in rows]
    margins = np.full(len(rows), np.inf)
    weights = None if weights is None else weights.to(device)
    fed, cache = ids, None
    with ExitStack() as routing:  # set anew only when rows leave: layers prepare for it
        routing.enter_context(system.routed(weights))
        for step in range(decoding.max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            with system.token_gates() as gates:
                out = _decoder(system)(
                    input_ids=fed,
                    attention_mask=mask if padded else None,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
            cache = out.past_key_values
            logits = _head(system)(out.last_hidden_state[:, -1]).float()
            tokens, margin = choose(logits, ids, uniform[alive, step], decoding)
            if gates:  # another expert would change a logit by more than rounding does
                margin = margin.where(gate_leads(gates, mask[:, -fed.shape[1] :]) > GATE_TOLERANCE, 0)
            for i, token, lead in zip(alive.tolist(), tokens.tolist(), margin.tolist(), strict=True):
                written[i].append(token)
                margins[i] = min(margins[i], lead)
            going = (~torch.isin(tokens, ends)).nonzero().squeeze(1)
            if not len(going):
                break
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            fed = tokens[:, None]
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                ids, mask, fed, alive = ids[going], mask[going], fed[going], alive[going]
                weights = None if weights is None else weights[going]
                routing.close()
                routing.enter_context(system.routed(weights))
    return written, margins.tolist()


def gate_leads(gates: Sequence[Tensor], mask: Tensor) -> Tensor:
    """(B,) the least difference between two of a token's logits (B, T, N) in any gate, where `mask` (B, T) is true."""
    sorted_logits = torch.stack([gate.sort(dim=-1).values for gate in gates])
    leads = sorted_logits.diff(dim=-1).masked_fill(~mask.bool()[..., None], torch.inf)
    return leads.amin(dim=(0, 2, 3)) if leads.shape[-1] else leads.new_full((len(mask),), torch.inf)


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


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, sorted by length so that little is padded; the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _checked(system: "System", weights: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
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


def _end_tokens(system: "System") -> Tensor:
    """The tokens that end a definition: the tokenizer's EOS and those of the model's generation config."""
    ends = {cast(int, system.tokenizer.eos_token_id)}
    configured = getattr(system.model.generation_config, "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return torch.tensor(sorted(ends), device=_device(system))
