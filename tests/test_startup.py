"""Asking for help costs nothing: no heavy library is imported for it, nor by `import lora_lexicon`."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from typer.main import get_command

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "pandas",
    "sklearn",
    "peft",
    "matplotlib",
    "pyarrow",
    "yaml",
    "fastapi",
)
PROBE = """
import json, sys
from importlib.metadata import entry_points
from typer.testing import CliRunner
(entry,) = entry_points(group="console_scripts", name="lora-lexicon")
app = entry.load()
outcome = {}
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, [*words, "--help"])
    loaded = sorted({name.split(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))
    outcome[" ".join(words)] = [result.exit_code, "Usage" in result.stdout, loaded]
print(json.dumps(outcome))
"""


def commands() -> list[list[str]]:
    """Every command and sub-command of the app, as words; the app itself is []."""
    (entry,) = entry_points(group="console_scripts", name="lora-lexicon")

    def walk(command: click.Command, words: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", {})
        return [words, *[found for name, child in inner.items() for found in walk(child, [*words, name])]]

    return walk(get_command(entry.load()), [])


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    """Exit code, whether a usage was printed, and the heavy modules loaded so far, per command, in one process."""
    command = [sys.executable, "-c", PROBE, json.dumps(commands()), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_commands_are_all_there() -> None:
    groups = {" ".join(words) for words in commands() if len(words) == 1}
    wanted = {"demo", "data", "domains", "train", "compose", "pack", "route", "define", "evaluate", "score", "serve"}
    assert wanted <= groups


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words) or "lora-lexicon")
def test_help_imports_nothing_heavy(outcomes: dict[str, list], words: list[str]) -> None:
    assert outcomes[" ".join(words)] == [0, True, []]


MISTYPED = [
    "define word --model nonexistent",
    "define word --base nonexistent",
    "route word nonexistent",
    "serve nonexistent",
    "doctor nonexistent",
    "compose collapse nonexistent --out x",
    "domains rename nonexistent a b",
    *(f"pack {rest}" for rest in ("verify nonexistent", "inspect nonexistent", "diff nonexistent tiny")),
    *(f"pack {rest}" for rest in ("copy nonexistent --out x", "push nonexistent y", "remove nonexistent a")),
    *(f"pack {rest}" for rest in ("add nonexistent x --data y", "vllm nonexistent", "sign nonexistent --key k")),
]
MISTYPED_PROBE = """
import json, sys
from importlib.metadata import entry_points
from typer.testing import CliRunner
(entry,) = entry_points(group="console_scripts", name="lora-lexicon")
app = entry.load()
outcome = {}
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words.split())
    outcome[words] = [done.exit_code, "nonexistent" in done.stderr, done.stderr.count("\\n"), "torch" in sys.modules]
print(json.dumps(outcome))
"""


def test_what_is_mistyped_is_told_of_before_torch_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MISTYPED_PROBE, json.dumps(MISTYPED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == {words: [1, True, 1, False] for words in MISTYPED}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, lora_lexicon; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
