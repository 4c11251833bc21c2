"""A server whose experts come on demand: answers as `define` writes them; a missing file fails its own requests."""

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from composing import DOMAINS, PROMPTS, make_lora, workshop
from conftest import WORDS

from lora_lexicon.compose.system import load_system
from lora_lexicon.inference.engine import define
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import add_expert, build_pack
from lora_lexicon.serve.app import Settings, create_app
from lora_lexicon.serve.problems import Problem
from lora_lexicon.serve.scheduler import Scheduler
from lora_lexicon.serve.work import Ended, Started, Work

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.pack, shop.grown = shop.folder / "pack", shop.folder / "packs" / "grown"
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack, include_base=True)
    slang = make_lora(shop.base, shop.folder / "slang", seed=9, rank=4)
    shop.grown.parent.mkdir()
    add_expert(shop.pack, slang, [PROMPTS[3]], [], out=shop.grown)
    shop.size = load_system(str(shop.pack), expert_memory=10**9).residents.sources[0].bytes  # type: ignore[union-attr]
    shop.wanted = {
        name: define(load_system(str(shop.pack)), [(w, "") for w in WORDS], SHORT, weights=weights)
        for name, weights in (
            *((name, np.eye(3, dtype=np.float32)[[i] * len(WORDS)]) for i, name in enumerate(DOMAINS)),
            ("base", np.zeros((len(WORDS), 3), np.float32)),
            ("auto", None),
        )
    }
    return shop


def run(system: Any, asked: list[tuple[str, str]], size: int) -> tuple[list[Any], list[int]]:
    """(what each (term, domain) was told last, who was begun, in order)."""
    scheduler, last, begun = Scheduler(system, batch_size=size), [None] * len(asked), []

    def tell(i: int, event: Any) -> None:
        last[i] = event
        if isinstance(event, Started):
            begun.append(i)
            assert system.residents.bytes <= system.residents.budget

    scheduler.submit(
        [Work(term, "", domain, SHORT, lambda event, i=i: tell(i, event)) for i, (term, domain) in enumerate(asked)]
    )
    scheduler.close()
    return last, begun


@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_answers_are_those_of_define(shop: SimpleNamespace, room: int) -> None:
    system: Any = load_system(str(shop.pack), expert_memory=room * shop.size)
    names = list(shop.wanted)
    asked = [(word, names[(i + k) % len(names)]) for i, word in enumerate(WORDS) for k in (0, 2)]
    told, begun = run(system, asked, 5)
    for (word, name), event in zip(asked, told, strict=True):
        assert isinstance(event, Ended)
        assert event.definition.text == shop.wanted[name][WORDS.index(word)].text
    assert sorted(begun) == list(range(len(asked)))
    assert (system.residents.loads == 3) == (room == 3)


def test_who_waits_for_room_is_not_passed_for_ever(shop: SimpleNamespace) -> None:
    """One of another expert amid many of the one at work: a few pass it, and no more than a batch holds."""
    asked = [(word, DOMAINS[0]) for word in WORDS] * 2
    asked[1] = (WORDS[1], DOMAINS[1])
    told, begun = run(load_system(str(shop.pack), expert_memory=shop.size), asked, 4)
    assert 1 < begun.index(1) <= 1 + 4
    assert all(isinstance(event, Ended) for event in told)


def test_a_file_that_is_gone_fails_its_own_requests(shop: SimpleNamespace, tmp_path: Path) -> None:
    system = load_system(str(shutil.copytree(shop.pack, tmp_path / "pack")), expert_memory=2 * shop.size)
    (tmp_path / "pack" / "adapters" / DOMAINS[1] / "adapter_model.safetensors").unlink()
    asked = [(word, DOMAINS[i % 3]) for i, word in enumerate(WORDS)]
    for (word, name), event in zip(asked, run(system, asked, 4)[0], strict=True):
        if name == DOMAINS[1]:
            assert isinstance(event, Problem)
            assert (event.status, event.kind) == (503, "expert_unavailable")
            assert f"lacks adapters/{name}/adapter_model.safetensors" in str(event.message)
        else:
            assert event.definition.text == shop.wanted[name][WORDS.index(word)].text


def test_what_is_in_memory_is_told(shop: SimpleNamespace) -> None:
    app = create_app(
        load_system(str(shop.pack), expert_memory=shop.size), Settings(token="secret", packs=[shop.grown.parent])
    )

    async def drive() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60
        ) as client:
            for name in (DOMAINS[1], DOMAINS[2]):
                await client.post("/define", json={"term": "apple", "domain": name, "max_tokens": 3})
            listed = (await client.get("/domains")).json()
            assert [d["name"] for d in listed["domains"] if d["in_memory"]] == [DOMAINS[2]]
            assert listed["expert_memory"] == {
                "budget": shop.size, "bytes": shop.size, "loads": 2, "evictions": 1,
            }  # fmt: skip
            text = (await client.get("/metrics")).text
            for line in ("expert_loads_total 2.0", "expert_evictions_total 1.0", "expert_memory_bytes "):
                assert f"lora_lexicon_{line}" in text
            headers = {"authorization": "Bearer secret"}
            added = await client.post("/domains", json={"path": "grown"}, headers=headers)
            assert added.json()["added"] == ["slang"]
            found = (await client.post("/define", json={"term": "apple", "domain": "slang", "max_tokens": 6})).json()
            eye = np.eye(4, dtype=np.float32)[[3]]
            wanted = define(load_system(str(shop.grown)), [("apple", "")], SHORT, weights=eye)
            assert found["definitions"][0]["definition"] == wanted[0].text
            assert (await client.delete("/domains/slang", headers=headers)).status_code == 200
            listed = (await client.get("/domains")).json()
            assert listed["expert_memory"]["bytes"] == 0
            assert not any(d["in_memory"] for d in listed["domains"])

    try:
        asyncio.run(drive())
    finally:
        app.state.scheduler.close()
