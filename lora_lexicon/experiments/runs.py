"""What a system wrote for the held-out entries, with one seed: files of JSON Lines, a row an entry.

Rows are made in blocks, each of which is on disk before the next is begun, so that a run that was killed goes on where
it was. A file gets its name when its last row is there. Knows nothing of tables.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.run import evaluate, prediction_row
from lora_lexicon.folders import whole_lines
from lora_lexicon.inference.engine import text_of
from lora_lexicon.inference.rerank import samples, write_all
from lora_lexicon.inference.sampling import Decoding

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System

BLOCK = 256  # entries defined between two writes of the file
SAMPLED = 16  # entries sampled so, each many times

Row = dict[str, Any]
Told = Callable[[int, int], object]  # (rows done, rows in all)


def in_blocks(file: Path, count: int, size: int, make: Callable[[int, int], list[Row]], told: Told) -> list[Row]:
    """The rows 0 to `count` of a file, those that are missing made by `make(start, end)`.

    Raises:
        DataError: the file has another number of rows.
    """
    if file.is_file():
        rows = whole_lines(file)
        if len(rows) != count:
            raise DataError(f"{file} has {len(rows)} rows, not {count}: remove it, and it is made again")
        return rows
    partial = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = whole_lines(partial)[:count] if partial.is_file() else []
    with partial.open("a", encoding="utf-8") as lines:
        told(len(rows), count)
        for start in range(len(rows), count, size):
            for row in make(start, min(start + size, count)):
                rows.append(row)
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            told(len(rows), count)
    os.replace(partial, file)
    return rows


def defined(
    file: Path, load: "Callable[[], System]", entries: Sequence[Entry], decoding: Decoding, told: Told
) -> list[Row]:
    """One definition and the loss of each entry: the columns of a predictions file, and `source`, `nll`, `tokens`."""
    system: System | None = None

    def make(start: int, end: int) -> list[Row]:
        nonlocal system
        system = system or load()
        found = evaluate(system, entries[start:end], decoding=decoding)
        assert found.predictions is not None
        return [
            {**prediction_row(entry, text, domain), "nll": float(nll), "tokens": int(tokens)}
            for entry, text, domain, nll, tokens in zip(
                found.entries, found.predictions, found.domains, found.nll, found.tokens, strict=True
            )
        ]

    return in_blocks(file, len(entries), BLOCK, make, told)


def ignore(_done: int, _total: int) -> None:
    """Shows nothing."""


def never(*_: object) -> NoReturn:
    """Makes nothing: for files that are whole."""
    raise AssertionError


def sampled(
    file: Path, load: "Callable[[], System]", entries: Sequence[Entry], count: int, decoding: Decoding, told: Told
) -> list[list[str]]:
    """`count` samples of each entry, in the order they are drawn in: the first n of them are best of n's candidates."""
    system: System | None = None

    def make(start: int, end: int) -> list[Row]:
        nonlocal system
        system = system or load()
        prompts = [(entry.term, entry.context) for entry in entries[start:end]]
        weights, _ = system.choose(prompts)
        rows = [
            samples(system, prompt, None if weights is None else weights[i], decoding, count)
            for i, prompt in enumerate(prompts)
        ]
        write_all(system, rows)
        return [
            {"term": term, "context": context, "samples": [text_of(system, row.written) for row in own]}
            for (term, context), own in zip(prompts, rows, strict=True)
        ]

    return [row["samples"] for row in in_blocks(file, len(entries), SAMPLED, make, told)]
