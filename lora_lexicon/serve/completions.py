"""OpenAI's interface: `/v1/completions` and `/v1/models`, where a model is a domain, `base`, or `auto`."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from lora_lexicon.compose.system import System
from lora_lexicon.serve.line import Line, ignore, sent
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.schema import Completion
from lora_lexicon.serve.work import AUTO, BASE, Ended, Token, Work, answers_as_base


def models(system: System, since: int) -> dict[str, Any]:
    """What a completion's `model` may be."""
    names = [AUTO, *([BASE] if answers_as_base(system) else []), *system.experts]
    listed = [{"id": name, "object": "model", "created": since, "owned_by": system.name} for name in names]
    return {"object": "list", "data": listed}


def works_of(body: Completion) -> list[Work]:
    """Of each prompt `n` samples, as choices are numbered."""
    return [
        Work(prompt.term, prompt.context, body.model, body.decoding, ignore, sample=k, streamed=bool(body.stream))
        for prompt in body.prompts
        for k in range(body.n or 1)
    ]


class Completed:
    """The answer to one call, whole or in chunks."""

    def __init__(self, body: Completion) -> None:
        self._samples, self._usage = body.n or 1, bool(body.stream_options and body.stream_options.include_usage)
        self._fields = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._tokens = [0, 0]

    async def whole(self, line: Line) -> dict[str, Any]:
        """One object.

        Raises:
            Problem: one of the works failed; the others are dropped.
        """
        choices = {}
        async with aclosing(aiter(line)) as events:
            async for place, event in events:
                if isinstance(event, Problem):
                    raise event
                if isinstance(event, Ended):
                    self._count(place, event)
                    choices[place] = _choice(place, event.definition.text, _reason(event))
        return {**self._fields, "choices": [choices[i] for i in sorted(choices)], "usage": self._used()}

    async def chunks(self, line: Line) -> AsyncIterator[str]:
        """Server-sent events, `[DONE]` the last.

        Text that was sent cannot be taken back here: where the last, exact decoding differs from it, the choice ends
        with an error.
        """
        async with aclosing(aiter(line)) as events:
            async for place, event in events:
                if isinstance(event, Problem):
                    yield sent(event.body(openai=True))
                    break
                if isinstance(event, Token):
                    if event.replace:
                        yield sent(TURNED.body(openai=True))
                        break
                    yield sent({**self._fields, "choices": [_choice(place, event.text, None)]})
                elif isinstance(event, Ended):
                    self._count(place, event)
                    yield sent({**self._fields, "choices": [_choice(place, "", _reason(event))]})
            else:
                if self._usage:
                    yield sent({**self._fields, "choices": [], "usage": self._used()})
        yield sent("[DONE]")

    def _count(self, place: int, event: Ended) -> None:
        if place % self._samples == 0:  # samples share their prompt
            self._tokens[0] += event.prompt_tokens
        self._tokens[1] += event.definition.tokens

    def _used(self) -> dict[str, int]:
        prompt, completion = self._tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


TURNED = Problem(503, "turned", "rounding turned a choice while this was streamed: ask again, or without stream")


def _choice(place: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": reason}


def _reason(event: Ended) -> str:
    return "stop" if event.whole else "length"
