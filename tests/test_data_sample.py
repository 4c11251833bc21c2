"""The samples: no word of one split in another, and those that ship are what the recipe's rules allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lexicon.data.entry import Row, headword
from lora_lexicon.data.readers import read
from lora_lexicon.data.sample import in_sample, sample, write_jsonl_gz
from lora_lexicon.data.split import split_of

WORDS = st.text("abcdef", min_size=1, max_size=3)
SIZES = {"train": 20, "valid": 4, "test": 5}


def row(term: str, definition: str) -> Row:
    return Row("f", 1, term, definition, (f"a {term} here",), "WordNet")


@given(st.lists(st.tuples(WORDS, WORDS), max_size=120), st.booleans())
def test_splits_share_no_word_and_training_no_held_out_definition(pairs, all_words):
    records = sample([row(*pair) for pair in pairs], SIZES, all_words=all_words)
    by_split = {name: [r for r in records if r["split"] == name] for name in SIZES}
    for name, size in SIZES.items():
        assert len(by_split[name]) <= size
        assert all(split_of(r["term"], 42) == name for r in by_split[name])
    held = [headword(r["definition"]) for name in ("valid", "test") for r in by_split[name]]
    assert len(held) == len(set(held))
    assert not set(held) & {headword(r["definition"]) for r in by_split["train"]}
    assert all_words or all(in_sample(r["term"]) for r in by_split["train"])


def test_a_sample_is_read_back_and_its_bytes_are_the_same(tmp_path):
    records = sample([row(f"word{i}", f"thing {i}") for i in range(300)], SIZES)
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl_gz(records, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert [r.term for r in read([str(tmp_path / "a.jsonl.gz")], None)] == [r["term"] for r in records]


@pytest.mark.parametrize(("name", "words_of_the_sample"), [("wordnet", True), ("jargon", False)])
def test_what_ships_was_drawn_by_these_rules(name, words_of_the_sample):
    rows = list(read([f"sample:{name}"], None))
    assert {r.split for r in rows[:100]} == {"train", "valid", "test"}
    for r in rows:
        assert not r.error
        assert r.split == split_of(str(r.term), 42)
        if words_of_the_sample and r.split == "train":
            assert in_sample(str(r.term))
