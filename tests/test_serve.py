"""serve/: an answer over HTTP is what `define` writes offline, whatever the load; bad input ends no server."""

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from composing import DOMAINS, PROMPTS, make_lora, workshop
from conftest import WORDS
from fastapi import FastAPI
from serving import TOKEN, call, client_of

from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.inference.batch import Row
from lora_lexicon.inference.engine import define, text_of, write
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import add_expert, build_pack
from lora_lexicon.serve.app import Settings, create_app
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.scheduler import Scheduler
from lora_lexicon.serve.schema import MAX_BODY
from lora_lexicon.serve.work import Ended, Token, Work

SHORT = 10
TERMS = [(word, f"the {word} is here" if i % 2 else "") for i, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pack, and a folder `packs` with the same and one domain more, one of another base, and a damaged one."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"))
    shop.pack, shop.packs = shop.folder / "pack", shop.folder / "packs"
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack, include_base=True)
    slang = make_lora(shop.base, shop.folder / "slang", seed=9, rank=6)
    shop.packs.mkdir()
    add_expert(shop.pack, slang, [PROMPTS[3]], [], out=shop.packs / "grown")
    shutil.copytree(shop.packs / "grown", shop.packs / "damaged")
    weights = shop.packs / "damaged" / "adapters" / "slang" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (shop.packs / "link").symlink_to(shop.pack)
    return shop


@pytest.fixture(scope="module")
def offline(shop: SimpleNamespace) -> SimpleNamespace:
    """The systems that answers are compared with: as it is at first, and with the domain that joins."""
    return SimpleNamespace(before=load_system(str(shop.pack)), after=load_system(str(shop.packs / "grown")))


@pytest.fixture
def start(shop: SimpleNamespace) -> Iterator[Callable[..., FastAPI]]:
    """Starts a server in this process: its app, whose scheduler ends with the test."""
    started = []

    def make(system: System | None = None, **settings: Any) -> FastAPI:
        settings = {"token": "secret", "packs": [shop.packs], "batch_size": 8, **settings}
        started.append(create_app(system or load_system(str(shop.pack)), Settings(**settings)))
        return started[-1]

    yield make
    for app in started:
        app.state.scheduler.close()


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events."""
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def one_hot(system: System, name: str, rows: int) -> np.ndarray:
    weights = np.zeros((rows, len(system.experts)), dtype=np.float32)
    if name != "base":
        weights[:, system.experts.index(name)] = 1
    return weights


def test_answers_are_those_of_define(start: Callable[..., FastAPI], offline: SimpleNamespace) -> None:
    app = start()
    requests = [{"term": term, "context": context} for term, context in TERMS]
    found = call(app, "POST", "/define", json={"requests": requests, "max_tokens": SHORT}).json()["definitions"]
    wanted = define(offline.before, TERMS, Decoding(max_new_tokens=SHORT))
    assert [(f["term"], f["definition"], f["domain"], f["tokens"]) for f in found] == [
        (w.term, w.text, w.domain, w.tokens) for w in wanted
    ]
    assert [f["similarity"] for f in found] == pytest.approx([w.similarity for w in wanted], abs=1e-5)
    for name in ("base", *DOMAINS):
        body = {"requests": requests, "max_tokens": SHORT, "domain": name, "sample": True, "seed": 7}
        named = call(app, "POST", "/define", json=body).json()["definitions"]
        sampled = Decoding("sample", max_new_tokens=SHORT, seed=7)
        alone = define(offline.before, TERMS, sampled, weights=one_hot(offline.before, name, len(TERMS)))
        assert [(n["definition"], n["domain"], n["similarity"]) for n in named] == [(a.text, name, None) for a in alone]


def test_a_stream_adds_up_to_its_answer(start: Callable[..., FastAPI], offline: SimpleNamespace) -> None:
    requests = [{"term": term, "context": context} for term, context in TERMS]
    body = {"requests": requests, "stream": True, "max_tokens": SHORT, "all_domains": True}
    answer = call(start(), "POST", "/define", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    assert told[-1] == ("done", {})
    whole = define(offline.before, TERMS, Decoding(max_new_tokens=SHORT))
    each = {
        name: define(
            offline.before, TERMS, Decoding(max_new_tokens=SHORT), weights=one_hot(offline.before, name, len(TERMS))
        )
        for name in DOMAINS
    }
    for i, wanted in enumerate(whole):
        own = [(kind, data) for kind, data in told[:-1] if data["index"] == i]
        assert (own[0][0], own[-1][0]) == ("start", "end")
        assert {kind for kind, _ in own[1:-1]} <= {"token"}
        end = own[-1][1]
        assert "".join(data["text"] for _, data in own[1:-1]) == end["definition"] == wanted.text
        assert own[0][1]["domain"] == end["domain"] == wanted.domain
        others = [{"domain": name, "definition": each[name][i].text} for name in DOMAINS if name != wanted.domain]
        assert end["others"] == others


def test_domains_come_and_go_under_load(start: Callable[..., FastAPI], offline: SimpleNamespace) -> None:
    """No request fails, none is wrong, and memory returns."""
    app = start()
    system, memory = app.state.scheduler.system, app.state.scheduler.system.memory_bytes
    old, new = (
        [(d.text, d.domain) for d in define(s, TERMS, Decoding(max_new_tokens=SHORT))]
        for s in (offline.before, offline.after)
    )
    moved = [i for i in range(len(TERMS)) if old[i][1] != new[i][1]]
    assert 0 < len(moved) < len(TERMS)
    assert all(old[i] == new[i] for i in range(len(TERMS)) if i not in moved)

    async def drive() -> list[tuple[int, str, tuple[str, str]]]:
        async with client_of(app) as client:
            found, phase = [], "before"

            async def ask(i: int, wait: float) -> None:
                await asyncio.sleep(wait)
                asked = phase
                body = {"term": TERMS[i][0], "context": TERMS[i][1], "max_tokens": SHORT}
                answer = await client.post("/define", json=body)
                assert answer.status_code == 200, answer.text
                (own,) = answer.json()["definitions"]
                found.append((i, asked if asked == phase else "between", (own["definition"], own["domain"])))

            load = [asyncio.create_task(ask(k % len(TERMS), 0.015 * k)) for k in range(3 * len(TERMS))]
            await asyncio.sleep(0.2)
            phase = "changing"
            added = await client.post("/domains", json={"path": "grown", "domains": ["slang"]}, headers=TOKEN)
            assert (added.status_code, added.json()["added"]) == (201, ["slang"])
            assert system.memory_bytes > memory
            named = await client.post("/define", json={"term": "apple", "domain": "slang"})
            assert named.json()["definitions"][0]["domain"] == "slang"
            phase = "added"
            await asyncio.sleep(0.3)
            phase = "changing"
            late = asyncio.create_task(client.post("/define", json={"term": "apple", "domain": "slang"}))
            await asyncio.sleep(0)
            await asyncio.sleep(0.02)
            removed = await client.delete("/domains/slang", headers=TOKEN)
            assert removed.json() == {"removed": "slang", "domains": list(DOMAINS)}
            phase = "before"
            assert (await late).status_code == 200, "it was asked before the removal"
            await asyncio.gather(*load)
            return found

    found = asyncio.run(drive())
    assert len(found) == 3 * len(TERMS)
    for i, phase, answer in found:
        if phase == "added":
            assert answer == new[i]
        elif phase == "before":
            assert answer == old[i]
        else:
            assert answer in (old[i], new[i])
    assert system.memory_bytes == memory
    assert system.experts == DOMAINS


def test_what_is_wrong_is_said_in_one_line(
    start: Callable[..., FastAPI], shop: SimpleNamespace, six_layers: Path, tmp_path: Path
) -> None:
    app = start()
    elsewhere = workshop(six_layers, tmp_path / "six", ffn=False)
    if not (shop.packs / "six").exists():
        build_pack(str(six_layers), elsewhere.lora, elsewhere.domains, shop.packs / "six")
    secret, own = TOKEN, {"content-type": "application/json"}
    term = {"term": "apple"}
    wrong: list[tuple[int, str, str, str, dict[str, Any]]] = [
        (422, "empty", "POST", "/define", {"json": {"term": " \t"}}),
        (422, "200", "POST", "/define", {"json": {"term": "a" * 201}}),
        (422, "4000", "POST", "/define", {"json": {**term, "context": "a" * 4001}}),
        (422, "control", "POST", "/define", {"json": {"term": "ap\x00ple"}}),
        (422, "control", "POST", "/define", {"json": {**term, "context": "an \x1b[31m apple"}}),
        (422, "control", "POST", "/define", {"content": b'{"term": "\\ud800"}', "headers": own}),
        (422, "either", "POST", "/define", {"json": {}}),
        (422, "either", "POST", "/define", {"json": {**term, "requests": [term]}}),
        (422, "64", "POST", "/define", {"json": {"requests": [term] * 65}}),
        (422, "max_tokens", "POST", "/define", {"json": {**term, "max_tokens": 257}}),
        (422, "temperature", "POST", "/define", {"content": b'{"term": "a", "temperature": NaN}', "headers": own}),
        (422, "tempreature", "POST", "/define", {"json": {**term, "tempreature": 1}}),
        (422, "object", "POST", "/define", {"content": b'"apple"', "headers": own}),
        (400, "not valid JSON", "POST", "/define", {"content": b'{"term": ', "headers": own}),
        (400, "JSON", "POST", "/define", {"content": b"[" * 100_000, "headers": own}),
        (400, "JSON", "POST", "/define", {"content": b'{"term": "\xff"}', "headers": own}),
        (413, "larger", "POST", "/define", {"content": b" " * (MAX_BODY + 1), "headers": own}),
        (415, "Content-Type", "POST", "/define", {"content": b'{"term": "apple"}'}),
        (400, "name", "GET", "/health", {"headers": {"host": "evil.example"}}),
        (404, DOMAINS[0], "POST", "/define", {"json": {**term, "domain": "slang"}}),
        (404, "/docs", "GET", "/nothing", {}),
        (404, "page", "GET", "/page/..%2fapp.py", {}),
        (405, "/docs", "GET", "/define", {}),
        (401, "Bearer", "POST", "/domains", {"json": {"path": "grown"}}),
        (401, "wrong", "POST", "/domains", {"json": {"path": "grown"}, "headers": {"authorization": "Bearer no"}}),
        (401, "Bearer", "DELETE", f"/domains/{DOMAINS[0]}", {}),
        (403, "inside", "POST", "/domains", {"json": {"path": str(shop.pack)}, "headers": secret}),
        (403, "inside", "POST", "/domains", {"json": {"path": "../pack"}, "headers": secret}),
        (403, "inside", "POST", "/domains", {"json": {"path": "link"}, "headers": secret}),
        (404, "no pack", "POST", "/domains", {"json": {"path": "absent"}, "headers": secret}),
        (422, "path", "POST", "/domains", {"json": {"path": "a\x00b"}, "headers": secret}),
        (422, "SHA-256", "POST", "/domains", {"json": {"path": "damaged"}, "headers": secret}),
        (422, "pack", "POST", "/domains", {"json": {"path": "."}, "headers": secret}),
        (409, "for base", "POST", "/domains", {"json": {"path": "six"}, "headers": secret}),
        (409, "already", "POST", "/domains", {"json": {"path": "grown", "domains": [DOMAINS[0]]}, "headers": secret}),
        (422, "no domain", "POST", "/domains", {"json": {"path": "grown", "domains": ["law"]}, "headers": secret}),
        (404, "no domain", "DELETE", "/domains/law", {"headers": secret}),
        (422, "empty", "POST", "/route", {"json": {"term": ""}}),
        (404, "no domain", "POST", "/v1/completions", {"json": {"prompt": "a", "model": "gpt"}}),
        (422, "stop", "POST", "/v1/completions", {"json": {"prompt": "a", "stop": "x"}}),
        (422, "empty", "POST", "/v1/completions", {"json": {"prompt": "\ta"}}),
    ]
    for status, says, method, path, sent in wrong:
        answer = call(app, method, path, **sent)
        assert answer.status_code == status, (says, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"type", "message", *(["param", "code"] if path.startswith("/v1") else [])}
        assert says in error["message"], (says, error)
        assert "\n" not in error["message"]
    good = call(app, "POST", "/define", json={"term": "apple", "context": "a river", "max_tokens": 2})
    assert good.status_code == 200
    assert "does not contain the term" in good.json()["definitions"][0]["warnings"][0]


def test_who_may_what(start: Callable[..., FastAPI]) -> None:
    open_app, shut_app = start(token=None, packs=()), start(host="192.0.2.1")
    assert call(open_app, "GET", "/health").status_code == 200
    refused = call(open_app, "DELETE", "/domains/mind", headers=TOKEN)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "no_token")
    assert call(start(packs=()), "POST", "/domains", json={"path": "a"}, headers=TOKEN).status_code == 403
    for path in ("/health", "/metrics", "/domains", "/docs", "/openapi.json", "/v1/models"):
        assert call(shut_app, "GET", path).status_code == 401
        assert call(shut_app, "GET", path, headers=TOKEN).status_code == 200
    assert call(shut_app, "POST", "/define", json={"term": "apple"}).status_code == 401
    page = call(shut_app, "GET", "/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'; ")


def test_the_last_domain_stays(start: Callable[..., FastAPI]) -> None:
    app = start()
    for name in DOMAINS[1:]:
        assert call(app, "DELETE", f"/domains/{name}", headers=TOKEN).status_code == 200
    answer = call(app, "DELETE", f"/domains/{DOMAINS[0]}", headers=TOKEN)
    assert (answer.status_code, "last" in answer.text) == (409, True)
    own = call(app, "POST", "/define", json={"term": "apple", "max_tokens": 2}).json()["definitions"][0]
    assert (own["domain"], own["margin"]) == (DOMAINS[0], None)


def test_other_systems_answer_too(start: Callable[..., FastAPI], shop: SimpleNamespace) -> None:
    compose_moe(str(shop.base), shop.ffn, shop.domains, shop.folder / "moe")
    for path, kind in ((shop.folder / "moe", "moe"), (shop.base, "base"), (shop.lora[0], "expert")):
        system = load_system(str(path))
        app = start(system)
        (own,) = call(app, "POST", "/define", json={"term": "apple", "max_tokens": SHORT}).json()["definitions"]
        (wanted,) = define(system, [("apple", "")], Decoding(max_new_tokens=SHORT))
        assert (own["definition"], own["domain"]) == (wanted.text, wanted.domain)
        listed = call(app, "GET", "/domains").json()
        assert listed["kind"] == kind
        added = call(app, "POST", "/domains", json={"path": "grown"}, headers=TOKEN)
        assert (added.status_code, kind in added.json()["error"]["message"]) == (409, True)
        assert call(app, "POST", "/route", json={"term": "apple"}).status_code == (200 if kind == "moe" else 409)


def test_routing_and_the_map(start: Callable[..., FastAPI], offline: SimpleNamespace) -> None:
    app = start()
    term, context = PROMPTS[1]
    found = call(app, "POST", "/route", json={"term": term, "context": context}).json()
    assert found["domain"] == found["domains"][0]["name"] == DOMAINS[1]
    assert found["router"] == "centroid"
    assert [d["weight"] for d in found["domains"]] == [1, 0, 0]
    assert found["nearest"][0]["term"] == term
    router = offline.before.router
    for own in found["domains"]:
        among = router.quantiles[router.names.index(own["name"])]
        assert own["quantile"] == pytest.approx(np.interp(own["similarity"], among, np.linspace(0, 1, 101)))
        assert 0 <= own["quantile"] <= 1
    listed = call(app, "GET", "/domains").json()
    assert listed["domains"] == [{"name": name, "rank": 4, "in_memory": True} for name in DOMAINS]
    assert listed["expert_memory"] is None
    spot = next(p for p in listed["map"]["terms"] if p["term"] == term)
    assert (spot["domain"], [spot["x"], spot["y"]]) == (DOMAINS[1], pytest.approx(found["place"], abs=2e-3))
    assert [c["name"] for c in listed["map"]["centroids"]] == list(DOMAINS)
    call(app, "POST", "/domains", json={"path": "grown"}, headers=TOKEN)
    assert [c["name"] for c in call(app, "GET", "/domains").json()["map"]["centroids"]] == [*DOMAINS, "slang"]


def test_what_is_counted(start: Callable[..., FastAPI]) -> None:
    app = start()
    own = call(app, "POST", "/define", json={"term": PROMPTS[0][0], "context": PROMPTS[0][1]}).json()["definitions"][0]
    call(app, "GET", "/secret-path")
    text = call(app, "GET", "/metrics").text
    for line in (
        'lora_lexicon_requests_total{method="POST",route="/define",status="200"} 1.0',
        f'lora_lexicon_definitions_total{{domain="{own["domain"]}"}} 1.0',
        f"lora_lexicon_tokens_total {float(own['tokens'])}",
        "lora_lexicon_domains 3.0",
        "lora_lexicon_queued 0.0",
    ):
        assert line in text
    assert "secret" not in text
    docs = call(app, "GET", "/docs").text
    assert "POST /define" in docs
    assert "http" not in docs.replace("HTTP", "")


@asynccontextmanager
async def held(scheduler: Scheduler):
    """The scheduler's thread, busy with a call until the block ends."""
    import threading

    release = threading.Event()
    waiting = scheduler.ask(lambda _: release.wait(20))
    try:
        yield
    finally:
        release.set()
        await asyncio.wrap_future(waiting)


def test_a_full_queue_says_when_to_come_again(start: Callable[..., FastAPI]) -> None:
    app = start(queue=3)

    async def drive() -> None:
        async with client_of(app) as client:
            async with held(app.state.scheduler):
                first = asyncio.create_task(client.post("/define", json={"requests": [{"term": "apple"}] * 3}))
                while app.state.scheduler.queued < 3:
                    await asyncio.sleep(0.01)
                answer = await client.post("/define", json={"term": "river"})
                assert (answer.status_code, answer.json()["error"]["type"]) == (429, "queue_full")
                assert int(answer.headers["retry-after"]) >= 1
                too_many = await client.post("/define", json={"requests": [{"term": "apple"}] * 4})
                assert too_many.status_code == 413
            assert (await first).status_code == 200
            assert (await client.post("/define", json={"term": "river"})).status_code == 200

    asyncio.run(drive())


def test_a_request_that_takes_too_long(start: Callable[..., FastAPI]) -> None:
    app = start(seconds=0.1)

    async def drive() -> None:
        async with client_of(app) as client:
            async with held(app.state.scheduler):
                late = asyncio.create_task(client.post("/define", json={"term": "apple"}))
                await asyncio.sleep(0.2)
            answer = await late
            assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout")

    asyncio.run(drive())
    assert (app.state.scheduler.queued, app.state.scheduler.running) == (0, 0)


def test_a_client_that_goes_frees_its_place(start: Callable[..., FastAPI]) -> None:
    """Written as ASGI: the client's messages are a body, then that it has gone."""
    app = start()
    body = json.dumps({"requests": [{"term": word} for word in WORDS], "max_tokens": 256}).encode()
    sent: list[int] = []

    async def drive(streamed: bool) -> None:
        gone = asyncio.Event()
        messages = iter(
            [{"type": "http.request", "body": body.replace(b"}]", b'}], "stream": true' if streamed else b"}]")}]
        )

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/define", "headers": headers, "query_string": b""}
        call = asyncio.create_task(app({**scope, "asgi": {"version": "3.0"}}, receive, send))
        while not app.state.scheduler.running:
            await asyncio.sleep(0.005)
        gone.set()
        await call
        for _ in range(200):
            if not (app.state.scheduler.running or app.state.scheduler.queued):
                return
            await asyncio.sleep(0.005)
        raise AssertionError("places are still taken")

    asyncio.run(drive(False))
    asyncio.run(drive(True))
    assert sent == [499, 200]


def test_a_failing_request_takes_no_other_with_it(
    start: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = start()
    system = app.state.scheduler.system
    right = type(system).choose
    system.routes_in_passing = False

    def fails(self: System, prompts: Any) -> Any:
        if any(term == "river" for term, _ in prompts):
            raise RuntimeError("out of memory")
        return right(self, prompts)

    monkeypatch.setattr(type(system), "choose", fails)

    async def drive() -> list[int]:
        async with client_of(app) as client:
            async with held(app.state.scheduler):
                asked = [
                    asyncio.create_task(client.post("/define", json={"term": term, "max_tokens": 2}))
                    for term in ("apple", "river", "stone")
                ]
                while app.state.scheduler.queued < 3:
                    await asyncio.sleep(0.01)
            return [(await task).status_code for task in asked]

    assert asyncio.run(drive()) == [200, 500, 200]


def test_no_call_is_lost_among_many(shop: SimpleNamespace) -> None:
    """Calls come from other threads at any moment: also when the scheduler takes those that wait."""
    scheduler, interval = Scheduler(load_system(str(shop.pack))), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def ask(count: int) -> list[int]:
        return [scheduler.ask(lambda _, i=i: i).result(5) for i in range(count)]

    try:
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(ask, 80) for _ in range(4)]
        assert all(future.result() == list(range(80)) for future in found)
    finally:
        sys.setswitchinterval(interval)
        scheduler.close()


def test_closing_finishes_what_was_taken(shop: SimpleNamespace) -> None:
    scheduler = Scheduler(load_system(str(shop.pack)), batch_size=4)
    told: list[Any] = []
    works = [Work(word, "", "auto", Decoding(max_new_tokens=SHORT), told.append) for word in WORDS]
    scheduler.submit(works)
    scheduler.close()
    assert sum(isinstance(event, Ended) for event in told) == len(WORDS)
    with pytest.raises(Problem, match="end"):
        scheduler.submit(works)


def test_a_choice_that_rounding_could_turn_is_held_back(shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every choice too close, all text waits for the exact decoding: nothing that was told is taken back."""
    monkeypatch.setattr(Decoding, "tolerance", property(lambda _: 1e9))
    scheduler = Scheduler(load_system(str(shop.pack)), batch_size=4)
    told: dict[str, list[Any]] = {word: [] for word in WORDS[:4]}
    scheduler.submit([Work(w, "", "auto", Decoding(max_new_tokens=6), told[w].append, streamed=True) for w in told])
    scheduler.close()
    for found in told.values():
        assert sum(isinstance(event, Token) for event in found) <= 1
        text = "".join(event.text for event in found if isinstance(event, Token))
        assert text == found[-1].definition.text


def test_text_that_turned_after_all_is_replaced(start: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the exact decoding differs from what was told already: OpenAI's streams cannot take text back."""

    def turned(_: System, row: Row) -> None:
        row.written = [*reversed(row.written[:-1]), row.written[-1]]

    monkeypatch.setattr("lora_lexicon.serve.scheduler.settle", turned)
    app = start()
    body = {"requests": [{"term": word} for word in WORDS], "max_tokens": SHORT, "stream": True}
    told = events(call(app, "POST", "/define", json=body).text)
    replaced = 0
    for i in range(len(WORDS)):
        text = ""
        for kind, data in told[:-1]:
            if data["index"] == i and kind in ("token", "replace"):
                text = data["text"] if kind == "replace" else text + data["text"]
                replaced += kind == "replace"
            elif data["index"] == i and kind == "end":
                assert text == data["definition"]
    assert replaced > 0
    lines = call(app, "POST", "/v1/completions", json={"prompt": WORDS, "max_tokens": SHORT, "stream": True}).text
    *_, error, done = lines.strip().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "turned"


def test_completions_stream_and_count(start: Callable[..., FastAPI], offline: SimpleNamespace) -> None:
    app = start()
    body = {
        "prompt": ["apple\tthe apple is here", "kernel"],
        "n": 2,
        "temperature": 0.7,
        "max_tokens": SHORT,
        "seed": 3,
    }
    whole = call(app, "POST", "/v1/completions", json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    sampled = Decoding("sample", temperature=0.7, max_new_tokens=SHORT, seed=3)
    firsts = [d.text for d in define(offline.before, PROMPTS[:2], sampled)]
    assert [whole["choices"][i]["text"] for i in (0, 2)] == firsts
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = call(app, "POST", "/v1/completions", json=streamed).text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[-1]["usage"] == whole["usage"]
    for i, choice in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


TEMPLATE = """{%- for m in messages %}{%- if m.role == "system" %}{{ raise_exception("no system") }}{% endif -%}
<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_texts_are_continued_as_they_are(start: Callable[..., FastAPI], shop: SimpleNamespace) -> None:
    system = load_system(str(shop.base))
    app, tokenizer = start(system, context=60), system.tokenizer

    def wanted(ids: list[int], decoding: Decoding, text: str = "") -> str:
        row = Row(ids, None, decoding.uniforms(text, ""), decoding)
        write(system, [row])
        return text_of(system, row.written)

    text = "an apple\na river\t"
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    body = {"prompt": [text, "apple\n"], "max_tokens": SHORT, "temperature": 0.9}  # the second one is a term
    found = call(app, "POST", "/v1/completions", json=body).json()
    plain = Decoding("sample", temperature=0.9, max_new_tokens=SHORT, repetition_penalty=1.0)
    (term,) = define(system, [("apple", "")], replace(plain, repetition_penalty=Decoding.repetition_penalty))
    assert [choice["text"] for choice in found["choices"]] == [wanted(ids, plain, text), term.text]

    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "an apple"}, {"role": "assistant", "content": "a fruit"}]
    chat = {"messages": messages, "max_tokens": SHORT}
    ids = tokenizer.encode("<user>an apple<assistant>a fruit<assistant>", add_special_tokens=False)
    said = call(app, "POST", "/v1/chat/completions", json=chat).json()
    assert said["choices"][0]["message"]["content"] == wanted(ids, Decoding(max_new_tokens=SHORT))
    assert said["usage"]["prompt_tokens"] == len(ids)
    refused = call(app, "POST", "/v1/chat/completions", json={"messages": [{"role": "system", "content": "x"}]})
    assert (refused.status_code, "(no system)" in refused.text) == (422, True)
    long = call(app, "POST", "/v1/chat/completions", json={**chat, "max_tokens": 61 - len(ids)})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert call(app, "POST", "/v1/chat/completions", json={**chat, "max_tokens": 60 - len(ids)}).status_code == 200
