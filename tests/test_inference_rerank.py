"""What must hold of the best of N, whatever chooses and whoever stands beside it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_system import EXPERTS, SmallSystem

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.overlap import overlap, words
from lora_lexicon.errors import LexiconError
from lora_lexicon.evaluation.metrics import bleu, rouge_l
from lora_lexicon.evaluation.run import evaluate
from lora_lexicon.inference import rerank
from lora_lexicon.inference.engine import Candidate, define, losses, text_of
from lora_lexicon.inference.rerank import WAYS, agreement, best_of, rank, samples, write_all
from lora_lexicon.inference.sampling import Decoding

PROMPTS = [(w, c) for w in ("apple", "river", "stone", "cloud paper") for c in ("", "a long winter and the garden")]
GOLD = ["a kind of river", "the stone", "bright", "apple", "a table that is green", "", "voice of metal", "run"]
SAMPLED = Decoding("sample", temperature=1.5, top_k=50, max_new_tokens=8)
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.lists(st.sampled_from(["", "a", "a river", "a green river", "stone", "river a"]), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def system(tiny_base: Path) -> Any:
    """One that ends its definitions now and then."""
    small = SmallSystem(tiny_base)
    bias = torch.zeros(small.model.config.vocab_size)
    bias[small.tokenizer.eos_token_id] = 1.2
    small.model.get_output_embeddings().register_forward_hook(lambda *found: found[2] + bias)
    return small


def _rate(pairs: Any) -> list[float]:
    return [bleu(text, [GOLD[i]]) for i, text in pairs]


def _best(system: Any, prompts: Any, n: int, by: Any, **options: Any) -> Any:
    rate = _rate if by in ("reward", "reference") else None
    return best_of(system, prompts, SAMPLED, n, by, rate=rate, **options)


@pytest.mark.parametrize("by", WAYS)
def test_a_choice_does_not_depend_on_its_neighbours(system: Any, by: Any) -> None:
    together = _best(system, PROMPTS, 5, by, batch_size=7)
    for i in (0, 3, 7):
        rate = (lambda pairs, i=i: _rate([(i, text) for _, text in pairs])) if by in ("reward", "reference") else None
        (alone,) = best_of(system, [PROMPTS[i]], SAMPLED, 5, by, rate=rate)
        assert (alone.text, alone.domain, alone.tokens) == (
            together[i].text, together[i].domain, together[i].tokens
        )  # fmt: skip
        assert alone.score == pytest.approx(together[i].score, abs=1e-4)
    assert [d.text for d in together] == [d.text for d in _best(system, PROMPTS, 5, by)]


def test_candidates_do_not_depend_on_n_and_the_first_is_what_define_samples(system: Any) -> None:
    found = {n: _best(system, PROMPTS, n, "mbr") for n in (1, 2, 5)}
    for i, plain in enumerate(define(system, PROMPTS, SAMPLED)):
        assert (found[1][i].text, found[1][i].domain) == (plain.text, plain.domain)
        counts = {n: Counter({c.text: c.count for c in d[i].candidates}) for n, d in found.items()}
        assert counts[1] <= counts[2] <= counts[5]
        assert [counts[n].total() for n in (1, 2, 5)] == [1, 2, 5]


def test_one_prefill_serves_all_candidates_of_a_prompt(system: Any) -> None:
    read: list[int] = []
    hook = system.model.get_decoder().register_forward_hook(
        lambda _, inputs, options, output: read.append(options["input_ids"].shape[0] * options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    _best(system, PROMPTS[:1], 6, "mbr")
    hook.remove()
    assert read[0] == len(system.encoder.prompt(*PROMPTS[0]))
    assert max(read[1:]) <= 6


def test_a_likelihood_is_that_of_the_losses(system: Any) -> None:
    seen = 0
    rows = [samples(system, prompt, system.route([prompt]).weights[0], SAMPLED, 24) for prompt in PROMPTS]
    write_all(system, rows)
    for prompt, own, best in zip(PROMPTS, rows, _best(system, PROMPTS, 24, "likelihood"), strict=True):
        scores = {c.text: c.score for c in best.candidates}
        for row in own:
            text = text_of(system, row.written)
            if system.encoder.row(*prompt, text).ids != [*row.prompt, *row.written]:
                continue  # cut off, or written in tokens other than those that the text is cut into
            total, tokens = losses(system, [Entry(*prompt, text, "")])
            assert row.score == pytest.approx(-total[0], rel=1e-4)
            assert scores[text] >= -total[0] / tokens[0] - 1e-4
            seen += 1
        whole = [c for c in best.candidates if c.whole] or best.candidates
        assert best.score == max(c.score for c in whole)
    assert seen > 5


def test_experts_write_and_the_routed_system_decides(system: Any) -> None:
    weights = np.zeros((len(PROMPTS), 3), np.float32)
    weights[:, 1] = 1
    found = best_of(system, PROMPTS, SAMPLED, 2, "experts", weights=weights)
    assert {c.domain for d in found for c in d.candidates} == set(EXPERTS)
    assert all(sum(c.count for c in d.candidates) == 6 for d in found)
    for prompt, own in zip(PROMPTS, found, strict=True):
        entries = [Entry(*prompt, c.text, "") for c in own.candidates]
        total, tokens = losses(system, entries, weights=np.tile(weights[:1], (len(entries), 1)))
        np.testing.assert_allclose([c.score for c in own.candidates], -total / tokens, rtol=1e-4)


def test_the_oracle_has_the_best_bleu_and_gains_with_every_candidate(system: Any) -> None:
    def scores(by: Any, n: int) -> Any:
        return np.array([bleu(d.text, [gold]) for d, gold in zip(_best(system, PROMPTS, n, by), GOLD, strict=True)])

    oracle = [scores("reference", n) for n in (1, 3, 6)]
    assert (oracle[0] <= oracle[1]).all()
    assert (oracle[1] <= oracle[2]).all()
    for by in ("likelihood", "mbr"):
        assert (scores(by, 6) <= oracle[2]).all()


@given(TEXTS, st.randoms())
@settings(max_examples=60, deadline=None)
def test_agreement_sees_no_order_and_multiplicity_counts(texts: list[str], chance: Any) -> None:
    shuffled = texts.copy()
    chance.shuffle(shuffled)
    found = agreement(Counter(texts))
    assert found == agreement(Counter(shuffled))
    slow = {t: sum(rouge_l(t, [other]) for other in texts) / len(texts) for t in texts}
    assert found == pytest.approx(slow)
    if len(set(texts)) == 1:
        assert found[texts[0]] == pytest.approx(100 if texts[0] else 0)


@given(TEXTS, TEXTS)
def test_overlap_is_symmetric(a: list[str], b: list[str]) -> None:
    left, right = words(" ".join(a)), words(" ".join(b))
    assert overlap(left, right) == overlap(right, left)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([-1.0, 0.0, 2.0]), st.booleans()), min_size=1,
                unique_by=lambda one: one[0]), st.sampled_from(WAYS), st.randoms())  # fmt: skip
def test_the_order_of_candidates_does_not_matter(drawn: Any, by: Any, chance: Any) -> None:
    candidates = [Candidate(text, "base", 1, 3, whole, score) for text, score, whole in drawn]
    shuffled = candidates.copy()
    chance.shuffle(shuffled)
    best = rank(candidates, by)[0]
    assert rank(shuffled, by)[0] == best
    rivals = [c for c in candidates if c.whole] or candidates if by in ("likelihood", "experts") else candidates
    assert best.text == min(c.text for c in rivals if c.score == max(r.score for r in rivals))


@FEW
@given(st.sampled_from(WAYS), st.integers(1, 6))
def test_where_all_candidates_are_equal_that_is_the_answer(system: Any, by: Any, n: int) -> None:
    certain = Decoding("sample", top_k=1, max_new_tokens=5)
    rate = _rate if by in ("reward", "reference") else None
    weights = np.zeros((2, 3), np.float32)
    weights[:, 0] = 1
    plain = define(system, PROMPTS[:2], certain, weights=weights)
    found = best_of(system, PROMPTS[:2], certain, n, by, rate=rate, weights=weights)
    for own, other in zip(found, plain, strict=True):
        if by == "experts":  # each is certain of a text of its own
            assert other.text in {c.text for c in own.candidates}
        else:
            assert [(c.text, c.count) for c in own.candidates] == [(other.text, n)]
            assert own.text == other.text


def test_scores_that_rounding_could_turn_are_taken_again_alone(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def rate(pairs: Any) -> list[float]:
        asked.append(len(pairs))
        noise = 0.0 if len(pairs) == 1 else 1e-6
        return [len(text) % 2 + noise * n for n, (_, text) in enumerate(pairs)]

    forward = best_of(system, PROMPTS, SAMPLED, 6, "reward", rate=rate)
    assert 1 in asked
    backward = best_of(system, PROMPTS[::-1], SAMPLED, 6, "reward", rate=rate)
    assert [d.text for d in forward] == [d.text for d in backward[::-1]]
    monkeypatch.setattr(rerank, "PROMPTS_AT_ONCE", 3)
    assert [d.text for d in best_of(system, PROMPTS, SAMPLED, 6, "reward", rate=rate)] == [d.text for d in forward]


def test_evaluation_scores_what_was_chosen(system: Any) -> None:
    entries = [Entry(*prompt, gold or "x", "s") for prompt, gold in zip(PROMPTS, GOLD, strict=True)]
    told: list[int] = []
    one, best = (
        evaluate(system, entries, decoding=SAMPLED, best=n, by="reference", progress=told.append) for n in (1, 6)
    )
    assert best.bleu is not None
    assert one.bleu is not None
    assert (best.bleu >= one.bleu).all()
    assert best.bleu.sum() > one.bleu.sum()
    assert sum(told) == 4 * len(PROMPTS)


def test_what_cannot_be_chosen_by_is_refused(system: Any, tiny_base: Path) -> None:
    assert best_of(system, [], SAMPLED, 3, "experts") == []
    base = SmallSystem(tiny_base, routed=False)
    cases: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
        ("decoding is greedy", system, (Decoding(), 2, "mbr"), {}),
        ("of 1 or more", system, (SAMPLED, 0, "mbr"), {}),
        ("not known", system, (SAMPLED, 2, "luck"), {}),
        ("something to rate", system, (SAMPLED, 2, "reward"), {}),
        ("takes no scores", system, (SAMPLED, 2, "mbr"), {"rate": _rate}),
        ("no experts", base, (SAMPLED, 2, "experts"), {}),
        ("shape", system, (SAMPLED, 2, "mbr"), {"weights": np.ones((1, 2), np.float32)}),
    ]
    for said, asked, arguments, options in cases:
        with pytest.raises(LexiconError, match=said) as caught:
            best_of(asked, [("apple", "")], *arguments, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(LexiconError, match="term is empty"):
        best_of(system, [(" ", "")], SAMPLED, 2, "mbr")
