"""Metrics that libraries compute: sacrebleu BLEU and chrF; NLTK BLEU, METEOR and NIST. Knows one row at a time.

Both are imported where they are used (`pip install 'lora-lexicon[scores]'`). A function of a row returns the
statistics whose sums over rows make the figure.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.overlap import words
from lora_lexicon.errors import DataError, MissingExtraError

SMOOTHINGS = (1, 2, 3, 4)  # of NLTK's: the others fail on short texts, or need a context
ORDER = 5  # of NIST (Doddington, 2002)


def sacrebleu_row(prediction: str, references: Sequence[str]) -> list[float]:
    """Lengths, matches and totals of one row (10,), as sacrebleu's own bootstrap sums them."""
    # No public method gives a segment's counts; these two are what sacrebleu.significance calls.
    return _bleu()._extract_corpus_statistics([prediction], [[r] for r in references])[0]


def sacrebleu_value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corpus BLEU of (m, 10) sums."""
    return _each(_bleu(), sums)


def sacrebleu_sentence(prediction: str, references: Sequence[str]) -> float:
    """`sacrebleu.sentence_bleu`, which leaves out orders that the prediction is too short for."""
    return _sacrebleu().sentence_bleu(prediction, list(references)).score


def chrf_row(prediction: str, references: Sequence[str]) -> list[float]:
    """Counts of character n-grams (18,) against the reference with the best F-score."""
    return _chrf()._extract_corpus_statistics([prediction], [[r] for r in references])[0]


def chrf_value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corpus chrF2 of (m, 18) sums."""
    return _each(_chrf(), sums)


def sacrebleu_signature(metric: str) -> str:
    """As sacrebleu prints it, without the number of references."""
    module = _sacrebleu()
    if metric == "chrf":
        return f"chrf2|case:mixed|eff:yes|nc:6|nw:0|space:no|refs:best|agg:corpus|0-100|sacrebleu-{module.__version__}"
    effective, level = ("yes", "mean") if metric == "sacrebleu-sentence" else ("no", "corpus")
    return f"bleu|case:mixed|eff:{effective}|tok:13a|smooth:exp|agg:{level}|0-100|sacrebleu-{module.__version__}"


def nltk_bleu(smoothing: int) -> Callable[[str, Sequence[str]], float]:
    """NLTK's `sentence_bleu` times 100, with one of its smoothing methods (0: none)."""

    def score(prediction: str, references: Sequence[str]) -> float:
        module = _nltk("nltk-bleu").translate.bleu_score
        method = getattr(module.SmoothingFunction(), f"method{smoothing}")
        guess = prediction.split()
        if not guess:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of orders without a match; the signature says how they count
            found = module.sentence_bleu([r.split() for r in references], guess, smoothing_function=method)
        return 100 * float(found)

    return score


def nltk_bleu_signature(smoothing: int) -> str:
    """Says the smoothing method."""
    version = _nltk("nltk-bleu").__version__
    method = f"method{smoothing}" if smoothing else "none"
    return (
        f"bleu|nltk-sentence-bleu|order:4|smooth:{method}|bp:closest|tok:space|case:kept|agg:mean|0-100|nltk-{version}"
    )


def meteor(prediction: str, references: Sequence[str]) -> float:
    """NLTK's METEOR: exact, stemmed and synonymous words, synonyms by WordNet."""
    return _meteor(prediction, references, wordnet())


def meteor_stem(prediction: str, references: Sequence[str]) -> float:
    """NLTK's METEOR without its last stage: exact and stemmed words alone, which needs no data."""
    return _meteor(prediction, references, _NoSynonyms())


def meteor_signature(synonyms: bool) -> str:
    """Says which WordNet, or that there is none."""
    version = _nltk("meteor").__version__
    stages = f"exact,porter,wordnet-{wordnet().get_version()}" if synonyms else "exact,porter"
    return (
        f"meteor|match:{stages}|alpha:0.9|beta:3|gamma:0.5|tok:unicode-words|case:folded|refs:best|agg:mean|0-100|"
        f"nltk-{version}"
    )


@cache
def wordnet() -> Any:
    """NLTK's WordNet.

    Raises:
        DataError: its data is not installed.
    """
    corpus = _nltk("meteor").corpus.wordnet
    try:
        corpus.ensure_loaded()
    except LookupError as error:
        raise DataError(
            "meteor needs WordNet as NLTK reads it: run python -m nltk.downloader wordnet, or ask for meteor-stem, "
            "which counts no synonyms"
        ) from error
    return corpus


def nist(pairs: Sequence[tuple[str, Sequence[str]]]) -> float | None:
    """NLTK's `corpus_nist` of order 5, which reads the weights of n-grams from all references at once.

    Orders that no prediction is long enough for add nothing. None where no prediction has a word.
    """
    module = _nltk("nist").translate.nist_score
    guesses = [prediction.split() for prediction, _ in pairs]
    order = min(ORDER, max(map(len, guesses)))
    if not order:
        return None
    return float(module.corpus_nist([[r.split() for r in references] for _, references in pairs], guesses, order))


def nist_signature() -> str:
    """Says what its weights are learned from."""
    version = _nltk("nist").__version__
    return f"nist|order:{ORDER}|info:references|tok:space|case:kept|refs:best|agg:corpus|from 0|nltk-{version}"


class _NoSynonyms:
    """A WordNet without words."""

    def synsets(self, _word: str) -> list[Any]:
        return []


def _meteor(prediction: str, references: Sequence[str], synonyms: Any) -> float:
    score = _nltk("meteor").translate.meteor_score.meteor_score
    return 100 * float(score([words(r) for r in references], words(prediction), wordnet=synonyms))


def _each(metric: Any, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([metric._compute_score_from_stats(list(row)).score for row in sums.reshape(-1, sums.shape[-1])])


@cache
def _bleu() -> Any:
    return _sacrebleu().metrics.BLEU(force=True)


@cache
def _chrf() -> Any:
    return _sacrebleu().metrics.CHRF()


@cache
def _sacrebleu() -> Any:
    try:
        import sacrebleu
        import sacrebleu.metrics
    except ImportError as error:
        raise MissingExtraError("sacrebleu and chrf", "sacrebleu", "scores") from error
    return sacrebleu


@cache
def _nltk(metric: str) -> Any:
    try:
        import nltk
        import nltk.corpus
        import nltk.translate.bleu_score
        import nltk.translate.meteor_score
        import nltk.translate.nist_score
    except ImportError as error:
        raise MissingExtraError(f"the metric {metric!r}", "nltk", "scores") from error
    return nltk
