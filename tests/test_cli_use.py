"""`route`, `define` and `evaluate`, as a user calls them."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from small_system import EXPERTS, SmallSystem

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.store import EntriesWriter
from lora_lexicon.domains.fit import describe_all, make_router
from lora_lexicon.domains.vectors import unit
from lora_lexicon.evaluation.saved import read_evaluations
from lora_lexicon.recipe import DomainsRecipe


@pytest.fixture(scope="module")
def small(tiny_base: Path) -> Any:
    return SmallSystem(tiny_base)


@pytest.fixture
def loaded(small: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every model is the small system; the names asked for are kept."""
    from lora_lexicon import resources
    from lora_lexicon.compose import system

    asked: list[str] = []

    def load(path: str, **_: Any) -> Any:
        asked.append(path)
        return small

    monkeypatch.setattr(system, "load_system", load)
    monkeypatch.setattr(resources, "check_system", Path)
    return asked


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entries")
    writer = EntriesWriter(folder)
    for term in ("apple", "river", "stone", "cloud"):
        writer.add("test", Entry(term, f"the {term} is here", f"a kind of {term}", "test"))
    writer.finish({})
    return folder


def one_line(result: Any) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_route_shows_domain_similarities_and_nearest_terms(cli: Callable, loaded: list[str]) -> None:
    found = json.loads(cli("route", "river", "-c", "the river is here", "PACK", "--json").stdout)
    assert loaded == ["PACK"]
    assert set(found) == {"term", "context", "domain", "margin", "similarities", "weights", "nearest"}
    assert set(found["similarities"]) == set(EXPERTS)
    assert found["nearest"] == [{"term": "brook", "domain": "river", "similarity": 0.75}]
    shown = cli("route", "river").stdout
    assert "margin" in shown
    assert "brook" in shown


@pytest.mark.parametrize("method", ["centroid", "linear"])
def test_route_explains(
    cli: Callable, loaded: list[str], small: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    members = unit(np.array([[1, 1], [-1, 1], [0, -1]])[labels] + 0.2 * rng.normal(size=(60, 2)))
    rows = [Entry(f"term{i}", "", f"a kind of {EXPERTS[k]}", "test") for i, k in enumerate(labels)]
    embedder: Any = SimpleNamespace(name="base", identity={}, tensors={})
    recipe = DomainsRecipe(router=cast(Any, method), abstain_quantile=0.1)
    found = describe_all(members, labels)
    router = make_router(members, labels, found, rows, np.zeros(2, dtype=np.float32), embedder, recipe)
    router = router.renamed(EXPERTS)
    monkeypatch.setattr(small, "router", router)
    monkeypatch.setattr(small, "route", lambda prompts: router.route(small.embed(prompts)))

    said = json.loads(cli("route", "river", "--explain", "--nearest", "2", "--json").stdout)["explanation"]
    assert said["router"] == method
    assert said["abstains"] is False
    first, *_ = domains = said["domains"]
    assert first["domain"] == "river"  # whose centre the vector (1, 1) is
    assert first["quantile"] > 0.5
    assert [len(domain["nearest"]) for domain in domains] == [2, 2, 2]
    thresholds = dict(zip(router.names, router.thresholds().tolist(), strict=True))
    assert {domain["domain"]: domain["threshold"] for domain in domains} == thresholds
    shown = cli("route", "river", "--explain").stdout
    assert ("score" in shown) == (method == "linear")
    for part in ("margin of river", "quantile: ", "not below it", "term"):
        assert part in shown


def test_route_needs_a_router(cli: Callable, tiny_base: Path) -> None:
    assert "has no router" in one_line(cli("route", "apple", tiny_base))


def test_define_answers_each_term_with_its_expert(cli: Callable, loaded: list[str]) -> None:
    result = cli("define", "apple", "river", "--max-tokens", "4", "--model", "PACK")
    assert result.exit_code == 0
    assert [line.split(" [")[0] for line in result.stdout.splitlines()] == ["apple", "river"]
    answers = json.loads(cli("define", "apple", "river", "--max-tokens", "4", "--json").stdout)["definitions"]
    assert list(answers[0]) == ["term", "context", "definition", "domain", "similarity", "margin"]
    assert all(a["domain"] in (*EXPERTS, "base") for a in answers)
    assert loaded == ["PACK", "tiny"]


def test_define_on_a_real_base_folder(cli: Callable, tiny_base: Path) -> None:
    (answer,) = json.loads(cli("define", "apple", "-m", tiny_base, "--max-tokens", "3", "--json").stdout)["definitions"]
    assert (answer["domain"], answer["similarity"]) == ("base", None)


def test_a_seed_makes_samples_repeat(cli: Callable, loaded: list[str]) -> None:
    def text(seed: int) -> str:
        return cli("define", "apple", "river", "stone", "--sample", "--seed", seed, "--max-tokens", "8").stdout

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "apple\n\nriver\tthe river is here\n"),
        ("a.list", "\ufeffapple\r\nriver\tthe river is here"),
        ("a.jsonl", '{"term": "apple"}\n{"term": "river", "context": "the river is here", "more": 1}\n'),
        ("a.csv", 'term,context\napple,\nriver,"the river is here"\n'),
        ("a.tsv", "context\tterm\n\tapple\nthe river is here\triver\n"),
    ],
)
def test_a_file_of_terms(cli: Callable, loaded: list[str], tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    answers = json.loads(cli("define", "--file", tmp_path / name, "--max-tokens", "2", "--json").stdout)["definitions"]
    assert [(a["term"], a["context"]) for a in answers] == [("apple", ""), ("river", "the river is here")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no term"),
        ("bytes.txt", b"apple\n\xff\xfe\n", "not UTF-8"),
        ("a.jsonl", b'{"term": "apple"}\n{"term"\n', "a.jsonl:2: not valid JSON"),
        ("b.jsonl", b'{"word": "apple"}\n', "b.jsonl:1: expected an object"),
        ("c.jsonl", b'{"term": " "}\n', "c.jsonl:1: the term is empty"),
        ("d.jsonl", b"[" * 100_000, "d.jsonl:1: not valid JSON"),
        ("e.jsonl", b'{"term": "apple"}\n{"term": "\\ud800"}\n', "e.jsonl:2: control characters, or halves"),
        ("f.jsonl", b'{"term": "apple", "context": "an \\udc00"}\n', "f.jsonl:1: control characters, or halves"),
        ("g.txt", b"\x1b]0;apple\x07\n", "g.txt:1: control characters"),
        ("d.csv", b"term,context\napple,one,two\n", "d.csv:2: more fields than columns"),
        ("a.csv", b"word,context\napple,\n", "no column named 'term'"),
        ("b.csv", b'term,context\napple,"never closed\n', "not readable as CSV"),
        ("c.csv", b"term,context\n,a context\n", "c.csv:2: the term is empty"),
    ],
)
def test_a_bad_file_is_one_line(cli: Callable, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in one_line(cli("define", "--file", tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to define"),
        (["--json"], "nothing to define"),
        ([" "], "term is empty"),
        (["ap\x1bple"], "control characters"),
        (["\udcff"], "not UTF-8"),
        (["apple", "--context", "an \udcff"], "not UTF-8"),
        (["apple", "--file", "x.txt"], "not both"),
        (["--context", "x"], "belongs to a TERM"),
        (["apple", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["apple", "--expert-memory", "much"], "--expert-memory 'much' is no size"),
        (
            ["apple", "--expert-memory", "9KB"],
            "a memory of 9,000 bytes for experts is too small for the largest expert",
        ),
    ],
)
def test_bad_requests_are_one_line(cli: Callable, arguments: list[str], said: str) -> None:
    assert said in one_line(cli("define", *arguments))
    if arguments == [" "]:
        assert said in one_line(cli("route", *arguments))


def test_experts_come_on_demand(cli: Callable, tiny_base: Path) -> None:
    """The shipped pack with room for one of its adapters writes what it writes with all."""

    def written(*options: str) -> list[tuple[str, str]]:
        answer = cli("define", "apple", "run", "bright", "--max-tokens", "4", "--json", *options)
        return [(d["domain"], d["definition"]) for d in json.loads(answer.stdout)["definitions"]]

    assert len({domain for domain, _ in written()}) > 1
    assert written("--expert-memory", "0.3MB") == written()
    assert "is no pack" in one_line(cli("define", "apple", "-m", tiny_base, "--expert-memory", "1MB"))


def test_a_person_is_asked_until_an_empty_term() -> None:
    from lora_lexicon.cli.use import asked

    typed = iter(["apple", "", "river ", " the river", ""])
    assert list(asked(lambda _: next(typed))) == [("apple", ""), ("river", "the river")]

    def end(_: str) -> str:
        raise EOFError

    assert list(asked(end)) == []


def test_evaluate_scores_models_side_by_side(cli: Callable, loaded: list[str], entries: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ("evaluate", "A", "B", "--data", entries, "--random-routing", "--max-tokens", "4", "--out", out)
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((out / "report.json").read_text()) == report
    names = [system["name"] for system in report["systems"]]
    assert names == ["small", "small-random", "small-2", "small-random-2"]
    assert report["rows"] == 4
    assert {c["metric"] for c in report["comparisons"]} == {"loss", "bleu", "rouge_l"}
    assert {c["b"] for c in report["comparisons"]} == {"small"}
    assert sorted(p.stem for p in (out / "predictions").iterdir()) == sorted(names)
    words = shlex.split(report["command"])
    assert words[:4] == ["lora-lexicon", "evaluate", "A", "B"]
    assert sorted(words) == sorted(["lora-lexicon", *map(str, arguments), "--json"])
    assert report["systems"][0]["base_fingerprint"] == "ab" * 32
    kept = read_evaluations(out)
    for each, system in zip(kept.evaluations, report["systems"], strict=True):
        assert each.summary() == pytest.approx(system)
    assert [each.places is not None for each in kept.evaluations] == [True, False, True, False]
    made = cli("report", out, "--out", tmp_path / "r")
    assert made.exit_code == 0, made.output
    assert "4 systems on 4 entries" in made.stdout
    assert "exists and is not empty" in cli(*arguments).stderr
    table = cli(*arguments, "--overwrite")
    assert table.exit_code == 0
    assert "BLEU" in table.stdout


def test_evaluate_takes_further_metrics(cli: Callable, loaded: list[str], entries: Path) -> None:
    arguments = ("evaluate", "A", "--data", entries, "--max-tokens", "4", "--metric", "bleu,chrf", "--metric", "exact")
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (name,) = report["scores"]
    assert list(report["scores"][name]) == ["bleu", "chrf", "exact"]
    assert report["scores"][name]["bleu"]["value"] == pytest.approx(report["systems"][0]["bleu"])
    assert "chrf" in cli(*arguments).stdout
    two = cli("evaluate", "A", "B", *arguments[2:], "--metric", "distinct", "--json")
    compared = [(c["a"], c["metric"]) for c in json.loads(two.stdout)["comparisons"]]
    assert compared == [("small-2", metric) for metric in ("loss", "bleu", "rouge_l", "chrf", "exact")]
    assert "no interval, and no test of differences: distinct" in cli(*arguments, "--metric", "distinct").stderr
    assert "leave one of them out" in one_line(cli(*arguments, "--no-generate"))
    assert "add --encoder" in one_line(cli(*arguments, "--metric", "mauve"))


def test_evaluate_without_generation_on_fewer_entries(cli: Callable, tiny_base: Path, entries: Path) -> None:
    report = json.loads(cli("evaluate", tiny_base, "--data", entries, "--limit", 3, "--no-generate", "--json").stdout)
    assert report["rows"] == 3
    assert report["systems"][0]["bleu"] is None
    assert report["comparisons"] == []


def test_evaluate_refuses_what_is_not_there(cli: Callable, tiny_base: Path, entries: Path, tmp_path: Path) -> None:
    assert "not a folder of entries" in one_line(cli("evaluate", tiny_base, "--data", tmp_path / "none"))
    assert "no split 'valid'" in one_line(cli("evaluate", tiny_base, "--data", entries, "--split", "valid"))
