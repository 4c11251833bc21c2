"""A document as one page that holds all it shows: no script, and nothing is fetched. Its policy allows no more."""

import base64
import hashlib
from html import escape
from importlib.resources import files as resources

from lora_lexicon.report.document import (
    Block,
    Cell,
    Code,
    Document,
    Examples,
    Figure,
    Picture,
    Section,
    Table,
    Text,
    is_numeric,
    plain,
    shown,
)


def page(document: Document) -> str:
    """The whole page."""
    style = (resources("lora_lexicon.report") / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    title, named = text(document.title), list(enumerate(document.sections, 1))
    links = "".join(f'<li><a href="#s{number}">{text(section.title)}</a></li>' for number, section in named)
    summary = "".join(f"<li>{text(sentence)}</li>" for sentence in document.summary)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{f'<section aria-label="Summary"><ul class="summary">{summary}</ul></section>' if summary else ""}
{f'<nav aria-label="Sections"><ol>{links}</ol></nav>' if links else ""}
</header>
<main>
{"".join(_section(section, f"s{number}") for number, section in named)}
</main>
</body>
</html>
"""


def text(value: str) -> str:
    """A text as it may stand anywhere in the page."""
    return escape(plain(value))


def _section(section: Section, name: str) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f'<section>\n<h2 id="{name}">{text(section.title)}</h2>\n{blocks}\n</section>\n'


def _block(block: Block) -> str:
    match block:
        case Text():
            return f"<p>{text(block.text)}</p>"
        case Code():  # the parser drops a line break that comes first
            return f'<pre tabindex="0"><code>\n{text(block.text)}</code></pre>'
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Examples():
            return _examples(block)


def _table(table: Table, label: str = "") -> str:
    """A table that scrolls by itself where it is too wide; `label` names one that has no title."""
    best = table.best()
    numeric = [' class="number"' if is_numeric(table, at) else "" for at in range(len(table.columns))]
    heads = zip(table.columns, numeric, strict=True)
    head = "".join(f'<th scope="col"{kind}>{text(column) or _NO_HEAD}</th>' for column, kind in heads)
    rows = []
    for i, row in enumerate(table.rows):
        cells = [_cell(cell, (i, at) in best) for at, cell in enumerate(row)]
        first = f'<th scope="row"{numeric[0]}>{cells[0]}</th>'
        rest = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells[1:], numeric[1:], strict=True))
        rows.append(f"<tr>{first}{rest}</tr>")
    caption = f"<caption><span>{text(table.title)}</span></caption>" if table.title else ""
    note = f'<p class="note">{text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="group" aria-label="{text(table.title or label)}" tabindex="0"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>{note}"
    )


def _cell(cell: Cell, best: bool) -> str:
    """A cell's text; an interval goes below its number."""
    found = text(shown(cell))
    if isinstance(cell, Figure) and cell.value is not None and cell.low is not None:
        number, interval = found.rsplit(" [", 1)
        found = f"{f'<strong>{number}</strong>' if best else number} <small>[{interval}</small>"
    elif best:
        found = f"<strong>{found}</strong>"
    return found


_NO_HEAD = '<span class="unseen">name</span>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = f"<figcaption>{text(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f'<figure><div class="scroll" role="group" aria-label="Picture: {text(picture.name)}" tabindex="0">'
        f'<img alt="{text(picture.alt)}" src="data:image/png;base64,{data}"></div>{caption}</figure>'
    )


def _examples(examples: Examples) -> str:
    parts = [f"<h3>{text(examples.title)}</h3>"]
    for i, row in enumerate(examples.rows):
        context = f"<dt>in context</dt><dd>{text(row.context)}</dd>" if row.context else ""
        table = _table(examples.side_by_side(i), f"Definitions of {row.term}, {examples.title}, {i + 1}")
        parts.append(
            f"<article><h4>{text(row.term)}</h4><dl>{context}<dt>reference</dt><dd>{text(row.reference)}</dd></dl>"
            f"{table}</article>"
        )
    return "\n".join(parts)
