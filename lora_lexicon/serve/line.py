"""Works of one HTTP call: submitted together, told of as one stream on its event loop, dropped when the client goes."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import Request

from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.scheduler import Scheduler
from lora_lexicon.serve.work import Ended, Event, Work

Result = TypeVar("Result")
GONE = Problem(499, "gone", "the client has gone")


def ignore(_: Event) -> None:
    """Works are made before there is a line to tell."""


class Line:
    """Submits works; then an asynchronous iterator of (work's number, event).

    Args:
        seconds: within which all must be done.

    Raises:
        Problem: the scheduler does not take them; later, `GONE` where the client has left.
    """

    def __init__(self, scheduler: Scheduler, request: Request, works: Sequence[Work], seconds: float) -> None:
        self._scheduler, self._request, self._works = scheduler, request, works
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + seconds
        for i, work in enumerate(works):
            work.deadline = deadline
            work.tell = lambda event, i=i: loop.call_soon_threadsafe(self._events.put_nowait, (i, event))
        scheduler.submit(works)

    async def __aiter__(self) -> AsyncGenerator[tuple[int, Event], None]:
        watcher = asyncio.create_task(self._watch())
        left = len(self._works)
        try:
            while left:
                i, event = await self._events.get()
                if event is GONE:
                    raise GONE
                left -= isinstance(event, Ended | Problem)
                yield i, event
        finally:
            watcher.cancel()
            if left:
                self._scheduler.cancel(self._works)

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((-1, GONE))


async def result(future: "Future[Result]", seconds: float) -> Result:
    """What a call of the scheduler's gave.

    Raises:
        Problem: it took too long.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
    except TimeoutError:
        raise Problem(504, "timeout", f"this took more than {seconds:g} s: try again later") from None


def sent(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"
