"""The chosen token: transformers' distribution, one number a request and step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_lexicon.errors import RecipeError
from lora_lexicon.inference.sampling import Decoding, choose


def test_samples_follow_the_distribution_that_transformers_samples_from() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 40) * 2, torch.tensor([[3, 5, 7]])
    decoding = Decoding("sample", temperature=1.2, top_k=12, top_p=0.8, repetition_penalty=1.3)
    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.2),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.8),
        ]
    )
    wanted = warpers(ids, logits.clone()).softmax(1)[0].numpy()  # type: ignore[arg-type]
    grid = torch.arange(20_000, dtype=torch.float64) / 20_000
    tokens, _ = choose(logits.expand(20_000, -1), ids.expand(20_000, -1), grid, decoding)
    found = np.bincount(tokens.numpy(), minlength=40) / 20_000
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@given(st.integers(0, 2**31), st.floats(0, 0.999999), st.floats(0.05, 1), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_sampled_token_is_always_possible(seed: int, uniform: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed)) * 5
    decoding = Decoding("sample", top_k=top_k, top_p=top_p)
    ids = torch.zeros(2, 1, dtype=torch.long)
    tokens, margins = choose(logits, ids, torch.full((2,), uniform, dtype=torch.float64), decoding)
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(1)
    assert bool((ranks < (top_k + 1 if top_k else 50)).all())  # the penalty may move a token by one rank
    assert bool((margins >= 0).all())


def test_greedy_takes_the_best_and_says_by_how_much() -> None:
    tokens, margins = choose(torch.tensor([[0.0, 3.0, 2.5]]), torch.tensor([[1]]), torch.zeros(1), Decoding())
    assert (tokens.item(), margins.item()) == (1, 0.5)


def test_a_request_s_numbers_depend_on_seed_term_and_context() -> None:
    def first(seed: int, term: str, context: str) -> float:
        return float(Decoding(seed=seed).uniforms(term, context)[0])

    assert first(1, "a", "b") == first(1, "a", "b")
    assert len({first(1, "a", "b"), first(2, "a", "b"), first(1, "b", "a"), first(1, "ab", "")}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "beam"),
        ("temperature", 0),
        ("top_k", -1),
        ("top_p", 1.5),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
    ],
)
def test_impossible_values_are_named(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"{field} is"):
        Decoding(**{field: value})  # type: ignore[arg-type]
