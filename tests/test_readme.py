"""What the README says is what the project does: its commands run, its links lead somewhere, its help is the help."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from lora_lexicon import __version__
from lora_lexicon.experts.pretrain import PretrainRecipe
from lora_lexicon.recipe import (
    DomainsRecipe,
    ExperimentRecipe,
    LoopRecipe,
    RewardRecipe,
    RouterRecipe,
    TrainRecipe,
    load_recipe,
)
from lora_lexicon.resources import packs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SMALLER = {  # the tour's commands with less data and fewer steps
    r"\bdata prepare ": "data prepare --limit 400 ",
    r"\bmax_steps=\d+": "max_steps=2",
    r"--limit 50\b": "--limit 4 --max-tokens 4",
    r"\bdomains new ": "domains new --limit 8 ",
    r"\bpack suggest ": "pack suggest --limit 4 ",
}


@pytest.mark.timeout(1200)  # a dozen commands, one after the other, on a machine that may be busy
@pytest.mark.skipif("tiny" not in packs(), reason="the tour needs the shipped pack `tiny`")
def test_the_tour_runs(tmp_path: Path) -> None:
    script = "\n".join(BLOCKS)
    for pattern, smaller in SMALLER.items():
        script, count = re.subn(pattern, smaller, script)
        assert count, f"nothing in the README's bash blocks matches {pattern}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euxo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_command_reference_is_up_to_date() -> None:
    command = [sys.executable, "-m", "typer", "lora_lexicon.cli.main", "utils", "docs", "--name", "lora-lexicon"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written.split() == made.split(), "docs/cli.md is out of date: run make docs"


def test_the_recipes_reference_is_up_to_date_and_says_something_of_every_key(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "docs" / "recipes.py"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == made, "docs/recipes.md is old: run make docs"
    kinds = (DomainsRecipe, LoopRecipe, TrainRecipe, RouterRecipe, RewardRecipe, PretrainRecipe, ExperimentRecipe)
    own = [(kind, name) for kind in kinds for name in inspect.get_annotations(kind)]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^|]+)` \| [^|]*\w[^|]* \|$", made, re.MULTILINE)
    assert [key for key, _ in rows] == [name for _, name in own]
    for (kind, _), (key, default) in zip(own, rows, strict=True):
        assert load_recipe(kind, overrides=[f"{key}={default}"]) == kind()
    (tmp_path / "recipe.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", made, re.DOTALL | re.MULTILINE)[0])
    words = shlex.split(re.findall(r"^\$ (.*)", made, re.MULTILINE)[0])
    overrides = [value for option, value in pairwise(words) if option == "--set"]
    assert load_recipe(TrainRecipe, overrides=overrides) == load_recipe(TrainRecipe, tmp_path / "recipe.yaml")


def test_every_command_of_the_pages_exists() -> None:
    known = set(re.findall(r"^#+ `(lora-lexicon[^`]*)`", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        for words in re.findall(r"(?:^|\$ )(lora-lexicon(?: [a-z]+)+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            longest = [name for name in known if f"{words} ".startswith(f"{name} ")]
            assert max(longest, key=len) != "lora-lexicon", f"{page.name}: {words}"


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
