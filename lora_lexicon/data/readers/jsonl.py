"""JSON Lines: one object a line, with named fields. A context may be one string or a list of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers.columns import match
from lora_lexicon.data.readers.source import Options, lines, stem


def read(path: Path, options: Options) -> Iterator[Row]:
    """Yields one row per line that is not blank; columns and source column are those of the first object."""
    columns: dict[str, str] | None = None
    for number, line in lines(path, options):
        if line is None:
            yield Row(str(path), number, error="overlong line")
            continue
        if not line.strip():
            continue
        record = parse(line)
        if record is None:
            yield Row(str(path), number, error="broken row")
            continue
        if columns is None:
            columns = match(list(record), options.columns, str(path))
        yield row_of(record, columns, str(path), number, options.source or stem(path))


def parse(line: str) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def row_of(record: Mapping[str, Any], columns: dict[str, str], file: str, line: int, fallback: str) -> Row:
    """A record as a row; `fallback` is the source where the input has no column for one."""
    values = {field: record.get(name) for field, name in columns.items()}
    context = values.get("context")
    split = values.get("split")
    return Row(
        file,
        line,
        term=values.get("term"),
        definition=values.get("definition"),
        contexts=tuple(context) if isinstance(context, list | tuple) else (context,),
        source=values.get("source") if "source" in columns else fallback,
        language=_text(values.get("language")) or "en",
        domain=_text(values.get("domain")),
        pos=_text(values.get("pos")),
        split=None if split in (None, "") else str(split),
    )


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""
