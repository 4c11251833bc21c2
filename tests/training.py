"""What the tests of training share: rows, a short recipe, and what an expert came to."""

from pathlib import Path
from typing import Any

import torch
from conftest import WORDS
from safetensors.torch import load_file

from lora_lexicon.data.entry import Entry
from lora_lexicon.experts.base import Base
from lora_lexicon.experts.checkpoint import FFN, WEIGHTS, ExpertInfo
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import TrainRecipe

ROWS = [Entry(w, f"the {w} is here", f"a kind of {v} that is {w}", "test") for w in WORDS for v in WORDS[:4]]
RECIPE = TrainRecipe(first_layer=1, rank=4, batch_size=8, epochs=1.3, dropout=0.1, learning_rate=0.01, checkpoints=3)


def train_expert(base: Base, rows: Any, out: Path, recipe: TrainRecipe, name: str, **settings: Any) -> ExpertInfo:
    """One expert alone."""
    part = Part(name, rows, out, valid=settings.pop("valid", ()))
    return train_experts(base, [part], recipe, **settings)[0]


def state(base: Base) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(expert: Path) -> dict[str, torch.Tensor]:
    return load_file(expert / (WEIGHTS if (expert / WEIGHTS).is_file() else FFN))


def parts_in(folder: Path) -> list[Part]:
    """Three experts with rows in common, of which one has few."""
    return [Part(name, rows, folder / name, name) for name, rows in
            (("a", ROWS[:9]), ("b", ROWS[5:60]), ("c", ROWS[40:]))]  # fmt: skip
