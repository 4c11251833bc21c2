"""Training: what is trained and what is not, resuming, branching, and what the loss covers."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from training import RECIPE, ROWS, parts_in, same, state, train_expert, weights
from transformers import Trainer, TrainingArguments

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.prompt import PromptEncoder, collate
from lora_lexicon.errors import ExpertError, MissingExtraError, RecipeError
from lora_lexicon.experts import joint, kernels
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.experts.checkpoint import JOURNAL, WEIGHTS, read_expert, read_ffn
from lora_lexicon.experts.joint import HeadLoss, pack
from lora_lexicon.experts.journal import Step
from lora_lexicon.experts.kernels import need_kernels
from lora_lexicon.experts.loop import collate_for_loss, definition_loss, encode, length_grouped, order_of
from lora_lexicon.experts.lora import new_factors
from lora_lexicon.experts.packing import Packing, packed, positions
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import TrainRecipe


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), device="cpu")


def test_the_same_call_keeps_the_expert_and_another_is_refused(base: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_steps=2)
    first = train_expert(base, ROWS, tmp_path / "x", recipe, name="x")
    stamp = (tmp_path / "x" / WEIGHTS).stat().st_mtime_ns
    assert train_expert(base, ROWS, tmp_path / "x", recipe, name="x") == first == read_expert(tmp_path / "x")
    assert (tmp_path / "x" / WEIGHTS).stat().st_mtime_ns == stamp
    other = dataclasses.replace(recipe, seed=7)
    with pytest.raises(ExpertError, match="trained otherwise"):
        train_expert(base, ROWS, tmp_path / "x", other, name="x")
    assert train_expert(base, ROWS, tmp_path / "x", other, name="x", overwrite=True).key != first.key


def test_other_validation_rows_are_another_expert_where_they_decide(base: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_steps=2, evaluations=1, early_stopping=1)
    scored: dict[str, Any] = {"score": lambda predictions, references: 0.0}
    train_expert(base, ROWS, tmp_path / "x", recipe, name="x", valid=ROWS[:2], **scored)
    with pytest.raises(ExpertError, match="trained otherwise"):
        train_expert(base, ROWS, tmp_path / "x", recipe, name="x", valid=ROWS[1:3], **scored)


def test_plain_peft_loads_the_lora_expert(base: Base, tiny_base: Path, tmp_path: Path) -> None:
    info = train_expert(base, ROWS, tmp_path / "x", dataclasses.replace(RECIPE, max_steps=3), name="x")
    model = PeftModel.from_pretrained(load_base(str(tiny_base)).model, str(tmp_path / "x"))
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert sum(p.numel() for p in trained.values()) == info.trained_parameters
    assert {int(name.split(".")[4]) for name in trained} == {1, 2}
    assert any(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"adapter_config.json", WEIGHTS, "expert.json", JOURNAL}
    modules = json.loads((tmp_path / "x" / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules), "PEFT's set has another order in each process"
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "x").iterdir()}
    shipped = load_system(str(tmp_path / "x"), base=str(tiny_base)).ship_bytes
    assert shipped == sum(sizes.values()) - sizes[JOURNAL]


def test_an_ffn_expert_owns_the_ffns_of_its_layers_and_nothing_else(base: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, kind="ffn", max_steps=3)
    train_expert(base, ROWS, tmp_path / "x", recipe, name="x")
    names = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (1, 2) for m in ("gate", "up", "down")}
    assert {name for name, _ in read_ffn(tmp_path / "x")} == names
    before = state(base)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in read_ffn(tmp_path / "x"))


def test_branching_starts_where_the_adapter_ended(base: Base, tmp_path: Path) -> None:
    train_expert(base, ROWS, tmp_path / "seed", dataclasses.replace(RECIPE, max_steps=3), name="seed")
    still = dataclasses.replace(RECIPE, max_steps=1, learning_rate=1e-12, dropout=0.0)
    info = train_expert(base, ROWS, tmp_path / "x", still, name="x", start_from=tmp_path / "seed")
    assert info.started_from
    before, after = weights(tmp_path / "seed"), weights(tmp_path / "x")
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-9, rtol=1e-6)
    with pytest.raises(ExpertError, match="has r 4, the recipe says 8"):
        train_expert(
            base, ROWS, tmp_path / "y", dataclasses.replace(still, rank=8), name="y", start_from=tmp_path / "seed"
        )
    wrong = dataclasses.replace(still, first_layer=2)
    with pytest.raises(ExpertError, match=r"do not train the same layers.*layers\.1"):
        train_expert(base, ROWS, tmp_path / "y", wrong, name="y", start_from=tmp_path / "seed")
    assert not (tmp_path / "y").exists()
    assert all(not p.requires_grad for p in base.model.parameters())


def test_an_ffn_expert_branches_from_the_merged_adapter(base: Base, tiny_base: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_steps=3, dropout=0.0)
    train_expert(base, ROWS, tmp_path / "seed", recipe, name="seed")
    still = dataclasses.replace(recipe, kind="ffn", max_steps=1, learning_rate=1e-12)
    before = state(base)
    train_expert(base, ROWS, tmp_path / "x", still, name="x", start_from=tmp_path / "seed")
    assert same(before, state(base))
    merged = PeftModel.from_pretrained(load_base(str(tiny_base)).model, str(tmp_path / "seed")).merge_and_unload()
    theirs = merged.state_dict()
    for name, tensor in read_ffn(tmp_path / "x"):
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)
    attention = dataclasses.replace(recipe, attention=True)
    train_expert(base, ROWS, tmp_path / "wide", attention, name="wide")
    with pytest.raises(ExpertError, match="which an ffn expert does not own"):
        train_expert(base, ROWS, tmp_path / "y", still, name="y", start_from=tmp_path / "wide")
    assert same(before, state(base))


def test_early_stopping_keeps_the_best_weights(base: Base, tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.2, 0.3, 0.9, 0.9])
    recipe = dataclasses.replace(RECIPE, max_steps=6, evaluations=6, early_stopping=2, valid_rows=3)
    settings: dict[str, Any] = {"name": "x", "valid": ROWS, "score": lambda p, r: next(scores) + 0 * len(p + r)}
    info = train_expert(base, ROWS, tmp_path / "x", recipe, **settings)
    assert [e["score"] for e in info.training["evaluations"]] == [0.1, 0.5, 0.2, 0.3]
    assert info.training["steps"] == 4
    snapshots = []
    scores = iter([0.1, 0.5, 0.2, 0.3])

    def spy(_: Step) -> None:
        names = [n for n, p in base.model.named_parameters() if p.requires_grad]
        snapshots.append({n: p.detach().clone() for n, p in base.model.named_parameters() if n in names})

    train_expert(base, ROWS, tmp_path / "y", recipe, **settings, progress=spy)
    best = {n.replace(".a.0", ".lora_A.weight").replace(".b.0", ".lora_B.weight"): t.T for n, t in snapshots[1].items()}
    assert same(best, {n.removeprefix("base_model.model."): t for n, t in weights(tmp_path / "x").items()})


def test_the_loss_is_transformers_own_over_the_definitions_tokens(base: Base) -> None:
    encoder = PromptEncoder(base.tokenizer)
    rows = []
    for row in ROWS[:7]:
        ids, prompt, _ = encoder.row(row.term, row.context, row.definition * (1 + len(row.term) % 3))
        rows.append({"input_ids": ids, "prompt_length": prompt})
    with torch.no_grad():
        theirs = base.model(**collate(rows, 0)).loss
        batch = collate_for_loss(rows, 0)
        labels = batch.pop("labels")
        ours = definition_loss(base.model(**batch), labels)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 99))
def test_the_heads_loss_and_gradient_are_those_of_cross_entropy(rows: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    states, head = torch.randn(rows, 8, generator=chance), torch.randn(11, 8, generator=chance)
    labels, shares = torch.randint(0, 11, (rows,), generator=chance), torch.rand(rows, generator=chance)
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "HEAD_ROWS", 4)
        found = HeadLoss.apply(ours, head, labels)
    wanted = torch.nn.functional.cross_entropy(theirs @ head.T, labels, reduction="none")
    torch.testing.assert_close(found, wanted)
    (found * shares).sum().backward()
    (wanted * shares).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient_accumulation_is_one_large_batch(base: Base, tmp_path: Path) -> None:
    one = dataclasses.replace(RECIPE, max_steps=1, dropout=0.0, batch_size=16, optimizer="sgd", kind="ffn")
    two = dataclasses.replace(one, batch_size=8, gradient_accumulation=2)
    sixteen = ROWS[:16]
    train_expert(base, sixteen, tmp_path / "one", one, name="x")
    train_expert(base, sixteen, tmp_path / "two", two, name="x")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


# several experts in one pass


def test_together_each_expert_becomes_what_it_becomes_alone(base: Base, tmp_path: Path) -> None:
    recipe = TrainRecipe(first_layer=1, rank=4, rank_of={"b": 2}, batch_size=4, max_steps=50, checkpoints=0)
    together = train_experts(base, parts_in(tmp_path / "together"), recipe)
    for part, info in zip(parts_in(tmp_path / "alone"), together, strict=True):
        alone = train_experts(base, [part], recipe)[0]
        ours, theirs = weights(tmp_path / "together" / part.name), weights(part.out)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
        assert (info.key, info.tokens, info.rows) == (alone.key, alone.tokens, alone.rows)
        np.testing.assert_allclose(info.training["losses"], alone.training["losses"], atol=1e-5)
        assert max(float(t.abs().max()) for n, t in theirs.items() if "lora_B" in n) > 1e-3, "nothing was learnt"


def test_an_expert_alone_becomes_what_peft_and_the_trainer_make_of_it(
    base: Base, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = TrainRecipe(first_layer=1, rank=4, batch_size=4, max_steps=50, checkpoints=0, weight_decay=0.1)
    train_expert(base, ROWS, tmp_path / "x", recipe, name="x")
    layers = [f"model.layers.{i}.mlp.{m}_proj" for i in (1, 2) for m in ("gate", "up", "down")]
    start = new_factors(base.model, layers, 4, 8.0, recipe.seed)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(str(tiny_base), device="cpu").model, config)
    with torch.no_grad():
        for name, factors in start.items():
            model.get_parameter(f"base_model.model.{name}.lora_A.default.weight").copy_(factors.a.T)
    encoder = PromptEncoder(base.tokenizer)
    data = [encode(encoder, row) for row in ROWS]
    order = order_of([len(row["input_ids"]) for row in data], recipe, 4)

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return range(len(order))

    arguments = TrainingArguments(
        str(tmp_path / "peer"),
        max_steps=50,
        per_device_train_batch_size=4,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 0.0},
        warmup_steps=3,
        weight_decay=0.1,
        optim=recipe.optimizer,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
    )
    rows = cast(Any, [data[i] for i in order])
    InOrder(model, arguments, lambda batch: collate(batch, 0), train_dataset=rows).train()
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    ours = weights(tmp_path / "x")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), atol=1e-5, rtol=0)


def test_an_expert_that_stops_early_costs_nothing_more(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, dropout=0.0, max_steps=6, evaluations=6, early_stopping=2)
    asked: list[int] = []
    read: list[set[int]] = []

    def score(predictions: list[str], references: list[str]) -> float:
        """Falls for the expert whose validation rows are two, rises for the other."""
        asked.append(len(references))
        return (-1.0 if len(references) == 2 else 1.0) * len(asked)

    def spy(rows: Any) -> Any:
        read.append({n for n, _, _ in rows})
        return pack(rows)

    monkeypatch.setattr("lora_lexicon.experts.joint.pack", spy)
    two = [Part("a", ROWS[:60], tmp_path / "a", valid=ROWS[:2]), Part("b", ROWS[60:], tmp_path / "b", valid=ROWS[:3])]
    a, b = train_experts(base, two, recipe, score=score)
    assert (a.training["steps"], b.training["steps"]) == (3, 6)
    assert read == [{0, 1}] * 3 + [{1}] * 3
    assert a.tokens < b.tokens
    alone = Part("b", ROWS[60:], tmp_path / "alone", valid=ROWS[:3])
    train_experts(base, [alone], recipe, score=score)
    for name, tensor in weights(tmp_path / "b").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "alone")[name], atol=1e-5, rtol=0)


def test_a_step_read_in_parts_is_the_step(base: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, dropout=0.0, max_steps=10)
    train_experts(base, parts_in(tmp_path / "one"), recipe)
    train_experts(base, parts_in(tmp_path / "many"), dataclasses.replace(recipe, pass_tokens=40))
    for name in "abc":
        ours, theirs = weights(tmp_path / "many" / name), weights(tmp_path / "one" / name)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 99))
def test_packed_rows_do_not_see_each_other(base: Base, lengths: list[int], seed: int) -> None:
    ids = torch.randint(5, 300, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        alone = torch.cat([base.model(row[None]).logits[0] for row in ids.split(lengths)])
        with packed(base.model):
            ours = base.model(ids[None], position_ids=positions(lengths)[None], packing=Packing.of(lengths)).logits[0]
    torch.testing.assert_close(ours, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "ffn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_is_as_wide_as_its_base(tiny_base: Path, tmp_path: Path, dtype: Any, kind: Any) -> None:
    base = load_base(str(tiny_base), device="cpu", dtype=dtype)
    recipe = dataclasses.replace(RECIPE, max_steps=1, dtype=dtype, kind=kind)  # whose masters are float32
    train_expert(base, ROWS[:8], tmp_path / "x", recipe, name="x")
    assert {tensor.dtype for tensor in weights(tmp_path / "x").values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_trains_lora(quantize: Any, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = load_base(str(tiny_base), device="cpu", quantize=quantize)
    recipe = dataclasses.replace(RECIPE, max_steps=2, quantize=quantize, gradient_checkpointing=True)
    before = state(base)
    recomputed = []
    train_expert(
        base,
        ROWS[:8],
        tmp_path / "x",
        recipe,
        name="x",
        progress=lambda *_: recomputed.append(base.model.is_gradient_checkpointing),
    )
    assert recomputed == [True, True]
    assert not base.model.is_gradient_checkpointing
    assert same(before, state(base))
    assert any(t.abs().max() > 0 for n, t in weights(tmp_path / "x").items() if "lora_B" in n)


def test_a_4_bit_base_has_gradients_after_it_was_evaluated(tiny_base: Path) -> None:
    """bitsandbytes would lay its weights out anew on some CPUs, for a product without one."""
    pytest.importorskip("bitsandbytes")
    layer = load_base(str(tiny_base), device="cpu", quantize="nf4").model.model.layers[0].mlp.gate_proj
    before = layer(torch.ones(2, 32))
    x = torch.ones(2, 32, requires_grad=True)
    after = layer(x)
    assert torch.equal(before, after)
    (gradient,) = torch.autograd.grad(after.sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_layer": 3}, "has layers 0 to 2"),
        ({"rank": 0}, "rank is 0"),
        ({"max_length": 3}, "max_length is 3"),
        ({"kind": "ffn", "quantize": "nf4"}, "use kind lora"),
        ({"evaluations": 2}, "split named valid"),
        ({"epochs": 0.0}, "epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"pass_tokens": 0}, "pass_tokens is 0"),
        ({"rank_of": {"a": -1}}, "rank_of holds -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"minimum_learning_rate": 0.5}, "at most learning_rate, 0.01"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
        ({"optimizer": "galore_adamw"}, "optimizer is galore_adamw, which cannot be had"),
    ],
)
def test_impossible_recipes_are_named(change: dict[str, Any], message: str, base: Base, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        train_expert(base, ROWS, tmp_path / "x", dataclasses.replace(RECIPE, **change), name="x")
    assert not list(tmp_path.iterdir())


def test_ligers_kernels_are_refused_where_they_cannot_run(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, liger=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="need a GPU"):
        train_expert(base, ROWS, tmp_path / "x", recipe, name="x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lora-lexicon\[liger\]"):
        need_kernels()


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("liger_kernel") is None, reason="needs a GPU and Liger")
@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_ligers_kernels_make_the_same_expert(kind: Any, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device="cuda")
    made = []
    for liger in (False, True):
        recipe = dataclasses.replace(RECIPE, kind=kind, dropout=0.0, liger=liger)
        train_expert(base, ROWS, tmp_path / str(liger), recipe, name="x")
        made.append(weights(tmp_path / str(liger)))
    for name in made[0]:
        torch.testing.assert_close(made[1][name], made[0][name], rtol=0, atol=1e-3)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5))
def test_grouping_by_length_is_a_permutation_of_similar_runs(lengths: list[int], batch: int, seed: int) -> None:
    order = length_grouped(lengths, batch, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == length_grouped(lengths, batch, seed)
    # Batches cut from sorted rows do not overlap, so their spreads together are at most that of all rows.
    spread = sum(max(group) - min(group) for group in groups([lengths[i] for i in order], batch))
    assert spread <= max(lengths) - min(lengths) or len(lengths) > 50 * batch


def groups(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
