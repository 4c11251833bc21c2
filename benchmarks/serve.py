"""A server under load: nothing lost, nothing wrong, while a domain joins and leaves.

    python benchmarks/serve.py                   # 10,000 requests from 64 clients
    python benchmarks/serve.py --requests 500    # a look

It makes a second pack of the one that ships, with one domain more, starts `lora-lexicon serve tiny` as a process on
127.0.0.1, and drives it: entries of the shipped sample, most routed and greedy, some of a named domain, some sampled,
some streamed. After a third of the answers the domain is added, after two thirds it is removed. Every answer is
compared with what `define` writes offline; what was asked while the domains changed may be as before or as after.

The peer is `define` itself, on the same requests, in one list, with the same batch size: what HTTP, the queue and the
scheduler cost. Clients, checks and server share the machine.
"""

import argparse
import asyncio
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lora_lexicon.compose.system import System, load_system
from lora_lexicon.inference.engine import define
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.layout import place_adapter
from lora_lexicon.packs.pack import add_expert
from lora_lexicon.resources import find_model

MODEL, NEWCOMER, TOKEN = "tiny", "newcomer", "benchmark"
DISTINCT = 1000  # prompts; they are asked again and again
SECRET = {"authorization": f"Bearer {TOKEN}"}
SAMPLED = Decoding("sample", seed=7)


@dataclass
class Request:
    """One request, and the answers that are right before and after the newcomer is there."""

    body: dict[str, Any]
    right: tuple[tuple[str, str], tuple[str, str]]


@dataclass
class Run:
    """What happened. `phase` counts changes: even between them, odd while one is under way."""

    phase: int = 0
    answered: int = 0
    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description="A server under load.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        grown = make_grown(Path(folder))
        requests = make_requests(load_system(MODEL), load_system(str(grown)))
        asked = [requests[i % len(requests)] for i in range(arguments.requests)]
        offline = time_offline(asked[: min(len(asked), 1000)], arguments.batch_size)
        process, url = start(grown.parent, arguments.batch_size)
        try:
            run, seconds = asyncio.run(drive(url, asked, arguments.clients))
        finally:
            process.terminate()
            code = process.wait(60)
    report(run, seconds, offline, arguments, code)


def prompts() -> list[tuple[str, str]]:
    """Of the shipped sample's valid and test entries."""
    text = gzip.decompress(files("lora_lexicon.data").joinpath("samples/wordnet.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    return list(dict.fromkeys((row["term"], row["context"]) for row in rows if row["split"] != "train"))


def make_grown(folder: Path) -> Path:
    """The shipped pack with a domain more: another domain's adapter, with half of its factors' signs turned."""
    pack, own = find_model(MODEL), folder / "expert"
    place_adapter(own, pack / "adapters" / load_system(MODEL).experts[0], NEWCOMER)
    expert = own / "adapters" / NEWCOMER
    (expert / "expert.json").unlink()
    tensors = load_file(expert / "adapter_model.safetensors")
    chance = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor * (torch.rand(tensor.shape, generator=chance) < 0.5).float().mul(2).sub(1)
    save_file(tensors, expert / "adapter_model.safetensors", metadata={"format": "pt"})
    members = [prompt for prompt in prompts() if prompt[0][0] in "abc"]
    add_expert(pack, expert, members, [], base=str(pack / "base"), out=folder / "packs" / NEWCOMER)
    return folder / "packs" / NEWCOMER


def make_requests(before: System, after: System) -> list[Request]:
    """Seven of ten are routed and greedy, one names a domain, one samples, one is streamed."""
    asked, made = prompts()[:DISTINCT], []
    named = [before.experts[i % len(before.experts)] for i in range(len(asked))]
    hot = np.eye(len(before.experts), dtype=np.float32)[[before.experts.index(name) for name in named]]
    right = {
        "greedy": [define(before, asked), define(after, asked)],
        "sampled": [define(before, asked, SAMPLED), define(after, asked, SAMPLED)],
        "named": [define(before, asked, weights=hot)] * 2,
    }
    for i, (term, context) in enumerate(asked):
        kind = {7: "named", 8: "sampled"}.get(i % 10, "greedy")
        more = {7: {"domain": named[i]}, 8: {"sample": True, "seed": SAMPLED.seed}, 9: {"stream": True}}.get(i % 10, {})
        first, second = ((d[i].text, d[i].domain) for d in right[kind])
        made.append(Request({"term": term, "context": context, **more}, (first, second)))
    return made


def time_offline(asked: Sequence[Request], batch_size: int) -> float:
    """Definitions a second of `define`, on the prompts alone."""
    system = load_system(MODEL)
    listed = [(request.body["term"], request.body["context"]) for request in asked]
    define(system, listed[:batch_size], batch_size=batch_size)
    began = time.perf_counter()
    define(system, listed, batch_size=batch_size)
    return len(listed) / (time.perf_counter() - began)


def start(packs: Path, batch_size: int) -> tuple["subprocess.Popen[str]", str]:
    command = [sys.executable, "-m", "lora_lexicon.cli.main", "serve", MODEL, "--port", "0", "--packs", str(packs)]
    environment = {**os.environ, "LORA_LEXICON_TOKEN": TOKEN}
    process = subprocess.Popen(
        [*command, "--batch-size", str(batch_size)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


async def drive(url: str, asked: Sequence[Request], clients: int) -> tuple[Run, float]:
    """Asks all, `clients` at a time, and changes the domains in between."""
    run, waiting = Run(), iter(asked)
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def work() -> None:
            for request in waiting:
                await ask(client, request, run)

        async def change() -> None:
            run.memory.append(await memory(client))
            for part, name, method, path, body in (
                (1 / 3, "add", "POST", "/domains", {"path": NEWCOMER, "domains": [NEWCOMER]}),
                (2 / 3, "remove", "DELETE", f"/domains/{NEWCOMER}", None),
            ):
                while run.answered < part * len(asked):
                    await asyncio.sleep(0.01)
                began = time.perf_counter()
                run.phase += 1
                answer = await client.request(method, path, json=body, headers=SECRET)
                run.phase += 1
                run.changes[name] = time.perf_counter() - began
                answer.raise_for_status()
                run.memory.append(await memory(client))

        began = time.perf_counter()
        await asyncio.gather(change(), *(work() for _ in range(clients)))
        return run, time.perf_counter() - began


async def memory(client: httpx.AsyncClient) -> int:
    """Bytes of the model, as the server counts them."""
    lines = (await client.get("/metrics")).text.splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("lora_lexicon_memory_bytes "))


async def ask(client: httpx.AsyncClient, request: Request, run: Run) -> None:
    began, phase = time.perf_counter(), run.phase
    try:
        answer = await client.post("/define", json=request.body)
        if answer.status_code != 200:
            run.failed.append(f"{answer.status_code} {answer.text}")
            return
        own = ended(answer.text) if "stream" in request.body else answer.json()["definitions"][0]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        run.failed.append(repr(error))
        return
    finally:
        run.answered += 1
        run.seconds.append(time.perf_counter() - began)
    settled = phase == run.phase and phase % 2 == 0
    right = {request.right[phase // 2 % 2]} if settled else set(request.right)
    if (own["definition"], own["domain"]) not in right:
        run.wrong.append(f"{request.body}: {own['definition']!r} by {own['domain']}, not {right}")


def ended(text: str) -> dict[str, Any]:
    """The `end` of a stream, whose tokens add up to it."""
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    told = [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]
    words = "".join(data["text"] for kind, data in told if kind == "token")
    end = next(data for kind, data in told if kind == "end")
    if end["definition"] != words:
        raise ValueError(f"a stream of {words!r} ends with {end['definition']!r}")
    return end


def report(run: Run, seconds: float, offline: float, arguments: argparse.Namespace, code: int) -> None:
    rate = len(run.seconds) / seconds
    centiles = statistics.quantiles(run.seconds, n=100)
    for line in [*run.failed[:5], *run.wrong[:5]]:
        print(line, file=sys.stderr)
    for name, value in {
        "requests": len(run.seconds),
        "lost": len(run.failed),
        "wrong": len(run.wrong),
        "definitions a second": f"{rate:.1f}",
        "`define` offline": f"{offline:.1f}",
        "p50, ms": f"{centiles[49] * 1000:.0f}",
        "p95, ms": f"{centiles[94] * 1000:.0f}",
        "p99, ms": f"{centiles[98] * 1000:.0f}",
        "adding took, s": f"{run.changes['add']:.2f}",
        "removing took, s": f"{run.changes['remove']:.2f}",
        "model before, with, after, bytes": ", ".join(f"{size:,}" for size in run.memory),
        "the server ended with": code,
    }.items():
        print(f"{name:34}{value}")
    print(
        json.dumps(
            {
                "claim": "a server under load, while a domain joins and leaves: none lost, none wrong",
                "unit": "definitions a second",
                "ours": rate,
                "peers": {"define offline": offline},
                "ratio": {"define offline": rate / offline},
                "requests": len(run.seconds),
                "clients": arguments.clients,
                "lost": len(run.failed),
                "wrong": len(run.wrong),
                "milliseconds": {f"p{n}": centiles[n - 1] * 1000 for n in (50, 95, 99)},
                "changes": run.changes,
                "memory_returns": run.memory[0] == run.memory[2],
                "environment": {
                    "python": platform.python_version(), "torch": torch.__version__, "uvicorn": version("uvicorn"),
                    "cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine(),
                },
            }
        )
    )  # fmt: skip
    sys.exit(bool(run.failed or run.wrong or code or run.memory[0] != run.memory[2]))


if __name__ == "__main__":
    main()
