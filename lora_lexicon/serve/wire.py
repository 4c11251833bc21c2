"""Connections: how many there may be, and how long each may take to ask and to read. Knows nothing of what is asked.

uvicorn bounds the size of a request's head, and closes what idles between two requests; but not what never asks, asks
a byte at a time, or leaves its answer unread.
"""

import asyncio
import json
import os
import signal
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_lexicon.serve.problems import Problem

HEAD_SECONDS = 20  # within which a connection must have asked something
READ_SECONDS = 60  # within which a client must take what waits for it
IDLE = 256  # connections beside those whose requests may wait or be worked on

FILES = 128  # that the process may have open beside its connections

UNREADABLE = Problem(400, "invalid_http", "this is no HTTP request that can be read: docs/serve.md shows some")
CROWDED = Problem(503, "too_many_connections", "too many connections are open: close some, or try again later")


class Server(uvicorn.Server):
    """uvicorn's, which a second Ctrl-C ends at once: torch's threads would not let the interpreter end in order."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            os._exit(128 + sig)  # nothing is being written
        super().handle_exit(sig, frame)


def room_for(connections: int) -> int:
    """How many connections the system lets this process have, at most those; its limit is raised where it may be."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which has no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft - FILES)


class Connection(H11Protocol):
    """uvicorn's, with an end to patience. Of its config `limit_concurrency` is how many may be open."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._most, self.limit_concurrency = self.limit_concurrency, None  # uvicorn would answer in plain text
        self._asking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            self._refuse(CROWDED)
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(UNREADABLE)

    def _idles(self) -> bool:
        """Whether no request is being answered; its body's time is the gate's to limit."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._idles() and self._asking is not None:
            self._asking.cancel()
            self._asking = None
        elif self._idles() and self._asking is None:
            self._asking = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._asking = None
        if self._idles():
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """A problem of the connection as its last answer, or as its end where an answer has begun."""
        if self._idles() or not self.cycle.response_started:
            body = json.dumps(problem.body()).encode()
            head = (
                f"HTTP/1.1 {problem.status} {problem.kind}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            )
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
