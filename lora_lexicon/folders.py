"""Folders that appear whole or not at all, and the JSON record each one holds. Imports only `errors`.

Every stage writes one folder under a temporary name and renames it, so that a stage which is
killed leaves nothing that a later stage would accept.
"""

import ctypes
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from lora_lexicon.errors import LexiconError

try:
    import fcntl
except ImportError:  # Windows: there, what killed runs left is not told from what is being written
    fcntl = None  # type: ignore[assignment]

LOGGER = logging.getLogger("lora_lexicon")
# What could change what a terminal shows, and halves of characters.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What does not show at all, so that two texts that look alike may differ; the joiners U+200C and U+200D, which some
# languages write words with, are not among them.
HIDDEN = re.compile(
    "[\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff]"
)
UNSHOWN = re.compile(f"[\t\n]|{CONTROL.pattern}|{HIDDEN.pattern}")  # in a line of text
SHOWN = 80  # characters of a wrong value that a message repeats
MAX_RECORD_BYTES = 16 * 2**20
MAX_RECORD_VALUES = 2**21  # of a record: a list in memory takes twenty times its two characters
MAX_KEY = 256  # characters of a field's name
MAX_DEPTH = 64
AT_FDCWD, SWAP = -100, 2  # of <fcntl.h> and <stdio.h>
ASIDE = ".old"
# One of them lies in every folder that a command makes.
RECORDS = (
    "entries.json",
    "router.json",
    "sweep.json",
    "expert.json",
    "reward.json",
    "moe.json",
    "manifest.json",
    "extract.json",
    "collapse.json",
    "export.json",
    "compare.json",
    "report.json",
    "document.json",
    "key.json",
)


@contextmanager
def new_folder(path: Path, *, replace: bool = False, needs: int = 0) -> Iterator[Path]:
    """A temporary sibling of `path` to write into; renamed to `path` on success, removed on failure.

    What a killed run left beside `path` is removed first, and a line is logged that says so.

    Args:
        replace: an existing folder is replaced, at the end.
        needs: bytes that must be free on the disk.

    Raises:
        LexiconError: `path` is a file, or a folder that is not empty (unless `replace`) or not ours, or the disk is
            full.
    """
    path = Path(path)
    if path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise LexiconError(f"{path} is the folder you are in, or holds it: give a new one inside, such as --out made")
    if path.is_file():
        raise LexiconError(f"{path} is a file: choose another --out")
    if replace and path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in RECORDS):
        raise LexiconError(f"{path} was not made by lora-lexicon, so --overwrite leaves it alone: choose another --out")
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise LexiconError(f"{path} exists and is not empty: choose another --out, or add --overwrite")
    with beside(path, needs=needs) as temporary:
        yield temporary
        _open_to_others(temporary)
        take_place(temporary, path)


@contextmanager
def beside(path: Path, *, needs: int = 0) -> Iterator[Path]:
    """A temporary sibling of `path` to make it in, locked, and removed at the end; first, what killed runs left there.

    Raises:
        LexiconError: as `new_folder`, of the disk.
    """
    made = [parent for parent in path.parents if not parent.exists()]  # the deepest first
    remove_stale(path)
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if free < needs:
        raise LexiconError(
            f"{path} needs {needs / 1e9:,.2f} GB and its disk has {free / 1e9:,.2f} GB left: "
            "free some space, or choose an --out on another disk"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        _remove_empty(made)
        raise LexiconError(f"cannot write {path}: {error.strerror}") from error
    try:
        with locked(temporary):
            yield temporary
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, LexiconError):  # which says itself what is full
            raise LexiconError(f"disk full while writing {path}: free some space and run the command again") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)


def take_place(new: Path, path: Path) -> None:
    """Puts a folder in the place of `path`, which then lies at `new` if it was there.

    In one step where the system can swap two names (Linux and macOS, on their own file systems), so that `path` is
    whole at every moment; elsewhere in two, and what a kill between them leaves beside it `remove_stale` puts back.
    """
    if not path.is_dir():
        os.rename(new, path)
    elif not _swapped(new, path):
        aside = new.with_name(f"{new.name}{ASIDE}")
        os.rename(path, aside)
        os.rename(new, path)
        os.rename(aside, new)


def _swapped(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = (os.fsencode(one), os.fsencode(other))
    if hasattr(libc, "renameat2"):
        return cast(Any, libc).renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], SWAP) == 0
    if hasattr(libc, "renamex_np"):
        return cast(Any, libc).renamex_np(*names, SWAP) == 0
    return False


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Holds a folder that is about to be changed.

    Raises:
        LexiconError: another process changes it.
    """
    remove_stale(folder)
    while True:
        before = folder.stat().st_ino
        with locked(folder) as held:
            if held is False:
                raise LexiconError(f"another command changes {folder} now: run this one again when it is done")
            if folder.stat().st_ino == before:  # and not one that took its place meanwhile
                yield
                return


def _open_to_others(folder: Path) -> None:
    """Gives files the permissions that the user's own have; some libraries write theirs for the user alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Holds the folder's lock, which the system releases when a process dies.

    False if another process has it, None if the file system locks no folders (as NFS): what killed runs left
    then stays.

    Args:
        wait: until no other process has it.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    held: bool | None = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        held = False
    except OSError:
        held = None
    try:
        yield held
    finally:
        os.close(handle)


def shared(folder: Path) -> int | None:
    """A handle that keeps a folder from being `locked` until it is closed, or the process ends; others may share it.

    None if the file system locks no folders.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        os.close(handle)
        return None
    return handle


def remove_stale(path: Path) -> None:
    """Removes the temporary folders that killed runs left for `path`; those of living runs are locked.

    What was put aside by a run that was killed before it had put its own in the place comes back.
    """
    for aside in path.parent.glob(f".{glob.escape(path.name)}.????????.partial{ASIDE}"):
        with locked(aside) as dead:
            if dead and path.exists():
                shutil.rmtree(aside, ignore_errors=True)
            elif dead:
                os.rename(aside, path)
                LOGGER.warning("put %s back, which an interrupted run had put aside", path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
        with locked(stale) as dead:
            if dead:
                size = folder_bytes(stale)
                shutil.rmtree(stale, ignore_errors=True)
                LOGGER.warning("removed %s: %.1f MB that an interrupted run left unfinished", stale, size / 1e6)


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that no space is left; safetensors and torch say so in words of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error) or "inline_container.cc" in str(error)


def _remove_empty(folders: list[Path]) -> None:
    """Removes those that hold nothing, the deepest first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def put_file(source: Path, target: Path, *, link: bool) -> None:
    """Puts a file where another folder is being made.

    Args:
        link: as a hard link where the file system has them, for a folder that takes its source's place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # another file system, or one without links
    shutil.copyfile(source, target)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON record, in one rename."""
    write_whole(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in one rename; on a full disk nothing of it stays."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LexiconError(f"{path} cannot be written: {error.strerror or error}") from error


def check_new_file(path: Path, *, replace: bool = False) -> None:
    """Refuses what `new_file` would, before the long work whose result it is to hold."""
    if path.is_dir():
        raise LexiconError(f"{path} is a folder: choose a file's name")
    if path.exists() and not replace:
        raise LexiconError(f"{path} exists: choose another name, or add --overwrite")


@contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[TextIO]:
    """A text file that appears whole, in one rename, or not at all: what is yielded is written under another name.

    Args:
        replace: a file of that name is replaced, at the end.

    Raises:
        LexiconError: `path` is a folder, or exists (unless `replace`), or cannot be written, or the disk is full.
    """
    check_new_file(path, replace=replace)
    made = [parent for parent in path.parents if not parent.exists()]  # the deepest first
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("w", encoding="utf-8", newline="")
    except OSError as error:
        _remove_empty(made)
        raise LexiconError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        with file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if is_disk_full(error):
            raise LexiconError(f"disk full while writing {path}: free some space and run the command again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _remove_empty(made)


def read_record(path: Path, error: type[LexiconError], what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        error: the class raised for a missing, oversized or malformed file.
        what: names the thing in the message, such as "a pack".
    """
    if not path.is_file():
        raise error(f"{path.parent} is not {what}: {path.name} is missing")
    content = read_bounded(path, MAX_RECORD_BYTES)
    if content is None:
        raise error(f"{path} is larger than {MAX_RECORD_BYTES >> 20} MiB: it cannot be {what}'s record")
    try:
        record = parse_json(content)
    except ValueError as cause:
        raise error(f"{path} is not valid JSON ({cause}): make {what} again") from cause
    if not isinstance(record, dict):
        raise error(f"{path} must hold a JSON object, not {shown(record)}")
    return record


def read_bounded(path: Path, limit: int) -> bytes | None:
    """All of a plain file of at most `limit` bytes; None for a larger one.

    Raises:
        OSError: no file, or none that is plain: a pipe would be waited for, and a device never ends.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        content = file.read(limit + 1)
    return content if len(content) <= limit else None


def parse_json(content: bytes) -> Any:
    """The value that JSON in UTF-8 holds.

    Raises:
        ValueError: it is none, repeats a key of an object, or holds more values than `MAX_RECORD_VALUES`, too deep a
            nesting or a number of thousands of digits.
    """
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_RECORD_VALUES:
        raise ValueError(f"more than {MAX_RECORD_VALUES:,} values")
    try:
        return json.loads(content.decode(), object_pairs_hook=_object)
    except RecursionError as cause:
        raise ValueError("nested too deep") from cause
    except ValueError as cause:
        raise ValueError("a number of thousands of digits" if "digits" in str(cause) else str(cause)) from cause


def plain(text: str) -> str:
    """A text for a terminal: what could change what it shows is written as its number."""
    return CONTROL.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def shown(value: Any) -> str:
    """A value of a JSON record as a message repeats it: in ASCII, and not at length."""
    try:
        text = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)  # as of a date in YAML
    except (ValueError, TypeError, RecursionError):  # a number of thousands of digits, or too deep a nesting
        return "a value too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@dataclass(frozen=True)
class Fields:
    """A JSON object that a file holds, read field by field; what is refused names the file and the field.

    Attributes:
        where: the file.
        error: the class raised.
        mend: what to do about it, for the message.
        path: of the object itself within the file's, such as `domains[0].`; "" for all of it.
    """

    values: Mapping[str, Any]
    where: str
    error: type[LexiconError]
    mend: str
    path: str = ""

    def refused(self, key: str, must: str) -> LexiconError:
        """The error that says what a field must be, and is not."""
        if key not in self.values:
            return self.error(f"{self.where} is damaged: it lacks {self.path}{key}: {self.mend}")
        found = shown(self.values[key])
        return self.error(f"{self.where} is damaged: {self.path}{key} is {found}; it must be {must}: {self.mend}")

    def of(self, key: str, kind: type, must: str) -> Any:
        """A field of exactly this type."""
        if type(self.values.get(key)) is not kind:
            raise self.refused(key, must)
        return self.values[key]

    def text(self, key: str, pattern: str = "", must: str = "text") -> str:
        """A text, which matches the pattern as a whole where one is given."""
        value = self.of(key, str, must)
        if pattern and not re.fullmatch(pattern, value):
            raise self.refused(key, must)
        return value

    def whole(self, key: str) -> int:
        """A whole number from 0, of at most 63 bits."""
        must = "a whole number from 0 on"
        value = self.of(key, int, must)
        if not 0 <= value < 2**63:
            raise self.refused(key, must)
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise self.refused(key, "a number")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        must = "a list of text"
        value = self.of(key, list, must)
        if not all(isinstance(text, str) for text in value):
            raise self.refused(key, must)
        return value

    def inside(self, key: str) -> "Fields":
        """An object."""
        return self._within(self.of(key, dict, "an object"), key)

    def each(self, key: str) -> "list[Fields]":
        """A list of objects."""
        must = "a list of objects"
        values = self.of(key, list, must)
        if not all(isinstance(value, dict) for value in values):
            raise self.refused(key, must)
        return [self._within(value, f"{key}[{n}]") for n, value in enumerate(values)]

    def _within(self, values: Mapping[str, Any], key: str) -> "Fields":
        return Fields(values, self.where, self.error, self.mend, f"{self.path}{key}.")


def first_wrong(value: Any, wrong: Callable[[str], str], depth: int = 0) -> tuple[str, str] | None:
    """The first thing that is wrong in a JSON value: (where it stands, what it is). Keys are looked at too.

    Args:
        wrong: says of a text what is wrong with it; "" of one that is right.
    """
    if isinstance(value, str):
        return ("", found) if (found := wrong(value)) else None
    if depth > MAX_DEPTH:
        return "", f"more than {MAX_DEPTH} values inside one another"
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        if isinstance(key, str) and (
            found := f"a name of {len(key):,} characters" if len(key) > MAX_KEY else wrong(key)
        ):
            return "", found
        if isinstance(part, str | dict | list) and (inner := first_wrong(part, wrong, depth + 1)):
            return f".{key}{inner[0]}" if isinstance(key, str) else f"[{key}]{inner[0]}", inner[1]
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: two readers of a repeated one could take different values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object repeats a key")
    return found


def whole_lines(file: Path) -> list[Any]:
    """What JSON Lines hold that an earlier run was writing; a line that was cut off is taken out of the file."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    return [json.loads(line) for line in whole.split(b"\n")[:-1]]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(path: Path, but: str = "") -> int:
    """The bytes of all files under `path`, but those of a name."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name != but)
