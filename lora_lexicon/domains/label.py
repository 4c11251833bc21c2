"""A name for each domain from the words that tell it from the others. Knows neither vectors nor models."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from lora_lexicon.data.entry import Entry

WORDS_IN_A_NAME = 2
# Names that mean something else on the command line or in a routing.
RESERVED = frozenset({"all", "none", "base", "dense", "random"})


def telling_words(domains: Sequence[Sequence[Entry]], count: int = 8) -> list[list[str]]:
    """For each domain, at most `count` words of its definitions, the most telling first.

    A word's score is p(word | domain) * log(p(word | domain) / p(word)), with p the share of
    definitions that hold it: frequent here, and more so than elsewhere. Function words are left out.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts = [Counter(w for e in entries for w in _words(e.definition) - ENGLISH_STOP_WORDS) for entries in domains]
    everywhere: Counter[str] = sum(counts, Counter())
    total = sum(len(entries) for entries in domains)
    telling = []
    for entries, own in zip(domains, counts, strict=True):
        scores = {w: n / len(entries) * math.log(n * total / (len(entries) * everywhere[w])) for w, n in own.items()}
        telling.append([w for w, _ in sorted(scores.items(), key=lambda item: (-item[1], item[0]))][:count])
    return telling


def name_domains(domains: Sequence[Sequence[Entry]]) -> list[str]:
    """A valid, unique name for each domain: its two most telling words, each given to one domain only."""
    names: list[str] = []
    used: set[str] = set(RESERVED)
    for number, words in enumerate(telling_words(domains, 50)):
        ascii_words = [w for w in map(_ascii, words) if w]
        fresh = [w for w in ascii_words if w not in used][:WORDS_IN_A_NAME]
        used |= set(fresh)
        name = "-".join(fresh)[:48] or f"domain-{number}"
        names.append(name if name not in {*names, *RESERVED} else f"{name}-{number}")
    return names


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{3,}", text.lower()))


def _ascii(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
    return plain if re.fullmatch(r"[a-z]{2,}", plain) else ""
