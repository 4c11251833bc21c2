"""A model behind an OpenAI-compatible interface, asked by OpenAI's client. Knows nothing of definitions.

The key is read from OPENAI_API_KEY, and is in no setting, error or file. Busy servers (429), failing ones (5xx) and
those that do not answer in time are asked again by the client, with growing pauses or as `Retry-After` says.
"""

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lora_lexicon.errors import LexiconError, MissingExtraError, RecipeError
from lora_lexicon.experiments.prompts import MAX_ANSWER
from lora_lexicon.folders import CONTROL

if TYPE_CHECKING:
    import openai

Api = Literal["chat", "completions"]
Prompt = str | list[dict[str, str]]  # of completions a text, of chat its messages
KEY = "OPENAI_API_KEY"
LIMITS = ("max_completion_tokens", "max_tokens")  # of a chat, OpenAI's name and its older one: servers know either
TOO_LONG = re.compile(
    r"context.{0,10}(length|window|size)|prompt is too long|(input|prompt).{0,20}tokens?.{0,30}exceed|too many tokens",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: as it came; "" where the prompt was too long.
        too_long: the prompt does not fit what the model reads.
        finish: why the answer ended, in the server's word ("stop", "length" ...).
        prompt_tokens, completion_tokens: as the server counts them, None where it does not say.
    """

    text: str = ""
    too_long: bool = False
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


Ask = Callable[[Prompt], Awaitable[Answer]]


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and how.

    Attributes:
        url: the interface's root, such as https://api.openai.com/v1.
        temperature: None: is not sent, for models that take none.
        max_tokens: of an answer, what the model thinks included.
        concurrency: questions under way at once.
        timeout: seconds within which each try must be answered.
        retries: after a first try.
        name: what stands for the address in files; by default it does itself.
    """

    url: str
    model: str
    api: Api = "chat"
    temperature: float | None = 0.0
    max_tokens: int = 64
    concurrency: int = 8
    timeout: float = 60
    retries: int = 5
    name: str = ""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known, parts = False, urlsplit("")
        if not known:
            raise RecipeError(f"the endpoint {self.url!r} is no address: give one such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise RecipeError(f"the endpoint must be a plain address, which is written to files: the key is {KEY}'s")
        if self.api not in ("chat", "completions") or not self.model:
            raise RecipeError(f"api is {self.api!r} and model {self.model!r}: chat or completions, of a named model")
        if min(self.max_tokens, self.concurrency) < 1 or self.timeout <= 0 or self.retries < 0:
            raise RecipeError("max_tokens and concurrency are 1 or more, timeout is above 0, retries are 0 or more")

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on."""
        kept = ("model", "api", "temperature", "max_tokens")
        return {"url": self.name or self.url, **{key: value for key, value in asdict(self).items() if key in kept}}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Ask]:
        """Yields what asks it.

        Raises:
            MissingExtraError: OpenAI's client is not installed. Asking raises LexiconError, in one line, for all that
                asking again at once would not mend.
        """
        openai = need_openai()
        key = os.environ.get(KEY) or "none"  # of a server that needs none
        names = LIMITS if self.api == "chat" else LIMITS[1:]  # in the order in which they are tried
        async with openai.AsyncOpenAI(
            api_key=key, base_url=self.url, timeout=self.timeout, max_retries=self.retries
        ) as client:

            async def ask(prompt: Prompt) -> Answer:
                nonlocal names
                tried = names
                for name in tried:
                    try:
                        answer = _read(await self._sent(client, prompt, name), self)
                    except openai.APIError as error:
                        if _is_too_long(error):
                            return Answer(too_long=True)
                        if name == tried[-1] or not _refuses(error, name):
                            raise self._failed(openai, error, key) from error
                    else:
                        names = tuple(sorted(tried, key=lambda other: other != name))
                        return answer
                raise AssertionError("the last name has answered or failed")

            yield ask

    async def _sent(self, client: "openai.AsyncOpenAI", prompt: Prompt, limit: str) -> Any:
        options: dict[str, Any] = {"model": self.model, limit: self.max_tokens}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        try:
            if self.api == "chat":
                return await client.chat.completions.create(messages=prompt, **options)  # type: ignore[call-overload]
            return await client.completions.create(prompt=prompt, **options)  # type: ignore[call-overload]
        except (ValueError, RecursionError) as error:
            raise LexiconError(f"{self.url} answered with what is no JSON: it is no OpenAI-compatible API") from error

    def _failed(self, openai: Any, error: "openai.APIError", key: str) -> LexiconError:
        """An error in one line, without the key."""
        body: Any = error.body
        said = " ".join(str(body.get("message") if isinstance(body, dict) else error.message).split())
        said = CONTROL.sub(" ", said.replace(key, "***") if key != "none" else said)[:500]
        tries = f"{self.retries + 1} tries"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return LexiconError(f"{self.url} refuses the key ({said}): set {KEY} to one that may use {self.model!r}")
        if isinstance(error, openai.NotFoundError):
            return LexiconError(f"{self.url} has no model {self.model!r}, or no {self.api} interface ({said})")
        if isinstance(error, openai.APITimeoutError):
            return LexiconError(f"{self.url} did not answer within {self.timeout:g} s in {tries}: run this again later")
        if isinstance(error, openai.APIConnectionError):
            return LexiconError(f"{self.url} cannot be reached in {tries}: check the address, and that it is up")
        status = getattr(error, "status_code", 0)
        if status == 429 or status >= 500:
            return LexiconError(f"{self.url} still answers {status} after {tries} ({said}): run this again later")
        return LexiconError(f"{self.url} refuses what it is asked with {status} ({said})")


def need_openai() -> Any:
    """OpenAI's client.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise MissingExtraError("asking an endpoint", "openai", "openai") from error
    return openai


def _refuses(error: Any, name: str) -> bool:
    """Whether a server does not take an option."""
    return getattr(error, "status_code", None) in (400, 422) and name in error.message


def _is_too_long(error: Any) -> bool:
    refused = getattr(error, "status_code", None) in (400, 413, 422)
    return refused and (error.code == "context_length_exceeded" or bool(TOO_LONG.search(error.message)))


def _read(found: Any, endpoint: Endpoint) -> Answer:
    """The first choice of a completion. Servers send anything: OpenAI's client checks nothing of it."""
    try:
        choice = found.choices[0]
        text = choice.message.content if endpoint.api == "chat" else choice.text
        text, finish = text or "", str(choice.finish_reason or "")[:100]
    except (AttributeError, TypeError, IndexError, KeyError):
        text, finish = None, ""
    if not isinstance(text, str):
        raise LexiconError(
            f"{endpoint.url} answered with what is no completion: it is no OpenAI-compatible {endpoint.api} interface"
        )
    usage = getattr(found, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if type(count) is int and 0 <= count < 2**53 else None for count in counts)
    return Answer(text[:MAX_ANSWER], False, finish, prompt, completion)
