"""One dictionary entry, and one row as a reader found it. Knows nothing of files or models."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A term in one context with its definition: the unit of training and of evaluation."""

    term: str
    context: str
    definition: str
    source: str
    language: str = "en"
    domain: str = ""
    pos: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input file before any rule was applied; a field may hold anything.

    `contexts` has one item per example. `split` is the split the input itself names, or None.
    `error` is set, and the other fields may be None, when the reader could not parse the row.
    """

    file: str
    line: int
    term: object = None
    definition: object = None
    contexts: tuple[object, ...] = ()
    source: object = None
    language: str = "en"
    domain: str = ""
    pos: str = ""
    split: str | None = None
    error: str | None = None


def headword(term: str) -> str:
    """The key under which a term is split: NFKC, case-folded, underscores and runs of space as one space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", term).casefold())
    return " ".join(folded.replace("_", " ").split())


def spread(entries: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the entries, evenly spread, always the same ones."""
    if limit is None or limit >= len(entries):
        return list(entries)
    return [entries[i * len(entries) // limit] for i in range(limit)]
