"""A document as files: OUT/report.html, report.md, latex/, csv/, and what they were made of. Knows no measurement.

OUT/document.json, pictures/  the report itself, which `lora-lexicon report OUT` renders again
OUT/report.html               one page, all in it
OUT/report.md                 with pictures/
OUT/latex/NN-NAME.tex         a table each
OUT/csv/NN-NAME.csv           a table each
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_lexicon.folders import new_folder, write_whole
from lora_lexicon.report import csv, html, latex, markdown
from lora_lexicon.report.document import Document, Examples, Table, save

Format = Literal["html", "markdown", "latex", "csv"]
FORMATS: tuple[Format, ...] = ("html", "markdown", "latex", "csv")
PAGE, MARKDOWN = "report.html", "report.md"


def write_report(
    document: Document, out: Path, formats: Sequence[Format] = FORMATS, *, overwrite: bool = False
) -> list[Path]:
    """Writes a document into a new folder, in each of the formats; returns what a reader opens, in order.

    Raises:
        LexiconError: `out` exists (unless `overwrite`), or cannot be written.
    """
    made: list[Path] = []
    with new_folder(out, replace=overwrite) as folder:
        save(document, folder)
        if "html" in formats:
            write_whole(folder / PAGE, html.page(document).encode())
            made.append(out / PAGE)
        if "markdown" in formats:
            write_whole(folder / MARKDOWN, markdown.page(document).encode())
            made.append(out / MARKDOWN)
        for name, suffix, render in (("latex", ".tex", latex.table), ("csv", ".csv", csv.table)):
            if name in formats:
                (folder / name).mkdir()
                for file, table in named_tables(document):
                    write_whole(folder / name / f"{file}{suffix}", render(table, file).encode())
                made.append(out / name)
    return made


def named_tables(document: Document) -> list[tuple[str, Table]]:
    """(a file's name without its ending, table) of all tables, and of examples as tables, in order."""
    found = [
        block.table() if isinstance(block, Examples) else block
        for block in document.blocks()
        if isinstance(block, Table | Examples)
    ]
    return [(f"{number:02}-{slug(table.title)}", table) for number, table in enumerate(found, 1)]


def slug(title: str) -> str:
    """A title as a part of a file's name: lower-case letters and digits of ASCII, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:48].strip("-") or "table"
