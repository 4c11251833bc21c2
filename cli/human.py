"""`lora-lexicon human`: blind sheets for raters, and what their ratings say."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, show_table
from .evaluate import need_free

app = typer.Typer(no_args_is_help=True, help="Human evaluation by the five criteria of the LM-Lexicon paper.")


@app.command("export")
@guarded
def export(
    predictions: Annotated[
        list[Path],
        typer.Argument(metavar="PREDICTIONS...", help="Files of predictions of the same entries, one a system."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    raters: Annotated[int, typer.Option(min=1, max=1000, help="How many raters; each rates all definitions.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="How many entries are drawn.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides what is drawn, and each rater's order.")] = 42,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write blind, shuffled sheets, a CSV and a page for each rater, and apart from them the key."""
    from lora_lexicon.evaluation.sheets import export as write

    need_free(out, overwrite, *predictions)
    made = write(predictions, out, rows=rows, raters=raters, seed=seed, overwrite=overwrite)
    if as_json:
        emit({**made, "out": str(out)})
        return
    note(f"{made['units']:,} definitions of {made['items']:,} entries by {len(made['systems'])} systems")
    note(f"send each rater a .csv or an .html of {out / 'sheets'}; {out / 'key.json'} says who wrote what: keep it")


@app.command("import")
@guarded
def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that `human export` made.")],
    sheets: Annotated[list[Path], typer.Argument(metavar="SHEETS...", help="The sheets that came back, as CSV.")],
    partial: Annotated[bool, typer.Option("--partial", help="Take sheets in which ratings are missing.")] = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 42,
    out: Annotated[Path | None, typer.Option("--out", help="A folder to make, for `report` to show.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute means, differences, Fleiss's kappa and Krippendorff's alpha, each with its 95 % interval."""
    from lora_lexicon.evaluation.human import read_ratings, results

    if out is not None:
        need_free(out, overwrite, folder, *sheets)
    report = results(read_ratings(folder, sheets, partial=partial), seed=seed)
    if out is not None:
        from lora_lexicon.folders import new_folder, write_record
        from lora_lexicon.report.document import save
        from lora_lexicon.report.human import document_of

        with new_folder(out, replace=overwrite) as made:
            write_record(made / "report.json", report)
            save(document_of(report), made)
    if as_json:
        emit(report)
        return
    _show(report)
    if out is not None:
        note(f"written to {out}; make a report of it with: lora-lexicon report {out} --out NEW")


def _show(report: dict[str, Any]) -> None:
    from lora_lexicon.evaluation.report import comparison_rows
    from lora_lexicon.evaluation.sheets import NAMES

    rows = [
        (system, name, *_cells(found[name], "mean"), found[name]["items"])
        for system, found in report["systems"].items()
        for name in NAMES
    ]
    show_table(
        f"Means of {len(report['raters'])} raters", ("system", "criterion", "mean", "95 % interval", "items"), rows
    )
    if report["comparisons"]:
        show_table("Differences (paired bootstrap over items)", *comparison_rows(report["comparisons"]))
    for measure, title in (("fleiss_kappa", "Fleiss's kappa"), ("krippendorff_alpha", "Krippendorff's alpha, ordinal")):
        rows = [
            (whose, name, *_cells(found[name][measure], "value"))
            for whose, found in report["agreement"].items()
            for name in NAMES
        ]
        show_table(title, ("definitions of", "criterion", "agreement", "95 % interval"), rows)
    note(report["signature"])


def _cells(found: dict[str, Any], key: str) -> tuple[str, str]:
    value = "-" if found[key] is None else f"{found[key]:.3f}"
    return value, "-" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
