"""Finds the recipes and packs that ship with the project, and tells names of the Hub from paths.

Imports only `errors`, `archive` and `cache`.
A shipped pack is named by its folder: `tiny` is `adapters/tiny`, and as a base `adapters/tiny/base`.
"""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from lora_lexicon.archive import is_archive
from lora_lexicon.cache import unpacked
from lora_lexicon.errors import DataError, ExpertError, PackError, RecipeError

_HUB_NAME = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/[\w.-]+")


def packs() -> dict[str, Path]:
    """The packs that ship, by name."""
    root = Path(str(files("lora_lexicon.adapters")))
    return {path.parent.name: path.parent for path in sorted(root.glob("*/manifest.json"))}


def find_model(name: str) -> Path:
    """A folder as given, that of a pack in one file, or of the shipped pack of that name.

    Raises:
        PackError: there is neither.
    """
    place = _place(name)
    return unpacked(place) if place.is_file() else place


def check_system(name: str) -> None:
    """Raises PackError where `find_system` would for want of a model; opens nothing."""
    if not is_hub_name(name):
        _place(name)


def _place(name: str) -> Path:
    if Path(name).is_dir() or is_archive(name):
        return Path(name)
    if name in packs():
        return packs()[name]
    shipped = ", ".join(packs()) or "none"
    raise PackError(f"no model at {name!r}: give a folder, a .lexpack file, or the name of a shipped pack ({shipped})")


def find_base(name: str) -> str:
    """A base as given (folder or Hub name), or the base inside the shipped pack of that name.

    Raises:
        ExpertError: it can be none of these. Nothing is asked of the Hub.
    """
    if Path(name).is_dir() or is_hub_name(name):
        return name
    if name in packs():
        return str(packs()[name] / "base")
    if name in shapes():
        raise ExpertError(
            f"{name!r} is a shape, which has neither tokenizer nor weights: `lora-lexicon plan {name}` is for it; "
            "for a base give a folder or a Hub name (OWNER/NAME)"
        )
    shipped = ", ".join(packs()) or "none"
    raise ExpertError(f"no base at {name!r}: give a folder, a Hub name (OWNER/NAME) or a shipped pack ({shipped})")


def find_system(name: str) -> Path | None:
    """The folder of a model or the shipped pack of that name; None for what may be a base's Hub name.

    Raises:
        PackError: it can be none of these. Nothing is asked of the Hub.
    """
    try:
        return find_model(name)
    except PackError:
        if is_hub_name(name):
            return None
        raise


def is_hub_name(name: str) -> bool:
    """Whether a name that no file has reads as OWNER/NAME on the Hugging Face Hub.

    Where there is a folder OWNER it is a path, and mistyped.
    """
    found = _HUB_NAME.fullmatch(name)
    return found is not None and not Path(found["owner"]).is_dir()


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face Hub is within reach; asked once.

    Where it is not, its libraries work from their cache alone, as with HF_HUB_OFFLINE=1: left to
    themselves they try for half a minute at each file. How long one try may take is theirs to say
    (HF_HUB_ETAG_TIMEOUT).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library their version uses
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


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


def accelerate_config(name: str) -> Path:
    """The configuration of that name that ships for `accelerate launch`."""
    return Path(str(files("lora_lexicon.configs"))) / "accelerate" / f"{name}.yaml"


def recipes() -> dict[str, Path]:
    """The recipes that ship, by name: `tiny/lora` is `configs/tiny/lora.yaml`."""
    root = Path(str(files("lora_lexicon.configs")))
    shipped = {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
    return {key: path for key, path in shipped.items() if path.parent.name != "accelerate"}


def find_recipe(name: str) -> Path:
    """A recipe file as given, or the shipped one of that name."""
    if Path(name).is_file():
        return Path(name)
    if name in recipes():
        return recipes()[name]
    raise RecipeError(f"no recipe at {name!r}: give a YAML file, or one of {', '.join(recipes())}")
