"""Preparation: every row accounted for, no headword in two splits, folders that appear whole or not at all."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.data.clean import clean
from lora_lexicon.data.entry import Entry, Row, headword
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.split import SHARES, split_of
from lora_lexicon.data.stats import statistics
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import DataError, LexiconError

VALUE = st.one_of(
    st.none(), st.integers(), st.text(max_size=6), st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=3)
)
RECORD = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("term", "definition", "context", "source", "split", "pos"), VALUE)
)
GOOD = {"term": "apple", "definition": "a fruit", "context": "an apple a day", "source": "S"}


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def words(count: int, **more: object) -> list[dict]:
    return [
        {"term": f"word{i}", "definition": f"d{i}", "context": f"the word{i} here", "source": "S", **more}
        for i in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORD, max_size=8), st.booleans())
def test_every_row_is_accounted_for(tmp_path_factory, records, keep):
    folder = tmp_path_factory.mktemp("p")
    source = write(folder / "a.jsonl", [GOOD, *records])
    report = prepare([source], folder / "out", keep_without_context=keep)
    lines = (folder / "out/rejects.jsonl").read_bytes().splitlines()  # of text, it would split at U+0085 too
    rejects = [json.loads(line) for line in lines]
    assert report["read"] == 1 + len(records) == report["kept"] + sum(report["rejected"].values())
    assert Counter(r["reason"] for r in rejects) == report["rejected"]
    assert all(r["file"] == source and 1 <= r["line"] <= report["read"] for r in rejects)
    entries = load_entries(folder / "out")
    assert {s: len(entries.split(s)) for s in entries.splits} == report["splits"]
    assert report["entries"] == sum(report["splits"].values())
    assert statistics(entries)["entries"] == report["entries"]


def test_the_rules_of_appendix_a():
    row = {"term": "t", "definition": "d", "contexts": ("c1", "  c2\n x "), "source": "S"}
    assert clean(Row("f", 1, **row)) == [Entry("t", "c1", "d", "S"), Entry("t", "c2 x", "d", "S")]
    for field, reason in (("term", "no term"), ("definition", "no definition"), ("source", "no source")):
        for value in (None, 3.0, "", "  "):
            assert clean(Row("f", 1, **{**row, field: value})) == reason
    for contexts in ((), ("",), (None,), (float("nan"),)):
        assert clean(Row("f", 1, **{**row, "contexts": contexts})) == "no context"
        assert clean(Row("f", 1, **{**row, "contexts": contexts}), keep_without_context=True) == [
            Entry("t", "", "d", "S")
        ]
    assert clean(Row("f", 1, **{**row, "contexts": ("x" * 10_001,)})) == "overlong field"
    assert clean(Row("f", 1, **{**row, "contexts": ("x" * 10_001, "good")})) == [Entry("t", "good", "d", "S")]
    assert clean(Row("f", 1, **{**row, "term": "\ud800"})) == "invalid UTF-8"
    assert clean(Row("f", 1, **row, split="holdout")) == "unknown split"


@given(st.text(min_size=1, max_size=12), st.integers(0, 3))
def test_a_headword_has_one_split_however_it_is_spelt(term, seed):
    spellings = {term, term.upper().lower(), f" {term} ", term.replace(" ", "_")}
    same = {s for s in spellings if headword(s) == headword(term)}
    assert len({split_of(s, seed) for s in same}) == 1
    assert split_of(term, seed) in SHARES


def test_splits_share_no_headword_and_follow_the_seed(tmp_path):
    source = write(tmp_path / "a.jsonl", [*words(300), *[{**w, "term": w["term"].upper()} for w in words(300)]])
    reports = {seed: prepare([source], tmp_path / f"s{seed}", seed=seed) for seed in (1, 2)}
    again = prepare([source], tmp_path / "again", seed=1)
    assert again["fingerprint"] == reports[1]["fingerprint"] != reports[2]["fingerprint"]
    entries = load_entries(tmp_path / "s1")
    sets = [{headword(e.term) for e in entries.split(s)} for s in entries.splits]
    assert entries.splits == ("train", "valid", "test")
    assert sum(map(len, sets)) == len(set.union(*sets)) == 300
    assert set(reports[1]["overlap"].values()) == {0}
    assert all(split_of(e.term, 1) == s for s in entries.splits for e in entries.split(s))


def test_given_splits_are_kept_and_their_overlap_reported(tmp_path):
    records = [*words(10, split="Training"), *words(4, split="TEST"), *words(2, split="dev")]
    report = prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "out")
    assert report["splits"] == {"train": 10, "valid": 2, "test": 4}
    assert report["overlap"] == {"train/valid": 2, "train/test": 4, "valid/test": 2}
    found = statistics(load_entries(tmp_path / "out"))
    assert found["overlap"] == {"term": 100.0, "term_and_gloss": 100.0}


def test_statistics_of_tables_1_and_5(tmp_path):
    records = [
        {"term": "bank", "definition": "a slope of land", "context": "the bank", "source": "A", "split": "train"},
        {"term": "Bank", "definition": "a house", "context": "the bank", "source": "A", "split": "train"},
        {"term": "bank", "definition": "a house", "context": "another bank", "source": "B", "split": "train"},
        {"term": "ice cream", "definition": "a sweet", "context": "eat ice cream now", "source": "B", "split": "train"},
        {"term": "bank", "definition": "a slope of land", "context": "x", "source": "A", "split": "test"},
        {"term": "tea", "definition": "a drink", "context": "drink tea", "source": "A", "split": "test"},
    ]
    report = prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "out")
    assert report["term_not_in_context"] == 1
    found = statistics(load_entries(tmp_path / "out"))
    assert found["splits"]["train"] == {"entries": 4, "terms": 2, "divergent": 2, "divergent_percent": 50.0}
    assert found["splits"]["test"]["divergent"] == 0
    assert (found["entries"], found["terms"], found["sources"]) == (6, 3, {"A": 4, "B": 2})
    assert found["glosses_per_term"]["mean"] == pytest.approx(4 / 3)
    assert found["tokens_per_term"] == {"mean": pytest.approx(4 / 3), "std": pytest.approx(0.4714, abs=1e-3)}
    assert found["tokens_per_context"]["mean"] == pytest.approx(13 / 6)
    assert found["overlap"] == {"term": 50.0, "term_and_gloss": 50.0}
    assert json.loads((tmp_path / "out/stats.json").read_text()) == json.loads(json.dumps(found))


def test_the_folder_opens_with_datasets_too(tmp_path):
    from datasets import load_from_disk

    prepare([write(tmp_path / "a.jsonl", words(60))], tmp_path / "out")
    entries, oracle = load_entries(tmp_path / "out"), load_from_disk(str(tmp_path / "out"))
    assert set(oracle) == set(entries.splits)
    for split in entries.splits:
        assert [Entry(**row) for row in oracle[split]] == entries.split(split)


def test_several_inputs_of_several_formats(tmp_path):
    table = tmp_path / "b.csv"
    table.write_text("word,gloss,sentence\nq1,d,the q1\n")
    report = prepare([write(tmp_path / "a.jsonl", words(5)), str(table)], tmp_path / "out")
    assert report["read"] == report["kept"] == 6
    record = json.loads((tmp_path / "out/entries.json").read_text())["made_by"]
    assert [(i["format"], i["name"]) for i in record["inputs"]] == [("jsonl", "a.jsonl"), ("csv", "b.csv")]
    assert len(record["inputs"][0]["files"][0]["sha256"]) == 64


def test_progress_ends_at_the_whole_or_where_the_limit_is(tmp_path):
    seen: list[tuple[int, int]] = []
    source = write(tmp_path / "a.jsonl", words(3000))
    prepare([source], tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    size = Path(source).stat().st_size
    assert (seen[0], seen[-1]) == ((0, size), (size, size))
    seen.clear()
    prepare([source], tmp_path / "few", progress=lambda done, total: seen.append((done, total)), limit=10)
    assert 0 < seen[-1][0] <= size == seen[-1][1]


def test_failure_leaves_nothing_behind(tmp_path):
    empty = write(tmp_path / "a.jsonl", [{"term": "a", "definition": "b", "source": "S"}])
    with pytest.raises(DataError, match=r"no context: 1.*--keep-without-context"):
        prepare([empty], tmp_path / "out")
    good = write(tmp_path / "b.jsonl", words(3))
    with pytest.raises(DataError, match="does not exist"):
        prepare([good, str(tmp_path / "missing.csv")], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    prepare([good], tmp_path / "out")
    with pytest.raises(LexiconError, match="not empty"):
        prepare([good], tmp_path / "out")
    with pytest.raises(DataError):
        prepare([empty], tmp_path / "out", overwrite=True)
    assert load_entries(tmp_path / "out").split("train")
    prepare([good], tmp_path / "out", overwrite=True)


def test_a_folder_that_is_damaged_or_no_entries(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="folder of entries"):
            load_entries(path)
    prepare([write(tmp_path / "a.jsonl", words(30))], tmp_path / "out")
    entries = load_entries(tmp_path / "out")
    with pytest.raises(DataError, match="no split 'nope'"):
        entries.split("nope")
    data = tmp_path / "out/train/data-00000-of-00001.arrow"
    content = data.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * 100):
        data.write_bytes(damaged)
        with pytest.raises(DataError, match="prepare the data again"):
            entries.split("train")
    record = tmp_path / "out/entries.json"
    record.write_text(record.read_text().replace('"train"', '"../../etc"'))
    with pytest.raises(DataError, match="splits must be among"):
        load_entries(tmp_path / "out")


def test_the_command_line(cli, tmp_path):
    source = write(tmp_path / "a.jsonl", [*words(40), {"term": "x"}])
    result = cli("data", "prepare", source, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["read"], report["kept"], report["rejected"]) == (41, 40, {"no definition": 1})
    result = cli("data", "stats", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["entries"] == 40
    assert "tokens per gloss" in cli("data", "stats", tmp_path / "out").stdout
    result = cli("data", "prepare", source, "--out", tmp_path / "o2")
    assert "rejected: no definition" in result.stdout
    assert "rejects.jsonl" in result.stderr
    assert "no entry is in" not in result.stderr
    small = write(tmp_path / "b.jsonl", words(2))
    result = cli("data", "prepare", small, "--out", tmp_path / "o4")
    assert "no entry is in valid and test" in result.stderr
    assert "rejects.jsonl" not in result.stderr
    given = write(tmp_path / "c.jsonl", [{**word, "split": "train"} for word in words(2)])
    assert "no entry is in" not in cli("data", "prepare", given, "--out", tmp_path / "o5").stderr
    result = cli("data", "prepare", tmp_path / "nope.csv", "--out", tmp_path / "o3")
    assert (result.exit_code, result.stderr.count("error:")) == (1, 1)
    assert not (tmp_path / "o3").exists()
    assert cli("data", "prepare", source, "--out", tmp_path / "o3", "--column", "term").exit_code == 2
