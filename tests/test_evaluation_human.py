"""Human evaluation: sheets do not tell who wrote what, ratings come back whole, agreement is what others compute."""

import base64
import csv
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from statsmodels.stats import inter_rater

from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.agreement import estimates, fleiss_kappa, krippendorff_alpha
from lora_lexicon.evaluation.human import read_ratings, results
from lora_lexicon.evaluation.sheets import COLUMNS, NAMES, VALUES, export, page
from lora_lexicon.report.document import load_document

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>window.hit = 1</script>"


def counts_of(ratings: np.ndarray) -> np.ndarray:
    return np.stack([(ratings == value).sum(axis=1) for value in VALUES], axis=1)


@given(arrays(int, st.tuples(st.integers(1, 12), st.integers(2, 5)), elements=st.integers(1, 5)))
def test_kappa_is_that_of_statsmodels(ratings: np.ndarray) -> None:
    found = fleiss_kappa(counts_of(ratings))
    if len(np.unique(ratings)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(inter_rater.fleiss_kappa(counts_of(ratings)))


@given(arrays(int, st.tuples(st.integers(1, 12), st.integers(2, 5)), elements=st.integers(0, 5)))
def test_alpha_is_that_of_krippendorff_with_ratings_missing_too(ratings: np.ndarray) -> None:
    counts = counts_of(ratings)
    pairable = counts[counts.sum(axis=1) > 1]
    found = krippendorff_alpha(counts)
    if (pairable.sum(axis=0) > 0).sum() < 2:
        assert found is None
        return
    assume(len(pairable))
    oracle = krippendorff.alpha(value_counts=counts, value_domain=list(VALUES), level_of_measurement="ordinal")
    assert found == pytest.approx(oracle, abs=1e-9)


def test_agreement_of_the_textbooks() -> None:
    fleiss = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
              [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    assert fleiss_kappa(np.array(fleiss)) == pytest.approx(0.2099, abs=1e-4)
    same = counts_of(np.repeat(np.arange(1, 6)[:, None], 3, axis=1))
    assert (fleiss_kappa(same), krippendorff_alpha(same)) == (1, 1)


def test_intervals_hold_the_value_and_draw_groups_together() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, size=(60, 1))
    counts = counts_of(np.where(rng.random((60, 3)) < 0.7, truth, rng.integers(1, 6, size=(60, 3))))
    for found in estimates(counts, range(60), 3):
        assert found.low < found.value < found.high
    twice = np.repeat(counts, 2, axis=0)
    alone = estimates(counts, range(60), 3)[0]
    together = estimates(twice, np.repeat(range(60), 2).tolist(), 3)[0]
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert estimates(twice, range(120), 3)[0].low > alone.low  # as if they were more than they are
    counts[0] = 0  # nobody rated it
    assert [found.units for found in estimates(counts, range(60), 3)] == [59, 59]


def predictions(folder: Path, rows: int = 12) -> list[Path]:
    files = []
    for system in ("alpha-model", "beta-model"):
        file = folder / f"{system}.jsonl"
        texts = [f"={system[0]} thing of {i}" if i % 3 else f"same {HOSTILE} {i}" for i in range(rows)]
        fixed = [{"term": f"w{i}", "context": f"the w{i}, here", "references": [f"r{i}"]} for i in range(rows)]
        lines = [json.dumps({**row, "prediction": text}) for row, text in zip(fixed, texts, strict=True)]
        file.write_text("\n".join(lines) + "\n")
        files.append(file)
    return files


def sheet_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        return list(csv.DictReader(text))


def fill(file: Path, rate: Any, delimiter: str = ",") -> None:
    """Rates every row of a sheet by rate(row, criterion)."""
    rows = sheet_rows(file)
    with file.open("w", encoding="utf-8-sig", newline="") as text:
        writer = csv.DictWriter(text, COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, **{name: rate(row, name) for name in NAMES}} for row in rows)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(predictions(tmp_path), tmp_path / "out", rows=9, raters=3, seed=1)
    return tmp_path / "out"


def test_sheets_are_blind_shuffled_and_the_same_for_a_seed(exported: Path, tmp_path: Path) -> None:
    key = json.loads((exported / "key.json").read_text())
    orders = []
    for rater in key["raters"]:
        table = exported / "sheets" / f"{rater}.csv"
        for file in (table, table.with_suffix(".html")):
            assert "model" not in re.sub(r"<style>.*?</style>", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        orders.append([row["unit"] for row in sheet_rows(table)])
        assert sorted(orders[-1]) == sorted(key["units"])
    assert len({tuple(order) for order in orders}) == 3
    pairs = [(unit["row"], system) for unit in key["units"].values() for system in unit["systems"]]
    assert len(pairs) == len(set(pairs)) == 18  # each system's definition of each entry is rated once
    assert all(len(unit["systems"]) == (2 if (unit["row"] - 1) % 3 == 0 else 1) for unit in key["units"].values())
    export(predictions(tmp_path), tmp_path / "again", rows=9, raters=3, seed=1)
    for file in exported.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(exported)).read_bytes()
    assert all(row["definition"].startswith(("'=", "same")) for row in sheet_rows(table))  # no formula


def test_what_raters_say_is_what_comes_out(cli, exported: Path) -> None:
    key = json.loads((exported / "key.json").read_text())
    rng = random.Random(3)
    given: dict[tuple[str, str, str], int] = {}

    def rate(row: dict[str, str], name: str) -> int:
        return given.setdefault((row["rater"], row["unit"], name), rng.randint(1, 5))

    sheets = sorted((exported / "sheets").glob("*.csv"))
    for sheet, delimiter in zip(sheets, ",;\t", strict=True):
        fill(sheet, rate, delimiter)
    result = cli("human", "import", exported, *sheets, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for system in key["systems"]:
        units = [unit for unit, of in key["units"].items() if system in of["systems"]]
        for name in NAMES:
            found = report["systems"][system][name]
            expected = np.mean([given[rater, unit, name] for unit in units for rater in key["raters"]])
            assert found["mean"] == pytest.approx(expected)
            assert found["low"] <= found["mean"] <= found["high"]
            ratings = np.array([[given[rater, unit, name] for rater in key["raters"]] for unit in units])
            agreement = report["agreement"][system][name]
            assert agreement["fleiss_kappa"]["value"] == pytest.approx(inter_rater.fleiss_kappa(counts_of(ratings)))
            oracle = krippendorff.alpha(reliability_data=ratings.T, level_of_measurement="ordinal")
            assert agreement["krippendorff_alpha"]["value"] == pytest.approx(oracle)
    (first,) = [c for c in report["comparisons"] if c["metric"] == "clarity"]
    means = [report["systems"][system]["clarity"]["mean"] for system in (first["a"], first["b"])]
    assert first["difference"] == pytest.approx(means[0] - means[1])
    assert "Krippendorff" in cli("human", "import", exported, *sheets).stdout
    made = cli("human", "import", exported, *sheets, "--out", exported / "said")
    assert made.exit_code == 0, made.output
    document = load_document(exported / "said")
    means, _, kappa, alpha, _ = document.tables()
    for row in means.rows:
        assert [cell.value for cell in row[1:-1]] == [report["systems"][row[0]][name]["mean"] for name in NAMES]
    for table, measure in ((kappa, "fleiss_kappa"), (alpha, "krippendorff_alpha")):
        assert table.rows[0][1].value == pytest.approx(report["agreement"]["all"][NAMES[0]][measure]["value"])
    assert cli("report", exported / "said", "--out", exported / "shown").exit_code == 0


def test_what_is_wrong_with_a_sheet_is_named_with_its_line(cli, exported: Path) -> None:
    sheet = exported / "sheets" / "rater-1.csv"
    fill(sheet, lambda row, name: 3)
    good = sheet.read_text(encoding="utf-8-sig").splitlines()
    for line, change, message in (
        (3, lambda cells: [*cells[:8], "", *cells[9:]], "conciseness is missing"),
        (3, lambda cells: [*cells[:6], "6", *cells[7:]], "accuracy is '6'"),
        (3, lambda cells: [*cells[:6], "3.5", *cells[7:]], "accuracy is '3.5'"),
        (4, lambda cells: [cells[0], "ffff", *cells[2:]], "no unit 'ffff'"),
        (4, lambda cells: [cells[0], *good[1].split(",")[1:2], *cells[2:]], "line 2 too"),
        (4, lambda cells: cells[:5], "not as many fields"),
    ):
        changed = list(good)
        changed[line - 1] = ",".join(f'"{cell}"' for cell in change(next(csv.reader([good[line - 1]]))))
        sheet.write_text("\n".join(changed) + "\n", encoding="utf-8")
        result = cli("human", "import", exported, sheet)
        assert (result.exit_code, f"{sheet}:{line}: " in result.stderr) == (1, True), (message, result.stderr)
        assert message in result.stderr
    sheet.write_text("\n".join(good[:4]) + "\n", encoding="utf-8")
    assert "units are not there" in cli("human", "import", exported, sheet).stderr
    assert cli("human", "import", exported, sheet, "--partial").exit_code == 0
    assert "as another sheet is" in cli("human", "import", exported, sheet, sheet, "--partial").stderr
    sheet.write_text("\n".join(good).replace("rater-1", "rater-9"), encoding="utf-8")
    assert "the column rater" in cli("human", "import", exported, sheet).stderr
    sheet.write_text("a,b\n1,2\n", encoding="utf-8")
    assert f"{sheet}:1: no column rater" in cli("human", "import", exported, sheet).stderr
    assert cli("human", "import", exported / "sheets", sheet).exit_code == 1


def test_with_ratings_missing_each_counts_for_what_it_says(exported: Path) -> None:
    sheets = sorted((exported / "sheets").glob("*.csv"))[:2]
    fill(sheets[0], lambda row, name: 4 if name == "clarity" else "")
    fill(sheets[1], lambda row, name: 2 if name == "clarity" and row["term"] != "w1" else "")
    report = results(read_ratings(exported, sheets, partial=True))
    for system in report["systems"].values():
        assert system["accuracy"] == {"mean": None, "low": None, "high": None, "items": 0}
        assert 3 <= system["clarity"]["mean"] < 3.5
    assert report["agreement"]["all"]["accuracy"]["fleiss_kappa"]["value"] is None


def test_predictions_that_do_not_fit_together_are_refused(cli, tmp_path: Path) -> None:
    a, b = predictions(tmp_path)
    rows = b.read_text().splitlines(keepends=True)
    b.write_text("".join(rows[:-1]))
    assert "fewer rows" in cli("human", "export", a, b, "--rows", 5, "--out", tmp_path / "o").stderr
    b.write_text("".join([rows[1], rows[0], *rows[2:]]))
    assert f"{b}:1: 'w1' stands where" in cli("human", "export", a, b, "--rows", 5, "--out", tmp_path / "o").stderr
    b.write_text("".join(rows))
    assert "ask for fewer" in cli("human", "export", a, b, "--out", tmp_path / "o").stderr
    with pytest.raises(DataError, match="same name"):
        export([a, a], tmp_path / "o", rows=2, raters=1, seed=0)
    assert not (tmp_path / "o").exists()


def test_the_page_allows_itself_alone(exported: Path) -> None:
    html = (exported / "sheets" / "rater-1.html").read_text(encoding="utf-8")
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)[0]
    assert policy.startswith("default-src 'none'; ")
    for tag, source in (("<script>", "script-src"), ("<style>", "style-src")):
        (text,) = re.findall(rf"{tag}(.*?)</", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy
    assert not re.findall(r"(?:src|href)=", html)
    (data,) = re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)
    assert json.loads(data)["rows"] == [
        {**row, "definition": row["definition"].removeprefix("'")}
        for row in sheet_rows(exported / "sheets" / "rater-1.csv")
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.xdist_group("page")
def test_a_rater_with_a_keyboard_alone_fills_the_page(exported: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    from axe_playwright_python.sync_playwright import Axe

    key = json.loads((exported / "key.json").read_text())
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        wrong: list[str] = []
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto((exported / "sheets" / "rater-2.html").as_uri())
        assert Axe().run(tab).response["violations"] == []
        for _ in key["units"]:
            for digit in "54321":
                tab.keyboard.press(digit)
            tab.keyboard.press("Alt+ArrowRight")
        assert tab.locator("#count").inner_text() == f"{len(key['units'])} of {len(key['units'])}"
        tab.reload()  # nothing is lost
        assert tab.locator("#count").inner_text() == f"{len(key['units'])} of {len(key['units'])}"
        with tab.expect_download() as download:
            tab.locator("#save").focus()
            tab.keyboard.press("Enter")
        download.value.save_as(tmp_path / "rater-2.csv")
        assert tab.evaluate("window.hit") is None
        assert wrong == []
        browser.close()
    ratings = read_ratings(exported, [tmp_path / "rater-2.csv"])
    assert (ratings.values == np.array([5, 4, 3, 2, 1])).all()
    texts = {row["unit"]: row["definition"] for row in sheet_rows(tmp_path / "rater-2.csv")}
    assert texts == {row["unit"]: row["definition"] for row in sheet_rows(exported / "sheets" / "rater-2.csv")}


def test_a_page_of_hostile_text_is_the_same_page() -> None:
    row = dict.fromkeys(COLUMNS, HOSTILE)
    assert page("rater-1", [row]).count("<script") == 2
    assert page("rater-1", [row]).count("%DATA%") == 0
    tricky = page("rater-1", [{**row, "definition": "%SCRIPT% %STYLE%"}])
    assert json.loads(re.findall(r'id="data">(.*?)</script>', tricky, re.DOTALL)[0])["rows"][0]["definition"] == (
        "%SCRIPT% %STYLE%"
    )
