"""The packs that lie in folders. Reads manifests, and nothing else."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lexicon.archive import SUFFIX
from lora_lexicon.cache import unpacked
from lora_lexicon.compose.mixture import BEFORE, MANIFEST, read_manifest
from lora_lexicon.errors import LexiconError, PackError
from lora_lexicon.folders import folder_bytes


def list_packs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What each pack in the folders says of itself, by its path; a pack that cannot be read has a `fault` instead.

    Raises:
        PackError: one of `folders` is none.
    """
    found = []
    for path in find_packs(folders):
        row: dict[str, Any] = {"pack": str(path)}
        try:
            manifest = read_manifest(unpacked(path) if path.is_file() else path)
            row |= {"name": manifest.name, "version": manifest.version, "domains": ", ".join(manifest.domains)}
            size = path.stat().st_size if path.is_file() else folder_bytes(path)
            row |= {"base": f"{manifest.base} ({manifest.base_fingerprint[:12]})", "MB": round(size / 1e6, 1)}
        except LexiconError as error:
            row["fault"] = str(error)
        found.append(row)
    return found


def find_packs(folders: Sequence[Path], deep: bool = False) -> list[Path]:
    """The packs in folders, as folders or files, in order, each once; a folder that is a pack itself counts as that.

    Args:
        deep: at any depth, instead of right in them. Hidden folders are left out.

    Raises:
        PackError: one of `folders` is none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise PackError(f"no folder {folder}: give one that holds packs")
        for path in [folder] if _is_pack(folder) else _inside(folder, deep):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _inside(folder: Path, deep: bool) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if _is_pack(path):
            yield path
        elif deep and path.is_dir() and not path.is_symlink():
            yield from _inside(path, deep)


def _is_pack(path: Path) -> bool:
    if path.is_dir():
        return (path / MANIFEST).is_file() or (path / BEFORE).is_file()
    return path.suffix == SUFFIX
