"""The user's cache: archives, each unpacked when it is first used, and what is being downloaded, or broke off.

Knows nothing of what the files are.

A process locks the folders that it uses until it ends. When one more needs the room, the least recently used of the
others go.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_lexicon.archive import SUFFIX, holds, members, unpack
from lora_lexicon.errors import LexiconError, show_as
from lora_lexicon.folders import folder_bytes, locked, sha256_of, shared

LIMIT = 20 * 10**9  # bytes
DAY = 24 * 60 * 60  # seconds; where no locks tell, what was used since then counts as in use
OURS = re.compile(r"\.?[^.].*-[0-9a-f]{32}(\.\w{8}\.partial(\.old)?)?")  # also what a killed run left

STAGE = re.compile(r"[0-9a-f]{32}")  # of a download

_held: dict[Path, int | None] = {}  # the handles of the folders that this process uses


@dataclass(frozen=True)
class Cached:
    """A folder in the cache.

    Attributes:
        used: when it was last asked for, in seconds of `time.time`.
        in_use: by a process that runs.
    """

    folder: Path
    bytes: int
    used: float
    in_use: bool

    @property
    def name(self) -> str:
        """Within the cache: an archive's, or `downloads/` and a hash."""
        place = self.folder.parent.name
        return f"{place}/{self.folder.name}" if place == downloads().name else self.folder.name


def unpacked(file: Path) -> Path:
    """A folder with the files of an archive, in the cache, where it stays for the next time.

    What lies there is compared with the archive at each call, and is unpacked again where it differs. Messages name
    the archive in its place.

    Raises:
        PackError: as `archive.unpack`.
    """
    members(file)  # before all of it is read
    folder = cache_folder() / f"{file.name.removesuffix(SUFFIX)}-{sha256_of(file)[:32]}"
    limit = cache_limit()
    with _opened():
        if not holds(folder, file):
            shutil.rmtree(folder, ignore_errors=True)
            _trim(max(0, limit - file.stat().st_size))
            unpack(file, folder)
        before, _held[folder] = _held.get(folder), shared(folder)
        if before is not None:
            os.close(before)
        with suppress(OSError):  # another user's
            os.utime(folder)
    show_as(folder, file)
    return folder


@contextmanager
def staged(what: str, shown: object) -> Iterator[Path]:
    """A folder for what is downloaded, the same each time for the same `what`; others make room for it.

    It stays, so that a later call can go on.

    Args:
        shown: how a message names it.

    Raises:
        LexiconError: another process downloads it.
    """
    folder, limit = downloads() / hashlib.sha256(what.encode()).hexdigest()[:32], cache_limit()
    with ExitStack() as stack:
        with _opened():
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(locked(folder)) is False:
                raise LexiconError(f"another command brings {shown} now: run this one again when it is done")
            os.utime(folder)
            _trim(limit)
        yield folder


@contextmanager
def _opened() -> Iterator[None]:
    """The cache, there, while no other process adds to it or takes from it."""
    place = cache_folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LexiconError(
            f"{place} cannot be written ({error.strerror}): name another folder in LORA_LEXICON_CACHE"
        ) from error
    with locked(place, wait=True):
        yield


def downloads() -> Path:
    """Where what is downloaded lies until it is whole."""
    return cache_folder().with_name("downloads")


def cache_folder() -> Path:
    """Where archives are unpacked: LORA_LEXICON_CACHE, or the user's own place for such files."""
    given = os.environ.get("LORA_LEXICON_CACHE")
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-lexicon"
    return (Path(given) if given else place).resolve() / "packs"


def cache_limit() -> int:
    """Bytes that the cache may take: LORA_LEXICON_CACHE_BYTES, or 20 GB.

    Raises:
        LexiconError: it is no number.
    """
    given = os.environ.get("LORA_LEXICON_CACHE_BYTES") or str(LIMIT)
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise LexiconError(f"LORA_LEXICON_CACHE_BYTES is {given[:80]!r}: give a whole number of bytes, such as {LIMIT}")
    return int(given)


def cached() -> list[Cached]:
    """What lies in the cache, the least recently used first."""
    found = []
    there = [
        (folder, ours) for place, ours in ((cache_folder(), OURS), (downloads(), STAGE)) for folder in _entries(place)
    ]
    for folder, ours in there:
        if ours.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with suppress(FileNotFoundError), locked(folder) as free:  # unless another process removes it
                used = folder.stat().st_mtime
                in_use = time.time() - used < DAY if free is None else not free
                found.append(Cached(folder, folder_bytes(folder), used, in_use))
    return sorted(found, key=lambda one: one.used)


def _entries(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else []


def clear_cache() -> list[Cached]:
    """Removes what no process uses; returns what it was."""
    if not cached():
        return []
    with _opened():
        return _trim(-1)  # also what holds no bytes


def _trim(limit: int) -> list[Cached]:
    """Removes the least recently used that no process uses until the others take no more than `limit` bytes."""
    found = cached()
    total, removed = sum(one.bytes for one in found), []
    for one in found:
        if total > limit and not one.in_use:
            shutil.rmtree(one.folder, ignore_errors=True)
            total -= one.bytes
            removed.append(one)
    return removed
