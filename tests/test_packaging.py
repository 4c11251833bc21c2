"""What a wheel holds: every package of the tree, every data file, and nothing else at top level."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ELSEWHERE = {"cli", "adapters", "configs"}  # at the top of the repository, inside lora_lexicon once installed


def tracked(folder: str) -> list[str]:
    """The files under `folder` that git knows, as paths from the root."""
    listing = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listing.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a wheel built from what git tracks, without the network."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in tracked("."):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_every_package_of_the_tree_is_listed() -> None:
    inside = [path.parent.relative_to(ROOT) for path in (ROOT / "lora_lexicon").rglob("__init__.py")]
    expected = {".".join(path.parts) for path in inside} | {f"lora_lexicon.{name}" for name in ELSEWHERE}
    setuptools = PROJECT["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(expected)
    assert setuptools["package-dir"] == {f"lora_lexicon.{name}": name for name in ELSEWHERE}


def test_every_folder_with_modules_is_a_package() -> None:
    for top in ("lora_lexicon", *ELSEWHERE):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} lacks an __init__.py"


def test_wheel_puts_one_name_at_top_level(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lora_lexicon"}
    assert len(tops) == 2


@pytest.mark.parametrize("top", ["lora_lexicon", *sorted(ELSEWHERE)])
def test_wheel_holds_every_tracked_file(wheel: list[str], top: str) -> None:
    names = [name for name in tracked(top) if (ROOT / name).is_file()]
    assert names
    prefix = "" if top == "lora_lexicon" else "lora_lexicon/"
    assert {prefix + name for name in names} <= set(wheel)


def test_wheel_carries_its_licences(wheel: list[str]) -> None:
    licences = {name.rsplit("/", 1)[-1] for name in wheel if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_licence_and_notice_are_whole() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice


@pytest.mark.parametrize("script", [name for name in tracked("configs") if name.endswith((".sh", ".sbatch"))])
def test_shell_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", script], cwd=ROOT, check=False).returncode == 0


def test_constraints_pin_what_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"  # no local version: a CPU build satisfies it, and so does any other
    project = PROJECT["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = requirement.split(">=")[0].split("[")[0].lower()
        assert name in pins, f"{requirement} is not pinned in constraints.txt"


def test_every_third_party_import_is_declared() -> None:
    named = {"yaml": "pyyaml", "sklearn": "scikit-learn", "click": "typer", "ot": "pot", "mauve": "mauve-text"}
    project = PROJECT["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    declared = {r.split(">=")[0].split("[")[0].lower() for r in [*project["dependencies"], *extras]}
    for top in ("lora_lexicon", "cli"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lora_lexicon"}:
                    assert named.get(name, name.replace("_", "-")) in declared, f"{path} imports {name}"
