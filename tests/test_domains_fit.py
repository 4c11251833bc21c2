"""From entries to a domains folder: balance, reproducibility, names, the picture, and refusals."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lexicon.data.entry import Entry
from lora_lexicon.domains import cluster as clustering
from lora_lexicon.domains.cluster import cluster
from lora_lexicon.domains.embed import Embedder, make_embedder
from lora_lexicon.domains.embedders import restore_embedder
from lora_lexicon.domains.fit import Domains, fit_domains, load_domains
from lora_lexicon.domains.label import RESERVED, name_domains
from lora_lexicon.domains.router import check_name
from lora_lexicon.domains.sweep import sweep_domains
from lora_lexicon.domains.vectors import unit
from lora_lexicon.errors import DataError, LexiconError, RecipeError, RouterError
from lora_lexicon.recipe import DomainsRecipe

SUBJECTS = {
    "animal": ("dog", "wolf", "otter", "heron", "lynx", "mole", "stag", "hare", "boar", "crane"),
    "machine": ("lathe", "pump", "crank", "valve", "rotor", "gear", "lever", "winch", "piston", "drill"),
}


@dataclass
class FakeBase:
    model: object
    tokenizer: object
    fingerprint: str = "f00d"


@dataclass(frozen=True)
class FakeEntries:
    parts: dict[str, list[Entry]]
    fingerprint: str = "abc123def456"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def split(self, name: str) -> list[Entry]:
        return self.parts[name]


def entry(term: str, kind: str, number: int) -> Entry:
    context = f"the {term} is an {kind} of the {kind} sort number {number}"
    return Entry(term, context, f"a kind of {kind} called {term}", "test")


@pytest.fixture(scope="module")
def entries() -> FakeEntries:
    rows = [entry(term, kind, n) for n in range(3) for kind, terms in SUBJECTS.items() for term in terms]
    return FakeEntries({"train": rows[:45], "valid": rows[45:52], "test": rows[52:]})


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> FakeBase:
    return FakeBase(AutoModelForCausalLM.from_pretrained(tiny_base).eval(), AutoTokenizer.from_pretrained(tiny_base))


def fit(entries: FakeEntries, base: FakeBase, recipe: DomainsRecipe, out: Path, **options) -> tuple[Domains, Embedder]:
    prompts = [(row.term, row.context) for row in entries.split("train")]
    embedder = make_embedder(recipe, base=base, prompts=prompts)
    return fit_domains(entries, embedder, recipe, out, **options), embedder


@given(st.integers(0, 999), st.integers(1, 7), st.integers(8, 60), st.sampled_from(["balanced", "lexical", "random"]))
@settings(deadline=None, max_examples=30)
def test_balanced_sizes_differ_by_at_most_one(seed, domains, count, method):
    vectors = unit(np.random.default_rng(seed).normal(size=(count, 6)))
    labels = cluster(vectors, DomainsRecipe(domains=domains, method=method))
    sizes = np.bincount(labels, minlength=domains)
    assert len(sizes) == domains
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("count", "domains"), [(100, 3), (101, 3), (149, 7), (20, 20)])
def test_rows_beyond_the_sample_are_balanced_too(monkeypatch, count, domains):
    monkeypatch.setattr(clustering, "FLOW_PAIRS", 0)
    monkeypatch.setattr(clustering, "SAMPLE", 30)
    vectors = unit(np.random.default_rng(0).normal(size=(count, 6)))
    sizes = np.bincount(cluster(vectors, DomainsRecipe(domains=domains)), minlength=domains)
    assert len(sizes) == domains
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("method", ["balanced", "kmeans"])
def test_finds_domains_that_are_there(method):
    rng = np.random.default_rng(3)
    truth = np.repeat(np.arange(3), 20)
    vectors = unit(rng.normal(size=(60, 8)) * 0.1 + np.eye(3, 8)[truth])
    labels = cluster(vectors, DomainsRecipe(domains=3, method=method))
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 3


def test_too_few_prompts_are_refused():
    with pytest.raises(DataError, match="1 different prompts cannot make 4"):
        cluster(unit(np.ones((9, 4))), DomainsRecipe())


@pytest.mark.parametrize("method", ["balanced", "kmeans", "random"])
def test_different_prompts_are_counted_among_many(monkeypatch, method):
    vectors = np.repeat(np.eye(3, dtype=np.float32), 7000, axis=0)
    monkeypatch.setattr("lora_lexicon.domains.vectors._BLOCK", 3 * 6000)
    with pytest.raises(DataError, match="3 different prompts cannot make 4"):
        cluster(vectors, DomainsRecipe(domains=4, method=method))
    sizes = np.bincount(cluster(vectors, DomainsRecipe(domains=3, method=method)), minlength=3)
    assert sizes.tolist() == [7000] * 3


def test_a_domain_that_k_means_leaves_empty_is_refused(monkeypatch):
    monkeypatch.setattr(clustering, "KMEANS_ROWS", 100)
    vectors = np.eye(3, dtype=np.float32)[np.minimum(np.arange(30_000), 2)]  # two of the three are too rare to be seen
    with pytest.raises(DataError, match="of 3 domains empty"), pytest.warns(ConvergenceWarning):
        cluster(vectors, DomainsRecipe(domains=3, method="kmeans"))


@pytest.mark.parametrize("method", ["balanced", "kmeans", "random", "none"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(method, wrong):
    vectors = unit(np.random.default_rng(0).normal(size=(50, 4)))
    vectors[30, 2] = wrong
    with pytest.raises(DataError, match="NaN or infinity"):
        cluster(vectors, DomainsRecipe(domains=2, method=method))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**32}, r"seed is 4294967296; it must be .* below 2\*\*32"),
        ({"domains": 0}, "domains is 0"),
        ({"top_k": 5}, "top_k is 5, and there are"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_embedded(entries, tmp_path, setting, message):
    class Unused:
        name = "base"

    recipe = DomainsRecipe(**setting)
    with pytest.raises(RecipeError, match=message):
        fit_domains(entries, cast(Embedder, Unused()), recipe, tmp_path / "domains")
    if recipe.domains:
        with pytest.raises(RecipeError, match=message):
            sweep_domains(entries, cast(Embedder, Unused()), recipe, [2, 3], tmp_path / "sweep")
    assert not list(tmp_path.iterdir())


def test_the_largest_seed_serves(monkeypatch):
    monkeypatch.setattr(clustering, "FLOW_PAIRS", 0)
    vectors = unit(np.random.default_rng(0).normal(size=(60, 6)))
    for method in ("balanced", "kmeans"):
        assert set(cluster(vectors, DomainsRecipe(domains=3, seed=2**32 - 1, method=method)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "recipe",
    [
        DomainsRecipe(domains=2),
        DomainsRecipe(domains=3, pool="mean", centre=False, layers=0),
        DomainsRecipe(domains=2, method="kmeans"),
        DomainsRecipe(domains=2, method="lexical"),
        DomainsRecipe(domains=2, embedder="tfidf", abstain_quantile=0.2),
        DomainsRecipe(domains=4, method="random"),
        DomainsRecipe(method="none"),
    ],
    ids=lambda recipe: f"{recipe.method}-{recipe.embedder}-{recipe.pool}",
)
def test_a_folder_accounts_for_every_row(entries, base, tmp_path, recipe):
    domains, embedder = fit(entries, base, recipe, tmp_path / "domains")
    names = domains.router.names
    assert len(names) == (1 if recipe.method == "none" else recipe.domains)
    for split in entries.splits:
        rows = entries.split(split)
        split_rows = [domains.rows(entries, split, name) for name in names]
        abstained = domains.record["sizes"][split].get("base", 0)
        assert sum(map(len, split_rows)) + abstained == len(rows) == sum(domains.record["sizes"][split].values())
    prompts = [(row.term, row.context) for row in entries.split("test")]
    domains.router.check(embedder)
    assert np.array_equal(domains.router.route(embedder.embed(prompts)).top, domains.assignments["test"])
    assert set(domains.record["cohesion"]) == set(names)
    assert len(domains.record["separation"]) == len(names) * (len(names) - 1) // 2
    assert domains.record["recipe"]["seed"] == 42


def test_the_same_input_gives_the_same_folder(entries, base, tmp_path):
    for name in ("a", "b"):
        fit(entries, base, DomainsRecipe(domains=3), tmp_path / name, cache=tmp_path / "cache")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_shards_and_blocks_change_no_domain(entries, base, tmp_path, monkeypatch):
    whole, _ = fit(entries, base, DomainsRecipe(domains=3), tmp_path / "whole")
    monkeypatch.setattr("lora_lexicon.domains.embed.SHARD", 16)
    monkeypatch.setattr("lora_lexicon.domains.fit.SHARD", 16)
    monkeypatch.setattr("lora_lexicon.domains.vectors._BLOCK", 32 * 4)
    parts, _ = fit(entries, base, DomainsRecipe(domains=3), tmp_path / "parts", cache=tmp_path / "cache")
    assert parts.record["sizes"] == whole.record["sizes"]
    for split, labels in whole.assignments.items():
        assert np.array_equal(parts.assignments[split], labels)
    assert np.allclose(parts.router.centroids, whole.router.centroids, atol=1e-6)
    assert np.allclose(parts.router.mean, whole.router.mean, atol=1e-6)
    assert parts.router.terms == whole.router.terms
    assert parts.record["mean_cohesion"] == pytest.approx(whole.record["mean_cohesion"], abs=1e-6)
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}


def test_a_sweep_measures_what_fit_does(entries, base, tmp_path):
    recipe = DomainsRecipe()
    embedder = make_embedder(recipe, base=base)
    record = sweep_domains(entries, embedder, recipe, [2, 3], tmp_path / "sweep")
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == record
    rows = entries.split("train")
    for row in record["rows"]:
        fitted, _ = fit(entries, base, replace(recipe, domains=row["domains"]), tmp_path / str(row["domains"]))
        assert row["cohesion"] == fitted.record["mean_cohesion"]
        assert row["separation"] == fitted.record["mean_separation"]
        assert row["router_agreement"] == fitted.record["router_agreement"]
        vectors = fitted.router.prepare(embedder.embed([(r.term, r.context) for r in rows]))
        wanted = silhouette_score(vectors, fitted.assignments["train"], metric="cosine")
        assert row["silhouette"] == pytest.approx(wanted, abs=1e-4)
        text = f"{row['domains']} domains: cohesion {row['cohesion']:.3f}"
        assert text.encode() in (tmp_path / "sweep" / "sweep.png").read_bytes()


def test_distances_are_the_mean_cosine_distances(entries, base, tmp_path):
    domains, embedder = fit(entries, base, DomainsRecipe(domains=2), tmp_path / "domains")
    rows, router = entries.split("train"), domains.router
    vectors = router.prepare(embedder.embed([(row.term, row.context) for row in rows]))
    for i, name in enumerate(router.names):
        own = vectors[domains.assignments["train"] == i]
        assert domains.record["cohesion"][name] == pytest.approx(1 - (own @ router.centroids[i]).mean(), abs=1e-5)
    (pair,) = domains.record["separation"]
    assert pair["distance"] == pytest.approx(1 - router.centroids[0] @ router.centroids[1], abs=1e-5)


def test_lexical_domains_are_named_by_their_words(entries, base, tmp_path):
    domains, _ = fit(entries, base, DomainsRecipe(domains=2, method="lexical"), tmp_path / "domains")
    assert {name.split("-")[0] for name in domains.router.names} == set(SUBJECTS)


def test_a_fitted_embedder_is_restored_from_the_router(entries, base, tmp_path):
    domains, embedder = fit(entries, base, DomainsRecipe(embedder="tfidf", domains=2), tmp_path / "domains")
    prompts = [("otter", "an animal"), ("nothing", "qqq")]
    assert np.array_equal(restore_embedder(domains.router).embed(prompts), embedder.embed(prompts))
    broken = replace(domains.router, embedder_tensors={**embedder.tensors, "idf": embedder.tensors["idf"] * 2})
    with pytest.raises(RouterError, match="sha256"):
        restore_embedder(broken)


def test_a_hub_model_is_its_own_embedder(tiny_base, entries, tmp_path):
    recipe = DomainsRecipe(embedder=f"hf:{tiny_base}", domains=2)
    embedder = make_embedder(recipe)
    domains = fit_domains(entries, embedder, recipe, tmp_path / "domains")
    prompts = [("otter", "an animal"), ("pump", "")]
    again = restore_embedder(domains.router)
    assert np.array_equal(again.embed(prompts), embedder.embed(prompts))
    assert np.array_equal(again.embed(prompts)[0], again.embed(prompts[:1])[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "unknown embedder"),
        ("st:", "unknown embedder"),
        ("hf:/nowhere/at/all", "cannot be loaded"),
        ("base", "give --base"),
    ],
)
def test_embedders_that_cannot_be_made_are_refused(name, message):
    with pytest.raises(RouterError, match=message) as error:
        make_embedder(DomainsRecipe(embedder=name))
    assert "\n" not in str(error.value)


def test_an_embedder_that_is_not_the_recipes_is_refused(entries, base, tmp_path):
    embedder = make_embedder(DomainsRecipe(), base=base)
    with pytest.raises(RecipeError, match="tfidf"):
        fit_domains(entries, embedder, DomainsRecipe(method="lexical"), tmp_path / "domains")
    assert not list(tmp_path.iterdir())


TEXT = st.text(max_size=30) | st.sampled_from(["to make or cause", "an act", "the quality of an act", "to cause"])


@given(
    st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=6),
    st.lists(st.sampled_from(["make-cause", "Quality", "domain-0", "domain-0-0", "act.2"]), unique=True),
)
@settings(deadline=None)
def test_names_are_valid_and_unique_and_unlike_those_that_are_there(definitions, taken):
    names = name_domains([[Entry("t", "", d, "s") for d in part] for part in definitions], taken)
    assert len({name.lower() for name in [*names, *taken]}) == len(definitions) + len(taken)
    assert all(check_name(name) and name not in RESERVED for name in names)
    words = {word for name in taken for word in re.findall("[a-z]{3,}", name.lower())} - {"domain"}
    assert not words & {word for name in names for word in name.split("-")}


def test_other_entries_and_unknown_domains_are_refused(entries, base, tmp_path):
    domains, _ = fit(entries, base, DomainsRecipe(domains=2), tmp_path / "domains")
    with pytest.raises(DataError, match=r"abc123def456.*other"):
        domains.rows(FakeEntries(entries.parts, "other"), "train", domains.router.names[0])
    with pytest.raises(RouterError, match=r"no domain 'x'"):
        domains.rows(entries, "train", "x")


def damage(folder: Path, what: str) -> None:
    if what.endswith(".safetensors"):
        file = folder / what
        file.write_bytes(file.read_bytes()[:-3])
        return
    record = json.loads((folder / "domains.json").read_text())
    record[what] = ["other"]
    (folder / "domains.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "what", ["assignments.safetensors", "router.safetensors", "names", "entries", "sizes", "format"]
)
def test_a_damaged_folder_is_refused_in_one_line(entries, base, tmp_path, what):
    fit(entries, base, DomainsRecipe(domains=2), tmp_path / "domains")
    damage(tmp_path / "domains", what)
    with pytest.raises(LexiconError) as error:
        load_domains(tmp_path / "domains")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_the_picture_says_what_it_shows(entries, base, tmp_path):
    domains, _ = fit(entries, base, DomainsRecipe(domains=2), tmp_path / "domains")
    text = domains.draw(tmp_path / "map.png")
    content = (tmp_path / "map.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert text.encode() in content
    assert all(name in text for name in domains.router.names)
