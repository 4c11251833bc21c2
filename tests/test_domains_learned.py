"""Learned routers: what a newcomer may change, sklearn's discriminant as the reference, and what a file may hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lora_lexicon.data.entry import Entry
from lora_lexicon.domains import learned as learning
from lora_lexicon.domains.explain import explain, reading, record_of
from lora_lexicon.domains.fit import describe_all, make_router
from lora_lexicon.domains.learned import Learned
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.domains.vectors import centred, unit
from lora_lexicon.errors import DataError, RecipeError, RouterError
from lora_lexicon.recipe import DomainsRecipe

WIDTH = 6
LEARNED = ("projection", "linear")
methods = st.sampled_from(LEARNED)
seeds = st.integers(0, 9999)


class Nothing:
    """An embedder's name and identity."""

    name, identity, tensors = "base", {"kind": "base"}, {}


def sample(seed: int, domains: int = 3, each: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, WIDTH) around random centres, stretched so that the covariance is no multiple of 1, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(domains, dtype=np.int32), each)
    spread = rng.uniform(0.2, 2, size=WIDTH)
    return unit(2 * rng.normal(size=(domains, WIDTH))[labels] + spread * rng.normal(size=(len(labels), WIDTH))), labels


def fit(method: str, vectors: np.ndarray, labels: np.ndarray, centre: bool = True, **options: Any) -> Router:
    recipe = DomainsRecipe(router=cast(Any, method), **options)
    mean = vectors.mean(axis=0) if centre else np.zeros(WIDTH, dtype=np.float32)
    members = centred(vectors, mean)
    rows = [Entry(f"term{i}", "", f"a thing of kind{int(k)}", "test") for i, k in enumerate(labels)]
    return make_router(members, labels, describe_all(members, labels), rows, mean, cast(Any, Nothing()), recipe)


def learned_of(router: Router) -> Learned:
    assert router.learned is not None
    return router.learned


@settings(deadline=None, max_examples=40)
@given(methods, seeds, st.integers(2, 5), st.integers(1, 30), st.integers(1, 40))
def test_a_newcomer_changes_no_bit_of_the_others(method, seed, domains, members, count):
    router = fit(method, *sample(seed, domains))
    newcomers, rows = sample(seed + 1, 1, members)[0], sample(seed + 2, 1, count)[0]
    grown = router.with_domain("new", newcomers, [f"new{i}" for i in range(members)])
    before, after = router.route(rows), grown.route(rows)
    assert np.array_equal(after.similarities[:, :-1], before.similarities)
    stayed = after.top != domains
    assert np.array_equal(after.weights[stayed, :-1], before.weights[stayed])
    assert learned_of(grown).same_map(learned_of(router))
    assert_equal(grown.without_domain("new"), router)
    assert_equal(router.with_domain_of(grown, "new"), grown)  # from a router of the same map: the same bits


@settings(deadline=None, max_examples=30)
@given(methods, seeds, st.integers(1, 3), st.floats(0, 0.9))
def test_a_row_does_not_depend_on_its_neighbours(method, seed, top_k, quantile):
    router, (rows, _) = (
        fit(method, *sample(seed), top_k=top_k, abstain_quantile=quantile),
        sample(seed + 1, 1, 40),
    )
    together = router.route(rows)
    for i in range(len(rows)):
        alone = router.route(rows[i : i + 1])
        assert np.array_equal(alone.similarities[0], together.similarities[i])
        assert np.array_equal(alone.weights[0], together.weights[i])


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(3, 5), st.integers(8, 40), st.floats(0.01, 2))
def test_linear_is_the_discriminant_of_scikit_learn(seed, domains, each, temperature):
    vectors, labels = sample(seed, domains, each)
    router = fit("linear", vectors, labels, centre=False, temperature=temperature, top_k=domains)
    priors = np.full(domains, 1 / domains)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors).fit(vectors, labels)
    rows = sample(seed + 1, 1, 50)[0]
    routing, wanted = router.route(rows), model.decision_function(rows) - np.log(1 / domains)
    scale = 1 + np.abs(wanted).max()
    assert np.allclose(routing.similarities / temperature / scale, wanted / scale, atol=1e-3)
    assert np.allclose(routing.weights, model.predict_proba(rows), atol=1e-2)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 5))
def test_a_linear_row_is_the_same_joined_as_fitted(seed, domains):
    """The map alone makes rows: had the covariance been learned with the newcomer, its row would be this one."""
    vectors, labels = sample(seed, domains)
    router = fit("linear", vectors, labels)
    last = router.names[-1]
    again = router.without_domain(last).with_domain(last, vectors[labels == domains - 1])
    a, b = learned_of(router), learned_of(again)
    assert np.allclose(a.rows, b.rows, rtol=1e-4, atol=1e-4 * np.abs(a.rows).max())
    assert np.allclose(a.offsets, b.offsets, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 5))
def test_a_projection_that_adds_nothing_is_the_centroid_router(seed, domains):
    vectors, labels = sample(seed, domains)
    plain = fit("centroid", vectors, labels)
    nothing = np.zeros((2, WIDTH), dtype=np.float32)
    identity = Learned(
        "projection",
        plain.centroids,
        np.zeros(domains, dtype=np.float32),
        {"down": unit(sample(seed + 3, 1, 2)[0]), "up": nothing},
    )
    router = replace(plain, learned=identity)
    rows, newcomers = sample(seed + 1, 1, 30)[0], sample(seed + 2, 1, 9)[0]
    for a, b in ((router, plain), (router.with_domain("new", newcomers), plain.with_domain("new", newcomers))):
        assert np.array_equal(a.route(rows).similarities, b.route(rows).similarities)
        assert np.array_equal(a.route(rows).weights, b.route(rows).weights)
    assert router.scale == pytest.approx(plain.scale, rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(2, 4))
def test_the_projection_is_at_its_minimum(seed, domains):
    """Of cross-entropy and penalty, written down anew; centroids alone lie above it."""
    vectors, labels = sample(seed, domains)
    labels[::5] = (labels[::5] + 1) % domains  # so that no router tells them all apart
    router = fit("projection", vectors, labels)
    members = centred(vectors, vectors.mean(axis=0)).astype(np.float64)
    found = learned_of(router).map
    down, up = found["down"].astype(np.float64), found["up"].astype(np.float64)

    def objective(up: np.ndarray) -> float:
        rows = router.centroids + router.centroids @ down.T @ up
        logits = members @ rows.T / router.temperature
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        return losses.mean() + learning.RIDGE / 2 * float((up * up).sum())

    least = objective(up)
    assert least < objective(np.zeros_like(up))
    rng = np.random.default_rng(seed)
    for _ in range(5):
        step = 1e-2 * rng.normal(size=up.shape)
        assert objective(up + step) > least - 1e-6


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["centroid", *LEARNED]), seeds, st.floats(1e-5, 1e-2))
def test_scale_bounds_what_a_small_move_changes(method, seed, by):
    """A vector's rounding moves no margin by more than twice as much, times `scale`."""
    router = fit(method, *sample(seed), centre=False)
    rows = sample(seed + 1, 1, 20)[0]
    moved = unit(rows + by * unit(np.random.default_rng(seed).normal(size=rows.shape)))
    least = np.linalg.norm(moved.astype(np.float64) - rows, axis=1) * 2 * router.scale
    assert (np.abs(router.route(moved).margin - router.route(rows).margin) <= least + 1e-6 * (1 + router.scale)).all()


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("giver", ["centroid", *LEARNED])
def test_a_domain_of_any_other_router_joins(method, giver):
    """By its centroid and how tight its members lie: as if its prompts had been at hand."""
    vectors, labels = sample(5, 4, 60)
    both = vectors, labels
    three = labels < 3
    router = replace(fit(method, vectors[three], labels[three]), mean=vectors.mean(axis=0))
    given = fit(giver, *both)
    adopted = router.with_domain_of(given, given.names[3])
    joined = router.with_domain("new", vectors[labels == 3])
    assert np.array_equal(adopted.quantiles[3], given.quantiles[3])
    assert np.allclose(learned_of(adopted).rows[3], learned_of(joined).rows[3], rtol=0.02, atol=0.02 * router.scale)
    assert learned_of(adopted).offsets[3] == pytest.approx(learned_of(joined).offsets[3], rel=0.05)


@pytest.mark.parametrize("method", LEARNED)
def test_abstains_by_cosine_whatever_the_score(method):
    router = fit(method, *sample(1), abstain_quantile=0.5)
    rows = sample(9, 1, 300)[0]
    routing, always = router.route(rows), replace(router, abstain_quantile=0.0).route(rows)
    near = replace(router, learned=None, abstain_quantile=0.0).route(rows).similarities
    low = near[np.arange(300), always.top] < router.thresholds()[always.top]
    assert low.any()
    assert not low.all()
    assert (routing.top == np.where(low, -1, always.top)).all()


@settings(deadline=None, max_examples=10)
@given(methods, seeds, st.integers(2, 5))
def test_save_and_load_round_trip(tmp_path_factory, method, seed, domains):
    folder = tmp_path_factory.mktemp("router")
    router = fit(method, *sample(seed, domains), top_k=2)
    router.save(folder)
    assert_equal(load_router(folder), router)


def test_a_centroid_router_s_file_is_of_the_old_format(tmp_path: Path) -> None:
    fit("centroid", *sample(0)).save(tmp_path)
    record = json.loads((tmp_path / "router.json").read_text())
    assert record["format"] == 1
    assert "method" not in record
    assert set(load_file(tmp_path / "router.safetensors")) == {"centroids", "quantiles", "mean", "term_vectors"}


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("damage", ["missing", "shape", "type", "nan"])
@pytest.mark.parametrize("of", ["rows", "offsets", "map"])
def test_damaged_tensors_are_refused_in_one_line(tmp_path: Path, method: str, damage: str, of: str) -> None:
    fit(method, *sample(0)).save(tmp_path)
    tensors = load_file(tmp_path / "router.safetensors")
    key = learning.MAPS[method][-1] if of == "map" else of
    value = tensors.pop(key)
    broken = {"shape": value[..., :-1], "type": value.astype(np.float64), "nan": np.full_like(value, np.nan)}
    if damage != "missing":
        tensors[key] = np.ascontiguousarray(broken[damage])
    save_file(tensors, tmp_path / "router.safetensors")
    with pytest.raises(RouterError, match=key) as error:
        load_router(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("method", ["", "mlp", None, ["linear"]])
def test_an_unknown_method_is_refused_in_one_line(tmp_path: Path, method: object) -> None:
    fit("linear", *sample(0)).save(tmp_path)
    record = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**record, "method": method}))
    with pytest.raises(RouterError, match="projection, linear") as error:
        load_router(tmp_path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_learned_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = np.repeat(np.eye(WIDTH, dtype=np.float32)[:3], 5, axis=0), np.repeat(np.arange(3, dtype=np.int32), 5)
    with pytest.raises(DataError, match="are alike"):
        fit("linear", *alike, centre=False)
    with pytest.raises(DataError, match="one domain"):
        fit("linear", *sample(0, 1))
    monkeypatch.setattr(learning, "WIDTH", WIDTH - 1)
    with pytest.raises(RecipeError, match="projection"):
        fit("linear", *sample(0))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["centroid", *LEARNED]), seeds, st.floats(0, 0.9))
def test_the_explanation_is_the_decision_s(method, seed, quantile):
    vectors, labels = sample(seed)
    router = fit(method, vectors, labels, abstain_quantile=quantile)
    vector = sample(seed + 1, 1, 1)[0]
    routing = router.route(vector)
    rows = explain(router, routing, vector[0], 2)
    found = {row.domain: row for row in rows}
    assert [row.similarity for row in rows] == sorted(routing.similarities[0].tolist(), reverse=True)
    assert record_of(router, rows)["abstains"] == (routing.name(0) == "base")
    own = centred(vectors, router.mean)
    for i, name in enumerate(router.names):
        cosines = own[labels == i] @ router.centroids[i]
        share = (cosines <= found[name].cosine).mean()
        assert found[name].quantile == pytest.approx(share, abs=1 / 24 + 0.01)
        assert all(term in router.terms[i] for term, _ in found[name].nearest)
        assert len(found[name].nearest) == 2
    said = " ".join(reading(router, rows))
    assert ("the base answers" in said) == (routing.name(0) == "base")
    assert ("no cosine" in said) == (method != "centroid")


def assert_equal(a: Router, b: Router) -> None:
    for field in a.__dataclass_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if isinstance(x, Learned):
            assert x.same_map(y)
            assert np.array_equal(x.rows, y.rows)
            assert np.array_equal(x.offsets, y.offsets)
        else:
            assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, field
