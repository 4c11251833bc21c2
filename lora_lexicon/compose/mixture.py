"""The mixture: one base, N adapters, one router, in a pack's folder. Knows how to read and load it, not to build it.

docs/pack-format.md is the format. A pack in one file is unpacked before it comes here (`lora_lexicon.cache`).
"""

import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import PackError, TrustError
from lora_lexicon.experts.base import Base, Quantize, base_folder, fingerprint, load_base
from lora_lexicon.experts.checkpoint import INT8, WEIGHTS, load_adapter
from lora_lexicon.experts.grouped import group_adapters
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.resident import Residents, Source, need_room
from lora_lexicon.experts.routed import ActiveRouting
from lora_lexicon.folders import (
    CONTROL,
    HIDDEN,
    MAX_RECORD_BYTES,
    SHOWN,
    Fields,
    first_wrong,
    read_record,
    sha256_of,
    shown,
)

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
REVISION = r"([0-9a-f]{40})?"  # a commit
MAX_FILES = 10_000
MAX_BASE_NAME = 1024  # characters
MAX_PART = 255  # bytes of one name within a path, as file systems have it
HASHERS = 8  # files that are read at once
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
    if where.is_symlink():
        raise PackError(f"pack {folder}: {MANIFEST} is a link to another place: copy the file itself there")
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
    if type(record.get("format")) is not int or record["format"] != FORMAT:
        raise PackError(f"{where} has format {shown(record.get('format'))}; this version reads {FORMAT}")
    top = Fields(record, where, PackError, "get the pack again, or build it again")
    base, files, domains = top.inside("base"), top.inside("files"), top.each("domains")
    if len(files.values) > MAX_FILES:
        raise PackError(f"{where} lists more than {MAX_FILES:,} files: do not use it")
    for path in files.values:
        if not ALLOWED.fullmatch(path):
            raise PackError(f"{where} lists {shown(path)}, which no pack may hold: do not use it")
    manifest = Manifest(
        name=top.text("name", NAME, "a name"),
        version=top.text("version", VERSION, "a version"),
        base=base.text("name"),
        base_revision=base.text("revision", REVISION, "a commit of the Hub, or empty"),
        base_fingerprint=base.text("fingerprint", SHA256, "a SHA-256"),
        base_inside=base.values.get("path") == "base",
        domains=tuple(domain.text("name", NAME, "a name") for domain in domains),
        files={path: files.inside(path).text("sha256", SHA256, "a SHA-256") for path in files.values},
        sizes={path: files.inside(path).whole("bytes") for path in files.values},
        record=record,
    )
    _check_base(base, manifest)
    for domain in domains:
        _check_domain(domain)
    _check_rest(top)
    for names in (manifest.domains, manifest.files):
        if len({name.lower() for name in names}) != len(names):
            raise PackError(f"{where} names something twice, ignoring case: get the pack again, or build it again")
    _check_complete(manifest, where)
    if found := first_wrong(record, _hides):
        place = found[0].lstrip(".")[:SHOWN] or "a field's name"
        raise PackError(f"{where} holds {found[1]} in {place}, which no manifest may hold: do not use it")
    return manifest


def _hides(text: str) -> str:
    """The character of a text that could change or hide what is shown; "" for none."""
    found = CONTROL.search(text) or HIDDEN.search(text)
    return f"U+{ord(found[0]):04X}" if found else ""


def _check_base(base: Fields, manifest: Manifest) -> None:
    """What a manifest says of the base, beside its name, commit and fingerprint."""
    base.text("architecture")
    base.text("vocabulary", SHA256, "a SHA-256")
    if "path" not in base.values or base.values["path"] not in (None, "base"):
        raise base.refused("path", '"base" or null')
    if manifest.base_inside != any(path.startswith("base/") for path in manifest.files):
        raise base.refused("path", '"base" where its files are listed, and null elsewhere')
    parts = re.split(r"[/\\]", manifest.base)
    if len(manifest.base) > MAX_BASE_NAME or any(len(part.encode(errors="replace")) > MAX_PART for part in parts):
        raise base.refused("name", f"of at most {MAX_BASE_NAME:,} characters, and {MAX_PART} bytes in each part")
    if not manifest.base_inside and not _finds_one_base(manifest.base):
        raise base.refused("name", "a name of the Hub, a shipped pack's, or a whole path")


def _finds_one_base(name: str) -> bool:
    """Whether a base's name means the same wherever the reader stands: no path that begins there."""
    plain = re.fullmatch(r"[^/\\]+(/[^/\\]+)?", name) and not {".", ".."} & set(name.split("/"))
    return bool(plain) or PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()


def _check_domain(domain: Fields) -> None:
    """What a manifest says of a domain, beside its name."""
    name = f"adapters/{domain.values['name']}"
    domain.text("adapter", re.escape(name), f'"{name}"')
    for key in ("description", "dtype"):
        domain.text(key)
    for key in ("rank", "trained_parameters"):
        domain.whole(key)
    domain.texts("modules")
    for key in ("recipe", "data"):
        domain.inside(key)


def _check_rest(top: Fields) -> None:
    """What a manifest says of router and pack; about itself a pack may say nothing."""
    embedder, template = top.inside("embedder"), top.inside("template")
    embedder.text("name")
    embedder.text("fingerprint", SHA256, "a SHA-256")
    for key in template.values:
        template.text(key)
    for key in {"licence", "description", "made_by"} & top.values.keys():
        top.text(key)
    if "languages" in top.values:
        top.texts("languages")
    for score in top.each("scores") if "scores" in top.values else ():
        for key in ("system", "metric", "signature"):
            score.text(key)
        score.number("value")
        score.whole("rows")
    if "made_from" in top.values and "added" in top.inside("made_from").values:
        top.inside("made_from").each("added")


def _check_complete(manifest: Manifest, where: str) -> None:
    """Raises PackError unless all that a pack must hold is listed."""
    needed = [*NEEDED, *(f"adapters/{domain}/adapter_config.json" for domain in manifest.domains)]
    absent = [path for path in needed if path not in manifest.files]
    for domain in manifest.domains:
        held = [f"adapters/{domain}/{name}" for name in (WEIGHTS, INT8)]
        absent += held[:1] if sum(path in manifest.files for path in held) != 1 else []
    if not manifest.domains or absent:
        raise PackError(f"{where} does not list {(absent or ['a domain'])[0]}: get the pack again, or build it again")


def files_of(pack: Path) -> Iterator[str]:
    """The paths, within the pack, of all its files, in order; manifest and signature are left out."""
    for path in sorted(pack.rglob("*")):
        name = path.relative_to(pack).as_posix()
        if name not in (MANIFEST, SIGNATURE) and (path.is_symlink() or not path.is_dir()):
            yield name


def check_listed(folder: Path, manifest: Manifest) -> None:
    """Refuses a file that the manifest does not list: transformers might find and read it."""
    for path in files_of(folder):
        if path not in manifest.files:
            raise PackError(f"pack {folder} holds {path!r}, which its manifest does not list: remove that file")


def check_files(folder: Path, manifest: Manifest, paths: Iterable[str]) -> None:
    """Compares files with the manifest's hashes, several at once: the shards of a large base take a core each.

    Raises:
        PackError: a file is missing, reached through a link, or not what the manifest says.
    """
    with ThreadPoolExecutor(HASHERS) as pool:
        for _ in pool.map(partial(_check_file, folder, manifest), paths):
            pass


def _check_file(folder: Path, manifest: Manifest, path: str) -> None:
    _check_there(folder, path)
    _check_bytes(folder / path, folder, manifest, path)


def _check_there(folder: Path, path: str) -> None:
    """Refuses a file that is missing, or reached through a link."""
    file = folder / path
    if not file.is_file():
        raise PackError(f"pack {folder} lacks {path}: get the pack again")
    if not _lies_there(folder, path):
        raise PackError(f"pack {folder}: {path} is a link to another place: copy the file itself there")


def _check_bytes(file: Path, folder: Path, manifest: Manifest, path: str) -> None:
    """Refuses a file that is not what the manifest says of `path`."""
    if file.stat().st_size != manifest.sizes[path] or sha256_of(file) != manifest.files[path]:
        raise PackError(f"pack {folder}: {path} is not the file that was packed (SHA-256 differs): get it again")


def _lies_there(folder: Path, path: str) -> bool:
    """Whether neither a pack's file nor a folder on the way to it is a link."""
    return (folder / path).resolve() == folder.resolve() / path


def base_of(folder: Path, manifest: Manifest, base: str | None) -> str:
    """Where the pack's base lies: as given, inside the pack, or by its name.

    A base inside is compared with the manifest byte by byte: the fingerprint alone reads samples of it.

    Raises:
        PackError: the base given is another than the one the adapters were trained on, or the one inside was changed.
    """
    name = base or (str(folder / "base") if manifest.base_inside else manifest.base)
    if base is None and manifest.base_inside:
        check_listed(folder, manifest)
        check_files(folder, manifest, [path for path in manifest.files if path.startswith("base/")])
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
        _check_there(folder, path)
        if (folder / path).stat().st_size != manifest.sizes[path]:
            raise PackError(f"pack {folder}: {path} is not the file that was packed: get it again")


def read_pack(folder: Path, shapes: bool = False) -> tuple[Manifest, Router, list[LoadedAdapter]]:
    """All of a pack but its base, verified; the adapters are in the router's order.

    Args:
        shapes: adapters without their numbers (see `load_adapter`).

    Raises:
        PackError: a damaged or tampered pack.
    """
    manifest = read_manifest(folder)
    check_listed(folder, manifest)
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
    """Reads an expert from a copy of its files, which nobody changes between their check and their reading."""
    own = [path for path in manifest.files if path.startswith(f"adapters/{name}/")]
    try:
        _check_plain(folder, manifest, own)
        with TemporaryDirectory(ignore_cleanup_errors=True) as copy:  # Windows removes nothing that is mapped
            for path in own:
                file = Path(copy) / PurePosixPath(path).name
                shutil.copyfile(folder / path, file)
                _check_bytes(file, folder, manifest, path)
            return load_adapter(Path(copy), name)
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
        if manifest.base_inside and base is None:
            loaded.tokenizer.chat_template = None  # a program, from wherever the pack came, that need not end
    check_made_for(manifest, loaded.fingerprint, loaded.name)
    active = ActiveRouting()
    if expert_memory is not None:
        residents = Residents(loaded.model, active, sources, expert_memory, router.top_k)
        return Mixture(loaded, adapters, router, active, manifest, residents)
    group_adapters(loaded.model, adapters, active)
    return Mixture(loaded, adapters, router, active, manifest)
