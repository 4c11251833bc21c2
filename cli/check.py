"""`lora-lexicon data check`: what splits share that they should not, and definitions that say nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, progress, show_table

if TYPE_CHECKING:
    from lora_lexicon.data.entry import Row
    from lora_lexicon.data.store import Entries

TITLES = {
    "headword": "headwords",
    "pair": "term and definition",
    "definition": "same definition",
    "near": "nearly the same definition",
}


@guarded
def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An entries folder, or a .jsonl file of predictions.")],
    base: Annotated[
        str | None,
        typer.Option(help="A base made by `train base`: by what rule it held words back, which --base-data follows."),
    ] = None,
    base_data: Annotated[
        list[str] | None,
        typer.Option("--base-data", metavar="INPUT", help="Dictionary data that the base was trained on. Repeatable."),
    ] = None,
    near: Annotated[
        float,
        typer.Option(help="From what Jaccard similarity of their words on two definitions are nearly the same."),
    ] = 0.8,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the entries without the rows of valid and test that leak.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count what train, valid, test and the base's training data share, and empty, circular or copied definitions."""
    if not 0 < near <= 1:
        raise typer.BadParameter(f"{near} is no similarity: it is above 0 and at most 1", param_hint="--near")
    if path.is_file():
        if base or base_data or out or overwrite:
            raise typer.BadParameter("--base, --base-data, --out and --overwrite are of an entries folder")
        _check_predictions(path, as_json)
        return
    from lora_lexicon.data import leaks
    from lora_lexicon.data.store import load_entries

    entries = load_entries(path)
    pairs, known = _base(entries, base, base_data or [])
    with progress() as bar:
        task = bar.add_task("entries", total=sum(entries.record["splits"].values()))
        found = leaks.check(entries, base=pairs, near=near, progress=lambda done: bar.advance(task, done))
    report = {**found.report(), "base": known}
    if out is not None:
        report["clean"] = {"out": str(out), **leaks.write_clean(found, out, {"base": known}, overwrite=overwrite)}
    if as_json:
        emit(report)
        return
    _show(report)


def _base(
    entries: "Entries", base: str | None, data: Sequence[str]
) -> tuple[list[tuple[str, str]] | None, dict[str, Any] | None]:
    """((term, definition) rows that a base read, what is known of it); None for what no option tells."""
    if not base and not data:
        return None, None
    from lora_lexicon.data.entry import headword
    from lora_lexicon.experts.pretrain import seen_by, select
    from lora_lexicon.resources import find_base

    seen = seen_by(Path(find_base(base))) if base else None
    known: dict[str, Any] = {"name": base, "data": list(data)}
    if seen is not None:
        known |= {"recorded_rows": seen.rows, "seed": seen.seed, "held_back": {}}
        for split in (name for name in ("valid", "test") if name in entries.splits):
            terms = {headword(term) for batch in entries.batches(split) for term in batch["term"]}
            known["held_back"][split] = {"headwords": sum(map(seen.held_back, terms)), "of": len(terms)}
    if not data:
        return None, known
    rows = _dictionary(data)
    if seen is None:
        pairs = [(str(row.term), str(row.definition)) for row in rows]
    else:
        pairs = [(term, definition) for term, _, definition in select(rows, seen.seed)]
    return pairs, {**known, "rows": len(pairs)}


def _dictionary(data: Sequence[str]) -> "list[Row]":
    """The rows that have a term and a definition, of their contexts those that say something."""
    from lora_lexicon.data.readers import read
    from lora_lexicon.errors import DataError

    found = []
    for row in read(data):
        texts = (row.term, row.definition)
        if not row.error and all(isinstance(text, str) and text.strip() for text in texts):
            contexts = tuple(text for text in row.contexts if isinstance(text, str) and text.strip())
            found.append(replace(row, contexts=contexts))
    if not found:
        raise DataError(f"no row of {', '.join(data)} has a term and a definition: give what the base was trained on")
    return found


def _show(report: dict[str, Any]) -> None:
    rows = []
    for pair, shared in report["leaks"].items():
        counts = [f"{shared[kind]['rows']:,}" for kind in TITLES]
        rows.append((pair, *counts, shared["rows"], 100 * shared["rows"] / max(1, shared["of"])))
    columns = ("known/held out", *TITLES.values(), "any", "% of rows")
    show_table(f"Leaks: rows of a held-out split (nearly: Jaccard {report['near']:g} of words)", columns, rows)
    for pair, shared in report["leaks"].items():
        for line in _examples(shared["examples"]):
            note(f"{pair}: {line}")
    _show_faults(report["faults"])
    if known := report["base"]:
        _show_base(known)
    if clean := report.get("clean"):
        dropped = ", ".join(f"{count:,} for {pair}" for pair, count in clean["dropped"].items()) or "none"
        note(f"written to {clean['out']}; rows dropped: {dropped}")
        if clean["empty_splits"]:
            note(f"nothing is left of {' and '.join(clean['empty_splits'])}")


def _examples(examples: dict[str, list[Any]]) -> Iterable[str]:
    """Two lines a kind at most."""
    for term in examples["headword"][:2]:
        yield f"headword {term!r}"
    for kind in ("pair", "definition"):
        for row in examples[kind][:2]:
            yield f"{TITLES[kind]}: {row['term']!r}, {row['definition']!r}"
    for row in examples["near"][:2]:
        other = row["other"]
        yield (
            f"{row['similarity']:.2f} alike: {row['term']!r}, {row['definition']!r} "
            f"and {other['term']!r}, {other['definition']!r}"
        )


def _show_base(known: dict[str, Any]) -> None:
    for split, held in known.get("held_back", {}).items():
        note(
            f"{known['name']} held back {held['headwords']:,} of {held['of']:,} headwords of {split} by its rule, "
            "whatever it read" + ("" if known["data"] else "; whether it read the others, --base-data tells")
        )
    if known["data"] and known.get("recorded_rows", known["rows"]) != known["rows"]:
        note(
            f"by the rule of {known['name']}, {known['rows']:,} rows of --base-data were read; its training.json says "
            f"{known['recorded_rows']:,}: it is not quite the data that it was trained on"
        )


def _check_predictions(path: Path, as_json: bool) -> None:
    """Faults of what a system wrote."""
    from lora_lexicon.data.faults import Tally
    from lora_lexicon.data.predictions import read_predictions

    tally = Tally()
    for each in read_predictions(path, allow_empty=True, referenced=False):
        tally.take(each.term, each.text, each.context, line=each.line)
    if as_json:
        emit({"predictions": str(path), "faults": tally.report()})
    else:
        _show_faults({path.name: tally.report()})


def _show_faults(faults: dict[str, Any]) -> None:
    from lora_lexicon.data.faults import FAULTS

    rows = []
    for name, found in faults.items():
        counts = [found[key] for key in ("rows", *FAULTS, "any")]
        rows.append((name, *counts, 100 * found["any"] / max(1, found["rows"])))
    show_table("Definitions that say nothing", ("", "rows", *FAULTS, "any", "% of rows"), rows)
    for name, found in faults.items():
        for fault, examples in found["examples"].items():
            for row in examples[:2]:
                where = f"{name}:{row['line']}" if "line" in row else name
                note(f"{where}, {fault}: {row['term']!r}, {row['definition']!r}")
