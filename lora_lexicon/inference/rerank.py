"""Best of N: candidates are sampled for each prompt, and one is chosen. Knows neither references nor how to score text.

Candidate k of a request is the same whatever N is, alone and in any batch, and the candidates of a prompt share one
prefill. In float32 so is the choice: candidates whose scores are closer than rounding can reach are scored again, each
by itself. Of equal scores the text that sorts first wins.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.overlap import overlap, words
from lora_lexicon.errors import LexiconError
from lora_lexicon.inference.batch import Row, end_tokens
from lora_lexicon.inference.engine import (
    Candidate,
    Definition,
    Progress,
    Prompt,
    checked,
    definition,
    domains_of,
    losses,
    row_of,
    text_of,
    write,
)
from lora_lexicon.inference.sampling import Decoding

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System

By = Literal["likelihood", "mbr", "experts", "reward", "reference"]
WAYS: tuple[By, ...] = get_args(By)
Pair = tuple[int, str]  # a prompt's number, one of its candidates' text
Rate = Callable[[Sequence[Pair]], Sequence[float]]  # a score of each, higher is better
CLOSE = 1e-4  # scores closer than this may change places with the batch's shape
PROMPTS_AT_ONCE = 256  # prompts whose candidates are held at a time


def best_of(
    system: "System",
    prompts: Sequence[Prompt],
    decoding: Decoding,
    n: int,
    by: By,
    *,
    rate: Rate | None = None,
    batch_size: int = 64,
    weights: NDArray[np.float32] | None = None,
    progress: Progress | None = None,
) -> list[Definition]:
    """Defines each prompt by the best of n sampled candidates, in the order given.

    Args:
        by: `likelihood`: the mean log-probability of a candidate's tokens, EOS included (of candidates that say
            nothing or were cut off only where there are no others); `mbr`: its agreement with all samples (see
            `agreement`); `experts`: each expert writes n candidates too, and the routed system's mean log-probability
            decides; `reward` and `reference`: as `rate` says.
        rate: scores candidates (see `inference.reward`), the same ones alone and among others but for rounding.
        weights: as in `engine.define`.

    Raises:
        LexiconError: an empty term, greedy decoding, weights of another shape, `rate` missing or not wanted, or
            `experts` of a system without any to choose.
    """
    _check(system, prompts, decoding, n, by, rate)
    if not prompts:
        return []
    chosen, routing = system.choose(prompts) if weights is None else (checked(system, weights, len(prompts)), None)
    if by == "experts" and chosen is None:
        raise LexiconError(f"{system.name!r} chooses experts for each token: none can write by itself; choose by mbr")
    names = domains_of(system, chosen, len(prompts))
    found = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        numbers = range(start, min(start + PROMPTS_AT_ONCE, len(prompts)))
        own = {i: None if chosen is None else chosen[i] for i in numbers}
        rows = {i: _asked(system, prompts[i], names[i], own[i], decoding, n, by) for i in numbers}
        write_all(system, [[row for _, row in rows[i]] for i in numbers], batch_size=batch_size, progress=progress)
        merged = {i: _merged(system, rows[i]) for i in numbers}
        scored = _scored(system, prompts, own, merged, by, rate, batch_size)
        for i in numbers:
            ranked = rank(scored[i], by)
            first = rows[i][0][1]
            first.similarities = None if routing is None else routing.similarities[i]
            best, tokens = ranked[0], sum(candidate.tokens for candidate in ranked)
            answer = definition(system, prompts[i], first)
            answer = replace(answer, text=best.text, domain=best.domain, tokens=tokens, score=best.score)
            found.append(replace(answer, candidates=tuple(ranked)))
    return found


def _asked(
    system: "System", prompt: Prompt, name: str, weights: NDArray[np.float32] | None, decoding: Decoding, n: int, by: By
) -> list[tuple[str, Row]]:
    """The rows to be written for a prompt, each with the name of the expert that does: routing's choice first."""
    found = [(name, row) for row in samples(system, prompt, weights, decoding, n)]
    for expert, other in _others(system, weights) if by == "experts" else ():
        found += [(expert, row) for row in samples(system, prompt, other, decoding, n)]
    return found


def samples(
    system: "System", prompt: Prompt, weights: NDArray[np.float32] | None, decoding: Decoding, n: int
) -> list[Row]:
    """n rows to be written for a prompt, each from a stream of its own."""
    return [row_of(system, prompt, decoding, weights, sample) for sample in range(n)]


def write_all(
    system: "System", rows: Sequence[Sequence[Row]], *, batch_size: int = 64, progress: Progress | None = None
) -> None:
    """Writes the rows of several prompts, scored; `progress` is told of prompts all of whose rows have ended."""
    of = {id(row): place for place, own in enumerate(rows) for row in own}
    left = [len(own) for own in rows]

    def told(done: Iterable[Row]) -> None:
        for place in (of[id(row)] for row in done):
            left[place] -= 1
            if left[place] == 0 and progress is not None:
                progress(1)

    write(system, [row for own in rows for row in own], batch_size=batch_size, scored=True, progress=told)


def rank(candidates: Sequence[Candidate], by: By) -> list[Candidate]:
    """The candidates, the best first; their order does not matter."""

    return sorted(candidates, key=lambda c: (_unfit(c, by), -c.score, c.text))


def _unfit(candidate: Candidate, by: By) -> bool:
    """Likely, but no definition: silence, or a loop that only the limit of tokens ended."""
    return by in ("likelihood", "experts") and not candidate.whole


def agreement(counts: Mapping[str, int]) -> dict[str, float]:
    """The mean utility of each text against all samples, from 0 to 100; `counts` says how often each was sampled.

    Minimum Bayes risk (Kumar and Byrne, 2004) with samples for the distribution (Eikema and Aziz, 2020). The utility
    is `overlap`: symmetric, and nothing for a text without words.
    """
    total, read = sum(counts.values()), {text: words(text) for text in counts}
    return {
        text: math.fsum(count * overlap(read[text], read[other]) for other, count in counts.items()) / total
        for text in counts
    }


def _check(system: "System", prompts: Sequence[Prompt], decoding: Decoding, n: int, by: By, rate: Rate | None) -> None:
    if any(not term.strip() for term, _ in prompts):
        raise LexiconError("a term is empty: every request needs a term to define")
    if by not in WAYS:
        raise LexiconError(f"best of N by {by!r} is not known: choose by {', '.join(WAYS)}")
    if n < 1:
        raise LexiconError(f"best of {n}: it must be of 1 or more")
    if decoding.method != "sample":
        raise LexiconError(f"best of {n}: candidates are sampled, and decoding is {decoding.method}")
    if (rate is not None) != (by in ("reward", "reference")):
        raise LexiconError(f"best of {n} by {by}: " + ("it takes no scores" if rate else "it needs something to rate"))
    if by == "experts" and not system.experts:
        raise LexiconError(f"{system.name!r} has no experts to choose among: give a pack, or choose by mbr")


def _others(system: "System", weights: NDArray[np.float32] | None) -> list[tuple[str, NDArray[np.float32]]]:
    """Each expert alone, with its weights (N,) or (L, N), but for one that routing has chosen alone."""
    assert weights is not None
    found = []
    for n, name in enumerate(system.experts):
        alone = np.zeros_like(weights)
        alone[..., n] = 1
        if not np.array_equal(alone, weights):
            found.append((name, alone))
    return found


def _merged(system: "System", rows: Sequence[tuple[str, Row]]) -> list[tuple[Candidate, Row]]:
    """Rows of one text as one candidate, scored by its likeliest row, which stands beside it."""
    by_text: dict[str, list[tuple[str, Row]]] = {}
    for name, row in rows:
        by_text.setdefault(text_of(system, row.written), []).append((name, row))
    found, ends = [], end_tokens(system)
    for text, own in by_text.items():
        best = max((row for _, row in own), key=_mean)
        whole = bool(text) and any(row.written[-1] in ends for _, row in own)
        tokens = sum(len(row.written) for _, row in own)
        found.append((Candidate(text, own[0][0], len(own), tokens, whole, _mean(best)), best))
    return found


def _mean(row: Row) -> float:
    return row.score / len(row.written)


def _scored(
    system: "System",
    prompts: Sequence[Prompt],
    weights: Mapping[int, NDArray[np.float32] | None],
    merged: Mapping[int, list[tuple[Candidate, Row]]],
    by: By,
    rate: Rate | None,
    batch_size: int,
) -> dict[int, list[Candidate]]:
    """Each prompt's candidates with the scores that they are chosen by."""
    if by == "mbr":
        found = {}
        for i, own in merged.items():
            agreed = agreement(Counter({candidate.text: candidate.count for candidate, _ in own}))
            found[i] = [replace(candidate, score=agreed[candidate.text]) for candidate, _ in own]
        return found

    def likely(pairs: Sequence[Pair]) -> list[float]:
        entries = [Entry(*prompts[i], text, "") for i, text in pairs]
        stacked = None if weights[pairs[0][0]] is None else np.stack([np.asarray(weights[i]) for i, _ in pairs])
        total, tokens = losses(system, entries, batch_size=batch_size, weights=stacked)
        return [float(score) for score in -total / tokens]

    found = {i: [candidate for candidate, _ in own] for i, own in merged.items()}
    score = likely if by == "experts" else rate
    if score is not None:
        pairs = [(i, candidate.text) for i, own in found.items() for candidate in own]
        scores = iter(score(pairs)) if pairs else iter(())
        found = {i: [replace(candidate, score=float(next(scores))) for candidate in own] for i, own in found.items()}
    written = {(i, candidate.text): row for i, own in merged.items() for candidate, row in own}

    def alone(pair: Pair) -> float:
        if score is not None:
            return float(score([pair])[0])
        row = written[pair].again()
        write(system, [row], scored=True)
        return _mean(row)

    return {i: _settled(own, by, lambda text, i=i: alone((i, text))) for i, own in found.items()}


def _settled(candidates: list[Candidate], by: By, alone: Callable[[str], float]) -> list[Candidate]:
    """The candidates, those that rounding could have made the best scored again by themselves."""
    best = rank(candidates, by)[0]
    rivals = [c for c in candidates if _unfit(c, by) == _unfit(best, by)]
    close = {c.text for c in rivals if best.score - c.score < CLOSE}
    if len(close) < 2:
        return candidates
    return [replace(c, score=alone(c.text)) if c.text in close else c for c in candidates]
