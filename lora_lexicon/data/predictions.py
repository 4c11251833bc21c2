"""Reads files of predictions, and names the line of whatever is wrong with them. Knows nothing of metrics.

JSON Lines in UTF-8: `term`, `context`, `prediction`, and `references` (a list) or `definition`; further columns
(`domain`, `source`) are kept as labels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_lexicon.data.entry import headword
from lora_lexicon.errors import DataError

MAX_LINE = 2**20  # bytes
LABELS = ("domain", "source")  # the columns that scores can be told by


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row: what was predicted for a term in a context, and what it is held against.

    `definition` is the row's own, None where it has several references; `labels` are those of `LABELS` it has.
    """

    line: int
    term: str
    context: str
    text: str
    references: tuple[str, ...]
    definition: str | None = None
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def headword(self) -> str:
        """The key of the rows that are drawn together."""
        return headword(self.term)

    @property
    def domain(self) -> str:
        """Who wrote it; "" where the file does not say."""
        return self.labels.get("domain", "")


def read_predictions(
    path: Path, *, gold: Path | None = None, allow_empty: bool = False, referenced: bool = True
) -> list[Prediction]:
    """All rows of a file, in order.

    Args:
        gold: a file of `term`, `context` and `references` or `definition` that holds, line by line, what the
            predictions are of; they then need no more than `prediction`.
        allow_empty: an empty prediction is a row (it scores 0), not a fault.
        referenced: a row without a reference is a fault.

    Raises:
        DataError: anything wrong in either file, or another number of rows; it names file and line.
    """
    if gold is None:
        rows = [_row(path, line, row, allow_empty, referenced) for line, row in objects(path)]
    else:
        rows = list(_beside(path, gold, allow_empty))
    if not rows:
        raise DataError(f"{path} holds no row: write a prediction a line")
    return rows


def read_definitions(path: Path) -> list[Prediction]:
    """Rows of `term`, `context` and `references` or `definition`, without predictions (`text` is empty).

    Raises:
        DataError: as `read_predictions`.
    """
    return [_definition(path, line, row) for line, row in objects(path)]


def need_same_rows(first: Sequence[Prediction], other: Sequence[Prediction], names: tuple[Path, Path]) -> None:
    """Refuses two files whose rows are not, one by one, of the same term, context and references.

    Raises:
        DataError: names the first line that differs, or the numbers of rows.
    """
    for a, b in zip(first, other, strict=False):
        if (a.term, a.context, a.references) != (b.term, b.context, b.references):
            what = "term, context" if (a.term, a.context) != (b.term, b.context) else "references"
            raise DataError(
                f"{names[1]}:{b.line}: another {what} than {names[0]}:{a.line}: files of the same rows compare"
            )
    if len(first) != len(other):
        raise DataError(
            f"{names[1]} has {len(other):,} rows, {names[0]} {len(first):,}: files of the same rows compare"
        )


def _beside(path: Path, gold: Path, allow_empty: bool) -> Iterator[Prediction]:
    """Predictions with what the same line of `gold` holds."""
    wanted, found = read_definitions(gold), 0
    for line, row in objects(path):
        if found == len(wanted):
            raise DataError(f"{path}:{line}: no row of {gold} is left, which has {len(wanted):,}: the files must match")
        own = wanted[found]
        for key, value in (("term", own.term), ("context", own.context)):
            if row.get(key) not in (None, value):
                raise DataError(
                    f"{path}:{line}: another {key} than {gold}:{own.line}: the files must match line by line"
                )
        labels = own.labels | _labels(path, line, row)
        yield replace(own, line=line, text=_prediction(path, line, row, allow_empty), labels=labels)
        found += 1
    if found < len(wanted):
        left = f"{gold}:{wanted[found].line}"
        raise DataError(f"{path} ends after {found:,} rows, {gold} has {len(wanted):,}: no prediction for {left}")


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line that is not blank, of a file of JSON Lines.

    Raises:
        DataError: no file, or a line that is too long, not UTF-8 or no object.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give a file of JSON Lines") from error
    with file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise DataError(f"{path}:{number}: longer than {MAX_LINE:,} bytes: a line holds one row")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start} of the line): convert it first"
                ) from error
            if not text.strip():
                continue
            if text.startswith("\ufeff"):
                raise DataError(f"{path}:{number}: a byte order mark within the file: take it out")
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}): one object a line is expected") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{number}: not an object, but {type(row).__name__}: one object a line is expected"
                )
            yield number, row


def _row(path: Path, line: int, row: dict[str, Any], allow_empty: bool, referenced: bool) -> Prediction:
    return replace(_definition(path, line, row, referenced), text=_prediction(path, line, row, allow_empty))


def _definition(path: Path, line: int, row: dict[str, Any], referenced: bool = True) -> Prediction:
    term = _text(path, line, row, "term")
    context = "" if row.get("context") is None else _text(path, line, row, "context", empty=True)
    definition = None if row.get("definition") is None else _text(path, line, row, "definition")
    references = row.get("references")
    if references is None:
        if definition is None and not referenced:
            return Prediction(line, term, context, "", (), None, _labels(path, line, row))
        if definition is None:
            raise DataError(f"{path}:{line}: neither 'references' nor 'definition': give what is to be predicted")
        references = [definition]
    if not isinstance(references, list) or not references:
        raise DataError(f"{path}:{line}: 'references' is not a list of at least one text")
    texts = tuple(_text(path, line, {"references": value}, "references") for value in references)
    if definition is None and len(texts) == 1:
        (definition,) = texts
    return Prediction(line, term, context, "", texts, definition, _labels(path, line, row))


def _prediction(path: Path, line: int, row: dict[str, Any], allow_empty: bool) -> str:
    text = _text(path, line, row, "prediction", empty=True)
    if not text.strip() and not allow_empty:
        raise DataError(f"{path}:{line}: the prediction is empty: add --allow-empty to score it as it is")
    return text


def _labels(path: Path, line: int, row: dict[str, Any]) -> dict[str, str]:
    return {key: _text(path, line, row, key, empty=True) for key in LABELS if row.get(key) is not None}


def _text(path: Path, line: int, row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in row:
        raise DataError(f"{path}:{line}: no column {key!r}, only {', '.join(sorted(row)) or 'an empty object'}")
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{path}:{line}: {key!r} is not a text, but {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{path}:{line}: {key!r} holds half of a character: write it as UTF-8")
    if not empty and not value.strip():
        raise DataError(f"{path}:{line}: {key!r} is empty")
    return value
