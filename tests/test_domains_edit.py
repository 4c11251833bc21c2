"""domains/edit.py and packs/edit.py: what is renamed, merged or split, and that nothing else changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import DOMAINS, PROMPTS, make_entries, workshop
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.data.store import load_entries
from lora_lexicon.domains.edit import Members, halved, merged_router, split_router
from lora_lexicon.domains.fit import load_domains, prompts_of
from lora_lexicon.domains.router import Router, describe, load_router
from lora_lexicon.domains.vectors import unit
from lora_lexicon.errors import LexiconError
from lora_lexicon.experts.checkpoint import load_adapter, read_expert
from lora_lexicon.experts.lora import Factors, LoadedAdapter
from lora_lexicon.folders import sha256_of
from lora_lexicon.inference.engine import define
from lora_lexicon.packs.edit import merge_domains, merged_adapter, rename_domain, split_domain
from lora_lexicon.packs.pack import build_pack, verify_pack

WIDTH = 8


@st.composite
def domains(draw: Any) -> tuple[Router, list[Members]]:
    """A router of three domains, and their members."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    parts = []
    for n, size in enumerate(draw(st.tuples(*[st.integers(40, 90)] * 3))):
        vectors = unit(rng.normal(size=(1, WIDTH)) * 2 + rng.normal(size=(size, WIDTH)))
        parts.append(Members(vectors, [Entry(f"{n}-{i}", "", "", "s") for i in range(size)]))
    found = [describe(part.vectors) for part in parts]
    router = Router(
        names=DOMAINS,
        centroids=np.stack([f.centroid for f in found]),
        quantiles=np.stack([f.quantiles for f in found]),
        mean=np.zeros(WIDTH, dtype=np.float32),
        terms=tuple(tuple(p.rows[i].term for i in f.nearest) for p, f in zip(parts, found, strict=True)),
        term_vectors=np.concatenate([p.vectors[f.nearest] for p, f in zip(parts, found, strict=True)]).astype(
            "float16"
        ),
        embedder_name="base",
        embedder_identity={},
        embedder_tensors={},
        template=PromptTemplate(),
    )
    return router, parts


def together(*parts: Members) -> Members:
    return Members(np.concatenate([p.vectors for p in parts]), [row for p in parts for row in p.rows])


@settings(max_examples=25, deadline=None)
@given(domains())
def test_a_merged_domain_is_the_one_of_all_members(given_: tuple[Router, list[Members]]) -> None:
    router, (nature, _, mind) = given_
    wanted = describe(together(nature, mind).vectors)
    total = len(nature) + len(mind)
    weights = {"nature": len(nature) / total, "mind": len(mind) / total}
    exact = merged_router(router, weights, "both", together(nature, mind))
    rough = merged_router(router, weights, "both")
    for found in (exact, rough):
        assert found.names == ("craft", "both")
        assert np.array_equal(found.centroids[0], router.centroids[1])
        assert np.array_equal(found.quantiles[0], router.quantiles[1])
        assert found.terms[0] == router.terms[1]
        assert set(found.terms[1]) <= {row.term for row in (*nature.rows, *mind.rows)}
    assert np.allclose(exact.centroids[1], wanted.centroid, atol=1e-6)
    assert np.allclose(exact.quantiles[1], wanted.quantiles, atol=1e-6)
    assert float(rough.centroids[1] @ wanted.centroid) > 0.9999
    assert merged_router(router, weights, "mind").names == ("craft", "mind")


@settings(max_examples=25, deadline=None)
@given(domains())
def test_a_split_domain_and_its_halves_merged_again(given_: tuple[Router, list[Members]]) -> None:
    router, (_, craft, _) = given_
    halves, names = halved(router.prepare(craft.vectors), craft.rows, ("a", "b"), (), 1)
    assert sorted(np.concatenate(halves).tolist()) == list(range(len(craft)))
    parts = [craft.taken(half) for half in halves]
    found = split_router(router, "craft", names, parts)
    assert found.names == ("nature", "mind", "a", "b")
    assert np.array_equal(found.centroids[:2], router.centroids[[0, 2]])
    for part, centroid in zip(parts, found.centroids[2:], strict=True):
        assert np.allclose(describe(part.vectors).centroid, centroid, atol=1e-6)
    again = merged_router(found, {"a": 0.5, "b": 0.5}, "craft", craft)
    assert np.allclose(again.centroids[2], router.centroids[1], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_a_merged_adapter_is_the_mean_and_cut_it_is_the_best_of_its_rank(
    first: int, second: int, rank: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    parts = [
        LoadedAdapter(name, {"layer": Factors(torch.randn(20, r), torch.randn(r, 24), scaling)})
        for name, r, scaling in (("a", first, 2.0), ("b", second, 0.5))
    ]
    lonely = LoadedAdapter("b", {**parts[1].factors, "own": Factors(torch.randn(9, 2), torch.randn(2, 7), 1.0)})
    weights = [share, 1 - share]
    mean = sum(part.factors["layer"].delta.double() * w for part, w in zip(parts, weights, strict=True))
    exact, energy = merged_adapter([parts[0], lonely], weights, None, "both")
    assert energy == pytest.approx(1, abs=1e-9)
    assert exact.factors["layer"].rank == first + second
    assert torch.allclose(exact.factors["layer"].delta.double(), mean, atol=1e-4)
    assert torch.allclose(exact.factors["own"].delta, lonely.factors["own"].delta * (1 - share), atol=1e-4)
    cut, kept = merged_adapter(parts, weights, rank, "both")
    u, s, v = torch.linalg.svd(mean)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    assert torch.allclose(cut.factors["layer"].delta.double(), best, atol=1e-3)
    assert kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-5)


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    build_pack(str(shop.base), shop.lora, shop.domains, shop.folder / "pack", include_base=True)
    shop.pack, shop.entries = shop.folder / "pack", make_entries(shop.folder)
    return shop


@pytest.fixture
def pack(shop: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(shop.pack, tmp_path / "pack"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def others(pack: Path, *changed: str) -> dict[str, str]:
    """The files of a pack that no change of these domains may touch."""
    ours = (*(f"adapters/{name}/" for name in changed), "README.md", "manifest.json", "router.")
    return {name: digest for name, digest in hashes(pack).items() if not name.startswith(ours)}


def test_a_renamed_domain_is_the_same_but_for_its_name(shop: SimpleNamespace, pack: Path, tmp_path: Path) -> None:
    rename_domain(pack, "craft", "trade")
    assert verify_pack(pack).domains == load_router(pack).names == ("nature", "trade", "mind")
    assert others(pack, "trade") == others(shop.pack, "craft")
    weights = "adapter_model.safetensors"
    assert sha256_of(pack / "adapters/trade" / weights) == sha256_of(shop.pack / "adapters/craft" / weights)
    assert (read_expert(pack / "adapters/trade").name, read_expert(pack / "adapters/trade").domain) == (
        "trade",
        "trade",
    )
    before, after = (define(load_system(str(path)), PROMPTS) for path in (shop.pack, pack))
    assert [a.text for a in before] == [b.text for b in after]
    assert [a.domain.replace("craft", "trade") for a in before] == [b.domain for b in after]
    rename_domain(pack, "trade", "Craft", out=tmp_path / "back")
    rename_domain(tmp_path / "back", "Craft", "craft")
    for name in ("router.json", "router.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (shop.pack / name).read_bytes()


@pytest.mark.parametrize("with_entries", [False, True])
def test_merged_domains_answer_by_the_mean(shop: SimpleNamespace, pack: Path, with_entries: bool) -> None:
    rows = load_entries(shop.entries).split("train") if with_entries else []
    before = load_system(str(shop.pack))
    own = sum(before.route(prompts_of([row])).name(0) in ("nature", "mind") for row in rows)
    report = merge_domains(pack, ["nature", "mind"], "nature", rows=rows)
    assert verify_pack(pack).domains == ("craft", "nature")
    assert others(pack, "nature") == others(shop.pack, "nature", "mind")
    assert report["described_by"] == ("entries" if with_entries else "typical terms")
    assert (report["members"], report["rank"], report["weights"]) == (own, 8, {"nature": 0.5, "mind": 0.5})
    assert report["energy"] == pytest.approx(1)
    merged = load_adapter(pack / "adapters" / "nature").factors
    for layer, factors in merged.items():
        parts = [load_adapter(shop.pack / "adapters" / name).factors[layer].delta for name in ("nature", "mind")]
        assert torch.allclose(factors.delta, sum(parts) / 2, atol=1e-5)
    assert read_expert(pack / "adapters" / "nature").training["merged_from"]["weights"] == report["weights"]
    told = [load_system(str(pack)).route([prompt]).name(0) for prompt in PROMPTS[:3]]
    assert told == ["nature", "craft", "nature"]


def test_a_split_domain_answers_as_before_under_two_names(shop: SimpleNamespace, pack: Path) -> None:
    rows = load_entries(shop.entries).split("train")
    before = load_system(str(shop.pack))
    own = [row for row in rows if before.route(prompts_of([row])).name(0) == "craft"]
    report = split_domain(pack, "craft", rows, ("trade", "art"))
    assert verify_pack(pack).domains == ("nature", "mind", "trade", "art")
    assert others(pack, "trade", "art") == others(shop.pack, "craft")
    assert sum(report["into"].values()) == len(own)
    assert min(report["into"].values()) > 0
    for child in ("trade", "art"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert sha256_of(pack / "adapters" / child / file) == sha256_of(shop.pack / "adapters/craft" / file)
        assert read_expert(pack / "adapters" / child).name == child
    after = load_system(str(pack))
    texts = {row: define(before, prompts_of([row]))[0].text for row in own}
    told = {row: define(after, prompts_of([row]))[0] for row in own}
    assert {told[row].domain for row in own} == {"trade", "art"}
    assert all(told[row].text == texts[row] for row in own if told[row].domain in ("trade", "art"))


def refusals(pack: Path, rows: list[Entry]) -> list[tuple[str, Callable[[], object]]]:
    return [
        ("no domain 'x'", lambda: rename_domain(pack, "x", "y")),
        ("already", lambda: rename_domain(pack, "craft", "Mind")),
        ("command line", lambda: rename_domain(pack, "craft", "base")),
        ("cannot name", lambda: rename_domain(pack, "craft", "../craft")),
        ("already", lambda: merge_domains(pack, ["craft", "mind"], "nature")),
        ("rank is 0", lambda: merge_domains(pack, ["craft", "mind"], "both", rank=0)),
        ("names for two", lambda: split_domain(pack, "craft", rows, ("one",))),
        ("already", lambda: split_domain(pack, "craft", rows, ("one", "One"))),
        ("no entry goes", lambda: split_domain(pack, "craft", rows[:0], ("a", "b"))),
    ]


def test_what_cannot_be_is_refused_and_changes_nothing(shop: SimpleNamespace, pack: Path) -> None:
    before = hashes(pack)
    for message, run in refusals(pack, load_entries(shop.entries).split("train")):
        with pytest.raises(LexiconError, match=message) as refusal:
            run()
        assert "\n" not in str(refusal.value)
        assert hashes(pack) == before


def test_a_change_that_is_cut_off_leaves_the_old_pack(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(pack)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_lexicon.packs.pack.write_manifest", stop)
    for run in (lambda: rename_domain(pack, "craft", "trade"), lambda: merge_domains(pack, ["craft", "mind"], "mind")):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert hashes(pack) == before
    assert [path.name for path in pack.parent.iterdir()] == ["pack"]


def test_a_domains_folder_on_the_command_line(shop: SimpleNamespace, tmp_path: Path, cli, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fitted = tmp_path / "domains"
    done = cli("domains", "fit", shop.entries, "--base", shop.base, "--domains", 3, "--layers", 1, "--out", fitted)
    assert done.exit_code == 0, done.output
    entries, first = load_entries(shop.entries), load_domains(fitted)
    a, b, c = first.router.names
    data = ("--data", shop.entries)

    def run(*command: object) -> dict[str, Any]:
        done = cli("domains", *command, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    kept = {path.name: path.read_bytes() for path in fitted.iterdir()}
    run("rename", fitted, a, "first")
    renamed = load_domains(fitted)
    assert renamed.router.names == ("first", b, c)
    for split in entries.splits:
        assert renamed.rows(entries, split, "first") == first.rows(entries, split, a)
    for part in ("assignments.safetensors", "map.safetensors", "router.safetensors"):
        assert (fitted / part).read_bytes() == kept[part]
    merged = run("merge", fitted, "first", c, "--name", "both", *data, "--out", tmp_path / "merged")
    assert merged["names"] == [b, "both"]
    found = load_domains(tmp_path / "merged")
    wanted = [row for row in entries.split("train") if row not in first.rows(entries, "train", b)]
    assert found.rows(entries, "train", "both") == wanted
    assert found.rows(entries, "train", b) == first.rows(entries, "train", b)
    assert merged["cohesion"][b] == first.record["cohesion"][b]
    assert sum(merged["sizes"]["test"].values()) == len(entries.split("test"))
    cut = run("split", tmp_path / "merged", "both", *data, "--names", "p, q")
    found = load_domains(tmp_path / "merged")
    assert found.router.names == (b, "p", "q")
    assert cut["sizes"]["train"]["p"] + cut["sizes"]["train"]["q"] == len(wanted)
    assert len(cut["separation"]) == 3
    assert [edit.get("split") for edit in cut["edits"]] == [None, "both"]
    for command, message in (
        (("merge", fitted, "first", c), "add --data"),
        (("merge", fitted, "first", "first"), "two or more"),
        (("merge", fitted, b, c, *data, "--rank", 2), "no adapters"),
        (("split", fitted, "nothing", *data), "no domain 'nothing'"),
        (("rename", shop.entries, "x", "y"), "is not a pack"),
    ):
        wrong = cli("domains", *command)
        assert (wrong.exit_code, wrong.stderr.strip().count("\n")) == (1, 0), wrong.output
        assert message in wrong.stderr


def test_a_pack_on_the_command_line(shop: SimpleNamespace, pack: Path, cli) -> None:
    for command, names in (
        (("rename", pack, "craft", "trade"), ("nature", "trade", "mind")),
        (("merge", pack, "trade", "mind", "--rank", 3), ("nature", "trade")),
        (("split", pack, "nature", "--data", shop.entries, "--names", "a,b"), ("trade", "a", "b")),
    ):
        done = cli("domains", *command)
        assert done.exit_code == 0, done.output
        assert verify_pack(pack).domains == names
        assert all(name in done.stdout for name in names)
    assert max(f.rank for f in load_adapter(pack / "adapters" / "trade").factors.values()) == 3
    shipped = cli("domains", "rename", "tiny", "make-cause", "x")
    assert (shipped.exit_code, "add --out" in shipped.stderr) == (1, True)
