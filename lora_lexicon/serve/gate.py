"""What stands before every route: which host, whose token, what content and how much. Counts and times requests."""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any

from lora_lexicon.serve.metrics import Metrics
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.schema import MAX_BODY

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

READING = ("/define", "/route", "/v1/completions", "/v1/chat/completions")  # may be posted without a change
PAGE = ("/", "/page/")  # holds nothing of the model, and asks for the token
BODY_SECONDS = 20  # within which a request's body must have come
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone."""
    try:
        return host.lower() == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """An ASGI middleware.

    Args:
        host: where the server listens. On a loopback address, requests must name it (another name is some web page's,
            that had it point here), and only what changes the server needs the token. Elsewhere all but the page does.
        token: None: nothing may change the server.
        known: whether a route takes a request. What none takes needs no token where reading is open: it is told so.
    """

    def __init__(
        self, app: Any, host: str, token: str | None, metrics: Metrics, known: Callable[[Message], bool]
    ) -> None:
        self._app, self._metrics, self._known = app, metrics, known
        self._token = None if token is None else token.encode()
        self._local = is_loopback(host)
        self._hosts = {"localhost", "127.0.0.1", "::1", host.lower()}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, method = time.perf_counter(), 500, scope["method"]
        scope = {**scope, "method": "GET" if method == "HEAD" else method}  # what sends the answer leaves out its body

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check(scope, headers)
            await self._app(scope, await _with_body(headers, receive), answer)
        except Problem as problem:
            await respond(problem, scope["path"], answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(method, route, status, time.perf_counter() - began)

    def _check(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        method, path = scope["method"], scope["path"]
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self._local and name not in self._hosts:
            raise Problem(400, "wrong_host", "this server answers under the name it listens at: use http://127.0.0.1")
        reads = method == "GET" or (method == "POST" and path in READING) or not self._known(scope)
        public = method == "GET" and (path == PAGE[0] or path.startswith(PAGE[1]))
        if not (reads if self._local else public):
            self._check_token(headers.get(b"authorization", b""))
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and self._known(scope) and kind != b"application/json":
            raise Problem(415, "wrong_content_type", "the body must be JSON: send Content-Type: application/json")

    def _check_token(self, given: bytes) -> None:
        if self._token is None:
            raise Problem(
                403,
                "no_token",
                "this server was started without a token, so that nothing can change it: start it with --token-file, "
                "or with LORA_LEXICON_TOKEN set",
            )
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            message = "the token is wrong" if given else "a token is needed"
            raise Problem(
                401,
                "wrong_token",
                f"{message}: send the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )


async def _with_body(headers: dict[bytes, bytes], receive: Receive) -> Receive:
    """The same `receive` after the whole body was read, within its limits; it gives that body first.

    Raises:
        Problem: it is too large, or too slow.
    """
    too_large = Problem(413, "too_large", f"the body is larger than {MAX_BODY} bytes: ask in parts")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MAX_BODY:
        raise too_large
    body, more = bytearray(), True
    first: Message | None = None
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    first = message
                    break
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise Problem(408, "slow_body", f"the body did not come within {BODY_SECONDS} s: send it at once") from None
    first = first or {"type": "http.request", "body": bytes(body), "more_body": False}

    async def again() -> Message:
        nonlocal first
        if first is not None:
            message, first = first, None
            return message
        return await receive()

    return again


async def respond(problem: Problem, path: str, send: Send) -> None:
    """Sends a problem as JSON, on OpenAI's paths in OpenAI's form."""
    body = json.dumps(problem.body(path.startswith("/v1/")), ensure_ascii=False).encode(errors="replace")
    headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
