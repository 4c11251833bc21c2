"""serve/wire.py: uvicorn with its connections, in front of an app of a few lines; no client can hold them for good."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn

from lora_lexicon.serve import wire

ASK = b"GET /%s HTTP/1.1\r\nhost: localhost\r\n\r\n"
Place = tuple[str, int]


class App:
    """Answers `ok`: at /slow late, at /large with more than any buffer holds, at /early without reading the body."""

    def __init__(self) -> None:
        self.left = threading.Event()  # the client of /large is known to have gone
        self.seconds = 0.6

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/slow":
            await asyncio.sleep(self.seconds)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        if scope["path"] == "/large":
            for _ in range(100):
                await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def serve(app: App, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Place]]:
    """Starts a server whose patience is short; its address."""
    monkeypatch.setattr(wire, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(wire, "READ_SECONDS", 0.3)
    stack = ExitStack()

    def start(most: int = 10) -> Place:
        place = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, http=wire.Connection, ws="none", lifespan="off", log_level="critical", limit_concurrency=most
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        stack.callback(thread.join, 20)
        stack.callback(setattr, server, "should_exit", True)
        return place.getsockname()

    with stack:
        yield start


@contextmanager
def connection(place: Place) -> Iterator[socket.socket]:
    with socket.create_connection(place, timeout=20) as client:
        yield client


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    try:
        while data := client.recv(2**16):
            found += data
    except ConnectionResetError:
        pass
    return found


def ask(client: socket.socket, path: bytes = b"") -> bytes:
    """One answer, which ends in `ok`; the connection stays."""
    client.sendall(ASK % path)
    found = b""
    while b"ok\r\n0\r\n\r\n" not in found:
        data = client.recv(2**16)
        assert data, found
        found += data
    return found


def drips(client: socket.socket) -> bool:
    """Sends a byte at a time; whether the server had enough of it."""
    try:
        for _ in range(1000):
            client.sendall(b"x")
            time.sleep(0.02)
    except OSError:
        return True
    return False


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert b"connection: close" in head
    return json.loads(body)["error"]


def test_who_asks_nothing_is_let_go_of(serve: Callable[..., Place]) -> None:
    """What never asks, and what asks a byte at a time: in the first request and in the second."""
    place = serve()
    with connection(place) as silent, connection(place) as slow, connection(place) as second:
        assert ask(second).startswith(b"HTTP/1.1 200")
        second.sendall(ASK[:20])
        assert drips(slow)
        assert rest(silent) == rest(second) == b""


def test_a_body_that_goes_on_after_its_answer(serve: Callable[..., Place]) -> None:
    place = serve()
    with connection(place) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n")
        assert drips(client)


def test_who_waits_for_an_answer_is_not_let_go_of(serve: Callable[..., Place], app: App) -> None:
    place = serve()
    with connection(place) as client:
        assert app.seconds > wire.HEAD_SECONDS
        assert [ask(client, b"slow")[:15] for _ in range(2)] == [b"HTTP/1.1 200 OK"] * 2


def test_who_does_not_read_is_let_go_of(serve: Callable[..., Place], app: App) -> None:
    with connection(serve()) as client:
        client.sendall(ASK % b"large")
        assert app.left.wait(20)


def test_no_more_connections_than_there_may_be(serve: Callable[..., Place]) -> None:
    place = serve(most=3)
    with ExitStack() as stack:
        held = [stack.enter_context(connection(place)) for _ in range(3)]
        for client in held:
            ask(client)
        with connection(place) as fourth:
            assert error_of(rest(fourth))["type"] == "too_many_connections"
        held[0].close()
        for _ in range(100):  # until the server has seen it go
            with connection(place) as fourth:
                fourth.sendall(ASK % b"")
                if fourth.recv(15) == b"HTTP/1.1 200 OK":
                    return
            time.sleep(0.02)
        raise AssertionError("the place is still taken")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n",  # TLS
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000,
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n",
    ],
)
def test_what_is_no_request_is_told_so(serve: Callable[..., Place], sent: bytes) -> None:
    place = serve()
    with connection(place) as client:
        client.sendall(sent)
        assert error_of(rest(client))["type"] == "invalid_http"
    with connection(place) as client:
        assert ask(client).startswith(b"HTTP/1.1 200")


def test_the_system_s_limit_of_open_files() -> None:
    """Is raised as far as it may be; fewer connections are taken where that does not suffice."""
    script = (
        "import resource as r; from lora_lexicon.serve.wire import FILES, room_for;"
        "r.setrlimit(r.RLIMIT_NOFILE, (FILES + 20, FILES + 70)); asked = room_for(10), room_for(50), room_for(1000);"
        "assert asked == (10, 50, 70), asked; assert r.getrlimit(r.RLIMIT_NOFILE) == (FILES + 70, FILES + 70)"
    )
    pytest.importorskip("resource")
    subprocess.run([sys.executable, "-c", script], check=True)
