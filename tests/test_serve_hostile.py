"""serve/ against what nobody should send: it is refused in one line, and the next answer is what it was before."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from composing import DOMAINS, workshop
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TOKEN, call

from lora_lexicon.compose.system import load_system
from lora_lexicon.packs.pack import build_pack
from lora_lexicon.serve.app import Settings, create_app
from lora_lexicon.serve.schema import MAX_TEXT, MIN_TEMPERATURE, Chat, Completion, Define

OWN = {"content-type": "application/json"}
GOOD = {"term": "apple", "context": "the apple is here", "max_tokens": 4}


@pytest.fixture(scope="module")
def pack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    build_pack(str(shop.base), shop.lora, shop.domains, shop.folder / "pack", include_base=True)
    return shop.folder / "pack"


@pytest.fixture(scope="module")
def app(pack: Path) -> Iterator[FastAPI]:
    """A server of that pack, which may add what lies beside it."""
    app = create_app(load_system(str(pack)), Settings(token="secret", packs=[pack.parent]))
    yield app
    app.state.scheduler.close()


def refused(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which is one."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert "\n" not in error["message"]
    assert 10 < len(error["message"]) < 1500
    return error


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=6
)
NEAR = st.sampled_from(
    ["apple", "auto", "base", DOMAINS[0], "apple\tan apple", "an\napple", True, False, 0, 1, 2, 0.5, 1.0, "", "\ud800"]
)
PLACES = {
    "/define": ({"term": "apple", "max_tokens": 2}, Define),
    "/route": ({"term": "apple"}, Define),
    "/v1/completions": ({"prompt": "apple", "max_tokens": 2}, Completion),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "an apple"}], "model": "base", "max_tokens": 2},
        Chat,
    ),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """(a path, a body for it in which up to three fields are anything)."""
    path = draw(st.sampled_from([*PLACES]))
    body, model = PLACES[path]
    keys = st.sampled_from([key for key in model.model_fields if key != "max_tokens"]) | st.text(max_size=4)
    changed = draw(st.dictionaries(keys, NEAR | VALUES, max_size=3))
    return path, json.dumps({**body, **changed}).encode()


@settings(max_examples=150, deadline=None)
@given(bodies() | st.tuples(st.sampled_from([*PLACES]), st.binary(max_size=40)))
def test_any_body_is_answered_or_refused(app: FastAPI, sent: tuple[str, bytes]) -> None:
    path, body = sent
    answer = call(app, "POST", path, content=body, headers=OWN)
    if answer.status_code != 200:
        refused(answer)
    elif path == "/define" and "event-stream" not in answer.headers["content-type"]:
        assert all(own["definition"] is not None for own in answer.json()["definitions"])


@pytest.fixture(autouse=True)
def unharmed(app: FastAPI) -> Iterator[None]:
    """After each test here the server answers as it did before, and holds nothing."""
    before = call(app, "POST", "/define", json=GOOD).json()
    yield
    assert call(app, "POST", "/define", json=GOOD).json() == before
    assert (app.state.scheduler.queued, app.state.scheduler.running) == (0, 0)


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        ("/define", {"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ("/define", {"max_tokens": "5"}, "valid integer"),
        ("/define", {"max_tokens": -1}, "max_tokens"),
        ("/define", {"max_tokens": 10**400}, "max_tokens"),
        ("/define", {"sample": 1}, "sample: Input should be a valid boolean"),
        ("/define", {"sample": True, "temperature": 1e-45}, "temperature"),
        ("/define", {"sample": True, "top_p": float("nan")}, "top_p"),
        ("/define", {"temperature": 0.5}, "temperature is for sampling: add sample: true"),
        ("/define", {"top_k": 5}, "top_k is for sampling"),
        ("/define", {"x" * 10_000: 1}, "no such field"),
        ("/define", {"requests": []}, "requests"),
        ("/v1/completions", {"temperature": 1e-45}, "greedy"),
        ("/v1/completions", {"logprobs": 0}, "logprobs is not supported"),
        ("/v1/completions", {"echo": True}, "echo is not supported"),
        ("/v1/completions", {"best_of": 2}, "best_of is not supported"),
        ("/v1/completions", {"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ("/v1/completions", {"x" * 10_000: 1}, "is not supported"),
        ("/v1/completions", {"n": True}, "n: Input should be a valid integer"),
        ("/v1/completions", {"stream": True, "stream_options": {"include_obfuscation": True}}, "no such field"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "add stream: true"),
        ("/v1/completions", {"prompt": "a\nb"}, "name the model that is to continue it, one of base,"),
        ("/v1/completions", {"prompt": "a\n\x00b", "model": "base"}, "control characters"),
        ("/v1/completions", {"prompt": ["a\n" + "b" * (MAX_TEXT // 2)] * 2, "model": "base"}, f"at most {MAX_TEXT}"),
        ("/v1/completions", {"prompt": "a\n" + "b" * 2000, "model": "base"}, "at most 256 tokens are read and written"),
        ("/v1/chat/completions", {"model": "auto"}, "name the model that is to continue it"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "control characters"),
        ("/v1/chat/completions", {"max_completion_tokens": 2}, "under its new name"),
        ("/v1/chat/completions", {"tools": [{}]}, "tools is not supported"),
        ("/v1/chat/completions", {"stop": "x"}, "stop is not supported"),
    ],
)
def test_no_option_is_bent_or_passed_over(app: FastAPI, path: str, more: dict[str, Any], says: str) -> None:
    good = PLACES[path][0]
    answer = call(app, "POST", path, content=json.dumps({**good, **more}).encode(), headers=OWN)
    assert says in refused(answer)["message"]


def test_the_coldest_sampling_works(app: FastAPI) -> None:
    body = {**GOOD, "sample": True, "temperature": MIN_TEMPERATURE, "top_p": 5e-324}
    assert call(app, "POST", "/define", json=body).status_code == 200


def test_a_body_that_is_no_object_is_told_so(app: FastAPI) -> None:
    for body in (b"", b"null", b"[]", b"5", b'"apple"'):
        assert "one JSON object" in refused(call(app, "POST", "/define", content=body, headers=OWN))["message"]


def test_methods_and_paths(app: FastAPI) -> None:
    """A path or a method that is not there is said to be so, and asks for no token where reading is open."""
    for method, path in (
        ("POST", "/define/"),
        ("POST", "/v1/chat"),
        ("DELETE", "/domains/"),
        ("PUT", "/x"),
    ):
        answer = call(app, method, path, content=b"{}")
        assert (answer.status_code, refused(answer)["type"]) == (404, "not_found")
    for method in ("OPTIONS", "PUT", "TRACE", "NONSENSE"):
        answer = call(app, method, "/define")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), "a method is refused with those that are"
        assert "access-control-allow-origin" not in answer.headers
    assert call(app, "HEAD", "/health").status_code == 200
    long = call(app, "GET", "/" + "x" * 10_000)
    assert (long.status_code, refused(long)["type"]) == (404, "not_found")


def test_every_route_that_changes_the_server_needs_the_token(app: FastAPI) -> None:
    """Whatever route is added: what is neither read nor listed as harmless is refused without the token."""
    described = call(app, "GET", "/openapi.json").json()["paths"]
    harmless = {("post", "/define"), ("post", "/route"), ("post", "/v1/completions"), ("post", "/v1/chat/completions")}
    changing = [(m, path) for path in described for m in described[path] if m != "get" and (m, path) not in harmless]
    assert sorted(changing) == [("delete", "/domains/{name}"), ("post", "/domains")]
    for method, path in changing:
        answer = call(app, method.upper(), path.format(name=DOMAINS[0]), content=b"{}", headers=OWN)
        assert (answer.status_code, refused(answer)["type"]) == (401, "wrong_token")


@pytest.mark.parametrize("host", ["evil.example", "[", "", "localhost.evil.example", "127.0.0.1@evil.example"])
def test_a_page_elsewhere_cannot_use_a_local_server(app: FastAPI, host: str) -> None:
    """What a page could have a browser send: another name for this machine, or a form's content types."""
    assert refused(call(app, "GET", "/domains", headers={"host": host}))["type"] == "wrong_host"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = call(app, "POST", "/define", content=json.dumps(GOOD).encode(), headers={"content-type": kind})
        assert answer.status_code == 415


def test_any_host_is_answered_where_all_need_the_token(app: FastAPI) -> None:
    """A Host that is no name takes no error message with it."""
    other = create_app(app.state.scheduler.system, Settings(host="192.0.2.1", token="secret"))
    try:
        answer = call(other, "GET", "/absent", headers={"host": "[", "authorization": "Bearer secret"})
        assert (answer.status_code, refused(answer)["type"]) == (404, "not_found")
        assert call(other, "GET", "/absent").status_code == 401, "what is there is nobody's to know"
    finally:
        other.state.scheduler.close()


ADAPTER = f"adapters/{DOMAINS[0]}"
WEIGHTS, CONFIG = f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json"


def replaced(pack: Path, name: str, content: bytes) -> None:
    """Puts another file into a pack, as one who can write a manifest would."""
    (pack / name).write_bytes(content)
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (pack / "manifest.json").write_text(json.dumps(manifest))


def changed(pack: Path, name: str, **values: Any) -> None:
    """Changes values of a JSON file in a pack."""
    content = json.dumps({**json.loads((pack / name).read_text()), **values}).encode()
    if name == "manifest.json":
        (pack / name).write_bytes(content)
    else:
        replaced(pack, name, content)


def sparse(pack: Path) -> None:
    """Weights of 1 GiB, of which the disk holds nothing."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**20, 256], "data_offsets": [0, 2**30]}}).encode()
    with (pack / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**30)


def instead(pack: Path, make: Callable[[Path], object]) -> None:
    """Makes something else of a pack's weights."""
    (pack / WEIGHTS).unlink()
    make(pack / WEIGHTS)


NESTED = b"[" * 100_000
HOSTILE: dict[str, Callable[[Path], object]] = {
    "manifest-nested": lambda pack: (pack / "manifest.json").write_bytes(NESTED),
    "manifest-number": lambda pack: (pack / "manifest.json").write_bytes(b'{"format": ' + b"1" * 5000 + b"}"),
    "manifest-no-files": lambda pack: changed(pack, "manifest.json", files=[]),
    "manifest-no-domains": lambda pack: changed(pack, "manifest.json", domains=None),
    "manifest-path": lambda pack: changed(pack, "manifest.json", files={"../../etc/passwd": ""}),
    "manifest-domain": lambda pack: changed(pack, "manifest.json", domains=[{"name": "../../pack"}]),
    "manifest-pipe": lambda pack: ((pack / "manifest.json").unlink(), os.mkfifo(pack / "manifest.json")),
    "router-nested": lambda pack: replaced(pack, "router.json", NESTED),
    "router-nothing": lambda pack: replaced(pack, "router.safetensors", b""),
    "config-nested": lambda pack: replaced(pack, CONFIG, NESTED),
    "config-rank": lambda pack: changed(pack, CONFIG, r=2**31),
    "config-alpha": lambda pack: changed(pack, CONFIG, lora_alpha=float("nan")),
    "config-large-alpha": lambda pack: changed(pack, CONFIG, lora_alpha=1e300),
    "config-alpha-text": lambda pack: changed(pack, CONFIG, lora_alpha="1"),
    "config-rank-text": lambda pack: changed(pack, CONFIG, r="1"),
    "config-patterns": lambda pack: changed(pack, CONFIG, rank_pattern=[1]),
    "config-broken-pattern": lambda pack: changed(pack, CONFIG, alpha_pattern={"(": 1}),
    "config-slow-pattern": lambda pack: changed(pack, CONFIG, alpha_pattern={r"(\w|\w|\.)*!": 1}),
    "weights-header": lambda pack: replaced(pack, WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"),
    "weights-nested": lambda pack: replaced(pack, WEIGHTS, len(NESTED).to_bytes(8, "little") + NESTED),
    "weights-other-hash": sparse,
    "weights-link": lambda pack: instead(pack, lambda file: file.symlink_to("/etc/passwd")),
    "weights-pipe": lambda pack: instead(pack, os.mkfifo),
    "weights-folder": lambda pack: instead(pack, Path.mkdir),
    "stray": lambda pack: (pack / "run.py").write_text("1 / 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pack_is_refused(app: FastAPI, pack: Path, name: str) -> None:
    """In one line, without opening what lies elsewhere or waiting for what never comes."""
    shutil.copytree(pack, pack.parent / name)
    HOSTILE[name](pack.parent / name)
    memory = app.state.scheduler.system.memory_bytes
    answer = call(app, "POST", "/domains", json={"path": name}, headers=TOKEN)
    assert (answer.status_code, refused(answer)["type"]) == (422, "bad_pack")
    assert app.state.scheduler.system.memory_bytes == memory
    assert app.state.scheduler.system.experts == DOMAINS


def test_the_same_domain_in_other_letters(app: FastAPI, pack: Path) -> None:
    assert DOMAINS[0].upper() != DOMAINS[0]
    body = {"path": pack.name, "domains": [DOMAINS[0].upper()]}
    assert refused(call(app, "POST", "/domains", json=body, headers=TOKEN))["type"] == "bad_pack"
    again = call(app, "POST", "/domains", json={"path": pack.name}, headers=TOKEN)
    assert (again.status_code, refused(again)["type"]) == (409, "conflict")
