"""experiments/: each study runs on a small base, goes on where it was killed, and its figures follow from its rows."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composing import make_entries
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import LexiconError
from lora_lexicon.evaluation.metrics import bleu
from lora_lexicon.evaluation.run import evaluate, prediction_row
from lora_lexicon.experiments.bench import Bench
from lora_lexicon.experiments.results import Claim, Difference, Results, verdicts
from lora_lexicon.experiments.run import READ_BY_ALL, READS, check_experiment, run_experiment
from lora_lexicon.experiments.runs import in_blocks
from lora_lexicon.folders import whole_lines
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.recipe import ExperimentRecipe
from lora_lexicon.report.document import Document, Figure, Picture, Table, load_document, number_of, save

YAML = {
    "domains": "domains: 2\nlayers: 1\n",
    "lora": "first_layer: 1\nrank: 2\nmax_steps: 2\nbatch_size: 8\n",
    "ffn": "kind: ffn\nfirst_layer: 1\nmax_steps: 2\nbatch_size: 8\n",
    "router": "max_steps: 2\nbatch_size: 8\n",
    "reward": "samples: 3\nkeep: 2\nrank: 2\nmax_steps: 2\nbatch_size: 4\n",
}


Ran = tuple[Document, Path, ExperimentRecipe]


@pytest.fixture(scope="module")
def small(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentRecipe:
    """What every experiment here has in common; the work is of seconds."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    named = {name: str(folder / f"{name}.yaml") for name in YAML}
    own = {
        "base": str(tiny_base),
        "data": (str(make_entries(folder)),),
        "test_rows": 6,
        "seeds": (1, 2),
        "max_tokens": 6,
    }
    return dataclasses.replace(ExperimentRecipe(), **named, **own)


def asked(small: ExperimentRecipe, kind: str, **changes: Any) -> ExperimentRecipe:
    """A recipe without what the experiment does not read."""
    unread = {field.name for field in dataclasses.fields(small)} - READ_BY_ALL - READS[kind]
    blank = {key: getattr(ExperimentRecipe(), key) for key in unread}
    return dataclasses.replace(small, experiment=kind, **{**blank, **changes})


def table(document: Document, title: str) -> Table:
    return next(table for table in document.tables() if table.title == title)


def column(of: Table, name: str) -> dict[str, float]:
    at = list(of.columns).index(name)
    return {str(row[0]): number_of(row[at]) or 0.0 for row in of.rows}


@pytest.fixture(scope="module")
def second(small: ExperimentRecipe, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    recipe = asked(small, "table-2", samples=(1, 3), reward_rows=6)
    out = tmp_path_factory.mktemp("second") / "out"
    return run_experiment(recipe, out), out, recipe


def test_table_2_has_every_system_and_way(second: Ran) -> None:
    document, _, recipe = second
    found = column(table(document, "Systems"), "BLEU")
    ways = ("", ", best of 3 by the reference", ", best of 3 by reward")
    assert set(found) == {f"{system}{way}" for system in recipe.systems for way in ways}
    for system in recipe.systems:
        one, oracle, reward = (found[f"{system}{way}"] for way in ways)
        assert one <= oracle >= reward, "nothing beats the reference's own choice among the same samples"
    figures = [row[2] for row in table(document, "Systems").rows]
    assert all(isinstance(figure, Figure) and figure.deviation is not None for figure in figures)


def test_a_sampled_definition_is_the_first_candidate(second: Ran) -> None:
    _, out, _ = second
    for seed in (1, 2):
        rows = whole_lines(out / "table-2" / "runs" / f"moe-{seed}.jsonl")
        drawn = whole_lines(out / "table-2" / "samples" / f"moe-3-{seed}.jsonl")
        assert [row["prediction"] for row in rows] == [row["samples"][0] for row in drawn]


def test_rows_are_what_evaluate_gives(second: Ran) -> None:
    _, out, recipe = second
    bench = Bench(recipe, out)
    rows = whole_lines(out / "table-2" / "runs" / "mixture-of-adapters-2.jsonl")
    system = load_system(bench.system("mixture of adapters", 2), base=recipe.base)
    found = evaluate(system, bench.test, decoding=Decoding("sample", seed=2, max_new_tokens=6))
    assert [row["prediction"] for row in rows] == found.predictions
    assert [row["nll"] for row in rows] == found.nll.tolist()
    assert [row["domain"] for row in rows] == found.domains


def test_a_run_that_was_killed_goes_on(second: Ran, tmp_path: Path) -> None:
    document, out, recipe = second
    file = out / "table-2" / "samples" / "dense-3-1.jsonl"
    whole = file.read_bytes()
    file.with_name(f"{file.name}.partial").write_bytes(whole[: len(whole) // 2])  # in the middle of a line, too
    file.unlink()
    (out / "table-2" / "runs" / "base-2.jsonl").unlink()
    again = run_experiment(recipe, out)
    assert again == document
    assert file.read_bytes() == whole
    save(again, tmp_path)
    assert load_document(tmp_path) == again


def test_another_recipe_or_another_folder_is_refused(second: Ran, tmp_path: Path) -> None:
    _, out, recipe = second
    with pytest.raises(LexiconError, match=r"was begun with seeds \[1, 2\], not \[1\]: choose"):
        run_experiment(dataclasses.replace(recipe, seeds=(1,)), out)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LexiconError, match="not empty and holds no experiments"):
        run_experiment(recipe, tmp_path)


def test_experiments_share_what_they_train(second: Ran) -> None:
    _, out, recipe = second
    models = {path: path.stat().st_mtime_ns for path in out.glob("models/**/*.safetensors")}
    blank = {key: getattr(ExperimentRecipe(), key) for key in READS["table-2"] - READS["table-6"]}
    costs = dataclasses.replace(recipe, **blank, experiment="table-6", systems=("dense", "moe"))
    run_experiment(costs, out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("models/**/*.safetensors")} == models
    with pytest.raises(LexiconError, match="was begun with branch True, not False"):
        run_experiment(dataclasses.replace(costs, branch=False), out)


@pytest.mark.parametrize(
    ("kind", "changes", "title", "rows"),
    [
        ("table-3", {"systems": ("moe",), "seeds": (1,)}, "Partitions", 4),
        (
            "figure-7",
            {"systems": ("dense",), "shots": (0, 2, 20), "decoding": "greedy", "test_rows": 3},
            "Examples in the prompt",
            4,  # of 20 none fits
        ),
        ("table-4", {"policies": ("domain", "token-top-2", "sequence-soft"), "seeds": (1,)}, "Routing policies", 3),
        ("table-6", {"systems": ("dense", "mixture of adapters"), "watts": 10.0}, "What training takes", 2),
        ("tables-7-8", {}, "Cohesion: small is tight", 3),
        ("figure-4", {"systems": ("dense",), "samples": (1, 2, 4)}, "Best of N", 3),
        (
            "figure-5",
            {"systems": ("mixture of adapters",), "experts": (1, 2), "branch": False},
            "Numbers of experts",
            2,
        ),
    ],
)
def test_a_study_runs(
    small: ExperimentRecipe, tmp_path: Path, kind: str, changes: dict[str, Any], title: str, rows: int
) -> None:
    document = run_experiment(asked(small, kind, **changes), tmp_path / "out")
    found = table(document, title)
    assert len(found.rows) == rows
    assert document.summary
    assert any("paper" in section.title for section in document.sections) == (kind not in ("figure-4", "figure-7"))
    for picture in document.pictures():
        assert isinstance(picture, Picture)
        assert picture.alt
    if kind == "figure-4":
        values = list(column(found, "BLEU").values())
        assert values == sorted(values)
    if kind == "figure-7":
        assert [row[0] for row in table(document, "Too long").rows] == ["20 random examples", "20 retrieved examples"]
    if kind == "table-6":
        hours, carbon = column(found, "hours"), column(found, "kg CO2")
        for name in hours:
            assert carbon[name] == pytest.approx(hours[name] * 0.010 * 0.141)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": ()}, r"samples is \[\]: give at least one"),
        ({"seeds": (1, 1)}, r"seeds is \[1, 1\]"),
        ({"samples": (0, 2)}, "none may be below 1"),
        ({"systems": ("dence",)}, "systems names 'dence'; table-2 knows base, dense"),
        ({"experts": (2,)}, "experts is given, which table-2 does not read"),
        ({"metrics": ("rouge-l",)}, "metrics must name bleu"),
        ({"metrics": ("bleu", "blue")}, "did you mean bleu"),
        ({"metrics": ("bleu", "bertscore")}, "reads the states of a model"),
        ({"experiment": "figure-5", "systems": ("dense",)}, "figure-5 knows moe, mixture of adapters"),
        ({"experiment": "table-4", "policies": ("tokens",)}, "routing is 'tokens'"),
        ({"test_rows": -1}, "test_rows is -1"),
    ],
)
def test_what_cannot_be_run_is_said_first(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LexiconError, match=said):
        check_experiment(dataclasses.replace(ExperimentRecipe(), **changes))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20), size=st.integers(1, 7), cut=st.integers(0, 400), extra=st.integers(0, 9))
def test_blocks_are_made_once(tmp_path_factory: Any, count: int, size: int, cut: int, extra: int) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    made: list[int] = []

    def make(start: int, end: int) -> list[dict[str, Any]]:
        made.extend(range(start, end))
        return [{"row": i, "text": "é\n" * i} for i in range(start, end)]

    told: list[tuple[int, int]] = []
    whole = in_blocks(folder / "a.jsonl", count, size, make, lambda done, total: told.append((done, total)))
    content = (folder / "a.jsonl").read_bytes()
    assert told[-1] == (count, count)
    (folder / "b.jsonl.partial").write_bytes(content[:cut])
    kept = content[:cut].count(b"\n")
    made.clear()
    assert in_blocks(folder / "b.jsonl", count, size, make, lambda done, total: None) == whole
    assert made == list(range(kept, count))
    assert (folder / "b.jsonl").read_bytes() == content
    if extra:
        with pytest.raises(LexiconError, match=f"has {count} rows, not {count + extra}"):
            in_blocks(folder / "b.jsonl", count + extra, size, make, lambda done, total: None)


def test_figures_follow_from_rows() -> None:
    entries = [Entry(f"w{i}", "", f"a thing of kind {i}", "ab"[i % 2]) for i in range(40)]
    good = [[{**prediction_row(e, e.definition, ""), "nll": 1.0, "tokens": 2} for e in entries] for _ in range(2)]
    bad = [[{**prediction_row(e, "something else", ""), "nll": 3.0, "tokens": 2} for e in entries] for _ in range(2)]
    found = Results(ExperimentRecipe(), entries, {"good": good, "bad": bad})
    assert found.figure("good", "bleu").value == pytest.approx(100)
    mean = float(np.mean([bleu("something else", [e.definition]) for e in entries]))
    assert found.figure("bad", "bleu").value == pytest.approx(mean)
    assert found.figure("good", "loss").value == 0.5
    assert found.figure("good", "bleu", "a").value == pytest.approx(100)
    shown = found.table("t")
    assert list(shown.columns) == [
        "system",
        "loss",
        "BLEU",
        "ROUGE-L",
        "a: BLEU",
        "a: ROUGE-L",
        "b: BLEU",
        "b: ROUGE-L",
    ]
    one = found.difference("good", "bad", "bleu")
    assert one is not None
    assert (one.value, one.p < 0.01) == (pytest.approx(100 - mean), True)
    loss = found.difference("good", "bad", "loss")
    assert loss is not None
    assert loss.value == -1


def test_verdicts_tell_what_holds() -> None:
    def difference(b: str, metric: str, value: float, p: float) -> Difference:
        return Difference("a", b, metric, value, value - 1, value + 1, p)

    found = [difference("b", "bleu", 2, 0.001), difference("b", "loss", 2, 0.001), difference("c", "bleu", 2, 0.3)]
    found.append(difference("d", "bleu", 2, 0.04))
    said = verdicts([Claim(f"a beats {b}", "a", b) for b in "bcde"], found)
    assert re.search(r"by BLEU holds \(\+2.00, p = 0.0040\); by loss it is the other way \(\+2.0000,", said[0])
    assert "cannot be told" in said[1]
    assert "cannot be told" in said[2], "p is corrected for the number of differences"
    assert "not measured" in said[3]


def test_the_command_line(cli: Any, small: ExperimentRecipe, tmp_path: Path) -> None:
    recipe = asked(small, "tables-7-8")
    given = {"experiment": "tables-7-8", "base": recipe.base, "data": list(recipe.data), "domains": recipe.domains,
             "lora": recipe.lora}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(given))
    out = tmp_path / "out"
    result = cli("experiment", tmp_path / "mine.yaml", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    (own,) = record["experiments"]
    assert own["experiment"] == "tables-7-8"
    assert math.isfinite(own["tables"][0]["rows"][0][1]["value"])
    assert load_document(out / "tables-7-8" / "report").summary == tuple(own["summary"])
    assert "<table" in Path(own["report"]).read_text()
    refused = cli("experiment", tmp_path / "mine.yaml", "--set", "samples=[2]")
    assert refused.exit_code == 1
    assert "tables-7-8 does not read" in refused.stderr


def test_data_that_is_amiss_or_changed_is_said(cli: Any, small: ExperimentRecipe, tmp_path: Path) -> None:
    rows = (Path(small.data[0]).parent / "rows.jsonl").read_text()
    out, data = tmp_path / "out", tmp_path / "mine.jsonl"
    given = asked(small, "tables-7-8", data=(str(data),))
    with pytest.raises(LexiconError, match="does not exist"):
        run_experiment(given, out)
    assert not out.exists()
    data.write_text(rows)
    run_experiment(given, out)
    data.write_text(rows * 2)
    with pytest.raises(LexiconError, match=r"mine.jsonl is not what .* was begun with"):
        run_experiment(given, out)
    shared = ["--set", "test_rows=8", "--set", f"data=[{data}]"]
    refused = cli("experiment", "tiny/tables-7-8", "tiny/tables-7-8", *shared, "--out", out)
    assert refused.exit_code == 2
    assert "none of tiny/tables-7-8, tiny/tables-7-8 reads it" in " ".join(refused.stderr.split())
