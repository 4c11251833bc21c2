"""The mixture: one base, N adapters, one router, in a pack's folder. Knows how to read and load it, not to build it.

docs/pack-format.md is the format. A pack in one file is unpacked before it comes here (`lora_lexicon.archive`).
"""

import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import PackError, TrustError
from lora_lexicon.experts.base import Base, Quantize, base_folder, fingerprint, load_base
from lora_lexicon.experts.checkpoint import INT8, WEIGHTS, load_adapter
from lora_lexicon.experts.grouped import group_adapters
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.resident import Residents, Source, need_room
from lora_lexicon.experts.routed import ActiveRouting
from lora_lexicon.folders import CONTROL, MAX_RECORD_BYTES, read_record, sha256_of

MANIFEST = "manifest.json"
FORMAT = 2
BEFORE = "pack.json"  # the manifest of format 1
SIGNATURE = "model.sig"  # which the manifest does not list either
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Of a base: nothing that could be code, or a pickle, or that transformers would take for something else.
BASE_FILE = (
    r"((?!adapter)[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.safetensors|(config|generation_config|tokenizer|tokenizer_config|"
    r"special_tokens_map|added_tokens|vocab|training|model\.safetensors\.index)\.json|tokenizer\.model|merges\.txt|"
    r"chat_template\.jinja|README\.md|NOTICE)"
)
VERSION = r"[0-9A-Za-z][0-9A-Za-z.+!-]{0,63}"
SHA256 = r"[0-9a-f]{64}"
MAX_FILES = 10_000
# The only files a pack may hold; what does not match is never opened.
ALLOWED = re.compile(
    rf"README\.md|router\.json|router\.safetensors|base/{BASE_FILE}|"
    rf"adapters/{NAME}/(adapter_config\.json|adapter_model(\.int8)?\.safetensors|expert\.json)"
)
NEEDED = ("router.json", "router.safetensors")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        base: the base's name, as it can be found again.
        base_revision: its commit on the Hub; "" for a base that came from nowhere.
        base_inside: the base lies in the pack, under `base/`.
        domains: in the router's order; each is also its adapter's folder under `adapters/`.
        files: {path within the pack: SHA-256}, all files but the manifest.
        sizes: {path within the pack: bytes}, likewise.
        record: all of it.
    """

    name: str
    version: str
    base: str
    base_revision: str
    base_fingerprint: str
    base_inside: bool
    domains: tuple[str, ...]
    files: dict[str, str]
    sizes: dict[str, int]
    record: dict[str, Any]


def signature_of(folder: Path) -> Path | None:
    """Where a pack's signature lies; None for a pack without one. It is not opened.

    Raises:
        TrustError: what lies there is a link, a folder, a device, or too large for one.
    """
    file = folder / SIGNATURE
    try:
        found = file.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_RECORD_BYTES:
        return file
    what = f"larger than {MAX_RECORD_BYTES >> 20} MiB" if stat.S_ISREG(found.st_mode) else "no plain file"
    raise TrustError(f"pack {folder}: {SIGNATURE} is {what}, so no signature: take it away, or do not use the pack")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `manifest.json`; no other file is opened.

    Raises:
        PackError: no pack, another format, a malformed field, a path that no pack may hold, or see `signature_of`.
    """
    where = folder / MANIFEST
    if not where.is_file() and (folder / BEFORE).is_file():
        raise PackError(
            f"{folder} is a pack of format 1; this version reads {FORMAT}: build it again with `pack build`"
        )
    manifest = parse_manifest(read_record(where, PackError, "a pack"), str(where))
    signature_of(folder)
    return manifest


def parse_manifest(record: dict[str, Any], where: str) -> Manifest:
    """Checks what a manifest says; `where` it was read is for the message.

    Raises:
        PackError: as `read_manifest`.
    """
    if record.get("format") != FORMAT:
        raise PackError(f"{where} has format {record.get('format')!r}; this version reads {FORMAT}")
    try:
        base, files = record["base"], record["files"]
        manifest = Manifest(
            name=record["name"],
            version=record["version"],
            base=base["name"],
            base_revision=base["revision"] or "",
            base_fingerprint=base["fingerprint"],
            base_inside=base["path"] == "base",
            domains=tuple(domain["name"] for domain in record["domains"]),
            files={path: file["sha256"] for path, file in files.items()},
            sizes={path: file["bytes"] for path, file in files.items()},
            record=record,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackError(f"{where} is damaged ({error!r}): get the pack again, or build it again") from error
    fields = [("name", NAME, manifest.name), ("version", VERSION, manifest.version)]
    fields += [("base fingerprint", SHA256, manifest.base_fingerprint)]
    fields += [("domain", NAME, domain) for domain in manifest.domains]
    fields += [(f"SHA-256 of {path}", SHA256, value) for path, value in manifest.files.items()]
    for what, pattern, value in fields:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise PackError(f"{where} is damaged: its {what} is {str(value)[:80]!r}: get the pack again")
    if not isinstance(manifest.base, str) or not isinstance(manifest.base_revision, str):
        raise PackError(f"{where} is damaged: the base's name and revision must be strings: get the pack again")
    if not all(type(size) is int and size >= 0 for size in manifest.sizes.values()) or len(files) > MAX_FILES:
        raise PackError(
            f"{where} is damaged: it must give the bytes of at most {MAX_FILES:,} files: get the pack again"
        )
    for domain in record["domains"]:
        modules, numbers = domain.get("modules"), (domain.get("rank"), domain.get("trained_parameters"))
        if not (
            isinstance(modules, list)
            and all(isinstance(text, str) for text in (*modules, domain.get("dtype"), domain.get("description")))
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ):
            raise PackError(f"{where} is damaged: what it says of {domain['name']} has other types: get the pack again")
    for path in files:
        if not ALLOWED.fullmatch(path):
            raise PackError(f"{where} lists {path!r}, which no pack may hold: do not use it")
    for names in (manifest.domains, files):
        if len({name.lower() for name in names}) != len(names):
            raise PackError(f"{where} names something twice, ignoring case: get the pack again, or build it again")
    _check_complete(manifest, where)
    if not _is_readable(record):
        raise PackError(f"{where} holds control characters, which could change what a terminal shows: do not use it")
    return manifest


def _is_readable(value: Any) -> bool:
    """Whether all text in a JSON value can be shown."""
    if isinstance(value, str):
        return not CONTROL.search(value)
    if isinstance(value, dict):
        return all(_is_readable(part) for pair in value.items() for part in pair)
    return not isinstance(value, list) or all(map(_is_readable, value))


def _check_complete(manifest: Manifest, where: str) -> None:
    """Raises PackError unless all that a pack must hold is listed."""
    needed = [*NEEDED, *(f"adapters/{domain}/adapter_config.json" for domain in manifest.domains)]
    absent = [path for path in needed if path not in manifest.files]
    for domain in manifest.domains:
        held = [f"adapters/{domain}/{name}" for name in (WEIGHTS, INT8)]
        absent += held[:1] if sum(path in manifest.files for path in held) != 1 else []
    if not manifest.domains or absent:
        raise PackError(f"{where} does not list {(absent or ['a domain'])[0]}: get the pack again, or build it again")


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
        if file.stat().st_size != manifest.sizes[path] or sha256_of(file) != manifest.files[path]:
            raise PackError(f"pack {folder}: {path} is not the file that was packed (SHA-256 differs): get it again")


def base_of(folder: Path, manifest: Manifest, base: str | None) -> str:
    """Where the pack's base lies: as given, inside the pack, or by its name.

    Raises:
        PackError: the base given is another than the one the adapters were trained on.
    """
    name = base or (str(folder / "base") if manifest.base_inside else manifest.base)
    check_made_for(manifest, fingerprint(base_folder(name, revision_of(manifest, base))), name)
    return name


def check_made_for(manifest: Manifest, identity: str, base: str) -> None:
    """Refuses a base of another fingerprint, naming both."""
    if identity != manifest.base_fingerprint:
        raise PackError(
            f"pack {manifest.name!r} was made for base {manifest.base!r} ({manifest.base_fingerprint[:12]}), "
            f"but {base!r} is {identity[:12]}: give that base"
        )


def revision_of(manifest: Manifest, base: str | None) -> str | None:
    """The commit to take of the base on the Hub; None where the user gave a base."""
    return None if base or manifest.base_inside else manifest.base_revision or None


def _check_plain(folder: Path, manifest: Manifest, paths: Iterable[str]) -> None:
    """Refuses files that are missing, links, or of another size, without reading them."""
    for path in paths:
        file = folder / path
        if file.is_symlink() or not file.is_file() or file.stat().st_size != manifest.sizes[path]:
            raise PackError(f"pack {folder}: {path} is not the file that was packed: get it again")


def read_pack(folder: Path, shapes: bool = False) -> tuple[Manifest, Router, list[LoadedAdapter]]:
    """All of a pack but its base, verified; the adapters are in the router's order.

    Args:
        shapes: adapters without their numbers (see `load_adapter`).

    Raises:
        PackError: a damaged or tampered pack.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, [path for path in manifest.files if not path.startswith("base/")])
    _check_plain(folder, manifest, [path for path in manifest.files if path.startswith("base/")])
    router = load_router(folder)
    if router.names != manifest.domains:
        raise PackError(
            f"pack {folder}: the router names {', '.join(router.names)}, the manifest {', '.join(manifest.domains)}"
        )
    adapters = [load_adapter(folder / "adapters" / name, name, shapes=shapes) for name in manifest.domains]
    return manifest, router, adapters


def source_of(folder: Path, manifest: Manifest, like: LoadedAdapter) -> Source:
    """A pack's expert, read without its numbers, whose files are compared with the manifest at each load."""
    return Source(like, partial(_load, folder, manifest, like.name))


def _load(folder: Path, manifest: Manifest, name: str) -> LoadedAdapter:
    own = f"adapters/{name}/"
    try:
        check_files(folder, manifest, [path for path in manifest.files if path.startswith(own)])
        return load_adapter(folder / own, name)
    except OSError as error:
        raise PackError(f"pack {folder}: expert {name!r} cannot be read ({error.strerror}): get it again") from error


@dataclass
class Mixture:
    """A loaded pack; expert n of a routing is `adapters[n]`, without numbers where `residents` load it on demand."""

    base: Base
    adapters: list[LoadedAdapter]
    router: Router
    active: ActiveRouting
    manifest: Manifest
    residents: Residents | None = None


def load_mixture(
    folder: Path,
    base: str | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    quantize: Quantize = "none",
    expert_memory: int | None = None,
    loaded: Base | None = None,
) -> Mixture:
    """The base with all adapters of a pack on it, routed row by row.

    Args:
        expert_memory: bytes that adapters in memory may take; they come when they are asked for, and go when others
            need the room.
        loaded: the base, in memory: it is not loaded again, and adapters of another pack that it has make room.

    Raises:
        PackError: a damaged or tampered pack, or another base.
        LexiconError: too little memory for the experts of one prompt.
    """
    manifest, router, adapters = read_pack(folder, shapes=expert_memory is not None)
    sources = [source_of(folder, manifest, adapter) for adapter in adapters] if expert_memory is not None else []
    if expert_memory is not None:
        need_room(expert_memory, sources, router.top_k)
    if loaded is None:
        name, revision = base_of(folder, manifest, base), revision_of(manifest, base)
        loaded = load_base(name, dtype=dtype, device=device, quantize=quantize, revision=revision)
    check_made_for(manifest, loaded.fingerprint, loaded.name)
    active = ActiveRouting()
    if expert_memory is not None:
        residents = Residents(loaded.model, active, sources, expert_memory, router.top_k)
        return Mixture(loaded, adapters, router, active, manifest, residents)
    group_adapters(loaded.model, adapters, active)
    return Mixture(loaded, adapters, router, active, manifest)
