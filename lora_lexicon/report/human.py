"""What raters said (`human.results`) as a document. Computes nothing but the correction of p-values."""

from typing import Any

from lora_lexicon.evaluation.bootstrap import holm
from lora_lexicon.evaluation.sheets import CRITERIA, NAMES
from lora_lexicon.report.document import Document, Figure, Section, Table, Text

MEASURES = {"fleiss_kappa": "Fleiss's kappa", "krippendorff_alpha": "Krippendorff's alpha, ordinal"}


def document_of(report: dict[str, Any]) -> Document:
    """The whole report."""
    titles = [criterion.title for criterion in CRITERIA]
    means = [
        [system, *(_figure(found[name], "mean") for name in NAMES), max(found[name]["items"] for name in NAMES)]
        for system, found in report["systems"].items()
    ]
    agreement = {
        measure: [
            [whose, *(_figure(found[name][measure], "value", 3) for name in NAMES)]
            for whose, found in report["agreement"].items()
        ]
        for measure in MEASURES
    }
    note = "Means over entries of the mean of the raters, from 1 to 5; brackets hold 95 % intervals over entries."
    sections = [
        Section(
            "Means",
            [
                Table(
                    "What raters gave", ["system", *titles, "entries"], means, note, ["", *["high" for _ in titles], ""]
                )
            ],
        ),
        Section("Differences", [_differences(report["comparisons"])]),
        Section(
            "Agreement of the raters",
            [Table(MEASURES[m], ["definitions of", *titles], rows) for m, rows in agreement.items()],
        ),
        Section("What was asked", [_criteria()]),
        Section("Signature", [Text(report["signature"])]),
    ]
    count = len(report["raters"])
    summary = [f"{count} {'rater' if count == 1 else 'raters'} of {len(means)} systems, by {len(titles)} criteria."]
    for name, title in zip(NAMES, titles, strict=True):
        rated = {system: found[name]["mean"] for system, found in report["systems"].items()}
        rated = {system: mean for system, mean in rated.items() if mean is not None}
        if rated:
            best = max(rated, key=rated.__getitem__)
            summary.append(f"{title}: {best} has the highest mean, {rated[best]:.2f}.")
    return Document(f"What raters say of {', '.join(report['systems'])}", summary, sections)


def _differences(comparisons: list[dict[str, Any]]) -> Table | Text:
    if not comparisons:
        return Text("There is nothing to compare: one system, or no entry whose definitions were rated for two.")
    titles = {criterion.name: criterion.title for criterion in CRITERIA}
    rows = [
        [f"{c['a']} - {c['b']}", titles[c["metric"]], Figure(c["difference"], c["low"], c["high"], signed=True),
         Figure(c["p"], digits=4), Figure(p, digits=4)]
        for c, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True)
    ]  # fmt: skip
    note = "Paired bootstrap over entries, with 95 % intervals. p is corrected for all the rows of the table (Holm)."
    return Table("Differences from the first", ("difference", "of", "value", "p", "p, corrected"), rows, note)


def _criteria() -> Table:
    rows = [[c.title, c.asks, *c.scale] for c in CRITERIA]
    return Table("Criteria, and what each value means", ("criterion", "question", "1", "2", "3", "4", "5"), rows)


def _figure(found: dict[str, Any], key: str, digits: int = 2) -> Figure:
    return Figure(found[key], found["low"], found["high"], digits=digits)
