"""The embedded base: what it may see, and that its recipe makes a base that the rest of the project takes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lora_lexicon.data.entry import Row, headword
from lora_lexicon.data.sample import in_sample
from lora_lexicon.data.split import split_of
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.pretrain import PretrainRecipe, batches_of, pretrain, select

WORDS = st.text("abcdefgh", min_size=1, max_size=4)
ROWS = st.lists(st.tuples(WORDS, WORDS, st.lists(WORDS, max_size=2)), max_size=40)


def row(term: str, definition: str, contexts: list[str]) -> Row:
    return Row("f", 1, term, definition, tuple(contexts), "WordNet")


@given(ROWS)
def test_no_held_out_word_and_no_definition_of_one_is_seen(triples):
    texts = select([row(*each) for each in triples], 42)
    kept_back = {t for t, _, contexts in triples if split_of(t, 42) != "train" or (contexts and in_sample(t))}
    definitions = {headword(d) for t, d, c in triples if split_of(t, 42) != "train" or (c and in_sample(t))}
    assert not kept_back & {term for term, _, _ in texts}
    assert not definitions & {headword(definition) for _, _, definition in texts}
    bare = [headword(definition) for _, context, definition in texts if not context]
    assert len(bare) == len(set(bare))


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 64))
def test_every_row_is_in_one_batch_and_no_batch_is_too_big(lengths, tokens):
    rows = [{"input_ids": [i] * n} for i, n in enumerate(lengths)]
    batches = batches_of(rows, tokens, 42)
    assert sorted(row["input_ids"][0] for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(row["input_ids"]) for row in batch) <= tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "base"
    recipe = PretrainRecipe(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        epochs=1.0, batch_tokens=256, warmup_steps=2, compile=False,
    )  # fmt: skip
    rows = [row(f"word{i}", f"a kind of thing number {i}", [f"a word{i} here"]) for i in range(60)]
    return out, pretrain(rows, out, recipe, "the licence"), rows, recipe


def test_the_base_loads_and_its_card_says_how_it_was_made(made):
    out, record, _, _ = made
    base = load_base(str(out))
    assert sum(p.numel() for p in base.model.parameters()) == record["parameters"]
    card = (out / "README.md").read_text()
    for said in (f"{record['tokens_seen']:,}", f"{record['final_loss']:.3f}", record["hardware"], "WordNet 3.0"):
        assert said in card
    assert (out / "NOTICE").read_text() == "the licence"
    assert json.loads((out / "training.json").read_text()) == record
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert not (out / "checkpoints").exists()


def test_the_same_recipe_makes_the_same_base(made, tmp_path):
    out, _, rows, recipe = made
    pretrain(rows, tmp_path / "again", recipe, "")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
