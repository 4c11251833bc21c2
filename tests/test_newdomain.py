"""evaluation/newdomain.py: a domain joins, and what is told of it is what the two packs do."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import DOMAINS, make_entries, workshop
from conftest import WORDS
from training import RECIPE, same, weights

from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import Entries, load_entries
from lora_lexicon.domains.fit import describe_all, make_router, prompts_of
from lora_lexicon.domains.router import load_router
from lora_lexicon.domains.vectors import centred
from lora_lexicon.errors import DataError, LexiconError, RouterError
from lora_lexicon.evaluation.newdomain import Overlap, Told, Wanted, new_domain, overlaps
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.folders import sha256_of
from lora_lexicon.inference.engine import define, losses
from lora_lexicon.packs.pack import build_pack, verify_pack
from lora_lexicon.recipe import DomainsRecipe
from lora_lexicon.report import markdown
from lora_lexicon.report.document import load_document
from lora_lexicon.report.newdomain import document_of

SLANG = dataclasses.replace(RECIPE, epochs=4.0, checkpoints=8)


def rows_of(form: str, definition: str, words: list[str]) -> list[dict[str, str]]:
    split = {0: "test", 1: "valid"}
    return [
        {"term": word, "context": form.format(word), "definition": f"{definition} {word}", "source": "s",
         "split": split.get(i % 6, "train")}
        for i, word in enumerate(words)
    ]  # fmt: skip


def prepared(folder: Path, rows: list[dict[str, str]]) -> Entries:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare([str(folder / "rows.jsonl")], folder / "entries")
    return load_entries(folder / "entries")


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pack of three domains, entries of theirs, and those of a domain that is to join."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    build_pack(str(shop.base), shop.lora, shop.domains, shop.folder / "pack", include_base=True)
    shop.pack, shop.held = shop.folder / "pack", make_entries(shop.folder)
    shop.slang = prepared(shop.folder / "slang", rows_of("the {} ran on quickly", "a bright", WORDS))
    return shop


@pytest.fixture(scope="module")
def joined(shop: SimpleNamespace) -> SimpleNamespace:
    """The report of a domain that joined, and both packs, loaded."""
    wanted = Wanted("slang", SLANG, held_out=shop.held, out=shop.folder / "work" / "pack", routers=True)
    report = new_domain(shop.pack, shop.slang, shop.folder / "work", wanted)
    before, after = load_system(str(shop.pack)), load_system(str(wanted.out))
    return SimpleNamespace(report=report, pack=wanted.out, work=shop.folder / "work", before=before, after=after)


def loss(system: System, rows: Any, **options: Any) -> float:
    nll, tokens = losses(system, rows, **options)
    return float(nll.sum() / tokens.sum())


def test_other_experts_are_the_same_files(shop: SimpleNamespace, joined: SimpleNamespace) -> None:
    assert verify_pack(joined.pack).domains == (*DOMAINS, "slang")
    files = sorted(path.relative_to(shop.pack).as_posix() for path in (shop.pack / "adapters").rglob("*.*"))
    assert [file["file"] for file in joined.report["files"]] == files
    for file in joined.report["files"]:
        assert file["unchanged"]
        assert sha256_of(shop.pack / file["file"]) == sha256_of(joined.pack / file["file"]) == file["sha256"]
    assert verify_pack(shop.pack).domains == DOMAINS


def test_who_keeps_an_expert_says_the_same_to_the_bit(shop: SimpleNamespace, joined: SimpleNamespace) -> None:
    held, told = load_entries(shop.held).split("test"), joined.report["held_out"]
    first, second = (define(system, prompts_of(held)) for system in (joined.before, joined.after))
    moved = [a.term for a, b in zip(first, second, strict=True) if a.domain != b.domain]
    assert 0 < len(moved) < len(held), "the test tests nothing"
    assert sorted(row["term"] for row in told["moved"]) == sorted(moved)
    assert {row["to"] for row in told["moved"]} == {"slang"}
    assert [a.text for a in first if a.term not in moved] == [b.text for b in second if b.term not in moved]
    kept = len(held) - len(moved)
    assert (told["checked"], told["kept"], told["unchanged"], told["same_loss"]) == (len(held), kept, kept, kept)
    assert told["changed"] == []


def test_the_figures_are_those_of_the_two_packs(shop: SimpleNamespace, joined: SimpleNamespace) -> None:
    report, held, own = joined.report, load_entries(shop.held).split("test"), shop.slang.split("test")
    assert report["held_out"]["all"]["before"] == pytest.approx(loss(joined.before, held), abs=1e-9)
    assert report["held_out"]["all"]["after"] == pytest.approx(loss(joined.after, held), abs=1e-9)
    parts = report["held_out"]["domains"]
    assert sum(part["entries"] for part in parts) == len(held)
    assert sum(part["moved"] for part in parts) == len(report["held_out"]["moved"])
    for part in parts:
        rows = [row for row in held if joined.before.route(prompts_of([row])).name(0) == part["domain"]]
        assert part["entries"] == len(rows)
        assert part["after"] == pytest.approx(loss(joined.after, rows), abs=1e-5)
    one = np.eye(4, dtype=np.float32)
    former = {DOMAINS[n]: loss(joined.before, own, weights=one[[n] * len(own), :3]) for n in range(3)}
    wanted = {
        "base": loss(joined.before, own, weights=np.zeros((len(own), 3), dtype=np.float32)),
        "former pack": loss(joined.before, own),
        "former best expert": min(former.values()),
        "new expert alone": loss(joined.after, own, weights=one[[3] * len(own)]),
        "new pack": loss(joined.after, own),
    }
    assert report["own"]["losses"] == pytest.approx(wanted, abs=1e-9)
    assert former[report["own"]["former_best_expert"]] == min(former.values())
    for compared in report["own"]["comparisons"]:
        difference = wanted[compared["a"]] - wanted[compared["b"]]
        assert compared["difference"] == pytest.approx(difference, abs=1e-9)
    assert wanted["new expert alone"] < min(wanted["base"], *former.values()), "it learnt nothing"


def test_learned_routers_are_told_beside_the_packs_own(shop: SimpleNamespace, joined: SimpleNamespace) -> None:
    report, told, after = joined.report, joined.report["routers"], joined.after
    held, train = (load_entries(shop.held).split(split) for split in ("test", "train"))
    new, own = shop.slang.split("train"), shop.slang.split("test")
    kept = report["held_out"]["kept"] / report["held_out"]["checked"]
    old_rows, new_rows = told["old"]["routers"], told["new"]["routers"]
    wanted = (report["held_out"]["all"]["after"], report["own"]["losses"]["new pack"])
    for rows, loss_, right in zip((old_rows, new_rows), wanted, (kept, report["own"]["routed_to_it"]), strict=True):
        assert rows[0]["router"] == "centroid, the pack's own"
        assert (rows[0]["loss"], rows[0]["accuracy"]) == (pytest.approx(loss_, abs=1e-6), pytest.approx(right))
        assert rows[0]["difference"] is None
        assert rows[-1]["router"] == "oracle"
        assert rows[-1]["loss"] == min(row["loss"] for row in rows)
        assert len({row["router"] for row in rows}) == len(rows) == 6
    # The rest by hand: each prompt's domain is the one that the pack before sends it to, or the new one.
    names = after.router.names
    labels = np.array([*joined.before.route(prompts_of(train)).top, *[3] * len(new)], dtype=np.int32)
    vectors = after.embed(prompts_of([*train, *new]))
    mean = vectors.mean(axis=0)
    members = centred(vectors, mean)
    truth = joined.before.route(prompts_of(held)).top
    for method in ("projection", "linear"):
        recipe = DomainsRecipe(router=method)
        found = describe_all(members, labels)
        router = make_router(members, labels, found, [*train, *new], mean, after.embedder, recipe)
        for rows, entries, right in ((old_rows, held, truth), (new_rows, own, np.full(len(own), 3))):
            top = router.route(after.embed(prompts_of(entries))).top
            (row,) = [row for row in rows if row["router"] == f"{method}, learned again"]
            assert row["accuracy"] == pytest.approx((top == right).mean())
            weights = np.eye(len(names), dtype=np.float32)[top]
            assert row["loss"] == pytest.approx(loss(after, entries, weights=weights), abs=1e-6)
    assert told["learned_of"] == {"source": str(shop.held), "old": len(train), "new": len(new)}


def test_routers_cannot_learn_of_a_domain_without_prompts(shop: SimpleNamespace, twin: Entries, tmp_path: Path) -> None:
    wanted = Wanted("slang", SLANG, held_out=twin.path, out=tmp_path / "pack", routers=True)
    refused("goes to nature, craft", lambda: new_domain(shop.pack, shop.slang, tmp_path / "work", wanted), DataError)
    assert list(tmp_path.iterdir()) == []


def test_the_expert_is_the_one_that_train_makes(shop: SimpleNamespace, joined: SimpleNamespace, tmp_path: Path) -> None:
    from lora_lexicon.experts.train import Part, train_experts

    part = Part("slang", shop.slang.split("train"), tmp_path / "slang", "slang", shop.slang.split("valid"))
    train_experts(load_base(str(shop.base)), [part], SLANG)
    assert same(weights(tmp_path / "slang"), weights(joined.work / "experts" / "slang"))
    assert same(weights(tmp_path / "slang"), weights(joined.pack / "adapters" / "slang"))
    assert verify_pack(joined.work / "alone").domains == ("slang",)


def test_the_report_reads_without_its_tables_gaps(joined: SimpleNamespace) -> None:
    document = document_of(joined.report)
    own, held = joined.report["own"], joined.report["held_out"]
    titles = {table.title for table in document.tables()}
    assert {f"Of {held['checked']} prompts of the old domains", "Files of the other experts"} <= titles
    text = markdown.page(document)
    assert f"{own['entries']} held-out entries of slang (test)" in text
    assert all(f"{value:,.4f}" in text for value in own["losses"].values())
    assert f"{own['comparisons'][0]['difference']:+.4f}" in document.pictures()[0].alt
    json.dumps(joined.report)


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def test_a_run_that_was_killed_ends_as_the_unbroken_one(
    shop: SimpleNamespace, joined: SimpleNamespace, tmp_path: Path
) -> None:
    wanted = Wanted("slang", SLANG, held_out=shop.held, out=tmp_path / "work" / "pack", routers=True)

    def kill(step: Any) -> None:
        if step.step > 5:
            raise Killed

    def kill_late(report: dict[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        new_domain(shop.pack, shop.slang, tmp_path / "work", wanted, told=Told(training=kill))
    seen: list[int] = []
    told = Told(training=lambda step: seen.append(step.step))
    with pytest.raises(Killed):
        new_domain(shop.pack, shop.slang, tmp_path / "work", wanted, told=told, report=kill_late)
    assert seen[0] > 1, "it started afresh"
    assert not (tmp_path / "work" / "pack").exists()
    again = new_domain(shop.pack, shop.slang, tmp_path / "work", wanted, told=Told(training=kill))
    for name in verify_pack(joined.pack).files:
        if name != "README.md" and not name.endswith("expert.json"):  # which tell of seconds
            assert (tmp_path / "work" / "pack" / name).read_bytes() == (joined.pack / name).read_bytes(), name
    changing = ("pack", "training", "files")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in joined.report.items() if k not in changing
    }


@pytest.fixture(scope="module")
def twin(shop: SimpleNamespace) -> Entries:
    """More of a domain that is there: of the prompt that `mind` is made of."""
    return prepared(shop.folder / "twin", rows_of("a kind of {}", "some", ["sorrow"] * 3))


def test_a_domain_on_top_of_another_is_told(shop: SimpleNamespace, twin: Entries, tmp_path: Path) -> None:
    seen: list[Overlap] = []
    wanted = Wanted("grief", SLANG, held_out=shop.held, out=tmp_path / "pack")
    report = new_domain(shop.pack, twin, tmp_path / "work", wanted, told=Told(overlap=seen.extend))
    assert [overlap.domain for overlap in seen] == ["mind"]
    assert seen[0].similarity == pytest.approx(1, abs=1e-5)
    assert report["overlaps"] == [dataclasses.asdict(seen[0])]
    assert report["on_conflict"] == {"chosen": "keep", "did": "keep", "old": "mind", "now": "grief"}
    assert verify_pack(tmp_path / "pack").domains == (*DOMAINS, "grief")
    assert overlaps(load_router(shop.pack), "nature") == []


def test_it_takes_the_place_of_the_old_one(shop: SimpleNamespace, twin: Entries, tmp_path: Path) -> None:
    wanted = Wanted("grief", SLANG, held_out=shop.held, out=tmp_path / "pack", on_conflict="replace", routers=True)
    report = new_domain(shop.pack, twin, tmp_path / "work", wanted)
    assert verify_pack(tmp_path / "pack").domains == ("nature", "craft", "grief")
    assert not (tmp_path / "pack" / "adapters" / "mind").exists()
    assert {file["file"].split("/")[1] for file in report["files"]} == {"nature", "craft"}
    assert all(file["unchanged"] for file in report["files"])
    assert {row["from"] for row in report["held_out"]["moved"]} == {"mind"}
    assert report["held_out"]["unchanged"] == report["held_out"]["kept"] > 0
    own = report["routers"]["old"]["routers"][0]  # what was the old one's is the new one's: nothing is lost
    assert own["accuracy"] == 1


def test_or_is_merged_with_it(shop: SimpleNamespace, twin: Entries, tmp_path: Path) -> None:
    wanted = Wanted("grief", SLANG, held_out=shop.held, out=tmp_path / "pack", on_conflict="merge", routers=True)
    report = new_domain(shop.pack, twin, tmp_path / "work", wanted)
    assert verify_pack(tmp_path / "pack").domains == ("nature", "craft", "mind")
    assert report["on_conflict"]["now"] == "mind"
    assert report["on_conflict"]["weights"] == {"mind": 0.5, "grief": 0.5}, "the old one does not say its rows"
    parts = [
        load_adapter(path, "x") for path in (shop.pack / "adapters" / "mind", tmp_path / "work" / "experts" / "grief")
    ]
    merged = load_adapter(tmp_path / "pack" / "adapters" / "mind", "mind")
    for layer, factors in merged.factors.items():
        mean = sum(part.factors[layer].delta for part in parts) / 2
        assert torch.allclose(factors.delta, mean, atol=1e-5)
    after, own = load_system(str(tmp_path / "pack")), twin.split("test")
    alone = np.eye(3, dtype=np.float32)[[2] * len(own)]
    assert report["own"]["losses"]["merged expert alone"] == pytest.approx(loss(after, own, weights=alone), abs=1e-9)
    assert {row["to"] for row in report["held_out"]["moved"]} == {"mind"}, "its prompts have another adapter"


def refused(message: str, run: Callable[[], Any], kind: type[LexiconError] = LexiconError) -> None:
    with pytest.raises(kind, match=message) as refusal:
        run()
    assert "\n" not in str(refusal.value)


def test_names_that_cannot_be(shop: SimpleNamespace, tmp_path: Path) -> None:
    for name, message in (("Mind", "already"), ("base", "command line"), ("a/b", "cannot name")):
        wanted = Wanted(name, SLANG, held_out=shop.held, out=tmp_path / "pack")
        refused(message, lambda w=wanted: new_domain(shop.pack, shop.slang, tmp_path / "work", w), RouterError)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(shop: SimpleNamespace, tmp_path: Path, cli) -> None:
    pack = Path(shutil.copytree(shop.pack, tmp_path / "pack"))
    raw = tmp_path / "slang.jsonl"
    rows = rows_of("the {} ran on quickly", "a bright", [word + ending for word in WORDS for ending in ("", "s", "y")])
    raw.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "split"}) for row in rows))
    few = ("--held-out", shop.held, "--routers", "--limit", 6, "--rank", 2, "--epochs", 0.5)
    shaped = ("--set", "first_layer=1", "--recipe", "tiny/lora")
    command = ("domains", "new", raw, "--into", pack, *few, *shaped)
    done = cli(*command, "--json")
    assert done.exit_code == 0, done.output
    report, work = json.loads(done.stdout), tmp_path / "pack.slang"
    assert report["domain"] == "slang", "the name of the data"
    assert verify_pack(pack).domains == (*DOMAINS, "slang")
    assert json.loads((work / "report.json").read_text()) == {k: v for k, v in report.items() if k != "out"}
    assert "slang joins" in (work / "report.md").read_text()
    assert (work / "pictures" / "differences.png").stat().st_size > 1000
    assert load_document(work).title == "slang joins pack"
    assert "| projection, learned again | " in (work / "report.md").read_text()
    assert report["training"]["recipe"]["rank"] == 2
    assert max(f.rank for f in load_adapter(work / "experts" / "slang", "slang").factors.values()) == 2
    again = cli(*command)
    assert (again.exit_code, again.stderr.strip().splitlines()[-1].count("already")) == (1, 1)
    out = cli(
        "domains", "new", shop.slang.path, "--into", shop.pack, "--name", "s", *few, *shaped, "--out", tmp_path / "o"
    )
    assert out.exit_code == 0, out.output
    assert "to the bit" in out.stdout
    assert verify_pack(tmp_path / "o" / "pack").domains == (*DOMAINS, "s")
    for options, message in (
        (("--into", "tiny"), "add --out"),
        (("--into", shop.pack, "--out", tmp_path / "o"), "another domain"),
        (("--into", shop.pack, "--out", shop.folder), "did not make it"),
        (("--into", shop.pack, "--out", tmp_path / "z", "--on-conflict", "ask"), "keep"),
    ):
        wrong = cli("domains", "new", raw, *few, *shaped, *options)
        assert wrong.exit_code != 0
        assert message in wrong.output
    assert not (tmp_path / "z").exists()
