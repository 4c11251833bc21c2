"""What makes a definition worthless whatever it was to say: empty, circular, a copy of its context. Pure functions.

Knows nothing of files, and nothing of whether a definition is true.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from lora_lexicon.data.overlap import words
from lora_lexicon.data.terms import contains_term

EXAMPLES = 5
FAULTS = ("empty", "circular", "copy of the context")
COPIED = 4  # words in one run: fewer are in a sentence by chance
# ISO 639-1 codes of what Snowball has an algorithm for.
_SNOWBALL = {
    "ar": "arabic", "hy": "armenian", "eu": "basque", "ca": "catalan", "cs": "czech", "da": "danish", "nl": "dutch",
    "en": "english", "eo": "esperanto", "et": "estonian", "fi": "finnish", "fr": "french", "de": "german",
    "el": "greek", "hi": "hindi", "hu": "hungarian", "id": "indonesian", "ga": "irish", "it": "italian",
    "lt": "lithuanian", "ne": "nepali", "no": "norwegian", "fa": "persian", "pl": "polish", "pt": "portuguese",
    "ro": "romanian", "ru": "russian", "sr": "serbian", "es": "spanish", "sv": "swedish", "ta": "tamil",
    "tr": "turkish", "yi": "yiddish",
}  # fmt: skip


def faults(term: str, definition: str, context: str = "", language: str = "en") -> list[str]:
    """Those of `FAULTS` that a definition has, in that order."""
    if is_empty(definition):
        return [FAULTS[0]]
    found = (is_circular(term, definition, language), is_copy(definition, context))
    return [name for name, has in zip(FAULTS[1:], found, strict=True) if has]


class Tally:
    """Counts rows by fault, and keeps the first few of each."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: dict[str, int] = dict.fromkeys((*FAULTS, "any"), 0)
        self.examples: dict[str, list[dict[str, Any]]] = {fault: [] for fault in FAULTS}

    def take(self, term: str, definition: str, context: str, language: str = "en", **shown: Any) -> None:
        """Takes one row; `shown` goes into its example."""
        self.rows += 1
        found = faults(term, definition, context, language)
        self.counts["any"] += bool(found)
        for fault in found:
            self.counts[fault] += 1
            if len(self.examples[fault]) < EXAMPLES:
                self.examples[fault].append({**shown, "term": term, "context": context, "definition": definition})

    def report(self) -> dict[str, Any]:
        """`rows`, those with each fault and with "any", `examples` {fault: rows}."""
        return {"rows": self.rows, **self.counts, "examples": self.examples}


def is_empty(definition: str) -> bool:
    """Whether a definition holds no word: at most white space and punctuation."""
    return not words(definition)


def is_circular(term: str, definition: str, language: str = "en") -> bool:
    """Whether a definition uses the term that it defines, an inflection or a derivation of it.

    Words agree if their stems do (Snowball's, of the language, an ISO 639-1 code); those of a longer term must stand
    side by side. Of a language that Snowball does not know, `data.terms` says what an inflection is. A function word
    (of, in) that its own definition uses counts as well.
    """
    sought = words(term)
    if not sought:
        return False
    algorithm = _SNOWBALL.get(language.strip().lower().split("-")[0])
    if algorithm is None:
        return contains_term(definition, term)
    return _holds([_stem(word, algorithm) for word in words(definition)], [_stem(word, algorithm) for word in sought])


def is_copy(definition: str, context: str) -> bool:
    """Whether a definition's words stand in the context in one run, and are at least `COPIED` or all of the context."""
    copied, given = words(definition), words(context)
    return bool(copied) and (len(copied) >= COPIED or copied == given) and _holds(given, copied)


def _holds(text: Sequence[str], run: Sequence[str]) -> bool:
    """Whether a sequence holds another in one run."""
    if run[0] not in text:
        return False
    size = len(run)
    return any(list(text[i : i + size]) == list(run) for i in range(len(text) - size + 1) if text[i] == run[0])


@lru_cache(maxsize=2**18)  # a dictionary's vocabulary: a stem takes as long as thirty look-ups
def _stem(word: str, algorithm: str) -> str:
    return _stemmer(algorithm).stemWord(word)


@cache
def _stemmer(algorithm: str) -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer(algorithm)
