"""A report as plain data: sections of text, commands, tables, pictures and examples, and the folder that it lies in.

FOLDER/document.json, FOLDER/pictures/NAME.png. Knows nothing of how a report is shown, nor of what was measured.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_lexicon.errors import DataError
from lora_lexicon.folders import CONTROL, MAX_RECORD_BYTES, read_record, write_record, write_whole

RECORD = "document.json"
PICTURES = "pictures"
FORMAT_VERSION = 1
MAX_PICTURE_BYTES = 16 * 2**20
MAX_PICTURES = 200
ABSENT = "–"
_PNG = b"\x89PNG\r\n\x1a\n"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

T = TypeVar("T")
Better = Literal["high", "low", ""]


@dataclass(frozen=True)
class Figure:
    """A number with its interval, its deviation over seeds, or both; None where there is none.

    Attributes:
        digits: after the point, of all four, where it is shown.
        signed: a plus stands before what is above 0, as in a difference.

    Raises:
        DataError: a number that is not finite, or half an interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    digits: int = 2
    signed: bool = False

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high, self.deviation):
            _check_number(number)
        if (self.low is None) != (self.high is None):
            raise DataError("a figure's interval needs both ends: give low and high, or neither")
        if not 0 <= self.digits <= 12:
            raise DataError(f"a figure is shown with 0 to 12 digits after the point, not {self.digits}")

    def __str__(self) -> str:
        """Such as `45.69 ± 0.31 [44.90, 46.40]`."""
        if self.value is None:
            return ABSENT
        parts = [self.number(self.value)]
        if self.deviation is not None:
            parts.append(f"± {self.deviation:,.{self.digits}f}")
        if self.low is not None and self.high is not None:
            parts.append(f"[{self.number(self.low)}, {self.number(self.high)}]")
        return " ".join(parts)

    def number(self, value: float) -> str:
        """A number as this figure shows it."""
        return f"{value:{'+' if self.signed else ''},.{self.digits}f}"


Cell = str | int | float | None | Figure


@dataclass(frozen=True)
class Text:
    """A paragraph, without markup."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands, or anything else whose spaces and lines matter."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; what has numbers in a column is compared by them.

    Attributes:
        better: per column whether high or low numbers are better, "" where neither; its best is set off. Empty: no
            column says.

    Raises:
        DataError: a row of another length than `columns`, or a value that is no `Cell`.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    better: Sequence[Better] = ()

    def __post_init__(self) -> None:
        _freeze(self, "columns", tuple(self.columns))
        _freeze(self, "rows", tuple(tuple(row) for row in self.rows))
        _freeze(self, "better", tuple(self.better))
        if not self.columns:
            raise DataError(f"table {self.title!r} has no columns")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise DataError(f"table {self.title!r}: each row must have {len(self.columns)} cells, one a column")
        if self.better and len(self.better) != len(self.columns):
            raise DataError(f"table {self.title!r}: `better` must say something of each of {len(self.columns)} columns")
        for row in self.rows:
            for cell in row:
                if not isinstance(cell, str | int | float | Figure | None):
                    raise DataError(
                        f"table {self.title!r}: a cell holds a {type(cell).__name__}: give text or a number"
                    )
                if isinstance(cell, int | float):
                    _check_number(cell)

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of each column's best number, and of its equals; none where all are equal."""
        found: set[tuple[int, int]] = set()
        for at, better in enumerate(self.better):
            numbers = {i: number for i, row in enumerate(self.rows) if (number := number_of(row[at])) is not None}
            if better and len(set(numbers.values())) > 1:
                top = max(numbers.values()) if better == "high" else min(numbers.values())
                found |= {(i, at) for i, number in numbers.items() if number == top}
        return found


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: of its file, without the ending; no two of a document share one.
        alt: what a person who cannot see it must know.

    Raises:
        DataError: a name that cannot be a file's, no `alt`, or bytes that are no PNG or too many.
    """

    name: str
    png: bytes = field(repr=False)
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataError(f"picture {self.name!r}: a name has 1 to 64 letters, digits, - and _")
        if not self.alt.strip():
            raise DataError(f"picture {self.name!r} has no alternative text: say what it shows")
        if not self.png.startswith(_PNG):
            raise DataError(f"picture {self.name!r} is not a PNG")
        if len(self.png) > MAX_PICTURE_BYTES:
            raise DataError(f"picture {self.name!r} is larger than {MAX_PICTURE_BYTES >> 20} MiB")


@dataclass(frozen=True)
class Written:
    """What one system wrote for an example: its score and the expert that answered, where they are known."""

    text: str
    score: float | None = None
    domain: str = ""

    def __post_init__(self) -> None:
        _check_number(self.score)


@dataclass(frozen=True)
class Example:
    """One entry, and what each system wrote for it, in the order of `Examples.systems`."""

    term: str
    context: str
    reference: str
    written: Sequence[Written]

    def __post_init__(self) -> None:
        _freeze(self, "written", tuple(self.written))


@dataclass(frozen=True)
class Examples:
    """Entries with what several systems wrote, side by side; `measure` names the score.

    Raises:
        DataError: an example without as many definitions as there are systems.
    """

    title: str
    systems: Sequence[str]
    rows: Sequence[Example]
    measure: str = "BLEU"

    def __post_init__(self) -> None:
        _freeze(self, "systems", tuple(self.systems))
        _freeze(self, "rows", tuple(self.rows))
        if any(len(row.written) != len(self.systems) for row in self.rows):
            raise DataError(
                f"examples {self.title!r}: each row must have {len(self.systems)} definitions, one a system"
            )

    def side_by_side(self, row: int) -> Table:
        """What the systems wrote for one example, as a table without a title."""
        written = self.rows[row].written
        cells = [
            [system, own.text, Figure(own.score), own.domain or None]
            for system, own in zip(self.systems, written, strict=True)
        ]
        return Table("", ("system", "definition", self.measure, "expert"), cells, better=("", "", "high", ""))

    def table(self) -> Table:
        """All of them as one table, a row for each definition."""
        cells = [
            [row.term, row.context, row.reference, *cells]
            for i, row in enumerate(self.rows)
            for cells in self.side_by_side(i).rows
        ]
        columns = ("term", "context", "reference", "system", "definition", self.measure, "expert")
        return Table(self.title, columns, cells)


Block = Text | Code | Table | Picture | Examples


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    def __post_init__(self) -> None:
        _freeze(self, "blocks", tuple(self.blocks))


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        summary: what a person should know first, a sentence or two each.

    Raises:
        DataError: two pictures of one name, or more than `MAX_PICTURES`.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]

    def __post_init__(self) -> None:
        _freeze(self, "summary", tuple(self.summary))
        _freeze(self, "sections", tuple(self.sections))
        names = [picture.name.lower() for picture in self.pictures()]  # on some disks a and A are one file
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"two pictures of the document are called {name!r}: give each its own name")
        if len(names) > MAX_PICTURES:
            raise DataError(f"{len(names)} pictures in one document: {MAX_PICTURES} at most")

    def blocks(self) -> Iterator[Block]:
        """All blocks, in order."""
        for section in self.sections:
            yield from section.blocks

    def pictures(self) -> list[Picture]:
        return [block for block in self.blocks() if isinstance(block, Picture)]

    def tables(self) -> list[Table]:
        return [block for block in self.blocks() if isinstance(block, Table)]


def shown(cell: Cell) -> str:
    """A cell for a person: a float to four significant digits, unless it is a `Figure`."""
    if cell is None:
        return ABSENT
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return plain(str(cell))


def number_of(cell: Cell) -> float | None:
    """What a cell is compared by, None for one without a number."""
    if isinstance(cell, Figure):
        return cell.value
    return float(cell) if isinstance(cell, int | float) and not isinstance(cell, bool) else None


def is_numeric(table: Table, at: int) -> bool:
    """Whether a column holds numbers, and at most gaps beside them."""
    cells = [row[at] for row in table.rows]
    kinds = [isinstance(cell, int | float | Figure) and not isinstance(cell, bool) for cell in cells]
    return any(kinds) and all(kind or cell is None for kind, cell in zip(kinds, cells, strict=True))


def plain(text: str) -> str:
    """A text without what could change how the text around it is shown."""
    return CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def save(document: Document, folder: Path) -> None:
    """Writes a document into a folder that exists, such as one that is being made.

    Raises:
        DataError: it is too large to be read back, or holds half of a character.
    """
    record = {
        "format": FORMAT_VERSION,
        "title": document.title,
        "summary": list(document.summary),
        "sections": [
            {"title": section.title, "blocks": [_record(block) for block in section.blocks]}
            for section in document.sections
        ],
    }
    try:
        write_record(folder / RECORD, record)
    except UnicodeEncodeError as error:
        raise DataError(f"{folder / RECORD}: a text of the report holds half of a character") from error
    if (folder / RECORD).stat().st_size > MAX_RECORD_BYTES:
        raise DataError(f"{folder / RECORD} would be larger than {MAX_RECORD_BYTES >> 20} MiB: show fewer rows")
    for picture in document.pictures():
        (folder / PICTURES).mkdir(exist_ok=True)
        write_whole(folder / PICTURES / f"{picture.name}.png", picture.png)


def load_document(folder: Path) -> Document:
    """Reads what `save` wrote.

    Raises:
        DataError: it is missing or damaged, or a picture is.
    """
    path = folder / RECORD
    record = read_record(path, DataError, "a report")
    if record.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {record.get('format')!r}, this version reads {FORMAT_VERSION}: make it again"
        )
    try:
        sections = [
            Section(_get(section, "title", str), [_block(block, folder) for block in _get(section, "blocks", list)])
            for section in _get(record, "sections", list)
        ]
        return Document(_get(record, "title", str), _list(record, "summary", _text), sections)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _record(block: Block) -> dict[str, Any]:
    """A block in JSON; a picture without its bytes."""
    kind = {"kind": type(block).__name__.lower()}
    if isinstance(block, Picture):
        return kind | {"name": block.name, "alt": block.alt, "caption": block.caption}
    return kind | asdict(block)


def _block(record: Any, folder: Path) -> Block:
    kind = _get(record, "kind", str)
    if kind == "text":
        return Text(_get(record, "text", str))
    if kind == "code":
        return Code(_get(record, "text", str))
    if kind == "table":
        return Table(
            _get(record, "title", str),
            _list(record, "columns", _text),
            _list(record, "rows", lambda row: [_cell(cell) for cell in _typed(row, list, "a row")]),
            _get(record, "note", str),
            _list(record, "better", _better),
        )
    if kind == "picture":
        name = _get(record, "name", str)
        return Picture(name, _png(folder, name), _get(record, "alt", str), _get(record, "caption", str))
    if kind == "examples":
        rows = _list(record, "rows", _example)
        return Examples(_get(record, "title", str), _list(record, "systems", _text), rows, _get(record, "measure", str))
    raise DataError(f"a block of kind {kind!r} is unknown: text, code, table, picture or examples is expected")


def _example(record: Any) -> Example:
    return Example(
        _get(record, "term", str),
        _get(record, "context", str),
        _get(record, "reference", str),
        _list(
            record, "written", lambda of: Written(_get(of, "text", str), _number(of, "score"), _get(of, "domain", str))
        ),
    )


def _cell(value: Any) -> Cell:
    if isinstance(value, dict):
        numbers = [_number(value, key) for key in ("value", "low", "high", "deviation")]
        return Figure(*numbers, digits=_get(value, "digits", int), signed=_get(value, "signed", bool))
    return value  # of which `Table` checks the kind


def _png(folder: Path, name: str) -> bytes:
    if not _NAME.fullmatch(name):
        raise DataError(f"picture {name!r}: a name has 1 to 64 letters, digits, - and _")
    path = folder / PICTURES / f"{name}.png"
    if not path.is_file() or path.is_symlink():
        raise DataError(f"picture {name!r} is missing: {path} is no file")
    with path.open("rb") as file:
        return file.read(MAX_PICTURE_BYTES + 1)  # `Picture` refuses the one byte too many


def _get(record: Any, key: str, kind: type[T]) -> T:
    record = _typed(record, dict, "a part of the report")
    if key not in record:
        raise DataError(f"{key!r} is missing from one of its parts")
    return _typed(record[key], kind, repr(key))


def _list(record: Any, key: str, read: Callable[[Any], T]) -> list[T]:
    return [read(value) for value in _get(record, key, list)]


def _text(value: Any) -> str:
    return _typed(value, str, "a value")


def _better(value: Any) -> Better:
    if value not in ("high", "low", ""):
        raise DataError(f"'better' of a column is high, low or empty, not {value!r}")
    return value


def _number(record: Any, key: str) -> float | None:
    record = _typed(record, dict, "a part of the report")
    value = record.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise DataError(f"{key!r} must be a number or null, not {value!r}")
    return value


def _typed(value: Any, kind: type[T], what: str) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{what} must be a {kind.__name__}, not a {type(value).__name__}")
    return value


def _check_number(number: float | None) -> None:
    """Also of whole numbers: one of hundreds of digits would be no float."""
    try:
        finite = number is None or math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite:
        raise DataError("a number of the report is not finite: give None where there is none")


def _freeze(of: Any, name: str, value: tuple[Any, ...]) -> None:
    object.__setattr__(of, name, value)
