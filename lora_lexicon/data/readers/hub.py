"""A Hugging Face data set, by name, through `datasets` (which runs no code of the data set's)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers.columns import match
from lora_lexicon.data.readers.jsonl import row_of
from lora_lexicon.data.readers.source import Options
from lora_lexicon.errors import DataError
from lora_lexicon.resources import hub_answers, is_hub_name

_FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".eg", ".gz", ".dz", ".dict", ".index"}


def may_be_name(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME (or OWNER/NAME:CONFIGURATION) rather than as a file that is missing."""
    return is_hub_name(_parts(name)[0]) and Path(name).suffix.lower() not in _FILE_SUFFIXES


def _parts(name: str) -> tuple[str, str | None]:
    """(the data set, its configuration)"""
    repository, _, configuration = name.partition(":")
    return repository, configuration or None


def read(name: str, options: Options) -> Iterator[Row]:
    """Yields one row per row of every split; `line` counts from 1 within a split.

    Raises:
        DataError: no such data set, no connection, or columns that hold no term or definition.
    """
    repository, configuration = _parts(name)
    if not Path(repository).exists():
        hub_answers()
    from datasets import DatasetDict, load_dataset

    try:
        splits = load_dataset(repository, configuration)
    except Exception as error:  # whatever the network or the data set's files can raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot load the Hugging Face data set {name!r}: {reason}") from error
    assert isinstance(splits, DatasetDict)
    several = len(splits) > 1
    for split, rows in splits.items():
        columns = match(rows.column_names, options.columns, name)
        place = f"{name}/{split}"
        for number, record in enumerate(rows, 1):
            row = row_of(dict(record), columns, place, number, options.source or repository)
            # A data set of one split was never split: its name says nothing.
            yield replace(row, split=str(split)) if several and row.split is None else row
            options.advance(1)
