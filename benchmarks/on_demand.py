"""What it costs to hold few of many adapters in memory: requests over 32 of them, with room for 4, 8 and all.

    python benchmarks/on_demand.py
    python benchmarks/on_demand.py --requests 64 --rounds 1  # a look

The shipped pack's base, with adapters made of its first in a pack of its own. The same requests, each of an expert
drawn by Zipf's law, in two ways: offline (`define`, which takes one expert's rows together), and as a server takes them
(the scheduler, first come first served, all submitted at once). Texts must be equal. A ratio is of tokens/s to those
with all adapters in memory without a budget, of the same round; medians over the rounds.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lora_lexicon.compose.mixture import read_manifest
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.domains.router import load_router
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.inference.engine import define
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.layout import About, write_manifest
from lora_lexicon.resources import find_model
from lora_lexicon.serve.scheduler import Scheduler
from lora_lexicon.serve.work import Ended, Work

MODEL, EXPERTS, ROOM = "tiny", 32, (4, 8, 32)
DECODING = Decoding(max_new_tokens=16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Few of many adapters in memory.")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        report(measure(make_pack(Path(folder) / "pack"), arguments), arguments)


def make_pack(pack: Path) -> Path:
    """The shipped pack with 32 domains: copies of its first, with other signs in half of the factors."""
    source = find_model(MODEL)
    manifest, router = read_manifest(source), load_router(source)
    first = source / "adapters" / manifest.domains[0]
    names, adapters, chance = [f"domain{n:02}" for n in range(EXPERTS)], [], torch.Generator().manual_seed(3)
    shutil.copytree(source / "base", pack / "base")
    for name in names:
        own = pack / "adapters" / name
        shutil.copytree(first, own, ignore=shutil.ignore_patterns("expert.json"))
        tensors = load_file(own / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            if "lora_B" in key:
                tensors[key] = tensor * (torch.rand(tensor.shape, generator=chance) < 0.5).float().mul(2).sub(1)
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        adapters.append(load_adapter(own, name))
        router = router.with_domain(name, np.eye(len(router.centroids[0]), dtype=np.float32)[[len(names)]], [name])
    for name in manifest.domains:
        router = router.without_domain(name)
    base = manifest.record["base"]
    write_manifest(pack, about=About("many"), base=base, router=router, adapters=adapters, made_from={})
    return pack


def offline(system: System, asked: list[tuple[str, str]], experts: Any, size: int) -> list[tuple[str, int]]:
    weights = np.eye(EXPERTS, dtype=np.float32)[experts]
    return [(d.text, d.tokens) for d in define(system, asked, DECODING, batch_size=size, weights=weights)]


def served(system: System, asked: list[tuple[str, str]], experts: Any, size: int) -> list[tuple[str, int]]:
    found: dict[int, Any] = {}
    scheduler = Scheduler(system, batch_size=size, limit=len(asked))
    works = [
        Work(term, context, system.experts[experts[i]], DECODING, lambda event, i=i: found.update({i: event}))
        for i, (term, context) in enumerate(asked)
    ]
    scheduler.submit(works)
    scheduler.close()
    assert all(isinstance(event, Ended) for event in found.values()), "a request failed"
    return [(found[i].definition.text, found[i].definition.tokens) for i in range(len(asked))]


def measure(pack: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By way and room: tokens/s of each round, and the loads of the first, with nothing in memory at its start."""
    chance = np.random.default_rng(5)
    chances = 1 / np.arange(1, EXPERTS + 1)
    experts = chance.choice(EXPERTS, arguments.requests, p=chances / chances.sum())
    asked = [(f"word{i}", f"the word{i} of another") for i in range(arguments.requests)]
    systems = {"all": load_system(str(pack))}
    one = load_system(str(pack), expert_memory=10**12).residents
    assert one is not None
    size = one.sources[0].bytes
    for room in ROOM:
        systems[str(room)] = load_system(str(pack), expert_memory=room * size)
    found: dict[str, dict[str, Any]] = {}
    for way in (offline, served):
        way(systems["all"], asked[:16], experts[:16], arguments.batch_size)  # warm
        rates: dict[str, Any] = {name: [] for name in systems}
        loads: dict[str, list[int]] = {name: [] for name in systems}
        for number in range(arguments.rounds):
            texts = {}
            for name, system in systems.items():
                before = system.residents.loads if system.residents else 0
                start = time.perf_counter()
                texts[name] = way(system, asked, experts, arguments.batch_size)
                rates[name].append(sum(tokens for _, tokens in texts[name]) / (time.perf_counter() - start))
                loads[name].append(system.residents.loads - before if system.residents else 0)
            assert all(own == texts["all"] for own in texts.values()), "other texts"
            shown = ", ".join(f"{name} {own[-1]:,.0f}" for name, own in rates.items())
            print(f"{way.__name__}, round {number + 1}: {shown} tokens/s", file=sys.stderr)
        ratios = {
            name: statistics.median(a / b for a, b in zip(own, rates["all"], strict=True))
            for name, own in rates.items()
        }
        found[way.__name__] = {"ratio": ratios, "loads": loads, "tokens_per_second": rates}
    return found


def report(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    for way, own in found.items():
        for name, ratio in own["ratio"].items():
            print(f"{way:8} room for {name:>3}: {ratio:.2f} of the tokens/s, loads a round {own['loads'][name]}")
    print(
        json.dumps(
            {
                "claim": "few of many adapters in memory",
                "unit": "tokens/s with all in memory",
                **found,
                "requests": arguments.requests,
                "environment": {
                    "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                },
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
