"""compose/merge.py and compose/moe.py: dense experts, transformers and PEFT are the oracles."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composing import DOMAINS, PROMPTS, ids_of, make_ffn, make_lora, make_router, workshop
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_lexicon.compose.merge import compose_moe, expert_folders
from lora_lexicon.compose.moe import LexiconMoeForCausalLM
from lora_lexicon.compose.system import load_system
from lora_lexicon.errors import ExpertError, LexiconError, PackError, RouterError
from lora_lexicon.experts.checkpoint import install_ffn


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return workshop(tiny_base, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def moe(shop: SimpleNamespace) -> Path:
    compose_moe(str(shop.base), shop.ffn, shop.domains, shop.folder / "moe", max_shard_bytes=40_000)
    return shop.folder / "moe"


def _one_hot(domain: int, rows: int, count: int = len(DOMAINS)) -> torch.Tensor:
    weights = torch.zeros(rows, count)
    weights[:, domain] = 1
    return weights


def _dense(base: Path, expert: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    install_ffn(model, expert)
    return model


@pytest.mark.parametrize(("kernel", "tolerance"), [("eager", 0.0), ("grouped_mm", 1e-5), ("batched_mm", 1e-5)])
@torch.inference_mode()
def test_logits_are_each_dense_experts(shop: SimpleNamespace, moe: Path, kernel: str, tolerance: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe, experts_implementation=kernel, dtype=torch.float32).eval()
    ids = ids_of(shop.base)
    for i, expert in enumerate(shop.ffn):
        with model.active.using(_one_hot(i, len(ids))):
            ours = model(ids).logits
        assert (ours - _dense(shop.base, expert)(ids).logits).abs().max() <= tolerance
    with model.active.using(torch.eye(3)):
        mixed = model(ids[:3]).logits
    for i, expert in enumerate(shop.ffn):
        assert (mixed[i] - _dense(shop.base, expert)(ids[i : i + 1]).logits[0]).abs().max() <= 1e-5


@torch.inference_mode()
def test_merged_lora_experts_equal_pefts_merge(shop: SimpleNamespace, tmp_path: Path) -> None:
    compose_moe(str(shop.base), [*shop.lora[:2], shop.ffn[2]], shop.domains, tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    ids = ids_of(shop.base)
    for i, expert in enumerate(shop.lora[:2]):
        dense = (
            PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(shop.base), str(expert))
            .merge_and_unload()
            .eval()
        )
        with model.active.using(_one_hot(i, len(ids))):
            assert (model(ids).logits - dense(ids).logits).abs().max() <= 1e-5


def test_a_fresh_process_loads_it_and_it_routes_by_itself(shop: SimpleNamespace, moe: Path) -> None:
    script = (
        "import sys, torch, lora_lexicon.compose.moe\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "ids = torch.tensor([[int(i) for i in sys.argv[2].split()]])\n"
        "print(model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist())\n"
    )
    system = load_system(str(moe))
    ids = system.encoder.prompt(*PROMPTS[1])
    command = [sys.executable, "-c", script, str(moe), " ".join(map(str, ids))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with system.routed(_one_hot(1, 1)):
        here = system.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == here[0].tolist()


@torch.inference_mode()
def test_own_routing_reads_the_prompt_alone_whatever_stands_beside_it(moe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe).eval()
    system = load_system(str(moe))
    routing = system.route(PROMPTS)
    assert routing is not None
    assert [routing.name(i) for i in range(3)] == list(DOMAINS)
    rows = [system.encoder.prompt(*p) for p in PROMPTS]
    definition = [17, 23, system.tokenizer.eos_token_id]
    width = max(map(len, rows)) + 3
    left = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    right = torch.tensor([r + definition + [0] * (width - 3 - len(r)) for r in rows])
    masks = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]), right.ne(0).long()
    for ids, mask in zip((left, right), masks, strict=True):
        assert torch.equal(model.route_ids(ids, mask), torch.from_numpy(routing.weights))
    with model.active.using(torch.from_numpy(routing.weights)):
        wanted = model(right, attention_mask=masks[1]).logits
    assert torch.equal(model(right, attention_mask=masks[1]).logits, wanted)


@torch.inference_mode()
def test_saving_keeps_router_and_weights(moe: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe).eval()
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(moe).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = torch.tensor([[1, 5, 9, 2]])
    assert torch.equal(model(ids).logits, again(ids).logits)


@torch.inference_mode()
def test_the_kept_base_answers_where_the_router_abstains(shop: SimpleNamespace, tmp_path: Path) -> None:
    domains = tmp_path / "domains"
    make_router(shop.base, domains, layers=3, abstain_quantile=1.0)  # reads more layers than the experts leave
    with pytest.raises(RouterError, match="keep-base"):
        compose_moe(str(shop.base), shop.ffn, domains, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    compose_moe(str(shop.base), shop.ffn, domains, tmp_path / "moe", keep_base=True)
    system = load_system(str(tmp_path / "moe"))
    routing = system.route([*PROMPTS[:2], ("table", "green table")])
    assert routing is not None
    assert routing.name(2) == "base"
    ids = torch.tensor([system.encoder.prompt("table", "green table")])
    base = LlamaForCausalLM.from_pretrained(shop.base).eval()
    with system.routed(torch.from_numpy(routing.weights[2:])):
        assert (system.model(ids).logits - base(ids).logits).abs().max() <= 1e-5


@torch.inference_mode()
def test_without_the_base_an_abstaining_prompt_goes_to_its_nearest_expert(
    shop: SimpleNamespace, tmp_path: Path
) -> None:
    make_router(shop.base, tmp_path / "domains", abstain_quantile=1.0)
    compose_moe(str(shop.base), shop.ffn, tmp_path / "domains", tmp_path / "moe")
    system = load_system(str(tmp_path / "moe"))
    routing = system.route([("table", "green table")])
    assert routing is not None
    assert routing.weights.argmax() == routing.similarities.argmax()
    assert routing.weights.sum() == 1
    with pytest.raises(RouterError, match="no expert"), system.routed(torch.zeros(1, 3)):
        pass


@torch.inference_mode()
def test_rope_scaling_biases_and_untied_heads_survive(tiny_base: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny_base)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    config.tie_word_embeddings, config.attention_bias, config.head_dim, config.rms_norm_eps = False, True, 16, 1e-4
    torch.manual_seed(1)
    base = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    make_router(base, tmp_path / "domains", names=("a", "b"))
    experts = [make_ffn(base, tmp_path / name, seed=i) for i, name in enumerate("ab")]
    compose_moe(str(base), experts, tmp_path / "domains", tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager").eval()
    ids = ids_of(base)
    for i, expert in enumerate(experts):
        with model.active.using(_one_hot(i, len(ids), 2)):
            assert torch.equal(model(ids).logits, _dense(base, expert)(ids).logits)


def test_a_tied_head_stays_tied(moe: Path) -> None:
    model = LexiconMoeForCausalLM.from_pretrained(moe)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_record_says_what_it_was_made_of(shop: SimpleNamespace, moe: Path) -> None:
    record = json.loads((moe / "moe.json").read_text())
    assert [e["name"] for e in record["experts"]] == list(DOMAINS)
    assert record["trained_parameters"] == 3 * 2 * 3 * 32 * 48
    assert record["dtype"] == "float32"
    assert len(list(moe.glob("model-*.safetensors"))) > 1
    system = load_system(str(moe))
    assert system.ship_bytes > record["bytes"]
    assert system.memory_bytes == pytest.approx(record["bytes"], rel=0.05)
    assert system.experts == DOMAINS


def test_parts_that_do_not_fit_are_refused_and_leave_nothing(shop: SimpleNamespace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(shop.base)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(shop.base).save_pretrained(other)
    base, out = str(shop.base), tmp_path / "moe"
    attention = make_lora(shop.base, tmp_path / "x" / "mind", seed=1, attention=True)
    stranger = make_ffn(other, tmp_path / "y" / "mind", seed=1)
    cases: list[tuple[type[LexiconError], str, str, list[Path], Path]] = [
        (PackError, "domains without an expert: mind", base, shop.ffn[:2], shop.domains),
        (PackError, "given twice: mind", base, [*shop.ffn, shop.ffn[2]], shop.domains),
        (ExpertError, "compose adapters", base, [*shop.ffn[:2], attention], shop.domains),
        (ExpertError, "not on", base, [*shop.ffn[:2], stranger], shop.domains),
        (RouterError, "fit the domains on this base", str(other), shop.ffn, shop.domains),
        (RouterError, "not a router", base, shop.ffn, tmp_path),
    ]
    for error, words, name, experts, domains in cases:
        with pytest.raises(error, match=words) as refusal:
            compose_moe(name, experts, domains, out)
        assert "\n" not in str(refusal.value)
        assert not out.exists()
        assert not list(tmp_path.glob(".moe*"))


def test_folders_of_experts(shop: SimpleNamespace, tmp_path: Path) -> None:
    assert sorted(expert_folders([shop.folder / "lora"])) == sorted(shop.lora)
    assert expert_folders([shop.ffn[1]]) == [shop.ffn[1]]
    with pytest.raises(ExpertError, match="neither an expert"):
        expert_folders([tmp_path])
