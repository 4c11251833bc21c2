"""Reads the prompts a user wants defined from a file. Knows nothing of models.

JSON Lines (`term`, `context`), CSV or TSV with those columns in its first line, or plain text: one term
a line, or term, tab, context.
"""

import csv
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lora_lexicon.errors import DataError

Prompt = tuple[str, str]  # term, context
UNREADABLE = ("Cc", "Cs")  # control characters, and halves of characters


def is_readable(text: str, allowed: str = "") -> bool:
    """Whether a text holds no control character but those allowed, and no half of a character."""
    return all(c in allowed or unicodedata.category(c) not in UNREADABLE for c in text)


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file; empty lines of plain text and JSON Lines are passed over.

    Raises:
        DataError: a missing, empty or undecodable file, or a row without a term; it names the line.
    """
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _tsv}
    read = readers.get(path.suffix.lower(), _text)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            prompts = []
            for line, term, context in read(file, path):
                if not term.strip():
                    raise DataError(f"{path}:{line}: the term is empty: write a term, or delete the line")
                if not (is_readable(term.strip()) and is_readable(context, "\n\r\t")):
                    raise DataError(f"{path}:{line}: control characters, or halves of characters: take them out")
                prompts.append((term.strip(), context.strip()))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give a file with a term in each line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except csv.Error as error:
        raise DataError(f"{path} is not readable as CSV: {error}") from error
    if not prompts:
        raise DataError(f"{path} holds no term: write one a line")
    return prompts


def _jsonl(file: TextIO, path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}): one object a line is expected") from error
        fields = (row.get("term"), row.get("context") or "") if isinstance(row, dict) else (None, "")
        if not isinstance(fields[0], str) or not isinstance(fields[1], str):
            raise DataError(f'{path}:{number}: expected an object such as {{"term": "...", "context": "..."}}')
        yield number, fields[0], fields[1]


def _csv(file: TextIO, path: Path, delimiter: str = ",") -> Iterator[tuple[int, str, str]]:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    if "term" not in (reader.fieldnames or ()):
        raise DataError(
            f"{path}:1: no column named 'term': the first line must name it, and context where there is one"
        )
    for row in reader:
        if None in row:
            raise DataError(f"{path}:{reader.line_num}: more fields than columns: put quotes around text with a comma")
        yield reader.line_num, row["term"] or "", row.get("context") or ""


def _tsv(file: TextIO, path: Path) -> Iterator[tuple[int, str, str]]:
    return _csv(file, path, "\t")


def _text(file: TextIO, path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(file, 1):
        term, _, context = line.rstrip("\r\n").partition("\t")
        if line.strip():
            yield number, term, context
