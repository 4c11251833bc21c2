"""The entries folder: Arrow files that `datasets.load_from_disk` opens too, and `entries.json`. Knows no format.

FOLDER/entries.json           how it was made, counts, fingerprint
FOLDER/dataset_dict.json      the splits' names
FOLDER/SPLIT/data-00000-of-00001.arrow, dataset_info.json, state.json
FOLDER/stats.json, rejects.jsonl
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import DataError
from lora_lexicon.folders import read_record, write_record

FORMAT_VERSION = 1
COLUMNS = tuple(field.name for field in fields(Entry))
SPLITS = ("train", "valid", "test")
_FEATURES = {name: {"dtype": "string", "_type": "Value"} for name in COLUMNS}
_SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS]).with_metadata(
    {"huggingface": json.dumps({"info": {"features": _FEATURES}})}
)
_DATA = "data-00000-of-00001.arrow"
_BATCH = 10_000  # rows held back before they are written, and rows read at once


@dataclass(frozen=True)
class Entries:
    """An entries folder that was opened; nothing but its record is in memory."""

    path: Path
    splits: tuple[str, ...]
    fingerprint: str  # SHA-256 of all entries, in order
    record: Mapping[str, Any]

    def split(self, name: str) -> list[Entry]:
        """The entries of a split, in the order of the input.

        Raises:
            DataError: there is no such split, or its file is damaged.
        """
        return [Entry(*row) for batch in self.batches(name) for row in zip(*batch.values(), strict=True)]

    def batches(self, name: str) -> Iterator[dict[str, list[str]]]:
        """Yields columns of some thousand rows at a time, for what should not hold a split in memory."""
        if name not in self.splits:
            raise DataError(
                f"{self.path} has no split {name!r}, just {', '.join(self.splits)}: choose one, or prepare more data"
            )
        file = self.path / name / _DATA
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                if stream.schema.names != list(COLUMNS):
                    raise DataError(f"{file} has other columns than an entry's: prepare the data again")
                rows = 0
                for batch in stream:
                    batch.validate(full=True)  # a damaged file could point anywhere
                    rows += batch.num_rows
                    yield {column: batch.column(column).to_pylist() for column in COLUMNS}
        except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise DataError(f"{file} is missing or damaged: prepare the data again") from error
        if rows != self.record["splits"][name]:
            raise DataError(f"{file} holds {rows} rows, not {self.record['splits'][name]}: prepare the data again")

    def intact(self) -> bool:
        """Whether the entries are those whose hash the record holds; all are read, some thousand at a time.

        Raises:
            DataError: a split's file is damaged.
        """
        hashes = {}
        for split in self.splits:
            hashes[split] = hashlib.sha256()
            for batch in self.batches(split):
                for row in zip(*batch.values(), strict=True):
                    hashes[split].update(_line(row))
        return _total({split: hashes[split].hexdigest() for split in SPLITS if split in hashes}) == self.fingerprint


def _line(row: Sequence[str]) -> bytes:
    """What an entry adds to its split's hash."""
    return "\x1f".join(row).encode() + b"\x1e"


def _total(hashes: Mapping[str, str]) -> str:
    """The hash of all entries, from those of the splits in their order."""
    return hashlib.sha256("".join(f"{split}:{value}\n" for split, value in hashes.items()).encode()).hexdigest()


def load_entries(path: str | Path) -> Entries:
    """Opens an entries folder.

    Raises:
        DataError: `path` is no entries folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of entries: make one with lora-lexicon data prepare")
    file = folder / "entries.json"
    record = read_record(file, DataError, "a folder of entries (lora-lexicon data prepare makes one)")
    splits, fingerprint = record.get("splits"), record.get("fingerprint")
    if record.get("format") != FORMAT_VERSION or not isinstance(splits, dict) or not isinstance(fingerprint, str):
        raise DataError(f"{file} is not the record of format {FORMAT_VERSION}: prepare the data again")
    if not all(name in SPLITS and isinstance(count, int) for name, count in splits.items()):
        raise DataError(f"{file}: splits must be among {', '.join(SPLITS)}: prepare the data again")
    return Entries(folder, tuple(splits), fingerprint, record)


class EntriesWriter:
    """Writes entries of any split, in any order, into a folder; holds a few thousand of them at a time."""

    def __init__(self, folder: Path) -> None:
        self.counts: dict[str, int] = {}
        self._folder = folder
        self._waiting: dict[str, list[Entry]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._writers: dict[str, pa.RecordBatchStreamWriter] = {}
        self._hashes: dict[str, Any] = {}

    def add(self, split: str, entry: Entry) -> None:
        """Appends an entry to a split."""
        if split not in self._writers:
            self._open(split)
        self.counts[split] += 1
        self._waiting[split].append(entry)
        if len(self._waiting[split]) >= _BATCH:
            self._flush(split)

    def _open(self, split: str) -> None:
        (self._folder / split).mkdir()
        # A Python file, so that a full disk is an OSError with its number.
        self._files[split] = (self._folder / split / _DATA).open("wb")
        self._writers[split] = pa.ipc.new_stream(self._files[split], _SCHEMA)
        self._waiting[split], self.counts[split], self._hashes[split] = [], 0, hashlib.sha256()

    def _flush(self, split: str) -> None:
        rows = [[getattr(entry, name) for name in COLUMNS] for entry in self._waiting[split]]
        for row in rows:
            self._hashes[split].update(_line(row))
        columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
        self._writers[split].write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._waiting[split] = []

    def close(self) -> None:
        """Closes the files, as they are."""
        for file in self._files.values():
            file.close()

    def finish(self, record: Mapping[str, Any]) -> Entries:
        """Writes what is left and the record; returns the folder opened.

        Args:
            record: goes into `entries.json`, beside the format, the splits' sizes and the fingerprint.
        """
        splits = [split for split in SPLITS if split in self._writers]
        for split in splits:
            if self._waiting[split]:
                self._flush(split)
            self._writers[split].close()
            _write_split(self._folder / split, split, self._hashes[split].hexdigest())
        self.close()
        write_record(self._folder / "dataset_dict.json", {"splits": splits})
        made = {
            "format": FORMAT_VERSION,
            "splits": {split: self.counts[split] for split in splits},
            "fingerprint": _total({split: self._hashes[split].hexdigest() for split in splits}),
            **record,
        }
        write_record(self._folder / "entries.json", made)
        return load_entries(self._folder)


def _write_split(folder: Path, split: str, fingerprint: str) -> None:
    """The two files beside the data with which `datasets` knows a folder of its own."""
    info = {"citation": "", "description": "", "features": _FEATURES, "homepage": "", "license": ""}
    state = {
        "_data_files": [{"filename": _DATA}],
        "_fingerprint": re.sub(r"[^0-9a-f]", "", fingerprint)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_record(folder / "dataset_info.json", info)
    write_record(folder / "state.json", state)
