"""What every test shares: a 2-layer Llama, its tokenizer, a handful of entries, the command line."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

WORDS = [
    "apple",
    "river",
    "stone",
    "bright",
    "quickly",
    "run",
    "hacker",
    "kernel",
    "sorrow",
    "table",
    "green",
    "cloud",
    "paper",
    "voice",
    "metal",
    "garden",
    "winter",
    "engine",
    "letter",
    "mirror",
]


def make_base(folder: Path, layers: int) -> Path:
    """A Llama (hidden 32, tied embeddings, GQA) and a byte-level BPE, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_lexicon.experts.pretrain import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        [(w, f"the {w} is here", f"a kind of {w} that is {v}") for w in WORDS for v in WORDS], 400
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,  # whole vectors of any processor: of the rest of a row SiLU may differ in a bit
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 layers."""
    return make_base(tmp_path_factory.mktemp("base"), 3)


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as deep as the one that ships, for its recipes."""
    return make_base(tmp_path_factory.mktemp("six"), 6)


@pytest.fixture(scope="session")
def cli():
    """Runs the command line as installed: `cli("data", "stats", path)` -> click's Result."""
    (entry,) = entry_points(group="console_scripts", name="lora-lexicon")
    app = entry.load()

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run
