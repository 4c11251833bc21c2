"""What systems did entry by entry: who answered, what was written best and worst, what says nothing, what leaks."""

import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_lexicon.data.faults import FAULTS, Tally
from lora_lexicon.data.leaks import KINDS, check
from lora_lexicon.data.store import load_entries
from lora_lexicon.domains.map import map_of
from lora_lexicon.errors import DataError, LexiconError
from lora_lexicon.evaluation.run import Evaluation
from lora_lexicon.report.document import Block, Code, Example, Examples, Figure, Picture, Table, Text, Written

Progress = Callable[[int, int], object]  # how many more rows are done, of how many
Told = tuple[list[Block], list[str]]  # a section, and what the summary says of it
MOST = 20  # rows, or columns, of a table that could have any number
REFERENCES = "(the references)"
LEAKS = {
    "headword": "same headword",
    "pair": "same pair",
    "definition": "same definition",
    "near": "nearly the same",
}


def domains(systems: Sequence[Evaluation]) -> Iterator[Block]:
    """How many entries each expert answered, and the map of the entries of each router."""
    counts = [(each.name, Counter(each.domains)) for each in systems]
    experts = _first(dict.fromkeys(name for _, count in counts for name, _ in count.most_common()))
    rows = [[expert, *(count[expert] for _, count in counts)] for expert in experts]
    yield Table("Entries that each expert answered", ["expert", *(name for name, _ in counts)], rows)
    drawn: list[bytes] = []
    for number, each in enumerate(systems, 1):
        if each.places is None:
            continue
        placed = np.flatnonzero(np.isfinite(each.places).all(axis=1))
        names = sorted({each.domains[i] for i in placed})
        labels = np.array([names.index(each.domains[i]) for i in placed], dtype=np.int32)
        png, alt = map_of(each.places[placed], labels, names)
        if png not in drawn:  # as of a model whose base is held in another format
            drawn.append(png)
            caption = f"Where the entries lie for the router of {each.name}, coloured by the expert that answered."
            yield Picture(f"map-{number}", png, f"{each.name}: {alt}", caption)
    if not drawn:
        yield Text("No map: none of the systems has a router that routes by domain.")


def routing(systems: Sequence[Evaluation]) -> Iterator[Block]:
    """Given domains, or sources, against the experts that answered; and two routings against each other."""
    entries = systems[0].entries
    given, what = [entry.domain for entry in entries], "given domain"
    if not any(given):
        given, what = [entry.source for entry in entries], "source"
    routed = [each for each in systems if len(set(each.domains)) > 1]
    if not routed:
        yield Text("Nothing was routed: each system answered as one expert, or as its base.")
        return
    if len(set(given)) > 1:
        for each in routed:
            yield _crossed(f"{each.name}: {what} and the expert that answered", what, given, each.domains)
    else:
        yield Text("The entries have no domains of their own, and one source: routing cannot be held against these.")
    first, *others = routed
    for other in others:
        same = np.mean([a == b for a, b in zip(first.domains, other.domains, strict=True)])
        note = f"The same expert for {same:.0%} of the entries."
        title = f"{first.name} (rows) and {other.name} (columns)"
        yield _crossed(title, first.name, first.domains, other.domains, note)


def _crossed(title: str, what: str, left: Sequence[str], right: Sequence[str], note: str = "") -> Table:
    """Counts of pairs, the most frequent rows and columns first; says what is left out."""
    pairs = Counter(zip(left, right, strict=True))
    rows, columns = (_first(name for name, _ in Counter(side).most_common()) for side in (left, right))
    cells = [[row or "(none)", *(pairs[row, column] for column in columns)] for row in rows]
    if left_out := len(left) - sum(
        count for (row, column), count in pairs.items() if row in rows and column in columns
    ):
        note = f"{note} {left_out:,} entries are not shown: of rarer rows or columns.".strip()
    return Table(title, [what, *columns], cells, note)


def _first(names: Iterable[str]) -> list[str]:
    return list(names)[:MOST]


def examples(systems: Sequence[Evaluation], count: int, seed: int) -> Iterator[Block]:
    """The best and the worst by the BLEU of the first system that wrote, and some at random."""
    wrote = [each for each in systems if each.predictions is not None]
    if not wrote or not count:
        yield Text("No examples were asked for." if wrote else "No definitions were written.")
        return
    rows = range(min(len(each.predictions or ()) for each in wrote))
    ranked = np.argsort(-_bleu(wrote[0])[: len(rows)], kind="stable").tolist()
    choices = {
        f"Best by the BLEU of {wrote[0].name}": ranked[:count],
        f"Worst by the BLEU of {wrote[0].name}": ranked[::-1][:count],
        f"Drawn at random (seed {seed})": sorted(random.Random(seed).sample(rows, min(count, len(rows)))),
    }
    for title, chosen in choices.items():
        yield Examples(title, [each.name for each in wrote], [_example(wrote, i) for i in chosen])


def _example(wrote: Sequence[Evaluation], i: int) -> Example:
    entry = wrote[0].entries[i]
    written = [Written((each.predictions or ())[i], float(_bleu(each)[i]), each.domains[i]) for each in wrote]
    return Example(entry.term, entry.context, entry.definition, written)


def _bleu(each: Evaluation) -> Any:
    assert each.bleu is not None, "what was written was scored"
    return each.bleu


def faults(systems: Sequence[Evaluation]) -> Told:
    """What is empty, circular or a copy of its context, of each system and of the references."""
    entries, tallies = systems[0].entries, {REFERENCES: Tally()}
    for entry in entries:
        tallies[REFERENCES].take(entry.term, entry.definition, entry.context, entry.language)
    for each in systems:
        if each.predictions is not None:
            tally = tallies[each.name] = Tally()
            for entry, text in zip(entries, each.predictions, strict=False):
                tally.take(entry.term, text, entry.context, entry.language)
    note = (
        "Empty: no word. Circular: the term, or a word of its stem, defines itself. Copy of the context: a run of its "
        "words. A definition without such a fault may be wrong all the same."
    )
    rows = [_faults_of(name, tally.report()) for name, tally in tallies.items()]
    blocks: list[Block] = [Table("Faults", ("definitions of", "rows", *FAULTS, "any", "% of rows"), rows, note)]
    found = [
        [name, fault, row["term"], row["definition"]]
        for name, tally in tallies.items()
        for fault in FAULTS
        for row in tally.examples[fault][:2]
    ]
    if found:
        blocks.append(Table("Examples of faults", ("definitions of", "fault", "term", "definition"), found))
    said = [f"{tally.counts['any']:,} of {tally.rows:,} of {name}" for name, tally in tallies.items()]
    own, *others = said
    own = own.replace(REFERENCES, "the references")
    return blocks, [f"Empty, circular or a copy of the context: {', '.join(others)}; {own}."] if others else []


def _faults_of(name: str, found: dict[str, Any]) -> list[str | int | Figure]:
    return [name, *(found[key] for key in ("rows", *FAULTS, "any")), _percent(found["any"], found["rows"])]


def _percent(part: int, whole: int) -> Figure:
    return Figure(100 * part / max(1, whole), digits=1)


def leaks(report: dict[str, Any], progress: Progress | None) -> Told:
    """What other splits have of the one evaluated; the entries are read again, if they are still there."""
    split = report["split"]
    try:
        entries = load_entries(report["data"])
        if entries.fingerprint != report["entries_fingerprint"]:
            raise DataError(f"{report['data']} holds other entries now")
        total = sum(entries.record["splits"].values())
        found = check(entries, progress=(lambda more: progress(more, total)) if progress else None).report()
    except LexiconError as error:
        blocks: list[Block] = [
            Text(f"Leaks were not looked for: {error}. Where the entries are, this does:"),
            Code(f"lora-lexicon data check {shlex.quote(report['data'])}"),
        ]
        return blocks, ["Leaks were not looked for: the entries are not where they were."]
    held = {pair.split("/")[0]: of for pair, of in found["leaks"].items() if pair.endswith(f"/{split}")}
    rows = [
        [
            f"{other}/{split}",
            *(of[kind]["rows"] for kind in KINDS),
            of["rows"],
            of["of"],
            _percent(of["rows"], of["of"]),
        ]
        for other, of in held.items()
    ]
    note = (
        f"Rows of {split} (all of it, not only those evaluated) that another split has too: their headword, headword "
        f"and definition, definition, or a definition of nearly the same words (Jaccard {found['near']:g})."
    )
    columns = ("known/held out", *(LEAKS[kind] for kind in KINDS), "any", "rows", "% of rows")
    nothing = Text(f"There is no other split that could hold what {split} has.")
    faulty = [_faults_of(name, of) for name, of in found["faults"].items()]
    own = Table("Faults of the entries themselves", ("split", "rows", *FAULTS, "any", "% of rows"), faulty)
    said = [f"{of['rows']:,} of the {of['of']:,} rows of {split} leak from {other}." for other, of in held.items()]
    return [Table(f"What other splits have of {split}", columns, rows, note) if rows else nothing, own], said
