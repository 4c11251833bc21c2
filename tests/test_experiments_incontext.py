"""experiments/incontext.py: nothing is asked twice, dropped or made up, whatever a server answers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import Result
from composing import DOMAINS, make_entries, workshop

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import LexiconError, MissingExtraError, RecipeError
from lora_lexicon.evaluation.metrics import bleu
from lora_lexicon.experiments.endpoint import Endpoint
from lora_lexicon.experiments.incontext import Answered, curve, run
from lora_lexicon.experiments.prompts import text
from lora_lexicon.folders import locked
from lora_lexicon.inference.batch import Row
from lora_lexicon.inference.engine import text_of, write
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import build_pack
from lora_lexicon.serve.app import Settings, create_app

KEY = "sk-" + "secret" * 4
TESTS = [Entry(f"word{i}", f"a word{i} here", f"meaning number {i}", "test") for i in range(12)]
TRAIN = [Entry(f"known{i}", f"a known{i} here", f"sense {i}", "test") for i in range(9)]
Reply = tuple[int, Any]  # a status and a body: JSON, or bytes as they are


def said(content: Any, finish: str = "stop") -> Reply:
    """A completion of both interfaces."""
    choice = {"message": {"role": "assistant", "content": content}, "text": content, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def refusal(status: int, message: str, code: Any = None) -> Reply:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": code}}


class StandIn:
    """A server that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: said("a thing")
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        stand_in, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    stand_in.bodies.append(body)
                    stand_in.keys.add(self.headers["authorization"])
                status, answer = stand_in.reply(body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(content)

            def handle(self) -> None:
                with suppress(ConnectionError):  # of a client that was killed
                    super().handle()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def asked(self) -> Counter[str]:
        """How often each test entry was asked for."""
        return Counter(word(body) for body in self.bodies)


def word(body: dict[str, Any]) -> str:
    last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return last.rpartition('of "')[2].partition('"')[0]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = StandIn()
    yield server
    server.server.shutdown()
    server.server.server_close()


def ask(stand_in: StandIn, folder: Path, tests: list[Entry] = TESTS, **more: Any) -> Answered:
    endpoint = Endpoint(stand_in.url, "big", **{"retries": 1, "timeout": 20, "concurrency": 3, **more})
    return run(tests, [[] for _ in tests], endpoint, folder, "random-0")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_is_written_in_its_place(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.reply = lambda body: said(f'Definition: "the {word(body)}"')
    found = ask(stand_in, tmp_path / "out", temperature=0.5, max_tokens=9)
    assert stand_in.asked() == Counter(test.term for test in TESTS)
    assert {(b["model"], b["temperature"], b["max_completion_tokens"]) for b in stand_in.bodies} == {("big", 0.5, 9)}
    assert stand_in.keys == {f"Bearer {KEY}"}
    rows = lines(tmp_path / "out" / "predictions" / "random-0.jsonl")
    assert list(rows[0]) == ["term", "context", "prediction", "references", "source", "domain"]
    assert [(r["term"], r["prediction"], r["references"], r["domain"]) for r in rows] == [
        (test.term, f"the {test.term}", [test.definition], "big") for test in TESTS
    ]
    summary = found.summary()
    wanted = sum(bleu(row["prediction"], row["references"]) for row in rows) / len(rows)
    assert summary.pop("scores")["bleu"]["value"] == pytest.approx(wanted)
    counts = {"rows": 12, "too_long": 0, "empty": 0, "cleaned": 12, "cut": 0, "uncounted": 0}
    assert summary == {**counts, "prompt_tokens": 84, "completion_tokens": 36}
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or KEY not in file.read_text(), "the key is written nowhere"


def test_a_busy_or_failing_server_is_asked_again(stand_in: StandIn, tmp_path: Path) -> None:
    replies = {429: refusal(429, "slow down"), 500: (500, b"oops"), 503: (503, {})}
    tries: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> Reply:
        tries[word(body)] += 1
        return [*replies.values(), said("a thing")][min(tries[word(body)], 4) - 1]

    stand_in.reply = reply
    assert ask(stand_in, tmp_path / "out", retries=3).predictions == ["a thing"] * len(TESTS)
    assert set(stand_in.asked().values()) == {4}


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (refusal(401, f"Incorrect API key provided: {KEY}"), "refuses the key .*set OPENAI_API_KEY"),
        (refusal(403, "not yours"), "refuses the key"),
        (refusal(404, "The model `big` does not exist"), "no model 'big'.*does not exist"),
        (refusal(400, "temperature is not\nsupported"), r"refuses what it is asked with 400 \(temperature is not supp"),
        (refusal(429, "You exceeded your quota"), "still answers 429 after 2 tries .*quota"),
        ((500, b"<html>"), "still answers 500 after 2 tries"),
        ((200, b"<html>hello</html>"), "no JSON"),
        ((200, b'{"choices": ['), "no JSON"),
        ((200, b"[" * 100_000), "no JSON"),
        ((200, {"choices": []}), "no completion"),
        ((200, ["choices"]), "no completion"),
        ((200, b"null"), "no completion"),
        (said(5), "no completion"),
        (said(["a"]), "no completion"),
    ],
)
def test_other_failures_end_in_one_line(stand_in: StandIn, tmp_path: Path, reply: Reply, says: str) -> None:
    stand_in.reply = lambda _: reply
    with pytest.raises(LexiconError, match=says) as failed:
        ask(stand_in, tmp_path / "out", concurrency=1)
    assert KEY not in str(failed.value)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / "out").exists(), "nothing was answered, and nothing is left"
    stand_in.reply = lambda _: said("a thing")
    ask(stand_in, tmp_path / "out", max_tokens=5)  # what was mended takes its place


def test_silence_and_nobody_there(stand_in: StandIn, tmp_path: Path) -> None:
    def late(_: dict[str, Any]) -> Reply:
        time.sleep(0.6)
        return said("a thing")

    stand_in.reply = late
    with pytest.raises(LexiconError, match=r"did not answer within 0\.2 s in 2 tries"):
        ask(stand_in, tmp_path / "out", timeout=0.2)
    gone = Endpoint("http://127.0.0.1:9/v1", "big", retries=0)
    with pytest.raises(LexiconError, match="cannot be reached"):
        run(TESTS, [[]] * len(TESTS), gone, tmp_path / "out", "random-0")


TOO_LONG = [
    refusal(400, "too much", "context_length_exceeded"),
    refusal(400, "This model's maximum context length is 2048 tokens. However, you requested 5000 tokens", 400),
    refusal(400, "the request exceeds the available context size, try increasing it"),
    refusal(400, "prompt is too long: 213462 tokens > 200000 maximum"),
    refusal(400, "The input token count (1048577) exceeds the maximum number of tokens allowed (1048575)."),
    refusal(413, "too many tokens"),
]


def test_what_is_too_long_or_empty_is_counted_and_scores_nothing(stand_in: StandIn, tmp_path: Path) -> None:
    replies = dict(zip((test.term for test in TESTS), [*TOO_LONG, said(None), said("", "length")], strict=False))
    stand_in.reply = lambda body: replies.get(word(body), said("meaning number 9"))
    found = ask(stand_in, tmp_path / "out")
    count = len(TOO_LONG)
    assert [answer.too_long for answer in found.answers] == [i < count for i in range(len(TESTS))]
    assert found.predictions == [""] * (count + 2) + ["meaning number 9"] * 4
    summary = found.summary()
    assert (summary["too_long"], summary["empty"], summary["cut"], summary["cleaned"]) == (count, 2, 1, 0)
    assert summary["prompt_tokens"] == 7 * (len(TESTS) - count)
    scores = [bleu(text, [test.definition]) for text, test in zip(found.predictions, TESTS, strict=True)]
    assert summary["scores"]["bleu"]["value"] == pytest.approx(sum(scores) / len(scores))
    stand_in.reply = lambda _: TOO_LONG[0]
    nothing = ask(stand_in, tmp_path / "none")
    assert (nothing.summary()["too_long"], nothing.summary()["scores"]) == (len(TESTS), None)


def test_both_names_of_the_limit_are_known(stand_in: StandIn, tmp_path: Path) -> None:
    name = "max_completion_tokens"
    stand_in.reply = lambda body: refusal(400, f"{name} is unknown") if name in body else said("a thing")
    ask(stand_in, tmp_path / "old", concurrency=1, temperature=None)
    assert len(stand_in.bodies) == len(TESTS) + 1, "only the first question is asked under both"
    assert not any("temperature" in body for body in stand_in.bodies)
    ask(stand_in, tmp_path / "several", concurrency=5)
    stand_in.bodies.clear()
    ask(stand_in, tmp_path / "text", api="completions")
    assert [body["max_tokens"] for body in stand_in.bodies] == [64] * len(TESTS)
    stand_in.reply = lambda body: refusal(422, f"neither is known: {' '.join(body)}")
    with pytest.raises(LexiconError, match="neither is known"):
        ask(stand_in, tmp_path / "neither")


def test_what_stopped_goes_on(stand_in: StandIn, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "out" / "answers" / "random-0.jsonl"
    stand_in.reply = lambda body: said(word(body)) if len(stand_in.bodies) <= 5 else refusal(401, "no more")
    with pytest.raises(LexiconError, match="refuses the key"):
        ask(stand_in, out, concurrency=1)
    assert not (out / "predictions").exists()
    assert len(lines(journal)) == 1 + 5
    with journal.open("ab") as file:
        file.write(b'{"row": 5, "te')  # cut off by a kill
    stand_in.reply = lambda body: said(word(body))
    stand_in.bodies.clear()
    with pytest.raises(LexiconError, match=r"random-0.jsonl was begun with max_tokens 64, not 5: choose another --out"):
        ask(stand_in, out, max_tokens=5)
    with pytest.raises(LexiconError, match=r"begun with model \"big\", not \"other\""):
        run(TESTS, [[]] * len(TESTS), Endpoint(stand_in.url, "other"), out, "random-0")
    with pytest.raises(LexiconError, match="other entries or demonstrations"):
        ask(stand_in, out, [*TESTS[:-1], Entry("other", "", "else", "test")])
    with locked(out), pytest.raises(LexiconError, match="another command changes"):
        ask(stand_in, out)
    assert not stand_in.bodies
    told: list[int] = []
    endpoint = Endpoint(stand_in.url, "big", concurrency=7, timeout=5, retries=0)  # which change no answer
    found = run(TESTS, [[]] * len(TESTS), endpoint, out, "random-0", progress=told.append)
    assert stand_in.asked() == Counter(test.term for test in TESTS[5:])
    assert (told[0], sum(told)) == (5, len(TESTS))
    assert found.predictions == [test.term for test in TESTS], "of each one its own, and of the term alone all stays"
    assert ask(stand_in, out).answers == found.answers
    assert len(stand_in.bodies) == len(TESTS) - 5, "what is whole is asked no more"
    for line in (b"nonsense", b'{"row": 1}', b'{"row": 1, "text": 5}', b'{"row": [], "text": ""}', b"[]", b"[" * 10**5):
        damaged = tmp_path / "damaged" / "answers" / "random-0.jsonl"
        damaged.parent.mkdir(parents=True, exist_ok=True)
        damaged.write_bytes(journal.read_bytes() + line + b"\n")
        with pytest.raises(LexiconError, match=r"random-0\.jsonl:14: damaged: delete the file"):
            ask(stand_in, tmp_path / "damaged")


def test_a_killed_command_asks_nothing_twice(cli: Callable[..., Result], stand_in: StandIn, tmp_path: Path) -> None:
    entries, stop = make_entries(tmp_path), threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        if len(stand_in.bodies) > 30:
            stop.wait(30)
        return said(word(body))

    stand_in.reply = reply
    words = ["incontext", entries, "--endpoint", stand_in.url + "/", "--model", "big", "--shots", "0,2,1"]
    words += ["--examples", "random", "--examples", "retrieved", "--out", tmp_path / "out", "--concurrency", "4"]
    command = [sys.executable, "-m", "lora_lexicon.cli.main", *map(str, words)]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    while len(stand_in.bodies) < 34:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    stop.set()
    tests = load_entries(entries).split("test")
    done = sum(len(lines(file)) - 1 for file in (tmp_path / "out" / "answers").iterdir())
    assert done == 30
    stand_in.bodies.clear()
    stand_in.reply = lambda body: said(word(body))
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.output
    assert len(stand_in.bodies) == 6 * len(tests) - done
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert KEY not in result.output
    assert [(own["examples"], own["shots"]) for own in report["runs"]] == [
        (way, k) for way in ("random", "retrieved") for k in (0, 2, 1)
    ]
    assert len({own["signature"] for own in report["runs"]}) == 6
    assert sorted(file.stem for file in (tmp_path / "out" / "predictions").iterdir()) == sorted(
        f"{own['examples']}-{own['shots']}" for own in report["runs"]
    )
    scored = cli("score", tmp_path / "out" / "predictions" / "retrieved-2.jsonl", "--json")
    figures = json.loads(scored.stdout)["scores"]
    own = report["runs"][4]["scores"]
    assert {name: own[name]["interval"] for name in own} == {name: figures[name]["interval"] for name in figures}
    other = cli(*words, "--seed", "7")
    assert (other.exit_code, "begun with seed 42, not 7" in other.stderr) == (1, True)


def test_wrong_options_are_said_in_one_line(cli: Callable[..., Result], tmp_path: Path) -> None:
    entries = make_entries(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")

    def fails(*more: Any, out: str = "out", url: str = "http://127.0.0.1:9/v1") -> str:
        result = cli(
            "incontext", entries, "--endpoint", url, "--model", "m", "--out", tmp_path / out, "--retries", 0, *more
        )
        assert result.exit_code in (1, 2)
        assert not (tmp_path / "out").exists()
        return result.stderr

    assert "is no address" in fails(url="localhost:8000")
    assert "plain address" in fails(url=f"http://user:{KEY}@localhost/v1")
    assert KEY not in fails(url=f"http://user:{KEY}@localhost/v1")
    assert "plain address" in fails(url="http://localhost/v1?key=x")
    assert "cannot be reached" in fails("--shots", "0")
    assert "no list of numbers" in fails("--shots", "1,-2")
    assert "128 shots of" in fails()
    assert "no answers lie in it" in fails(out="full")
    assert "--base is the base of" in fails("--base", "tiny")
    assert "unknown embedder" in fails("--examples", "retrieved", "--embedder", "x", "--shots", "2")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    with pytest.raises(RecipeError, match="concurrency"):
        Endpoint("http://localhost/v1", "m", concurrency=0)


def test_without_openai_s_client_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-lexicon\[openai\]'"):
        run(TESTS, [[]] * len(TESTS), Endpoint("http://localhost/v1", "m"), tmp_path / "out", "random-0")


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of a pack in a thread: its address, and the pack."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    pack = shop.folder / "pack"
    build_pack(str(shop.base), shop.lora, shop.domains, pack, include_base=True)
    app = create_app(load_system(str(pack)), Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (socket,) = server.servers[0].sockets
    yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1", pack
    server.should_exit = True
    thread.join()


def test_against_our_own_server(
    cli: Callable[..., Result], served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked with no example is what the model itself continues; more examples than it reads are counted."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    url, pack = served
    entries = make_entries(tmp_path)
    tests = load_entries(entries).split("test")
    for api in ("completions", "chat"):
        result = cli(
            "incontext", entries, "--endpoint", url, "--model", "base", "--api", api, "--shots", "0,1,9",
            "--max-tokens", 6, "--out", tmp_path / api,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert (
            f"9 shots, random: {len(tests)} of {len(tests)} prompts do not fit what the model reads: no score"
            in result.stderr
        )
        report = json.loads((tmp_path / api / "report.json").read_text())
        assert [own["too_long"] for own in report["runs"]] == [0, 0, len(tests)]
        assert all(own["uncounted"] == 0 for own in report["runs"])
        assert report["runs"][2]["scores"] is None
        assert f"{report['runs'][1]['scores']['bleu']['value']:.2f}" in result.stdout
    system = load_system(str(pack))
    decoding, tokenizer = Decoding(max_new_tokens=6), system.tokenizer
    rows = []
    for test in tests:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text([], test), add_special_tokens=False)]
        weights = system.choose([(test.term, "")])[0]
        assert weights is not None
        rows.append(Row(ids, 0 * weights[0], decoding.uniforms("", ""), decoding))
    write(system, rows)
    answers = lines(tmp_path / "completions" / "answers" / "random-0.jsonl")[1:]
    assert {answer["row"]: answer["text"] for answer in answers} == {
        i: text_of(system, row.written) for i, row in enumerate(rows)
    }
    named = cli("incontext", entries, "--endpoint", url, "--model", "auto", "--shots", 0, "--out", tmp_path / "auto")
    assert (named.exit_code, f"one of base, {DOMAINS[0]}" in named.stderr) == (1, True)
    absent = cli("incontext", entries, "--endpoint", url, "--model", "gpt", "--shots", 0, "--out", tmp_path / "gpt")
    assert (absent.exit_code, "no model 'gpt'" in absent.stderr) == (1, True)


def test_a_curve_shows_what_it_says(stand_in: StandIn, tmp_path: Path) -> None:
    found = curve(TRAIN, TESTS, Endpoint(stand_in.url, "big"), tmp_path / "out", [4, 0, 2], seed=3)
    assert [own["shots"] for own in found] == [4, 0, 2]
    turns = [[m["content"] for m in body["messages"][1:-1]] for body in stand_in.bodies]
    assert Counter(len(own) // 2 for own in turns) == {4: 12, 0: 12, 2: 12}
    by_word: dict[str, dict[int, list[str]]] = {test.term: {} for test in TESTS}
    for body, own in zip(stand_in.bodies, turns, strict=True):
        by_word[word(body)][len(own) // 2] = own
    assert all(own[2] == own[4][:4] for own in by_word.values())
