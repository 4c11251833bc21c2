"""`POST /define`: what is asked as works, and what is told of them as JSON or as server-sent events."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from lora_lexicon.data.terms import contains_term
from lora_lexicon.serve.line import Line, ignore, sent
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.schema import Define
from lora_lexicon.serve.work import Ended, Started, Token, Work

Said = tuple[str, dict[str, Any]]  # an event's name and data


class Asked:
    """A call's works: of each request its own, then one for every domain where all are asked."""

    def __init__(self, body: Define, domains: Sequence[str]) -> None:
        self.count, self._streamed, self._all = len(body.prompts), body.stream, body.all_domains
        names = (body.domain, *(domains if self._all else ()))
        self._each = len(names)
        self.works = [
            Work(prompt.term, prompt.context, name, body.decoding, ignore, streamed=body.stream and k == 0)
            for prompt in body.prompts
            for k, name in enumerate(names)
        ]

    async def told(self, line: Line) -> AsyncIterator[Said]:
        """`start`, `token`, `replace`, `end` and `error` events; one of the last two for each request.

        Raises:
            Problem: a request failed, and the call is not streamed; the others are dropped.
        """
        left = [self._each] * self.count
        ended: list[dict[int, Ended]] = [{} for _ in left]
        failed: set[int] = set()
        async with aclosing(aiter(line)) as events:
            async for place, event in events:
                i, k = divmod(place, self._each)
                if k == 0 and isinstance(event, Started):
                    values = {"domain": event.domain, "similarity": event.similarity, "margin": finite(event.margin)}
                    yield "start", {"index": i, **values}
                elif k == 0 and isinstance(event, Token):
                    yield "replace" if event.replace else "token", {"index": i, "text": event.text}
                elif isinstance(event, Ended | Problem):
                    left[i] -= 1
                    if isinstance(event, Ended):
                        ended[i][k] = event
                    # A domain may have been removed while what every domain answers was collected.
                    elif i not in failed and (k == 0 or event.kind != "unknown_domain"):
                        if not self._streamed:
                            raise event
                        failed.add(i)
                        yield "error", {"index": i, **event.body()}
                    if not left[i] and i not in failed:
                        yield "end", {"index": i, **self._answer(ended[i])}

    def _answer(self, ended: dict[int, Ended]) -> dict[str, Any]:
        answer = record(ended[0])
        if self._all:
            others = [ended[k].definition for k in sorted(ended) if k]
            answer["others"] = [
                {"domain": o.domain, "definition": o.text} for o in others if o.domain != answer["domain"]
            ]
        return answer


async def collected(events: AsyncIterator[Said], count: int) -> list[dict[str, Any]]:
    """The answers in order."""
    answers: list[dict[str, Any]] = [{}] * count
    async for kind, data in events:
        if kind == "end":
            answers[data.pop("index")] = data
    return answers


async def streamed(events: AsyncIterator[Said]) -> AsyncIterator[str]:
    """Server-sent events, `done` the last."""
    async for kind, data in events:
        yield sent(data, kind)
    yield sent({}, "done")


def record(ended: Ended) -> dict[str, Any]:
    """A definition as JSON."""
    own = ended.definition
    return {
        "term": own.term,
        "context": own.context,
        "definition": own.text,
        "domain": own.domain,
        "similarity": own.similarity,
        "margin": finite(own.margin),
        "tokens": own.tokens,
        "warnings": warnings(ended),
    }


def warnings(ended: Ended) -> list[str]:
    """What a person should know of an answer."""
    own, found = ended.definition, []
    if own.context and not contains_term(own.context, own.term):
        found.append(f"the context does not contain the term {own.term!r}")
    if ended.cut:
        found.append("the term and its context are longer than the model reads: only the words around the term were")
    if not ended.whole:
        found.append(f"the definition was cut off after {own.tokens} tokens: raise max_tokens")
    return found


def finite(value: float | None) -> float | None:
    """A number for JSON: one domain leads by infinity, which JSON does not have."""
    return None if value is None or value == float("inf") else value
