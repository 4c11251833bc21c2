"""Reports as documents and as files: what is written can be read back, whatever the texts in it are."""

import csv
import io
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.errors import DataError, LexiconError
from lora_lexicon.report import html, latex, markdown
from lora_lexicon.report.csv import table as to_csv
from lora_lexicon.report.document import (
    Cell,
    Code,
    Document,
    Example,
    Examples,
    Figure,
    Picture,
    Section,
    Table,
    Text,
    Written,
    load_document,
    plain,
    save,
    shown,
)
from lora_lexicon.report.write import write_report


def png(width: int = 2, height: int = 2) -> bytes:
    """A white picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    rows = (b"\0" + b"\xff\xff\xff" * width) * height
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


HOSTILE = [
    '<img src=x onerror="window.hit = 1">', "</td></tr></table><script>window.hit = 1</script>", "a|b\\|c", "`x``y`",
    "=1+1", "-2", "@cmd", "\\end{tabular}", "100 % of $x_1^2$ & {more} #~", "[*]", "a\nb", "\x00\x1b[31m\u202e",
    "&amp;",
]  # fmt: skip
texts = st.sampled_from(HOSTILE) | st.text(max_size=20)
numbers = st.floats(-1e6, 1e6).map(lambda value: value + 0.0)
figures = st.builds(
    lambda value, low, *rest: Figure(value, low, None if low is None else low + 1, *rest),
    st.none() | numbers, st.none() | numbers, st.none() | numbers, st.integers(0, 4), st.booleans(),
)  # fmt: skip
cells = st.none() | texts | st.integers(-(10**9), 10**9) | numbers | st.booleans() | figures


@st.composite
def tables(draw: Any) -> Table:
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(cells, min_size=width, max_size=width), max_size=4))
    better = draw(st.lists(st.sampled_from(["high", "low", ""]), min_size=width, max_size=width) | st.just([]))
    columns = draw(st.lists(texts, min_size=width, max_size=width))
    return Table(draw(texts), columns, rows, draw(texts), better)


examples = st.builds(
    lambda title, rows: Examples(title, ["one", "two"], rows),
    texts,
    st.lists(
        st.builds(
            Example, texts, texts, texts,
            st.lists(st.builds(Written, texts, st.none() | numbers, texts), min_size=2, max_size=2),
        ),
        max_size=3,
    ),
)  # fmt: skip
blocks = st.builds(Text, texts) | st.builds(Code, texts) | tables() | examples
documents = st.builds(
    lambda title, summary, sections: Document(title, summary, sections),
    texts, st.lists(texts, max_size=3), st.lists(st.builds(Section, texts, st.lists(blocks, max_size=3)), max_size=3),
)  # fmt: skip
PICTURE = Picture("a-map", png(), "white all over")


@given(documents)
@settings(max_examples=50, deadline=None)
def test_a_document_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, document: Document) -> None:
    folder = tmp_path_factory.mktemp("document")
    with_picture = Document(document.title, document.summary, [*document.sections, Section("last", [PICTURE])])
    save(with_picture, folder)
    assert load_document(folder) == with_picture
    assert load_document(folder).pictures()[0].png == png()


class Cells(HTMLParser):
    """The text of each cell, row by row, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def document_of(*blocks: Any) -> Document:
    return Document("title", ["sentence"], [Section("section", blocks)])


@given(tables())
@settings(deadline=None)
def test_html_shows_the_cells_as_they_are(table: Table) -> None:
    found = Cells(html.page(document_of(table)))
    assert found.rows[0] == [plain(column) or "name" for column in table.columns]
    assert found.rows[1:] == [[shown(cell) for cell in row] for row in table.rows]


@given(documents)
@settings(deadline=None)
def test_hostile_text_makes_no_elements(document: Document) -> None:
    ours = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "section", "ul", "li",
        "nav", "ol", "a", "main", "p", "pre", "code", "div", "table", "caption", "thead", "tbody", "tr", "th", "td",
        "strong", "small", "span", "article", "dl", "dt", "dd",
    }  # fmt: skip
    assert Cells(html.page(document)).tags <= ours


@given(tables())
@settings(deadline=None)
def test_csv_holds_the_values(table: Table) -> None:
    text = to_csv(table)
    assert text.startswith("\ufeff")
    head, *rows = csv.reader(io.StringIO(text[1:], newline=""))
    assert len(rows) == len(table.rows)
    assert all(not cell.startswith(("=", "+", "@")) for row in [head, *rows] for cell in row)
    for row, found in zip(table.rows, rows, strict=True):
        left = iter(found)
        for at, cell in enumerate(row):
            column: list[Cell] = [other[at] for other in table.rows]
            kept = [
                part
                for part in ("low", "high", "deviation")
                if any(isinstance(other, Figure) and getattr(other, part) is not None for other in column)
            ]
            whole = isinstance(cell, Figure)
            for part in [getattr(cell, key) for key in ("value", *kept)] if whole else [cell, *(None for _ in kept)]:
                text = next(left)
                if part is None:
                    assert text == ""
                elif isinstance(part, str):
                    assert text in (part, f"'{part}")
                else:
                    assert text == repr(part)
                    assert isinstance(part, bool) or float(text) == part
        assert next(left, None) is None


def unescaped(text: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


@given(tables())
@settings(deadline=None)
def test_markdown_rows_have_a_cell_a_column(table: Table) -> None:
    lines = [line for line in markdown.table(table).split("\n") if line.startswith("| ")]
    assert len(lines) == len(table.rows) + 2
    best = table.best()
    for i, (line, row) in enumerate(zip(lines[2:], table.rows, strict=True)):
        found = line[2:-2].split(" | ")  # a cell's own | has a backslash before it
        texts = [unescaped(cell).strip() for cell in found]
        expected = [" ".join(shown(cell).split()) for cell in row]
        expected = [f"**{cell}**" if (i, at) in best else cell for at, cell in enumerate(expected)]
        assert texts == expected
        assert not re.search(r"(?<!\\)(?:\\\\)*[`<$]", re.sub(r"\\.", "", line))


@given(st.sampled_from(HOSTILE) | st.text())
@settings(deadline=None)
def test_a_fence_is_longer_than_what_it_holds(text: str) -> None:
    first, *lines, last = markdown.code(text).split("\n")
    assert first == last
    assert all(not line.startswith(first) for line in lines)


@given(st.sampled_from(HOSTILE) | st.text())
@settings(deadline=None)
def test_latex_escapes_and_nothing_is_lost(text: str) -> None:
    found = latex.escape(text)
    back = {escaped: char for char, escaped in latex._ESCAPES.items() if not char.isspace()}
    pattern = "|".join(map(re.escape, sorted(back, key=len, reverse=True)))
    unescaped = re.sub(rf"(?P<known>{pattern})|\{{\}}", lambda m: back[m["known"]] if m["known"] else "", found)
    assert unescaped == plain(text).replace("\n", " ").replace("\t", " ")
    assert not re.search(r"[\\{}%$#&_~^]", re.sub(rf"{pattern}|\{{\}}", "", found))
    assert "--" not in found
    assert "\n" not in found


def test_latex_is_a_booktabs_table_with_the_best_bold() -> None:
    rows = [["a_b", Figure(1.5, 1, 2)], ["[c]", Figure(-2.5, deviation=0.25)], ["d", None]]
    made = latex.table(Table("Loss & more", ["system", "loss"], rows, "note", ["", "low"]), "01-loss")
    assert r"\begin{tabular}{lr}" in made
    assert r"a\_b & 1.50 {[}1.00, 2.00{]} \\" in made
    assert r"{[}c{]} & \textbf{$-$2.50 $\pm$ 0.25} \\" in made
    assert r"d & -- \\" in made
    assert made.index(r"\toprule") < made.index(r"\midrule") < made.index(r"\bottomrule")
    assert r"\caption{Loss \& more}" in made


def test_figures_show_what_they_have() -> None:
    assert str(Figure(45.69, deviation=0.31)) == "45.69 ± 0.31"
    assert str(Figure(45.69, 44.9, 46.4, digits=1)) == "45.7 [44.9, 46.4]"
    assert str(Figure(0.5, signed=True)) == "+0.50"
    assert str(Figure(None)) == shown(None) == "–"
    assert (shown(1234567), shown(0.123456), shown(12345.6), shown(True)) == ("1,234,567", "0.1235", "12,346", "yes")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Figure(float("nan")), "not finite"),
        (lambda: Figure(1.0, low=0.5), "both ends"),
        (lambda: Figure(10**400), "not finite"),
        (lambda: Table("t", ["a"], [[1, 2]]), "1 cells"),
        (lambda: Table("t", ["a"], [[b"x"]]), "bytes"),
        (lambda: Table("t", ["a"], [[1]], better=["low", "low"]), "better"),
        (lambda: Picture("../x", png(), "x"), "letters, digits"),
        (lambda: Picture("x", png(), " "), "alternative text"),
        (lambda: Picture("x", b"GIF89a", "x"), "not a PNG"),
        (lambda: Examples("e", ["one"], [Example("t", "", "r", [])]), "1 definitions"),
        (lambda: document_of(PICTURE, Picture("A-MAP", png(), "x")), "own name"),
    ],
)
def test_what_no_document_may_hold_is_refused(make: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        make()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda record: record.pop("title"), "'title' is missing"),
        (lambda record: record.update(format=9), "format 9"),
        (lambda record: record.update(sections={}), "must be a list"),
        (lambda record: record["sections"][0]["blocks"].append({"kind": "script"}), "kind 'script'"),
        (lambda record: record["sections"][0]["blocks"].append(7), "must be a dict"),
        (lambda record: record["sections"][0]["blocks"][0].update(name="../../etc"), "letters, digits"),
        (lambda record: record["sections"][0]["blocks"][0].update(name="other"), "missing"),
        (lambda record: record["sections"][0]["blocks"][0].update(alt=""), "alternative text"),
        (lambda record: record["sections"][0]["blocks"][1]["rows"].append([{"value": "x"}]), "must be a number"),
        (lambda record: record["sections"][0]["blocks"][1]["rows"].append([[]]), "a cell holds a list"),
        (lambda record: record["sections"][0]["blocks"][1].update(better=["most"]), "high, low or empty"),
    ],
)  # fmt: skip
def test_a_damaged_document_is_one_line(tmp_path: Path, damage: Any, said: str) -> None:
    save(document_of(PICTURE, Table("t", ["a"], [[Figure(1.0)]])), tmp_path)
    record = json.loads((tmp_path / "document.json").read_text())
    damage(record)
    (tmp_path / "document.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=said) as raised:
        load_document(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_half_of_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="half of a character"):
        save(document_of(Text("\ud800")), tmp_path)


def test_a_report_is_files_that_are_whole(tmp_path: Path) -> None:
    written = Example("term", "in context", "reference", [Written("text", 12.5, "river"), Written("")])
    table = Table("Systems, side by side", ["system", "BLEU"], [["a", Figure(1.0, 0.5, 1.5)]])
    document = document_of(PICTURE, table, Code("lora-lexicon report x"), Examples("Best", ["a", "b"], [written]))
    made = write_report(document, tmp_path / "out")
    assert [path.name for path in made] == ["report.html", "report.md", "latex", "csv"]
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    tables = ("01-systems-side-by-side", "02-best")
    assert files == {
        "document.json", "report.html", "report.md", "pictures/a-map.png",
        *(f"latex/{name}.tex" for name in tables), *(f"csv/{name}.csv" for name in tables),
    }  # fmt: skip
    assert "![white all over](pictures/a-map.png)" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(LexiconError, match="add --overwrite"):
        write_report(document, tmp_path / "out")
    write_report(load_document(tmp_path / "out"), tmp_path / "out", ["csv"], overwrite=True)
    assert not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "csv" / "01-systems-side-by-side.csv").is_file()
