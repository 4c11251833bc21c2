"""What raters' sheets say: means, differences and agreement. Knows nothing of how sheets were made but their key."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.agreement import estimates
from lora_lexicon.evaluation.bootstrap import paired_bootstrap
from lora_lexicon.evaluation.sheets import CRITERIA, FORMAT_VERSION, KEY, NAMES, VALUES
from lora_lexicon.folders import read_record


@dataclass(frozen=True)
class Ratings:
    """What came back.

    Attributes:
        values: (units, raters, criteria) from 1 to 5; NaN where a rating is missing.
        rows: of each unit the row it belongs to; units of one row are definitions of one term in one context.
        by: of each unit the systems that wrote it.
    """

    systems: tuple[str, ...]
    raters: tuple[str, ...]
    values: NDArray[np.float64]
    rows: tuple[int, ...]
    by: tuple[tuple[str, ...], ...]


def read_ratings(folder: Path, sheets: Sequence[Path], *, partial: bool = False) -> Ratings:
    """Reads sheets that `export` wrote, filled in.

    Args:
        partial: ratings may be missing.

    Raises:
        DataError: a sheet of another export, ratings that are missing or no whole number from 1 to 5, units that are
            unknown, missing or rated twice; names file and line of the first, and how many more there are.
    """
    key = read_record(folder / KEY, DataError, "a folder of sheets (human export makes one)")
    if key.get("format") != FORMAT_VERSION or not isinstance(key.get("units"), dict):
        raise DataError(f"{folder / KEY} is no key of format {FORMAT_VERSION}: export the sheets again")
    units = list(key["units"])
    number = {unit: i for i, unit in enumerate(units)}
    values: dict[str, NDArray[np.float64]] = {}
    for sheet in sheets:
        rater, faults, found = _sheet(sheet, number, key["raters"], partial)
        if rater in values:
            faults.append(f"{sheet}: it is of {rater}, as another sheet is")
        if faults:
            more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
            raise DataError(f"{faults[0]}{more}")
        values[rater] = found
    return Ratings(
        tuple(key["systems"]),
        tuple(values),
        np.stack(list(values.values()), axis=1),
        tuple(key["units"][unit]["row"] for unit in units),
        tuple(tuple(key["units"][unit]["systems"]) for unit in units),
    )


def _sheet(
    path: Path, number: Mapping[str, int], raters: Sequence[str], partial: bool
) -> tuple[str, list[str], NDArray[np.float64]]:
    """(rater, faults, (units, criteria) values) of one sheet."""
    values = np.full((len(number), len(CRITERIA)), np.nan)
    faults: list[str] = []
    seen: dict[str, int] = {}
    by: set[str] = set()
    for line, row in _table(path):
        unit = row["unit"].strip()
        by.add(row["rater"].strip())
        if unit not in number:
            faults.append(f"{path}:{line}: there is no unit {unit!r} in the key: is it a sheet of another export?")
        elif unit in seen:
            faults.append(f"{path}:{line}: unit {unit} stands in line {seen[unit]} too")
        else:
            seen[unit] = line
            for j, name in enumerate(NAMES):
                given = row[name].strip()
                if given in map(str, VALUES):
                    values[number[unit], j] = int(given)
                elif given:
                    faults.append(f"{path}:{line}: {name} is {given!r}, and must be a whole number from 1 to 5")
                elif not partial:
                    faults.append(f"{path}:{line}: {name} is missing; --partial takes sheets that are not complete")
    if len(by) > 1 or not by <= set(raters):
        faults.insert(0, f"{path}: the column rater must hold one of {', '.join(raters)}, not {', '.join(sorted(by))}")
    if not partial and not faults and len(seen) < len(number):
        faults.append(f"{path}: {len(number) - len(seen):,} of {len(number):,} units are not there; --partial takes it")
    return next(iter(by), ""), faults, values


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line, row) of a CSV with a sheet's columns; a spreadsheet may have put semicolons or tabs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as CSV in UTF-8") from error
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    needed = ("rater", "unit", *NAMES)
    try:
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path}:1: no column {', '.join(missing)}: give a sheet that human export made, filled in")
        found = False
        for row in reader:
            found = True
            if None in row or None in row.values():
                raise DataError(f"{path}:{reader.line_num}: not as many fields as columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not readable as CSV: {error}") from error
    if not found:
        raise DataError(f"{path} holds no row")


def results(ratings: Ratings, *, seed: int = 42) -> dict[str, Any]:
    """Means of each system and differences from the first, with 95 % intervals over items; agreement of the raters.

    Returns:
        `systems` {name: {criterion: `mean`, `low`, `high`, `items`}}, `comparisons` (of each system with the first),
        `agreement` {"all" or a system: {criterion: {"fleiss_kappa", "krippendorff_alpha"}: `value`, `low`, `high`,
        `units`}}, `raters`, `signature`.
    """
    means = {system: _means(ratings, system) for system in ratings.systems}
    every = sorted({row for scores in means.values() for row in scores})
    report: dict[str, Any] = {
        "raters": list(ratings.raters),
        "signature": "scale:1-5|mean:items-of-raters|ci:bootstrap-items-95|kappa:fleiss|alpha:krippendorff-ordinal|v1",
        "systems": {},
        "comparisons": [],
        "agreement": {},
    }
    for system, scores in means.items():
        report["systems"][system] = {
            name: _mean([scores[row][j] for row in every if row in scores], seed) for j, name in enumerate(NAMES)
        }
    first, *others = ratings.systems
    for system in others:
        for j, name in enumerate(NAMES):
            pairs = [(means[system][row][j], means[first][row][j]) for row in every if row in means[system]]
            pairs = [pair for pair in pairs if not np.isnan(pair).any()]
            if pairs:
                a, b = np.array(pairs).T
                found = paired_bootstrap(a, b, seed=seed)
                report["comparisons"].append({"a": system, "b": first, "metric": name, **asdict(found)})
    for whose in ("all", *ratings.systems):
        used = [i for i, by in enumerate(ratings.by) if whose == "all" or whose in by]
        report["agreement"][whose] = {
            name: _agreement(ratings.values[used, :, j], [ratings.rows[i] for i in used], seed)
            for j, name in enumerate(NAMES)
        }
    return report


def _means(ratings: Ratings, system: str) -> dict[int, NDArray[np.float64]]:
    """{row: (criteria,) the raters' mean}; NaN for what nobody rated."""
    found = {}
    for row, by, values in zip(ratings.rows, ratings.by, ratings.values, strict=True):
        if system in by:
            rated = (~np.isnan(values)).sum(axis=0)
            found[row] = np.where(rated > 0, np.nansum(values, axis=0) / np.maximum(1, rated), np.nan)
    return found


def _mean(scores: Sequence[float], seed: int) -> dict[str, Any]:
    rated = np.array([score for score in scores if not np.isnan(score)])
    if not len(rated):
        return {"mean": None, "low": None, "high": None, "items": 0}
    found = paired_bootstrap(rated, np.zeros(len(rated)), seed=seed)
    return {"mean": found.difference, "low": found.low, "high": found.high, "items": len(rated)}


def _agreement(values: NDArray[np.float64], rows: Sequence[int], seed: int) -> dict[str, Any]:
    counts = np.stack([(values == value).sum(axis=1) for value in VALUES], axis=1)
    kappa, alpha = estimates(counts, rows, values.shape[1], seed=seed)
    return {"fleiss_kappa": asdict(kappa), "krippendorff_alpha": asdict(alpha)}
