"""One file that holds a folder: an uncompressed zip, laid out so that each file in it can be mapped into memory.

Knows nothing of what the files are. What it reads may be hostile: names, sizes and counts are checked before anything
is written, and nothing is written but plain files inside the folder given.
"""

import hashlib
import os
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from lora_lexicon.errors import LexiconError, PackError
from lora_lexicon.folders import new_folder, sha256_of

SUFFIX = ".lexpack"
ALIGNMENT = 64  # bytes; of the first byte of each file
MAX_FILES = 10_000
MAX_DIRECTORY = 512 * MAX_FILES  # bytes of the zip's central directory
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment a zip can hold: the same folder gives the same bytes
PADDING = 0xD935  # the extra field that Android's zipalign pads by
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}")


def is_archive(path: Path | str) -> bool:
    """Whether a path names a single-file pack that exists."""
    return str(path).endswith(SUFFIX) and Path(path).is_file()


def write_archive(folder: Path, names: Sequence[str], out: Path) -> None:
    """Writes the files `names` of a folder, in that order, as one file; in one rename."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as made:
            for name in names:
                info = zipfile.ZipInfo(name, EPOCH)
                info.external_attr, info.create_system = (stat.S_IFREG | 0o644) << 16, 3
                info.file_size = (folder / name).stat().st_size
                large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides, which then adds 20 bytes
                start = made.fp.tell() + 30 + len(name) + (20 if large else 0)  # type: ignore[union-attr]
                room = -(start + 6) % ALIGNMENT
                info.extra = struct.pack("<HHH", PADDING, 2 + room, ALIGNMENT) + bytes(room)
                with (folder / name).open("rb") as source, made.open(info, "w", force_zip64=large) as target:
                    shutil.copyfileobj(source, target, 2**20)
        os.replace(temporary, out)
    except OSError as error:
        raise LexiconError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def unpack(file: Path, out: Path) -> None:
    """Writes the files of an archive into a new folder.

    Raises:
        PackError: no such archive, or one that is damaged or holds what none may.
    """
    with new_folder(out, replace=True, needs=file.stat().st_size if file.is_file() else 0) as folder:
        extract(file, folder)


def extract(file: Path, folder: Path) -> None:
    """Writes the files of an archive into an empty folder.

    Raises:
        PackError: as `unpack`; nothing is written then.
    """
    with _opened(file) as held:
        for info in _checked(held, file):
            (folder / info.filename).parent.mkdir(parents=True, exist_ok=True)
            with held.open(info) as source, (folder / info.filename).open("xb") as target:
                shutil.copyfileobj(source, target, 2**20)


def unpacked(file: Path) -> Path:
    """A folder with the files of an archive, in the user's cache, where it stays for the next time.

    What lies there is compared with the archive at each call, and is unpacked again where it differs.

    Raises:
        PackError: as `unpack`.
    """
    with _opened(file) as held:  # before all of it is read
        _checked(held, file)
    folder = cache_folder() / f"{file.name.removesuffix(SUFFIX)}-{sha256_of(file)[:32]}"
    if not _holds(folder, file):
        unpack(file, folder)
    return folder


def cache_folder() -> Path:
    """Where archives are unpacked: LORA_LEXICON_CACHE, or the user's own place for such files."""
    given = os.environ.get("LORA_LEXICON_CACHE")
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-lexicon"
    return (Path(given) if given else place) / "packs"


@contextmanager
def placed(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which then lies at `out`, or is one file there where that ends in `.lexpack`.

    The folder's `manifest.json` comes first in the file, the others in the order of their names.

    Raises:
        LexiconError: as `new_folder`.
    """
    if out.suffix != SUFFIX:
        with new_folder(out, replace=overwrite) as folder:
            yield folder
        return
    if out.exists() and not (overwrite and out.is_file()):
        raise LexiconError(f"{out} exists: choose another --out, or add --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch)
        yield folder
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_archive(folder, sorted(names, key=lambda name: (name != "manifest.json", name)), out)


def _holds(folder: Path, file: Path) -> bool:
    """Whether a folder holds exactly the files of an archive."""
    if not folder.is_dir():
        return False
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    with _opened(file) as held:
        infos = _checked(held, file)
        if there.keys() != {info.filename for info in infos} or any(path.is_symlink() for path in there.values()):
            return False
        for info in infos:
            with held.open(info) as source:
                if hashlib.file_digest(source, "sha256").hexdigest() != sha256_of(there[info.filename]):  # type: ignore[arg-type]
                    return False
    return True


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """An archive whose central directory is of a size that may be read."""
    try:
        with file.open("rb") as source:
            _check_directory(source, file)
            with zipfile.ZipFile(source) as held:
                yield held
    except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, ValueError, OverflowError) as error:
        raise PackError(f"{file} is damaged ({error}): get the pack again") from error
    except OSError as error:
        raise PackError(f"{file} cannot be read ({error.strerror or error}): get the pack again") from error


def _check_directory(source: BinaryIO, file: Path) -> None:
    """Raises PackError unless the file ends as a zip without a comment, whose directory fits `MAX_DIRECTORY`."""
    size = source.seek(0, os.SEEK_END)
    source.seek(max(0, size - 42))
    tail = source.read(42)
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise PackError(f"{file} is no pack in one file, or only the first part of one: get the pack again")
    sizes = [struct.unpack("<L", tail[-10:-6])[0]]
    if tail[:4] == b"PK\6\7":  # a zip64 record tells of the directory too
        source.seek(struct.unpack("<Q", tail[8:16])[0])
        record = source.read(56)
        if record[:4] != b"PK\6\6":
            raise PackError(f"{file} is damaged (its end is not whole): get the pack again")
        sizes.append(struct.unpack("<Q", record[40:48])[0])
    if max(sizes) > MAX_DIRECTORY:
        raise PackError(f"{file} lists more than a pack may hold: do not use it")


def _checked(held: zipfile.ZipFile, file: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive, if it holds none that it may not.

    Raises:
        PackError: a name that leads elsewhere, a link, two files of one name, or one that is compressed or encrypted.
    """
    infos = held.infolist()
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not NAME.fullmatch(info.filename) or info.orig_filename != info.filename or kind not in (0, stat.S_IFREG):
            raise PackError(f"{file} holds {info.orig_filename[:80]!r}, which no pack may hold: do not use it")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits or info.compress_size != info.file_size:
            raise PackError(
                f"{file}: {info.filename} is compressed or encrypted, as no pack's file is: get the pack again"
            )
    if len(infos) > MAX_FILES or len({info.filename.lower() for info in infos}) != len(infos):
        raise PackError(f"{file} holds two files of one name, ignoring case, or too many: do not use it")
    if sum(info.file_size for info in infos) > file.stat().st_size:
        raise PackError(f"{file} claims more bytes than it has: do not use it")
    return infos
