"""A file of predictions as evaluation writes it: JSON Lines of `term`, `context`, `prediction`. Knows no score."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lexicon.data.readers.source import Options, lines
from lora_lexicon.errors import DataError


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one system wrote for a term in a context; `domain` is "" and `references` are () where the file has none."""

    line: int
    term: str
    context: str
    text: str
    domain: str = ""
    references: tuple[str, ...] = ()


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yields the rows of a file, blank lines passed over. References are `references`, or else the `definition`.

    Raises:
        DataError: the file is missing or holds no row, or a row is no object of such strings; it names the line.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file of predictions: evaluate --out FOLDER writes FOLDER/predictions/NAME.jsonl")
    found = False
    for number, line in lines(path, Options()):
        if line is not None and not line.strip():
            continue
        found = True
        try:
            yield _prediction(number, None if line is None else json.loads(line))
        except (ValueError, RecursionError, DataError) as error:
            what = "invalid UTF-8" if isinstance(error, UnicodeEncodeError) else error
            raise DataError(
                f"{path}:{number}: {what}: one object a line is expected, with term and prediction"
            ) from None
    if not found:
        raise DataError(f"{path} holds no prediction")


def _prediction(line: int, row: Any) -> Prediction:
    if not isinstance(row, dict):
        raise DataError("no JSON object")
    term, text = _text(row, "term"), _text(row, "prediction")
    if not term.strip():
        raise DataError("'term' is empty")
    references = row.get("references", [row["definition"]] if "definition" in row else [])
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise DataError("'references' is no list of texts")
    found = Prediction(line, term, _text(row, "context", ""), text, _text(row, "domain", ""), tuple(references))
    "".join((term, found.context, text, found.domain, *references)).encode()  # refuses halves of characters
    return found


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = default if row.get(key) is None else row[key]
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {'missing' if value is None else 'no text'}")
    return value
