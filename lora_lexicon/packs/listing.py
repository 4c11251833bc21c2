"""The packs that lie in folders. Reads manifests, and nothing else."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lexicon.archive import SUFFIX, unpacked
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


def find_packs(folders: Sequence[Path]) -> list[Path]:
    """The packs in folders at any depth, as folders or files, in order, each once.

    Hidden folders, and what lies inside of packs, are left out.

    Raises:
        PackError: one of `folders` is none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise PackError(f"no folder {folder}: give one that holds packs")
        for place, below, files in os.walk(folder):
            packed = sorted(name for name in files if name.endswith(SUFFIX))
            if not {MANIFEST, BEFORE}.isdisjoint(files):
                below.clear()
                packed = [""]
            below[:] = sorted(name for name in below if not name.startswith("."))
            for path in (Path(place) / name for name in packed):
                found.setdefault(path.resolve(), path)
    return list(found.values())
