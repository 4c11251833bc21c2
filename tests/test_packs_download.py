"""packs/download.py, against real servers that break off, lie, and lead elsewhere."""

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.errors import LexiconError, PackError
from lora_lexicon.packs import download as module
from lora_lexicon.packs.download import download

CONTENT = bytes(i * i % 251 for i in range(50_000))
OTHER = bytes(i * i % 241 for i in range(60_000))
LIMIT = 100_000


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.answer` says; `server.asked` is the ranges that were asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("range"))  # type: ignore[attr-defined]
        self.close_connection = True
        self.server.answer(self)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for key, value in {"content_length": len(body), "connection": "close", **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def part(self, content: bytes, *, mark: dict[str, str], upto: int | None = None) -> None:
        """What HTTP says of ranges; but the connection ends after `upto` bytes."""
        asked, told = self.headers.get("range"), self.headers.get("if-range")
        if asked is None or told not in mark.values():
            self.reply(200, content[:upto], content_length=len(content), **mark)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.reply(416, content_range=f"bytes */{len(content)}", **mark)
            return
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end = None if upto is None else start + upto
        self.reply(206, content[start:end], content_length=len(content) - start, content_range=span, **mark)


@contextmanager
def serving(answer: Callable[[Handler], object]) -> Iterator[tuple[str, list[str | None]]]:
    """(an address, what ranges were asked for there)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.asked = answer, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/x.lexpack", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True, scope="module")
def at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WAIT", 0)
        yield


ETAG = {"etag": '"one"'}


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, len(CONTENT)), max_size=8),
    mark=st.sampled_from([ETAG, {"last_modified": "Thu, 26 Nov 2026 00:00:00 GMT"}, {}, {"etag": 'W/"weak"'}]),
)
def test_however_often_it_breaks_off_the_file_comes_whole(cuts: list[int], mark: dict[str, str]) -> None:
    left = iter(cuts[:3] if not mark or "W/" in str(mark) else cuts)
    with (
        TemporaryDirectory() as folder,
        serving(lambda h: h.part(CONTENT, mark=mark, upto=next(left, None))) as (url, _),
    ):
        seen: list[tuple[int, int | None]] = []
        file = download(url, Path(folder), limit=LIMIT, progress=lambda done, total: seen.append((done, total)))
        assert file.read_bytes() == CONTENT
        assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_another_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    tries = iter([20_000])
    with serving(lambda h: h.part(CONTENT, mark=ETAG, upto=next(tries, 0))) as (url, asked):
        with pytest.raises(LexiconError, match="again") as refusal:
            download(url, tmp_path, limit=LIMIT)
        assert "\n" not in str(refusal.value)
        assert asked == [None, *["bytes=20000-"] * module.IDLE]
    assert (tmp_path / module.FILE).read_bytes() == CONTENT[:20_000]
    with serving(lambda h: h.part(CONTENT, mark=ETAG)) as (url, asked):
        assert download(url, tmp_path, limit=LIMIT).read_bytes() == CONTENT
        assert download(url, tmp_path, limit=LIMIT).read_bytes() == CONTENT
    assert asked == ["bytes=20000-", "bytes=50000-"]


def test_another_file_in_its_place_begins_anew(tmp_path: Path) -> None:
    tries = iter([lambda h: h.part(CONTENT, mark=ETAG, upto=20_000)])
    with serving(lambda h: next(tries, lambda h: h.part(OTHER, mark={"etag": '"two"'}))(h)) as (url, asked):
        assert download(url, tmp_path, limit=LIMIT).read_bytes() == OTHER
    assert asked == [None, "bytes=20000-"]


def test_a_shorter_file_in_its_place_begins_anew(tmp_path: Path) -> None:
    tries = iter([lambda h: h.part(CONTENT, mark=ETAG, upto=20_000)])
    with serving(lambda h: next(tries, lambda h: h.part(CONTENT[:99], mark=ETAG))(h)) as (url, _):
        assert download(url, tmp_path, limit=LIMIT).read_bytes() == CONTENT[:99]


@pytest.mark.parametrize("mark", ['"\xff"', '"' + "a" * 300, "\xe9"])
def test_a_mark_that_no_header_can_hold_spoils_nothing(tmp_path: Path, mark: str) -> None:
    name = "etag" if mark.startswith('"') else "last_modified"
    with serving(lambda h: h.part(CONTENT, mark={name: mark}, upto=20_000)) as (url, asked):
        with pytest.raises(LexiconError, match="again"):
            download(url, tmp_path, limit=LIMIT)
        assert {*asked} == {None}
    assert not list(tmp_path.iterdir())
    for state in ("nonsense", "{}", json.dumps({"mark": mark})):  # whoever left it
        (tmp_path / module.STATE).write_text(state)
        (tmp_path / module.FILE).write_bytes(b"left")
        with serving(lambda h: h.part(CONTENT, mark=ETAG)) as (url, asked):
            assert download(url, tmp_path, limit=LIMIT).read_bytes() == CONTENT
        assert asked == [None]


@pytest.mark.parametrize("told", [True, False])
def test_on_a_full_disk_only_what_can_be_continued_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    def full(done: int, _: int | None) -> None:
        if done > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    length = len(CONTENT) if told else None
    with serving(lambda h: h.reply(200, CONTENT, content_length=length, **ETAG)) as (url, _):
        with pytest.raises(LexiconError, match=f"{tmp_path} has no space left .* LORA_LEXICON_CACHE") as refusal:
            download(url, tmp_path, limit=LIMIT, progress=full)
        assert "\n" not in str(refusal.value)
    assert (module._size(tmp_path / module.FILE) > 20_000) == told
    assert bool(list(tmp_path.iterdir())) == told


def test_a_server_that_trickles_is_given_up_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW", 0.2)

    def trickle(handler: Handler) -> None:
        handler.reply(200, content_length=len(CONTENT), **ETAG)
        with suppress(OSError):
            for n in range(1000):
                handler.wfile.write(CONTENT[n : n + 1])
                time.sleep(0.01)

    with serving(trickle) as (url, _), pytest.raises(LexiconError, match="1,000 bytes a second"):
        download(url, tmp_path, limit=LIMIT)
    held = module._size(tmp_path / module.FILE)
    assert 0 < held < 200
    with serving(lambda h: h.part(CONTENT, mark=ETAG)) as (url, asked):
        assert download(url, tmp_path, limit=LIMIT).read_bytes() == CONTENT
    assert asked == [f"bytes={held}-"]


def endless(handler: Handler) -> None:
    handler.reply(200, content_length=None)
    try:
        while True:
            handler.wfile.write(bytes(2**16))
    except OSError:
        pass


HOSTILE: dict[str, tuple[Callable[[Handler], object], str]] = {
    "nothing": (lambda h: h.reply(404), "HTTP 404"),
    "a login": (lambda h: h.reply(401), "USER:PASSWORD"),
    "no leave": (lambda h: h.reply(403), "HTTP 403"),
    "a broken server": (lambda h: h.reply(500), "HTTP 500"),
    "no content": (lambda h: h.reply(204, content_length=None), "HTTP 204"),
    "too large": (lambda h: h.reply(200, content_length=10**17), "--max-size"),
    "endless": (endless, "--max-size"),
    "less than promised": (lambda h: h.reply(200, CONTENT, content_length=LIMIT), "again"),
    "a part unasked": (lambda h: h.reply(206, CONTENT, content_range="bytes 0-49999/50000"), "another part"),
    "a part that does not say which": (lambda h: h.reply(206, CONTENT), "another part"),
    "a range that cannot be": (lambda h: h.reply(416), "another part"),
    "compressed": (lambda h: h.reply(200, CONTENT, content_encoding="gzip"), "compressed"),
    "no HTTP": (lambda h: h.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"), "again"),
    "a round": (lambda h: h.reply(302, location="/x.lexpack"), "5 other addresses"),
    "a file here": (lambda h: h.reply(302, location="file:///etc/passwd"), "not followed"),
    "another scheme": (lambda h: h.reply(302, location="ftp://127.0.0.1/x"), "not followed"),
    "no address": (lambda h: h.reply(302, location="http://[::1/"), "HTTP 302"),
    "no host": (lambda h: h.reply(302, location=f"http://{'a' * 300}.example/"), "no address"),
    "nowhere": (lambda h: h.reply(302), "HTTP 302"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_server_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    answer, match = HOSTILE[what]
    with serving(answer) as (url, _), pytest.raises(LexiconError, match=match) as refusal:
        download(url.replace("//", "//user:secret@"), tmp_path, limit=LIMIT)
    assert "\n" not in str(refusal.value)
    assert "secret" not in str(refusal.value)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= LIMIT + 100


def test_part_of_another_file_under_the_old_mark_is_not_taken_for_more_than_it_is(tmp_path: Path) -> None:
    tries = iter([lambda h: h.part(CONTENT, mark=ETAG, upto=20_000)])

    def lie(handler: Handler) -> None:
        handler.reply(206, CONTENT[:9], content_range="bytes 0-8/50000")

    with serving(lambda h: next(tries, lie)(h)) as (url, _), pytest.raises(PackError, match="another part"):
        download(url, tmp_path, limit=LIMIT)


def test_redirects_are_followed_and_a_pause_is_waited_for(tmp_path: Path) -> None:
    tries = iter(
        [lambda h: h.reply(503), lambda h: h.reply(307, location="/y?token=1"), lambda h: h.reply(301, location="z")]
    )
    with serving(lambda h: next(tries, lambda h: h.part(CONTENT, mark={}))(h)) as (url, asked):
        assert download(url, tmp_path, limit=LIMIT).read_bytes() == CONTENT
    assert len(asked) == 4


def test_https_does_not_lead_to_http() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(302, headers={"location": "http://example.org/x"})

    client = httpx.Client(transport=httpx.MockTransport(answer))
    with pytest.raises(PackError, match="not followed"), module._answer(client, "https://example.org/x", {}):
        pass
    assert seen == ["https://example.org/x"]


def test_out_of_reach_is_one_line(tmp_path: Path) -> None:
    with serving(lambda h: h.reply(200)) as (url, _):
        pass
    with pytest.raises(LexiconError, match="cannot be had") as refusal:
        download(url, tmp_path, limit=LIMIT)
    assert "\n" not in str(refusal.value)


def test_no_space_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10_000))  # type: ignore[attr-defined]
    with serving(lambda h: h.part(CONTENT, mark=ETAG)) as (url, _), pytest.raises(LexiconError, match="space"):
        download(url, tmp_path, limit=LIMIT)
