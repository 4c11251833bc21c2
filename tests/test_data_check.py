"""What splits share is found, all of it and nothing else; entries without it share nothing; faults are counted."""

import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.data.faults import COPIED, faults
from lora_lexicon.data.leaks import HeldOut, check, normal, share, write_clean
from lora_lexicon.data.near import NearIndex
from lora_lexicon.data.store import Entries, EntriesWriter, load_entries
from lora_lexicon.errors import DataError, ExpertError
from lora_lexicon.experts.pretrain import seen_by
from lora_lexicon.resources import packs

LETTERS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8)
TEXTS = st.lists(LETTERS.map(frozenset), max_size=12)
PAIRS = st.tuples(st.sampled_from(["ant", "bee", "cat", "dog", "eel"]), LETTERS.map(" ".join))
ROWS = st.lists(st.tuples(st.sampled_from(["train", "valid", "test"]), PAIRS), min_size=1, max_size=14)


def jaccard(a: str, b: str) -> float:
    one, other = set(a.split()), set(b.split())
    return len(one & other) / len(one | other)


def write(folder: Path, rows: list[tuple[str, Entry]]) -> Entries:
    folder.mkdir(exist_ok=True)
    writer = EntriesWriter(folder)
    for split, entry in rows:
        writer.add(split, entry)
    return writer.finish({})


@given(TEXTS, TEXTS, st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))
def test_the_index_finds_what_comparing_all_with_all_finds(
    held: list[frozenset[str]], asked: list[frozenset[str]], least: float
) -> None:
    index = NearIndex(held, least)
    for text in asked:
        every = {i: len(text & other) / len(text | other) for i, other in enumerate(held)}
        assert dict(index.of(text)) == {i: found for i, found in every.items() if found >= least}


@given(st.lists(PAIRS, max_size=10), st.lists(PAIRS, max_size=10))
def test_a_row_leaks_by_what_any_row_of_the_source_has(held: list[tuple[str, str]], source: list) -> None:
    (shared,) = share(source, [HeldOut(held, 0.6)])
    for i, (term, definition) in enumerate(held):
        same = {normal(d) == normal(definition): d for _, d in source}
        near = any(normal(d) != normal(definition) and jaccard(d, definition) >= 0.6 for _, d in source)
        expected = {
            "headword": any(headword(t) == headword(term) for t, _ in source),
            "pair": any((headword(t), normal(d)) == (headword(term), normal(definition)) for t, d in source),
            "definition": True in same,
            "near": near,
        }
        assert shared.kinds(i) == [kind for kind, leak in expected.items() if leak]
    report = shared.report()
    assert report["rows"] == sum(bool(shared.kinds(i)) for i in range(len(held)))


@settings(max_examples=40, deadline=None)
@given(ROWS, st.lists(PAIRS, max_size=4))
def test_what_was_cleaned_shares_nothing_and_keeps_all_else(rows: list, base: list[tuple[str, str]]) -> None:
    with TemporaryDirectory() as scratch:
        entries = write(Path(scratch) / "e", [(split, Entry(*pair[:1], "", pair[1], "s")) for split, pair in rows])
        found = check(entries, base=base, near=0.7)
        leaking = {
            pair: set(filter(shared.kinds, range(len(shared.held.rows)))) for pair, shared in found.shared.items()
        }
        left = {
            split: [
                entry
                for i, entry in enumerate(entries.split(split))
                if not any(i in leaks for pair, leaks in leaking.items() if pair.endswith(f"/{split}"))
            ]
            for split in entries.splits
        }
        held = [split for split in entries.splits if split != "train"]
        if held and not any(left[split] for split in held):
            with pytest.raises(DataError, match="leaks"):
                write_clean(found, Path(scratch) / "clean", {})
            assert not (Path(scratch) / "clean").exists()
            return
        made = write_clean(found, Path(scratch) / "clean", {"base": None})
        clean = load_entries(Path(scratch) / "clean")
        assert {split: clean.split(split) for split in clean.splits} == {s: e for s, e in left.items() if e}
        assert made["splits"] == {split: len(kept) for split, kept in left.items()}
        assert sum(made["dropped"].values()) == len(rows) - sum(made["splits"].values())
        again = check(clean, base=base, near=0.7)
        assert not any(shared.report()["rows"] for shared in again.shared.values())
        assert clean.record["made_by"]["cleaned_from"] == entries.fingerprint


@pytest.mark.parametrize(
    ("term", "definition", "context", "expected"),
    [
        ("harbour", "a sheltered port for ships", "the harbour is full", []),
        ("harbour", " . ", "the harbour is full", ["empty"]),
        ("happiness", "the state of being happy", "", ["circular"]),
        ("Ice_cream", "a frozen cream", "", []),
        ("ice cream", "any of several ice-creams", "", ["circular"]),
        ("cat", "a category of things", "", []),
        ("run", "running fast", "", ["circular"]),
        (
            "wind",
            "the wind swept the valley",
            "all night the wind swept the valley.",
            ["circular", "copy of the context"],
        ),
        ("movement", "swept the valley", "all night it swept the valley", []),
        ("gust", "swept the valley", "Swept the valley!", ["copy of the context"]),
    ],
)
def test_faults_are_what_they_are_called(term: str, definition: str, context: str, expected: list[str]) -> None:
    assert faults(term, definition, context) == expected


def test_stems_are_those_of_the_language() -> None:
    assert faults("Häuser", "mehr als ein Haus", language="de") == ["circular"]
    assert faults("chats", "plusieurs chat", language="fr-CA") == ["circular"]
    assert faults("walks", "to walk", language="xx") == []  # Snowball knows none: by the rules of inflection
    assert faults("walk", "what walks", language="xx") == ["circular"]


@given(st.text(max_size=20), st.text(max_size=40), st.text(max_size=40), st.sampled_from(["en", "ar", "", "zz"]))
def test_any_text_has_a_verdict(term: str, definition: str, context: str, language: str) -> None:
    found = faults(term, definition, context, language)
    assert found == sorted(set(found), key=found.index)
    assert ("empty" in found) == (not any(c.isalnum() or c == "_" for c in definition))


@given(st.lists(st.sampled_from(["oak", "elm", "ash", "yew"]), min_size=COPIED, max_size=9), st.data())
def test_any_long_run_of_the_context_is_a_copy(context: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(context) - COPIED))
    copied = context[start : data.draw(st.integers(start + COPIED, len(context)))]
    assert faults("tree", " ".join(copied), " ".join(context)) == ["copy of the context"]
    assert faults("tree", " ".join([*copied, "birch"]), " ".join(context)) == []


def entries_file(tmp_path: Path) -> Path:
    rows = [
        ("train", Entry("oak", "an oak stood", "a hard wooded tree with acorns of the northern lands", "s")),
        ("train", Entry("elm", "an elm fell", "a tree of hedges", "s")),
        ("test", Entry("Elm", "elm bark", "A tree of hedges.", "s")),
        ("test", Entry("holm", "a holm stood", "a hard wooded tree with acorns of the southern lands", "s")),
        ("test", Entry("yew", "the yews are old", "a yew that stands in a churchyard", "s")),
    ]
    write(tmp_path / "entries", rows)
    return tmp_path / "entries"


def test_the_command_tells_counts_and_examples_and_writes_what_is_clean(cli, tmp_path: Path) -> None:
    folder = entries_file(tmp_path)
    result = cli("data", "check", folder, "--json", "--out", tmp_path / "clean")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    shared = report["leaks"]["train/test"]
    assert [shared[kind]["rows"] for kind in ("headword", "pair", "definition", "near")] == [1, 1, 1, 1]
    assert (shared["rows"], shared["of"]) == (2, 3)
    assert shared["examples"]["near"][0]["other"]["term"] == "oak"
    assert report["faults"]["test"]["circular"] == 1
    assert report["clean"]["splits"] == {"train": 2, "test": 1}
    assert [entry.term for entry in load_entries(tmp_path / "clean").split("test")] == ["yew"]
    shown = cli("data", "check", folder)
    assert shown.exit_code == 0
    assert "holm" in shown.stderr
    assert "Leaks" in shown.stdout
    again = cli("data", "check", folder, "--out", tmp_path / "clean")
    assert (again.exit_code, "not empty" in again.stderr) == (1, True)


def test_what_the_base_read_leaks_too(cli, tmp_path: Path) -> None:
    folder = entries_file(tmp_path)
    (tmp_path / "d.csv").write_text("term,definition\nyew,a poisonous conifer\n,nothing\n")
    result = cli("data", "check", folder, "--base-data", tmp_path / "d.csv", "--json")
    report = json.loads(result.stdout)
    assert report["leaks"]["base/test"]["headword"] == {"distinct": 1, "rows": 1}
    assert report["base"]["rows"] == 1
    assert cli("data", "check", folder, "--base-data", tmp_path / "none.csv").exit_code == 1


def test_a_base_of_ours_says_what_it_held_back(cli, tmp_path: Path) -> None:
    folder = entries_file(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "training.json").write_text('{"rows": 7, "recipe": {"seed": 42}}')
    seen = seen_by(base)
    (tmp_path / "d.csv").write_text("term,definition\n" + "".join(f"w{i},meaning {i}\n" for i in range(200)))
    result = cli("data", "check", folder, "--base", base, "--base-data", tmp_path / "d.csv", "--json")
    known = json.loads(result.stdout)["base"]
    assert known["rows"] == sum(not seen.held_back(f"w{i}") for i in range(200))
    assert known["held_back"]["test"] == {"headwords": sum(map(seen.held_back, ["elm", "holm", "yew"])), "of": 3}
    assert (
        "not quite the data" in cli("data", "check", folder, "--base", base, "--base-data", tmp_path / "d.csv").stderr
    )
    (base / "training.json").write_text('{"rows": 7}')
    with pytest.raises(ExpertError, match=r"recipe\.seed"):
        seen_by(base)


@pytest.mark.skipif("tiny" not in packs(), reason="the shipped pack `tiny` is not there")
def test_the_shipped_base_held_back_its_sample(cli, tmp_path: Path) -> None:
    cli("data", "prepare", "sample:wordnet", "--out", tmp_path / "e")
    known = json.loads(cli("data", "check", tmp_path / "e", "--base", "tiny", "--json").stdout)["base"]
    for held in known["held_back"].values():
        assert held["headwords"] == held["of"] > 0


def test_predictions_are_checked_and_what_is_wrong_with_a_file_is_named(cli, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [("elm", "a tree"), ("elm", "an elm"), ("elm", " ")]
    file.write_text("\n".join(json.dumps({"term": t, "context": "", "prediction": p}) for t, p in rows) + "\n\n")
    found = json.loads(cli("data", "check", file, "--json").stdout)["faults"]
    assert [found[key] for key in ("rows", "empty", "circular", "any")] == [3, 1, 1, 2]
    assert found["examples"]["circular"][0]["line"] == 2
    assert "p.jsonl:2" in cli("data", "check", file).stderr
    assert cli("data", "check", file, "--out", tmp_path / "o").exit_code == 2
    good = '{"term": "a", "prediction": "b"}\n'
    for broken, reason in {
        "[]": "not an object",
        "{": "property name",
        '{"term": "a"}': "no column 'prediction'",
        '{"term": 3, "prediction": "b"}': "'term' is not a text",
        '{"term": " ", "prediction": "b"}': "'term' is empty",
        '{"term": "a", "prediction": "b", "context": 1}': "'context' is not a text",
        '{"term": "a", "prediction": "b", "references": "c"}': "'references' is not a list",
        '{"term": "a", "prediction": "\\ud800"}': "half of a character",
    }.items():
        file.write_text(good + broken + "\n")
        result = cli("data", "check", file)
        assert (result.exit_code, f"{file}:2: " in result.stderr, reason in result.stderr) == (1, True, True), broken
    file.write_text("\n")
    assert "no row" in cli("data", "check", file).stderr


@pytest.mark.parametrize("near", ["0", "1.5", "-1"])
def test_a_similarity_is_above_0_and_at_most_1(cli, tmp_path: Path, near: str) -> None:
    assert cli("data", "check", tmp_path, "--near", near).exit_code == 2


def test_every_pair_of_held_out_splits_is_compared(tmp_path: Path) -> None:
    rows = [(split, Entry(f"{split} word", "", f"meaning {split}", "s")) for split in ("train", "valid", "test")]
    found = check(write(tmp_path / "e", rows), base=[])
    expected = {f"{a}/{b}" for a, b in product(("train", "test", "base"), ("valid", "test")) if a != b}
    assert set(found.shared) == expected
