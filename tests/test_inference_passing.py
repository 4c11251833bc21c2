"""Routing while a prompt is read chooses what routing before it does, and reads it once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import DOMAINS, PROMPTS, make_lora, make_router, workshop
from conftest import WORDS

from lora_lexicon.compose import system as systems
from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.inference.batch import Batch
from lora_lexicon.inference.engine import define, row_of
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import build_pack

SHORT = Decoding(max_new_tokens=5)
ASKED = [*PROMPTS, *((word, f"{'a long ' * (i % 4)}winter and then {word} came") for i, word in enumerate(WORDS[:12]))]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"))
    build_pack(str(tiny_base), shop.lora, shop.domains, shop.folder / "mixture")
    compose_moe(str(tiny_base), shop.ffn, shop.domains, shop.folder / "moe")
    compose_moe(str(tiny_base), shop.ffn, shop.domains, shop.folder / "kept", keep_base=True)
    return shop


def load(shop: SimpleNamespace, name: str) -> System:
    return load_system(str(shop.folder / name))


@pytest.mark.parametrize("name", ["mixture", "moe", "kept"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_same_experts_as_before_the_prompt_is_read(shop: SimpleNamespace, name: str, pool: str) -> None:
    system: Any = load(shop, name)
    system.embedder.pool = pool
    assert system.routes_in_passing
    routing = system.route(ASKED)
    for size in (1, 5, len(ASKED)):
        found = define(system, ASKED, SHORT, batch_size=size)
        given = define(system, ASKED, SHORT, weights=routing.weights)
        assert [(d.text, d.domain) for d in found] == [(d.text, d.domain) for d in given]
        assert [d.domain for d in found] == [routing.name(i) for i in range(len(ASKED))]
        np.testing.assert_allclose([d.similarity for d in found], routing.similarities.max(axis=1), atol=1e-5)
        np.testing.assert_allclose([d.margin for d in found], routing.margin, atol=1e-5)


def test_a_choice_that_rounding_could_turn_is_made_by_itself(
    shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every choice too close, the similarities are to the bit those of each prompt alone."""
    system: Any = load(shop, "mixture")
    monkeypatch.setattr(systems, "ROUNDING", 10.0)
    rows = [row_of(system, prompt, SHORT) for prompt in ASKED]
    Batch(system).join(rows)
    for row, prompt in zip(rows, ASKED, strict=True):
        np.testing.assert_array_equal(row.similarities, system.router.route(system.embed([prompt])).similarities[0])
        np.testing.assert_array_equal(row.weights, system.router.route(system.embed([prompt])).weights[0])


def test_rows_whose_experts_are_given_keep_them_beside_others(shop: SimpleNamespace) -> None:
    system: Any = load(shop, "mixture")
    given = np.eye(len(DOMAINS), dtype=np.float32)
    rows = [row_of(system, ASKED[i], SHORT, given[i // 2] if i % 2 else None) for i in range(6)]
    rows.append(row_of(system, ASKED[0], SHORT, given[2]))
    Batch(system).join(rows)
    routing = system.route(ASKED[:6])
    for i, row in enumerate(rows[:6]):
        np.testing.assert_array_equal(row.weights, given[i // 2] if i % 2 else routing.weights[i])
        assert (row.similarities is None) == bool(i % 2)
    np.testing.assert_array_equal(rows[6].weights, given[2])


def test_a_prompt_is_read_once(shop: SimpleNamespace) -> None:
    system: Any = load(shop, "mixture")
    read: list[int] = []
    watch = system.embedder.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    define(system, ASKED[:1], Decoding(max_new_tokens=1))
    watch.remove()
    assert read == [1]
    assert not system.embedder.decoder.layers[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("case", "settings"),
    [("soft", {"top_k": 2}), ("threshold", {"abstain_quantile": 0.5}), ("below", {"layers": 2}), ("inside", {})],
)
def test_what_cannot_be_routed_in_passing_is_routed_before(
    shop: SimpleNamespace, tmp_path: Path, case: str, settings: dict[str, Any]
) -> None:
    """Several experts or a threshold need a prompt's own bits; states above experts are not the base's."""
    make_router(shop.base, tmp_path / "domains", **settings)
    first = 0 if case == "inside" else 1
    experts = [make_lora(shop.base, tmp_path / name, seed=i, first_layer=first) for i, name in enumerate(DOMAINS)]
    build_pack(str(shop.base), experts, tmp_path / "domains", tmp_path / "pack")
    system = load_system(str(tmp_path / "pack"))
    assert not system.routes_in_passing
    routing: Any = system.route(ASKED)
    given = define(system, ASKED, SHORT, weights=routing.weights)
    found = define(system, ASKED, SHORT)
    assert [(d.text, d.domain) for d in found] == [(d.text, d.domain) for d in given]
    np.testing.assert_allclose([d.similarity for d in found], routing.similarities.max(axis=1))


def test_a_pass_that_fails_leaves_no_routing(shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    system: Any = load(shop, "mixture")

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(system.router), "route", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            define(system, ASKED[:2], SHORT)
    assert system.active.weights is None
    assert not system.embedder.decoder.layers[1]._forward_pre_hooks
    assert torch.is_tensor(system.active.index)
    assert len(define(system, ASKED[:2], SHORT)) == 2
