"""A name for each domain from the words that tell it from the others. Knows neither vectors nor models."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count

from lora_lexicon.data.entry import Entry

WORDS_IN_A_NAME = 2
# Names that mean something else on the command line or in a routing.
RESERVED = frozenset({"all", "none", "base", "dense", "random"})


def telling_words(domains: Sequence[Sequence[Entry]], most: int = 8) -> list[list[str]]:
    """For each domain, at most `most` words of its definitions, the most telling first.

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
        telling.append([w for w, _ in sorted(scores.items(), key=lambda item: (-item[1], item[0]))][:most])
    return telling


def name_domains(domains: Sequence[Sequence[Entry]], taken: Sequence[str] = ()) -> list[str]:
    """A valid, unique name for each domain: its two most telling words, each given to one domain only.

    Args:
        taken: names of other domains, whose words are given to none of these.
    """
    names: list[str] = []
    used: set[str] = {*RESERVED, *(word for name in taken for word in re.split(r"[^a-z]+", name.lower()))}
    there = {*RESERVED, *(name.lower() for name in taken)}
    for number, words in enumerate(telling_words(domains, 50)):
        ascii_words = [w for w in map(_ascii, words) if w]
        fresh = [w for w in ascii_words if w not in used][:WORDS_IN_A_NAME]
        used |= set(fresh)
        stem = "-".join(fresh)[:48] or f"domain-{number}"
        more = (f"{stem}-{n}" for n in count(number))
        names.append(next(name for name in chain([stem], more) if name not in there))
        there.add(names[-1])
    return names


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{3,}", text.lower()))


def _ascii(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
    return plain if re.fullmatch(r"[a-z]{2,}", plain) else ""
