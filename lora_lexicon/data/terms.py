"""Finding a term in a text, inflected forms included. Knows nothing of files or models."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

_SUFFIXES = r"(?:s|es|ies|d|ed|ied|ing|er|ers|ier|est|iest|'s|’s|s'|ly|n|en)?"


@dataclass(frozen=True)
class IrregularForms:
    """Irregular inflections by lemma, as in WordNet's `*.exc` files."""

    by_lemma: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: Path) -> "IrregularForms":
        """Reads lines of `inflected lemma [lemma ...]`; an absent file means no irregular forms."""
        by_lemma: dict[str, tuple[str, ...]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                inflected, *lemmas = line.replace("_", " ").split()
                for lemma in lemmas:
                    by_lemma[lemma] = (*by_lemma.get(lemma, ()), inflected)
        return cls(by_lemma)


NO_FORMS = IrregularForms()


def contains_term(text: str, term: str, forms: IrregularForms = NO_FORMS) -> bool:
    """Whether `text` holds `term` or an inflection of it, ignoring case."""
    return _stands_in(text, term) or find_term(text, term, forms) is not None


def _stands_in(text: str, term: str) -> bool:
    """Whether the first place of `term` in `text` is one of its own: mostly so, and no pattern has to be made."""
    if not (text.isascii() and term.isascii() and term.split()):
        return False
    text, term = text.lower(), " ".join(term.lower().split())
    start = text.find(term)
    beside = text[max(start - 1, 0) : start] + text[start + len(term) : start + len(term) + 1]
    return start >= 0 and all(not (letter.isalnum() or letter == "_") for letter in beside)


def find_term(text: str, term: str, forms: IrregularForms = NO_FORMS) -> tuple[int, int] | None:
    """The (start, end) of the first place where `text` holds `term` or an inflection of it, or None."""
    irregular = forms.by_lemma.get(term.lower(), ())
    # Every regular form starts with the first word but for its last letter: most misses end here, without a pattern.
    start = (term.split() or [term])[0][:-1]
    if not irregular and start.isascii() and text.isascii() and start.lower() not in text.lower():
        return None
    match = _pattern(term, irregular).search(text)
    return match.span() if match else None


@lru_cache(maxsize=4096)
def _pattern(term: str, irregular: tuple[str, ...]) -> re.Pattern[str]:
    words = term.split() or [term]
    parts = [_word(word) for word in words]
    inflected = [re.escape(form) for form in irregular]
    body = "|".join([r"[\s\-]+".join(parts), *inflected])
    return re.compile(rf"(?<!\w)(?:{body})(?!\w)", re.IGNORECASE)


def _word(word: str) -> str:
    """One word with its regular inflections: final e and y drop, a final consonant may double."""
    stem = re.escape(word)
    variants = [stem + _SUFFIXES]
    if word[-1:] in "ey" and len(word) > 2:
        variants.append(re.escape(word[:-1]) + _SUFFIXES)
    elif word[-1:].isalpha() and word[-1:].lower() not in "aeiouy":
        variants.append(stem + re.escape(word[-1]) + r"(?:ed|ing|er|est|ers)")
    return "(?:" + "|".join(variants) + ")"
