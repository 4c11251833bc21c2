"""The base embedder's vectors depend on the prompt and the bottom layers, and on nothing else."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains import embed
from lora_lexicon.domains.embed import BaseEmbedder, embed_cached
from lora_lexicon.domains.vectors import unit
from lora_lexicon.errors import DataError, RouterError

WORDS = ("apple", "river", "stone", "bright", "quickly")
PROMPTS = st.lists(
    st.tuples(st.sampled_from(WORDS), st.one_of(st.just(""), st.text(max_size=60), st.sampled_from(WORDS))),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module")
def base(tiny_base: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval(), PromptEncoder(
        AutoTokenizer.from_pretrained(tiny_base)
    )


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_stopping_early_gives_the_hidden_state(base, layers):
    model, encoder = base
    ids = encoder.prompt("river", "the river is bright and the cloud is green")
    with torch.no_grad():
        whole = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layers][0]
    assert torch.equal(BaseEmbedder(model, encoder, layers, "f").hidden([ids])[0], whole)


def test_the_hook_is_gone_afterwards(base):
    model, encoder = base
    BaseEmbedder(model, encoder, 1, "f").embed([("river", "")])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


@settings(max_examples=25, deadline=None)
@given(PROMPTS, st.sampled_from(["mean", "last"]))
def test_alone_and_in_any_batch_the_bits_agree(base, prompts, pool):
    embedder = BaseEmbedder(*base, 2, "f", pool)
    together = embedder.embed(prompts)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for i, prompt in enumerate(prompts):
        assert np.array_equal(embedder.embed([prompt])[0], together[i])


def test_batches_for_fitting_agree_with_prompts_alone(base):
    embedder = BaseEmbedder(*base, 2, "f", "last")
    prompts = [(term, f"the {other} is here") for term in WORDS for other in WORDS]
    seen: list[int] = []
    together = embedder.embed(prompts, seen.append, batch_size=8)
    assert sum(seen) == len(prompts) > len(seen)
    assert np.allclose(together, embedder.embed(prompts), atol=1e-6)


def test_the_cache_is_keyed_by_content(base, tmp_path):
    embedder, prompts = BaseEmbedder(*base, 1, "f"), [("river", ""), ("stone", "a stone")]
    first = embed_cached(embedder, prompts, tmp_path)
    (file,) = tmp_path.iterdir()
    save_file({"vectors": -first}, file)
    assert np.array_equal(embed_cached(embedder, prompts, tmp_path), -first)
    file.write_bytes(file.read_bytes()[:50])
    assert np.array_equal(embed_cached(embedder, prompts, tmp_path), first)
    embed_cached(embedder, prompts[:1], tmp_path)
    embed_cached(BaseEmbedder(*base, 2, "f"), prompts, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_killed_run_goes_on_at_its_last_whole_shard(base, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "SHARD", 10)
    embedder, seen = BaseEmbedder(*base, 2, "f"), []
    prompts = [(term, f"the {other} is {n}") for term in WORDS for other in WORDS for n in range(2)][:35]
    unbroken = embed_cached(embedder, prompts, None)

    def killed(count: int) -> None:
        seen.append(count)
        if sum(seen) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_cached(embedder, prompts, tmp_path, killed)
    assert len(list(tmp_path.iterdir())) == 2
    done, computed = [], []
    monkeypatch.setattr(BaseEmbedder, "embed_ids", counting(computed))
    resumed = embed_cached(embedder, prompts, tmp_path, done.append, scratch=tmp_path)
    assert (computed, sum(done)) == ([10, 5], 35)
    assert np.array_equal(resumed, unbroken)
    assert resumed.dtype == np.float32
    assert np.allclose(resumed, embedder.embed(prompts), atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 4  # the shards, and nothing of the memory map


def test_what_a_killed_run_left_half_written_is_removed(base, tmp_path):
    old, new = tmp_path / "a.1.partial", tmp_path / "b.2.partial"  # the new one may belong to a run that is alive
    for file in (old, new):
        file.write_bytes(bytes(10))
    os.utime(old, (0, 0))
    embed_cached(BaseEmbedder(*base, 1, "f"), [("river", "")], tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_vectors_that_are_not_finite_are_refused_and_not_kept(base, tmp_path, monkeypatch):
    embedder = BaseEmbedder(*base, 1, "f")
    vectors = np.ones((2, 4), dtype=np.float32)
    vectors[1, 3] = np.nan
    monkeypatch.setattr(embedder, "embed", lambda *_: vectors)
    for cache in (None, tmp_path):
        with pytest.raises(DataError, match=r"^the embedder 'base' gives NaN .* 1 of 2 prompts, .*'stone'"):
            embed_cached(embedder, [("river", ""), ("stone", "")], cache)
    assert not list(tmp_path.iterdir())


def counting(computed: list[int]):
    """`BaseEmbedder.embed_ids`, which notes how many rows it is asked for."""
    real = BaseEmbedder.embed_ids

    def embed_ids(self, rows, *options):
        computed.append(len(rows))
        return real(self, rows, *options)

    return embed_ids


def test_layers_above_the_ones_read_do_not_matter(base, tiny_base):
    model, encoder = base
    other = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    with torch.no_grad():
        for p in [*other.model.layers[2].parameters(), *other.lm_head.parameters()]:
            if p is not other.model.embed_tokens.weight:
                p.zero_()
    prompts = [("river", "a river"), ("stone", "")]
    for layers, same in ((2, True), (3, False)):
        ours, theirs = (BaseEmbedder(m, encoder, layers, "f").embed(prompts) for m in (model, other))
        assert np.array_equal(ours, theirs) is same


def test_pooling_is_the_mean_of_the_states_it_names(base):
    model, encoder = base
    ids = encoder.prompt("river", "two rivers are here")
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0].numpy()
    for pool, wanted in (("mean", states[1:-1]), ("last", states[-1:])):
        found = BaseEmbedder(model, encoder, 2, "f", pool).embed([("river", "two rivers are here")])[0]
        assert np.allclose(found, unit(wanted.mean(axis=0)[None])[0], atol=1e-6)


def test_a_cut_prompt_still_has_a_vector(base):
    model, encoder = base
    ids = PromptEncoder(encoder.tokenizer, max_length=12)
    vector = BaseEmbedder(model, ids, 1, "f", "last").embed([("river " * 30, "")])
    assert np.isfinite(vector).all()


def test_more_layers_than_the_base_has_are_refused(base):
    with pytest.raises(RouterError, match="3 layers"):
        BaseEmbedder(*base, 4, "f")
