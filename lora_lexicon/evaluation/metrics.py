"""Scores of one prediction against its references, from 0 to 100. Knows nothing of models or files.

Every score has a signature: two numbers can be compared only where their signatures agree.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from lora_lexicon.data.overlap import overlap, words
from lora_lexicon.errors import DataError

ORDER = 4
BLEU_SIGNATURE = (
    "bleu|moses-sentence-bleu|order:4|smooth:+1-every-order|bp:closest|tok:space,-fullstop|case:kept|agg:mean|0-100|v1"
)
EXACT_SIGNATURE = "exact|tok:unicode-words|case:folded|refs:best|agg:mean|0-100|v1"
ROUGE_L_SIGNATURE = "rouge-l|f1-of-lcs|tok:unicode-words|case:folded|stem:no|refs:best|agg:mean|0-100|v1"

_FULL_STOP = re.compile(r"\.(?!\d)")


def bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU as the LM-Lexicon paper computes it: Moses' `sentence-bleu`.

    Tokens are what white space separates, after full stops that no digit follows are removed. For every
    order from 1 to 4 one is added to the matches (clipped at the largest count in any one reference) and
    to the total. The brevity penalty reads the reference length closest to the prediction's, the shorter
    one of two. Case counts. An empty prediction scores 0.

    Raises:
        DataError: there is no reference.
    """
    _need(references)
    guess = bleu_tokens(prediction)
    if not guess:
        return 0.0
    counts, lengths = _pooled(tuple(references))
    matches, totals = [0] * ORDER, [0] * ORDER
    for ngram, count in _ngrams(guess).items():
        matches[len(ngram) - 1] += min(count, counts.get(ngram, 0))
        totals[len(ngram) - 1] += count
    log_precision = sum(math.log((m + 1) / (t + 1)) for m, t in zip(matches, totals, strict=True)) / ORDER
    closest = min(lengths, key=lambda length: (abs(length - len(guess)), length))
    return 100 * math.exp(log_precision + min(0.0, 1 - closest / len(guess)))


def mean_bleu(predictions: Sequence[str], definitions: Sequence[str]) -> float:
    """The mean BLEU of predictions, each against one definition: what training is watched by."""
    return sum(bleu(text, [gold]) for text, gold in zip(predictions, definitions, strict=True)) / len(predictions)


def bleu_tokens(text: str) -> list[str]:
    """The paper's tokens: "No. 3.5 is it." gives No, 3.5, is, it."""
    return _FULL_STOP.sub("", text).split()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of one sentence (Lin, 2004, section 3.1, with beta = 1): F1 of the longest common subsequence.

    Tokens are runs of Unicode word characters, case-folded, unstemmed; the best reference counts. For
    ASCII text without underscores this is what the package rouge-score computes.

    Raises:
        DataError: there is no reference.
    """
    _need(references)
    guess = words(prediction)
    return max(overlap(guess, words(reference)) for reference in references)


def exact(prediction: str, references: Sequence[str]) -> float:
    """100 where the prediction has the words of a reference, in their order, else 0; case and punctuation aside.

    Raises:
        DataError: there is no reference.
    """
    _need(references)
    guess = words(prediction)
    return 100.0 if any(guess == words(reference) for reference in references) else 0.0


def _need(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise DataError("a score needs a list of at least one reference")


@lru_cache(maxsize=1024)  # the senses of a term have the same references where they are pooled
def _pooled(references: tuple[str, ...]) -> tuple[Counter[tuple[str, ...]], tuple[int, ...]]:
    """The largest count of each n-gram in any one reference, and the references' lengths."""
    wanted = [bleu_tokens(reference) for reference in references]
    counts = _ngrams(wanted[0])
    for reference in wanted[1:]:
        counts |= _ngrams(reference)
    return counts, tuple(map(len, wanted))


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1))
