"""One file over http or https into a folder, resumed where it broke off. Knows nothing of packs.

The server may be hostile: only http and https are followed, and no more is written than was allowed, whatever it says.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from lora_lexicon.errors import LexiconError, PackError
from lora_lexicon.folders import is_disk_full, read_record, write_record

SHOWN = 200  # characters of a wrong address that a message repeats
FILE = "file.part"
STATE = "state.json"
SECONDS = 30.0  # that a server may say nothing
IDLE = 5  # tries in a row that bring no byte
TRIES = 100
WAIT = 0.5  # seconds before the second try; doubled from one to the next
REDIRECTS = 5
SLOWEST = 1000  # bytes a second that a server must send, on the average of each
WINDOW = 60.0  # seconds
MARK = re.compile(r"[ -~]{1,200}")  # what fits into a header again
PASSING = (408, 425, 429, 500, 502, 503, 504)  # that another try may mend

ROOM = "free some, or name another folder in LORA_LEXICON_CACHE"

Progress = Callable[[int, int | None], None]


class _Broken(Exception):
    """A try that another may continue."""


def download(url: str, folder: Path, *, limit: int, progress: Progress | None = None) -> Path:
    """Downloads a file into a folder, and gives it. What an earlier call left there is continued.

    It is continued only if the server has a strong ETag or a date for it, and says that it is still the same file; what
    could not be continued does not stay.

    Args:
        folder: of this address alone.
        limit: bytes that the file may have.
        progress: called with (bytes here, bytes in all if the server told).

    Raises:
        PackError: nothing is there, it is too large, or the server breaks HTTP's rules.
        LexiconError: the server is out of reach, too slow, breaks off again and again, or the disk is full.
    """
    try:
        return _downloaded(url, folder, limit, progress)
    except BaseException:
        if not _marked(folder):
            (folder / FILE).unlink(missing_ok=True)
            (folder / STATE).unlink(missing_ok=True)
        raise


def _downloaded(url: str, folder: Path, limit: int, progress: Progress | None) -> Path:
    """As many tries as it takes."""
    idle, said = 0, ""
    with httpx2.Client(timeout=SECONDS, headers={"Accept-Encoding": "identity"}) as client:
        for _ in range(TRIES):
            before = _size(folder / FILE)
            try:
                _continue(client, url, folder, limit, progress)
                return folder / FILE
            except (httpx2.TransportError, _Broken) as error:
                idle = 0 if _size(folder / FILE) > before else idle + 1
                said = " ".join(str(error).split()) or type(error).__name__
                if idle == IDLE or isinstance(error, httpx2.ProxyError | httpx2.UnsupportedProtocol):
                    break
            time.sleep(WAIT * 2**idle)
    raise LexiconError(f"{shown(url)} cannot be had ({said}): check address and network, and give the command again")


def shown(url: str | httpx2.URL) -> str:
    """An address without what may be secret in it: user, password and query."""
    parts = httpx2.URL(url)
    return str(parts.copy_with(username=None, password=None, query=None, fragment=None))


def _continue(client: httpx2.Client, url: str, folder: Path, limit: int, progress: Progress | None) -> None:
    """One try."""
    file, mark = folder / FILE, _marked(folder)
    held = _size(file) if mark else 0
    asked = {"Range": f"bytes={held}-", "If-Range": mark} if held else {}
    with _answer(client, url, asked) as answer:
        start, total = _span(answer, held)
        if start < 0:
            file.unlink()
            raise _Broken("what came before is no part of what is there now")
        if total is not None and total > limit:
            raise PackError(f"{shown(url)} has {total:,} bytes, and {limit:,} are allowed: give a larger --max-size")
        free = shutil.disk_usage(folder).free
        if total is not None and total - start > free:
            lack = (total - start - free) / 1e9
            raise LexiconError(f"{folder} lacks {lack:,.2f} GB of space for {shown(url)}: {ROOM}")
        if answer.status_code != 416:
            try:
                _write(answer, url, folder, start, total, limit, progress)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                if total is None:
                    (folder / STATE).unlink(missing_ok=True)  # who knows whether it could ever fit
                raise LexiconError(f"{folder} has no space left for {shown(url)}: {ROOM}") from error
    if total is not None and _size(file) != total:
        raise _Broken(f"{_size(file):,} of {total:,} bytes came")


def _write(
    answer: httpx2.Response,
    url: str,
    folder: Path,
    start: int,
    total: int | None,
    limit: int,
    progress: Progress | None,
) -> None:
    """Writes what an answer holds to its place in the file."""
    write_record(folder / STATE, {"mark": _mark(answer)})
    with (folder / FILE).open("r+b" if start else "wb") as target:
        target.seek(start)
        since, before = time.monotonic(), start
        for chunk in answer.iter_raw():  # as it comes: what a larger chunk would hold back is lost when it breaks off
            if target.tell() + len(chunk) > limit:
                raise PackError(f"{shown(url)} has more than {limit:,} bytes: give a larger --max-size")
            target.write(chunk)
            if progress is not None:
                progress(target.tell(), total)
            spent = time.monotonic() - since
            if spent >= WINDOW:
                if target.tell() - before < SLOWEST * spent:
                    raise LexiconError(
                        f"{shown(url)} comes with less than {SLOWEST:,} bytes a second: give the command again later"
                    )
                since, before = time.monotonic(), target.tell()
        target.truncate()


@contextmanager
def _answer(client: httpx2.Client, url: str, asked: dict[str, str]) -> Iterator[httpx2.Response]:
    """What is at an address, redirects followed, if it can be read."""
    request = client.build_request("GET", url, headers=asked)
    for _ in range(REDIRECTS + 1):
        try:
            answer = client.send(request, stream=True)
        except (UnicodeError, httpx2.InvalidURL) as error:  # of a host that is none, here or where it leads
            raise PackError(f"{shown(request.url)[:SHOWN]} is no address that can be asked: check it") from error
        try:
            following = answer.next_request
            if following is None:
                _check(answer, url)
                yield answer
                return
        finally:
            answer.close()
        if following.url.scheme not in (("https",) if request.url.scheme == "https" else ("http", "https")):
            raise PackError(
                f"{shown(url)} leads to {shown(following.url)}, which is not followed: give an https address"
            )
        request = following
    raise PackError(f"{shown(url)} leads to more than {REDIRECTS} other addresses: give the last one")


def _check(answer: httpx2.Response, url: str) -> None:
    status = answer.status_code
    if status in (200, 206, 416):
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise PackError(f"{shown(url)} is sent compressed, which was not asked for: give another address")
        return
    if status in PASSING:
        raise _Broken(f"HTTP {status}")
    hints = {401: "it asks for a login: https://USER:PASSWORD@HOST/...", 403: "it may not be read: ask its owner"}
    raise PackError(f"{shown(url)} answers HTTP {status}: {hints.get(status, 'check the address')}")


def _span(answer: httpx2.Response, held: int) -> tuple[int, int | None]:
    """(where in the file an answer begins, the bytes of the whole file if it says); begins at -1 where none is left.

    Raises:
        PackError: another part than was asked for.
    """
    length = answer.headers.get("content-length", "")
    if answer.status_code == 200:
        return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None
    told = re.fullmatch(r"bytes (\*|\d{1,18}-\d{1,18})/(\d{1,18})", answer.headers.get("content-range", ""))
    if held and answer.status_code == 416:
        return (held, held) if told and int(told[2]) == held else (-1, None)  # it was whole already, or is another
    if held and told and told[1].startswith(f"{held}-"):
        return held, int(told[2])
    raise PackError(f"{shown(answer.url)} answers with another part of the file than was asked for: do not use it")


def _mark(answer: httpx2.Response) -> str:
    """What tells this file from another that comes in its place; "" where nothing does, or no header could hold it."""
    etag = answer.headers.get("etag", "")
    mark = etag if etag.startswith('"') else answer.headers.get("last-modified", "")
    return mark if MARK.fullmatch(mark) else ""


def _marked(folder: Path) -> str:
    """The mark of what lies in a folder already; "" where it cannot be continued."""
    try:
        mark = read_record(folder / STATE, PackError, "a download").get("mark")
    except PackError:
        return ""
    return mark if isinstance(mark, str) and MARK.fullmatch(mark) else ""


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
