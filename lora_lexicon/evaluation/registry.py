"""Every metric by name: what it computes of a row, how rows become a figure, and what signs it. Knows no rows itself.

A metric is either sums over rows (`Metric.row`), from which the figure, its interval and its tests follow, or reads
all rows at once (`Metric.whole`) and then has no interval.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.errors import DataError, MissingExtraError
from lora_lexicon.evaluation import library
from lora_lexicon.evaluation.metrics import (
    BLEU_SIGNATURE,
    EXACT_SIGNATURE,
    ROUGE_L_SIGNATURE,
    bleu,
    exact,
    rouge_l,
)

Pairs = Sequence[tuple[str, Sequence[str]]]  # a prediction and its references
Combine = Literal["pooled", "best"]


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of (m, 2) sums of score and weight; NaN where the weight is 0."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), math.nan), where=sums[:, 1] > 0)


def _percent(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return 100 * _ratio(sums)


@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        signature: what it is, with the library's version; asked only when used.
        row: (prediction, references) -> the row's statistics, or its score, which is averaged.
        value: sums (m, k) -> figures (m,).
        whole: all pairs -> the figure, None where there is none.
        pools: counts n-grams of several references together; the others take the best reference in any case.
        score: `row` gives a score, of which zeros can be dropped.
        encoder: it reads an encoder's states (see `encoded`); `row` and `whole` are None.
    """

    name: str
    signature: Callable[[], str]
    row: Callable[[str, Sequence[str]], float | Sequence[float]] | None = None
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]] = _ratio
    whole: Callable[[Pairs], float | None] | None = None
    pools: bool = False
    score: bool = False
    encoder: bool = False

    @property
    def by_row(self) -> bool:
        """Its figure follows from sums over rows, and so do an interval and tests."""
        return self.row is not None or (self.encoder and self.score)


def _length(prediction: str, _references: Sequence[str]) -> float:
    return len(prediction.split())


def _length_ratio(prediction: str, references: Sequence[str]) -> Sequence[float]:
    own = len(prediction.split())
    return own, min((len(r.split()) for r in references), key=lambda length: (abs(length - own), length))


def _distinct(order: int) -> Callable[[Pairs], float | None]:
    """Distinct-n of Li et al. (2016), "A diversity-promoting objective function for neural conversation models"."""

    def share(pairs: Pairs) -> float | None:
        different, total = set(), 0
        for prediction, _ in pairs:
            tokens = prediction.split()
            found = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
            different.update(found)
            total += len(found)
        return 100 * len(different) / total if total else None

    return share


def _plain(text: str) -> Callable[[], str]:
    return lambda: text


def _of_sacrebleu(name: str) -> Callable[[], str]:
    return lambda: library.sacrebleu_signature(name)


def _of_nltk(smoothing: int) -> Callable[[], str]:
    return lambda: library.nltk_bleu_signature(smoothing)


def _nltk_bleu(smoothing: int) -> Metric:
    name = f"nltk-bleu-{smoothing}" if smoothing else "nltk-bleu"
    return Metric(name, _of_nltk(smoothing), library.nltk_bleu(smoothing), pools=True, score=True)


def _distinct_metric(name: str, order: int) -> Metric:
    text = f"distinct|order:{order}|tok:space|case:kept|refs:none|agg:corpus|0-100|v1"
    return Metric(name, _plain(text), whole=_distinct(order))


_LENGTH = "length|tok:space|refs:none|agg:mean|words|v1"
_LENGTH_RATIO = "length-ratio|tok:space|refs:closest|agg:corpus|percent|v1"
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu", _plain(BLEU_SIGNATURE), bleu, pools=True, score=True),
        Metric("rouge-l", _plain(ROUGE_L_SIGNATURE), rouge_l, score=True),
        Metric("sacrebleu", _of_sacrebleu("sacrebleu"), library.sacrebleu_row, library.sacrebleu_value, pools=True),
        Metric(
            "sacrebleu-sentence", _of_sacrebleu("sacrebleu-sentence"), library.sacrebleu_sentence,
            pools=True, score=True,
        ),
        *map(_nltk_bleu, (0, *library.SMOOTHINGS)),
        Metric("meteor", lambda: library.meteor_signature(True), library.meteor, score=True),
        Metric("meteor-stem", lambda: library.meteor_signature(False), library.meteor_stem, score=True),
        Metric("chrf", _of_sacrebleu("chrf"), library.chrf_row, library.chrf_value),
        Metric("nist", library.nist_signature, whole=library.nist),
        Metric("exact", _plain(EXACT_SIGNATURE), exact),
        _distinct_metric("distinct", 2),
        _distinct_metric("distinct-1", 1),
        Metric("length", _plain(_LENGTH), _length),
        Metric("length-ratio", _plain(_LENGTH_RATIO), _length_ratio, _percent),
        *(
            Metric(name, _plain(name), score=name != "mauve", encoder=True)
            for name in ("bertscore", "bertscore-rescaled", "moverscore", "mauve")
        ),
    )
}  # fmt: skip


def names_of(asked: Iterable[str]) -> list[str]:
    """Metrics by name, each once, in the order asked for; an item may be a list with commas.

    Raises:
        DataError: a metric that is not known; the message lists those that are.
    """
    names = list(dict.fromkeys(name.strip() for item in asked for name in item.split(",")))
    for name in names:
        if name not in METRICS:
            from difflib import get_close_matches

            near = get_close_matches(name, METRICS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(f"no metric {name!r}: {hint}there are {', '.join(METRICS)}")
    return names


def check(names: Sequence[str], *, encoder: bool, combine: Combine = "pooled", drop_zeros: bool = False) -> None:
    """Refuses before the long work what cannot be computed: options that do not fit, packages and data not installed.

    Raises:
        DataError, MissingExtraError: says which metric, and what to do.
    """
    needy = [name for name in names if METRICS[name].encoder]
    if needy and not encoder:
        raise DataError(f"{needy[0]} reads the states of a model: add --encoder FOLDER_OR_NAME")
    if encoder and not needy:
        raise DataError(f"no metric asked for reads --encoder ({', '.join(names)}): leave it out, or ask for bertscore")
    for name in names:
        metric = METRICS[name]
        if drop_zeros and not metric.score:
            raise DataError(f"--drop-zeros is of scores that are averaged over rows, which {name} is not")
        if combine == "best" and metric.pools and not metric.score:
            raise DataError(
                f"{name} sums counts over rows, for which no reference is the best: take sacrebleu-sentence"
            )
        if not metric.encoder:
            metric.signature()
    if "moverscore" in needy or "mauve" in needy:
        from importlib.util import find_spec

        for name, module, package in (("moverscore", "ot", "pot"), ("mauve", "mauve", "mauve-text")):
            if name in needy and find_spec(module) is None:
                raise MissingExtraError(f"the metric {name!r}", package, "scores")
