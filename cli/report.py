"""`lora-lexicon report`: what was measured, for a person to read."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, progress

if TYPE_CHECKING:
    from lora_lexicon.report.document import Document


class Format(StrEnum):
    """How a report is written."""

    html = "html"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


@guarded
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="What `evaluate --out` made; several of the same entries become one report. Or one folder with a "
            "finished report (document.json).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    formats: Annotated[
        list[Format] | None,
        typer.Option("--format", help="How it is written; by default in all four ways. Repeatable."),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, max=100, help="How many examples each: the best, the worst, and drawn at random.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Of the examples drawn at random.")] = 42,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a report: one HTML page that holds all it shows, Markdown, LaTeX tables, and CSV."""
    from lora_lexicon.report.write import FORMATS, write_report

    from .evaluate import need_free

    need_free(out, overwrite, *folders)
    document = _document(folders, examples, seed)
    made = write_report(document, out, [each.value for each in formats or ()] or FORMATS, overwrite=overwrite)
    if as_json:
        emit({"out": str(out), "files": list(map(str, made)), "title": document.title, "summary": document.summary})
        return
    for sentence in document.summary:
        typer.echo(sentence)
    note(f"written: {', '.join(map(str, made))}")


def _document(folders: list[Path], examples: int, seed: int) -> "Document":
    from lora_lexicon.errors import DataError
    from lora_lexicon.evaluation.saved import read_evaluations
    from lora_lexicon.report.document import RECORD, load_document
    from lora_lexicon.report.evaluation import document_of

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("a folder is given twice: give each once")
    finished = [folder for folder in folders if (folder / RECORD).is_file()]
    if finished and len(folders) > 1:
        raise DataError(f"{finished[0]} holds a finished report: give it alone, and evaluations together")
    if finished:
        return load_document(finished[0])
    saved = [read_evaluations(folder) for folder in folders]
    with progress() as bar:
        task = bar.add_task("looking for leaks", total=None, visible=False)
        return document_of(
            saved,
            examples=examples,
            seed=seed,
            progress=lambda more, rows: bar.update(task, advance=more, total=rows, visible=True),
        )
