"""From an evaluation to its report: what was kept comes back, and the report says what was measured."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_system import EXPERTS, SmallSystem

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.store import Entries, EntriesWriter
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.metrics import bleu, rouge_l
from lora_lexicon.evaluation.run import SIGNATURES, Evaluation, compare, evaluate, further_scores, random_weights
from lora_lexicon.evaluation.saved import Saved, read_evaluations, write_evaluations
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.report.differences import differences, told
from lora_lexicon.report.document import Code, Document, Examples, Figure, Table, Text, shown
from lora_lexicon.report.evaluation import document_of
from lora_lexicon.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>window.hit = 1</script>"
ROWS = [
    Entry(f"{term}", f"the {term} is {word}", f"a kind of {term} that is {word}", source, domain=domain)
    for term, source, domain in (("apple", "a", "food"), ("river", "b", "place"), ("stone", "a", ""), (HOSTILE, "", ""))
    for word in ("bright", "green", "quick")
]  # fmt: skip


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    writer = EntriesWriter(tmp_path_factory.mktemp("entries"))
    for entry in ROWS:
        writer.add("test", entry)
    writer.add("train", replace(ROWS[0], context="an apple a day"))
    return writer.finish({})


def cut(made: Evaluation) -> Evaluation:
    """The evaluation with definitions that differ in how good they are, as those of an untrained model do not."""
    texts = [entry.definition.rsplit(" ", i % 5)[0] for i, entry in enumerate(made.entries)]
    pairs = [(text, [entry.definition]) for text, entry in zip(texts, made.entries, strict=True)]
    scores = (np.array([of(*pair) for pair in pairs]) for of in (bleu, rouge_l))
    return replace(made, predictions=texts, **dict(zip(("bleu", "rouge_l"), scores, strict=True)))


@pytest.fixture(scope="module")
def evaluations(tiny_base: Path, entries: Entries) -> list[Evaluation]:
    """A routed system, itself routed at random, and its base."""
    system: Any = SmallSystem(tiny_base)
    base: Any = SmallSystem(tiny_base, name="base-alone", routed=False)
    rows, decoding = entries.split("test"), Decoding(max_new_tokens=6)
    weights = random_weights(len(rows), len(EXPERTS))
    return [
        cut(evaluate(system, rows, decoding=decoding, placed=5)),
        evaluate(system, rows, decoding=decoding, name="small-random", weights=weights),
        evaluate(base, rows, decoding=decoding, defined=7),
    ]


def report_of(entries: Entries, evaluations: list[Evaluation], **more: Any) -> dict[str, Any]:
    return {
        "version": "1", "command": "lora-lexicon evaluate x --data y", "data": str(entries.path), "split": "test",
        "entries_fingerprint": entries.fingerprint, "rows": len(ROWS), "signatures": SIGNATURES,
        "systems": [each.summary() for each in evaluations], **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(entries: Entries, evaluations: list[Evaluation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluation")
    first = [evaluations[0], evaluations[1]]
    scores, compared = further_scores(first, ["exact", "distinct"])
    write_evaluations(made, report_of(entries, evaluations, scores=scores, comparisons=compared), evaluations)
    return made


@pytest.fixture(scope="module")
def saved(folder: Path) -> Saved:
    return read_evaluations(folder)


@pytest.fixture(scope="module")
def document(saved: Saved) -> Document:
    return document_of([saved], examples=2)


def of(document: Document, title: str) -> list[Any]:
    return [*next(section for section in document.sections if section.title == title).blocks]


def test_what_was_kept_comes_back(saved: Saved, evaluations: list[Evaluation]) -> None:
    for found, own in zip(saved.evaluations, evaluations, strict=True):
        assert found.summary() == pytest.approx(own.summary())
        assert list(found.entries) == list(own.entries)
        assert (found.domains, found.predictions) == (own.domains, own.predictions)
        assert compare(found, saved.evaluations[0]) == compare(own, evaluations[0])
        if own.places is None:
            assert found.places is None
        else:
            assert np.allclose(found.places, own.places, atol=1e-4, equal_nan=True)
            assert np.isfinite(own.places).all(axis=1).sum() == 5


def test_the_systems_table_has_every_figure_with_its_interval(
    document: Document, evaluations: list[Evaluation]
) -> None:
    table, further = of(document, "Systems")
    for row, own in zip(table.rows, evaluations, strict=True):
        cells = dict(zip(table.columns, row, strict=True))
        summary = own.summary()
        for title, key in (("loss", "loss"), ("BLEU", "bleu"), ("ROUGE-L", "rouge_l")):
            assert cells[title].value == pytest.approx(summary[key])
            assert cells[title].low - 1e-9 <= summary[key] <= cells[title].high + 1e-9
    assert "7 or 12 of 12 entries" in table.note
    assert further.columns == ("system", "exact", "distinct")
    assert further.rows[0][1].low is not None
    assert further.rows[0][2].low is None
    assert "no sums over rows: distinct" in further.note


def test_differences_are_those_of_compare_corrected_together(
    document: Document, saved: Saved, evaluations: list[Evaluation]
) -> None:
    (table,) = of(document, "Differences")
    shown_of = [(row[0], row[1]) for row in table.rows]
    assert shown_of == [
        ("small-random - small", "loss"), ("base-alone - small", "loss"), ("small-random - small", "BLEU"),
        ("small-random - small", "ROUGE-L"), ("small-random - small", "exact"),
    ]  # fmt: skip  # the base defined fewer
    own = compare(evaluations[1], evaluations[0], "loss")
    assert table.rows[0][2].value == pytest.approx(own["difference"])
    for row in table.rows:
        _, _, _, p, corrected, favours = row
        assert p.value <= corrected.value <= 1
        assert (favours == "neither: may be chance") == (corrected.value >= 0.05)
    names = {(0, each.name): each.name for each in evaluations}
    twice = replace(saved, evaluations=[evaluations[0], replace(evaluations[0], name="small-random")])
    same = differences([replace(twice, report={**saved.report, "comparisons": []})], twice.evaluations, names)
    assert not any(each.holds for each in same)
    assert "none holds" in next(told(same))
    apart = [replace(entry, term=f"{entry.term} {i}") for i, entry in enumerate(evaluations[0].entries)]
    own_words = replace(evaluations[0], entries=apart)  # few headwords make nothing sure
    worse = replace(own_words, name="small-random", nll=evaluations[0].nll + 9)
    found = differences([replace(saved, report={**saved.report, "comparisons": []})], [own_words, worse], names)
    assert (found[0].metric, found[0].favours) == ("loss", "small"), "a higher loss is worse"
    assert "1 holds: small-random - small in loss" in next(told(found))


def test_routing_is_crossed_with_given_domains_and_with_another_routing(
    document: Document, evaluations: list[Evaluation]
) -> None:
    first, second, between = of(document, "Routing")
    assert first.title == "small: given domain and the expert that answered"
    assert second.title.startswith("small-random: ")
    for table in (first, between):
        assert sum(sum(row[1:]) for row in table.rows) == len(ROWS)
    assert {row[0] for row in first.rows} == {"food", "place", "(none)"}
    same = sum(a == b for a, b in zip(evaluations[0].domains, evaluations[1].domains, strict=True))
    assert f"{same / len(ROWS):.0%}" in between.note
    counts, picture = of(document, "Domains")
    assert dict(zip(counts.columns, zip(*counts.rows, strict=True), strict=True))["small"] == tuple(
        evaluations[0].domains.count(row[0]) for row in counts.rows
    )
    assert picture.alt.startswith("small: 5 entries")


def test_examples_are_best_worst_and_drawn(document: Document, evaluations: list[Evaluation], saved: Saved) -> None:
    best, worst, drawn = of(document, "Examples")
    assert best.systems == ("small", "small-random", "base-alone")
    own = evaluations[0].bleu
    assert own is not None
    scored = sorted(own[:7], reverse=True)  # what all systems defined
    assert scored[1] > scored[-2]
    assert [row.written[0].score for row in best.rows] == pytest.approx(scored[:2])
    assert [row.written[0].score for row in worst.rows] == pytest.approx(scored[::-1][:2])
    assert len(drawn.rows) == 2
    assert of(document_of([saved], examples=2), "Examples")[2] == drawn
    assert of(document_of([saved], examples=0), "Examples") == [Text("No examples were asked for.")]


def test_faults_and_leaks_are_counted(document: Document, entries: Entries) -> None:
    faults, *_ = of(document, "Definitions that say nothing")
    assert faults.rows[0][0] == "(the references)"
    circular = dict(zip(faults.columns, faults.rows[0], strict=True))["circular"]
    assert circular == sum(row.term in row.definition for row in ROWS) == len(ROWS)
    leaks, own = of(document, "Leaks")
    assert dict(zip(leaks.columns, leaks.rows[0], strict=True))["same headword"] == 3, "those of apple"
    assert [row[0] for row in own.rows] == ["train", "test"] or [row[0] for row in own.rows] == ["test", "train"]
    assert any(sentence == "3 of the 12 rows of test leak from train." for sentence in document.summary)


def test_entries_that_are_gone_are_said_to_be(saved: Saved, tmp_path: Path) -> None:
    gone = replace(saved, report={**saved.report, "data": str(tmp_path / "gone")})
    document = document_of([gone])
    text, code = of(document, "Leaks")
    assert "Leaks were not looked for" in text.text
    assert code == Code(f"lora-lexicon data check {tmp_path / 'gone'}")
    assert "Leaks were not looked for: the entries are not where they were." in document.summary


def test_several_evaluations_are_one_report(
    saved: Saved, entries: Entries, evaluations: list[Evaluation], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    write_evaluations(again, report_of(entries, evaluations[:1]), evaluations[:1])
    other = read_evaluations(again)
    document = document_of([saved, other])
    names = [row[0] for row in of(document, "Systems")[0].rows]
    assert names == [f"{saved.path.name}/small", "small-random", "base-alone", "again/small"]
    rows = {(row[0], row[1]): row for row in of(document, "Differences")[0].rows}
    assert rows[f"again/small - {saved.path.name}/small", "loss"][2].value == 0
    settings = of(document, "Settings")[0]
    assert settings.columns == ("setting", saved.path.name, "again")
    assert of(document, "How to make it again")[1].text.count("lora-lexicon evaluate") == 2
    for report in ({"entries_fingerprint": "f" * 64}, {"split": "valid"}):
        with pytest.raises(DataError, match="is of other entries") as raised:
            document_of([saved, replace(other, report={**other.report, **report})])
        assert "\n" not in str(raised.value)


def test_a_base_alone_has_neither_map_nor_routing(
    entries: Entries, evaluations: list[Evaluation], tmp_path: Path
) -> None:
    alone = replace(evaluations[2], predictions=None, bleu=None, rouge_l=None)
    write_evaluations(tmp_path, report_of(entries, [alone]), [alone])
    assert not (tmp_path / "predictions").exists()
    document = document_of([read_evaluations(tmp_path)])
    assert isinstance(of(document, "Domains")[1], Text)
    assert isinstance(of(document, "Routing")[0], Text)
    assert of(document, "Examples") == [Text("No definitions were written.")]
    assert of(document, "Differences") == [Text("There is one system, and so nothing to compare.")]
    assert document.summary[1].startswith("base-alone: loss ")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def damaged_row(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        rows = lines(folder)
        change(rows[3])
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return damage


def damaged_report(**change: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps({**report, **change}))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "rows.jsonl").unlink(), "rows.jsonl is missing"),
        (lambda folder: (folder / "predictions" / "small.jsonl").unlink(), "does not exist"),
        (damaged_row(lambda row: row.pop("term")), "rows.jsonl:4: not an entry"),
        (damaged_row(lambda row: row["systems"].pop("small")), "rows.jsonl:4: nothing of small"),
        (damaged_row(lambda row: row["systems"]["small"].update(nll=float("nan"))), "rows.jsonl:4: a figure of small"),
        (damaged_row(lambda row: row["systems"]["small"].update(tokens=0)), "rows.jsonl:4: a figure of small"),
        (damaged_row(lambda row: row["systems"]["small"].update(place=[1])), "rows.jsonl:4: a figure of small"),
        (damaged_row(lambda row: row.update(term="another")), "has other rows"),
        (damaged_row(lambda row: row["systems"]["small"].update(bleu=None, rouge_l=None)), "after one that it did not"),
        (damaged_report(rows=99), "has 12 rows"),
        (damaged_report(systems=[{"name": "../x"}]), "cannot be a system's name"),
        (damaged_report(split=None), "not the report of an evaluation"),
        (damaged_report(scores={"small": {"exact": {"value": "x", "signature": ""}}}), "'scores'"),
        (damaged_report(comparisons=[{"a": "small"}]), "'comparisons'"),
        (damaged_report(signatures=[]), None),
    ],
)  # fmt: skip
def test_a_damaged_evaluation_is_one_line(folder: Path, tmp_path: Path, damage: Any, said: str | None) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    if said is None:  # an empty list says as little as none
        assert read_evaluations(tmp_path / "copy").report["signatures"] == {}
        return
    with pytest.raises(DataError, match=said) as raised:
        read_evaluations(tmp_path / "copy")
    assert str(tmp_path / "copy") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_writes_and_renders_again(cli: Callable, folder: Path, tmp_path: Path) -> None:
    made = cli("report", folder, "--out", tmp_path / "r", "--examples", 1, "--json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert [Path(file).name for file in told["files"]] == ["report.html", "report.md", "latex", "csv"]
    assert told["summary"][0].startswith("3 systems on 12 entries of 4 headwords")
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "lora-lexicon evaluate x --data y" in page
    again = cli("report", tmp_path / "r", "--out", tmp_path / "again", "--format", "html")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "report.html").read_text(encoding="utf-8") == page
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["document.json", "pictures", "report.html"]
    for arguments, said in (
        ((folder, "--out", tmp_path / "r"), "add --overwrite"),
        ((folder, tmp_path / "r", "--out", tmp_path / "x"), "give it alone"),
        ((tmp_path, "--out", tmp_path / "x"), "not the folder of an evaluation"),
        ((folder, folder, "--out", tmp_path / "x"), "given twice"),
    ):
        refused = cli("report", *arguments)
        assert refused.exit_code == 1
        assert refused.stderr.count("\n") == 1
        assert said in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 390])
def test_the_page_in_a_browser(document: Document, tmp_path: Path, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    from axe_playwright_python.sync_playwright import Axe

    write_report(document, tmp_path / "r", ["html"])
    arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            requests, errors = [], []
            page.on("request", lambda request, into=requests: into.append(request.url))
            page.on("console", lambda message, into=errors: into.append(message.text))
            page.goto(f"file://{tmp_path / 'r' / 'report.html'}")
            assert [url for url in requests if not url.startswith("data:")] == [page.url]
            assert errors == [], "its policy lets its own style and pictures through"
            assert page.evaluate("window.hit") is None
            assert all(page.evaluate("[...document.images].map((image) => image.naturalWidth > 0)"))
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "wide things scroll by themselves"
            assert page.evaluate("getComputedStyle(document.body).maxWidth") == "992px", "its style is there"
            found = Axe().run(page).response
            assert [(own["id"], own["nodes"][0]["html"]) for own in found["violations"]] == []
            assert len(found["passes"]) > 10, "it looked at something"
        browser.close()


def test_tables_and_examples_of_the_report_are_whole(document: Document) -> None:
    for block in document.blocks():
        for table in [block] if isinstance(block, Table) else [block.table()] if isinstance(block, Examples) else []:
            assert table.title
            for row in table.rows:
                assert all(shown(cell) for cell in row if isinstance(cell, Figure))
