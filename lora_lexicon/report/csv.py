"""A table as CSV: every number whole, an interval's ends and a deviation in columns of their own."""

import csv
import io

from lora_lexicon.evaluation.sheets import as_text
from lora_lexicon.report.document import Cell, Figure, Table

PARTS = ("low", "high", "deviation")


def table(table: Table, name: str = "") -> str:
    """The table in UTF-8 with a byte order mark, by which spreadsheets know it; what is absent is empty.

    A text that a spreadsheet would compute is given a quotation mark to begin with.
    """
    columns = [(at, part) for at in range(len(table.columns)) for part in ("value", *_parts(table, at))]
    text = io.StringIO()
    text.write("\ufeff")
    writer = csv.writer(text)
    writer.writerow([as_text(f"{table.columns[at]}{'' if part == 'value' else f' {part}'}") for at, part in columns])
    for row in table.rows:
        writer.writerow([_cell(row[at], part) for at, part in columns])
    return text.getvalue()


def _parts(table: Table, at: int) -> list[str]:
    """Those of an interval and a deviation that any figure of a column has."""
    figures = [row[at] for row in table.rows if isinstance(row[at], Figure)]
    return [part for part in PARTS if any(getattr(figure, part) is not None for figure in figures)]


def _cell(cell: Cell, part: str) -> str:
    if isinstance(cell, Figure):
        cell = getattr(cell, part)
    elif part != "value":
        return ""
    if cell is None:
        return ""
    return as_text(cell) if isinstance(cell, str) else repr(cell)
