"""One evaluation: its numbers fit together, and two of them compare row by row."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_system import EXPERTS, SmallSystem

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.metrics import bleu, rouge_l
from lora_lexicon.evaluation.report import comparison_rows, footprint_fidelity, system_rows
from lora_lexicon.evaluation.run import (
    SIGNATURES,
    Evaluation,
    compare,
    evaluate,
    further_scores,
    intervals,
    random_weights,
    write_predictions,
)
from lora_lexicon.inference.sampling import Decoding

ENTRIES = [
    Entry(term, f"the {term} is here", f"a kind of {term} that is {word}", "test")
    for term in ("apple", "river", "stone", "cloud")
    for word in ("bright", "green", "quick")
]


@pytest.fixture(scope="module")
def system(tiny_base: Path) -> Any:
    return SmallSystem(tiny_base)


@pytest.fixture(scope="module")
def routed(system: Any) -> Evaluation:
    return evaluate(system, ENTRIES, decoding=Decoding(max_new_tokens=6))


@pytest.fixture(scope="module")
def at_random(system: Any) -> Evaluation:
    weights = random_weights(len(ENTRIES), 3)
    return evaluate(system, ENTRIES, name="random", weights=weights, decoding=Decoding(max_new_tokens=6))


def test_the_summary_follows_from_the_rows(routed: Evaluation) -> None:
    found = routed.summary()
    assert found["name"] == "small"
    assert found["ship_megabytes"] == 2
    assert found["memory_megabytes"] == 10
    assert found["trained_parameters"] == 1000
    assert found["loss"] == pytest.approx(routed.nll.sum() / routed.tokens.sum())
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens_per_second"] > 0
    assert routed.predictions is not None
    pairs = [(text, [entry.definition]) for text, entry in zip(routed.predictions, ENTRIES, strict=True)]
    assert found["bleu"] == pytest.approx(np.mean([bleu(*pair) for pair in pairs]))
    assert found["rouge_l"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    assert json.loads(json.dumps(found)) == found


def test_without_generation_there_is_the_loss_alone(system: Any, routed: Evaluation) -> None:
    told: list[int] = []
    found = evaluate(system, ENTRIES, defined=0, progress=told.append)
    assert found.loss == pytest.approx(routed.loss)
    assert (found.predictions, found.summary()["bleu"], found.summary()["tokens_per_second"]) == (None, None, None)
    assert sum(told) == len(ENTRIES)
    with pytest.raises(DataError, match="generated nothing"):
        compare(found, routed, "bleu")


def test_the_first_few_can_be_defined_alone(system: Any, routed: Evaluation, at_random: Evaluation) -> None:
    told: list[int] = []
    decoding = Decoding(max_new_tokens=6)
    few = evaluate(system, ENTRIES, defined=5, decoding=decoding, progress=told.append)
    assert sum(told) == len(ENTRIES) + 5
    assert few.loss == pytest.approx(routed.loss)
    assert routed.predictions is not None
    assert few.predictions == routed.predictions[:5]
    other = evaluate(system, ENTRIES, defined=5, decoding=decoding, weights=random_weights(len(ENTRIES), 3))
    assert compare(few, other, "bleu")["difference"] == pytest.approx(
        few.summary()["bleu"] - other.summary()["bleu"], abs=1e-9
    )
    with pytest.raises(DataError, match="did not define as many"):
        compare(few, at_random, "bleu")


def test_a_comparison_is_the_difference_of_the_table(routed: Evaluation, at_random: Evaluation) -> None:
    for metric in ("loss", "bleu", "rouge_l"):
        found = compare(routed, at_random, metric)
        difference = routed.summary()[metric] - at_random.summary()[metric]
        assert found["difference"] == pytest.approx(difference, abs=1e-9)
        assert found["low"] <= found["difference"] <= found["high"]
        assert (found["a"], found["b"], found["metric"]) == ("small", "random", metric)
    assert compare(routed, routed)["p"] == 1


def test_only_the_same_entries_and_tokens_compare(routed: Evaluation) -> None:
    with pytest.raises(DataError, match="same entries"):
        compare(routed, replace(routed, entries=ENTRIES[::-1]))
    with pytest.raises(DataError, match="other tokens"):
        compare(routed, replace(routed, tokens=routed.tokens + 1))


def test_further_metrics_are_of_the_same_rows(routed: Evaluation) -> None:
    names = ["bleu", "rouge-l", "exact", "distinct"]
    other = replace(routed, name="other", predictions=[entry.definition for entry in ENTRIES])
    scores, compared = further_scores([routed, other], names)
    found = scores[routed.name]
    assert found["bleu"]["value"] == pytest.approx(routed.summary()["bleu"])
    assert found["rouge-l"]["value"] == pytest.approx(routed.summary()["rouge_l"])
    assert found["bleu"]["signature"] == SIGNATURES["bleu"]
    assert "|protocol:one-to-one|" in found["exact"]["signature"]
    with pytest.raises(DataError, match="generated nothing"):
        further_scores([replace(routed, predictions=None)], ["bleu"])
    (exact,) = compared  # bleu and rouge-l are `compare`'s; distinct has no interval
    assert (exact["metric"], exact["a"], exact["b"]) == ("exact", "other", routed.name)
    assert exact["difference"] == pytest.approx(100 - found["exact"]["value"])
    assert exact["low"] <= exact["difference"] <= exact["high"]


def test_intervals_hold_the_figures_and_are_of_headwords(routed: Evaluation) -> None:
    found = intervals(routed)
    for metric, (low, high) in found.items():
        assert low <= routed.summary()[metric] <= high
    alike = replace(routed, entries=[replace(entry, term="apple") for entry in ENTRIES])
    assert all(low == pytest.approx(high) for low, high in intervals(alike).values()), "one headword: nothing to draw"
    assert list(intervals(replace(routed, bleu=None, rouge_l=None))) == ["loss"]


def test_predictions_name_the_expert_and_keep_the_order(routed: Evaluation, tmp_path: Path) -> None:
    write_predictions(routed, tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["term"] for row in rows] == [entry.term for entry in ENTRIES]
    assert [row["references"] for row in rows] == [[entry.definition] for entry in ENTRIES]
    assert {row["domain"] for row in rows} <= {*EXPERTS, "base"}
    assert list(rows[0]) == ["term", "context", "prediction", "references", "source", "domain"]


def test_random_weights_choose_one_expert_a_row() -> None:
    weights = random_weights(600, 3, seed=1)
    assert (weights.sum(axis=1) == 1).all()
    assert (weights.sum(axis=0) > 150).all()
    assert (weights == random_weights(600, 3, seed=1)).all()
    assert (weights != random_weights(600, 3, seed=2)).any()


def test_nothing_to_evaluate_is_an_error(system: Any) -> None:
    with pytest.raises(DataError, match="no entries"):
        evaluate(system, [])


def test_rows_of_the_tables_have_a_value_for_every_column(routed: Evaluation, at_random: Evaluation) -> None:
    columns, rows = system_rows([routed.summary(), {**at_random.summary(), "bleu": None}])
    assert all(len(row) == len(columns) for row in rows)
    assert rows[1][columns.index("BLEU")] == "-"
    columns, rows = comparison_rows([compare(routed, at_random)])
    assert len(rows[0]) == len(columns)


def test_the_picture_is_a_png_that_says_what_it_shows(tmp_path: Path) -> None:
    systems = [
        {"name": "base", "ship_megabytes": 0.0, "memory_megabytes": 26.0, "loss": 5.3},
        {"name": "mixture", "ship_megabytes": 2.6, "memory_megabytes": 29.0, "loss": 4.8},
        {"name": "dense", "ship_megabytes": 0.7, "memory_megabytes": 26.7, "loss": 4.8},
        {"name": "unmeasured", "ship_megabytes": 0.7, "memory_megabytes": 26.7, "loss": None},
    ]
    for shown in (systems, systems[:1], []):
        footprint_fidelity(shown, tmp_path / "picture.png")
        content = (tmp_path / "picture.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert all(s["name"].encode() in content for s in shown if s["loss"])
        assert b"unmeasured" not in content
