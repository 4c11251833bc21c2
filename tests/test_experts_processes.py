"""Several processes with FSDP or DeepSpeed: what they make of an expert is what one makes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import WORDS
from lora_lexicon.cli.launch import launch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException, start_processes

from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import MissingExtraError
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.check import Where, check_training
from lora_lexicon.experts.checkpoint import FFN, WEIGHTS, read_expert
from lora_lexicon.experts.joint import JointRun
from lora_lexicon.experts.journal import Step
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import TrainRecipe
from lora_lexicon.resources import accelerate_config

ROWS = [Entry(w, f"the {w} is here", f"a kind of {v} that is {w}", "test") for w in WORDS for v in WORDS[:4]]
# Three rows a step: one process gets two, the other one, and at last none. Expert a ends before b; passes are cut.
RECIPE = TrainRecipe(first_layer=1, rank=4, batch_size=3, epochs=1, learning_rate=0.01, checkpoints=3, pass_tokens=40)


def environment(sharding: str) -> dict[str, str]:
    """What `accelerate launch` sets for a configuration that ships."""
    asked = ["--config_file", str(accelerate_config(sharding)), "--num_processes", "2", "-"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(asked))[0]
    if sharding == "zero3":
        arguments.deepspeed_fields_from_accelerate_config = ""
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def parts(folder: Path) -> list[Part]:
    return [Part("a", ROWS[:9], folder / "a", "a", ROWS[:3]), Part("b", ROWS[9:31], folder / "b", "b", ROWS[:3])]


def score(predictions: list[str], references: list[str]) -> float:
    return float(sum(map(len, predictions)))


def train(base: Path, out: Path, recipe: TrainRecipe, device: str, progress: Any = None) -> None:
    loaded = load_base(str(base), device=device, dtype=recipe.dtype)
    train_experts(loaded, parts(out), recipe, score=score, progress=progress)


def _child(rank: int, run: Callable[[], None], port: int, sharding: str) -> None:
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= environment(sharding) | here | there
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's
    if sharding == "zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # nothing is to be compiled
    prepare = JointRun.create_scheduler

    def checked(run: JointRun, *given: Any, **settings: Any) -> Any:
        schedule = prepare(run, *given, **settings)
        parameters = [p for trainee in run.trainees for p in trainee.parameters.values()]
        if sharding == "zero3":
            assert type(run.accelerator.deepspeed_engine_wrapped.engine.optimizer).__name__.endswith("_Stage3")
            for parameter in (*parameters, *run.packed.llama.parameters()):
                assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2)
            return schedule
        assert isinstance(run.model, FSDPModule)
        assert all(isinstance(p, DTensor) and 2 * p.to_local().numel() == p.numel() for p in parameters)
        return schedule

    JointRun.create_scheduler = checked
    run()


def kill(step: Step) -> None:
    if step.expert == "b" and step.step >= 4:
        raise RuntimeError("killed")


def late(folder: Path, step: Step) -> None:
    """Notes where a run begins."""
    if step.expert == "b" and not (folder / "first").exists():
        (folder / "first").write_text(str(step.step))


def in_two(run: Callable[[], None], sharding: str) -> None:
    """Runs it in two processes, forked from this one, in the environment that `accelerate launch` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_child, args=(run, port, sharding), nprocs=2, start_method="fork")


def compare(ours: Path, theirs: Path, sharding: str) -> None:
    atol = 1e-4 if sharding == "zero3" else 1e-5  # AdamW makes much of the rounding of a gradient that is nearly 0
    for name in "ab":
        a, b = read_expert(ours / name), read_expert(theirs / name)
        np.testing.assert_allclose(a.training["losses"], b.training["losses"], atol=1e-5)
        assert [e["score"] for e in a.training["evaluations"]] == [e["score"] for e in b.training["evaluations"]]
        np.testing.assert_allclose(*([e["loss"] for e in x.training["evaluations"]] for x in (a, b)), atol=1e-5)
        assert (a.key, a.tokens, a.trained_parameters) == (b.key, b.tokens, b.trained_parameters)
        for file in (WEIGHTS, FFN):
            if (theirs / name / file).is_file():
                found = load_file(ours / name / file)
                for key, tensor in load_file(theirs / name / file).items():
                    torch.testing.assert_close(found[key], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "ffn"])
@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_two_processes_make_what_one_makes(
    sharding: str, kind: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    monkeypatch.setattr("lora_lexicon.experts.watch.DECODED_TOKENS", 8)
    own: dict[str, Any] = {"learning_rate": 0.003, "minimum_learning_rate": 0.001}  # an ended expert's rate alone is 0
    if kind == "ffn":
        own = {"learning_rate": 0.001, "early_stopping": 2}
    recipe = dataclasses.replace(RECIPE, kind=kind, evaluations=2, **own)
    train(tiny_base, tmp_path / "one", recipe, "cpu")
    in_two(partial(train, tiny_base, tmp_path / "two", recipe, "meta"), sharding)
    compare(tmp_path / "two", tmp_path / "one", sharding)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"a", "b"}
    if kind == "ffn":
        return
    with pytest.raises(ProcessRaisedException, match="killed"):
        in_two(partial(train, tiny_base, tmp_path / "broken", recipe, "meta", kill), sharding)
    assert (tmp_path / "broken" / ".a+1.training").is_dir()
    in_two(partial(train, tiny_base, tmp_path / "broken", recipe, "meta", partial(late, tmp_path)), sharding)
    assert int((tmp_path / "first").read_text()) > 1, "it started afresh"
    for name in "ab":
        whole, resumed = (load_file(tmp_path / run / name / WEIGHTS) for run in ("two", "broken"))
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())
    compare(tmp_path / "broken", tmp_path / "one", sharding)


@pytest.mark.parametrize("change", [{"stage": 2}, {"offload_optimizer": {"device": "cpu"}}])
def test_a_deepspeed_configuration_that_is_not_ours_is_refused(
    change: dict[str, Any], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    (tmp_path / "ds.json").write_text(json.dumps({**sizes, "zero_optimization": {"stage": 3, **change}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(ProcessRaisedException, match="must be ZeRO stage 3, without offloading"):
        in_two(partial(train, tiny_base, tmp_path / "x", RECIPE, "meta"), "zero3")


def test_the_command_starts_its_own_processes(cli: Any, tiny_base: Path, tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.term in WORDS[:12]]
    table = "term,definition,context\n" + "".join(f"{r.term},{r.definition},{r.context}\n" for r in rows)
    (tmp_path / "rows.csv").write_text(table)
    cli("data", "prepare", tmp_path / "rows.csv", "--out", tmp_path / "entries")
    command = [sys.executable, "-m", "lora_lexicon.cli.main"]
    train = [*command, "train", "--data", tmp_path / "entries", "--domain", "none", "--base", tiny_base, "--json"]
    train += ["--processes", "2", "--set", "max_steps=2", "--set", "first_layer=1"]
    train += ["--set", "gradient_checkpointing=true"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    wide = ["--out", tmp_path / "x", "--set", "dtype=bfloat16"]
    done = subprocess.run([*train, *wide], env=environment, capture_output=True, text=True, check=True)
    (made,) = json.loads(done.stdout)["experts"]
    assert read_expert(tmp_path / "x" / "dense").tokens == made["tokens"] > 0
    assert {t.dtype for t in load_file(tmp_path / "x" / "dense" / WEIGHTS).values()} == {torch.bfloat16}


def test_one_of_several_processes_leaves_its_error_to_what_started_it(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with monkeypatch.context() as second:
        second.setenv("RANK", "1")
        done = cli("train", "--data", tmp_path, "--out", tmp_path / "x", "--domain", "none", "--recipe", "no-such")
    assert (done.exit_code, done.stderr) == (1, "")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))

    def fail(_: Any) -> None:
        raise ChildFailedError("train", {1: failure})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    with pytest.raises(typer.Exit):
        launch(2, None)
    assert capsys.readouterr().err.startswith("error: no recipe at 'no-such'")


def test_deepspeed_that_is_not_installed_is_named(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-lexicon\[deepspeed\]'"):
        check_training(str(tiny_base), parts(tmp_path), RECIPE, Where(None, 2, "zero3"))
