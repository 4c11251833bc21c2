"""What routing costs of a request: the time of `System.choose` by that of `define`, which holds it.

    python benchmarks/requests.py            # the shipped pack, prompts of the WordNet sample that ships

Alone: medians over prompts, one at a time. Together: all of them in batches of 64, the second of two times.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import load_entries
from lora_lexicon.inference.engine import define


def main() -> None:
    parser = argparse.ArgumentParser(description="What routing costs of a request.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(["sample:wordnet"], Path(folder) / "entries", limit=4000)
        entries = load_entries(Path(folder) / "entries").split("train")[: arguments.prompts]
    prompts = [(entry.term, entry.context) for entry in entries]
    system = load_system(arguments.model)
    for _ in range(2):  # the first is warm-up
        together = [timed(lambda: system.choose(prompts)), timed(lambda: define(system, prompts))]
    alone = [
        statistics.median(timed(lambda one=one: system.choose([one])) for one in prompts[:60]),
        statistics.median(timed(lambda one=one: define(system, [one])) for one in prompts[:60]),
    ]
    shares = {"alone": alone[0] / alone[1], "together": together[0] / together[1]}
    for name, share in shares.items():
        print(f"{name:10}{share:6.1%} of a request is routing")
    print(
        json.dumps(
            {
                "claim": "routing costs little of a request",
                "unit": "of a request's time",
                "ours": shares,
                "peers": {},
                "ratio": {},
                "environment": {
                    "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                },
            }
        )
    )  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
