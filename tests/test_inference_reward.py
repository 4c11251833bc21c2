"""The outcome reward model: equation 3, what is trained on, what lies on the disk, and what a stopped run comes to."""

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
from composing import workshop
from conftest import WORDS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import ExpertError, LexiconError, RecipeError
from lora_lexicon.inference import pairs
from lora_lexicon.inference.pairs import pairs_of, sample_pairs
from lora_lexicon.inference.preferences import collate_pairs, train_reward
from lora_lexicon.inference.rerank import best_of
from lora_lexicon.inference.reward import Scorer, load_reward, preference_loss
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import build_pack
from lora_lexicon.recipe import RewardRecipe

# The random base knows no words, so that a gold definition is easily told from what it samples.
RECIPE = RewardRecipe(
    samples=4, keep=2, epochs=3, batch_size=4, learning_rate=0.02, rank=4, dropout=0.1, checkpoints=3, max_length=64
)
JUDGED = [
    ("apple", "", "a kind of apple"),
    ("river", "the river is here", "stone"),
    ("stone", "", ""),
    ("run", "", "x"),
]


@pytest.fixture(scope="module", autouse=True)
def short() -> Any:
    """Samples of few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "Decoding", lambda *a, **k: Decoding(*a, **k, max_new_tokens=6))
        patch.setattr(pairs, "PROMPTS_AT_ONCE", 8)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "term": w,
            "context": c,
            "definition": f"a kind of {v}",
            "source": "t",
            "split": "valid" if i > 15 else "train",
        }
        for i, (w, v) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
        for c in ("", f"the {w} is here")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(folder / "rows.jsonl")], folder / "entries", keep_without_context=True)
    return folder / "entries"


@pytest.fixture(scope="module")
def trained(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "reward"
    train_reward(str(tiny_base), data, out, RECIPE)
    return out


def test_equation_3_and_its_gradients_are_those_of_plain_torch(tiny_base: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(tiny_base).eval().requires_grad_(False)
    scorer = Scorer(llama, torch.randn(32, generator=torch.Generator().manual_seed(1)))
    rows: Any = [
        {"input_ids": [1, 5, 9, 2], "sampled": [[1, 5, 2], [1, 5, 8, 8, 8, 2]]},
        {"input_ids": [1, 7, 2], "sampled": [[1, 7, 11, 2]]},
    ]
    batch = collate_pairs(rows, pad=0)
    loss = preference_loss(scorer(batch["input_ids"], batch["last"]), batch["gold"], batch["sampled"])
    loss.backward()

    head = scorer.head.detach().clone().requires_grad_(True)

    def reward(ids: list[int]) -> torch.Tensor:
        return llama.model(torch.tensor([ids])).last_hidden_state[0, -1] @ head

    both = [(row["input_ids"], other) for row in rows for other in row["sampled"]]
    expected = torch.stack([-torch.log(torch.sigmoid(reward(better) - reward(worse))) for better, worse in both]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(scorer.head.grad, head.grad)


def test_no_preference_is_worth_log_2_and_a_certain_one_nothing() -> None:
    gold, sampled = pairs_of([2, 0, 1])
    assert (gold.tolist(), sampled.tolist()) == ([0, 0, 4], [1, 2, 5])
    assert float(preference_loss(torch.zeros(6), gold, sampled)) == pytest.approx(np.log(2))
    rewards = torch.tensor([99.0, 0, 0, 0, 99, 0])
    assert float(preference_loss(rewards, gold, sampled)) == pytest.approx(0, abs=1e-9)
    assert float(preference_loss(-rewards, gold, sampled)) == pytest.approx(99), "no overflow"


def test_pairs_are_the_likeliest_that_differ(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    system, entries = load_system(str(tiny_base)), load_entries(data).split("train")[:10]
    all_of = sample_pairs(system, entries, dataclasses.replace(RECIPE, keep=4), tmp_path / "all.jsonl")
    few = sample_pairs(system, entries, RECIPE, tmp_path / "few.jsonl")
    prompts = [(e.term, e.context) for e in entries]
    sampled = best_of(system, prompts, Decoding("sample", max_new_tokens=6), 4, "mbr")
    for wide, narrow, definition in zip(all_of, few, sampled, strict=True):
        assert narrow.sampled == wide.sampled[:2]
        assert set(wide.sampled) == {c.text for c in definition.candidates if c.text}
    gold = [dataclasses.replace(entry, definition=pair.sampled[0]) for entry, pair in zip(entries, few, strict=True)]
    for pair, wide in zip(sample_pairs(system, gold, RECIPE, tmp_path / "gold.jsonl"), all_of, strict=True):
        assert pair.sampled == wide.sampled[1:3], "what equals the gold definition is no counterexample"


def test_what_is_easily_told_apart_is_learned(trained: Path) -> None:
    record = json.loads((trained / "reward.json").read_text())
    assert record["valid"]["accuracy"] > 0.9
    assert record["valid"]["loss"] < np.log(2) / 2
    assert record["losses"][-1][1] < record["losses"][0][1]
    assert record["train"]["pairs"] > record["train"]["prompts"] > 20
    assert sorted(path.name for path in trained.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "reward.json",
    ]  # fmt: skip
    assert [path.name for path in trained.parent.iterdir()] == ["reward"]


def test_recomputation_sixteen_bits_and_accumulation_train_alike(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    def loss(**changes: Any) -> Any:
        recipe = dataclasses.replace(RECIPE, dropout=0.0, learning_rate=0.005, **changes)
        record = train_reward(str(tiny_base), data, tmp_path / str(len(list(tmp_path.iterdir()))), recipe)
        return record["losses"][0][1], record["valid"]["loss"]

    plain = loss()
    assert loss(gradient_checkpointing=True) == pytest.approx(plain, rel=1e-4)
    assert loss(dtype="bfloat16", gradient_checkpointing=True) == pytest.approx(plain, abs=0.1)
    first, _ = loss(max_steps=1, batch_size=2, gradient_accumulation=3)
    assert first == pytest.approx(np.log(2), rel=1e-3), "the mean over a step's pairs, while all rewards are 0"


def test_a_reward_is_that_of_plain_peft(trained: Path, tiny_base: Path) -> None:
    reward = load_reward(trained)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base), str(trained)).eval()
    head = load_file(trained / "head.safetensors")["head.weight"]
    for one, found in zip(JUDGED, reward.rate(JUDGED), strict=True):
        ids = torch.tensor([reward.encoder.row(*one).ids])
        with torch.no_grad():
            states = model.get_base_model().model(ids).last_hidden_state
        assert found == pytest.approx(float(states[0, -1] @ head[0]), abs=1e-4)


def test_what_is_loaded_again_says_the_same_and_leaves_the_base_as_it_was(trained: Path, tiny_base: Path) -> None:
    system = load_system(str(tiny_base))
    before = [type(module) for module in system.model.modules()]
    shared = load_reward(trained, system)
    assert shared.model is system.model
    assert shared.rate(JUDGED) == shared.rate(JUDGED) == load_reward(trained).rate(JUDGED)
    assert [type(module) for module in system.model.modules()] == before
    found = best_of(system, [one[:2] for one in JUDGED], Decoding("sample", max_new_tokens=6), 4, "reward",
                    rate=shared.of([one[:2] for one in JUDGED]))  # fmt: skip
    for one, own in zip(JUDGED, found, strict=True):
        assert own.score == pytest.approx(max(shared.rate([(*one[:2], c.text) for c in own.candidates])), abs=1e-4)


def test_a_pack_s_base_is_shared_and_its_experts_do_not_speak(trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    shop: SimpleNamespace = workshop(tiny_base, tmp_path, ffn=False)
    pack = tmp_path / "pack"
    build_pack(str(tiny_base), shop.lora, shop.domains, pack, name="pack")
    system = load_system(str(pack))
    shared = load_reward(trained, system)
    assert shared.model is system.model
    np.testing.assert_allclose(shared.rate(JUDGED), load_reward(trained).rate(JUDGED), atol=1e-5)


def test_another_base_and_damage_are_refused(trained: Path, six_layers: Path, tmp_path: Path) -> None:
    def spoilt(change: Callable[[Path], object]) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        change(shutil.copytree(trained, tmp_path / "copy"))
        return tmp_path / "copy"

    def retold(**changes: Any) -> Callable[[Path], object]:
        record = json.loads((trained / "reward.json").read_text())
        return lambda folder: (folder / "reward.json").write_text(json.dumps({**record, **changes}))

    head = "head.safetensors"
    cases: list[tuple[str, Callable[[Path], object]]] = [
        ("reward.json is missing", lambda folder: (folder / "reward.json").unlink()),
        ("base_fingerprint is 7", retold(base_fingerprint=7)),
        ("template is damaged", retold(template={})),
        ("lacks head", lambda folder: (folder / head).unlink()),
        ("is damaged", lambda folder: (folder / head).write_bytes(b"0" * 40)),
        ("must hold", lambda folder: save_file({"head.weight": torch.ones(2, 32)}, folder / head)),
        ("must hold", lambda folder: save_file({"head.weight": torch.full((1, 32), torch.nan)}, folder / head)),
        ("reads 31 numbers", lambda folder: save_file({"head.weight": torch.ones(1, 31)}, folder / head)),
    ]
    for said, change in cases:
        with pytest.raises(ExpertError, match=said) as caught:
            load_reward(spoilt(change))
        assert "\n" not in str(caught.value)
    for given in ({"base": str(six_layers)}, {"system": load_system(str(six_layers))}):
        with pytest.raises(ExpertError, match="was trained on base"):
            load_reward(trained, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["sampling", "training"])
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    trained: Path, tiny_base: Path, data: Path, tmp_path: Path, stage: str
) -> None:
    out, told = tmp_path / "reward", []

    def stop(at: str, done: int, total: int) -> None:
        if at == stage and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reward(str(tiny_base), data, out, RECIPE, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".reward.training"]
    sampled = tmp_path / ".reward.training" / "sampled.jsonl"
    if stage == "sampling":  # a line that was cut off is written again
        sampled.write_bytes(sampled.read_bytes() + b'["a rive')
    before = sampled.read_bytes().count(b"\n")
    with pytest.raises(RecipeError, match=r"seed 42 \(now 7\)"):
        train_reward(str(tiny_base), data, out, dataclasses.replace(RECIPE, seed=7))
    train_reward(str(tiny_base), data, out, RECIPE, progress=lambda *found: told.append(found))
    assert next(found for found in told if found[0] == "sampling")[1] == before > 10
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    assert train_reward(str(tiny_base), data, out, RECIPE, progress=pytest.fail)["key"], "it is there already"


def test_what_does_not_fit_is_refused_and_leaves_nothing(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("samples is 0", {"samples": 0}),
        ("at most samples, 4", {"keep": 5}),
        ("first_layer is 3", {"first_layer": 3}),
        ("rank is 100", {"rank": 100}),
        ("dropout is 1", {"dropout": 1.0}),
        ("alpha is 0", {"alpha": 0.0}),
        ("learning_rate", {"learning_rate": 0.0}),
        ("diverged", {"learning_rate": 3e38, "max_steps": 8}),
    ]
    for said, change in cases:
        with pytest.raises(LexiconError, match=said) as caught:
            train_reward(str(tiny_base), data, tmp_path / "out", dataclasses.replace(RECIPE, **change))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_the_command_line_trains_and_chooses_by_it(cli: Callable, tiny_base: Path, data: Path, tmp_path: Path) -> None:
    fast = ("--samples", 3, "--keep", 2, "--set", "rank=2", "--set", "valid_rows=4", "--limit", 6)
    result = cli("train", "reward", tiny_base, "--data", data, "--out", tmp_path / "reward", *fast, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["train"]["entries"], record["valid"]["entries"]) == (6, 4)
    assert "accuracy" in cli("train", "reward", tiny_base, "--data", data, "--out", tmp_path / "reward", *fast).stdout
    call = ("define", "apple", "--model", tiny_base, "--max-tokens", 4, "--best-of", 3)
    result = cli(*call, "--by", "reward", "--reward", tmp_path / "reward", "--json")
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)["definitions"]
    assert sum(c["count"] for c in answer["candidates"]) == 3
    assert answer["candidates"][0]["definition"] == answer["definition"]
    assert answer["score"] == max(c["score"] for c in answer["candidates"])
    report = cli("evaluate", tiny_base, "--data", data, "--split", "valid", "--best-of", 2, "--by", "reward",
                 "--reward", tmp_path / "reward", "--max-tokens", 3, "--json")  # fmt: skip
    assert json.loads(report.stdout)["best_of"]["by"] == "reward"
    for said, options in {
        "only evaluate has": ("--by", "reference"),
        "add --reward FOLDER": ("--by", "reward"),
        "add that": ("--reward", tmp_path / "reward"),
        "is not a reward model": ("--by", "reward", "--reward", data),
    }.items():
        refused = cli(*call, *options)
        assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1), refused.output
        assert said in refused.stderr
    assert "add --best-of N" in cli("define", "apple", "--by", "mbr").stderr
