"""Entries to look at a model with: of a prepared folder, or of the WordNet sample that ships. Knows no model."""

from pathlib import Path

from lora_lexicon.data.clean import clean
from lora_lexicon.data.entry import Entry, spread
from lora_lexicon.data.readers import read
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import DataError
from lora_lexicon.resources import find_sample

SAMPLE = "sample:wordnet"


def probe_entries(data: Path | None, split: str, count: int | None) -> list[Entry]:
    """At most `count` entries of a split, spread evenly over it.

    Args:
        data: a folder that `data prepare` made; None: the sample that ships.

    Raises:
        DataError: no such folder or split, or an empty one.
    """
    found = load_entries(data).split(split) if data else _sample(split)
    if not found:
        raise DataError(f"{data}: the split {split!r} is empty: prepare more data")
    return spread(found, count)


def _sample(split: str) -> list[Entry]:
    cleaned = (clean(row) for row in read([find_sample(SAMPLE)]) if row.split == split)
    return [entry for entries in cleaned if not isinstance(entries, str) for entry in entries]
