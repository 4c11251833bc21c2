"""BLEU as Moses' sentence-bleu computes it, and ROUGE-L: by hand, then as properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lexicon.data.overlap import overlap
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.metrics import bleu, bleu_tokens, rouge_l

WORDS = st.lists(st.sampled_from(["a", "kind", "of", "river", "that", "is", "bright."]), max_size=9).map(" ".join)
TEXTS = st.lists(WORDS, min_size=1, max_size=3)


@pytest.mark.parametrize(
    ("prediction", "references", "wanted"),
    [
        # matches + 1 over totals + 1 of orders 1 to 4, then the brevity penalty exp(1 - reference / prediction)
        ("a b c d", ["a b c d"], 100),
        ("a b", ["a b"], 100),  # sacreBLEU gives 0
        ("x", ["a"], 100 * (1 / 2) ** 0.25),
        ("a b c d", ["a b x d"], 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25),
        ("a b", ["a b c d"], 100 * math.exp(1 - 4 / 2)),
        ("a a a", ["a b"], 100 * (2 / 4 * 1 / 3 * 1 / 2 * 1) ** 0.25),  # clipped at one
        (
            "a b c",
            ["a b", "c d e f"],
            100 * (4 / 4 * 2 / 3 * 1 / 2 * 1) ** 0.25,
        ),  # lengths 2 and 4: the shorter is taken
        ("a a b", ["a b", "a a"], 100 * (4 / 4 * 3 / 3 * 1 / 2 * 1) ** 0.25),  # largest count in any one reference
        ("A b", ["a b"], 100 * (2 / 3 * 1 / 2) ** 0.25),  # case counts
        ("", ["a"], 0),
        (" . ", ["a"], 0),
    ],
)
def test_bleu_by_hand(prediction: str, references: list[str], wanted: float) -> None:
    assert bleu(prediction, references) == pytest.approx(wanted)


def test_full_stops_go_unless_a_digit_follows() -> None:
    assert bleu_tokens("No. 3.5 is it. e.g. this...\nU.S.") == ["No", "3.5", "is", "it", "eg", "this", "US"]
    assert bleu("the end", ["the end."]) == pytest.approx(100)


@given(WORDS, TEXTS)
def test_scores_are_bounded_and_ignore_the_order_of_references(prediction: str, references: list[str]) -> None:
    for score in (bleu, rouge_l):
        found = score(prediction, references)
        assert 0 <= found <= 100 + 1e-9
        assert found == score(prediction, references[::-1])


@given(WORDS, TEXTS)
def test_a_prediction_that_is_a_reference_scores_100(prediction: str, references: list[str]) -> None:
    if prediction:
        assert bleu(prediction, [prediction]) == pytest.approx(100)
        assert bleu(prediction, [*references, prediction]) == pytest.approx(100)
        assert rouge_l(prediction, [*references, prediction]) == pytest.approx(100)


@given(WORDS, WORDS)
def test_bleu_of_equal_lengths_and_rouge_l_are_symmetric(a: str, b: str) -> None:
    """Equal lengths: swapping prediction and reference changes nothing; ROUGE-L is symmetric always."""
    if len(bleu_tokens(a)) == len(bleu_tokens(b)):
        assert bleu(a, [b]) == pytest.approx(bleu(b, [a]))
    assert rouge_l(a, [b]) == pytest.approx(rouge_l(b, [a]))


@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcde"), max_size=90))
def test_the_longest_common_subsequence_is_the_tables(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1)]
    for x in a:
        table.append([0])
        for j, y in enumerate(b):
            table[-1].append(table[-2][j] + 1 if x == y else max(table[-2][j + 1], table[-1][j]))
    assert overlap(a, b) == (200 * table[-1][-1] / (len(a) + len(b)) if table[-1][-1] else 0)


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        ("police killed the gunman", "police kill the gunman", 75),  # Lin (2004), section 3.1
        ("the gunman kill police", "police kill the gunman", 50),
        ("A Kind, of river!", "a kind of river", 100),
        ("Fluß", "FLUSS", 100),
        ("a b c", "x a y c z", 200 * 2 / 8),
        ("", "a", 0),
        ("...", "...", 0),
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, wanted: float) -> None:
    assert rouge_l(prediction, [reference]) == pytest.approx(wanted)


def test_a_score_without_a_list_of_references_is_refused() -> None:
    for score in (bleu, rouge_l):
        for wrong in ([], "a string"):
            with pytest.raises(DataError, match="at least one reference"):
                score("a", wrong)
