"""experts/forecast.py: what is foretold is held against what `train` then does, and against what autograd keeps."""

import dataclasses
import gc
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import pytest
import torch
from click.testing import Result
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_lexicon.data.entry import Entry
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.experts.cost import head_bytes, options_of, trained_by, training
from lora_lexicon.experts.joint import PackedModel, pack
from lora_lexicon.experts.loop import TokenRow
from lora_lexicon.experts.lora import Owners, adapters_in_training, new_factors
from lora_lexicon.experts.shape import read_shape, shape_of
from lora_lexicon.experts.train import Part, foresee_experts, train_experts
from lora_lexicon.recipe import TrainRecipe
from lora_lexicon.resources import shapes

WORDS = ("acid", "bark", "crane", "drill", "ember", "flask", "grove", "hinge")
ROWS = [Entry(w, f"the {w} is here", f"a kind of {v} that is {w}", "test") for w in WORDS for v in WORDS]
LONG = Entry("acid", "an acid " * 80, "what burns", "test")
RECIPE = TrainRecipe(first_layer=1, rank=4, batch_size=8, epochs=1.3, checkpoints=0, rank_of={"b": 2}, max_length=48)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), device="cpu")


def parts_in(folder: Path) -> list[Part]:
    return [Part("a", [*ROWS[:20], LONG], folder / "a", "a"), Part("b", ROWS[20:], folder / "b", "b")]


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_what_is_foretold_is_what_happens(
    kind: Any, base: Base, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, parts = dataclasses.replace(RECIPE, kind=kind), parts_in(tmp_path)
    found = foresee_experts(str(tiny_base), parts, recipe)
    assert not any(tmp_path.iterdir())
    passes: list[int] = []
    kept: list[int] = []
    forward = PackedModel.forward

    def watched(model: PackedModel, *args: Any, **batch: Any) -> torch.Tensor:
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = forward(model, *args, **batch)
        passes.append(batch["input_ids"].shape[1])
        kept.append(sum(storage.nbytes() for place, storage in storages.items() if place not in weights))
        return losses

    monkeypatch.setattr(PackedModel, "forward", watched)
    made = train_experts(base, parts, recipe)
    for told, info in zip(found.experts, made, strict=True):
        assert not told.there
        assert (told.name, told.rows, told.steps) == (info.name, info.rows, info.training["steps"])
        assert (told.tokens, told.trained, told.flops) == (
            info.tokens,
            info.trained_parameters,
            info.training["flops"],
        )
    assert [told.cut for told in found.experts] == [1, 0]
    assert [told.rank for told in found.experts] == ([4, 2] if kind == "lora" else [None, None])
    assert [turn.experts for turn in found.turns] == ([("a", "b")] if kind == "lora" else [("a",), ("b",)])
    assert max(passes) == max(turn.step_tokens for turn in found.turns)
    assert sum(turn.memory.trained for turn in found.turns) == sum(info.trained_parameters for info in made)
    turn = max(found.turns, key=lambda turn: turn.memory.activations)
    shape = read_shape(str(tiny_base))
    options = options_of(recipe, shape, 4, turn.pass_tokens)
    logits = head_bytes(shape, options) - head_bytes(dataclasses.replace(shape, vocabulary=0), options)
    assert 0.5 < max(kept) / (turn.memory.activations - logits) < 1.05  # no logits are kept; two layers, see plan.md
    again = foresee_experts(str(tiny_base), parts, recipe)
    assert [expert.there for expert in again.experts] == [True, True]
    assert not again.turns


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside: those alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage not in self.held:
                self.held[storage] = storage.nbytes()
                self.count(storage.nbytes())
                finalize(storage, self.count, -storage.nbytes())
        return made

    def count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_peak_memory_is_what_layers_of_llama_3_8b_allocate(kind: Any, checkpointing: bool) -> None:
    tokens = 4000
    config = json.loads(shapes()["llama-3-8b"].read_text()) | {"num_hidden_layers": 6}
    row: TokenRow = {"input_ids": [1] * 40, "prompt_length": 20, "cut": False}
    batch, spans = pack([(0, 0.1, row)] * (tokens // 40))
    owners, peak = Owners(), 0
    with FakeTensorMode() as fake, Live() as live, ExitStack() as stack:  # tensors without data
        batch = {key: fake.from_tensor(value) for key, value in batch.items()}
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config), dtype=torch.bfloat16)
        model.requires_grad_(False)
        linear = {name: layer for name, layer in model.named_modules() if ".mlp." in name and hasattr(layer, "weight")}
        if kind == "lora":
            factors = new_factors(model, list(linear), 16, 1.0, 0)
            stack.enter_context(adapters_in_training(model, [factors], owners, 0.0))
            del factors
        else:
            for layer in linear.values():
                layer.weight = nn.Parameter(layer.weight.float())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = PackedModel(model, owners).train()
        gc.collect()
        for _ in range(2):  # the first pass makes the gradients anew, as every one after a step
            live.most = live.now
            with trained.passing(spans):
                with torch.autocast("cpu", torch.bfloat16):
                    losses = trained(**batch, experts=1)
                losses.sum().backward()
            peak = live.most
            model.zero_grad()
    recipe = TrainRecipe(kind=kind, first_layer=0, dtype="bfloat16", gradient_checkpointing=checkpointing)
    shape = shape_of(config, "llama-3-8b")
    options = options_of(recipe, shape, 16, tokens)
    told = training("", shape, options, kind, trained_by(shape, options, kind))
    # The last of six layers keeps less than is told: its FFN sees what predicts a definition, and no more.
    assert 0.85 < peak / (told.memory - told.states) < 1.01


def test_the_command_shows_it_and_makes_nothing(cli: Any, tiny_base: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    keys = ("term", "context", "definition", "source")
    source.write_text("".join(json.dumps({key: getattr(row, key) for key in keys}) + "\n" for row in ROWS))
    assert cli("data", "prepare", source, "--out", tmp_path / "entries").exit_code == 0
    words = ["train", "--data", tmp_path / "entries", "--domain", "none", "--base", tiny_base]
    words += ["--out", tmp_path / "experts", "--set", "first_layer=1", "--dry-run"]
    shown: Result = cli(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "dense" in shown.stdout
    assert "FLOP/s" in shown.stderr
    record = json.loads(cli(*words, "--json").stdout)
    assert record["hours"] > 0
    assert record["machine"]["rate"] > 1e6
    assert record["turns"][0]["experts"] == ["dense"]
    refused = cli(*words, "--set", "first_layer=9")
    assert (refused.exit_code, "first_layer is 9" in refused.stderr) == (1, True)
    assert not (tmp_path / "experts").exists()
