"""The mixture: one base, N adapters, one router, in a pack's folder. Knows how to read and load it, not to build it.

PACK/pack.json                                the manifest: base, domains, SHA-256 of every file
PACK/router.json, router.safetensors
PACK/adapters/NAME/adapter_config.json, adapter_model.safetensors, expert.json     plain PEFT
PACK/base/                                    optional: the base itself
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import PackError
from lora_lexicon.experts.base import Base, Quantize, base_folder, fingerprint, load_base
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.lora import LoadedAdapter, group_adapters
from lora_lexicon.experts.routed import ActiveRouting
from lora_lexicon.folders import read_record, sha256_of

MANIFEST = "pack.json"
FORMAT = 1
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# The only files a pack may hold; what does not match is never opened.
ALLOWED = re.compile(
    rf"README\.md|router\.json|router\.safetensors|base/{NAME}|"
    rf"adapters/{NAME}/(adapter_config\.json|adapter_model\.safetensors|expert\.json)"
)
NEEDED = ("router.json", "router.safetensors")
ADAPTER_NEEDED = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Manifest:
    """What `pack.json` says.

    Attributes:
        base: the base's name, as it can be found again.
        base_inside: the base lies in the pack, under `base/`.
        domains: in the router's order; each is also its adapter's folder under `adapters/`.
        files: {path within the pack: SHA-256}, all files but the manifest.
        facts: everything else, such as ranks and where the entries came from.
    """

    name: str
    base: str
    base_fingerprint: str
    base_inside: bool
    domains: tuple[str, ...]
    files: dict[str, str]
    facts: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `pack.json`; no other file is opened.

    Raises:
        PackError: no pack, another format, a malformed field, or a path that no pack may hold.
    """
    record = read_record(folder / MANIFEST, PackError, "a pack")
    where = folder / MANIFEST
    if record.get("format") != FORMAT:
        raise PackError(f"{where} has format {record.get('format')!r}; this version reads {FORMAT}")
    try:
        base, files = record["base"], record["files"]
        manifest = Manifest(
            name=record["name"],
            base=base["name"],
            base_fingerprint=base["fingerprint"],
            base_inside=base["path"] == "base",
            domains=tuple(domain["name"] for domain in record["domains"]),
            files=dict(files),
            facts={key: value for key, value in record.items() if key not in ("format", "name", "base", "files")},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PackError(f"{where} is damaged ({error!r}): get the pack again, or build it again") from error
    texts = (manifest.name, manifest.base, manifest.base_fingerprint, *manifest.domains, *manifest.files.values())
    if not all(isinstance(text, str) for text in texts):
        raise PackError(f"{where} is damaged: names and hashes must be strings: get the pack again")
    for path in manifest.files:
        if not ALLOWED.fullmatch(path):
            raise PackError(f"{where} lists {path!r}, which no pack may hold: do not use it")
    needed = [*NEEDED, *(f"adapters/{domain}/{file}" for domain in manifest.domains for file in ADAPTER_NEEDED)]
    absent = [path for path in needed if path not in manifest.files]
    if absent:
        raise PackError(f"{where} does not list {absent[0]}: get the pack again, or build it again")
    return manifest


def check_files(folder: Path, manifest: Manifest, paths: Iterable[str]) -> None:
    """Compares files with the manifest's hashes.

    Raises:
        PackError: a file is missing, reached through a link, or not what the manifest says.
    """
    for path in paths:
        file = folder / path
        if not file.is_file():
            raise PackError(f"pack {folder} lacks {path}: get the pack again")
        if file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()):
            raise PackError(f"pack {folder}: {path} is a link to another place: copy the file itself there")
        if sha256_of(file) != manifest.files[path]:
            raise PackError(f"pack {folder}: {path} is not the file that was packed (SHA-256 differs): get it again")


def base_of(folder: Path, manifest: Manifest, base: str | None) -> str:
    """Where the pack's base lies: as given, inside the pack, or by its name.

    Raises:
        PackError: the base given is another than the one the adapters were trained on.
    """
    name = base or (str(folder / "base") if manifest.base_inside else manifest.base)
    identity = fingerprint(base_folder(name))
    if identity != manifest.base_fingerprint:
        raise PackError(
            f"pack {manifest.name!r} was made for base {manifest.base!r} ({manifest.base_fingerprint[:12]}), "
            f"but {name!r} is {identity[:12]}: give that base"
        )
    return name


@dataclass
class Mixture:
    """A loaded pack; expert n of a routing is `adapters[n]`."""

    base: Base
    adapters: list[LoadedAdapter]
    router: Router
    active: ActiveRouting
    manifest: Manifest


def load_mixture(
    folder: Path,
    base: str | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    quantize: Quantize = "none",
) -> Mixture:
    """The base with all adapters of a pack on it, routed row by row.

    Raises:
        PackError: a damaged or tampered pack, or another base.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, [path for path in manifest.files if not path.startswith("base/")])
    router = load_router(folder)
    if router.names != manifest.domains:
        raise PackError(
            f"pack {folder}: the router names {', '.join(router.names)}, the manifest {', '.join(manifest.domains)}"
        )
    adapters = [load_adapter(folder / "adapters" / name, name) for name in manifest.domains]
    loaded = load_base(base_of(folder, manifest, base), dtype=dtype, device=device, quantize=quantize)
    active = ActiveRouting()
    group_adapters(loaded.model, adapters, active)
    return Mixture(loaded, adapters, router, active, manifest)
