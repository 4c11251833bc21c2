"""How much two texts have in common, word by word. Knows nothing of predictions or references."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of Unicode word characters, case-folded."""
    return _WORD.findall(text.casefold())


def overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two texts' words, from 0 to 100; symmetric.

    It is ROUGE-L of one sentence (Lin, 2004, section 3.1, with beta = 1).
    """
    common = _longest_common(a, b)
    return 200 * common / (len(a) + len(b)) if common else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer.

    Bit j of `row` is 0 where the table grows from column j to j + 1 (Hyyrö, 2004, "Bit-parallel LCS-length
    computation revisited").
    """
    places: dict[str, int] = {}
    for j, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(b)) - 1
    row = every
    for word in a:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & every
    return len(b) - row.bit_count()
