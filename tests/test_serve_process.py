"""`lora-lexicon serve` as a process: OpenAI's own client, domains that come and go under load, and how it ends."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from click.testing import Result
from composing import DOMAINS, PROMPTS, make_lora, workshop
from conftest import WORDS

from lora_lexicon.compose.system import load_system
from lora_lexicon.inference.engine import define
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import add_expert, build_pack

TOKEN = {"authorization": "Bearer secret"}
TERMS = [(word, f"the {word} is here") for word in WORDS]
SHORT = Decoding(max_new_tokens=8)
OPENSSL = shutil.which("openssl")


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server of a pack, which may take in `packs/grown`."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    pack, grown = shop.folder / "pack", shop.folder / "packs" / "grown"
    build_pack(str(shop.base), shop.lora, shop.domains, pack, include_base=True)
    grown.parent.mkdir()
    add_expert(pack, make_lora(shop.base, shop.folder / "slang", seed=9), [PROMPTS[3]], [], out=grown)
    token = shop.folder / "token"
    token.write_text("secret\n")
    command = [sys.executable, "-m", "lora_lexicon.cli.main", "serve", str(pack), "--port", "0", "--packs"]
    command += [str(grown.parent), "--token-file", str(token), "--batch-size", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    yield SimpleNamespace(pack=pack, grown=grown, process=process, url=url)
    process.kill()
    process.wait()


def ask(url: str, term: str, context: str, **more: Any) -> tuple[str, str]:
    body = {"term": term, "context": context, "max_tokens": SHORT.max_new_tokens, **more}
    answer = httpx.post(f"{url}/define", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (own,) = answer.json()["definitions"]
    return own["definition"], own["domain"]


def test_openai_s_client(server: SimpleNamespace) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["auto", "base", *DOMAINS]
    prompts = [f"{term}\t{context}" for term, context in TERMS[:3]]
    wanted = define(load_system(str(server.pack)), TERMS[:3], SHORT)
    found = client.completions.create(model="auto", prompt=prompts, max_tokens=8, temperature=0)
    assert [choice.text for choice in found.choices] == [w.text for w in wanted]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(w.tokens for w in wanted)
    chunks = client.completions.create(model="auto", prompt=prompts[0], max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted[0].text
    with pytest.raises(openai.NotFoundError, match="no domain 'gpt'"):
        client.completions.create(model="gpt", prompt="apple")
    with pytest.raises(openai.UnprocessableEntityError, match="empty"):
        client.completions.create(model="auto", prompt="")
    several = client.completions.create(model="auto", prompt=prompts[0], max_tokens=8, temperature=0.9, n=3, seed=1)
    assert len({choice.text for choice in several.choices}) > 1
    unknown: list[dict[str, Any]] = [{"logprobs": 0}, {"echo": True}, {"stop": ["x"]}, {"suffix": "s"}, {"best_of": 2}]
    for more in [*unknown, {"frequency_penalty": 0.5}, {"logit_bias": {"5": 1}}, {"extra_body": {"min_p": 0.1}}]:
        with pytest.raises(openai.UnprocessableEntityError, match="is not supported: leave it out"):
            client.completions.create(model="auto", prompt="apple", **more)


def test_openai_s_client_has_texts_continued(server: SimpleNamespace) -> None:
    """A chat without a template is its lines as a text; both, and their streams, are what `generate` writes."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    system = load_system(str(server.pack))
    text, tokenizer = "Define the word.\nan apple\n", system.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    for name in ("base", *DOMAINS):
        weights = torch.tensor([[float(name == domain) for domain in DOMAINS]])
        with system.routed(weights), torch.inference_mode():
            wanted = system.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        words = tokenizer.decode(wanted, skip_special_tokens=True).strip()
        asked: dict[str, Any] = {"model": name, "temperature": 0}
        found = client.completions.create(prompt=text, max_tokens=8, **asked)
        assert (found.choices[0].text, found.usage.prompt_tokens) == (words, len(ids))
        asked["messages"] = [{"role": "system", "content": "Define the word."}, {"role": "user", "content": "an apple"}]
        said = client.chat.completions.create(max_completion_tokens=8, **asked)
        assert (said.object, said.choices[0].message.role, said.usage) == ("chat.completion", "assistant", found.usage)
        assert (said.choices[0].message.content, said.choices[0].finish_reason) == (
            words,
            found.choices[0].finish_reason,
        )
        chunks = list(client.chat.completions.create(max_tokens=8, stream=True, **asked))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == words
        assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="base", prompt="an apple\n" * 100)
    assert refused.value.code == "context_length_exceeded"


def test_domains_come_and_go_under_load(server: SimpleNamespace) -> None:
    allowed = [{(d.text, d.domain)} for d in define(load_system(str(server.pack)), TERMS, SHORT)]
    for i, d in enumerate(define(load_system(str(server.grown)), TERMS, SHORT)):
        allowed[i].add((d.text, d.domain))
    with ThreadPoolExecutor(8) as pool:
        load = [pool.submit(ask, server.url, *TERMS[i % len(TERMS)]) for i in range(80)]
        added = httpx.post(f"{server.url}/domains", json={"path": "grown"}, headers=TOKEN, timeout=60)
        assert (added.status_code, added.json()["added"]) == (201, ["slang"])
        assert ask(server.url, "apple", "", domain="slang")[1] == "slang"
        removed = httpx.delete(f"{server.url}/domains/slang", headers=TOKEN, timeout=60)
        assert removed.json()["domains"] == list(DOMAINS)
        for i, future in enumerate(load):
            assert future.result() in allowed[i % len(TERMS)]


def test_a_stream_that_is_left_frees_its_place(server: SimpleNamespace) -> None:
    body = {"requests": [{"term": word} for word in WORDS], "max_tokens": 256, "stream": True}
    with httpx.stream("POST", f"{server.url}/define", json=body) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while (health := httpx.get(f"{server.url}/health").json())["running"] or health["queued"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_taken_port_and_an_open_address(cli: Callable[..., Result], server: SimpleNamespace, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    (tmp_path / "token").write_text(" \n")
    (tmp_path / "two").write_text("two words\n")
    for arguments, says in (
        (["--port", port], f"port {port} of 127.0.0.1 is taken"),
        (["--host", "0.0.0.0"], "needs a token"),
        (["--host", "192.0.2.1", "--token-file", server.pack.parent / "token"], "cannot listen"),
        (["--token-file", tmp_path / "absent"], "cannot be read"),
        (["--token-file", tmp_path / "token"], "is empty"),
        (["--packs", tmp_path / "absent"], "is no folder"),
        (["--token-file", tmp_path / "two"], "one word"),
        (["--tls-cert", tmp_path / "absent"], "is no file"),
        (["--tls-cert", tmp_path / "two"], "cannot be used"),
        (["--tls-key", tmp_path / "two"], "add --tls-cert"),
        (["--base", "nowhere"], "no base"),
    ):
        result = cli("serve", server.pack, *(arguments if "--port" in arguments else [*arguments, "--port", "0"]))
        assert result.exit_code == 1
        assert says in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(OPENSSL is None, reason="openssl makes the certificate")
def test_https_and_an_end_at_once(server: SimpleNamespace, tmp_path: Path) -> None:
    """Nobody answers before the model is there; a second Ctrl-C waits for no answer, and says nothing."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lora_lexicon.cli.main", "serve", str(server.pack), "--port", str(port)]
    command += ["--tls-cert", str(certificate), "--tls-key", str(key), "--batch-size", "1", "--queue", "2000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == f"pack answers at https://127.0.0.1:{port}\n"
        trusting = ssl.create_default_context(cafile=certificate)
        with httpx.Client(verify=trusting, base_url=f"https://localhost:{port}", timeout=60) as client:
            body = {"requests": [{"term": f"{w}{i}"} for w in WORDS for i in range(60 // len(WORDS))], "stream": True}
            with client.stream("POST", "/define", json={**body, "max_tokens": 256}) as answer:
                assert next(answer.iter_lines()) == "event: start"
                process.send_signal(signal.SIGINT)
                while True:  # until the first has been heard: then nobody is let in any more
                    try:
                        socket.create_connection(("127.0.0.1", port)).close()
                    except ConnectionRefusedError:
                        break
                    time.sleep(0.02)
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_it_ends_when_all_is_answered(server: SimpleNamespace) -> None:
    """The last test here: the server is gone then."""
    count = len(TERMS)
    begun = threading.Barrier(count + 1)

    def read(term: str, context: str) -> str:
        body = {"term": term, "context": context, "max_tokens": 64, "stream": True}
        with httpx.stream("POST", f"{server.url}/define", json=body, timeout=60) as answer:
            begun.wait(20)
            return "".join(answer.iter_text())

    with ThreadPoolExecutor(count) as pool:
        load = [pool.submit(read, *prompt) for prompt in TERMS]
        begun.wait(20)
        server.process.send_signal(signal.SIGTERM)
        assert all("event: done" in future.result() and "error" not in future.result() for future in load)
    assert server.process.wait(20) == 0
    host, _, port = server.url.removeprefix("http://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
