"""experts/journal.py: what a run tells others, read back with their own libraries."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import MissingExtraError, RecipeError
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.check import Where, check_training
from lora_lexicon.experts.checkpoint import JOURNAL, read_expert
from lora_lexicon.experts.journal import REPORTERS
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import TrainRecipe

WORDS = ("acid", "bark", "crane", "drill")
ROWS = [Entry(w, f"the {w} is here", f"a kind of {v} that is {w}", "test") for w in WORDS for v in WORDS]
RECIPE = TrainRecipe(first_layer=1, rank=2, batch_size=4, max_steps=4, checkpoints=1, evaluations=2)


def test_tensorboard_is_told_each_experts_losses(tiny_base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    parts = [Part(name, ROWS[i:], tmp_path / name, name, ROWS[:2]) for i, name in enumerate("ab")]
    base = load_base(str(tiny_base), device="cpu")
    train_experts(base, parts, RECIPE, score=lambda *_: 0.25, report_to=["tensorboard"])
    told = EventAccumulator(str(tmp_path / "runs")).Reload()
    for name in "ab":
        lines = [json.loads(line) for line in (tmp_path / name / JOURNAL).read_text().splitlines()]
        steps = {line["step"]: line["loss"] for line in lines if "loss" in line}
        scalars = {event.step: event.value for event in told.Scalars(f"train/loss/{name}")}
        assert scalars == pytest.approx(steps)
        valid = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
        assert {event.step: event.value for event in told.Scalars(f"eval/loss/{name}")} == pytest.approx(valid)
        assert [event.value for event in told.Scalars(f"eval/score/{name}")] == [0.25, 0.25]


def test_codecarbons_energy_is_kept(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("codecarbon")
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "DEU")
    base = load_base(str(tiny_base), device="cpu")
    recipe = dataclasses.replace(RECIPE, evaluations=0)
    train_experts(base, [Part("a", ROWS, tmp_path / "a", "a")], recipe, report_to=["codecarbon"])
    energy = read_expert(tmp_path / "a").training["energy"]
    assert energy["kwh"] > 0
    assert energy["country"] == "DEU"


def test_who_cannot_be_told_is_said_before_a_base_is_looked_for(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [Part("a", ROWS, tmp_path / "a", "a", ROWS[:2])]
    with pytest.raises(RecipeError, match="'tensorbord' is not known: it is one of tensorboard"):
        check_training("/no/such/base", parts, RECIPE, Where(), scored=True, report_to=["tensorbord"])
    find = importlib.util.find_spec
    missing = set(REPORTERS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    for name, extra in REPORTERS.items():
        with pytest.raises(
            MissingExtraError, match=rf"--report-to {name} needs .* pip install 'lora-lexicon\[{extra}\]'"
        ):
            check_training(str(tiny_base), parts, RECIPE, Where(), scored=True, report_to=[name])
