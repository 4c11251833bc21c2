"""A base from anywhere: what transformers would read of it is what was checked, or is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.base import fingerprint, load_base

Change = Callable[[Path], object]
BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
ENDLESS = {**SPLIT, "pattern": {"Regex": "(([a-z ])+.)+[A-Z]$"}}


def _set(name: str, **values: object) -> Change:
    return lambda base: (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), **values}))


def _model(**values: object) -> Change:
    def change(base: Path) -> None:
        model = json.loads((base / "tokenizer.json").read_text())["model"]
        _set("tokenizer.json", model={**model, **values})(base)

    return change


def _second_weights(base: Path) -> None:
    """A sharded checkpoint, and another whole one, which transformers prefers."""
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "shard.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def _steps(stage: str, part: str, steps: list[dict[str, Any]]) -> Change:
    return _set("tokenizer.json", **{stage: {"type": "Sequence", part: steps}})


# what is done to the base; a part of what is said; whether its fingerprint is refused too, before anything is loaded
REFUSED: dict[str, tuple[Change, str, bool]] = {
    "two checkpoints": (_second_weights, "an index of other files", True),
    "other weights": (_set("config.json", transformers_weights="x.safetensors"), "holds transformers_weights", True),
    "an adapter": (lambda base: (base / "adapter_config.json").write_text("{}"), "adapter_config.json", True),
    "quantised": (_set("config.json", quantization_config={"quant_method": "gptq"}), "quantised", True),
    "a kernel": (_set("config.json", attn_implementation="owner/code"), "attn_implementation", True),
    "a kernel, inside": (_set("config.json", _attn_implementation_internal="a/b"), "attn_implementation", True),
    "a text for a number": (_set("config.json", eos_token_id="x"), "eos_token_id is 'x'", True),
    "rope": (_set("config.json", rope_parameters=[1]), "rope_parameters is", True),
    "layers that are not there": (_set("config.json", num_hidden_layers=9000), "holds no tensor", False),
    "generation": (lambda base: (base / "generation_config.json").write_text("[1]"), "must hold a JSON object", True),
    "a class": (_set("tokenizer_config.json", tokenizer_class=5), "'tokenizer_class' is 5", True),
    "code": (_set("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "'auto_map' is", True),
    "a number for a token": (_set("tokenizer_config.json", eos_token=5), "'eos_token' is 5", True),
    "no end": (_set("tokenizer_config.json", eos_token=None), "names no eos_token", False),
    "an unknown end": (_set("tokenizer_config.json", eos_token="zzz"), "has ids up to", False),
    "a far token": (_set("tokenizer_config.json", added_tokens_decoder={"999999999": {"content": "a"}}),
                    "'added_tokens_decoder' is", True),
    "a bomb": (_steps("normalizer", "normalizers", [BOMB] * 9), "lengthens a text 1000000000 times", True),
    "a bomb, written": (_steps("decoder", "decoders", [BOMB] * 9), "its decoder lengthens", True),
    "an expression": (_steps("normalizer", "normalizers", [{**BOMB, "pattern": {"Regex": "."}}]),
                      "replaces something else than a text", True),
    "an unknown step": (_set("tokenizer.json", normalizer={"type": "Precompiled"}), "a step 'Precompiled'", True),
    "a bad expression": (_steps("pre_tokenizer", "pretokenizers", [SPLIT]), "tokenizer cannot be loaded", False),
    "an endless expression": (_steps("pre_tokenizer", "pretokenizers", [ENDLESS]),
                              "repeats a group", True),
    "padding": (_set("tokenizer.json", padding={"strategy": {"Fixed": 10**9}}), "padding is to a fixed length", True),
    "chance": (_model(dropout=0.5), "its model has dropout", True),
    "a prefix": (_model(continuing_subword_prefix="x" * 100), "merges are no tokenizer's", True),
    "merges": (_model(merges=[["a"]]), "merges are no tokenizer's", True),
    "another model": (_model(type="WordLevel"), "neither BPE nor Unigram", True),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_transformers_would_read_otherwise_is_refused_in_one_line(tiny_base: Path, tmp_path: Path, what: str):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    change, said, at_once = REFUSED[what]
    change(base)
    uses = [lambda: load_base(str(base), device="cpu"), *([lambda: fingerprint(base)] if at_once else [])]
    for use in uses:
        with pytest.raises(ExpertError) as caught:
            use()
        message = str(caught.value)
        assert said in message
        assert "\n" not in message
        assert str(base) in message


def test_what_is_not_known_here_does_not_reach_transformers(tiny_base: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    _set("config.json", num_labels=10**8, id2label="x", dtype="evil", sub_configs={"a": 1}, to_dict=5)(base)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 5], "num_beams": "x", "max_length": 1e30}')
    plain, loaded = load_base(str(tiny_base), device="cpu"), load_base(str(base), device="cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(plain.model(ids).logits, loaded.model(ids).logits)
    assert loaded.model.generation_config.eos_token_id == [1, 5]
    assert loaded.model.generation_config.num_beams in (None, 1)
