"""Differences of systems from the first, with a test that is corrected for all of them: as a table, and in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from lora_lexicon.evaluation.bootstrap import holm
from lora_lexicon.evaluation.run import Evaluation, Metric, compare
from lora_lexicon.evaluation.saved import Saved
from lora_lexicon.report.document import Block, Figure, Table, Text
from lora_lexicon.report.made import TITLES

DIGITS = {"loss": 3}
LEVEL = 0.05  # of a p-value below which a difference is said to hold
NO_BETTER = ("length", "length-ratio")  # metrics of which more is neither better nor worse
TOLD = 6  # differences that the summary tells


@dataclass(frozen=True)
class Difference:
    """a - b of a metric, with p, and p corrected for all that are told of."""

    a: str
    b: str
    metric: str
    figure: Figure
    p: float
    corrected: float

    @property
    def holds(self) -> bool:
        return self.corrected < LEVEL

    @property
    def favours(self) -> str:
        """The better system, where the difference holds and the metric says which is better."""
        if not self.holds or self.metric in NO_BETTER:
            return ""
        return self.a if ((self.figure.value or 0) > 0) != (self.metric == "loss") else self.b


def differences(
    saved: Sequence[Saved], systems: Sequence[Evaluation], names: Mapping[tuple[int, str], str]
) -> list[Difference]:
    """Every system against the first, by the rows that were kept; of further metrics, as each evaluation compared them.

    Args:
        names: {(number of the evaluation, system): its name among `systems`}.
    """
    first, *others = systems
    found = [
        compare(other, first, metric)
        for metric in get_args(Metric)
        for other in others
        if _comparable(other, first, metric)
    ]
    for i, of in enumerate(saved):
        further = (each for each in of.report["comparisons"] if each["metric"] not in get_args(Metric))
        found += [{**each, "a": names[i, each["a"]], "b": names[i, each["b"]]} for each in further]
    return [
        Difference(
            a=each["a"],
            b=each["b"],
            metric=each["metric"],
            figure=Figure(
                each["difference"], each["low"], each["high"], digits=DIGITS.get(each["metric"], 2), signed=True
            ),
            p=each["p"],
            corrected=corrected,
        )
        for each, corrected in zip(found, holm([each["p"] for each in found]), strict=True)
    ]


def _comparable(a: Evaluation, b: Evaluation, metric: Metric) -> bool:
    if metric == "loss":
        return np.array_equal(a.tokens, b.tokens)
    return a.bleu is not None and b.bleu is not None and len(a.bleu) == len(b.bleu)


def shown(found: Sequence[Difference], systems: Sequence[Evaluation]) -> Block:
    """The table, or why there is none."""
    if not found and len(systems) == 1:
        return Text("There is one system, and so nothing to compare.")
    if not found:
        return Text("Nothing of the systems can be compared: their tokens differ, or the entries that they defined.")
    rows = [
        [f"{d.a} - {d.b}", TITLES.get(d.metric, d.metric), d.figure, Figure(d.p, digits=4),
         Figure(d.corrected, digits=4), d.favours or ("which, no one can say" if d.holds else "neither: may be chance")]
        for d in found
    ]  # fmt: skip
    return Table(
        f"Differences from {systems[0].name}",
        ("difference", "of", "value", "p", "p, corrected", "favours"),
        rows,
        "Paired bootstrap over headwords, with 95 % intervals. p is corrected for all the rows of the table (Holm); a "
        f"difference holds where that is below {LEVEL}.",
    )


def told(found: Sequence[Difference]) -> Iterator[str]:
    """A sentence on which differences hold."""
    if not found:
        return
    held = [d for d in found if d.holds]
    tested = (
        "The one difference that was tested" if len(found) == 1 else f"Of {len(found)} differences that were tested,"
    )
    if not held:
        yield f"{tested} {'may be chance' if len(found) == 1 else 'none holds: all may be chance'}."
        return
    said = "; ".join(f"{d.a} - {d.b} in {TITLES.get(d.metric, d.metric)}, {d.figure}" for d in held[:TOLD])
    more = f"; and {len(held) - TOLD} more" if len(held) > TOLD else ""
    rest = "" if len(held) == len(found) else " The others may be chance."
    count = "" if len(found) == 1 else f" {len(held)}"
    yield f"{tested}{count} {'holds' if len(held) == 1 else 'hold'}: {said}{more}.{rest}"
