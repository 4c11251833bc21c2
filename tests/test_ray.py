"""Tasks on a real Ray of this machine: what they return, what happens when they die, and that results do not change."""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import WORDS
from safetensors.torch import load_file

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import DataError, LexiconError, MissingExtraError
from lora_lexicon.experts.apart import train_apart
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.checkpoint import FFN, WEIGHTS
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import TrainRecipe
from lora_lexicon.tasks import RETRIES, OnRay, connect

ray = pytest.importorskip("ray")
Cli = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    """A Ray of two CPUs and a GPU that it is told of (nothing here computes on one)."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        "local",
        num_cpus=2,
        num_gpus=1,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def two(machine: None) -> OnRay:
    """Two tasks at once, of one CPU each."""
    return connect(cpus=1, gpus=0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a task of one CPU has it: another number of threads adds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_task_gets_a_gpu_where_there_is_one_and_sees_no_other(two: OnRay) -> None:
    assert connect() == OnRay(cpus=1, gpus=1, slots=1)
    assert connect(gpus=0) == OnRay(cpus=2, gpus=0, slots=1)
    assert connect(gpus=0.25) == OnRay(cpus=1, gpus=0.25, slots=2)
    assert two.slots == 2
    with pytest.raises(LexiconError, match="no machine of this Ray has 64 CPUs and 1 GPUs"):
        connect(cpus=64)

    def visible(_report: Any) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert connect().run(visible, [()], ["a"]) == ["0"]
    assert two.run(visible, [()], ["a"]) == [""]


def test_results_come_in_order_and_a_killed_task_is_run_again(
    two: OnRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)

    def work(number: int, report: Callable[[int, int], None]) -> tuple[int, str]:
        report(1, 2)
        if number == 1 and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        logging.getLogger("lora_lexicon").warning("half of %d", number)
        report(2, 2)
        return number * number, os.getcwd()

    told: list[tuple[int, int, int]] = []
    found = two.run(work, [(n,) for n in range(3)], ["a", "b", "c"], lambda *what: told.append(what))
    assert found == [(n * n, str(tmp_path)) for n in range(3)]
    assert [[done for task, done, _ in told if task == n][-2:] for n in range(3)] == [[1, 2]] * 3
    assert sorted(message for message in caplog.messages if "half" in message) == [
        "a: half of 0",
        "b: half of 1",
        "c: half of 2",
    ]
    assert [message for message in caplog.messages if "died" in message] == [
        f"b: its process died; it goes on on {os.uname().nodename}"
    ]
    assert capsys.readouterr().out == "", "standard output is for results"


def test_a_task_that_fails_is_said_after_the_others_are_done(two: OnRay, tmp_path: Path) -> None:
    def work(number: int, _report: Any) -> None:
        if number == 0:
            raise DataError("the split is empty: choose another")
        if number == 1:
            raise MissingExtraError("x", "y", "z")  # must survive the way between processes
        (tmp_path / "done").touch()

    with pytest.raises(LexiconError, match=r"the split is empty|needs the package 'y'"):
        two.run(work, [(0,), (1,), (2,)], ["a", "b", "c"])
    assert (tmp_path / "done").is_file()
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-lexicon\[z\]'"):
        two.run(work, [(1,)], ["b"])

    def dies(_report: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LexiconError, match=f"a: its process died {RETRIES + 1} times"):
        two.run(dies, [()], ["a"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "file"), [("lora", WEIGHTS), ("ffn", FFN)])
def test_an_expert_whose_worker_is_killed_ends_as_one_trained_here(
    kind: Any, file: str, two: OnRay, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    recipe = TrainRecipe(
        kind=kind, first_layer=1, rank=4, batch_size=8, dropout=0.1, max_steps=12, evaluations=4, checkpoints=3
    )

    def parts(folder: str) -> list[Part]:
        rows = [Entry(w, f"the {w} is here", f"a kind of {v} that is {w}", "test") for w in WORDS for v in WORDS[:4]]
        halves = {"alpha": rows[:40], "beta": rows[40:]}
        return [Part(name, own, tmp_path / folder / name, name, own[:2]) for name, own in halves.items()]

    base = load_base(str(tiny_base), device="cpu")
    alone = [train_experts(base, [part], recipe, score=lambda *_: 1.0)[0] for part in parts("here")]
    scored = tmp_path / "scored"

    def score(_predictions: list[str], references: list[str]) -> float:
        """Kills alpha's process at its third evaluation, when there is a checkpoint of its sixth step."""
        if references[0] == "a kind of apple that is apple":
            with scored.open("a") as file:
                file.write("x")
            if scored.stat().st_size == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    (tmp_path / "ray" / ".shared.abcdefgh.partial").mkdir(parents=True)  # of a driver that was killed
    told: list[str] = []
    made = train_apart(
        two, str(tiny_base), parts("ray"), recipe, score=score, progress=lambda step: told.append(step.expert)
    )
    assert set(told) == {"alpha", "beta"}
    assert [message.split(";")[0] for message in caplog.messages if "died" in message] == ["alpha: its process died"]
    assert [message.split(",")[0] for message in caplog.messages if "step" in message] == [
        "alpha: going on from step 6"
    ]
    for ours, theirs in zip(made, alone, strict=True):
        assert ours.key == theirs.key
        assert ours.training["losses"] == theirs.training["losses"]
        assert ours.training["evaluations"] == theirs.training["evaluations"]
        a, b = (load_file(tmp_path / folder / ours.name / file) for folder in ("ray", "here"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(path.name for path in (tmp_path / "ray").iterdir()) == ["alpha", "beta"]


@pytest.mark.usefixtures("one_thread")
def test_the_command_line_on_ray(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    """Embed, train and evaluate; evaluation in two shards says what it says in one piece."""

    def run(*arguments: object) -> dict[str, Any]:
        result = cli(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    lines = [
        {
            "term": w,
            "context": f"the {w} and the {v}",
            "definition": f"a {v} that is {w}",
            "source": "x",
            "split": split,
        }
        for w, split in zip(WORDS, ["train"] * 14 + ["test"] * 6, strict=True)
        for v in WORDS[:3]
    ]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries, domains, experts, pack = (tmp_path / name for name in ("entries", "domains", "experts", "pack"))
    on_ray = ("--on", "ray", "--cpus", 1, "--gpus", 0)
    run("data", "prepare", tmp_path / "words.jsonl", "--out", entries)
    fit = ("domains", "fit", entries, "--base", tiny_base, "--set", "domains=2", "--set", "layers=1")
    run(*fit, "--out", domains, "--cache", tmp_path / "cache", *on_ray)
    run(*fit, "--out", tmp_path / "domains-here", "--cache", tmp_path / "cache-here")
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("cache", "cache-here")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "cache-here" / name).read_bytes()
    train = ("train", "--data", entries, "--domains", domains, "--base", tiny_base, "--out", experts, *on_ray)
    recipe = ("--set", "max_steps=2", "--set", "batch_size=4", "--set", "first_layer=1", "--set", "rank=2")
    made = run(*train, *recipe)
    assert len(made["experts"]) == 2
    assert run(*train, *recipe) == made, "they are kept"
    run("compose", "adapters", experts, "--base", tiny_base, "--router", domains, "--out", pack)
    evaluate = ("evaluate", pack, tiny_base, "--data", entries, "--random-routing", "--max-tokens", 6)
    here = run(*evaluate, "--out", tmp_path / "here")
    there = run(*evaluate, "--out", tmp_path / "there", *on_ray)
    assert [system["name"] for system in there["systems"]] == [system["name"] for system in here["systems"]]
    assert len(there["systems"]) == 3
    for ours, theirs in zip(there["systems"], here["systems"], strict=True):
        for figure in ("loss", "bleu", "rouge_l", "trained_parameters", "memory_megabytes"):
            np.testing.assert_allclose(ours[figure], theirs[figure], rtol=1e-6)
        ours_text, theirs_text = (
            (tmp_path / folder / "predictions" / f"{ours['name']}.jsonl").read_text() for folder in ("there", "here")
        )
        assert ours_text == theirs_text
