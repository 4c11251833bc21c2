"""One thread owns the model: it takes waiting work into the batch between two steps, and tells each work what happens.

Work waits in one line with the changes of experts. A change waits until all that came before it is done, and what came
after it waits for the change: no work ever meets other experts than those it was routed for. Knows nothing of HTTP.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from lora_lexicon.compose.system import System
from lora_lexicon.errors import LexiconError
from lora_lexicon.inference.batch import Batch, Row, end_tokens
from lora_lexicon.inference.engine import Definition, certainty, definition, domain_of, experts_of, settle, text_of
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.work import AUTO, Ended, Event, Started, Token, Work, check_domain

Result = TypeVar("Result")
STEPS = 4  # to join costs a copy of the cache: with few places free, works join no more often than that
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """Something to do on the scheduler's thread."""

    run: Callable[[System], Any]
    future: "Future[Any]"


class Scheduler:
    """Writes definitions with one system.

    Args:
        batch_size: how many at once.
        limit: how many may wait.
        seen: told of each definition that was written.
    """

    def __init__(
        self,
        system: System,
        batch_size: int = 16,
        limit: int = 256,
        seen: Callable[[Definition], object] = lambda _: None,
    ) -> None:
        self.system, self.batch_size, self.limit, self._seen = system, batch_size, limit, seen
        self._batch, self._ends = Batch(system), end_tokens(system)
        self._exact = system.model.dtype == torch.float32
        self._line: deque[Work | _Call] = deque()
        self._calls: deque[_Call] = deque()
        self._running: list[Work] = []
        self._closing = False
        self._busy, self._finished, self._steps = 0.0, 0, 0
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """How many definitions wait."""
        with self._wake:
            return sum(isinstance(item, Work) for item in self._line)

    @property
    def running(self) -> int:
        """How many definitions are being written."""
        return len(self._running)

    def submit(self, works: Sequence[Work]) -> None:
        """Takes all of them, or none.

        Raises:
            Problem: there is not room for all, or the server is about to end.
        """
        with self._wake:
            self._need_open()
            waiting = sum(isinstance(item, Work) for item in self._line)
            if len(works) > self.limit:
                raise Problem(
                    413,
                    "too_many",
                    f"one call asks for {len(works)} definitions; here {self.limit} may wait: ask in parts",
                )
            if waiting + len(works) > self.limit:
                pace = self._busy / self._finished if self._finished else 0.1
                seconds = min(60, max(1, math.ceil(pace * waiting)))
                raise Problem(
                    429,
                    "queue_full",
                    f"{waiting} definitions wait already: try again in {seconds} s",
                    {"Retry-After": str(seconds)},
                )
            self._line.extend(works)
            self._wake.notify()

    def cancel(self, works: Sequence[Work]) -> None:
        """Frees the places of works that nobody waits for any more."""
        with self._wake:
            for work in works:
                work.cancelled = True
            self._line = deque(item for item in self._line if not (isinstance(item, Work) and item.cancelled))
            self._wake.notify()

    def ask(self, run: Callable[[System], Result]) -> "Future[Result]":
        """Does something short with the system between two steps; it must not change it."""
        return self._put(run, between_steps=True)

    def change(self, run: Callable[[System], Result]) -> "Future[Result]":
        """Changes the system's experts when all that was submitted before is done."""
        return self._put(run, between_steps=False)

    def close(self) -> None:
        """Takes nothing more, and returns when all that was taken is done."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _put(self, run: Callable[[System], Result], between_steps: bool) -> "Future[Result]":
        call = _Call(run, Future())
        with self._wake:
            self._need_open()
            line: deque[Any] = self._calls if between_steps else self._line  # others take their places
            if sum(isinstance(item, _Call) for item in line) >= self.limit:
                raise Problem(429, "queue_full", "too many calls wait already: try again in 1 s", {"Retry-After": "1"})
            line.append(call)
            self._wake.notify()
        return call.future

    def _need_open(self) -> None:
        if self._closing:
            raise Problem(
                503, "closing", "the server is about to end: ask another one, or later", {"Retry-After": "10"}
            )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._line or self._calls or self._running or self._closing)
                if not (self._line or self._calls or self._running):
                    return
                calls, self._calls = self._calls, deque()
            began = time.perf_counter()
            for call in calls:
                self._do(call)
            try:
                self._drop()
                if not self._admit():
                    self._batch.step()
                    self._steps += 1
                self._report()
            except Exception as error:  # of one batch: the server goes on
                self._batch, failed, self._running = Batch(self.system), self._running, []
                self._fail(failed, error)
            self._busy += time.perf_counter() - began

    def _do(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            call.future.set_result(call.run(self.system))
        except BaseException as error:
            call.future.set_exception(error)

    def _drop(self) -> None:
        """Lets go of what nobody waits for, and of what took too long."""
        now = time.monotonic()
        with self._wake:
            late = [item for item in self._line if isinstance(item, Work) and item.deadline < now]
            if late:
                self._line = deque(item for item in self._line if item not in late)
        late += [work for work in self._running if work.deadline < now]
        gone = [work for work in self._running if work.cancelled or work in late]
        if gone:
            self._batch.leave([work.row for work in gone if work.row])
            self._running = [work for work in self._running if work not in gone]
        for work in late:
            what = repr(work.term) if work.ids is None else "the text"
            self._tell(work, Problem(504, "timeout", f"{what} took longer than this server allows: try again later"))

    def _admit(self) -> bool:
        """Takes from the line what the batch has room for, or a change whose turn it is; whether it took anything."""
        works: list[Work] = []
        with self._wake:
            free = self.batch_size - len(self._running)
            if 4 * free < self.batch_size and self._steps < STEPS:
                free = 0
            while self._line and isinstance(first := self._line[0], Work) and len(works) < free:
                self._line.popleft()
                works.append(first)
            call = self._line[0] if self._line and not works and not self._running else None
            if isinstance(call, _Call):
                self._line.popleft()
        if isinstance(call, _Call):
            self._do(call)
            return True
        self._running += works  # before they are routed, so that they are told of a failure
        self._route([work for work in works if not (work.cancelled or work.row)])
        ready = self._with_room([work for work in works if not work.cancelled], works)
        self._running = [work for work in self._running if work in ready or work not in works]
        self._steps = 0 if ready else self._steps
        self._batch.join([work.row for work in ready if work.row])
        for work in ready:
            if work.row:
                self._tell(work, Started(domain_of(self.system, work.row), *certainty(work.row)))
        return bool(ready)

    def _with_room(self, works: list[Work], all_works: list[Work]) -> list[Work]:
        """Those whose experts there is room for beside the ones at work; the others go back to the head of the line.

        First come, first served: a work may pass those that must wait only if its experts are at work already, and
        not when one of them has been passed by as many as a batch holds. An expert that cannot be loaded ends its own
        works.
        """
        residents = self.system.residents
        if residents is None:
            return works
        held = frozenset().union(
            *(experts_of(work.row.weights) for work in self._running if work.row and work not in all_works)
        )
        ready: list[Work] = []
        waiting: list[Work] = []
        for work in works:
            assert work.row is not None
            own = experts_of(work.row.weights)
            passes = own <= held and all(other.passed < self.batch_size for other in waiting)
            if not residents.fit(held | own) or (waiting and not passes):
                waiting.append(work)
                continue
            try:
                residents.hold(held | own)
            except LexiconError as error:
                log.error("an expert cannot be loaded: %s", error)
                self._end(work, Problem(503, "expert_unavailable", str(error)))
                continue
            held |= own
            ready.append(work)
            for other in waiting:
                other.passed += 1
        with self._wake:
            self._line.extendleft(reversed(waiting))
        return ready

    def _route(self, works: list[Work]) -> None:
        """Gives works their rows. One that cannot be routed is told so, and takes no other with it."""
        try:
            self._give_rows(works)
        except Exception as error:
            if len(works) == 1:
                self._fail(works, error)
            else:
                for work in works:
                    self._route([work])

    def _give_rows(self, works: list[Work]) -> None:
        system = self.system
        asked = [work for work in works if work.domain == AUTO or system.routing_level != "domain"]
        chosen, routing = None, None
        if not system.routes_in_passing:
            chosen, routing = system.choose([(work.term, work.context) for work in asked])
        places = {work: i for i, work in enumerate(asked)}
        for work in works:
            i = places.get(work, 0)
            try:
                own = self._weights(work, None if chosen is None or work not in places else chosen[i])
            except Problem as problem:  # its domain has been removed
                self._end(work, problem)
                continue
            uniform = work.decoding.uniforms(work.term, work.context, work.sample)
            if work.ids is not None:
                work.row = Row(work.ids, own, uniform, work.decoding)
                continue
            encoded = system.encoder.row(work.term, work.context, "")
            work.row, work.cut = Row(encoded.ids[: encoded.prompt_length], own, uniform, work.decoding), encoded.cut
            if routing is not None and work.domain == AUTO:
                work.row.similarities = routing.similarities[i]

    def _weights(self, work: Work, chosen: "np.ndarray[Any, Any] | None") -> "np.ndarray[Any, Any] | None":
        """The routing weights of a work, (N,) or (L, N); `chosen` is what the system chose."""
        if work.domain == AUTO:
            return chosen
        names = self.system.experts
        check_domain(self.system, work.domain)
        if not names:
            return None
        weights = np.zeros(len(names), dtype=np.float32) if chosen is None else np.zeros_like(chosen)
        if work.domain in names:
            weights[..., names.index(work.domain)] = 1
        return weights

    def _report(self) -> None:
        """Tells what is new of each running work, and lets those go that are done."""
        for work in [work for work in self._running if work.row is not None]:
            assert work.row is not None
            if work.row.done:
                settle(self.system, work.row)
            if work.streamed:
                self._stream(work, work.row)
            if work.row.done:
                self._running.remove(work)
                answer = definition(self.system, (work.term, work.context), work.row)
                self._finished += 1
                self._seen(answer)
                whole = work.row.written[-1] in self._ends
                self._tell(work, Ended(answer, len(work.row.prompt), whole, work.cut))

    def _stream(self, work: Work, row: Row) -> None:
        """Tells what was added to the text; a character whose bytes are not all there yet waits for them.

        So does all from the first choice that rounding could have turned: `settle` says at the end what stands there.
        """
        if self._exact and not (row.done or row.alone or row.margin >= row.decoding.tolerance):
            return
        text = text_of(self.system, row.written)
        if text.startswith(work.told):
            if text == work.told or (text.endswith("\ufffd") and not row.done):
                return
            self._tell(work, Token(text[len(work.told) :]))
        elif row.done:
            self._tell(work, Token(text, replace=True))
        else:
            return
        work.told = text

    def _fail(self, works: list[Work], error: Exception) -> None:
        log.error("the model failed", exc_info=error)
        for work in works:
            self._end(work, Problem(500, "internal", "the model failed on this request: the server's log says why"))

    def _end(self, work: Work, problem: Problem) -> None:
        """Tells a work its problem, and nothing more; it is let go of when its turn comes."""
        self._tell(work, problem)
        work.cancelled = True

    def _tell(self, work: Work, event: Event) -> None:
        if not work.cancelled:
            try:
                work.tell(event)
            except RuntimeError:  # its event loop has ended
                work.cancelled = True
