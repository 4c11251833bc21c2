"""What splits share that should share nothing, and entries without it. Knows nothing of models.

A row of valid or test leaks where another split, or the base's training data, has its headword, its definition, both,
or a definition of nearly the same words. In memory are the held-out splits, and eight bytes for each definition of the
rest, which is read once.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.data.faults import EXAMPLES, Tally
from lora_lexicon.data.near import NearIndex
from lora_lexicon.data.overlap import words
from lora_lexicon.data.stats import statistics
from lora_lexicon.data.store import Entries, EntriesWriter
from lora_lexicon.errors import DataError
from lora_lexicon.folders import new_folder, write_record

KINDS = ("headword", "pair", "definition", "near")  # of what is shared
NEAR = 0.8  # of the distinct words of two definitions together, how many both must have
BASE = "base"
HELD_OUT = ("valid", "test")

Pair = tuple[str, str]  # term, definition
Progress = Callable[[int], object]  # is told how many more rows are done


def normal(definition: str) -> str:
    """What two definitions that are the same agree in: NFKC, case-folded, the words alone (all, where it has none)."""
    return " ".join(words(unicodedata.normalize("NFKC", definition))) or headword(definition)


class HeldOut:
    """The rows of a split that nothing else should know."""

    def __init__(self, rows: Iterable[Pair], near: float = NEAR) -> None:
        self.terms: dict[str, int] = {}
        self.definitions: dict[str, int] = {}
        self.rows: list[tuple[int, int]] = []  # numbers of a row's headword and definition
        self.shown: dict[int, Pair] = {}  # the first row of a definition, as it was written
        for term, definition in rows:
            number = self.definitions.setdefault(normal(definition), len(self.definitions))
            self.rows.append((self.terms.setdefault(headword(term), len(self.terms)), number))
            self.shown.setdefault(number, (term, definition))
        self.near = NearIndex([text.split() for text in self.definitions], near)


@dataclass
class Shared:
    """What one source of rows has in common with a held-out split.

    Attributes:
        terms, definitions: numbers of those that the source has too.
        pairs: numbers of headword and definition that stand together there too.
        near: of a held-out definition, its similarity to one of the source that differs, and that row.
    """

    held: HeldOut
    terms: set[int] = field(default_factory=set)
    definitions: set[int] = field(default_factory=set)
    pairs: set[tuple[int, int]] = field(default_factory=set)
    near: dict[int, tuple[float, Pair]] = field(default_factory=dict)

    def meet(self, term: str, definition: str, row: Pair, fresh: bool) -> None:
        """Takes one row of the source, normalised and as it was written; `fresh`: its definition comes first here."""
        held = self.held
        known, same = held.terms.get(term), held.definitions.get(definition)
        if known is not None:
            self.terms.add(known)
        if same is not None:
            self.definitions.add(same)
            if known is not None:
                self.pairs.add((known, same))
        if fresh:
            for number, similarity in held.near.of(definition.split()):
                if number != same and number not in self.near:
                    self.near[number] = (similarity, row)

    def kinds(self, row: int) -> list[str]:
        """Those of `KINDS` by which a row of the held-out split leaks."""
        term, definition = self.held.rows[row]
        leaks = (
            term in self.terms,
            (term, definition) in self.pairs,
            definition in self.definitions,
            definition in self.near,
        )
        return [kind for kind, leak in zip(KINDS, leaks, strict=True) if leak]

    def report(self) -> dict[str, Any]:
        """Counts of distinct headwords, pairs and definitions, and of rows; examples of each kind."""
        rows = [self.kinds(i) for i in range(len(self.held.rows))]
        counted = Counter(kind for kinds in rows for kind in kinds)
        distinct = (self.terms, self.pairs, self.definitions, self.near)
        return {
            **{kind: {"distinct": len(n), "rows": counted[kind]} for kind, n in zip(KINDS, distinct, strict=True)},
            "rows": sum(map(bool, rows)),
            "of": len(rows),
            "examples": self._examples(),
        }

    def _examples(self) -> dict[str, list[Any]]:
        shown, terms = self.held.shown, list(self.held.terms)
        first = {definition: term for term, definition in sorted(self.pairs, reverse=True)}
        return {
            "headword": [terms[number] for number in sorted(self.terms)[:EXAMPLES]],
            "pair": [
                {"term": terms[first[number]], "definition": shown[number][1]} for number in sorted(first)[:EXAMPLES]
            ],
            "definition": [_row(shown[number]) for number in sorted(self.definitions)[:EXAMPLES]],
            "near": [
                {**_row(shown[number]), "similarity": self.near[number][0], "other": _row(self.near[number][1])}
                for number in sorted(self.near)[:EXAMPLES]
            ],
        }


def _row(pair: Pair) -> dict[str, str]:
    return dict(zip(("term", "definition"), pair, strict=True))


def share(rows: Iterable[Pair], held: Sequence[HeldOut]) -> list[Shared]:
    """What a source of (term, definition) rows, read once, has in common with each held-out split."""
    found = [Shared(each) for each in held]
    seen: set[int] = set()
    for row in rows:
        term, definition = headword(row[0]), normal(row[1])
        mark = hash(definition)
        for each in found:
            each.meet(term, definition, row, mark not in seen)
        seen.add(mark)
    return found


@dataclass(frozen=True)
class Check:
    """What was found in an entries folder.

    Attributes:
        shared: {"train/test": what train has that test should not, "train/valid", "test/valid", "base/test" ...}.
        faults: of each split, how many rows have each fault.
    """

    entries: Entries
    near: float
    shared: Mapping[str, Shared]
    faults: Mapping[str, Tally]

    def report(self) -> dict[str, Any]:
        """The counts as a JSON object."""
        return {
            "entries": dict(self.entries.record["splits"]),
            "fingerprint": self.entries.fingerprint,
            "near": self.near,
            "leaks": {pair: shared.report() for pair, shared in self.shared.items()},
            "faults": {split: tally.report() for split, tally in self.faults.items()},
        }


def check(
    entries: Entries, *, base: Iterable[Pair] | None = None, near: float = NEAR, progress: Progress | None = None
) -> Check:
    """Looks for what train has of valid and test, test of valid, and `base` of both; counts faults.

    Args:
        base: (term, definition) rows that the base was trained on.
        near: the Jaccard similarity of two definitions' words from which they count as nearly the same.
    """
    held = {name: HeldOut(_pairs(entries, name), near) for name in HELD_OUT if name in entries.splits}
    shared: dict[str, Shared] = {}
    tallies = {name: Tally() for name in entries.splits}
    for name in entries.splits:
        against = [other for other in held if name == "train" or (name, other) == ("test", "valid")]
        rows = _counting(_rows(entries, name), tallies[name], progress)
        found = share(rows, [held[other] for other in against])
        shared |= {f"{name}/{other}": each for other, each in zip(against, found, strict=True)}
    if base is not None:
        found = share(base, list(held.values()))
        shared |= {f"{BASE}/{other}": each for other, each in zip(held, found, strict=True)}
    return Check(entries, near, shared, tallies)


def _rows(entries: Entries, split: str) -> Iterator[Entry]:
    for batch in entries.batches(split):
        yield from (Entry(*row) for row in zip(*batch.values(), strict=True))


def _pairs(entries: Entries, split: str) -> Iterator[Pair]:
    return ((entry.term, entry.definition) for entry in _rows(entries, split))


def _counting(rows: Iterable[Entry], tally: Tally, progress: Progress | None) -> Iterator[Pair]:
    """Passes rows on, their faults counted."""
    for entry in rows:
        tally.take(entry.term, entry.definition, entry.context, entry.language)
        if progress and tally.rows % 1000 == 0:
            progress(1000)
        yield entry.term, entry.definition
    if progress:
        progress(tally.rows % 1000)


def write_clean(found: Check, out: Path, made_by: Mapping[str, Any], *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the entries of a check without the rows of valid and test that leak; train stays as it is.

    A row of valid that shares something with test goes, the one of test stays.

    Args:
        made_by: goes into the record, beside what the entries were made of.

    Returns:
        `splits` {name: rows}, `dropped` {"train/test": rows}, a row under the first that it leaks from,
        `empty_splits`, `fingerprint`.

    Raises:
        DataError: not one row of valid and test is left.
        LexiconError: `out` exists, or the disk is full.
    """
    entries = found.entries
    held = [split for split in entries.splits if split in HELD_OUT]
    if held and not any(leak is None for split in held for leak in _leaks(found, split)):
        raise DataError(f"{entries.path}: every row of {' and '.join(held)} leaks: prepare other data, or more of it")
    dropped: Counter[str] = Counter()
    with new_folder(out, replace=overwrite) as folder:
        writer = EntriesWriter(folder)
        try:
            for split in entries.splits:
                for entry, leak in zip(_rows(entries, split), _leaks(found, split), strict=True):
                    if leak:
                        dropped[leak] += 1
                    else:
                        writer.add(split, entry)
            record = {
                "dropped": dict(dropped),
                "empty_splits": [split for split in entries.splits if split not in writer.counts],
                "made_by": {**made_by, "near": found.near, "cleaned_from": entries.fingerprint,
                            "entries": entries.record.get("made_by")},
            }  # fmt: skip
            made = writer.finish(record)
        finally:
            writer.close()
        write_record(folder / "stats.json", statistics(made))
    return {
        "splits": {split: writer.counts.get(split, 0) for split in entries.splits},
        "dropped": record["dropped"],
        "empty_splits": record["empty_splits"],
        "fingerprint": made.fingerprint,
    }


def _leaks(found: Check, split: str) -> Iterator[str | None]:
    """For each row of a split what it is dropped for, such as "train/test"; None: it stays."""
    by = {pair: shared for pair, shared in found.shared.items() if pair.endswith(f"/{split}")}
    for row in range(found.entries.record["splits"][split]):
        yield next((pair for pair, shared in by.items() if shared.kinds(row)), None)
