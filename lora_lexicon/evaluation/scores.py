"""Rows scored under the metrics asked for, by one process a core, and what follows from them. Knows nothing of files.

Figures come with signature and interval, differences of two systems with interval and two tests.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.bootstrap import grouped, interval_of, randomised, resampled
from lora_lexicon.evaluation.protocol import Protocol, counted
from lora_lexicon.evaluation.registry import METRICS, Combine, Metric, Pairs, check

if TYPE_CHECKING:
    from lora_lexicon.evaluation.encoded import Encoder

Progress = Callable[[str, int], object]  # metric, how many more rows
ROWS_AT_ONCE = 2000  # of one task of a worker
FEW = 4000  # rows that one process scores sooner than workers have started


@dataclass(frozen=True)
class Run:
    """One file's rows under every metric asked for: what figures, intervals and tests are computed from.

    Attributes:
        statistics: metric -> (n, k), whose sums make the figure; none of metrics that read all rows at once.
        signatures: metric -> signature.
    """

    pairs: Pairs
    statistics: Mapping[str, NDArray[np.float64]]
    signatures: Mapping[str, str]
    encoder: "Encoder | None" = field(default=None, repr=False)

    def whole(self, metric: str, rows: NDArray[np.int64] | None = None) -> float | None:
        """The figure of a metric that reads all rows at once, of these rows."""
        pairs = self.pairs if rows is None else [self.pairs[i] for i in rows]
        if metric == "mauve":
            from lora_lexicon.evaluation.encoded import mauve

            assert self.encoder is not None
            return mauve(self.encoder, pairs)
        found = METRICS[metric].whole
        assert found is not None
        return found(pairs)


def score(
    predictions: Sequence[str],
    references: Sequence[tuple[str, ...]],
    names: Sequence[str],
    *,
    protocol: Protocol = "one-to-one",
    combine: Combine = "pooled",
    drop_zeros: bool = False,
    encoder: "Encoder | None" = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Scores n predictions, each against its own references.

    Args:
        protocol: how the references were found, for the signatures.
        combine: `pooled`: n-grams of all references are counted together by the metrics that can; `best`: each
            reference alone, and the best counts. Other metrics take the best in any case.
        drop_zeros: rows that score 0 are left out of a mean, as the LM-Lexicon paper's code does.
        encoder: of the metrics that read one.
        workers: processes; by default one a core, or none for a few thousand rows.

    Raises:
        DataError, MissingExtraError: as `check`; no rows; two lengths.
    """
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"{len(predictions):,} predictions and {len(references):,} lists of references: as many of both"
        )
    check(names, encoder=encoder is not None, combine=combine, drop_zeros=drop_zeros)
    pairs = list(zip(predictions, references, strict=True))
    plain = [name for name in names if METRICS[name].row is not None]
    statistics = _by_row(pairs, plain, combine, workers, progress)
    for name in names:
        if METRICS[name].encoder and METRICS[name].by_row:
            assert encoder is not None
            statistics[name] = _encoded(name, encoder, pairs, progress)
    if drop_zeros:
        statistics = {name: rows * (rows[:, :1] != 0) for name, rows in statistics.items()}
    how = f"protocol:{protocol}", f"refs:{counted(references)}"
    signatures = {name: _signature(METRICS[name], encoder, combine, drop_zeros, *how) for name in names}
    return Run(pairs, statistics, signatures, encoder)


def figure(
    runs: Sequence[Run],
    metric: str,
    member: NDArray[np.int64],
    *,
    rows: NDArray[np.int64] | None = None,
    samples: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """`value`, `signature` and `interval` of a metric, the mean over runs; of several runs also each, and `deviation`.

    The interval holds 95 % of bootstrap resamples of groups, the same ones drawn for all runs. It is None for metrics
    that read all rows at once, for one group, and for samples 0. A value is None where no row counts.

    Args:
        member: (n,) the number of each row's group (a headword).
        rows: those that count; all unless given.
        samples: resamples.
    """
    if not METRICS[metric].by_row:
        values, interval = [run.whole(metric, rows) for run in runs], None
    else:
        sums = _summed(runs, metric, member, rows)
        values = [_json(v) for v in _values(metric, sums.sum(axis=0)[None], len(runs))[0]]
        interval = None
        if samples and len(sums) > 1 and None not in values:
            drawn = _values(metric, resampled(sums, samples, seed), len(runs)).mean(axis=1)
            drawn = drawn[np.isfinite(drawn)]
            interval = [float(v) for v in np.quantile(drawn, [0.025, 0.975])]
    known = [value for value in values if value is not None]
    found: dict[str, Any] = {
        "value": float(np.mean(known)) if len(known) == len(values) else None,
        "signature": runs[0].signatures[metric],
        "interval": interval,
    }
    if len(runs) > 1:
        found["runs"] = values
        found["deviation"] = float(np.std(known, ddof=1)) if len(known) == len(values) else None
    return found


def difference(
    a: Sequence[Run],
    b: Sequence[Run],
    metric: str,
    member: NDArray[np.int64],
    *,
    samples: int = 10_000,
    seed: int = 42,
) -> dict[str, Any] | None:
    """a - b, with its 95 % interval and p by the paired bootstrap, and p by approximate randomisation, over groups.

    Run i of one side stands against run i of the other, and all runs of a group are drawn, or change sides, together.
    None for a metric that reads all rows at once, and where a side has no figure.

    Raises:
        DataError: another number of runs on either side.
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} files against {len(b)}: give as many of both, in one order of seeds")
    if not METRICS[metric].by_row:
        return None
    left, right = _summed(a, metric, member), _summed(b, metric, member)
    runs = len(a)

    def between(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return _values(metric, x, runs).mean(axis=1) - _values(metric, y, runs).mean(axis=1)

    seen = float(between(left.sum(axis=0)[None], right.sum(axis=0)[None])[0])
    if not math.isfinite(seen):
        return None
    drawn = resampled(np.concatenate([left, right], axis=1), samples, seed)
    spread = between(drawn[:, : left.shape[1]], drawn[:, left.shape[1] :])
    found = interval_of(seen, spread[np.isfinite(spread)], len(left))
    return {
        "metric": metric,
        "difference": seen,
        "interval": [found.low, found.high],
        "p_bootstrap": found.p,
        "p_randomisation": randomised(left, right, between, samples=samples, seed=seed),
    }


def _summed(
    runs: Sequence[Run], metric: str, member: NDArray[np.int64], rows: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """(g, runs * k) a metric's statistics summed over each group, run beside run."""
    beside = np.concatenate([run.statistics[metric] for run in runs], axis=1)
    return grouped(beside, member) if rows is None else grouped(beside[rows], member[rows])


def _values(metric: str, sums: NDArray[np.float64], runs: int) -> NDArray[np.float64]:
    """(m, runs)."""
    parts = sums.reshape(len(sums) * runs, -1)
    return METRICS[metric].value(parts).reshape(len(sums), runs)


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _signature(
    metric: Metric, encoder: "Encoder | None", combine: Combine, drop_zeros: bool, protocol: str, references: str
) -> str:
    if metric.encoder:
        from lora_lexicon.evaluation.encoded import signature

        assert encoder is not None
        parts = [signature(metric.name, encoder)]
    else:
        parts = [metric.signature()]
    parts.append(protocol)
    if metric.pools:
        parts.append(f"combine:{combine}")
    parts.append(references)
    if metric.score:
        parts.append(f"zeros:{'dropped' if drop_zeros else 'kept'}")
    return "|".join(parts)


def _by_row(
    pairs: Pairs, names: Sequence[str], combine: Combine, workers: int | None, progress: Progress | None
) -> dict[str, NDArray[np.float64]]:
    """(n, k) statistics of each metric, by one process a core where there are many rows."""
    if not names:
        return {}
    chunks = [pairs[start : start + ROWS_AT_ONCE] for start in range(0, len(pairs), ROWS_AT_ONCE)]
    processes = min(workers or _cores(), len(chunks))
    parts: list[list[NDArray[np.float64]]] = []

    def gather(found: Iterable[list[NDArray[np.float64]]]) -> None:
        for part in found:
            parts.append(part)
            for name in names if progress else ():
                progress(name, len(part[0]))  # type: ignore[misc]

    tasks: list[tuple[Pairs, list[str], Combine]] = [(chunk, list(names), combine) for chunk in chunks]
    if processes == 1 or (workers is None and len(pairs) <= FEW):
        gather(_chunk(task) for task in tasks)
    else:
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool
        from multiprocessing import get_context

        try:
            # Not forked: a progress bar's thread, or torch's, may hold a lock.
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                gather(pool.map(_chunk, tasks))
        except BrokenProcessPool as error:
            raise DataError("a scoring process was killed, perhaps for its memory: try --workers 1") from error
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunk(task: tuple[Pairs, list[str], Combine]) -> list[NDArray[np.float64]]:
    """The statistics (m, k) of each metric on some rows."""
    pairs, names, combine = task
    return [_statistics(METRICS[name], pairs, combine) for name in names]


def _statistics(metric: Metric, pairs: Pairs, combine: Combine) -> NDArray[np.float64]:
    row = metric.row
    assert row is not None
    if combine == "best" and metric.pools:
        found: list[Any] = [max(row(guess, [r]) for r in references) for guess, references in pairs]  # type: ignore[type-var]
    else:
        found = [row(guess, references) for guess, references in pairs]
    rows = np.array(found, dtype=np.float64)
    return np.stack([rows, np.ones(len(rows))], axis=1) if rows.ndim == 1 else rows


def _encoded(name: str, encoder: "Encoder", pairs: Pairs, progress: Progress | None) -> NDArray[np.float64]:
    from lora_lexicon.evaluation import encoded

    def told(rows: int) -> None:
        if progress:
            progress(name, rows)

    if name == "moverscore":
        found = encoded.moverscore(encoder, pairs, told)
    else:
        found = encoded.bertscore(encoder, pairs, told)
    if name == "bertscore-rescaled":
        baseline = encoded.bertscore_baseline(encoder, pairs)
        found = 100 * (found / 100 - baseline) / (1 - baseline)
    return np.stack([found, np.ones(len(found))], axis=1)
