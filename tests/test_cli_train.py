"""`lora-lexicon train`: what it makes, what it keeps, what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import WORDS

from lora_lexicon.experts.checkpoint import read_expert

Cli = Callable[..., Result]
FAST = ("--set", "max_steps=2", "--set", "batch_size=4", "--set", "first_layer=1", "--set", "rank=2")


@pytest.fixture(scope="module")
def entries(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [
        {
            "term": w,
            "context": f"the {w} and the {v}",
            "definition": f"a {v} that is {w}",
            "source": "test",
            "split": split,
        }
        for w, split in zip(WORDS, ["train"] * 14 + ["valid"] * 3 + ["test"] * 3, strict=True)
        for v in WORDS[:3]
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = cli("data", "prepare", folder / "words.jsonl", "--out", folder / "entries")
    assert result.exit_code == 0, result.output
    return folder / "entries"


@pytest.fixture(scope="module")
def domains(cli: Cli, entries: Path, tiny_base: Path) -> Path:
    folder = entries.parent / "domains"
    result = cli(
        "domains", "fit", entries, "--base", tiny_base, "--out", folder, "--set", "domains=2", "--set", "layers=1"
    )
    assert result.exit_code == 0, result.output
    return folder


def test_one_expert_a_domain_and_kept_the_second_time(
    cli: Cli, entries: Path, domains: Path, tiny_base: Path, tmp_path: Path
) -> None:
    call = ("train", "--data", entries, "--domains", domains, "--base", tiny_base, "--out", tmp_path, "--json", *FAST)
    first = cli(*call, "--set", "evaluations=1", "--set", "valid_rows=2")
    assert first.exit_code == 0, first.output
    experts = json.loads(first.stdout)["experts"]
    assert len(experts) == 2
    assert sum(expert["rows"] for expert in experts) == 14 * 3
    for expert in experts:
        info = read_expert(Path(expert["path"]))
        assert info.domain == info.name == expert["name"]
        assert [set(e) for e in expert["evaluations"]] == [{"step", "loss", "score"}]
    again = cli(*call, "--set", "evaluations=1", "--set", "valid_rows=2")
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_the_dense_baseline_and_an_ffn_expert_branched_from_it(
    cli: Cli, entries: Path, tiny_base: Path, tmp_path: Path
) -> None:
    call = ("train", "--data", entries, "--domain", "none", "--base", tiny_base, *FAST)
    result = cli(*call, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert read_expert(tmp_path / "dense").domain == ""
    branched = cli(*call, "--out", tmp_path / "ffn", "--kind", "ffn", "--from", tmp_path / "dense")
    assert branched.exit_code == 0, branched.output
    info = read_expert(tmp_path / "ffn" / "dense")
    assert info.kind == "ffn"
    assert info.started_from


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--domain", "none", "--set", "rnak=3"), "did you mean 'rank'", 1),
        (("--domain", "none", "--kind", "lroa"), "kind", 1),
        (("--domain", "none", "--set", "rank_of={tools: 8}"), "rank_of names 'tools'", 1),
        (("--domain", "none", "--from", "nowhere"), "adapter_config.json is missing", 1),
        (("--domain", "none", "--base", "/no/such/base"), "no base at", 1),
        ((), "needs --domains", 2),
        (("--domain", "tools"), "needs --domains", 2),
        (("--domain", "none", "--gpus", "1"), "add --on ray", 2),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...], message: str, code: int, cli: Cli, entries: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cli("train", "--data", entries, "--base", tiny_base, "--out", out, *FAST, *options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not out.exists() or not list(out.iterdir())


def test_ray_that_is_not_installed_is_named_with_its_command(
    cli: Cli, entries: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ("--domain", "none", "--base", tiny_base, "--out", tmp_path / "out", "--on", "ray")
    result = cli("train", "--data", entries, *given)
    assert result.exit_code == 1
    assert "pip install 'lora-lexicon[ray]'" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer=adamw_torhc", "did you mean 'adamw_torch'"),
        ("seed=-1", "seed is -1"),
        ("warmup_ratio=7", "at most 1"),
    ],
)
def test_an_impossible_setting_leaves_nothing(
    cli: Cli, tiny_base: Path, entries: Path, tmp_path: Path, setting: str, message: str
) -> None:
    given = ("--domain", "none", "--base", tiny_base, "--out", tmp_path / "out", "--set", "first_layer=1")
    result = cli("train", "--data", entries, *given, "--set", setting)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
