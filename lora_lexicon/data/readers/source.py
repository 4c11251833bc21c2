"""What every reader shares: its options, and the lines of a plain or gzipped text file. Knows no format."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from lora_lexicon.errors import DataError

MAX_LINE_BYTES = 8 * 2**20
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_REPORT_EVERY = 1000  # lines between two reports of progress


def _ignore(_: int) -> None: ...


@dataclass(frozen=True)
class Options:
    """How an input is read.

    Args:
        columns: a column's name for a field of `Entry` or `split`, where no common alias fits.
        source: the source of rows whose input has no place for one; "" stands for the file's name.
        advance: called with the number of bytes (rows, for a Hub data set) read since its last call.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    advance: Callable[[int], None] = _ignore


@dataclass(frozen=True)
class Input:
    """One input after recognition: its format, what to read, all its files and its size in bytes (0: not known)."""

    format: str
    name: str
    files: tuple[Path, ...] = ()
    size: int = 0

    @property
    def path(self) -> Path:
        """The file or folder given to the reader."""
        return Path(self.name)


def stem(path: Path) -> str:
    """The file's name without its suffixes: the source of rows whose input names none."""
    return path.name.split(".")[0] or path.name


def open_bytes(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """(the decompressed stream, the file under it) of a plain or gzipped file."""
    raw = path.open("rb")
    gzipped = raw.read(2) == _GZIP
    raw.seek(0)
    if path.suffix in (".gz", ".dz") and not gzipped:
        raw.close()
        raise DataError(f"{path} is no gzip file, as its name says: fetch it again, or rename it")
    return (cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if gzipped else raw), raw


def read_all(path: Path) -> bytes:
    """A whole file, decompressed."""
    stream, raw = open_bytes(path)
    with raw:
        try:
            return stream.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from error


def lines(path: Path, options: Options) -> Iterator[tuple[int, str | None]]:
    """Yields (line number from 1, the line with its end), or None for a line of more than `MAX_LINE_BYTES`.

    Bytes that are no UTF-8 become lone surrogates, which `clean` reports for the row they stand in.

    Raises:
        DataError: a gzip stream that is damaged or ends early.
    """
    stream, raw = open_bytes(path)
    with raw:
        number, reported = 0, 0
        try:
            while line := stream.readline(MAX_LINE_BYTES):
                number += 1
                overlong = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
                while overlong and (more := stream.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
                if number == 1:
                    line = line.removeprefix(_BOM)
                yield number, None if overlong else line.decode("utf-8", "surrogateescape")
                if number % _REPORT_EVERY == 0:
                    options.advance(raw.tell() - reported)
                    reported = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file (after line {number}: {error}): fetch it again") from error
        finally:  # also where no more lines are wanted
            options.advance(raw.tell() - reported)


def head_of(path: Path, count: int = 20) -> list[str]:
    """The first `count` lines that are not blank, without their ends, for recognition."""
    found: list[str] = []
    for number, line in lines(path, Options()):
        if line and line.strip():
            found.append(line.rstrip("\r\n"))
        if len(found) == count or number > 10 * count:
            break
    return found
