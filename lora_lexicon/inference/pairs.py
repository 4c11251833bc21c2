"""Pairs that a reward model learns from: of a prompt the gold definition, and sampled ones that stand against it.

Appendix A of the LM-Lexicon paper: 32 definitions are sampled, and the eight likeliest kept. Knows nothing of rewards.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_lexicon.data.entry import Entry
from lora_lexicon.folders import whole_lines
from lora_lexicon.inference.engine import text_of
from lora_lexicon.inference.rerank import samples, write_all
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.recipe import RewardRecipe

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System

PROMPTS_AT_ONCE = 16  # prompts sampled between two writes of the file


@dataclass(frozen=True)
class Preference:
    """An entry, whose definition is the gold one, and the sampled definitions that stand against it."""

    entry: Entry
    sampled: list[str]


def sample_pairs(
    system: "System",
    entries: Sequence[Entry],
    recipe: RewardRecipe,
    file: Path,
    progress: Callable[[int, int], object] | None = None,
) -> list[Preference]:
    """Of each entry's samples the `keep` likeliest that differ from its definition and from each other.

    By their log-likelihood, as the paper ranks them. Those in `file` are not sampled again; new ones are added to it.
    """
    decoding = Decoding("sample", seed=recipe.seed)
    found = (whole_lines(file) if file.is_file() else [])[: len(entries)]
    weights, _ = system.choose([(entry.term, entry.context) for entry in entries[len(found) :]])
    first = len(found)
    if progress:
        progress(first, len(entries))
    with file.open("a", encoding="utf-8") as lines:
        for start in range(first, len(entries), PROMPTS_AT_ONCE):
            some = entries[start : start + PROMPTS_AT_ONCE]
            rows = []
            for i, entry in enumerate(some, start - first):
                own = None if weights is None else weights[i]
                rows.append(samples(system, (entry.term, entry.context), own, decoding, recipe.samples))
            write_all(system, rows)
            for entry, own in zip(some, rows, strict=True):
                likeliest = sorted(own, key=lambda row: -row.score)
                texts = dict.fromkeys(text_of(system, row.written) for row in likeliest)
                sampled = [text for text in texts if text and text != entry.definition][: recipe.keep]
                lines.write(json.dumps(sampled, ensure_ascii=False) + "\n")
                found.append(sampled)
            lines.flush()
            if progress:
                progress(len(found), len(entries))
    return [Preference(entry, sampled) for entry, sampled in zip(entries, found, strict=True)]


def pairs_of(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(P,) the gold row and (P,) the sampled row of each pair, where each gold row is followed by so many others."""
    gold, sampled, start = [], [], 0
    for size in sizes:
        gold += [start] * size
        sampled += range(start + 1, start + 1 + size)
        start += 1 + size
    return torch.tensor(gold), torch.tensor(sampled)
