"""Finds the recipes and packs that ship with the project. Imports only `errors`.

A shipped pack is named by its folder: `tiny` is `adapters/tiny`, and as a base `adapters/tiny/base`.
"""

from importlib.resources import files
from pathlib import Path

from lora_lexicon.errors import DataError, PackError, RecipeError


def packs() -> dict[str, Path]:
    """The packs that ship, by name."""
    root = Path(str(files("lora_lexicon.adapters")))
    return {path.parent.name: path.parent for path in sorted(root.glob("*/pack.json"))}


def find_model(name: str) -> Path:
    """A folder as given, or the shipped pack of that name.

    Raises:
        PackError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in packs():
        return packs()[name]
    shipped = ", ".join(packs()) or "none"
    raise PackError(f"no model at {name!r}: give a folder, or the name of a shipped pack ({shipped})")


def find_base(name: str) -> str:
    """A base as given (folder or Hub name), or the base inside the shipped pack of that name."""
    if not Path(name).exists() and name in packs():
        return str(packs()[name] / "base")
    return name


def shapes() -> dict[str, Path]:
    """The config.json of well-known bases, without their weights, by name."""
    root = Path(str(files("lora_lexicon.configs")))
    return {path.stem: path for path in sorted(root.glob("shapes/*.json"))}


def find_sample(name: str) -> str:
    """An input as given, or for `sample:NAME` the dictionary sample of that name that ships."""
    if not name.startswith("sample:"):
        return name
    shipped = {p.name.split(".")[0]: p for p in sorted(Path(str(files("lora_lexicon.data"))).glob("samples/*.gz"))}
    found = shipped.get(name.removeprefix("sample:"))
    if found is None:
        raise DataError(f"no sample {name!r} ships: there are {', '.join(f'sample:{key}' for key in shipped)}")
    return str(found)


def find_recipe(name: str) -> Path:
    """A recipe file as given, or the shipped one of that name (`tiny/lora` is `configs/tiny/lora.yaml`)."""
    if Path(name).is_file():
        return Path(name)
    root = Path(str(files("lora_lexicon.configs")))
    shipped = {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"no recipe at {name!r}: give a YAML file, or one of {', '.join(shipped)}")
