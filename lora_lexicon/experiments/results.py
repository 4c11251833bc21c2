"""What systems wrote, as figures: each a mean over seeds, and differences with their tests. Knows no table.

A system is named, and has one list of rows a seed (`runs`); all systems of one `Results` have the same entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.data.predictions import Prediction
from lora_lexicon.evaluation.bootstrap import holm, numbered, paired_bootstrap
from lora_lexicon.evaluation.metrics import bleu
from lora_lexicon.evaluation.protocol import references_of
from lora_lexicon.evaluation.registry import METRICS, check, names_of
from lora_lexicon.evaluation.run import Evaluation
from lora_lexicon.evaluation.scores import Run, difference, figure, score
from lora_lexicon.experiments.runs import Row
from lora_lexicon.recipe import ExperimentRecipe
from lora_lexicon.report.document import Better, Cell, Figure, Table

LOSS = "loss"
LEVEL = 0.05  # of p, below which a difference is told
NEITHER = {"length", "length-ratio"}  # metrics that are neither better high nor low
SHOWN = {"bleu": "BLEU", "rouge-l": "ROUGE-L", LOSS: "loss"}


def names_for(recipe: ExperimentRecipe) -> list[str]:
    """The recipe's metrics.

    Raises:
        DataError: an unknown one, or one that needs an encoder.
    """
    names = names_of(recipe.metrics)
    check(names, encoder=False, drop_zeros=recipe.drop_zeros)
    return names


@dataclass(frozen=True)
class Difference:
    """a - b in one metric: over headwords drawn anew (interval), and by approximate randomisation (p)."""

    a: str
    b: str
    metric: str
    value: float
    low: float
    high: float
    p: float


class Results:
    """Systems side by side on the same entries.

    Args:
        systems: name -> rows of each seed.
    """

    def __init__(
        self, recipe: ExperimentRecipe, entries: Sequence[Entry], systems: Mapping[str, Sequence[Sequence[Row]]]
    ) -> None:
        self.recipe, self.entries, self.systems = recipe, entries, systems
        self.metrics = names_for(recipe)
        self.member = numbered([headword(entry.term) for entry in entries])

    @cached_property
    def references(self) -> list[tuple[str, ...]]:
        rows = [
            Prediction(i, entry.term, entry.context, "", (entry.definition,), entry.definition)
            for i, entry in enumerate(self.entries)
        ]
        return references_of(rows, self.recipe.protocol)

    @cached_property
    def scored(self) -> dict[str, list[Run]]:
        """Each system's seeds under all metrics."""
        return {
            name: [
                score(
                    [row["prediction"] for row in rows], self.references, self.metrics,
                    protocol=self.recipe.protocol, drop_zeros=self.recipe.drop_zeros,
                )
                for rows in runs
            ]
            for name, runs in self.systems.items()
        }  # fmt: skip

    @cached_property
    def signatures(self) -> dict[str, str]:
        first = next(iter(self.scored.values()))[0]
        return {SHOWN.get(name, name): first.signatures[name] for name in self.metrics}

    @cached_property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(entry.source for entry in self.entries))

    def has_loss(self, system: str) -> bool:
        """Whether a system's loss is known: not of what was chosen among samples."""
        return "nll" in self.systems[system][0][0]

    def figure(self, system: str, metric: str, source: str | None = None) -> Figure:
        """The mean over seeds with its deviation, of all entries or of a source's."""
        if metric == LOSS:
            if not self.has_loss(system):
                return Figure(None)
            losses = [nll.sum() / tokens.sum() for nll, tokens in map(_loss, self.systems[system])]
            deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
            return Figure(float(np.mean(losses)), deviation=deviation, digits=4)
        rows = None
        if source is not None:
            rows = np.flatnonzero([entry.source == source for entry in self.entries])
        found = figure(self.scored[system], metric, self.member, rows=rows)
        low, high = found["interval"] or (None, None)
        return Figure(found["value"], low, high, found.get("deviation"))

    def difference(self, a: str, b: str, metric: str) -> Difference | None:
        """a - b; None where a metric has no figure, or none that rows add up to."""
        if metric == LOSS:
            if not (self.has_loss(a) and self.has_loss(b)):
                return None
            (left, tokens), (right, others) = (_mean_loss(self.systems[name]) for name in (a, b))
            if not np.array_equal(tokens, others):
                return None
            groups = [headword(entry.term) for entry in self.entries]
            found = paired_bootstrap(left, right, weights=tokens, groups=groups)
            return Difference(a, b, LOSS, found.difference, found.low, found.high, found.p)
        one, other = self.scored[a], self.scored[b]
        said = difference(one, other, metric, self.member) if METRICS[metric].by_row else None
        if said is None:
            return None
        low, high = said["interval"]
        return Difference(a, b, metric, said["difference"], low, high, said["p_randomisation"])

    def evaluations(self) -> list[Evaluation]:
        """What each system of which the loss is known wrote with the first seed; sizes are not known here."""
        found = []
        for name, runs in self.systems.items():
            if not self.has_loss(name):
                continue
            texts, domains = ([row[key] for row in runs[0]] for key in ("prediction", "domain"))
            rated = [bleu(text, [entry.definition]) for text, entry in zip(texts, self.entries, strict=True)]
            nll, tokens = _loss(runs[0])
            own = (nll, tokens.astype(np.int64), domains, texts, np.array(rated), None, None)
            found.append(Evaluation(name, self.entries, 0, 0, 0, *own))
        return found

    # ---- as tables

    def table(self, title: str, note: str = "") -> Table:
        """A row a system: loss where any has it, and each metric, of all entries and of each source."""
        columns, better = ["system"], list[Better]([""])
        cells: list[list[Cell]] = [[name] for name in self.systems]
        wanted: list[tuple[str, str | None]] = [(LOSS, None)] if any(map(self.has_loss, self.systems)) else []
        wanted += [(metric, None) for metric in self.metrics]
        if len(self.sources) > 1:
            wanted += [(metric, source) for source in self.sources for metric in self.metrics]
        for metric, source in wanted:
            shown = SHOWN.get(metric, metric)
            columns.append(shown if source is None else f"{source}: {shown}")
            better.append("low" if metric == LOSS else "" if metric in NEITHER else "high")
            for cell, name in zip(cells, self.systems, strict=True):
                cell.append(self.figure(name, metric, source))
        return Table(title, columns, cells, note, better)

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[Difference]:
        """Of each pair in every metric that has tests."""
        found = [self.difference(a, b, metric) for a, b in pairs for metric in (LOSS, *self.metrics)]
        return [one for one in found if one is not None]


def difference_table(found: Sequence[Difference], title: str = "Differences") -> Table:
    """A row a difference, its p corrected for being one of so many (Holm, 1979)."""
    rows: list[list[Cell]] = [
        [d.a, d.b, SHOWN.get(d.metric, d.metric), Figure(d.value, d.low, d.high, digits=_digits(d), signed=True),
         Figure(d.p, digits=4), Figure(p, digits=4)]
        for d, p in zip(found, holm([d.p for d in found]), strict=True)
    ]  # fmt: skip
    note = "All seeds together, over headwords. p of a loss: paired bootstrap; of a score: approximate randomisation."
    return Table(title, ("system", "minus", "in", "difference", "p", "p, corrected"), rows, note)


@dataclass(frozen=True)
class Claim:
    """What the paper says of two systems: a is the better one."""

    text: str
    a: str
    b: str


def verdicts(claims: Sequence[Claim], found: Sequence[Difference]) -> list[str]:
    """Whether differences in BLEU and in loss bear each claim out, a sentence each.

    Each p is corrected for the number of all differences found, as in their table (Holm, 1979).
    """
    by = {(one.a, one.b, one.metric): one for one in found}
    told = {
        claim: [one for metric in ("bleu", LOSS) if (one := by.get((claim.a, claim.b, metric)))] for claim in claims
    }
    corrected = dict(zip(found, holm([one.p for one in found]), strict=True))
    said = []
    for claim, of in told.items():
        parts = []
        for one in of:
            p, better = corrected[one], one.value * (-1 if one.metric == LOSS else 1) > 0
            way = "cannot be told" if p >= LEVEL else "holds" if better else "it is the other way"
            parts.append(f"by {SHOWN[one.metric]} {way} ({one.value:+.{_digits(one)}f}, p = {p:.4f})")
        said.append(f"{claim.text}: {'; '.join(parts) or 'not measured'}.")
    return said


def _digits(found: Difference) -> int:
    return 4 if found.metric == LOSS else 2


def _loss(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) nats and (n,) tokens of each row."""
    return np.array([row["nll"] for row in rows]), np.array([row["tokens"] for row in rows], dtype=np.float64)


def _mean_loss(runs: Sequence[Sequence[Row]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) nats of each row, the mean over seeds, and (n,) tokens."""
    return np.mean([_loss(rows)[0] for rows in runs], axis=0), _loss(runs[0])[1]
