"""Runs that end before their time: what stays of them, and where the same command goes on."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from training import RECIPE, ROWS, parts_in, same, state, train_expert, weights

from lora_lexicon.errors import DivergedError, ExpertError, LexiconError, RecipeError
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.experts.checkpoint import JOURNAL, read_expert
from lora_lexicon.experts.journal import Step
from lora_lexicon.experts.train import train_experts
from lora_lexicon.folders import locked


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), device="cpu")


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def killer(after: int) -> Any:
    def progress(step: Step) -> None:
        if step.step >= after:
            raise Killed

    return progress


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_an_interrupted_run_ends_where_the_unbroken_one_does(kind: Any, base: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, kind=kind)
    before = state(base)
    whole = train_expert(base, ROWS, tmp_path / "whole", recipe, name="x")
    assert same(before, state(base))
    with pytest.raises(Killed):
        train_expert(base, ROWS, tmp_path / "broken", recipe, name="x", progress=killer(12))
    assert same(before, state(base))
    assert not (tmp_path / "broken").exists()
    checkpoints = sorted((tmp_path / ".broken.training").glob("checkpoint-*"))
    assert checkpoints
    (tmp_path / ".broken.training" / "checkpoint-999").mkdir()  # its writing was cut off
    with (tmp_path / ".broken.training" / JOURNAL).open("a") as journal:
        journal.write('{"expert": "x", "st')  # so was this line's
    other = dataclasses.replace(recipe, learning_rate=0.5)
    with pytest.raises(RecipeError, match=r"unfinished run.*with learning_rate 0.01 \(now 0.5\): .* --overwrite"):
        train_expert(base, ROWS, tmp_path / "broken", other, name="x")
    with pytest.raises(RecipeError, match="with another base or other rows"):
        train_expert(base, ROWS[1:], tmp_path / "broken", recipe, name="x")
    seen: list[Step] = []
    resumed = train_expert(base, ROWS, tmp_path / "broken", recipe, name="x", progress=seen.append)
    assert seen[0].step > 1, "it started afresh"
    assert seen[-1].tokens == seen[-1].all_tokens == whole.tokens
    assert seen[-1].seconds == pytest.approx(resumed.training["seconds"], abs=30)
    told, again = (
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / JOURNAL).read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert told == again
    assert [line["step"] for line in told] == list(range(1, whole.training["steps"] + 1))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert resumed.key == whole.key
    assert resumed.tokens == whole.tokens
    assert not (tmp_path / ".broken.training").exists()
    assert all(not p.requires_grad for p in base.model.parameters())
    assert whole.training["losses"][-1][1] < whole.training["losses"][0][1]


def test_a_joint_run_that_was_killed_ends_where_the_unbroken_one_does(base: Base, tmp_path: Path) -> None:
    train_experts(base, parts_in(tmp_path / "whole"), RECIPE)

    def stop(step: Step) -> None:
        if step.expert == "c" and step.step > 5:
            raise Killed

    with pytest.raises(Killed):
        train_experts(base, parts_in(tmp_path / "broken"), RECIPE, progress=stop)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [".a+2.training"]
    seen: list[str] = []
    train_experts(base, parts_in(tmp_path / "broken"), RECIPE, progress=lambda step: seen.append(step.expert))
    assert set(seen) == {"b", "c"}, "it started afresh"
    for name in "abc":
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "broken" / name))
        assert (read_expert(tmp_path / "whole" / name).training["losses"]
                == read_expert(tmp_path / "broken" / name).training["losses"])  # fmt: skip
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {"a", "b", "c"}


@pytest.fixture
def broken(base: Base, tmp_path: Path) -> Path:
    """The state of a run with evaluations that was cut off after its first checkpoint."""
    with pytest.raises(Killed):
        train_expert(base, ROWS, tmp_path / "x", EVALUATED, name="x", progress=killer(8), **VALIDATED)
    return tmp_path / ".x.training"


EVALUATED = dataclasses.replace(RECIPE, evaluations=3, early_stopping=3, dropout=0.0)
VALIDATED: dict[str, Any] = {"valid": ROWS[:2], "score": lambda predictions, references: 0.0}


@pytest.mark.parametrize("full", [".evaluations.json.partial", ".expert.json.partial", "trainable.partial"])
def test_a_full_disk_leaves_the_last_checkpoint(
    full: str, base: Base, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_lexicon.experts import loop

    write, save = Path.write_bytes, loop.save_file

    def writing(file: Path, content: bytes) -> int:
        if file.name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    def saving(tensors: Any, file: Path) -> None:
        if file.name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", writing)
        patch.setattr(loop, "save_file", saving)
        with pytest.raises(LexiconError, match=r"No space left|disk full"):
            train_expert(base, ROWS, tmp_path / "x", EVALUATED, name="x", **VALIDATED)
    ends_as_unbroken(base, broken, tmp_path)


def test_a_refusal_leaves_the_last_checkpoint(base: Base, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'wandbb' is not known"):
        train_expert(base, ROWS, tmp_path / "x", EVALUATED, name="x", report_to=["wandbb"], **VALIDATED)
    with locked(broken), pytest.raises(ExpertError, match=r"\.x\.training is being written by another run"):
        train_expert(base, ROWS, tmp_path / "x", EVALUATED, name="x", **VALIDATED)
    ends_as_unbroken(base, broken, tmp_path)


def ends_as_unbroken(base: Base, broken: Path, tmp_path: Path) -> None:
    """That a run goes on from its checkpoint, and ends where one ends that was never broken."""
    first = min(int(path.name.rpartition("-")[2]) for path in broken.glob("checkpoint-*"))
    seen: list[Step] = []
    train_expert(base, ROWS, tmp_path / "x", EVALUATED, name="x", progress=seen.append, **VALIDATED)
    assert [step.step for step in seen][:1] == [first + 1][: len(seen)]
    train_expert(base, ROWS, tmp_path / "whole", EVALUATED, name="x", **VALIDATED)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "x"]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("trainable.safetensors", "cut"),
        ("optimizer.pt", "missing"),
        ("scheduler.pt", "missing"),
        ("progress.json", "cut"),
        ("trainer_state.json", "cut"),
        ("files.json", "missing"),
    ],
)
def test_a_damaged_checkpoint_is_dropped_and_said_so(
    file: str, damage: str, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train_expert(base, ROWS, tmp_path / "x", RECIPE, name="x", progress=killer(8))
    (checkpoint,) = (tmp_path / ".x.training").glob("checkpoint-*")
    if damage == "cut":
        os.truncate(checkpoint / file, (checkpoint / file).stat().st_size // 2)
    else:
        (checkpoint / file).unlink()
    seen: list[Step] = []

    def note(step: Step) -> None:
        seen.append(step)
        raise Killed

    with pytest.raises(Killed):
        train_expert(base, ROWS, tmp_path / "x", RECIPE, name="x", progress=note)
    assert f"removed {checkpoint}: it is damaged" in caplog.text
    assert seen[0].step == 1


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_a_run_killed_while_its_experts_take_their_places_goes_on_with_all(
    renamed: int, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_experts(base, parts_in(tmp_path / "whole"), RECIPE)
    rename, remove, left = os.rename, shutil.rmtree, [renamed]

    def renaming(source: Any, target: Any) -> None:
        rename(source, target)
        left[0] -= 1
        if not left[0]:
            raise Killed

    def removing(path: Any, **settings: Any) -> None:
        if not str(path).endswith(".training"):  # a dead run removes nothing
            remove(path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", renaming)
        patch.setattr(shutil, "rmtree", removing)
        with pytest.raises(Killed):
            train_experts(base, parts_in(tmp_path / "broken"), RECIPE)
    names = {path.name for path in (tmp_path / "broken").iterdir()}
    assert ".a+2.training" in names
    assert len(names & set("abc")) == renamed
    seen: list[Step] = []
    train_experts(base, parts_in(tmp_path / "broken"), RECIPE, progress=seen.append)
    assert all(step.step > 1 for step in seen), "it started afresh"
    for name in "abc":
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "broken" / name))
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {"a", "b", "c"}


def test_a_run_that_diverged_leaves_nothing(base: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e38)
    with pytest.raises(DivergedError, match="lower its learning_rate"):
        train_expert(base, ROWS, tmp_path / "x", recipe, name="x")
    assert not list(tmp_path.iterdir())
