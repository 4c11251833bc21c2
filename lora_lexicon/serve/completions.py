"""OpenAI's interface: `/v1/completions`, `/v1/chat/completions` and `/v1/models`.

A model is a domain, `base`, or `auto`. What is asked is a definition, or a text that the model continues as it is.
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import uuid4

from lora_lexicon.compose.system import System
from lora_lexicon.serve.line import Line, ignore, sent
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.schema import TOO_LONG, Chat, Completion, Prompt
from lora_lexicon.serve.work import AUTO, BASE, Ended, Token, Work, answers_as_base

Asked = Prompt | str | list[dict[str, str]]  # a definition; a text; a chat


def models(system: System, since: int) -> dict[str, Any]:
    """What a completion's `model` may be."""
    names = [AUTO, *([BASE] if answers_as_base(system) else []), *system.experts]
    listed = [{"id": name, "object": "model", "created": since, "owned_by": system.name} for name in names]
    return {"object": "list", "data": listed}


def encoded(system: System, body: Completion | Chat, prompts: Sequence[Asked], context: int) -> list[list[int] | None]:
    """The tokens of texts and chats, a text's after BOS; None of definitions, which the scheduler encodes.

    Args:
        context: the most tokens of a text and its continuation, where the model reads as many.

    Raises:
        Problem: a text is too long or empty, the chat template refuses it, or `auto` would have to route it.
    """
    found: list[list[int] | None] = []
    limit = min(context, getattr(system.model.config, "max_position_embeddings", None) or context)
    for prompt in prompts:
        if isinstance(prompt, Prompt):
            found.append(None)
            continue
        if body.model == AUTO and system.experts and system.routing_level != "token":
            known = ", ".join([*([BASE] if answers_as_base(system) else []), *system.experts])
            message = f"a text has no term to route it by: name the model that is to continue it, one of {known}"
            raise Problem(422, "not_routed", message)
        ids = _tokens(system, prompt)
        longest = body.decoding.max_new_tokens
        if len(ids) + longest > limit:
            message = (
                f"at most {limit} tokens are read and written here, and this text has {len(ids)}, with {longest} to be "
                "written: shorten it, or lower max_tokens"
            )
            raise Problem(400, TOO_LONG, message)
        found.append(ids)
    return found


def _tokens(system: System, prompt: str | list[dict[str, str]]) -> list[int]:
    tokenizer: Any = system.tokenizer
    if isinstance(prompt, list) and tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever the template raises
            message = f"the model's chat template refuses these messages ({error}): change their roles or order"
            raise Problem(422, "invalid_request", message) from error
        return tokenizer.encode(text, add_special_tokens=False)
    text = prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *tokenizer.encode(text, add_special_tokens=False)]


def works_of(body: Completion | Chat, prompts: Sequence[Asked], tokens: Sequence[list[int] | None]) -> list[Work]:
    """Of each prompt `n` samples, as choices are numbered."""
    plain = replace(body.decoding, repetition_penalty=1.0)  # a text may be full of examples of what is to be written
    works = []
    for prompt, ids in zip(prompts, tokens, strict=True):
        is_term = isinstance(prompt, Prompt)
        asked = (prompt.term, prompt.context) if is_term else (str(prompt), "")
        decoding, streamed = body.decoding if is_term else plain, bool(body.stream)
        works += [
            Work(*asked, body.model, decoding, ignore, sample=k, streamed=streamed, ids=ids) for k in range(body.n or 1)
        ]
    return works


class Completed:
    """The answer to one call, whole or in chunks."""

    def __init__(self, body: Completion | Chat) -> None:
        self._samples, self._usage = body.n or 1, bool(body.stream_options and body.stream_options.include_usage)
        self._chat = isinstance(body, Chat)
        kind = "text_completion" if not self._chat else "chat.completion.chunk" if body.stream else "chat.completion"
        self._fields = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
        }
        self._tokens = [0, 0]
        self._begun: set[int] = set()

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
                    choices[place] = self._choice(place, event.definition.text, _reason(event))
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
                    yield sent({**self._fields, "choices": [self._chunk(place, event.text, None)]})
                elif isinstance(event, Ended):
                    self._count(place, event)
                    yield sent({**self._fields, "choices": [self._chunk(place, "", _reason(event))]})
            else:
                if self._usage:
                    yield sent({**self._fields, "choices": [], "usage": self._used()})
        yield sent("[DONE]")

    def _choice(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": place, **said, "logprobs": None, "finish_reason": reason}

    def _chunk(self, place: int, text: str, reason: str | None) -> dict[str, Any]:
        """A choice of a stream; in a chat the first of each says who speaks, and only that: clients join them."""
        if not self._chat:
            return self._choice(place, text, reason)
        role = {} if place in self._begun else {"role": "assistant"}
        self._begun.add(place)
        return {"index": place, "delta": {**role, "content": text}, "logprobs": None, "finish_reason": reason}

    def _count(self, place: int, event: Ended) -> None:
        if place % self._samples == 0:  # samples share their prompt
            self._tokens[0] += event.prompt_tokens
        self._tokens[1] += event.definition.tokens

    def _used(self) -> dict[str, int]:
        prompt, completion = self._tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


TURNED = Problem(503, "turned", "rounding turned a choice while this was streamed: ask again, or without stream")


def _reason(event: Ended) -> str:
    return "stop" if event.whole else "length"
