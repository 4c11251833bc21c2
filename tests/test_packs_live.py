"""packs/live.py: a domain that joins a loaded mixture changes nothing of the others, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import DOMAINS, PROMPTS, ids_of, make_lora, make_router, workshop
from signing import make_key

from lora_lexicon.compose.system import load_system
from lora_lexicon.domains.router import load_router
from lora_lexicon.errors import ConflictError, PackError, TrustError
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.grouped import grouped_adapters
from lora_lexicon.inference.engine import define
from lora_lexicon.packs import live
from lora_lexicon.packs.live import add_domains, ranks, read_newcomers, remove_domain
from lora_lexicon.packs.pack import add_expert, build_pack
from lora_lexicon.packs.signature import sign_pack
from lora_lexicon.packs.trust import read_policy


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pack; the same with a domain of another rank; a pack of the same base with a router of its own."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.pack, shop.grown, shop.other = (shop.folder / name for name in ("pack", "grown", "other"))
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack, include_base=True)
    slang = make_lora(shop.base, shop.folder / "slang", seed=9, rank=6)
    add_expert(shop.pack, slang, [PROMPTS[3]], [], out=shop.grown)
    apart = [make_lora(shop.base, shop.folder / name, seed=20 + i) for i, name in enumerate(("law", "sport"))]
    make_router(shop.base, shop.folder / "apart", names=("law", "sport"))
    build_pack(str(shop.base), apart, shop.folder / "apart", shop.other, include_base=True)
    return shop


@torch.inference_mode()
def test_joining_and_leaving(shop: SimpleNamespace) -> None:
    system = load_system(str(shop.pack))
    grown = load_system(str(shop.grown))
    before, memory, old = define(system, PROMPTS), system.memory_bytes, system.router
    ids = ids_of(shop.base)
    with system.routed(torch.eye(4, 3)):
        logits = system.model(ids).logits
    add_domains(system, read_newcomers(system, shop.grown))
    assert system.experts == (*DOMAINS, "slang")
    assert ranks(system) == {**dict.fromkeys(DOMAINS, 4), "slang": 6}
    assert system.memory_bytes == grown.memory_bytes > memory
    assert system.trained_parameters == grown.trained_parameters
    assert define(system, PROMPTS) == define(grown, PROMPTS)
    with system.routed(torch.eye(4, 4)[[0, 1, 2, 0]] * torch.tensor([[1], [1], [1], [0]])):
        assert torch.equal(system.model(ids).logits, logits)
    remove_domain(system, "slang")
    assert (define(system, PROMPTS), system.memory_bytes, system.experts) == (before, memory, DOMAINS)
    assert system.router is not None
    assert old is not None
    for key in ("centroids", "quantiles", "term_vectors"):
        np.testing.assert_array_equal(getattr(system.router, key), getattr(old, key))


@pytest.mark.parametrize("memory", [None, 10**9], ids=["at once", "on demand"])
def test_what_a_policy_lets_in_is_what_is_loaded(
    shop: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None
) -> None:
    """However soon after its check the pack is exchanged for another."""
    monkeypatch.setenv("LORA_LEXICON_CACHE", str(tmp_path / "cache"))
    private, _ = make_key(tmp_path, "ours")
    (tmp_path / "trust.yaml").write_text(json.dumps({"trusted": [{"name": "us", "key": "ours.pub"}]}))
    policy = read_policy(tmp_path / "trust.yaml")
    signed, place = tmp_path / "signed", tmp_path / "pack"
    sign_pack(shop.grown, key=private, out=signed)
    shutil.copytree(signed, place)
    evil = make_lora(shop.base, tmp_path / "slang", seed=99, rank=6)
    add_expert(shop.pack, evil, [PROMPTS[3]], [], out=tmp_path / "evil")
    verify, opened = live.verify_pack, live.load_adapter

    def exchange(call: Callable[..., Any]) -> Callable[..., Any]:
        def exchanged(*given: Any, **more: Any) -> Any:
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "evil", place)
            return call(*given, **more)

        return exchanged

    for name, call in (("verify_pack", verify), ("load_adapter", opened)):
        shutil.rmtree(place)
        shutil.copytree(signed, place)
        system = load_system(str(shop.pack), expert_memory=memory)
        with monkeypatch.context() as patch:
            patch.setattr(live, name, exchange(call))
            newcomers = read_newcomers(system, place, policy=policy)
        if memory:
            with pytest.raises(PackError, match="not the file that was packed"):
                newcomers.sources[0].load()
            shutil.rmtree(place)
            shutil.copytree(signed, place)
        loaded = newcomers.sources[0].load() if memory else newcomers.adapters[0]
        wanted = load_adapter(signed / "adapters" / "slang", "slang")
        assert all(torch.equal(loaded.factors[layer].b, wanted.factors[layer].b) for layer in wanted.factors)
        assert not any((tmp_path / "cache" / "downloads").iterdir())
    with pytest.raises(TrustError):
        read_newcomers(system, tmp_path / "evil", policy=policy)


def test_a_router_with_another_mean_is_put_into_ours(shop: SimpleNamespace) -> None:
    system, theirs = load_system(str(shop.pack)), load_router(shop.other)
    assert system.router is not None
    assert system.embedder is not None
    assert not np.array_equal(system.router.mean, theirs.mean)
    add_domains(system, read_newcomers(system, shop.other, ["sport"]))
    wanted = system.router.prepare(system.embedder.embed([PROMPTS[1]]))[0]
    np.testing.assert_allclose(system.router.centroids[3], wanted, atol=2e-3)  # its one term's own place


def test_what_does_not_fit_changes_nothing(shop: SimpleNamespace, six_layers: Path, tmp_path: Path) -> None:
    system = load_system(str(shop.pack))
    before = define(system, PROMPTS)
    with pytest.raises(ConflictError, match="has all domains"):
        read_newcomers(system, shop.pack)
    with pytest.raises(ConflictError, match="already"):
        read_newcomers(system, shop.grown, [DOMAINS[0]])
    with pytest.raises(PackError, match="no domain 'law'"):
        read_newcomers(system, shop.grown, ["law"])
    elsewhere = workshop(six_layers, tmp_path / "six", ffn=False)
    build_pack(str(six_layers), elsewhere.lora, elsewhere.domains, tmp_path / "pack")
    with pytest.raises(ConflictError, match="for base"):
        read_newcomers(system, tmp_path / "pack")
    twice = read_newcomers(system, shop.grown)
    add_domains(system, twice)
    with pytest.raises(ConflictError, match="already"):
        add_domains(system, twice)
    for name in ("slang", *DOMAINS[1:]):
        remove_domain(system, name)
    with pytest.raises(ConflictError, match="last domain"):
        remove_domain(system, DOMAINS[0])
    with pytest.raises(PackError, match="no domain"):
        remove_domain(system, "slang")
    assert [a.name for a in grouped_adapters(system.model, system.experts)] == [DOMAINS[0]]
    add_domains(system, read_newcomers(system, shop.pack))
    assert sorted(d.text for d in define(system, PROMPTS)) == sorted(d.text for d in before)
