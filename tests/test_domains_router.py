"""The router decides row by row, grows without touching what is there, and refuses what is not its own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.learned import Learned
from lora_lexicon.domains.router import Router, describe, load_router
from lora_lexicon.domains.vectors import unit
from lora_lexicon.errors import RouterError


def make(seed: int = 0, domains: int = 3, width: int = 8, **settings) -> Router:
    rng = np.random.default_rng(seed)
    members = [unit(rng.normal(size=(20, width)) + 3 * rng.normal(size=width)) for _ in range(domains)]
    parts = [describe(rows)[:3] for rows in members]
    return Router(
        names=tuple(f"d{i}" for i in range(domains)),
        centroids=np.stack([centroid for centroid, _, _ in parts]),
        quantiles=np.stack([quantiles for _, quantiles, _ in parts]),
        mean=np.zeros(width, dtype=np.float32),
        terms=tuple(tuple(f"term{i}-{j}" for j in range(4)) for i in range(domains)),
        term_vectors=np.concatenate([rows[best[:4]] for rows, (_, _, best) in zip(members, parts, strict=True)]).astype(
            np.float16
        ),
        embedder_name="base",
        embedder_identity={"kind": "base", "layers": 2},
        embedder_tensors={},
        template=PromptTemplate(),
        **settings,
    )


def vectors(seed: int, count: int, width: int = 8) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


class Other:
    name, identity, tensors = "base", {"kind": "base", "layers": 3}, {}

    def embed(self, prompts, progress=None, batch_size=1):
        raise AssertionError


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(1, 6), st.integers(1, 40))
def test_top_1_is_the_nearest_centroid(seed, domains, count):
    router, rows = make(seed, domains), vectors(seed + 1, count)
    routing = router.route(rows)
    exact = rows.astype(np.float64) @ router.centroids.astype(np.float64).T
    assert np.allclose(routing.similarities, exact, atol=1e-6)
    assert (routing.top == routing.similarities.argmax(axis=1)).all()
    assert ((routing.weights == 0) | (routing.weights == 1)).all()
    assert (routing.weights.sum(axis=1) == 1).all()


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.floats(0.01, 5), st.integers(1, 70))
def test_a_row_does_not_depend_on_its_neighbours(seed, top_k, temperature, count):
    router, rows = make(seed, 4, top_k=top_k, temperature=temperature), vectors(seed, count)
    together = router.route(rows)
    for i in range(count):
        alone = router.route(rows[i : i + 1])
        assert np.array_equal(alone.similarities[0], together.similarities[i])
        assert np.array_equal(alone.weights[0], together.weights[i])
    assert np.allclose(together.weights.sum(axis=1), 1, atol=1e-6)
    assert (np.count_nonzero(together.weights, axis=1) <= top_k).all()


@settings(deadline=None)
@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 30))
def test_a_new_domain_leaves_the_others_bit_identical(seed, domains, members):
    router = make(seed, domains)
    grown = router.with_domain("new", vectors(seed + 7, members), [f"new{i}" for i in range(members)])
    assert grown.names == (*router.names, "new")
    assert np.array_equal(grown.centroids[:-1], router.centroids)
    assert np.array_equal(grown.quantiles[:-1], router.quantiles)
    rows = vectors(seed + 3, 25)
    before, after = router.route(rows), grown.route(rows)
    assert np.array_equal(after.similarities[:, :-1], before.similarities)
    stayed = after.top != domains
    assert np.array_equal(after.weights[stayed, :-1], before.weights[stayed])
    assert_equal(grown.without_domain("new"), router)


def test_abstains_below_the_domains_own_quantile():
    router = make(1, 3, abstain_quantile=0.5)
    rows = vectors(5, 300)
    routing, always = router.route(rows), make(1, 3).route(rows)
    nearest = always.top
    low = always.similarities.max(axis=1) < router.thresholds()[nearest]
    assert low.any()
    assert (routing.top == np.where(low, -1, nearest)).all()
    assert routing.name(int(low.argmax())) == "base"
    assert np.allclose(router.thresholds(), router.quantiles[:, 50])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5))
def test_save_and_load_round_trip(tmp_path_factory, seed, domains):
    folder = tmp_path_factory.mktemp("router")
    router = make(seed, domains, top_k=2, temperature=0.3, abstain_quantile=0.1)
    router.save(folder)
    assert_equal(load_router(folder), router)


def assert_equal(a: Router, b: Router) -> None:
    for field in a.__dataclass_fields__:
        x, y = getattr(a, field), getattr(b, field)
        assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, field


def test_mean_is_taken_off_before_comparing():
    router = make(2)
    shift = np.full(8, 0.25, dtype=np.float32)
    centred = Router(**{**router.__dict__, "mean": shift})
    rows = vectors(3, 10)
    assert np.allclose(centred.route(rows).similarities, router.route(unit(rows - shift)).similarities, atol=1e-6)


def test_nearest_terms_come_with_their_domain():
    router = make(4)
    term, domain, cosine = router.nearest_terms(router.term_vectors[5].astype(np.float32), 3)[0]
    assert (term, domain) == ("term1-1", "d1")
    assert cosine == pytest.approx(1, abs=1e-3)


def test_refuses_any_embedder_but_its_own():
    with pytest.raises(RouterError, match=r"layers 2, this one 3"):
        make().check(Other())


def edit(folder: Path, key: str, value: object) -> None:
    record = json.loads((folder / "router.json").read_text())
    record[key] = value
    (folder / "router.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("names", ["d0", "d1"]),
        ("names", ["d0", "d1", "../x"]),
        ("names", ["d0", "d1", "D1"]),
        ("names", 3),
        ("top_k", 0),
        ("top_k", "2"),
        ("top_k", True),
        ("embedder_identity", {"kind": "base", "layers": 10**9}),
        ("embedder_identity", {"kind": "base", "max_length": 0}),
        ("embedder_identity", {"kind": "base", "max_length": 10**12}),
        ("temperature", 0),
        ("temperature", "warm"),
        ("abstain_quantile", 2),
        ("embedder", None),
        ("embedder", "nonsense"),
        ("embedder", "tfidf"),
        ("embedder", "st:"),
        ("terms", [["good\nFORGED", "b", "c", "d"]] * 3),
        ("terms", [["zero\u200bwidth", "b", "c", "d"]] * 3),
        ("embedder_identity", []),
        ("terms", [["a"], ["b"], ["c"]]),
        ("terms", None),
        ("template", {"with_context": "{term.__class__} {context}"}),
        ("template", {"with_context": "{term"}),
        ("template", {"wrong": ""}),
        ("format", 99),
    ],
)
def test_an_edited_record_is_refused_in_one_line(tmp_path, key, value):
    make().save(tmp_path)
    edit(tmp_path, key, value)
    with pytest.raises(RouterError) as error:
        load_router(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_tensors_are_refused_in_one_line(tmp_path, share):
    make().save(tmp_path)
    tensors = tmp_path / "router.safetensors"
    tensors.write_bytes(tensors.read_bytes()[: int(tensors.stat().st_size * share)])
    with pytest.raises(RouterError, match="damaged"):
        load_router(tmp_path)


@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    make().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RouterError, match=name):
        load_router(tmp_path)


FITTED = {
    "vocabulary": np.frombuffer(b"good\nbad", np.uint8),
    "idf": np.ones(2),
    "projection": np.eye(2, 8, dtype=np.float32),
}
WILD = {
    "quantiles of no cosines": {"quantiles": lambda t: np.full_like(t, 5)},
    "quantiles that fall": {"quantiles": lambda t: t[:, ::-1].copy()},
    "long vectors of terms": {"term_vectors": lambda t: t * 100},
    "a projection that is not finite": {"embedder.projection": lambda t: t * np.nan},
    "a projection of another width": {"embedder.projection": lambda t: t[:, :3].copy()},
    "weights of too few words": {"embedder.idf": lambda t: t[:1]},
    "weights of two dimensions": {"embedder.idf": lambda t: t[:, None]},
    "weights without end": {"embedder.idf": lambda t: t * 1e300},
    "a word twice": {"embedder.vocabulary": lambda t: np.frombuffer(b"bad\nbad", np.uint8)},
    "learned rows without end": {"rows": lambda t: t * np.float32(3e38)},
}


@pytest.mark.parametrize("what", [None, *WILD])
def test_numbers_that_no_fit_gives_are_refused_in_one_line(tmp_path, what):
    learned = Learned(
        "linear", np.ones((3, 8), np.float32), np.ones(3, np.float32), {"precision": np.eye(8, dtype="f")}
    )
    replace(make(), embedder_name="tfidf", embedder_tensors=FITTED, learned=learned).save(tmp_path)
    file = tmp_path / "router.safetensors"
    tensors = {key: value.copy() for key, value in load_file(file).items()}
    save_file({**tensors, **{key: change(tensors[key]) for key, change in WILD.get(what, {}).items()}}, file)
    if what is None:
        assert load_router(tmp_path).embedder_name == "tfidf"
        return
    with pytest.raises(RouterError, match="is damaged") as refusal:
        load_router(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_term_is_held_as_it_can_be_shown():
    joined = make().with_domain("new", vectors(5, 2), ["good\nFORGED", "zero\u200bwidth"])
    assert sorted(joined.terms[-1]) == ["good FORGED", "zerowidth"]


def test_not_finite_or_not_unit_centroids_are_refused():
    router = make()
    for bad in (np.nan, 3.0):
        centroids = router.centroids.copy()
        centroids[1, 0] = bad
        with pytest.raises(RouterError, match=r"finite|unit length"):
            Router(**{**router.__dict__, "centroids": centroids})
