"""The words kept for the demo: which they are, and the file of them that ships.

The embedded base never sees the training headwords of this sample (`experts.pretrain.select`), so
the demo's experts learn entries that are new to it.
"""

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from lora_lexicon.data.clean import clean
from lora_lexicon.data.entry import Row, headword
from lora_lexicon.data.split import split_of, unit_hash

SHARE = 0.2


def in_sample(term: str) -> bool:
    """Whether a headword belongs to the words kept for the demo's sample."""
    return unit_hash(headword(term), "demo-sample") < SHARE


def sample(rows: Iterable[Row], sizes: dict[str, int], seed: int = 42, all_words: bool = False) -> list[dict[str, str]]:
    """At most `sizes[split]` records of each split, one per (term, context), chosen by hash.

    Training records are words of the sample, or with `all_words` any; valid and test may be any word
    of their split. A training definition that also stands in valid or test (a synonym's) is left out,
    and in valid and test each definition appears once. The splits are mixed, so that the first rows
    hold some of each.
    """
    by_split: dict[str, list[dict[str, str]]] = {name: [] for name in sizes}
    for row in rows:
        entries = clean(row)
        for entry in () if isinstance(entries, str) else entries:
            split = split_of(entry.term, seed)
            if split in sizes and (split != "train" or all_words or in_sample(entry.term)):
                by_split[split].append({**asdict(entry), "split": split})
    held: set[str] = set()
    chosen: list[dict[str, str]] = []
    for split in sorted(sizes, key=lambda name: name == "train"):  # training last, so that it can avoid the others
        records = sorted(by_split[split], key=_order)
        fresh = [r for r in records if headword(r["definition"]) not in held]
        if split != "train":
            fresh = list({headword(r["definition"]): r for r in reversed(fresh)}.values())[::-1]
            held |= {headword(r["definition"]) for r in fresh[: sizes[split]]}
        chosen += fresh[: sizes[split]]
    return sorted(chosen, key=_order)


def _order(record: dict[str, str]) -> float:
    return unit_hash(f"{record['term']}|{record['context']}", "demo-order")


def write_jsonl_gz(records: Iterable[dict[str, str]], path: Path) -> None:
    """Writes records as gzipped JSON Lines; the same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
