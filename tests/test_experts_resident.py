"""Experts that come on demand: the same answers as with all in memory, and never more memory than was given."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import PROMPTS, make_lora, make_router
from conftest import WORDS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import ExpertError, LexiconError, RecipeError
from lora_lexicon.experts.cost import expert_bytes
from lora_lexicon.inference.engine import Definition, define, losses
from lora_lexicon.inference.rerank import best_of
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.live import add_domains, ranks, read_newcomers, remove_domain
from lora_lexicon.packs.pack import add_expert, build_pack, copy_pack

NAMES = ("nature", "craft", "mind", "motion")
RANKS = (4, 2, 4, 7)
ASKED = [*PROMPTS, *((word, f"a {word} it is") for word in WORDS[:8])]
SHORT = Decoding(max_new_tokens=6)
SAMPLED = Decoding("sample", max_new_tokens=6, temperature=1.5)


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pack of four experts of several sizes, with the sizes; the same and one more; a system with all in memory."""
    folder = tmp_path_factory.mktemp("resident")
    kinds = zip(NAMES, RANKS, strict=True)
    loras = [
        make_lora(tiny_base, folder / "lora" / name, seed=i, rank=rank, attention=i > 1)
        for i, (name, rank) in enumerate(kinds)
    ]
    make_router(tiny_base, folder / "domains", names=NAMES)
    build_pack(str(tiny_base), loras, folder / "domains", folder / "pack", include_base=True)
    late = make_lora(tiny_base, folder / "late", seed=8, rank=3)
    add_expert(folder / "pack", late, [("metal", "the metal is here")], [], out=folder / "grown")
    found = SimpleNamespace(base=tiny_base, pack=folder / "pack", grown=folder / "grown", folder=folder)
    found.all = load_system(str(found.pack))
    found.sizes = [source.bytes for source in load_system(str(found.pack), expert_memory=10**9).residents.sources]  # type: ignore[union-attr]
    found.systems = {}
    return found


def on_demand(shop: SimpleNamespace, budget: int) -> Any:
    """One system for each budget, whatever its experts in memory are."""
    if budget not in shop.systems:
        shop.systems[budget] = load_system(str(shop.pack), expert_memory=budget)
    return shop.systems[budget]


def said(found: list[Definition]) -> list[tuple[str, str, int]]:
    """What must be equal to the bit; similarities are of one pass or another."""
    return [(d.text, d.domain, d.tokens) for d in found]


def bytes_of_experts(system: System) -> int:
    """Of the tensors on the model that are no base's."""
    own = {p.data_ptr(): p for name, p in system.model.named_parameters() if ".stacks." in name}
    return sum(p.nbytes for p in own.values())


@contextmanager
def watched(system: Any) -> Iterator[list[int]]:
    """The bytes that experts took in each pass, each of them checked against the budget."""
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(bytes_of_experts(system))
        assert seen[-1] == system.residents.bytes <= system.residents.budget

    watch = system.model.model.register_forward_hook(look)
    try:
        yield seen
    finally:
        watch.remove()


@given(st.data())
@settings(
    max_examples=25,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_answers_do_not_depend_on_the_memory(shop: SimpleNamespace, data: st.DataObject) -> None:
    least, all_of_them = max(shop.sizes), sum(shop.sizes)
    budget = data.draw(st.sampled_from([least, least + 1, least + min(shop.sizes), 2 * least, all_of_them]))
    asked = data.draw(st.lists(st.sampled_from(ASKED), min_size=1, max_size=10))
    size, decoding = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([SHORT, SAMPLED]))
    weights = None
    if data.draw(st.booleans()):  # anyone's experts, or the base alone
        weights = np.zeros((len(asked), 5), np.float32)
        chosen = data.draw(st.lists(st.integers(0, 4), min_size=len(asked), max_size=len(asked)))
        weights[np.arange(len(asked)), chosen] = 1
        weights = weights[:, :4]
    system, counted = on_demand(shop, budget), list[torch.Tensor]()
    residents = system.residents
    loads, evictions, there = residents.loads, residents.evictions, len(residents.names)
    with watched(system):
        found = define(system, asked, decoding, batch_size=size, weights=weights)
    assert said(found) == said(define(shop.all, asked, decoding, batch_size=size, weights=weights))
    assert residents.loads - loads - (residents.evictions - evictions) == len(residents.names) - there
    entries = [Entry(term, context, f"a kind of {term}", "s") for term, context in asked]
    observe = data.draw(st.sampled_from([None, counted.append]))
    with watched(system):
        nll, tokens = losses(system, entries, batch_size=size, weights=weights, observe=observe)
    wanted = losses(shop.all, entries, batch_size=size, weights=weights)
    np.testing.assert_allclose(nll, wanted[0], rtol=1e-5)
    np.testing.assert_array_equal(tokens, wanted[1])
    if budget == all_of_them:
        assert residents.evictions == 0


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_whatever_type_they_are_held_in(shop: SimpleNamespace, tmp_path: Path, dtype: str) -> None:
    copy_pack(shop.pack, tmp_path / "pack", dtype=dtype)
    whole, few = load_system(str(tmp_path / "pack")), load_system(str(tmp_path / "pack"), expert_memory=max(shop.sizes))
    weights = np.eye(4, dtype=np.float32)[np.arange(len(ASKED)) % 4]
    with watched(few):
        found = define(few, ASKED, SHORT, weights=weights)
    assert said(found) == said(define(whole, ASKED, SHORT, weights=weights))


def test_one_expert_s_rows_come_together(shop: SimpleNamespace) -> None:
    """Mixed prompts load each expert once, and those that are there not at all."""
    system: Any = load_system(str(shop.pack), expert_memory=max(shop.sizes))
    weights = np.eye(4, dtype=np.float32)[np.arange(len(ASKED)) % 4]
    entries = [Entry(term, context, f"a kind of {term}", "s") for term, context in ASKED]
    assert (system.residents.loads, system.residents.bytes) == (0, 0)
    losses(system, entries, weights=weights)
    assert system.residents.loads == 4
    losses(system, entries, weights=weights)
    assert system.residents.loads == 7
    plenty: Any = load_system(str(shop.pack), expert_memory=sum(shop.sizes))
    for _ in range(2):
        define(plenty, ASKED, SHORT, weights=weights)
        assert (plenty.residents.loads, plenty.residents.evictions) == (4, 0)
    assert plenty.residents.bytes == sum(shop.sizes)


def test_the_least_recently_used_makes_room(shop: SimpleNamespace) -> None:
    residents: Any = load_system(str(shop.pack), expert_memory=sum(shop.sizes) - 1).residents
    for n in (0, 1, 2, 0, 1):
        residents.hold({n})
    assert residents.names == ["mind", "nature", "craft"]
    residents.hold({3})
    assert residents.names == ["nature", "craft", "motion"]
    with pytest.raises(ExpertError, match=f"4 experts at once: give at least {sum(shop.sizes):,} bytes"):
        residents.hold({0, 1, 2, 3})
    assert residents.names == ["nature", "craft", "motion"]


def test_the_base_is_left_when_nothing_is_held(shop: SimpleNamespace) -> None:
    system: Any = load_system(str(shop.pack), expert_memory=max(shop.sizes))
    base = load_system(str(shop.base))
    assert not system.routes_in_passing
    assert shop.all.routes_in_passing
    for weights in (np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32)):
        define(system, PROMPTS, SHORT, weights=weights)
        assert system.memory_bytes == base.memory_bytes + system.residents.bytes
    system.residents.change(system.residents.sources)
    assert system.memory_bytes == base.memory_bytes
    assert [name for name, _ in system.model.named_modules()] == [name for name, _ in base.model.named_modules()]


def test_best_of_n_with_each_expert(shop: SimpleNamespace) -> None:
    system = on_demand(shop, max(shop.sizes))
    with watched(system):
        found = best_of(system, ASKED[:3], SAMPLED, 2, "experts")
    assert [d.text for d in found] == [d.text for d in best_of(shop.all, ASKED[:3], SAMPLED, 2, "experts")]


def test_too_little_memory_says_how_much_is_needed(shop: SimpleNamespace, tmp_path: Path) -> None:
    least = max(shop.sizes)
    with pytest.raises(ExpertError, match=f"the largest expert: give at least {least:,} bytes"):
        load_system(str(shop.pack), expert_memory=least - 1)
    load_system(str(shop.pack), expert_memory=least)
    soft = make_router(shop.base, tmp_path / "soft", names=NAMES, top_k=2)
    assert soft.top_k == 2
    build_pack(str(shop.base), [shop.folder / "lora" / name for name in NAMES], tmp_path / "soft", tmp_path / "pack")
    both = sum(sorted(shop.sizes)[-2:])
    with pytest.raises(ExpertError, match=f"the 2 experts of one prompt: give at least {both:,} bytes"):
        load_system(str(tmp_path / "pack"), expert_memory=both - 1)
    system, every = (load_system(str(tmp_path / "pack"), expert_memory=memory) for memory in (both, None))
    assert [d.text for d in define(system, ASKED, SHORT)] == [d.text for d in define(every, ASKED, SHORT)]
    with pytest.raises(RecipeError, match="no pack"):
        load_system(str(shop.base), expert_memory=least)


def test_an_expert_that_changed_fails_alone(shop: SimpleNamespace, tmp_path: Path) -> None:
    pack = shutil.copytree(shop.pack, tmp_path / "pack")
    system: Any = load_system(str(pack), expert_memory=max(shop.sizes))
    file = pack / "adapters" / "craft" / "adapter_model.safetensors"
    whole, eye = file.read_bytes(), np.eye(4, dtype=np.float32)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    others = [0, 2, 3]
    wanted = define(shop.all, PROMPTS, SHORT, weights=eye)
    for message in ("is not the file that was packed", "lacks adapters/craft"):
        with pytest.raises(LexiconError, match=message) as caught:
            define(system, PROMPTS, SHORT, weights=eye)
        assert "\n" not in str(caught.value)
        assert define(system, [PROMPTS[i] for i in others], SHORT, weights=eye[others]) == [wanted[i] for i in others]
        file.unlink(missing_ok=True)
    file.write_bytes(whole)
    assert define(system, PROMPTS, SHORT, weights=eye) == wanted


@torch.inference_mode()
def test_domains_join_and_leave(shop: SimpleNamespace) -> None:
    system: Any = load_system(str(shop.pack), expert_memory=max(shop.sizes))
    grown = load_system(str(shop.grown))
    define(system, ASKED, SHORT)
    add_domains(system, read_newcomers(system, shop.grown))
    assert system.experts == grown.experts
    assert ranks(system) == ranks(grown)
    assert system.trained_parameters == grown.trained_parameters
    with watched(system):
        assert said(define(system, ASKED, SHORT)) == said(define(grown, ASKED, SHORT))
        eye = np.eye(5, dtype=np.float32)
        assert define(system, ASKED[:5], SHORT, weights=eye) == define(grown, ASKED[:5], SHORT, weights=eye)
    remove_domain(system, "late")
    assert system.residents.bytes == bytes_of_experts(system) == 0
    assert said(define(system, ASKED, SHORT)) == said(define(shop.all, ASKED, SHORT))
    small: Any = load_system(str(shop.grown), expert_memory=max(shop.sizes))
    for name in ("motion", "mind", "nature"):
        remove_domain(small, name)
    small.residents.budget = max(source.bytes for source in small.residents.sources)
    newcomer = read_newcomers(small, shop.pack, ["motion"])
    with pytest.raises(ExpertError, match="too small for the largest expert"):
        add_domains(small, newcomer)
    assert small.experts == ("craft", "late")
    assert len(define(small, ASKED, SHORT)) == len(ASKED)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [expert_bytes(text) for text in (None, "200MB", "1.5 GB", "2gib", "3000", "1_KB")] == [
        None, 200_000_000, 1_500_000_000, 2**31, 3000, 1000,
    ]  # fmt: skip
    for text in ("", "many", "0", "-3MB", "3TB3", "MB"):
        with pytest.raises(RecipeError, match="is no size"):
            expert_bytes(text)
