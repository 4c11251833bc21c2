"""Evaluates one system on held-out entries, and compares two evaluations. Knows nothing of files' layout or tables."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.entry import Entry, headword, spread
from lora_lexicon.domains.embed import FIT_BATCH, Prompt
from lora_lexicon.domains.map import router_plane
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.bootstrap import grouped, interval_of, numbered, paired_bootstrap, resampled
from lora_lexicon.evaluation.metrics import BLEU_SIGNATURE, ROUGE_L_SIGNATURE, bleu, rouge_l
from lora_lexicon.evaluation.registry import METRICS
from lora_lexicon.evaluation.scores import Run, difference, figure, score
from lora_lexicon.inference.engine import GREEDY, Observer, define, domains_of, losses
from lora_lexicon.inference.rerank import By, Pair, Rate, best_of
from lora_lexicon.inference.sampling import Decoding

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System
    from lora_lexicon.evaluation.encoded import Encoder
    from lora_lexicon.inference.reward import Reward

# Each row has one reference, its own definition; other senses of its term are none.
SIGNATURES = {
    "loss": "nats-per-definition-token|eos:counted|v1",
    "bleu": f"{BLEU_SIGNATURE}|protocol:one-to-one|combine:pooled|refs:1|zeros:kept",
    "rouge_l": f"{ROUGE_L_SIGNATURE}|protocol:one-to-one|refs:1|zeros:kept",
}
Metric = Literal["loss", "bleu", "rouge_l"]


@dataclass(frozen=True)
class Evaluation:
    """One system on n entries, of which the first m were defined; what was generated is None where none was.

    Attributes:
        nll, tokens: (n,) nats summed over a row's definition tokens and EOS, and their number.
        domains: the expert that served each row, "base" where none did; of a defined row, that wrote its definition.
        bleu, rouge_l: (m,) from 0 to 100.
        tokens_per_second: generated tokens, those of all candidates, over the time of routing and decoding.
        base, base_fingerprint: the base that the system is, lies on or was made of; "" where that is not known.
        places: (n, 2) where prompts lie in the plane of the router's domains, NaN for those that were not placed; None
            where none was.
    """

    name: str
    entries: Sequence[Entry]
    trained_parameters: int
    ship_bytes: int
    memory_bytes: int
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    domains: list[str]
    predictions: list[str] | None
    bleu: NDArray[np.float64] | None
    rouge_l: NDArray[np.float64] | None
    tokens_per_second: float | None
    base: str = ""
    base_fingerprint: str = ""
    places: NDArray[np.float32] | None = None

    @property
    def loss(self) -> float:
        """Nats per definition token, EOS included."""
        return float(self.nll.sum() / self.tokens.sum())

    def summary(self) -> dict[str, Any]:
        """One row of the results table; megabytes are 10^6 bytes."""
        return {
            "name": self.name,
            "trained_parameters": self.trained_parameters,
            "ship_megabytes": self.ship_bytes / 1e6,
            "memory_megabytes": self.memory_bytes / 1e6,
            "loss": self.loss,
            "perplexity": math.exp(self.loss),
            "bleu": None if self.bleu is None else float(self.bleu.mean()),
            "rouge_l": None if self.rouge_l is None else float(self.rouge_l.mean()),
            "tokens_per_second": self.tokens_per_second,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
        }


def evaluate(
    system: "System",
    entries: Sequence[Entry],
    *,
    name: str | None = None,
    decoding: Decoding = GREEDY,
    weights: NDArray[np.float32] | None = None,
    defined: int | None = None,
    best: int = 1,
    by: By = "mbr",
    reward: "Reward | None" = None,
    batch_size: int = 64,
    placed: int = 0,
    progress: Callable[[int], object] | None = None,
    observe: Observer | None = None,
) -> Evaluation:
    """Loss on every entry, and definitions with BLEU and ROUGE-L.

    Args:
        name: of the row in the table; the system's own unless given.
        weights: (n, N) in place of the router's decision (see `random_weights`).
        defined: how many entries, from the first, are defined; None: all, 0: none.
        best: each definition is the best of so many candidates, chosen `by` (see `inference.rerank`): above 1, by
            `reward` where that is asked for, or by the BLEU with the reference, which no one has outside evaluation.
        placed: how many entries, spread over them all, get a place on the map of domains; none of a system that the
            router does not route.
        progress: is told how many more rows are done, n for the loss and `defined` for the definitions.
        observe: sees the logits of all definition tokens (see `inference.engine.losses`).

    Raises:
        DataError: there are no entries.
    """
    if not entries:
        raise DataError("nothing to evaluate: the split holds no entries")
    prompts = [(entry.term, entry.context) for entry in entries]
    started = time.perf_counter()
    chosen = system.choose(prompts)[0] if weights is None else weights
    routing_seconds = time.perf_counter() - started
    nll, tokens = losses(system, entries, batch_size=batch_size, weights=chosen, progress=progress, observe=observe)
    predictions = bleus = rouges = speed = None
    domains = domains_of(system, chosen, len(entries))
    count = len(entries) if defined is None else min(defined, len(entries))
    if count:
        started = time.perf_counter()
        first = None if chosen is None else chosen[:count]
        if best > 1:
            rate = _reference(entries) if by == "reference" else reward and reward.of(prompts)
            written = best_of(system, prompts[:count], decoding, best, by, rate=rate, batch_size=batch_size,
                              weights=first, progress=progress)  # fmt: skip
        else:
            written = define(system, prompts[:count], decoding, batch_size=batch_size, weights=first, progress=progress)
        seconds = time.perf_counter() - started + routing_seconds * count / len(entries)
        speed = sum(d.tokens for d in written) / seconds
        predictions = [definition.text for definition in written]
        domains[:count] = [definition.domain for definition in written]
        pairs = [(text, [entry.definition]) for text, entry in zip(predictions, entries[:count], strict=True)]
        bleus = np.array([bleu(*pair) for pair in pairs])
        rouges = np.array([rouge_l(*pair) for pair in pairs])
    return Evaluation(
        name=name or system.name,
        entries=entries,
        trained_parameters=system.trained_parameters,
        ship_bytes=system.ship_bytes,
        memory_bytes=system.memory_bytes,
        nll=nll,
        tokens=tokens,
        domains=domains,
        predictions=predictions,
        bleu=bleus,
        rouge_l=rouges,
        tokens_per_second=speed,
        base=system.base,
        base_fingerprint=system.base_fingerprint,
        places=_places(system, prompts, placed) if weights is None else None,
    )


def _places(system: "System", prompts: Sequence[Prompt], count: int) -> NDArray[np.float32] | None:
    """(n, 2) of the Evaluation's `places`, for so many of n prompts."""
    if system.router is None or system.routing_level != "domain" or not count:
        return None
    chosen = spread(range(len(prompts)), count)
    vectors = system.embed([prompts[i] for i in chosen], FIT_BATCH)
    if vectors is None:
        return None
    places = np.full((len(prompts), 2), np.nan, dtype=np.float32)
    places[chosen] = router_plane(system.router).points(system.router.prepare(vectors))
    return places


def _reference(entries: Sequence[Entry]) -> Rate:
    """The oracle verifier of the paper (section 4.3): a candidate's BLEU with the definition that is looked for."""

    def rate(pairs: Sequence[Pair]) -> list[float]:
        return [bleu(text, [entries[i].definition]) for i, text in pairs]

    return rate


def compare(a: Evaluation, b: Evaluation, metric: Metric = "loss", *, seed: int = 42) -> dict[str, Any]:
    """The difference a - b of one metric with its 95 % interval and p, resampling headwords.

    Raises:
        DataError: the two did not see the same entries, or have no such score.
    """
    if list(a.entries) != list(b.entries):
        raise DataError(f"{a.name!r} and {b.name!r} were not evaluated on the same entries")
    groups = [headword(entry.term) for entry in a.entries]
    if metric == "loss":
        if not np.array_equal(a.tokens, b.tokens):
            raise DataError(
                f"{a.name!r} and {b.name!r} cut definitions into other tokens: compare BLEU instead of loss"
            )
        found = paired_bootstrap(a.nll, b.nll, weights=a.tokens, groups=groups, seed=seed)
    else:
        left, right = getattr(a, metric), getattr(b, metric)
        if left is None or right is None:
            raise DataError(f"{metric} of {a.name!r} and {b.name!r} cannot be compared: one generated nothing")
        if len(left) != len(right):
            raise DataError(f"{a.name!r} and {b.name!r} did not define as many entries")
        found = paired_bootstrap(left, right, groups=groups[: len(left)], seed=seed)
    return {
        "a": a.name,
        "b": b.name,
        "metric": metric,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
    }


def intervals(evaluation: Evaluation, *, samples: int = 1000, seed: int = 42) -> dict[Metric, tuple[float, float]]:
    """The 95 % intervals of loss, BLEU and ROUGE-L, by a bootstrap over headwords; of what was measured."""
    groups = [headword(entry.term) for entry in evaluation.entries]
    rows: dict[Metric, tuple[NDArray[np.float64] | None, NDArray[np.generic] | None]] = {
        "loss": (evaluation.nll, evaluation.tokens),
        "bleu": (evaluation.bleu, None),
        "rouge_l": (evaluation.rouge_l, None),
    }
    found = {}
    for metric, (values, weights) in rows.items():
        if values is not None:
            per_row = np.stack([values, weights if weights is not None else np.ones(len(values))], axis=1, dtype=float)
            sums = grouped(per_row, numbered(groups[: len(values)]))
            if len(sums) < 2:  # of one headword there is nothing to draw
                continue
            drawn = resampled(sums, samples, seed)
            each = interval_of(0.0, drawn[:, 0] / drawn[:, 1], len(sums))
            found[metric] = (each.low, each.high)
    return found


def further_scores(
    evaluations: Sequence[Evaluation], names: Sequence[str], encoder: "Encoder | None" = None, *, seed: int = 42
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Further metrics (see `registry.METRICS`) of the defined entries, each against its own definition.

    Returns:
        (figures {system: {metric: figure}}, differences from the first, as `compare` gives them: of the metrics that
        have an interval, and are not compared as BLEU and ROUGE-L already).

    Raises:
        DataError: nothing was generated, or as `scores.score`.
    """
    runs: list[Run] = []
    for evaluation in evaluations:
        if not evaluation.predictions:
            raise DataError(f"{evaluation.name!r} generated nothing that could be scored")
        entries = evaluation.entries[: len(evaluation.predictions)]
        runs.append(score(evaluation.predictions, [(e.definition,) for e in entries], names, encoder=encoder))
    first = evaluations[0]
    member = numbered([headword(entry.term) for entry in first.entries[: len(runs[0].pairs)]])
    figures = {
        evaluation.name: {name: figure([run], name, member, seed=seed) for name in names}
        for evaluation, run in zip(evaluations, runs, strict=True)
    }
    compared = []
    for name in names:
        if name in ("bleu", "rouge-l") or not METRICS[name].by_row:
            continue
        for other, run in zip(evaluations[1:], runs[1:], strict=True):
            found = difference([run], [runs[0]], name, member, seed=seed)
            if found is not None:
                low, high = found["interval"]
                ends = {"low": low, "high": high, "p": found["p_bootstrap"]}
                compared.append(
                    {"a": other.name, "b": first.name, "metric": name, "difference": found["difference"], **ends}
                )
    return figures, compared


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """The defined entries in order, as `data.predictions` reads them; `domain` is the expert that answered."""
    assert evaluation.predictions is not None, "an evaluation without generation has no predictions"
    with path.open("w", encoding="utf-8") as file:
        # `predictions` may be the shorter one.
        for entry, text, domain in zip(evaluation.entries, evaluation.predictions, evaluation.domains, strict=False):
            file.write(json.dumps(prediction_row(entry, text, domain), ensure_ascii=False) + "\n")


def prediction_row(entry: Entry, text: str, domain: str) -> dict[str, Any]:
    """A row of a predictions file."""
    return {
        "term": entry.term,
        "context": entry.context,
        "prediction": text,
        "references": [entry.definition],
        "source": entry.source,
        "domain": domain,
    }


def random_weights(rows: int, experts: int, seed: int = 42) -> NDArray[np.float32]:
    """(rows, experts) one expert a row, uniformly at random: what routing must beat."""
    weights = np.zeros((rows, experts), dtype=np.float32)
    weights[np.arange(rows), np.random.default_rng(seed).integers(0, experts, rows)] = 1
    return weights
