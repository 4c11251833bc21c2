"""Whole models evaluated, in this process or in shards on Ray: each task loads one and takes a run of the entries."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lexicon.data.entry import Entry
from lora_lexicon.evaluation.run import Evaluation, evaluate, random_weights
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.tasks import Launcher, Progress

if TYPE_CHECKING:
    from lora_lexicon.experts.base import Quantize
    from lora_lexicon.inference.rerank import By


@dataclass(frozen=True)
class Settings:
    """How models are loaded (`compose.system.load_system`) and evaluated.

    Attributes:
        generate: definitions are written and scored, not only the loss computed.
        random_routing: a model with experts is evaluated a second time, routed at random.
        seed: of that routing.
        best, by, reward: how many candidates a definition is chosen from, and by what (see `inference.rerank`);
            the folder of the reward model, where that is what chooses.
        placed: how many of all entries get a place on the map of domains.
    """

    base: str | None
    dtype: str
    quantize: "Quantize"
    decoding: Decoding
    generate: bool = True
    random_routing: bool = False
    seed: int = 42
    best: int = 1
    by: "By" = "mbr"
    reward: str | None = None
    expert_memory: int | None = None
    placed: int = 0


def evaluate_models(
    models: Sequence[str],
    entries: Sequence[Entry],
    settings: Settings,
    launcher: Launcher,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Each model on all entries, in order; after one with experts, if asked for, itself routed at random.

    Shards change a figure by no more than rounding, as another batch size would; greedy definitions in float32 and
    sampled ones do not change. `tokens_per_second` is the mean of the shards'.

    Args:
        progress: is told (number of the model, rows done, rows in all).

    Raises:
        DataError: there are no entries.
    """
    count = max(1, min(launcher.slots, len(entries)))
    cuts = [i * len(entries) // count for i in range(count + 1)]
    tasks = [
        (model, entries[start:end], start, len(entries), settings) for model in models for start, end in pairwise(cuts)
    ]
    names = [f"{model}, shard {i + 1} of {count}" for model in models for i in range(count)]
    done = [0] * len(tasks)

    def report(task: int, so_far: int, rows: int) -> None:
        model, done[task] = task // count, so_far
        if progress:
            times = rows // len(tasks[task][1])  # that each entry is read
            progress(model, sum(done[model * count : (model + 1) * count]), times * len(entries))

    found = launcher.run(_evaluate, tasks, names, report)
    return [
        _joined(way)
        for model in range(len(models))
        for way in zip(*found[model * count : (model + 1) * count], strict=True)
    ]


def _evaluate(
    model: str,
    entries: Sequence[Entry],
    start: int,
    rows: int,
    settings: Settings,
    report: Callable[[int, int], Any],
) -> list[Evaluation]:
    """The entries from number `start` on, of so many rows in all."""
    from lora_lexicon.compose.system import load_system

    system = load_system(
        model,
        base=settings.base,
        dtype=settings.dtype,
        quantize=settings.quantize,
        expert_memory=settings.expert_memory,
    )
    reward = None
    if settings.reward:
        from lora_lexicon.inference.reward import load_reward

        reward = load_reward(
            Path(settings.reward), system, base=settings.base, dtype=settings.dtype, quantize=settings.quantize
        )
    ways: dict[str, Any] = {system.name: None}
    if settings.random_routing and system.experts:
        weights = random_weights(rows, len(system.experts), settings.seed)
        ways[f"{system.name}-random"] = weights[start : start + len(entries)]
    done, total = 0, len(entries) * len(ways) * (2 if settings.generate else 1)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return [
        evaluate(
            system,
            entries,
            name=way,
            decoding=settings.decoding,
            weights=weights,
            defined=None if settings.generate else 0,
            best=settings.best,
            by=settings.by,
            reward=reward,
            placed=math.ceil(settings.placed * len(entries) / rows),
            progress=advance,
        )
        for way, weights in ways.items()
    ]


def _joined(shards: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of one system on runs of entries, as one."""
    first = shards[0]
    if len(shards) == 1:
        return first
    bleus = [shard.bleu for shard in shards if shard.bleu is not None]
    rouges = [shard.rouge_l for shard in shards if shard.rouge_l is not None]
    places = [shard.places for shard in shards if shard.places is not None]
    speeds = [shard.tokens_per_second for shard in shards if shard.tokens_per_second is not None]
    return replace(
        first,
        entries=[entry for shard in shards for entry in shard.entries],
        nll=np.concatenate([shard.nll for shard in shards]),
        tokens=np.concatenate([shard.tokens for shard in shards]),
        domains=[domain for shard in shards for domain in shard.domains],
        predictions=[text for shard in shards for text in shard.predictions or ()] if bleus else None,
        bleu=np.concatenate(bleus) if bleus else None,
        rouge_l=np.concatenate(rouges) if rouges else None,
        tokens_per_second=float(np.mean(speeds)) if speeds else None,
        places=np.concatenate(places) if places else None,
    )
