"""A document as GitHub's Markdown; pictures lie beside it, in pictures/."""

import re

from lora_lexicon.report.document import (
    PICTURES,
    Block,
    Cell,
    Code,
    Document,
    Examples,
    Picture,
    Table,
    Text,
    is_numeric,
    plain,
    shown,
)

_MARKS = re.compile(r"([\\`*_\[\]<>|~$&])")
_FIRST = re.compile(r"^(\d*)([-+=#.)])")  # what would begin a list, a heading, a rule


def page(document: Document) -> str:
    """The whole document."""
    parts = [f"# {inline(document.title)}", "\n".join(f"- {line(sentence)}" for sentence in document.summary)]
    for section in document.sections:
        parts += [f"## {inline(section.title)}", *map(block, section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def block(block: Block) -> str:
    """One block, without a line break at its end."""
    match block:
        case Text():
            return line(block.text)
        case Code():
            return code(block.text)
        case Table():
            return table(block)
        case Picture():
            shown = f"![{inline(block.alt)}]({PICTURES}/{block.name}.png)"
            return f"{shown}\n\n{line(block.caption)}" if block.caption else shown
        case Examples():
            return _examples(block)


def table(table: Table, level: int = 3) -> str:
    """A heading (none for a table without a title), the table, and its note; a column's best number is bold."""
    best = table.best()
    numeric = [is_numeric(table, at) for at in range(len(table.columns))]
    lines = [
        _row([inline(column) for column in table.columns]),
        _row(["---:" if right else "---" for right in numeric]),
        *(_row([_cell(cell, (i, at) in best) for at, cell in enumerate(row)]) for i, row in enumerate(table.rows)),
    ]
    parts = [f"{'#' * level} {inline(table.title)}" if table.title else "", "\n".join(lines), line(table.note)]
    return "\n\n".join(part for part in parts if part)


def inline(text: str) -> str:
    """A text on one line that Markdown shows as it is, within a line or a cell."""
    return _MARKS.sub(r"\\\1", " ".join(plain(text).split()))


def line(text: str) -> str:
    """The same for a line's beginning."""
    return _FIRST.sub(r"\1\\\2", inline(text))


def code(text: str) -> str:
    """A fenced block; the fence is longer than any within."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{plain(text)}\n{fence}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell, best: bool) -> str:
    text = inline(shown(cell))
    return f"**{text}**" if best else text


def _examples(examples: Examples) -> str:
    """Each example as a paragraph with a table of what the systems wrote."""
    parts = [f"### {inline(examples.title)}"]
    for number, row in enumerate(examples.rows, 1):
        context = f": {inline(row.context)}" if row.context else ""
        parts.append(f"{number}. **{inline(row.term)}**{context}\n\n   reference: {inline(row.reference)}")
        parts.append(table(examples.side_by_side(number - 1)))
    return "\n\n".join(parts)
