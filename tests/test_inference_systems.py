"""The engine on every kind of system: a composition writes and scores as the experts it is made of do."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from composing import DOMAINS, PROMPTS, workshop

from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.inference.engine import define, losses
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import build_pack

SHORT = Decoding(max_new_tokens=6)
ENTRIES = [Entry(term, context, f"a kind of {term} that is bright", "test") for term, context in PROMPTS]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"))
    build_pack(str(tiny_base), shop.lora, shop.domains, shop.folder / "mixture")
    compose_moe(str(tiny_base), shop.ffn, shop.domains, shop.folder / "moe")
    return shop


def all_to(expert: int) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[[expert] * len(PROMPTS)]


@pytest.mark.parametrize(("composed", "kind"), [("mixture", "lora"), ("moe", "ffn")])
def test_a_composition_answers_as_its_expert_does(shop: SimpleNamespace, composed: str, kind: str) -> None:
    system = load_system(str(shop.folder / composed), base=str(shop.base) if composed == "mixture" else None)
    assert system.experts == DOMAINS
    for i, name in enumerate(DOMAINS):
        expert: System = load_system(str(shop.folder / kind / name))
        for ours, its in zip(losses(system, ENTRIES, weights=all_to(i)), losses(expert, ENTRIES), strict=True):
            np.testing.assert_allclose(ours, its, rtol=1e-5)
        written = define(system, PROMPTS, SHORT, weights=all_to(i))
        wanted = define(expert, PROMPTS, SHORT)
        assert [d.text for d in written] == [d.text for d in wanted]
        assert {d.domain for d in written} == {d.domain for d in wanted} == {name}


@pytest.mark.parametrize("composed", ["mixture", "moe"])
def test_the_router_s_own_choice_reaches_the_model(shop: SimpleNamespace, composed: str) -> None:
    system = load_system(str(shop.folder / composed), base=str(shop.base) if composed == "mixture" else None)
    routing = system.route(PROMPTS)
    assert routing is not None
    assert len(set(routing.top[:3])) == 3, "the three centroids are the first three prompts"
    free, forced = losses(system, ENTRIES), losses(system, ENTRIES, weights=routing.weights)
    np.testing.assert_array_equal(free[0], forced[0])
    for together, prompt in zip(define(system, PROMPTS, SHORT), PROMPTS, strict=True):
        (alone,) = define(system, [prompt], SHORT)
        assert (together.text, together.domain) == (alone.text, alone.domain)
        assert together.similarity == pytest.approx(alone.similarity, abs=1e-5)


@pytest.mark.parametrize("rounding", [0.0, 9.0], ids=["in batches", "each again alone"])
def test_routing_in_batches_is_routing_alone(
    shop: SimpleNamespace, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_lexicon.compose.system.ROUNDING", rounding)
    system = load_system(str(shop.folder / "mixture"), base=str(shop.base))
    assert system.router is not None
    together = system.route(PROMPTS * 3)
    alone = system.router.route(system.embed(PROMPTS * 3))
    assert together is not None
    np.testing.assert_array_equal(together.weights, alone.weights)
    if rounding:
        np.testing.assert_array_equal(together.similarities, alone.similarities)
    else:
        np.testing.assert_allclose(together.similarities, alone.similarities, atol=1e-5)
