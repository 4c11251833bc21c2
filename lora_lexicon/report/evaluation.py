"""From what `evaluate --out` left to a report, of one evaluation or of several of the same entries.

Runs no model: intervals and differences are computed from the rows that were kept.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from lora_lexicon.data.entry import headword
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.report import footprint_picture
from lora_lexicon.evaluation.run import Evaluation, Metric, intervals
from lora_lexicon.evaluation.saved import Saved
from lora_lexicon.report import made, rows
from lora_lexicon.report.differences import DIGITS, NO_BETTER, differences, shown, told
from lora_lexicon.report.document import Better, Block, Cell, Document, Figure, Picture, Section, Table

NAMED = 4  # systems that a title names
Names = Mapping[tuple[int, str], str]


def document_of(
    saved: Sequence[Saved], *, examples: int = 5, seed: int = 42, progress: rows.Progress | None = None
) -> Document:
    """One report on the systems of all evaluations.

    Args:
        examples: how many, each: the best, the worst, and drawn at random by `seed`.
        progress: of the search for leaks.

    Raises:
        DataError: evaluations of other entries.
    """
    _need_same(saved)
    names = _names(saved)
    systems = [replace(each, name=names[i, each.name]) for i, of in enumerate(saved) for each in of.evaluations]
    report = saved[0].report
    found = differences(saved, systems, names)
    leaks, leaked = rows.leaks(report, progress)
    faults, faulty = rows.faults(systems)
    sections = [
        Section("Systems", [_systems(systems), *_further(saved, names)]),
        Section("Differences", [shown(found, systems)]),
        Section("Footprint and fidelity", [_footprint(systems)]),
        Section("Domains", [*rows.domains(systems)]),
        Section("Routing", [*rows.routing(systems)]),
        Section("Examples", [*rows.examples(systems, examples, seed)]),
        Section("Definitions that say nothing", faults),
        Section("Leaks", leaks),
        Section("Settings", [made.settings(saved)]),
        Section("Signatures", [made.signatures(saved)]),
        Section("How to make it again", [*made.again(saved)]),
    ]
    summary = [_what(report, systems), *_best(systems), *told(found), *faulty, *leaked]
    few = ", ".join(each.name for each in systems) if len(systems) <= NAMED else _number(len(systems), "system")
    return Document(f"Evaluation of {few}", summary, sections)


def _need_same(saved: Sequence[Saved]) -> None:
    first = saved[0]
    for other in saved[1:]:
        theirs, ours = ((of.report["entries_fingerprint"], of.report["split"]) for of in (other, first))
        if theirs != ours or other.evaluations[0].entries != first.evaluations[0].entries:
            raise DataError(
                f"{other.path} is of other entries ({theirs[0][:12]}, {theirs[1]}, {other.report['rows']:,} rows) than "
                f"{first.path} ({ours[0][:12]}, {ours[1]}, {first.report['rows']:,} rows): a report is of the same ones"
            )


def _names(saved: Sequence[Saved]) -> Names:
    """{(number of the evaluation, system): its name in the report}: with the folder's where two systems share one."""
    every = Counter(each.name for of in saved for each in of.evaluations)
    names: dict[tuple[int, str], str] = {}
    for i, of in enumerate(saved):
        for each in of.evaluations:
            name = each.name if every[each.name] == 1 else f"{of.path.resolve().name}/{each.name}"
            names[i, each.name] = name if name not in names.values() else f"{name} ({i + 1})"
    return names


def _systems(systems: Sequence[Evaluation]) -> Table:
    columns = ("system", "trained parameters", "MB to ship", "MB in memory", "loss", "BLEU", "ROUGE-L", "tokens/s")
    cells: list[list[Cell]] = []
    for each in systems:
        found, ends = each.summary(), intervals(each)
        scores = [Figure(found[m], *ends.get(m, ()), digits=DIGITS.get(m, 2)) for m in get_args(Metric)]
        sizes = [Figure(found[f"{key}_megabytes"], digits=1) for key in ("ship", "memory")]
        cells.append([each.name, each.trained_parameters, *sizes, *scores, Figure(each.tokens_per_second, digits=0)])
    counts = sorted({len(each.predictions or ()) for each in systems})
    note = (
        "Loss is in nats per definition token, BLEU and ROUGE-L are from 0 to 100 "
        f"({' or '.join(f'{count:,}' for count in counts)} of {len(systems[0].entries):,} entries were defined). "
        "Brackets hold 95 % intervals of a bootstrap over headwords. The best of a column is bold, be it by chance."
    )
    better: list[Better] = ["", "", "", "", "low", "high", "high", ""]
    return Table("What each system costs, and how well it does", columns, cells, note, better)


def _further(saved: Sequence[Saved], names: Names) -> Iterator[Block]:
    """Figures of `--metric`, where any were asked for."""
    found = {
        names[i, system]: {metric: Figure(of["value"], *(of["interval"] or ())) for metric, of in scores.items()}
        for i, evaluation in enumerate(saved)
        for system, scores in evaluation.report["scores"].items()
    }
    metrics = list(dict.fromkeys(metric for scores in found.values() for metric in scores))
    if not metrics:
        return
    cells = [[name, *(scores.get(metric) for metric in metrics)] for name, scores in found.items()]
    unsure = [m for m in metrics if all(scores[m].low is None for scores in found.values() if m in scores)]
    note = f"No interval, as they are no sums over rows: {', '.join(unsure)}." if unsure else ""
    better: list[Better] = ["", *("" if metric in NO_BETTER else "high" for metric in metrics)]
    yield Table("Further scores", ["system", *metrics], cells, note, better)


def _footprint(systems: Sequence[Evaluation]) -> Picture:
    png, alt = footprint_picture([each.summary() for each in systems])
    caption = "Left: what is shipped. Right: what is held in memory. Lower and further to the left is better."
    return Picture("footprint-fidelity", png, alt, caption)


def _what(report: dict[str, Any], systems: Sequence[Evaluation]) -> str:
    entries = systems[0].entries
    heads = len({headword(entry.term) for entry in entries})
    return (
        f"{_number(len(systems), 'system')} on {_number(len(entries), 'entry', 'entries')} of "
        f"{_number(heads, 'headword')}, of the split {report['split']} of {report['data']}."
    )


def _best(systems: Sequence[Evaluation]) -> Iterator[str]:
    """Who is best by what."""
    parts = []
    for metric in get_args(Metric):
        digits, title = DIGITS.get(metric, 2), made.TITLES[metric]
        summaries = {each.name: each.summary()[metric] for each in systems}
        values = {name: round(value, digits) for name, value in summaries.items() if value is not None}
        if not values:
            continue
        top = min(values.values()) if metric == "loss" else max(values.values())
        best = [name for name, value in values.items() if value == top]
        if len(systems) == 1:
            parts.append(f"{title} {Figure(top, digits=digits)}")
            continue
        kind = "lowest loss" if metric == "loss" else f"highest {title}"
        parts.append(f"{' and '.join(best)}, the {kind} ({Figure(top, digits=digits)})")
    yield f"{systems[0].name}: {', '.join(parts)}." if len(systems) == 1 else f"Best: {'; '.join(parts)}."
    low, high = (of(systems, key=lambda each: each.ship_bytes) for of in (min, max))
    if low.ship_bytes < high.ship_bytes:
        small, large = (f"{each.name} ({each.ship_bytes / 1e6:,.1f} MB)" for each in (low, high))
        yield f"Smallest to ship: {small}; largest: {large}."


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
