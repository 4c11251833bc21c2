"""The server's routes. What they answer is other modules' work; what stands before them is the gate's."""

import asyncio
import time
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from lora_lexicon import __version__
from lora_lexicon.archive import is_archive
from lora_lexicon.compose.system import System
from lora_lexicon.errors import ConflictError, LexiconError, PackError, TrustError
from lora_lexicon.packs.live import add_domains, read_newcomers, remove_domain
from lora_lexicon.packs.trust import Policy
from lora_lexicon.serve import completions, domains
from lora_lexicon.serve.define import Asked, collected, streamed
from lora_lexicon.serve.gate import Gate
from lora_lexicon.serve.line import Line, result
from lora_lexicon.serve.metrics import Metrics
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.reference import page
from lora_lexicon.serve.scheduler import Scheduler
from lora_lexicon.serve.schema import AddDomains, Chat, Completion, Define, Prompt, Route
from lora_lexicon.serve.work import RESERVED, check_domain

PAGE = Path(__file__).parent / "page"
FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "map.js": "text/javascript",
    "elements.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
CHANGE_SECONDS = 600  # a change waits for all that came before it
SHOWN = 200  # characters of what a client sent that an error repeats


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        host: where it listens.
        token: whoever sends it may change the server; None: nobody may.
        packs: the folders that packs may be added from.
        policy: whose signature a pack that is added must bear; None: it needs none.
        batch_size: definitions written at once.
        queue: definitions that may wait.
        seconds: within which a request is answered.
        context: tokens of a text that is continued, with its continuation; never more than the model reads.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    packs: Sequence[Path] = ()
    policy: Policy | None = None
    batch_size: int = 16
    queue: int = 256
    seconds: float = 60
    context: int = 4096


def create_app(system: System, settings: Settings = Settings()) -> FastAPI:
    """An ASGI app that serves a system; its `state.scheduler` runs from now on, until the app's lifespan ends."""
    metrics = Metrics()
    scheduler = Scheduler(system, settings.batch_size, settings.queue, metrics.definition)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(
        title="lora-lexicon",
        version=__version__,
        description=f"Definitions by {system.name}.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.scheduler = scheduler
    app.include_router(_definitions(scheduler, settings))
    app.include_router(_domains(scheduler, settings))
    app.include_router(_openai(scheduler, settings))
    app.include_router(_about(app, scheduler, metrics, settings))
    app.add_middleware(Gate, host=settings.host, token=settings.token, metrics=metrics, known=partial(_is_known, app))
    _handle_errors(app)
    return app


def _is_known(app: FastAPI, scope: MutableMapping[str, Any]) -> bool:
    """Whether a route takes such a request."""
    return any(route.matches(scope)[0].name == "FULL" for route in app.routes)


def _definitions(scheduler: Scheduler, settings: Settings) -> APIRouter:
    routes = APIRouter()

    @routes.post("/define", response_model=None)
    async def define(body: Define, request: Request) -> Response | dict[str, Any]:
        """Define a term, or many. With `stream`, server-sent events: start, token, replace, end, error, done."""
        check_domain(scheduler.system, body.domain)
        asked = Asked(body, scheduler.system.experts)
        told = asked.told(Line(scheduler, request, asked.works, settings.seconds))
        if body.stream:
            return StreamingResponse(streamed(told), media_type="text/event-stream", headers=UNCACHED)
        return {"definitions": await collected(told, asked.count)}

    return routes


def _domains(scheduler: Scheduler, settings: Settings) -> APIRouter:
    routes, drawn, changing = APIRouter(), domains.Map(), asyncio.Lock()

    @routes.post("/route")
    async def route(body: Route) -> dict[str, Any]:
        """Which domain a term goes to, how near the others are, and the nearest training terms."""
        found = scheduler.ask(lambda system: domains.routed(system, drawn, body.term, body.context))
        return await result(found, settings.seconds)

    @routes.get("/domains")
    async def listed() -> dict[str, Any]:
        """The domains that answer, and a map of their typical terms."""
        return await result(scheduler.ask(lambda system: domains.listed(system, drawn)), settings.seconds)

    @routes.post("/domains", status_code=201)
    async def add(body: AddDomains) -> dict[str, Any]:
        """Add domains of a pack that lies in a folder named at start. What is being written is finished first."""
        folder = find_pack(body.path, settings.packs)
        async with changing:
            try:
                new = await asyncio.to_thread(read_newcomers, scheduler.system, folder, body.domains, settings.policy)
            except ConflictError:
                raise
            except TrustError as error:
                raise Problem(403, "untrusted", str(error)) from error
            except LexiconError as error:
                raise Problem(422, "bad_pack", str(error)) from error
            added = [adapter.name for adapter in new.adapters]
            for name in added:
                if name.lower() in RESERVED:
                    raise Problem(409, "conflict", f"a domain cannot be called {name!r} here: rename its expert")
            try:
                await result(scheduler.change(lambda system: add_domains(system, new)), CHANGE_SECONDS)
            except LexiconError as error:
                raise Problem(409, "conflict", str(error)) from error
        return {"added": added, "domains": list(scheduler.system.experts)}

    @routes.delete("/domains/{name}")
    async def remove(name: str) -> dict[str, Any]:
        """Remove a domain. What was asked of it before is answered first."""
        async with changing:
            try:
                await result(scheduler.change(lambda system: remove_domain(system, name)), CHANGE_SECONDS)
            except ConflictError:
                raise
            except PackError as error:
                raise Problem(404, "unknown_domain", str(error)) from error
        return {"removed": name, "domains": list(scheduler.system.experts)}

    return routes


def _openai(scheduler: Scheduler, settings: Settings) -> APIRouter:
    routes, since = APIRouter(prefix="/v1"), int(time.time())

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """OpenAI's list of models: auto, base, and each domain."""
        return completions.models(scheduler.system, since)

    @routes.post("/completions", response_model=None)
    async def complete(body: Completion, request: Request) -> Response | dict[str, Any]:
        """OpenAI's completions: a prompt is TERM, or TERM, tab, CONTEXT; a model is a domain, base or auto.

        A prompt with a line end before any tab is a text, which the model continues as it is.
        """
        return await answered(body, body.prompts, request)

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: Chat, request: Request) -> Response | dict[str, Any]:
        """OpenAI's chat, by the tokenizer's chat template; of one without, the messages are a text, line by line."""
        return await answered(body, [body.conversation], request)

    async def answered(
        body: Completion | Chat, prompts: Sequence[completions.Asked], request: Request
    ) -> Response | dict[str, Any]:
        check_domain(scheduler.system, body.model)
        tokens: list[list[int] | None] = [None] * len(prompts)
        if not all(isinstance(prompt, Prompt) for prompt in prompts):
            asked = scheduler.ask(lambda system: completions.encoded(system, body, prompts, settings.context))
            tokens = await result(asked, settings.seconds)
        works = completions.works_of(body, prompts, tokens)
        line = Line(scheduler, request, works, settings.seconds)
        answer = completions.Completed(body)
        if body.stream:
            return StreamingResponse(answer.chunks(line), media_type="text/event-stream", headers=UNCACHED)
        return await answer.whole(line)

    return routes


def _about(app: FastAPI, scheduler: Scheduler, metrics: Metrics, settings: Settings) -> APIRouter:
    routes = APIRouter()
    files = {name: (PAGE / name).read_bytes() for name in FILES}

    @routes.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server works, and how much it has to do."""
        system = scheduler.system
        return {
            "status": "ok",
            "model": system.name,
            "domains": len(system.experts),
            "queued": scheduler.queued,
            "running": scheduler.running,
        }

    @routes.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """Counters for Prometheus."""
        held = await result(scheduler.ask(domains.held), settings.seconds)
        text = metrics.text(queued=scheduler.queued, running=scheduler.running, **held)
        return Response(text, media_type=metrics.content_type)

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    @routes.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(files["index.html"], media_type=FILES["index.html"])

    @routes.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise Problem(404, "not_found", "no such file: the page is at /")
        return Response(files[name], media_type=FILES[name])

    return routes


UNCACHED = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # each event reaches the client at once


def find_pack(path: str, roots: Sequence[Path]) -> Path:
    """A pack's folder or file inside one of `roots`, links followed.

    Raises:
        Problem: it lies elsewhere, or is not there.
    """
    if not roots:
        raise Problem(403, "no_packs", "this server was started without a folder to add packs from: add --packs FOLDER")
    try:
        places = [(root / path).resolve() for root in roots]
        inside = [place for root, place in zip(roots, places, strict=True) if place.is_relative_to(root.resolve())]
        found = [place for place in inside if place.is_dir() or is_archive(place)]
    except (OSError, ValueError, RuntimeError) as error:
        raise Problem(422, "invalid_request", f"path: no path can be {path!r}: give a pack's name") from error
    if not inside:
        raise Problem(403, "outside_packs", f"{path!r} is not inside a folder named by --packs: move the pack there")
    if not found:
        raise Problem(404, "unknown_pack", f"no pack {path!r} in the folders named by --packs: give its folder's name")
    return found[0]


def _handle_errors(app: FastAPI) -> None:
    """Every error is one JSON object."""

    def answer(request: Request, problem: Problem) -> Response:
        return JSONResponse(problem.body(request.scope["path"].startswith("/v1/")), problem.status, problem.headers)

    @app.exception_handler(Problem)
    async def known(request: Request, problem: Problem) -> Response:
        return answer(request, problem)

    @app.exception_handler(LexiconError)
    async def refused(request: Request, error: LexiconError) -> Response:
        kind = (409, "conflict") if isinstance(error, ConflictError) else (422, "invalid_request")
        return answer(request, Problem(*kind, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _said(error))

    @app.exception_handler(400)
    async def unreadable(request: Request, _: Exception) -> Response:
        return answer(request, Problem(400, "invalid_json", "the body is no JSON that can be read: send one object"))

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> Response:
        return answer(request, Problem(404, "not_found", f"nothing is at {_short(request)}: /docs lists what is"))

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> Response:
        message = f"{_short(request)} does not take {request.method}: /docs lists what it takes"
        return answer(request, Problem(405, "wrong_method", message, getattr(error, "headers", None)))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, _: Exception) -> Response:
        return answer(request, Problem(500, "internal", "the server failed on this request: its log says why"))


def _short(request: Request) -> str:
    """A request's path for a message. `request.url` would read the Host header too, which may be anything."""
    return request.scope["path"][:SHOWN]


def _said(error: RequestValidationError) -> Problem:
    """The first thing wrong with a body, in one line."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(400, "invalid_json", f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}")
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:SHOWN]
    what = first["msg"].removeprefix("Value error, ")
    if not where and first["type"] in ("missing", "model_attributes_type", "model_type", "dict_type"):
        what = "the body must be one JSON object: /docs lists its fields"
    if first["type"] == "extra_forbidden":
        what = "no such field: /docs lists those that are"
    return Problem(422, "invalid_request", f"{where}: {what}" if where else what)
