"""experts/forecast.py: what is foretold is held against what `train` then does, and against what autograd keeps."""

import dataclasses
import gc
import json
import shutil
import sys
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
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.errors import ExpertError, RecipeError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.experts.check import Where
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.cost import check_rank, head_bytes, options_of, trained_by, training
from lora_lexicon.experts.forecast import UTILISATION, Machine, card_machine
from lora_lexicon.experts.joint import JointRun, PackedModel, pack, trainee_of
from lora_lexicon.experts.kernels import fused
from lora_lexicon.experts.loop import TokenRow, encode
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
        stack.enter_context(fused(model))
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


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_a_process_has_the_share_that_it_is_told(
    kind: Any, base: Base, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, parts = dataclasses.replace(RECIPE, kind=kind, pass_tokens=90), parts_in(tmp_path)
    alone, shared = (foresee_experts(str(tiny_base), parts, recipe, where=Where(None, n)) for n in (1, 2))
    data = [[encode(PromptEncoder(base.tokenizer, max_length=48), row) for row in part.rows] for part in parts]
    trainees = [trainee_of(part.name, rows, recipe, {}) for part, rows in zip(parts, data, strict=True)]
    monkeypatch.setattr(processes, "count", lambda: 2)
    layer, table = (sum(p.numel() for p in module.parameters()) for module in decoder_and_table(base))
    for before, turn in zip(alone.turns, shared.turns, strict=True):
        run = JointRun.__new__(JointRun)
        run.recipe, run.trainees = recipe, [t for t in trainees if t.name in turn.experts]
        ranks = []
        for rank in range(2):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            ranks.append([[b["input_ids"].shape[1] for b, _ in run._passes(n)] for n in range(turn.steps)])
        steps = [max(map(sum, both)) for both in zip(*ranks, strict=True)]
        assert turn.pass_tokens == recipe.pass_tokens < max(steps)
        assert turn.memory.passes <= max(len(passes) for passes in ranks[0]) <= turn.memory.passes + 1
        assert before.flops / 2 <= turn.busiest < before.flops == before.busiest == turn.flops
        cost = {e.flops // e.tokens for e in shared.experts if e.name in turn.experts}
        if len(cost) == 1:  # a process may make a pass with a row that counts for nothing
            assert turn.busiest <= sum(steps) * cost.pop()
        factors = 0 if kind == "ffn" else turn.memory.trained / 2
        assert turn.memory.gathered == 4 * (2 * (layer + factors) + table)
        for part in ("weights", "gradients", "states"):
            assert getattr(turn.memory, part) == getattr(before.memory, part) / 2
    machine = Machine("cuda", "a card", 10**9, 1e9)
    assert alone.hours(machine) / 2 <= shared.hours(machine) < alone.hours(machine)
    here = dataclasses.replace(machine, device="cpu")
    assert shared.hours(here) == alone.hours(here)  # they share its cores


def decoder_and_table(base: Base) -> tuple[nn.Module, nn.Module]:
    """A layer of the base, and its embedding, which is its head too."""
    llama: Any = base.model
    return llama.model.layers[1], llama.model.embed_tokens


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_advice_is_what_is_not_done_yet_and_takes_what_it_says(kind: Any, tiny_base: Path, tmp_path: Path) -> None:
    recipe, parts = dataclasses.replace(RECIPE, kind=kind, rank_of={}), parts_in(tmp_path)[1:]
    small, ample = card_machine("0.0001GB", "bfloat16"), card_machine("24GB", "bfloat16")
    found = foresee_experts(str(tiny_base), parts, recipe)
    assert (found.fits(small), found.fits(ample), found.advice(ample)) == (False, True, [])
    half = found.turns[0].pass_tokens // 2
    own = {"--set rank=2": {"rank": 2}, "--quantize nf4": {"quantize": "nf4"}} if kind == "lora" else {}
    changes: dict[str, dict[str, Any]] = {
        "--set gradient_checkpointing=true": {"gradient_checkpointing": True},
        "--set optimizer=adamw_bnb_8bit": {"optimizer": "adamw_bnb_8bit"},
        f"--set pass_tokens={half}": {"pass_tokens": half},
        **own,
    }
    told = {change.option: change.memory for change in found.advice(small)}
    assert told.keys() - changes.keys() <= {"--processes 2"}
    assert {"--set optimizer=adamw_bnb_8bit", f"--set pass_tokens={half}"} <= told.keys()
    for option, memory in told.items():
        done = foresee_experts(
            str(tiny_base),
            parts,
            dataclasses.replace(recipe, **changes.get(option, {})),
            where=Where(None, 1 if option in changes else 2, elsewhere=True),
        )
        assert max(turn.memory.memory for turn in done.turns) == memory < found.turns[0].memory.memory
        assert option not in {change.option for change in done.advice(small)}


@pytest.fixture(scope="module")
def entries(cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    keys = ("term", "context", "definition", "source")
    lines = [json.dumps({key: getattr(row, key) for key in keys}) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines))
    assert cli("data", "prepare", folder / "rows.jsonl", "--out", folder / "entries").exit_code == 0
    return folder / "entries"


def test_the_command_shows_it_and_makes_nothing(cli: Any, entries: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = ["train", "--data", entries, "--domain", "none", "--base", tiny_base]
    words += ["--out", tmp_path / "experts", "--set", "first_layer=1", "--dry-run"]
    shown: Result = cli(*words, "--processes", "4")
    assert shown.exit_code == 0, shown.stderr
    assert "dense" in shown.stdout
    assert "4 processes, FSDP: each" in " ".join(shown.stdout.split())
    assert "FLOP/s" in shown.stderr
    record = json.loads(cli(*words, "--json").stdout)
    assert record["hours"] > 0
    assert record["machine"]["rate"] > 1e6
    assert record["turns"][0]["experts"] == ["dense"]
    card = json.loads(cli(*words, "--gpu", "h100", "--processes", "8", "--set", "dtype=bfloat16", "--json").stdout)
    assert (card["machine"]["memory"], card["processes"], card["sharding"]) == (80e9, 8, "fsdp")
    assert card["hours"] == pytest.approx(card["turns"][0]["busiest"] / (989e12 * UTILISATION) / 3600)
    assert json.loads(cli(*words, "--gpu", "24GB", "--json").stdout)["hours"] is None
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    words[6] = bare
    assert json.loads(cli(*words, "--json").stdout)["turns"] == record["turns"]
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set first_layer=9", "first_layer is 9"),
        ("--report-to foo --base /no/such/base", "--report-to 'foo' is not known"),
        ("--report-to wandb", "--report-to wandb needs the package"),
        ("--quantize nf4 --processes 2", "several processes shard a base in bfloat16 or float32"),
        ("--sharding zero3 --processes 2", "pip install 'lora-lexicon[deepspeed]'"),
        ("--from ADAPTER --set rank=8", "has r 4, the recipe says 8"),
        ("--from ADAPTER --set rank=4 --base OTHER", "was trained on base"),
        ("--from ADAPTER --set rank=4 --set first_layer=2", "do not train the same layers"),
        ("--from ADAPTER --kind ffn --set first_layer=2", "which an ffn expert does not own"),
        ("--cpus 2", "add --on ray"),
        ("--set rank=33", "rank is 33; a matrix that it would replace has rank 32"),
        ("--base llama-3-8b", "`lora-lexicon plan llama-3-8b` is for it"),
        ("--set dtype=float16", "which a CPU cannot train in"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_before_it_loads_a_base(
    options: str,
    message: str,
    cli: Any,
    entries: Path,
    base: Base,
    tiny_base: Path,
    six_layers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "ADAPTER" in options:
        recipe = dataclasses.replace(RECIPE, rank_of={}, max_steps=1)
        train_experts(base, [Part("adapter", ROWS, tmp_path / "adapter")], recipe)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lora_lexicon.experts.base.load_base", lambda *_, **__: pytest.fail("it was loaded"))
    places = {"ADAPTER": tmp_path / "adapter", "OTHER": six_layers}
    words = ["train", "--data", entries, "--domain", "none", "--base", tiny_base, "--out", tmp_path / "experts"]
    words += ["--set", "first_layer=1", *(places.get(word, word) for word in options.split())]
    lines = []
    for dry in ([], ["--dry-run"]):
        refused = cli(*words, *dry)
        assert refused.exit_code in (1, 2)
        assert message in " ".join(refused.stderr.replace("│", "").split())
        lines.append(refused.stderr)
    assert lines[0] == lines[1]
    assert cli(*words[: -len(options.split())], "--gpu", "h100").exit_code == 2
    assert not (tmp_path / "experts").exists()


def test_an_adapter_of_a_rank_that_is_not_read_is_said_so(base: Base, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rank_of b is 5000; a matrix"):
        train_experts(base, parts_in(tmp_path), dataclasses.replace(RECIPE, rank_of={"b": 5000}))
    wide = shape_of(json.loads(shapes()["llama-3-70b"].read_text()), "llama-3-70b")
    with pytest.raises(RecipeError, match="rank is 4097; an adapter holds at most 4096"):
        check_rank(wide, 4097, "ffn")
    check_rank(wide, 4096, "ffn")
    train_experts(base, parts_in(tmp_path)[1:], dataclasses.replace(RECIPE, max_steps=1))
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 5000'))
    with pytest.raises(ExpertError, match="rank 5000; only ranks from 1 to 4096 are read"):
        load_adapter(tmp_path / "b")
