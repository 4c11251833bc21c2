"""Blind sheets for human evaluation: what is drawn, the key, and each rater's table and page. Knows no ratings.

FOLDER/key.json                 which system wrote each definition; raters must not see it
FOLDER/sheets/rater-1.csv, rater-1.html, ...
"""

import base64
import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lora_lexicon.data.predictions import Prediction, read_predictions
from lora_lexicon.errors import DataError
from lora_lexicon.folders import new_folder, sha256_of, write_record

KEY = "key.json"
FORMAT_VERSION = 1
VALUES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Criterion:
    """One of the five, with what each value means, from 1 to 5."""

    name: str
    title: str
    asks: str
    scale: tuple[str, str, str, str, str]


# Section 4.2 and figure 12 of the LM-Lexicon paper.
CRITERIA = (
    Criterion(
        "accuracy",
        "Accuracy",
        "How correctly does it capture the core meaning of the word?",
        ("Completely incorrect", "Mostly inaccurate", "Partially accurate", "Mostly accurate", "Perfect accuracy"),
    ),
    Criterion(
        "clarity",
        "Clarity",
        "How easily is it understood?",
        ("Incomprehensible", "Mostly unclear", "Somewhat clear", "Clear, minor issues", "Crystal clear"),
    ),
    Criterion(
        "conciseness",
        "Conciseness",
        "Is it as long as it must be, without redundancy or omission?",
        (
            "Extremely wordy or too short",
            "Too verbose or brief",
            "Somewhat verbose",
            "Mostly concise",
            "Optimally concise",
        ),
    ),
    Criterion(
        "context_appropriateness",
        "Context appropriateness",
        "How well does it reflect the context, and how the word is used there?",
        ("Ignores context", "Minimal context", "Basic context", "Good context", "Perfect context"),
    ),
    Criterion(
        "grammar_and_fluency",
        "Grammar and fluency",
        "How correct and natural is its language?",
        ("Severe errors", "Multiple errors", "Some errors", "Minor issues", "Perfect grammar"),
    ),
)
NAMES = tuple(criterion.name for criterion in CRITERIA)
COLUMNS = ("rater", "unit", "term", "context", "reference", "definition", *NAMES, "comment")


def export(
    files: Sequence[Path], out: Path, *, rows: int, raters: int, seed: int, overwrite: bool = False
) -> dict[str, Any]:
    """Draws entries that all systems defined, and writes each rater's sheets and the key.

    A definition that several systems wrote alike is rated once. Each rater has all of them, in an order of their own.

    Args:
        files: of predictions, for the same terms and contexts in the same order, one a system.

    Returns:
        `systems`, `items`, `units` (definitions to rate), `raters`.

    Raises:
        DataError: files that do not fit together, or hold fewer than `rows`.
    """
    systems = _names(files)
    items = _together(files)
    if rows > len(items):
        raise DataError(f"--rows {rows:,} is more than the {len(items):,} rows of {files[0]}: ask for fewer")
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(items)), rows))
    written: dict[tuple[int, str], list[str]] = {}
    for i in chosen:
        for system, prediction in zip(systems, items[i], strict=True):
            written.setdefault((i, prediction.text.strip()), []).append(system)
    names = iter(rng.sample(range(16**8), len(written)))
    units = {f"{next(names):08x}": (i, text, by) for (i, text), by in written.items()}
    key = {
        "format": FORMAT_VERSION,
        "systems": {s: {"file": f.name, "sha256": sha256_of(f)} for s, f in zip(systems, files, strict=True)},
        "raters": [f"rater-{number}" for number in range(1, raters + 1)],
        "seed": seed,
        "units": {
            unit: {"row": items[i][0].line, "term": items[i][0].term, "systems": by}
            for unit, (i, _, by) in units.items()
        },
    }
    with new_folder(out, replace=overwrite) as folder:
        write_record(folder / KEY, key)
        (folder / "sheets").mkdir()
        for rater in key["raters"]:
            sheet = [_row(rater, unit, items[i][0], text) for unit, (i, text, _) in units.items()]
            rng.shuffle(sheet)
            (folder / "sheets" / f"{rater}.csv").write_text(_csv(sheet), encoding="utf-8-sig", newline="")
            (folder / "sheets" / f"{rater}.html").write_text(page(rater, sheet), encoding="utf-8")
    return {"systems": systems, "items": rows, "units": len(units), "raters": raters}


def _names(files: Sequence[Path]) -> list[str]:
    names = [file.name.removesuffix(".gz").removesuffix(".jsonl") for file in files]
    if len(set(names)) < len(names):
        names = [f"{file.parent.name}/{name}" for file, name in zip(files, names, strict=True)]
    if len(set(names)) < len(names):
        raise DataError("two files of predictions have the same name: a system is named by its file")
    return names


def _together(files: Sequence[Path]) -> list[tuple[Prediction, ...]]:
    """The rows of all files side by side."""
    found = []
    read = (read_predictions(file, allow_empty=True, referenced=False) for file in files)
    for rows in zip_longest(*read):
        first = rows[0]
        for file, row in zip(files, rows, strict=True):
            if row is None or first is None:
                short = file if row is None else files[0]
                raise DataError(f"{short} has fewer rows than the others: give predictions of the same entries")
            if (row.term, row.context) != (first.term, first.context):
                raise DataError(
                    f"{file}:{row.line}: {row.term!r} stands where {files[0]}:{first.line} has {first.term!r}, or in "
                    "another context: give predictions of the same entries in the same order"
                )
        found.append(rows)
    return found


def _row(rater: str, unit: str, shown: Prediction, text: str) -> dict[str, str]:
    texts = {
        "rater": rater,
        "unit": unit,
        "term": shown.term,
        "context": shown.context,
        "reference": " / ".join(shown.references),
        "definition": text,
    }
    return {column: texts.get(column, "") for column in COLUMNS}


def _csv(rows: Sequence[Mapping[str, str]]) -> str:
    """A table that a spreadsheet takes for text."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([as_text(row[column]) for column in COLUMNS])
    return text.getvalue()


def as_text(cell: str) -> str:
    """A cell that a spreadsheet takes for text: what it would compute is given a quotation mark to begin with."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def page(rater: str, rows: list[dict[str, str]]) -> str:
    """A sheet as a page that needs no network and no server: it keeps ratings in the browser, and saves them as CSV.

    Its policy allows its own script and style alone, by their hashes.
    """
    root = resources("lora_lexicon.evaluation")
    script, style = ((root / name).read_text(encoding="utf-8") for name in ("sheet.js", "sheet.css"))
    data = json.dumps({"rater": rater, "columns": COLUMNS, "criteria": [asdict(c) for c in CRITERIA], "rows": rows})
    parts = {
        "POLICY": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        "STYLE": style,
        "DATA": data.replace("<", "\\u003c"),  # which would end the element
        "SCRIPT": script,
    }
    html = (root / "sheet.html").read_text(encoding="utf-8")
    return re.sub(r"%([A-Z]+)%", lambda found: parts[found[1]], html)  # in one pass: a text may hold such a name


def _hash(text: str) -> str:
    """As a content security policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
