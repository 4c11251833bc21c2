"""What `evaluate --out` leaves: rows and predictions of each system, so that all figures can be made of them again.

FOLDER/report.json             figures, and how they were made
FOLDER/rows.jsonl              an entry a line, and under `systems` by name: the expert that answered, nll and tokens,
                               of a defined entry bleu and rouge_l, of one on the map its place
FOLDER/predictions/NAME.jsonl  what a system wrote for the entries that it defined, as `score` and others read it
"""

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.predictions import objects, read_predictions
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.run import Evaluation, write_predictions
from lora_lexicon.folders import read_record, write_record

RECORD, ROWS, PREDICTIONS = "report.json", "rows.jsonl", "predictions"
_AGAIN = "evaluate again, with --out"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_FIELDS = tuple(field.name for field in fields(Entry))
_SUMMARY = {"trained_parameters": int, "ship_megabytes": float, "memory_megabytes": float}
_OF_ROW = ("nll", "tokens")


@dataclass(frozen=True)
class Saved:
    """A folder that `evaluate --out` wrote, read back.

    Attributes:
        report: its report.json; `signatures`, `scores` and `comparisons` are as `evaluate` writes them, or empty.
    """

    path: Path
    report: dict[str, Any]
    evaluations: list[Evaluation]


def environment() -> dict[str, Any]:
    """What figures of speed and the last digits of others depend on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), **libraries, "device": device, "cores": os.cpu_count()}


def write_evaluations(folder: Path, report: dict[str, Any], evaluations: Sequence[Evaluation]) -> None:
    """Writes evaluations of the same entries into a folder that is being made."""
    write_record(folder / RECORD, report)
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        for i, entry in enumerate(evaluations[0].entries):
            row = {**asdict(entry), "systems": {each.name: _of_row(each, i) for each in evaluations}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for each in evaluations:
        if each.predictions is not None:
            (folder / PREDICTIONS).mkdir(exist_ok=True)
            write_predictions(each, folder / PREDICTIONS / f"{each.name}.jsonl")


def _of_row(evaluation: Evaluation, row: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "expert": evaluation.domains[row],
        "nll": float(evaluation.nll[row]),
        "tokens": int(evaluation.tokens[row]),
    }
    if evaluation.bleu is not None and evaluation.rouge_l is not None and row < len(evaluation.bleu):
        found |= {"bleu": float(evaluation.bleu[row]), "rouge_l": float(evaluation.rouge_l[row])}
    if evaluation.places is not None and np.isfinite(evaluation.places[row]).all():
        found["place"] = [round(float(value), 5) for value in evaluation.places[row]]
    return found


def read_evaluations(folder: Path) -> Saved:
    """Reads what `write_evaluations` wrote.

    Raises:
        DataError: it is something else, or damaged; names file and line.
    """
    path = folder / RECORD
    report = read_record(path, DataError, "the folder of an evaluation (lora-lexicon evaluate --out makes one)")
    names = _names(path, report)
    report = {**report, **_figures(path, report, names)}
    if not (folder / ROWS).is_file():
        raise DataError(f"{folder / ROWS} is missing: {_AGAIN}, by this version")
    entries: list[Entry] = []
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for line, row in objects(folder / ROWS):
        where = f"{folder / ROWS}:{line}"
        if not all(isinstance(row.get(name), str) for name in _FIELDS) or not isinstance(row.get("systems"), dict):
            raise DataError(f"{where}: not an entry with what systems made of it: {_AGAIN}")
        entries.append(Entry(**{name: row[name] for name in _FIELDS}))
        for name in names:
            parts[name].append(_checked(where, name, row["systems"].get(name)))
    if len(entries) != report["rows"]:
        raise DataError(f"{folder / ROWS} has {len(entries):,} rows, {RECORD} says {report['rows']}: {_AGAIN}")
    found = [_evaluation(folder, of, entries, parts[of["name"]]) for of in report["systems"]]
    return Saved(folder, report, found)


def _names(path: Path, report: dict[str, Any]) -> list[str]:
    """The systems' names, and that the report is one of `evaluate`."""
    systems, rows = report.get("systems"), report.get("rows")
    texts = all(isinstance(report.get(key), str) for key in ("version", "data", "entries_fingerprint", "split"))
    if not texts or not isinstance(systems, list) or not systems or not isinstance(rows, int) or rows < 1:
        raise DataError(f"{path} is not the report of an evaluation: give a folder that `evaluate --out` made")
    names = [system.get("name") if isinstance(system, dict) else None for system in systems]
    for system, name in zip(systems, names, strict=True):
        if not isinstance(name, str) or not _NAME.fullmatch(name) or names.count(name) > 1:
            raise DataError(f"{path}: {name!r} cannot be a system's name: {_AGAIN}")
        if not all(_is_number(system.get(key)) for key in _SUMMARY):
            raise DataError(f"{path}: {name}: a size is missing or no number: {_AGAIN}")
    return [str(name) for name in names]


def _figures(path: Path, report: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The report's `signatures`, `scores` and `comparisons`."""
    scores, compared = report.get("scores") or {}, report.get("comparisons") or []
    signatures = report.get("signatures") or {}
    if not isinstance(signatures, dict) or not all(isinstance(text, str) for text in signatures.values()):
        raise DataError(f"{path}: 'signatures' is not a text a score: {_AGAIN}")
    if (
        not isinstance(scores, dict)
        or not set(scores) <= set(names)
        or not all(isinstance(of, dict) and all(map(_is_figure, of.values())) for of in scores.values())
    ):
        raise DataError(f"{path}: 'scores' holds something else than figures of the systems: {_AGAIN}")
    if not isinstance(compared, list) or not all(_is_comparison(each, names) for each in compared):
        raise DataError(f"{path}: 'comparisons' holds something else than comparisons of the systems: {_AGAIN}")
    return {"signatures": signatures, "scores": scores, "comparisons": compared}


def _is_figure(each: Any) -> bool:
    if not isinstance(each, dict) or not isinstance(each.get("signature"), str):
        return False
    ends = each.get("interval") or [0, 0]
    whole = isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))
    return whole and (each.get("value") is None or _is_number(each["value"]))


def _is_comparison(each: Any, names: Sequence[str]) -> bool:
    return (
        isinstance(each, dict)
        and each.get("a") in names
        and each.get("b") in names
        and isinstance(each.get("metric"), str)
        and all(_is_number(each.get(key)) for key in ("difference", "low", "high", "p"))
    )


def _checked(where: str, name: str, part: Any) -> dict[str, Any]:
    """What a system made of a row, with a place or None."""
    if not isinstance(part, dict) or not isinstance(part.get("expert"), str):
        raise DataError(f"{where}: nothing of {name}: {_AGAIN}")
    scores = [part.get(key) for key in ("bleu", "rouge_l")]
    place = part.get("place", [math.nan, math.nan])
    if (
        not all(_is_number(part.get(key)) for key in _OF_ROW)
        or part["tokens"] < 1
        or not (scores == [None, None] or all(map(_is_number, scores)))
        or not isinstance(place, list)
        or len(place) != 2
        or ("place" in part and not all(map(_is_number, place)))
    ):
        raise DataError(f"{where}: a figure of {name} is missing or no number: {_AGAIN}")
    return {**part, "place": place}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _evaluation(folder: Path, of: dict[str, Any], entries: list[Entry], parts: list[dict[str, Any]]) -> Evaluation:
    name = of["name"]
    scored = next((i for i, part in enumerate(parts) if part.get("bleu") is None), len(parts))
    if any(part.get("bleu") is not None for part in parts[scored:]):
        raise DataError(f"{folder / ROWS}: {name} scored a row after one that it did not: {_AGAIN}")
    predictions = _predictions(folder / PREDICTIONS / f"{name}.jsonl", entries[:scored]) if scored else None

    def column(key: str, count: int) -> NDArray[np.float64]:
        return np.array([part[key] for part in parts[:count]], dtype=np.float64)

    places = np.array([part["place"] for part in parts], dtype=np.float32)
    speed = of.get("tokens_per_second")
    return Evaluation(
        name=name,
        entries=entries,
        trained_parameters=int(of["trained_parameters"]),
        ship_bytes=round(of["ship_megabytes"] * 1e6),
        memory_bytes=round(of["memory_megabytes"] * 1e6),
        nll=column("nll", len(parts)),
        tokens=column("tokens", len(parts)).astype(np.int64),
        domains=[part["expert"] for part in parts],
        predictions=predictions,
        bleu=column("bleu", scored) if scored else None,
        rouge_l=column("rouge_l", scored) if scored else None,
        tokens_per_second=float(speed) if isinstance(speed, int | float) else None,
        base=str(of.get("base", "")),
        base_fingerprint=str(of.get("base_fingerprint", "")),
        places=places if np.isfinite(places).any() else None,
    )


def _predictions(path: Path, entries: Sequence[Entry]) -> list[str]:
    rows = read_predictions(path, allow_empty=True)
    if [(row.term, row.context) for row in rows] != [(entry.term, entry.context) for entry in entries]:
        raise DataError(f"{path} has other rows than {ROWS} beside it: {_AGAIN}")
    return [row.text for row in rows]
