"""`lora-lexicon data`: dictionary files in, a folder of entries out, and what it holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .check import check
from .console import JsonOption, OverwriteOption, emit, guarded, note, progress, show_table

app = typer.Typer(no_args_is_help=True, help="Turn dictionary files into entries, and look at them.")
app.command("check")(check)


@app.command("prepare")
@guarded
def prepare(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, folders, or Hugging Face data sets (OWNER/NAME).")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="jsonl, csv, tsv, 3dex, naacl2019, wordnet, dictd or hub; recognised by default."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="FIELD=NAME", help="The column of a field, such as term=WORD. Repeatable."),
    ] = None,
    source: Annotated[str, typer.Option("--source", help="The source of rows whose input has no place for one.")] = "",
    keep_without_context: Annotated[
        bool, typer.Option("--keep-without-context", help="Keep entries that have no example.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Decides which headword is in which split.")] = 42,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Stop after this many rows.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read, clean and split dictionary data.

    Each row is kept or counted by the reason why not; rejects.jsonl in the folder lists those rows.
    """
    from lora_lexicon.data.prepare import prepare as run

    with progress() as bar:
        task = bar.add_task("bytes", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None)

        report = run(
            inputs,
            out,
            format=format,
            seed=seed,
            keep_without_context=keep_without_context,
            overwrite=overwrite,
            progress=show,
            limit=limit,
            columns=_columns(column or []),
            source=source,
        )
    if as_json:
        emit({**report, "out": str(out)})
        return
    show_table("Rows", ("", "rows"), [("read", report["read"]), ("kept", report["kept"]), *_rejected(report)])
    show_table("Splits", ("split", "entries"), report["splits"].items())
    missing, shared = report["term_not_in_context"], {k: n for k, n in report["overlap"].items() if n}
    if missing:
        note(f"{missing:,} entries are kept though their context does not hold the term")
    if shared:
        note("headwords in two splits, as the input gives them: " + ", ".join(f"{k} {n:,}" for k, n in shared.items()))
    if empty := report["empty_splits"]:
        note(
            f"no entry is in {' and '.join(empty)}, since headwords fall into splits by chance and there are few: "
            "give more rows, or try another --seed"
        )
    note(f"written to {out}" + (f"; rejected rows are in {out / 'rejects.jsonl'}" if report["rejected"] else ""))


@app.command("stats")
@guarded
def stats(
    entries: Annotated[Path, typer.Argument(metavar="ENTRIES", help="A folder made by `data prepare`.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a folder of entries holds: tables 1 and 5 of the LM-Lexicon paper."""
    from lora_lexicon.data.stats import statistics
    from lora_lexicon.data.store import load_entries

    found = statistics(load_entries(entries))
    if as_json:
        emit(found)
        return
    counts = ("entries", "terms", "divergent", "divergent_percent")
    rows = [(name, *(split[key] for key in counts)) for name, split in found["splits"].items()]
    show_table("Splits", ("split", "entries", "terms", "divergent", "% divergent"), rows)
    keys = ("glosses_per_term", "tokens_per_term", "tokens_per_context", "tokens_per_gloss")
    means = [(key.replace("_", " "), found[key]["mean"], found[key]["std"]) for key in keys]
    show_table("All splits", ("", "mean", "deviation"), means)
    if overlap := found["overlap"]:
        shown = [("term", overlap["term"]), ("term and gloss", overlap["term_and_gloss"])]
        show_table("Overlap of train and test", ("", "% of test"), shown)
    show_table("Sources", ("source", "entries"), list(found["sources"].items())[:20])


def _columns(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for field, separator, name in pairs:
        if not (field and separator and name):
            raise typer.BadParameter(f"{field!r} is not FIELD=NAME", param_hint="--column")
    return {field.strip(): name for field, _, name in pairs}


def _rejected(report: dict[str, Any]) -> list[tuple[str, int]]:
    return [(f"rejected: {reason}", count) for reason, count in report["rejected"].items()]


@app.command("sample")
@guarded
def sample(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders or data sets.")],
    out: Annotated[Path, typer.Option("--out", help="The .jsonl.gz file to write.")],
    train: Annotated[int, typer.Option(min=1, help="Training entries.")] = 6000,
    valid: Annotated[int, typer.Option(min=1, help="Validation entries.")] = 400,
    test: Annotated[int, typer.Option(min=1, help="Test entries.")] = 500,
    all_words: Annotated[
        bool, typer.Option("--all-words", help="Take training words that the embedded base may have seen too.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Decides which headword is in which split.")] = 42,
) -> None:
    """Draw a small sample with fixed splits, such as those that ship (`sample:wordnet`, `sample:jargon`)."""
    from lora_lexicon.data.readers import read
    from lora_lexicon.data.sample import sample as draw
    from lora_lexicon.data.sample import write_jsonl_gz

    records = draw(read(inputs, None), {"train": train, "valid": valid, "test": test}, seed, all_words)
    write_jsonl_gz(records, out)
    note(f"{len(records)} entries in {out}")
