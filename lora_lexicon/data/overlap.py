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
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
