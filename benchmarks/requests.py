"""What routing costs of a request: the time of `define`, by its time where the experts are given.

    python benchmarks/requests.py            # the shipped pack, prompts of the WordNet sample that ships

The peer is the same request routed before it is read (`System.choose`), as it must be where the router reads another
model's states. The three take turns. Alone: one prompt at a time. Together: all of them in batches of 64. Medians of
the ratios in one turn.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import load_entries
from lora_lexicon.inference.engine import define


def main() -> None:
    parser = argparse.ArgumentParser(description="What routing costs of a request.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(["sample:wordnet"], Path(folder) / "entries", limit=4000)
        entries = load_entries(Path(folder) / "entries").split("train")[: arguments.prompts]
    prompts = [(entry.term, entry.context) for entry in entries]
    system = load_system(arguments.model)
    define(system, prompts)  # warm-up
    few = [[prompt] for prompt in prompts[:60]]
    costs = {
        "alone": added(system, few * arguments.rounds),
        "together": added(system, [prompts] * arguments.rounds),
    }
    for name, (passing, before) in costs.items():
        print(f"{name:10}routing adds {passing:6.1%} in passing, {before:6.1%} before")
    print(
        json.dumps(
            {
                "claim": "routing costs little of a request",
                "unit": "of a request's time",
                "ours": {name: passing for name, (passing, _) in costs.items()},
                "peers": {"before": {name: before for name, (_, before) in costs.items()}},
                "ratio": {"before": {name: before / passing for name, (passing, before) in costs.items()}},
                "environment": {
                    "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                },
            }
        )
    )  # fmt: skip


def added(system: System, requests: list[list[tuple[str, str]]]) -> tuple[float, float]:
    """(what routing in passing adds to a request, what routing before it does), of the request's time without."""
    shares = []
    for number, prompts in enumerate(requests):
        weights, _ = system.choose(prompts)
        ways: list[Callable[[], object]] = [
            partial(define, system, prompts, weights=weights),
            partial(define, system, prompts),
            partial(_before, system, prompts),
        ]
        times = [0.0] * 3
        for way in (0, 1, 2) if number % 2 else (2, 1, 0):
            times[way] = timed(ways[way])
        shares.append((times[1] / times[0] - 1, times[2] / times[0] - 1))
    passing, before = (statistics.median(own) for own in zip(*shares, strict=True))
    return passing, before


def _before(system: System, prompts: list[tuple[str, str]]) -> None:
    define(system, prompts, weights=system.choose(prompts)[0])


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
