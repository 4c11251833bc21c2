"""evaluation/suggest.py: packs are ranked by what each does alone, and the base is loaded once."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from composing import DOMAINS, make_entries, make_lora, make_router, scaled_base, workshop

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import headword
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import PackError
from lora_lexicon.evaluation import suggest as module
from lora_lexicon.evaluation.bootstrap import paired_bootstrap
from lora_lexicon.evaluation.suggest import suggest
from lora_lexicon.experts.base import load_base
from lora_lexicon.inference.engine import losses
from lora_lexicon.packs.listing import find_packs
from lora_lexicon.packs.pack import build_pack, copy_pack


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two packs of one base, one of another, a damaged one, and one that is still being written."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.packs = shop.folder / "packs"
    build_pack(str(shop.base), shop.lora, shop.domains, shop.packs / "three", include_base=True)
    make_router(shop.base, shop.folder / "two-domains", names=DOMAINS[:2], abstain_quantile=1.0)
    build_pack(str(shop.base), shop.lora[1::-1], shop.folder / "two-domains", shop.packs / "deep" / "two")
    other = scaled_base(tiny_base, shop.folder / "other")
    make_router(other, shop.folder / "other-domains", names=DOMAINS[:2])
    lora = [make_lora(other, shop.folder / "other-lora" / name, seed=i) for i, name in enumerate(DOMAINS[:2])]
    build_pack(str(other), lora, shop.folder / "other-domains", shop.packs / "one")
    broken = Path(shutil.copytree(shop.packs / "one", shop.packs / "broken"))
    (broken / "router.json").write_text("{}")
    shutil.copytree(broken, shop.packs / ".one.12345678.partial")
    shop.entries = make_entries(shop.folder)
    shop.rows = load_entries(shop.entries).split("test")
    return shop


def test_packs_are_found_at_any_depth_and_once(shop: SimpleNamespace) -> None:
    found = find_packs([shop.packs, shop.packs / "deep", shop.packs / "three"], deep=True)
    assert [path.relative_to(shop.packs).as_posix() for path in found] == ["broken", "deep/two", "one", "three"]
    assert [path.name for path in find_packs([shop.packs])] == ["broken", "one", "three"]


def test_each_pack_is_told_as_it_is_alone(shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def counted(name: str, **options: str):
        loaded.append(name)
        return load_base(name, **options)

    monkeypatch.setattr(module, "load_base", counted)
    seen: list[tuple[int, int]] = []
    report = suggest(find_packs([shop.packs], deep=True), shop.rows, progress=lambda *done: seen.append(done))
    assert len(loaded) == 2, "a base was loaded twice"
    assert seen[-1] == (4, 4)
    assert (report["entries"], report["unit"]) == (len(shop.rows), "token")
    assert [row["loss"] for row in report["packs"]] == sorted(row["loss"] for row in report["packs"])
    assert {row["pack"] for row in report["packs"]} == {"three", "two", "one"}
    (left,) = report["broken"]
    assert left["path"].endswith("broken")
    assert "router.json" in left["why"]
    nll = {}
    for row in report["packs"]:
        system = load_system(row["path"])
        nll[row["pack"]], tokens = losses(system, shop.rows)
        count = len(system.experts)
        alone = {
            name: float(
                losses(system, shop.rows, weights=np.eye(count, dtype=np.float32)[[n] * len(shop.rows)])[0].sum()
            )
            for n, name in enumerate(system.experts)
        }
        bare = losses(system, shop.rows, weights=np.zeros((len(shop.rows), count), dtype=np.float32))[0]
        assert row["loss"] == pytest.approx(float(nll[row["pack"]].sum() / tokens.sum()), abs=1e-9)
        assert row["best_expert_loss"] == pytest.approx(min(alone.values()) / tokens.sum(), abs=1e-9)
        assert alone[row["best_expert"]] == min(alone.values())
        assert row["base_loss"] == pytest.approx(float(bare.sum() / tokens.sum()), abs=1e-9)
        assert row["domains"] == list(system.experts)
        routing = system.route([(entry.term, entry.context) for entry in shop.rows])
        assert routing is not None
        assert row["abstains"] == pytest.approx((routing.top == -1).mean())
        assert (row["pack"] == "two") == (row["abstains"] > 0)
    first, second, last = report["packs"]
    groups = [headword(entry.term) for entry in shop.rows]
    wanted = paired_bootstrap(nll[first["pack"]], nll[second["pack"]], weights=tokens, groups=groups)
    assert first["next"] == vars(wanted)
    assert last["next"] is None


def test_equal_packs_are_one_row_that_says_where_all_lie(
    shop: SimpleNamespace, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_LEXICON_CACHE", str(tmp_path / "cache"))
    places = [tmp_path / name for name in ("a", "b.lexpack", "c")]
    for place in places:
        copy_pack(shop.packs / "three", place)
    (places[2] / "adapters" / "mind" / "adapter_config.json").write_text("{}")  # which is no equal any more
    report = suggest([shop.packs / "three", *places], shop.rows[:5])
    (row,) = report["packs"]
    assert (row["path"], row["also"]) == (str(shop.packs / "three"), [str(place) for place in places[:2]])
    assert row["next"] is None
    (left,) = report["broken"]
    assert (left["path"], "adapter_config.json" in left["why"]) == (str(places[2]), True)
    done = cli("pack", "suggest", shop.entries, "--from", tmp_path, "--limit", 5)
    assert done.exit_code == 0, done.output
    assert f"three: {places[0]} and {places[1]}" in done.stderr


def test_only_packs_of_the_folders_that_are_given(shop: SimpleNamespace, tmp_path: Path, cli, monkeypatch) -> None:
    copy_pack(shop.packs / "three", tmp_path / "shipped" / "three")
    monkeypatch.setattr("lora_lexicon.resources.packs", lambda: {"three": tmp_path / "shipped" / "three"})
    deep, few = ("--from", shop.packs / "deep"), ("--limit", 2, "--base", shop.base, "--json")
    for options, wanted in (((), ["three"]), (deep, ["two"]), ((*deep, "--shipped"), ["three", "two"])):
        done = cli("pack", "suggest", shop.entries, *options, *few)
        assert done.exit_code == 0, done.output
        assert sorted(row["pack"] for row in json.loads(done.stdout)["packs"]) == wanted


def test_losses_of_other_tokenizers_are_told_by_the_character(shop: SimpleNamespace) -> None:
    fits = [
        module.Fit(name, name, "b", np.array([6.0, 4.0]) * factor, np.array(tokens), {"x": 12.0}, 15.0, 0.0)
        for name, factor, tokens in (("a", 2, [3, 2]), ("b", 1, [9, 9]))
    ]
    report = module._ranked(fits, shop.rows[:2], 42)
    characters = sum(len(row.definition) for row in shop.rows[:2])
    assert report["unit"] == "character"
    assert [(row["pack"], row["loss"]) for row in report["packs"]] == [("b", 10 / characters), ("a", 20 / characters)]


def test_a_loaded_base_is_for_its_own_packs_alone(shop: SimpleNamespace) -> None:
    base = load_base(str(shop.base))
    with pytest.raises(PackError, match="give that base"):
        load_system(str(shop.packs / "one"), loaded=base)
    with pytest.raises(PackError, match="no pack"):
        load_system(str(shop.base), loaded=base)


def test_the_command_line(shop: SimpleNamespace, tmp_path: Path, cli) -> None:
    options = ("--from", shop.packs, "--limit", 5)
    done = cli("pack", "suggest", shop.entries, *options, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == suggest(find_packs([shop.packs], deep=True), shop.rows[:5])
    raw = tmp_path / "mine.csv"
    raw.write_text("term,definition\n" + "".join(f"{row.term},{row.definition}\n" for row in shop.rows))
    done = cli("pack", "suggest", raw, *options)
    assert done.exit_code == 0, done.output
    assert "left out" in done.stderr
    assert "three" in done.stdout
    for folder, message in ((tmp_path, "no pack"), (tmp_path / "none", "no folder")):
        wrong = cli("pack", "suggest", raw, "--from", folder)
        assert (wrong.exit_code, message in wrong.stderr) == (1, True)
