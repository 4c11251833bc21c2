"""One straight way through the house: a layer imports only what stands to its left, and nothing imports cli/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# These too import leftwards only.
FOUNDATION = ["errors", "folders", "tasks", "recipe", "archive", "cache", "resources"]
LAYERS = [
    "data", "domains", "experts", "compose", "packs", "doctor", "inference", "evaluation", "report", "experiments",
    "serve", "cli",
]  # fmt: skip
MODULES = sorted(path for top in ("lora_lexicon", "cli") for path in (ROOT / top).rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer a file belongs to: its folder, or its own name for a file at the package's top."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "cli" else parts[1]


def imported(path: Path) -> set[str]:
    """The layers of ours that a module imports, anywhere in it, lazily or for its annotations."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "lora_lexicon" and rest:
                found.add(rest.split(".")[0])
            elif top in {"cli", "adapters", "configs"}:
                found.add(top)
    return found


def test_every_folder_is_a_known_layer() -> None:
    folders = {path.name for path in (ROOT / "lora_lexicon").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_leftwards_only(path: Path) -> None:
    layer = layer_of(path)
    names = imported(path)
    if layer in FOUNDATION:
        assert names <= set(FOUNDATION[: FOUNDATION.index(layer)])
    elif layer == "__init__":
        assert names <= {"errors"}, "the public API is lazy"
    else:
        allowed = {*FOUNDATION, "__version__"} | set(LAYERS[: LAYERS.index(layer) + 1])
        assert names <= allowed - {"cli"}  # siblings in cli/ import each other relatively


@pytest.mark.parametrize("path", [p for p in MODULES if layer_of(p) != "cli"], ids=lambda p: str(p.relative_to(ROOT)))
def test_library_imports_are_absolute(path: Path) -> None:
    """So that the test above sees them all."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]
