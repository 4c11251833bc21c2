"""compose/grow.py and compose/places.py: the MoE before, dense experts and transformers are the oracles."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composing import DOMAINS, PROMPTS, dense_model, ids_of, make_entries, make_ffn, make_lora, make_router, workshop
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lora_lexicon.compose.collapse import collapse
from lora_lexicon.compose.export import export_mixtral
from lora_lexicon.compose.grow import Joining, join_moe, leave_moe
from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.system import load_system
from lora_lexicon.compose.tune import train_router
from lora_lexicon.errors import LexiconError
from lora_lexicon.folders import sha256_of
from lora_lexicon.inference.engine import define
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.recipe import RouterRecipe

NEW = "engines"
KERNELS = {"eager": 0, "grouped_mm": 1e-5, "batched_mm": 1e-5}  # how near each is to the dense expert
MEMBERS = [PROMPTS[3], ("engine", "an engine"), ("metal", "the metal engine")]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    made = workshop(tiny_base, tmp_path_factory.mktemp("shop"))
    made.new = make_ffn(tiny_base, made.folder / "more" / NEW, seed=9)
    made.new_lora = make_lora(tiny_base, made.folder / "more-lora" / NEW, seed=9)
    return made


def _moe(shop: SimpleNamespace, out: Path, **settings) -> Path:
    compose_moe(str(shop.base), shop.ffn, shop.domains, out, **settings)
    return out


def _one_hot(place: int, rows: int, count: int) -> torch.Tensor:
    weights = torch.zeros(rows, count)
    weights[:, place] = 1
    return weights


@torch.inference_mode()
def _logits(folder: Path, ids: torch.Tensor, place: int | None, count: int, kernel: str = "eager") -> torch.Tensor:
    """By AutoModelForCausalLM; `place` None is the kept base."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=kernel, dtype=torch.float32).eval()
    weights = torch.zeros(len(ids), count) if place is None else _one_hot(place, len(ids), count)
    with model.active.using(weights):
        return model(ids).logits


def _inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


@pytest.mark.parametrize(("shard", "keep_base"), [(40_000, False), (10**9, True)], ids=["shards", "one file"])
def test_old_experts_keep_every_bit_and_the_new_one_is_itself(
    shop: SimpleNamespace, tmp_path: Path, shard: int, keep_base: bool
) -> None:
    moe, ids = _moe(shop, tmp_path / "moe", max_shard_bytes=shard, keep_base=keep_base, verify=False), ids_of(shop.base)
    runs = [(kernel, place) for kernel in KERNELS for place in (*range(3), *([None] if keep_base else []))]
    before = [_logits(moe, ids, place, 3, kernel) for kernel, place in runs]
    shards, inodes = {f: h for f, h in _hashes(moe).items() if f.startswith("model")}, _inodes(moe)
    report = join_moe(moe, shop.new, Joining(MEMBERS))
    for (kernel, place), logits in zip(runs, before, strict=True):
        assert torch.equal(_logits(moe, ids, place, 4, kernel), logits)
    alone = dense_model(shop.base, shop.new)(ids).logits.detach()
    for kernel, tolerance in KERNELS.items():
        assert (_logits(moe, ids, 3, 4, kernel) - alone).abs().max() <= tolerance
    after, renamed = _hashes(moe), {"model.safetensors": "model-00001-of-00001.safetensors"}
    kept = {file: value for file, value in shards.items() if file.endswith(".safetensors")}
    assert report["kept"] == [{"file": renamed.get(f, f), "before": kept[f], "after": kept[f]} for f in sorted(kept)]
    for file, value in kept.items():
        name = renamed.get(file, file)
        assert (after[name], _inodes(moe)[name]) == (value, inodes[file])  # the same file, not a copy of it
    assert {each["file"]: each["sha256"] for each in report["added"]} == {
        file: value for file, value in after.items() if file.endswith(".safetensors") and "expert" in file
    }
    assert report["verified"]["differences"] == {NEW: 0.0}


@torch.inference_mode()
def test_prompts_that_keep_their_expert_are_answered_as_before(shop: SimpleNamespace, tmp_path: Path) -> None:
    moe = _moe(shop, tmp_path / "moe")
    prompts = [*PROMPTS, *[(word, f"one {word}") for word in ("river", "cloud", "voice", "paper", "winter", "garden")]]
    old = load_system(str(moe))
    wanted, first = old.route(prompts), []
    for i, prompt in enumerate(prompts):
        with old.routed(torch.from_numpy(wanted.weights[i : i + 1])):
            first.append(old.model(torch.tensor([old.encoder.prompt(*prompt)])).logits)
    join_moe(moe, shop.new, Joining(MEMBERS))
    new = load_system(str(moe))
    assert new.experts == (*DOMAINS, NEW)
    routing = new.route(prompts)
    kept = 0
    for i, prompt in enumerate(prompts):
        if (routing.weights[i, :3] == wanted.weights[i]).all():
            kept += 1
            with new.routed(torch.from_numpy(routing.weights[i : i + 1])):
                logits = new.model(torch.tensor([new.encoder.prompt(*prompt)])).logits
            assert torch.equal(logits, first[i])
    assert 3 <= kept < len(prompts)  # the new domain's own prompt moves
    assert routing.name(3) == NEW


@pytest.mark.parametrize("keep_base", [False, True])
def test_which_prompts_change_hands_is_told(shop: SimpleNamespace, tmp_path: Path, keep_base: bool) -> None:
    moe, seen = _moe(shop, tmp_path / "moe", keep_base=keep_base), []
    check = [*PROMPTS, *[(word, f"one {word}") for word in ("river", "cloud", "voice", "paper", "winter", "garden")]]
    old = load_system(str(moe))
    was, first = old.route(check), define(old, check, Decoding(max_new_tokens=24))
    report = join_moe(moe, shop.new, Joining(MEMBERS), check=check, checking=lambda *done: seen.append(done))["prompts"]
    new = load_system(str(moe))
    now, second = new.route(check), define(new, check, Decoding(max_new_tokens=24))
    moved = [i for i in range(len(check)) if was.name(i) != now.name(i)]
    assert 0 < len(moved) < len(check), "the test tests nothing"
    assert [(row["term"], row["from"], row["to"], row["before"], row["after"]) for row in report["moved"]] == [
        (check[i][0], was.name(i), NEW, first[i].text, second[i].text) for i in moved
    ]
    kept = len(check) - len(moved)
    assert (report["checked"], report["kept"], report["unchanged"], report["changed"]) == (len(check), kept, kept, [])
    assert sum(more for more, _ in seen) == seen[-1][1] == 2 * len(check)
    assert join_moe(_moe(shop, tmp_path / "more"), shop.new, Joining(MEMBERS))["prompts"] is None


def test_a_fresh_process_loads_it_without_a_word_of_missing_or_unexpected(
    shop: SimpleNamespace, tmp_path: Path
) -> None:
    moe = _moe(shop, tmp_path / "moe", max_shard_bytes=40_000)
    join_moe(moe, shop.new, Joining(MEMBERS))
    script = (
        "import sys, torch, lora_lexicon.compose.moe\n"
        "from transformers import AutoModelForCausalLM\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "ids = torch.tensor([[int(i) for i in sys.argv[2].split()]])\n"
        "print(model.route_ids(ids)[0].argmax().item(), model.experts[-1])\n"
    )
    ids = load_system(str(moe)).encoder.prompt(*PROMPTS[3])
    command = [sys.executable, "-c", script, str(moe), " ".join(map(str, ids))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", NEW]


@pytest.mark.parametrize("keep_base", [False, True])
def test_experts_come_and_go_in_any_order(shop: SimpleNamespace, tmp_path: Path, keep_base: bool) -> None:
    """Two join, one of the first and one of the others leaves, one joins again: each is itself wherever it lies."""
    ids, moe = ids_of(shop.base), _moe(shop, tmp_path / "moe", keep_base=keep_base)
    other = make_ffn(shop.base, tmp_path / "others", seed=11)
    alone = {
        folder.name: dense_model(shop.base, folder)(ids).logits.detach() for folder in (*shop.ffn, shop.new, other)
    }
    alone["base"] = dense_model(shop.base)(ids).logits.detach()
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(shop.base), str(shop.new_lora))

    def check(names: list[str]) -> None:
        system = load_system(str(moe))
        assert list(system.experts) == names
        for place, name in enumerate([*names, *(["base"] if keep_base else [])]):
            at = None if name == "base" else place
            assert torch.equal(_logits(moe, ids, at, len(names)), alone[name]), name
        shutil.rmtree(tmp_path / "dense", ignore_errors=True)
        collapse(moe, tmp_path / "dense", expert=names[-1])
        assert torch.equal(dense_model(tmp_path / "dense")(ids).logits, alone[names[-1]])

    join_moe(moe, shop.new, Joining(MEMBERS))
    join_moe(moe, other, Joining([("metal", "")]))
    check([*DOMAINS, NEW, "others"])
    assert leave_moe(moe, "craft")["removed"] == []
    check(["nature", "mind", NEW, "others"])
    assert leave_moe(moe, NEW)["removed"] == [
        "model-expert-00003.safetensors" if not keep_base else "model-expert-00004.safetensors"
    ]
    check(["nature", "mind", "others"])
    join_moe(moe, shop.new_lora, Joining(MEMBERS))
    alone[NEW] = merged.merge_and_unload().eval()(ids).logits.detach()
    assert (_logits(moe, ids, 3, 4) - alone[NEW]).abs().max() <= 1e-5
    card, record = (moe / "README.md").read_text(), json.loads((moe / "moe.json").read_text())
    assert [each["name"] for each in record["experts"]] == ["nature", "mind", "others", NEW]
    assert "craft" not in card
    assert all(name in record["verified"]["differences"] for name in ("nature", "mind", "others", NEW))


def test_what_is_made_of_it_holds_all_experts(shop: SimpleNamespace, tmp_path: Path) -> None:
    """Saved by transformers, exported, and with a trained router: each in one fused tensor again."""
    ids, moe, entries = ids_of(shop.base), _moe(shop, tmp_path / "moe"), make_entries(tmp_path)
    join_moe(moe, shop.new, Joining(MEMBERS))
    leave_moe(moe, "craft")
    wanted = [_logits(moe, ids, place, 3) for place in range(3)]
    AutoModelForCausalLM.from_pretrained(moe).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(moe).save_pretrained(tmp_path / "again")
    recipe = RouterRecipe(train="experts", max_steps=1, learning_rate=1e-30)  # too little to change a bit
    train_router(moe, entries, tmp_path / "tuned", recipe, routing="token-top-2")
    for place, logits in enumerate(wanted):
        assert torch.equal(_logits(tmp_path / "again", ids, place, 3), logits)
        assert torch.equal(_logits(tmp_path / "tuned", ids, place, 3), logits)
    export_mixtral(moe, tmp_path / "mixtral", data=entries)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").config.num_local_experts == 3


def test_the_row_of_the_router_may_come_from_another_router(shop: SimpleNamespace, tmp_path: Path) -> None:
    moe = _moe(shop, tmp_path / "moe")
    make_router(shop.base, tmp_path / "domains", names=(*DOMAINS, NEW))
    join_moe(moe, shop.new, Joining(router=tmp_path / "domains"), out=tmp_path / "wider")
    assert load_system(str(moe)).experts == DOMAINS
    assert load_system(str(tmp_path / "wider")).route([PROMPTS[3]]).name(0) == NEW
    assert {f: h for f, h in _hashes(moe).items() if f == "model.safetensors"}["model.safetensors"] == _hashes(
        tmp_path / "wider"
    )["model-00001-of-00001.safetensors"]


def test_what_does_not_fit_is_refused_and_changes_nothing(shop: SimpleNamespace, tmp_path: Path) -> None:
    moe, entries = _moe(shop, tmp_path / "moe"), make_entries(tmp_path)
    gated = _moe(shop, tmp_path / "gated", routing="token-top-2", data=entries)
    make_router(shop.base, tmp_path / "deep", names=(*DOMAINS, NEW), layers=2)
    attention = make_lora(shop.base, tmp_path / "attention" / NEW, seed=1, attention=True)
    taken = make_ffn(shop.base, tmp_path / "taken" / "Craft", seed=1)
    kept = make_ffn(shop.base, tmp_path / "kept" / "base", seed=1)
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(shop.base)
    model.model.norm.weight.data.add_(1)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(shop.base).save_pretrained(other)
    bare, averaged = (Path(shutil.copytree(moe, tmp_path / name)) for name in ("bare", "averaged"))
    (bare / "moe.json").unlink()
    record = json.loads((averaged / "moe.json").read_text())
    (averaged / "moe.json").write_text(json.dumps({**record, "averaged": ["model.norm.weight"]}))
    places = Path(shutil.copytree(moe, tmp_path / "places"))
    config = json.loads((places / "config.json").read_text())
    (places / "config.json").write_text(json.dumps({**config, "fused_experts": 3, "expert_slots": [0, 1, 1]}))
    new = Joining(MEMBERS)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("holds gates", lambda: join_moe(gated, shop.new, new)),
        ("holds gates", lambda: leave_moe(gated, "craft")),
        ("an average over the experts", lambda: join_moe(averaged, shop.new, new)),
        ("has an expert 'Craft' already", lambda: join_moe(moe, taken, new)),
        ("has an expert 'base' already", lambda: join_moe(moe, kept, new)),
        ("self_attn.q_proj.weight, and", lambda: join_moe(moe, attention, new)),
        ("was made of base", lambda: join_moe(moe, shop.new, new, base=str(other))),
        ("moe.json is missing", lambda: join_moe(bare, shop.new, new)),
        ("no prompts", lambda: join_moe(moe, shop.new, Joining([]))),
        ("has no domain 'engines'", lambda: join_moe(moe, shop.new, Joining(router=shop.domains))),
        ("other settings than", lambda: join_moe(moe, shop.new, Joining(router=tmp_path / "deep"))),
        ("no expert 'engines'", lambda: leave_moe(moe, NEW)),
        ("expert_slots \\[0, 1, 1\\]", lambda: load_system(str(places))),
    ]
    before = _hashes(moe)
    for words, call in cases:
        with pytest.raises(LexiconError, match=words) as refusal:
            call()
        assert "\n" not in str(refusal.value)
        assert not list(tmp_path.glob(".*"))
    assert _hashes(moe) == before


KILL = """
import os, shutil, signal, sys
from pathlib import Path
import lora_lexicon.compose.grow as grow
first, expert, domains, out = map(Path, sys.argv[1:])

def killed(at):
    # Whether a process that joins dies before its step `at` on the disk: opening to write, linking, renaming, removing.
    moe, steps = Path(shutil.copytree(first, out / str(at) / "moe")), 0
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    def counted(event, arguments):
        nonlocal steps
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.link", "os.rename", "os.remove", "os.rmdir", "ctypes.call_function"):
            steps += 1
            if steps == at: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(counted)
    grow.join_moe(moe, expert, grow.Joining(router=domains), verify=False)
    os._exit(0)

at = 1
while killed(at):
    at += 1
"""


def test_killed_at_any_step_it_is_the_old_moe_or_the_new_one(shop: SimpleNamespace, tmp_path: Path) -> None:
    first = _moe(shop, tmp_path / "first", max_shard_bytes=80_000, verify=False)
    make_router(shop.base, tmp_path / "domains", names=(*DOMAINS, NEW))
    whole, new = Path(shutil.copytree(first, tmp_path / "whole" / "moe")), Joining(router=tmp_path / "domains")
    join_moe(whole, shop.new, new, verify=False)
    wanted, found = {3: _hashes(first), 4: _hashes(whole)}, []
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", KILL, first, shop.new, tmp_path / "domains", tmp_path / "killed"]
    subprocess.run(list(map(str, command)), check=True)
    for step in sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name)):
        experts = len(json.loads((step / "moe" / "config.json").read_text())["expert_names"])
        assert _hashes(step / "moe") == wanted[experts], step.name
        found.append(experts)
    assert found == sorted(found)
    assert len(found) > 20
    assert (found[0], found[-2:]) == (3, [4, 4])  # the last but one was killed too, while it cleared up
    join_moe(
        tmp_path / "killed" / "9" / "moe", shop.new, new, verify=False
    )  # clears up what that run left, and does it
    assert [path.name for path in (tmp_path / "killed" / "9").iterdir()] == ["moe"]


def test_the_command_line(cli, shop: SimpleNamespace, tmp_path: Path) -> None:
    moe, entries = _moe(shop, tmp_path / "moe"), make_entries(tmp_path)
    done = cli("compose", "add", moe, shop.new, "--data", entries, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["domains"] == [*DOMAINS, NEW]
    assert all(each["before"] == each["after"] for each in report["kept"])
    assert cli("compose", "add", moe, shop.new).exit_code == 2
    again = cli("compose", "add", moe, shop.new, "--data", entries)
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "model-expert-00003" in cli("compose", "remove", moe, NEW).stderr
    shown = cli("compose", "add", moe, shop.new, "--data", entries, "--out", tmp_path / "wider")
    assert "model-expert-00003.safetensors" in shown.stdout
    assert "change hands" not in shown.stdout
    leave = cli("compose", "remove", tmp_path / "wider", NEW)
    assert leave.exit_code == 0, leave.output
    few = ("--check", entries, "--split", "test", "--limit", 5)
    shown = cli("compose", "add", tmp_path / "wider", shop.new, "--data", entries, *few)
    assert shown.exit_code == 0, shown.output
    assert "of 5 prompts" in shown.stdout
    assert "unchanged to the bit" in shown.stdout
    assert load_system(str(tmp_path / "wider")).experts == (*DOMAINS, NEW)
