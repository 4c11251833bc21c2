"""What the README says is what the project does: its commands run, its links lead somewhere, its help is the help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_lexicon import __version__
from lora_lexicon.resources import packs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SMALLER = {  # the tour's commands with less data and fewer steps
    r"\bdata prepare ": "data prepare --limit 400 ",
    r"\bmax_steps=\d+": "max_steps=2",
    r"--limit 50\b": "--limit 4 --max-tokens 4",
    r"\bpack add ": "pack add --limit 8 ",
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
