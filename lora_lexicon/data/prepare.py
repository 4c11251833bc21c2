"""From input files to an entries folder, in one pass that holds a few thousand rows. Prints nothing.

Every row that is read is either kept (it gives at least one entry) or rejected for a reason:
`read == kept + sum(rejected)`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import IO, Any

from lora_lexicon.data.clean import clean
from lora_lexicon.data.entry import Row, headword
from lora_lexicon.data.readers import Input, Options, read_input, recognise
from lora_lexicon.data.split import SHARES, split_name, split_of
from lora_lexicon.data.stats import statistics
from lora_lexicon.data.store import SPLITS, Entries, EntriesWriter, load_entries
from lora_lexicon.data.terms import contains_term
from lora_lexicon.errors import DataError
from lora_lexicon.folders import new_folder, sha256_of, write_record

Progress = Callable[[int, int], None]  # (done, total) bytes


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    *,
    format: str | None = None,
    seed: int = 42,
    shares: Mapping[str, float] | None = None,
    keep_without_context: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    source: str = "",
) -> dict[str, Any]:
    """Reads, cleans and splits dictionary data into the entries folder `out`.

    A row goes to the split its input names, else to the one of its headword (`data.split`).

    Args:
        inputs: files, folders or Hugging Face data sets.
        format: one of `readers.FORMATS`; None lets each input's content decide.
        shares: fractions of headwords per split, which sum to 1.
        keep_without_context: keeps rows without any context, with an empty one.
        progress: called with (bytes read, bytes in all).
        limit: stop after this many rows.
        columns: a column's name for a field, where no common alias fits.
        source: the source of rows whose input has no place for one.

    Returns:
        `read`, `kept`, `rejected` {reason: rows}, `splits` {name: entries}, `entries`,
        `contexts_dropped` (of rows that were kept for others), `term_not_in_context` (entries),
        `overlap` {"train/test": headwords in both}, `empty_splits` (that few headwords missed by
        chance), `fingerprint`.

    Raises:
        DataError: an input is missing, empty or unreadable, or not one row was kept.
        LexiconError: `out` exists, or the disk is full.
    """
    found = recognise(inputs, format)
    with new_folder(Path(out), replace=overwrite) as folder:
        run = _Run(folder, seed, dict(shares or SHARES), keep_without_context)
        try:
            _read_all(run, found, Options(columns or {}, source), progress, limit)
            if not run.kept:
                raise DataError(_nothing_kept(inputs, run.rejected))
            report = run.report()
            made_by = {
                "inputs": [_input_record(each) for each in found],
                "seed": seed,
                "shares": run.shares,
                "keep_without_context": keep_without_context,
                "columns": dict(columns or {}),
                "source": source,
                "limit": limit,
                "versions": _versions(),
            }
            entries = run.writer.finish({**report, "made_by": made_by})
        finally:
            run.close()
        write_record(folder / "stats.json", statistics(entries))
    return {**report, "fingerprint": entries.fingerprint}


def open_or_prepare(inputs: Sequence[str], folder: Path, **options: Any) -> Entries:
    """The entries folder that is given, or what `prepare` makes in `folder` of other inputs, each time anew."""
    if len(inputs) == 1 and (Path(inputs[0]) / "entries.json").is_file():
        return load_entries(inputs[0])
    prepare(inputs, folder, overwrite=True, **options)
    return load_entries(folder)


class _Run:
    """The counts and open files of one preparation."""

    def __init__(self, folder: Path, seed: int, shares: dict[str, float], keep_without_context: bool) -> None:
        self.writer = EntriesWriter(folder)
        self.read = self.kept = self.entries = self.contexts_dropped = self.term_not_in_context = self.dealt = 0
        self.rejected: Counter[str] = Counter()
        self.shares = shares
        self._seed, self._keep = seed, keep_without_context
        self._headwords: dict[str, set[int]] = {}
        self._rejects: IO[str] = (folder / "rejects.jsonl").open("w", encoding="utf-8", errors="backslashreplace")

    def take(self, row: Row) -> None:
        """Keeps or rejects one row."""
        self.read += 1
        entries = clean(row, keep_without_context=self._keep)
        if isinstance(entries, str):
            self.rejected[entries] += 1
            reject = {"file": row.file, "line": row.line, "reason": entries}
            if isinstance(row.term, str):
                reject["term"] = row.term[:200]
            self._rejects.write(json.dumps(reject, ensure_ascii=False) + "\n")
            return
        self.kept += 1
        self.contexts_dropped += len(row.contexts) - len(entries) if row.contexts else 0
        term = entries[0].term
        split = split_name(row.split) if row.split else None
        self.dealt += split is None
        split = split or split_of(term, self._seed, self.shares)
        # A headword is remembered as its hash: eight bytes serve for counting.
        self._headwords.setdefault(split, set()).add(hash(headword(term)))
        for entry in entries:
            self.entries += 1
            self.term_not_in_context += bool(entry.context) and not contains_term(entry.context, term)
            self.writer.add(split, entry)

    def report(self) -> dict[str, Any]:
        """What is known once every row was taken."""
        shared = {f"{a}/{b}": len(self._headwords[a] & self._headwords[b]) for a, b in combinations(self._splits(), 2)}
        return {
            "read": self.read,
            "kept": self.kept,
            "rejected": dict(self.rejected.most_common()),
            "splits": {name: self.writer.counts[name] for name in self._splits()},
            "entries": self.entries,
            "contexts_dropped": self.contexts_dropped,
            "term_not_in_context": self.term_not_in_context,
            "overlap": shared,
            "empty_splits": [s for s in SPLITS if self.dealt and self.shares.get(s) and s not in self._headwords],
        }

    def _splits(self) -> list[str]:
        return [name for name in SPLITS if name in self._headwords]

    def close(self) -> None:
        """Closes the files, as they are."""
        self.writer.close()
        self._rejects.close()


def _read_all(run: _Run, found: list[Input], options: Options, progress: Progress | None, limit: int | None) -> None:
    total = sum(each.size for each in found)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    advance(0)
    metered = Options(options.columns, options.source, advance)
    rows = (row for each in found for row in read_input(each, metered))
    for row in islice(rows, limit):
        run.take(row)


def _nothing_kept(inputs: Sequence[str], rejected: Counter[str]) -> str:
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in rejected.most_common(4)) or "it holds no row"
    hints = {
        "no context": "; add --keep-without-context to keep rows without one",
        "invalid UTF-8": "; save text of another encoding as UTF-8",
    }
    hint = "".join(text for reason, text in hints.items() if rejected.get(reason))
    return f"no row of {', '.join(inputs)} was kept ({reasons}){hint}"


def _input_record(found: Input) -> dict[str, Any]:
    files = [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in found.files]
    return {"format": found.format, "name": found.name if not found.files else found.path.name, "files": files}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lora-lexicon", "pyarrow")}
