"""`lora-lexicon score`: figures for files of predictions, whoever wrote them."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, emit, guarded, note, progress, quiet_libraries, show_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_lexicon.data.predictions import Prediction
    from lora_lexicon.evaluation.encoded import Encoder
    from lora_lexicon.evaluation.scores import Run

    Found = tuple[Run, list[Prediction]]

TESTS = ("p_bootstrap", "p_randomisation")


class Against(StrEnum):
    """Which references a prediction is held against."""

    given = "given"
    one_to_one = "one-to-one"
    one_to_many = "one-to-many"
    one_to_many_term = "one-to-many-term"


class Combine(StrEnum):
    """What is done with several references."""

    pooled = "pooled"
    best = "best"


class Column(StrEnum):
    """What rows can be told by."""

    domain = "domain"
    source = "source"


MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="bleu, rouge-l, sacrebleu, sacrebleu-sentence, nltk-bleu, nltk-bleu-1 to -4, meteor, meteor-stem, chrf, "
        "nist, exact, distinct, distinct-1, length, length-ratio, bertscore, bertscore-rescaled, moverscore, mauve "
        "(docs/scores.md). Repeatable, or a list with commas.",
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", metavar="MODEL", help="A folder or Hub name, for bertscore, moverscore and mauve."),
]
LayerOption = Annotated[
    int | None, typer.Option("--layer", min=0, help="The encoder's layer that is read; by default the last.")
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="TSV",
        help="bert-score's file of baselines for the encoder; else bertscore-rescaled measures it on unrelated "
        "definitions.",
    ),
]


@guarded
def score(
    predictions: Annotated[
        list[Path],
        typer.Argument(
            metavar="PREDICTIONS...",
            help="JSON Lines of term, context, prediction, and references or definition. Several files are runs of one "
            "system, such as seeds 21, 42, 84: their mean and deviation are told.",
        ),
    ],
    metrics: MetricOption = None,
    protocol: Annotated[
        Against,
        typer.Option(
            help="given: the row's own references; one-to-one: its definition; one-to-many: those of all rows with its "
            "term and context; one-to-many-term: of all rows with its term."
        ),
    ] = Against.given,
    combine: Annotated[
        Combine,
        typer.Option(
            help="Several references: pooled (n-grams counted together, where the metric can) or best (each alone). "
            "Other metrics take the best."
        ),
    ] = Combine.pooled,
    drop_zeros: Annotated[
        bool, typer.Option("--drop-zeros", help="Leave rows that score 0 out of a mean, as the paper's code does.")
    ] = False,
    references: Annotated[
        Path | None,
        typer.Option(
            "--references",
            metavar="FILE",
            help="What the predictions are of, line by line: term, context, and references or definition.",
        ),
    ] = None,
    pool: Annotated[
        list[Path] | None,
        typer.Option("--pool", metavar="FILE", help="More definitions for one-to-many, such as those of valid."),
    ] = None,
    encoder: EncoderOption = None,
    layer: LayerOption = None,
    baseline: BaselineOption = None,
    by: Annotated[
        list[Column] | None, typer.Option("--by", help="Tell the figures of each domain, or source. Repeatable.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Another system's predictions of the same rows, one file for each of PREDICTIONS. Repeatable.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Bootstrap resamples of each interval; 0: no intervals.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")] = 42,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Score empty predictions; by default they are refused.")
    ] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; by default one a core.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score files of predictions. Every figure has a signature and an interval over headwords."""
    from lora_lexicon import __version__
    from lora_lexicon.data.predictions import need_same_rows, read_definitions, read_predictions
    from lora_lexicon.errors import DataError
    from lora_lexicon.evaluation.bootstrap import numbered
    from lora_lexicon.evaluation.protocol import references_of
    from lora_lexicon.evaluation.registry import METRICS, check, names_of
    from lora_lexicon.evaluation.scores import figure
    from lora_lexicon.evaluation.scores import score as score_rows

    names = names_of(metrics or ["bleu,rouge-l"])
    check(names, encoder=encoder is not None, combine=combine.value, drop_zeros=drop_zeros)
    others = list(against or ())
    if len(others) % len(predictions):
        raise typer.BadParameter(
            f"--against: {len(others)} files against {len(predictions)}: one for each of PREDICTIONS"
        )
    if others and not samples:
        raise typer.BadParameter("--against is tested with --samples, of which there are 0")
    if pool and not protocol.startswith("one-to-many"):
        raise typer.BadParameter(f"--pool is of --protocol one-to-many and one-to-many-term, not of {protocol}")
    files = [*predictions, *others]
    tables = [read_predictions(file, gold=references, allow_empty=allow_empty) for file in files]
    for file, table in zip(files[1:], tables[1:], strict=True):
        need_same_rows(tables[0], table, (files[0], file))
    rows = tables[0]
    groups = {column.value: _groups(files[0], rows, column.value) for column in dict.fromkeys(by or ())}
    try:
        wanted = references_of(rows, protocol.value, [row for file in pool or () for row in read_definitions(file)])
    except DataError as error:
        raise DataError(f"{references or files[0]}: {error}") from error
    model = open_encoder(encoder, layer, baseline)
    with progress() as bar:
        bars = [name for name in names if METRICS[name].by_row]
        tasks = {name: bar.add_task(name, total=len(files) * len(rows)) for name in bars}
        runs = [
            score_rows(
                [row.text for row in table], wanted, names, protocol=protocol.value, combine=combine.value,
                drop_zeros=drop_zeros, encoder=model, workers=workers,
                progress=lambda name, done: bar.advance(tasks[name], done),
            )
            for table in tables
        ]  # fmt: skip
        bar.stop()
    own = runs[: len(predictions)]
    member = numbered([row.headword for row in rows])

    def figures(chosen: "NDArray[np.int64] | None" = None) -> dict[str, Any]:
        return {name: figure(own, name, member, rows=chosen, samples=samples, seed=seed) for name in names}

    report = {
        "version": __version__,
        "predictions": [str(file) for file in predictions],
        "protocol": protocol.value,
        "rows": len(rows),
        "headwords": int(member.max()) + 1,
        "empty": [sum(not row.text.strip() for row in table) for table in tables[: len(predictions)]],
        "samples": samples,
        "seed": seed,
        "scores": figures(),
        "by": {
            column: {name: {"rows": len(places), "scores": figures(places)} for name, places in found.items()}
            for column, found in groups.items()
        },
        "against": _compared(own, runs[len(predictions) :], names, others, member, samples, seed),
    }
    if as_json:
        emit(report)
    else:
        _show(report)


def open_encoder(name: str | None, layer: int | None, baseline: Path | None) -> "Encoder | None":
    """The encoder, where one is named; refuses options of one that is not."""
    if name is None:
        if layer is not None or baseline is not None:
            raise typer.BadParameter(
                f"{'--layer' if layer is not None else '--baseline'} is of an encoder: add --encoder"
            )
        return None
    from lora_lexicon.evaluation.encoded import Encoder

    quiet_libraries()
    return Encoder(name, layer, baseline)


def _groups(file: Path, rows: "Sequence[Prediction]", column: str) -> "dict[str, NDArray[np.int64]]":
    """Row numbers by a column's values, in the order of the alphabet."""
    import numpy as np

    from lora_lexicon.errors import DataError

    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if column not in row.labels:
            raise DataError(f"{file}:{row.line}: no column {column!r}, which --by {column} reads")
        found.setdefault(row.labels[column], []).append(i)
    return {name: np.array(found[name], dtype=np.int64) for name in sorted(found)}


def _compared(
    own: "Sequence[Run]",
    others: "Sequence[Run]",
    names: Sequence[str],
    files: Sequence[Path],
    member: "NDArray[np.int64]",
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Each metric against each other system; each test's p-values are corrected for all of them (Holm)."""
    from lora_lexicon.evaluation.bootstrap import holm
    from lora_lexicon.evaluation.scores import difference

    found = []
    for start in range(0, len(others), len(own)):
        of = [str(file) for file in files[start : start + len(own)]]
        for name in names:
            row = difference(own, others[start : start + len(own)], name, member, samples=samples, seed=seed)
            if row is not None:
                found.append({"against": of, **row})
    for test in TESTS:
        for row, p in zip(found, holm([row[test] for row in found]), strict=True):
            row[f"{test}_holm"] = p
    return found


def _show(report: dict[str, Any]) -> None:
    """Tables for a person: figures, figures by column, differences; the signatures as notes."""
    several = len(report["predictions"]) > 1
    columns = ("metric", "value", *(["deviation"] if several else []), "95 % interval")
    files = ", ".join(report["predictions"])
    show_table(
        f"{files}: {report['rows']:,} rows, {report['headwords']:,} headwords", columns, figure_rows(report["scores"])
    )
    for column, groups in report["by"].items():
        rows = [(name, found["rows"], *line) for name, found in groups.items() for line in figure_rows(found["scores"])]
        show_table(f"by {column}", (column, "rows", *columns), rows)
    if report["samples"] and (unsure := without_interval(report["scores"])):
        note(unsure)
    if report["against"]:
        rows = [
            (
                ", ".join(row["against"]), row["metric"], f"{row['difference']:+.2f}",
                f"{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}",
                *(f"{row[f'{test}_holm']:.4f}" for test in TESTS),
            )
            for row in report["against"]
        ]  # fmt: skip
        titles = ("against", "metric", "difference", "95 % interval", "p bootstrap", "p randomisation")
        show_table("Differences; p-values are corrected (Holm)", titles, rows)
    for name, found in report["scores"].items():
        note(f"{name}: {found['signature']}")


def figure_rows(scores: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a metric: name, value, the deviation of several runs, interval."""
    found = []
    for name, of in scores.items():
        low_high = "-" if of["interval"] is None else f"{of['interval'][0]:.2f} to {of['interval'][1]:.2f}"
        deviation = [_number(of["deviation"])] if "deviation" in of else []
        found.append((name, _number(of["value"]), *deviation, low_high))
    return found


def without_interval(*scores: Mapping[str, Any]) -> str:
    """A line on the metrics of figures that have no interval, and so no tested difference; empty if all have one."""
    found = dict.fromkeys(name for of in scores for name, each in of.items() if each["interval"] is None)
    return f"no interval, and no test of differences: {', '.join(found)} (docs/scores.md says why)" if found else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
