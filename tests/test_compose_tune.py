"""compose/tune.py: what chooses a MoE's experts is trained, what does not stays to the bit."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composing import make_entries, workshop
from safetensors.torch import load_file

from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.compose.tune import train_router
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import LexiconError, PackError, RecipeError
from lora_lexicon.inference.engine import losses
from lora_lexicon.recipe import RouterRecipe

RECIPE = RouterRecipe(batch_size=8, epochs=4, learning_rate=0.03, checkpoints=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_entries(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def moe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shop: SimpleNamespace = workshop(tiny_base, tmp_path_factory.mktemp("shop"))
    compose_moe(str(tiny_base), shop.ffn, shop.domains, shop.folder / "moe")
    return shop.folder / "moe"


def _changed(before: Path, after: Path) -> set[str]:
    """The tensors that are new or other."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert set(old) <= set(new)
    return {name for name, tensor in new.items() if name not in old or not torch.equal(tensor, old[name])}


def _train_loss(folder: Path, data: Path) -> float:
    return _loss(load_system(str(folder)), data)


def _loss(system: System, data: Path) -> float:
    total, tokens = losses(system, load_entries(data).split("train"))
    return float(total.sum() / tokens.sum())


@pytest.mark.parametrize("routing", ["token-top-1", "token-top-2", "sequence-soft", "sequence-hard"])
def test_gates_alone_are_trained_and_learn(moe: Path, data: Path, tmp_path: Path, routing: str) -> None:
    start = train_router(moe, data, tmp_path / "start", RouterRecipe(max_steps=1, learning_rate=1e-12), routing=routing)
    record = train_router(moe, data, tmp_path / "out", RECIPE, routing=routing)
    assert _changed(moe, tmp_path / "out") == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2)}
    assert record["router_training"]["parameters"] == 2 * 3 * 32
    assert _changed(tmp_path / "start", tmp_path / "out"), "nothing was learned"
    assert _train_loss(tmp_path / "out", data) < _train_loss(tmp_path / "start", data)
    assert start["gates"]["agreement"].keys() == {"1", "2"}


def test_a_temperature_is_trained_towards_the_better_expert(moe: Path, data: Path, tmp_path: Path) -> None:
    record = train_router(
        moe,
        data,
        tmp_path / "out",
        RouterRecipe(train="temperature", max_steps=8, learning_rate=0.1),
        routing="domain-top-2",
    )
    assert _changed(moe, tmp_path / "out") == set()
    assert record["router_training"]["parameters"] == 1
    temperature = json.loads((tmp_path / "out" / "router.json").read_text())["temperature"]
    assert temperature == record["router_training"]["temperature"] != 0.05
    system = load_system(str(tmp_path / "out"))
    assert system.router is not None
    assert (system.router.top_k, system.router.temperature) == (2, temperature)


def test_experts_are_trained_with_what_chooses_them(moe: Path, data: Path, tmp_path: Path) -> None:
    recipe = RouterRecipe(train="experts", max_steps=8, learning_rate=1e-3, batch_size=8, balance=0)
    for routing, gates in (("domain", 0), ("token-top-2", 2)):
        out = tmp_path / routing
        train_router(moe, data, out, recipe, routing=routing)
        changed = _changed(moe, out)
        assert sum(".experts." in name for name in changed) == 4
        assert len(changed) == 4 + gates
        if not gates:
            assert _train_loss(out, data) < _train_loss(moe, data)


@pytest.mark.parametrize("routing", ["token-top-2", "sequence-soft", "domain-top-2"])
def test_sixteen_bits_and_recomputation_train_what_float32_does(
    moe: Path, data: Path, tmp_path: Path, routing: str
) -> None:
    found = []
    plain = RouterRecipe(train="experts", max_steps=4, learning_rate=1e-3, batch_size=8)
    for i, changes in enumerate(({}, {"gradient_checkpointing": True, "batch_size": 4, "gradient_accumulation": 2},
                                 {"dtype": "bfloat16", "gradient_checkpointing": True})):  # fmt: skip
        recipe = dataclasses.replace(plain, **changes)
        record = train_router(
            moe, data, tmp_path / str(i), recipe, routing=routing, measure=lambda system: _loss(system, data)
        )
        found.append((record["router_training"]["before"], record["router_training"]["after"]))
    (before, after), (_, recomputed), (_, rounded) = found
    assert after < before
    assert recomputed == pytest.approx(after, rel=0.02), "rows come in another order"
    assert rounded == pytest.approx(after, rel=0.02)


def test_the_load_is_balanced_where_that_is_asked_for(moe: Path, data: Path, tmp_path: Path) -> None:
    heaviest = []
    for balance in (0.0, 10.0):
        out = tmp_path / str(balance)
        recipe = RouterRecipe(balance=balance, max_steps=30, learning_rate=0.03, batch_size=8)
        train_router(moe, data, out, recipe, routing="token-top-1")
        system = load_system(str(out))
        with system.token_gates() as gates:
            losses(system, load_entries(data).split("train"))
        chosen = torch.cat([gate.argmax(dim=-1).flatten() for gate in gates])
        heaviest.append(float(torch.bincount(chosen, minlength=3).max() / len(chosen)))
    assert heaviest[1] < heaviest[0]
    assert heaviest[1] < 0.45


def test_a_stopped_run_ends_where_an_unbroken_one_does(moe: Path, data: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    train_router(moe, data, tmp_path / "whole", RECIPE, routing="token-top-2")
    with pytest.raises(KeyboardInterrupt):
        train_router(moe, data, tmp_path / "broken", RECIPE, routing="token-top-2", progress=stop)
    assert [path.name for path in tmp_path.glob("*broken*")] == [".broken.training"]
    train_router(moe, data, tmp_path / "broken", RECIPE, routing="token-top-2")
    assert _changed(tmp_path / "whole", tmp_path / "broken") == set()
    assert [path.name for path in tmp_path.glob("*broken*")] == ["broken"]


@pytest.mark.parametrize(("part", "routing"), [("experts", "token-top-2"), ("temperature", "domain-top-2")])
def test_what_diverges_is_refused(moe: Path, data: Path, tmp_path: Path, part: str, routing: str) -> None:
    recipe = RouterRecipe(train=part, learning_rate=1e30, max_steps=3, batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(LexiconError, match=r"diverged|temperature"):
        train_router(moe, data, tmp_path / "out", recipe, routing=routing)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_and_leaves_nothing(moe: Path, data: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(moe, tmp_path / "kept")
    config = json.loads((kept / "config.json").read_text())
    names = config["expert_names"][:2]
    (kept / "config.json").write_text(json.dumps({**config, "keep_base": True, "expert_names": names}))
    cases: list[tuple[type[LexiconError], str, Path, RouterRecipe, str | None]] = [
        (RecipeError, "no gates to train", moe, RouterRecipe(), None),
        (RecipeError, "no temperature|by a temperature", moe, RouterRecipe(train="temperature"), "domain"),
        (RecipeError, "3 experts", moe, RouterRecipe(), "token-top-4"),
        (RecipeError, "must stay as it is", kept, RouterRecipe(train="experts"), "token-top-1"),
        (RecipeError, "balance is -1", moe, RouterRecipe(balance=-1.0), "token-top-1"),
        (RecipeError, "learning_rate", moe, RouterRecipe(learning_rate=0.0), "token-top-1"),
        (PackError, "not", data, RouterRecipe(), "token-top-1"),
    ]
    for error, words, folder, recipe, routing in cases:
        with pytest.raises(error, match=words) as refusal:
            train_router(folder, data, tmp_path / "out", recipe, routing=routing)
        assert "\n" not in str(refusal.value)
        assert not list(tmp_path.glob("*out*"))
