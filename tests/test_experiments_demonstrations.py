"""experiments/demonstrations.py: no example gives the answer away, and curves over k compare."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.domains.embedders import TfidfEmbedder
from lora_lexicon.domains.vectors import unit
from lora_lexicon.errors import DataError
from lora_lexicon.experiments.demonstrations import How, choose, shown

WORDS = ["apple", "Apple", "ice cream", "ice_cream", "river", "stone", "run", "cloud"]


class Letters:
    """Counts letters: vectors that anyone can compute."""

    name, identity, tensors = "letters", {"kind": "letters"}, {}

    def __init__(self) -> None:
        self.embedded: list[int] = []

    def embed(self, prompts: Sequence[tuple[str, str]], progress: Any = None, batch_size: int = 1) -> Any:
        self.embedded.append(len(prompts))
        return unit(np.array([[f"{t}{c}".count(x) + 0.1 for x in "aeiou"] for t, c in prompts]))


def entry(term: str, context: str = "") -> Entry:
    return Entry(term, context, f"about {term} {context}", "test")


ENTRIES = st.lists(
    st.builds(entry, st.sampled_from(WORDS), st.sampled_from(["", "a b", "so it is", "eau"])), max_size=30
)


@given(ENTRIES, ENTRIES, st.integers(0, 12), st.sampled_from(["random", "retrieved"]), st.integers(0, 3))
def test_whatever_is_chosen(train: list[Entry], tests: list[Entry], most: int, how: How, seed: int) -> None:
    fewest = min([sum(headword(e.term) != headword(t.term) for e in train) for t in tests], default=most)
    if fewest < most:
        with pytest.raises(DataError, match="training entries have another headword"):
            choose(train, tests, most, how, seed=seed, embedder=Letters())
        return
    found = choose(train, tests, most, how, seed=seed, embedder=Letters())
    assert len(found) == len(tests)
    for test, own in zip(tests, found, strict=True):
        assert len(own) == most
        assert not {id(e) for e in own} - {id(e) for e in train}
        assert len({id(e) for e in own}) == most, "an entry is shown once"
        assert headword(test.term) not in {headword(e.term) for e in own}, "the answer is given away"
        for fewer in range(most):
            assert choose(train, [test], fewer, how, seed=seed, embedder=Letters()) == [own[:fewer]]
            side = slice(0, fewer) if how == "random" else slice(most - fewer, None)
            assert shown(own, most, how)[side] == shown(own, fewer, how)


def test_the_nearest_come_last_and_vectors_are_computed_once() -> None:
    train = [entry(word, context) for word in WORDS for context in ("", "eau", "so")]
    tests, letters = [entry("piano", "a piano"), entry("River", "")], Letters()
    found = choose(train, tests, 5, "retrieved", embedder=letters)
    assert letters.embedded == [len(tests), len(train)]
    known, asked = (letters.embed([(e.term, e.context) for e in some]) for some in (train, tests))
    for test, own, vector in zip(tests, found, asked, strict=True):
        near = {id(e): float(v @ vector) for e, v in zip(train, known, strict=True)}
        assert [round(near[id(e)], 5) for e in own] == sorted(
            (round(near[id(e)], 5) for e in train if headword(e.term) != headword(test.term)), reverse=True
        )[:5]
        assert shown(own, 3, "retrieved") == own[2::-1]


def test_chance_depends_on_the_seed_and_the_entry() -> None:
    train = [entry(f"word{i}") for i in range(200)]
    tests = [entry("apple"), entry("river"), entry("apple", "an apple")]
    orders = [[e.term for e in own] for seed in (1, 2) for own in choose(train, tests, 8, seed=seed)]
    assert len({tuple(order) for order in orders}) == 6
    seen = [e.term for own in choose(train, [entry(f"test{i}") for i in range(500)], 4) for e in own]
    assert max(map(seen.count, set(seen))) < 30, "2,000 draws of 200"


def test_tfidf_finds_what_shares_words() -> None:
    train = [entry("seed", "the hard kernel of a nut"), *(entry(f"word{i}", f"other things {i}") for i in range(20))]
    embedder = TfidfEmbedder.fit([(e.term, e.context) for e in train])
    (own,) = choose(train, [entry("kernel", "a nut and its kernel")], 3, "retrieved", embedder=embedder)
    assert own[0].term == "seed"
    with pytest.raises(DataError, match="need an embedder"):
        choose(train, [entry("kernel")], 3, "retrieved")
