"""One file that holds a folder: an uncompressed zip, laid out so that each file in it can be mapped into memory.

Knows nothing of what the files are, but that one of them is a manifest. What it reads may be hostile: each byte of the
file is accounted for before anything is written, and nothing is written but plain files inside the folder given.
"""

import io
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lora_lexicon.errors import LexiconError, PackError
from lora_lexicon.folders import beside, changing, is_disk_full, new_folder

SUFFIX = ".lexpack"
FIRST = "manifest.json"  # which no archive lacks
ALIGNMENT = 64  # bytes; of the first byte of each file
MAX_FILES = 10_000
MAX_DIRECTORY = 512 * MAX_FILES  # bytes of the zip's central directory
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment a zip can hold: the same folder gives the same bytes
PADDING = 0xD935  # the extra field that Android's zipalign pads by
LARGE = 1  # the extra field that holds what 32 bits cannot
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}")
# The records of a zip, as APPNOTE.TXT (sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16) names their fields.
LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
LARGE_END = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")


@dataclass(frozen=True)
class Member:
    """A file in an archive: where its bytes lie, and their CRC-32."""

    name: str
    start: int
    size: int
    crc: int


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
        if is_disk_full(error):
            raise
        raise LexiconError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def unpack(file: Path, out: Path) -> None:
    """Writes the files of an archive into a new folder.

    Raises:
        PackError: no such archive, or one that is damaged or holds what none may.
    """
    with new_folder(out, needs=file.stat().st_size if file.is_file() else 0) as folder:
        extract(file, folder)


def extract(file: Path, folder: Path) -> None:
    """Writes the files of an archive into an empty folder.

    Raises:
        PackError: as `unpack`; if not for a file's contents, nothing is written then.
    """
    for member in members(file):
        (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / member.name).open("xb") as target:
            for block in blocks(file, member):
                target.write(block)


def holds(folder: Path, file: Path) -> bool:
    """Whether a folder holds exactly the files of an archive.

    Raises:
        PackError: as `unpack`.
    """
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not _is_folder(path)}
    found = {member.name: member for member in members(file)}
    return there.keys() == found.keys() and all(_equal(path, file, found[name]) for name, path in there.items())


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _equal(path: Path, file: Path, member: Member) -> bool:
    """Whether a plain file holds the bytes of one in an archive."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != member.size:
        return False
    with path.open("rb") as own:
        return all(own.read(len(block)) == block for block in blocks(file, member))


@contextmanager
def placed(out: Path, *, overwrite: bool = False, held: bool = False) -> Iterator[Path]:
    """A folder to fill, which then lies at `out`, or is one file there where that ends in `.lexpack`.

    The folder's `manifest.json` comes first in the file, the others in the order of their names.

    Args:
        held: the caller holds `out` as `changing` does.

    Raises:
        LexiconError: as `new_folder` and, unless held, `changing`.
    """
    if out.suffix != SUFFIX:
        hold = changing(out) if out.is_dir() and not held else nullcontext()
        with hold, new_folder(out, replace=overwrite) as folder:
            yield folder
        return
    if out.exists() and not (overwrite and out.is_file()):
        raise LexiconError(f"{out} exists: choose another --out, or add --overwrite")
    with beside(out) as scratch:
        folder, made = scratch / "files", scratch / out.name
        folder.mkdir()
        yield folder
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_archive(folder, sorted(names, key=lambda name: (name != FIRST, name)), made)
        os.replace(made, out)


def blocks(file: Path, member: Member) -> Iterator[bytes]:
    """The bytes of a file in an archive, in blocks of 1 MiB.

    Raises:
        PackError: after the last of them, if they are not those that were packed.
    """
    try:
        with file.open("rb") as source:
            source.seek(member.start)
            left, crc = member.size, 0
            while left and (block := source.read(min(left, 2**20))):
                left, crc = left - len(block), zlib.crc32(block, crc)
                yield block
    except OSError as error:
        raise PackError(f"{file} cannot be read ({error.strerror or error}): get the pack again") from error
    if left or crc != member.crc:
        raise PackError(f"{file} is damaged ({member.name} is not what was packed): get the pack again")


def members(file: Path) -> list[Member]:
    """The files of an archive, in their order, if it holds none that it may not.

    Raises:
        PackError: a name that leads elsewhere, a link, two files of one name, one that is compressed or encrypted, no
            manifest; or a byte that is not the zip's, or differs from what another part of it says.
    """
    try:
        with file.open("rb") as source:
            found = _walked(source, file)
    except (ValueError, struct.error) as error:
        raise PackError(f"{file} is damaged ({error}): get the pack again") from error
    except OSError as error:
        raise PackError(f"{file} cannot be read ({error.strerror or error}): get the pack again") from error
    names = [member.name.lower() for member in found]
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len({*names}) != len(names) or not folders.isdisjoint(names):
        raise PackError(f"{file} holds two files of one name, ignoring case, or one inside another: do not use it")
    if all(member.name != FIRST for member in found):
        raise PackError(f"{file} is no pack: it holds no {FIRST}; get the pack again, or build it again")
    return found


def _walked(source: BinaryIO, file: Path) -> list[Member]:
    """Walks an archive from its first byte to its last.

    Raises:
        PackError: it is no zip, or holds what no pack may.
        ValueError, struct.error: anything lies between its parts, or one says other than the other.
    """
    count, begin, length = _directory(source, file)
    source.seek(begin)
    directory, found, place = io.BytesIO(source.read(length)), list[Member](), 0
    for _ in range(count):
        found.append(_member(source, directory, place, file))
        place = found[-1].start + found[-1].size
    _need(place == begin and not directory.read(), "something lies between its parts")
    return found


def _member(source: BinaryIO, directory: BinaryIO, place: int, file: Path) -> Member:
    """Reads the next entry of the central directory, and the header at `place`, which must say the same."""
    central = CENTRAL.unpack(directory.read(CENTRAL.size))
    raw, extra = (directory.read(length) for length in central[10:12])
    name = raw.decode("ascii", "backslashreplace")
    right = (b"PK\1\2", len(raw), len(extra), 0, 0)  # no comment, one disk
    _need((central[0], *central[10:14]) == right, f"the entry of {name[:80]!r} does not fit")
    if not NAME.fullmatch(name) or stat.S_IFMT(central[15] >> 16) not in (0, stat.S_IFREG):
        raise PackError(f"{file} holds {name[:80]!r}, which no pack may hold: do not use it")
    packed, size, offset = _numbers(extra, [*central[8:10], central[16]])
    flags, method = central[3:5]
    if flags or method or packed != size:
        raise PackError(f"{file}: {name} is compressed or encrypted, as no pack's file is: get the pack again")
    _need(offset == place, f"{name} does not lie where the file before it ends")
    source.seek(place)
    local = LOCAL.unpack(source.read(LOCAL.size))
    own, extra = (source.read(length) for length in local[9:11])
    same = (local[0], own, *local[2:7]) == (b"PK\3\4", raw, *central[3:8])  # flags, method, time, date, CRC
    _need(same and _numbers(extra, local[7:9]) == [size, size], f"the header of {name} does not fit")
    _need(source.tell() % ALIGNMENT == 0, f"{name} begins at no multiple of {ALIGNMENT}")
    return Member(name, source.tell(), size, central[7])


def _directory(source: BinaryIO, file: Path) -> tuple[int, int, int]:
    """The number of an archive's files, and the place and length of its central directory, by the records at its end.

    Raises: as `_walked`.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(max(0, size - LOCATOR.size - END.size))
    tail = source.read()
    if tail[-END.size : 4 - END.size] != b"PK\5\6" or tail[-2:] != b"\0\0":  # the length of a comment
        raise PackError(f"{file} is no pack in one file, or only the first part of one: get the pack again")
    end = END.unpack(tail[-END.size :])
    (count, length, begin), ends, ones = end[4:7], size - END.size, (None, None)
    if tail[:4] == b"PK\6\7":  # the records of a zip64 lie before
        ends, ones = size - len(tail) - LARGE_END.size, (0xFFFF, 0xFFFFFFFF)
        source.seek(max(0, ends))
        large = LARGE_END.unpack(source.read(LARGE_END.size))
        count, length, begin = large[7:]
        right = (b"PK\6\6", LARGE_END.size - 12, 0, 0, count)
        _need((*large[:2], *large[4:7]) == right, "its end does not fit")
        _need(LOCATOR.unpack(tail[: LOCATOR.size]) == (b"PK\6\7", 0, ends, 1), "its end does not fit")
    if length > MAX_DIRECTORY or count > MAX_FILES:
        raise PackError(f"{file} lists more than a pack may hold: do not use it")
    right = zip(end[3:7], (count, count, length, begin), (ones[0], ones[0], ones[1], ones[1]), strict=True)
    _need(end[1:3] == (0, 0) and all(short in (long, full) for short, long, full in right), "its end does not fit")
    _need(begin + length == ends, "its end does not fit")
    return count, begin, length


def _numbers(extra: bytes, values: Sequence[int]) -> list[int]:
    """Numbers of a header, of 32 bits; in place of those that are all ones, what its field of 64 bits says.

    Raises:
        ValueError, struct.error: its extra fields hold anything else, or padding other than zeros.
    """
    fields: dict[int, bytes] = {}
    while extra:
        kind, length = struct.unpack("<HH", extra[:4])
        known = kind in (LARGE, PADDING) and kind not in fields and len(extra) >= 4 + length
        _need(known, "an extra field is none of a pack's")
        fields[kind], extra = extra[4 : 4 + length], extra[4 + length :]
    absent, room = values.count(0xFFFFFFFF), len(fields.get(PADDING, b"")) - 2
    padded = PADDING not in fields or fields[PADDING] == struct.pack("<H", ALIGNMENT) + bytes(max(0, room))
    _need(padded and room < ALIGNMENT and (LARGE in fields) == (absent > 0), "an extra field is none of a pack's")
    large = iter(struct.unpack(f"<{absent}Q", fields.get(LARGE, b"")))
    return [next(large) if value == 0xFFFFFFFF else value for value in values]


def _need(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)
