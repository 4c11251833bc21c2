"""CSV and TSV with named columns, and 3D-EX in both of its CSV shapes.

A row that cannot be parsed costs that row alone: a quotation mark that is never closed would
swallow the rows after it, so reading starts again on the next line.
"""

import ast
import csv
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers.columns import ALIASES, match
from lora_lexicon.data.readers.jsonl import row_of
from lora_lexicon.data.readers.source import Options, lines, stem
from lora_lexicon.errors import DataError

MAX_FIELD = 4 * 2**20  # characters; a merged 3D-EX row can hold thousands of examples
MAX_RECORD_LINES = 1000  # a field with more line breaks is an unclosed quotation mark
_MISSING = ("", "nan", "NaN", "None", "null")


def format_of(header: str) -> str | None:
    """csv, tsv or 3dex for a header line with a term and a definition column, else None."""
    for delimiter, kind in (("\t", "tsv"), (_comma(header), "csv")):
        names = {name.strip().casefold() for name in next(csv.reader([header], delimiter=delimiter), [])}
        if {"definition", "example", "dataset_name"} <= names and {"term", "word"} & names:
            return "3dex" if kind == "csv" else kind
        if names & set(ALIASES["term"]) and names & set(ALIASES["definition"]):
            return kind
    if header.count("\t") or header.count(_comma(header)):  # columns of other names, which --column may name
        return "tsv" if header.count("\t") else "csv"
    return None


def read_csv(path: Path, options: Options) -> Iterator[Row]:
    """Yields one row per record of a file separated by commas or, as some countries' spreadsheets do, semicolons."""
    header = next((text for _, text in lines(path, options) if text), "")
    return _read(path, options, _comma(header))


def read_tsv(path: Path, options: Options) -> Iterator[Row]:
    """Yields one row per record of a tab-separated file."""
    return _read(path, options, "\t")


def read_3dex(path: Path, options: Options) -> Iterator[Row]:
    """Yields one row per record of 3D-EX, merged (lists as text) or per component (plain text).

    A row of several sources names them all, joined by "; ".
    """
    merged: bool | None = None
    for fields, columns, number, error in _records(path, options, ","):
        if error:
            yield Row(str(path), number, error=error)
            continue
        merged = "split" not in columns if merged is None else merged
        examples = listed(fields.get(columns.get("context", ""), ""), strict=merged)
        sources = listed(fields.get(columns.get("source", ""), ""), strict=False)
        if examples is None or sources is None:
            yield Row(str(path), number, error="unreadable list of examples")
            continue
        definition = fields[columns["definition"]]
        # The merged file's authors write each source list as text once more: "[\"['Urban', 'WordNet']\"]".
        flat = (name for source in sources if source is not None for name in listed(str(source), strict=False) or ())
        names = dict.fromkeys(str(name).strip() for name in flat)
        record = {
            **fields,
            columns["definition"]: None if definition in _MISSING else definition,
            columns.get("context", ""): examples,
            columns.get("source", ""): "; ".join(name for name in names if name not in _MISSING),
        }
        yield row_of(record, columns, str(path), number, options.source or stem(path))


def _comma(header: str) -> str:
    """What separates the columns of a CSV with this header line."""
    return ";" if ";" in header and "," not in header else ","


def listed(text: str, *, strict: bool) -> list[object] | None:
    """The items of a list written as Python text, however nested, or plain text as its one item.

    Text that opens like a list and is none is plain text, or None when `strict`. Nothing in it is
    evaluated: only lists, tuples, sets, strings and numbers are read.
    """
    stripped = text.strip()
    if stripped in _MISSING:
        return []
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [text]
    try:
        with warnings.catch_warnings():  # an invalid escape in someone's example is not our user's concern
            warnings.simplefilter("ignore")
            tree = ast.parse(stripped, mode="eval")
        return list(_items(tree.body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None if strict else [text]


def _items(node: ast.expr) -> Iterator[object]:
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        for item in node.elts:
            yield from _items(item)
    elif isinstance(node, ast.Constant):
        yield node.value
    elif isinstance(node, ast.Name) and node.id in ("nan", "NaN"):
        yield None
    else:
        raise ValueError(f"a list of examples holds {type(node).__name__}")


def _read(path: Path, options: Options, delimiter: str) -> Iterator[Row]:
    for fields, columns, number, error in _records(path, options, delimiter):
        if error:
            yield Row(str(path), number, error=error)
        else:
            yield row_of(fields, columns, str(path), number, options.source or stem(path))


def _records(path: Path, options: Options, delimiter: str) -> Iterator[tuple[dict[str, str], dict[str, str], int, str]]:
    """Yields (values by column, column of each field, first line, error or "")."""
    csv.field_size_limit(MAX_FIELD)
    source = _Lines(path, options)
    records = csv.reader(source, delimiter=delimiter, strict=True)
    header: list[str] = []
    columns: dict[str, str] = {}
    while True:
        source.taken.clear()
        try:
            values, error = next(records), ""
        except StopIteration:
            return
        except csv.Error as cause:
            values, error = [], "overlong field" if "field larger" in str(cause) else "broken row"
        if not source.taken:
            return
        number = source.taken[0][0]
        if not header:
            if error:
                raise DataError(f"{path}: line {number}, which should name the columns, is not readable")
            if values:
                header, columns = values, match(values, options.columns, str(path))
            continue
        if error or (values and len(values) != len(header)):
            plain = _plain_fields(source.taken[0][1], delimiter)
            source.go_back()
            if delimiter == "\t" and len(plain) == len(header):  # quotation marks may mean nothing in a TSV
                values, error = plain, ""
            else:
                values, error = [], error or "broken row"
        if values or error:
            yield dict(zip(header, values, strict=False)), columns, number, error


def _plain_fields(line: str, delimiter: str) -> list[str]:
    return line.rstrip("\r\n").split(delimiter)


class _Lines:
    """Lines for csv.reader, which remembers those of the current record and can give them back."""

    def __init__(self, path: Path, options: Options) -> None:
        self.taken: list[tuple[int, str]] = []
        self._waiting: deque[tuple[int, str]] = deque()
        self._lines = lines(path, options)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._waiting:
            number, line = self._waiting.popleft()
        else:
            number, text = next(self._lines)
            # A carriage return inside a line is white space, not the end of a record.
            line = _OVERLONG if text is None else _one_line(text)
        self.taken.append((number, line))
        if line is _OVERLONG:
            raise csv.Error("field larger than a line may be")
        if len(self.taken) > MAX_RECORD_LINES:
            raise csv.Error("unclosed quotation mark")
        return line

    def go_back(self) -> None:
        """Hands all lines of the record but the first out again."""
        self._waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


_OVERLONG = "(overlong line)"


def _one_line(text: str) -> str:
    if "\r" not in text:
        return text
    body = text.rstrip("\r\n")
    return body.replace("\r", " ") + text[len(body) :].replace("\r", "")
