"""compose/merge.py and compose/moe.py: dense experts, transformers and PEFT are the oracles."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composing import DOMAINS, PROMPTS, dense_model, ids_of, make_ffn, make_lora, make_router, scaled_base, workshop
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lora_lexicon.compose.merge import compose_moe, expert_folders
from lora_lexicon.compose.moe import LexiconMoeForCausalLM
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, open_expert
from lora_lexicon.compose.system import load_system
from lora_lexicon.errors import ExpertError, LexiconError, PackError, RecipeError, RouterError
from lora_lexicon.experts.shape import parse_layers
from lora_lexicon.experts.tensors import Checkpoint


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


@pytest.mark.parametrize(("kernel", "tolerance"), [("eager", 0.0), ("grouped_mm", 1e-5), ("batched_mm", 1e-5)])
@torch.inference_mode()
def test_logits_are_each_dense_experts(shop: SimpleNamespace, moe: Path, kernel: str, tolerance: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe, experts_implementation=kernel, dtype=torch.float32).eval()
    ids = ids_of(shop.base)
    for i, expert in enumerate(shop.ffn):
        with model.active.using(_one_hot(i, len(ids))):
            ours = model(ids).logits
        assert (ours - dense_model(shop.base, expert)(ids).logits).abs().max() <= tolerance
    with model.active.using(torch.eye(3)):
        mixed = model(ids[:3]).logits
    for i, expert in enumerate(shop.ffn):
        assert (mixed[i] - dense_model(shop.base, expert)(ids[i : i + 1]).logits[0]).abs().max() <= 1e-5


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
    ours, theirs = load_system(str(moe)), load_system(str(tmp_path / "again"))
    assert np.array_equal(ours.route(PROMPTS).weights, theirs.route(PROMPTS).weights)


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
    base = scaled_base(tiny_base, tmp_path / "base", attention_bias=True)
    make_router(base, tmp_path / "domains", names=("a", "b"))
    experts = [make_ffn(base, tmp_path / name, seed=i) for i, name in enumerate("ab")]
    compose_moe(str(base), experts, tmp_path / "domains", tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager").eval()
    ids = ids_of(base)
    for i, expert in enumerate(experts):
        with model.active.using(_one_hot(i, len(ids), 2)):
            assert torch.equal(model(ids).logits, dense_model(base, expert)(ids).logits)


def test_a_tied_head_stays_tied(moe: Path) -> None:
    model = LexiconMoeForCausalLM.from_pretrained(moe)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_record_says_what_it_was_made_of(shop: SimpleNamespace, moe: Path) -> None:
    record = json.loads((moe / "moe.json").read_text())
    assert [e["name"] for e in record["experts"]] == list(DOMAINS)
    assert record["trained_parameters"] == 3 * 2 * 3 * 32 * 64
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


def test_the_written_moe_is_compared_with_each_expert_alone(
    shop: SimpleNamespace, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((moe / "moe.json").read_text())
    assert record["verified"]["differences"] == dict.fromkeys(DOMAINS, 0.0)
    mixed = [shop.lora[0], shop.ffn[1], shop.ffn[2]]
    record = compose_moe(str(shop.base), mixed, shop.domains, tmp_path / "half", dtype="bfloat16")
    assert all(0 < difference < 1 for difference in record["verified"]["differences"].values())
    card = (tmp_path / "half" / "README.md").read_text()
    assert all(format(difference, ".2g") in card for difference in record["verified"]["differences"].values())
    assert compose_moe(str(shop.base), mixed, shop.domains, tmp_path / "not", verify=False)["verified"] is None
    own = ExpertSource.piece

    def swapped(self: ExpertSource, tensor: str, base: Checkpoint, dtype: torch.dtype) -> object:
        return own(self, tensor.replace("up_proj", "gate_proj"), base, dtype)

    monkeypatch.setattr(ExpertSource, "piece", swapped)
    with pytest.raises(ExpertError, match="differs from that expert by"):
        compose_moe(str(shop.base), mixed, shop.domains, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_folders_of_experts(shop: SimpleNamespace, tmp_path: Path) -> None:
    assert sorted(expert_folders([shop.folder / "lora"])) == sorted(shop.lora)
    assert expert_folders([shop.ffn[1]]) == [shop.ffn[1]]
    with pytest.raises(ExpertError, match="neither an expert"):
        expert_folders([tmp_path])


def _trained_all(base: Path, out: Path, seed: int, scale: float = 0.05) -> Path:
    """A whole Llama, every weight of which moved."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def _lexical_router(shop: SimpleNamespace, out: Path) -> Path:
    """A router that reads no model."""
    make_router(shop.base, out)
    record = json.loads((out / "router.json").read_text())
    record["embedder"] = "hf:none"
    (out / "router.json").write_text(json.dumps(record))
    return out


def test_a_whole_model_in_a_wider_type_changed_only_what_differs_in_value(tiny_base: Path, tmp_path: Path) -> None:
    base, up = scaled_base(tiny_base, tmp_path / "base"), "model.layers.2.mlp.up_proj.weight"
    LlamaForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    shutil.copytree(base, tmp_path / "mind")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter(up)[0, 0] += 2**-20  # which bfloat16 would not hold
    model.save_pretrained(tmp_path / "mind")
    assert open_expert(tmp_path / "mind", BaseFiles.open("base", base)).changed == {up}


@torch.inference_mode()
def test_the_rest_is_the_mean_and_the_ffns_are_each_experts_own(shop: SimpleNamespace, tmp_path: Path) -> None:
    """Algorithm 1 of the paper, on a whole Llama, a LoRA expert that trains attention, and one that trains no rest."""
    dense = _trained_all(shop.base, tmp_path / "nature", 1)
    attention = make_lora(shop.base, tmp_path / "craft", seed=2, attention=True)
    experts, domains = [dense, attention, shop.ffn[2]], _lexical_router(shop, tmp_path / "domains")
    with pytest.raises(ExpertError, match="--average-rest"):
        compose_moe(str(shop.base), experts, domains, tmp_path / "moe")
    compose_moe(str(shop.base), experts, domains, tmp_path / "moe", average_rest=True)
    alone = [
        LlamaForCausalLM.from_pretrained(dense).state_dict(),
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(shop.base), str(attention))
        .merge_and_unload()
        .state_dict(),
        dense_model(shop.base, shop.ffn[2]).state_dict(),
    ]
    merged = {}
    for file in (tmp_path / "moe").glob("*.safetensors"):
        merged |= load_file(file) if file.name != "router.safetensors" else {}
    for name, tensor in merged.items():
        layer = name.removesuffix(".experts.gate_up_proj").removesuffix(".experts.down_proj")
        if layer == name:
            expected = torch.stack([state[name] for state in alone]).mean(dim=0)
        elif name.endswith("down_proj"):
            expected = torch.stack([state[f"{layer}.down_proj.weight"] for state in alone])
        else:
            parts = [torch.cat([s[f"{layer}.gate_proj.weight"], s[f"{layer}.up_proj.weight"]]) for s in alone]
            expected = torch.stack(parts)
        assert torch.allclose(tensor, expected, atol=1e-6), name
    record = json.loads((tmp_path / "moe" / "moe.json").read_text())
    assert record["expert_layers"] == [0, 1, 2]
    assert "model.embed_tokens.weight" in record["averaged"]


@torch.inference_mode()
def test_only_the_layers_asked_for_have_experts(shop: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match=r"layers\.1\.mlp.*--average-rest"):
        compose_moe(str(shop.base), shop.ffn, shop.domains, tmp_path / "moe", layers="2")
    compose_moe(str(shop.base), shop.ffn, shop.domains, tmp_path / "moe", layers="2", average_rest=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager").eval()
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["LlamaMLP", "LlamaMLP", "ExpertBlock"]
    mean = dense_model(shop.base, shop.ffn[0])
    states = [dense_model(shop.base, expert).state_dict() for expert in shop.ffn]
    ids = ids_of(shop.base)
    for i, state in enumerate(states):
        for name, parameter in mean.named_parameters():
            values = torch.stack([s[name] for s in states]).mean(dim=0)
            parameter.copy_(state[name] if "layers.2.mlp" in name else values)
        with model.active.using(_one_hot(i, len(ids))):
            assert (model(ids).logits - mean(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("text", "layers"), [("0", [0]), ("1-3", [1, 2, 3]), ("3, 0-1", [0, 1, 3]), ("4", None), ("2-1", None), ("a", None)]
)
def test_layers_are_written_as_ranges(text: str, layers: list[int] | None) -> None:
    if layers is None:
        with pytest.raises(RecipeError, match="--layers"):
            parse_layers(text, 4)
    else:
        assert parse_layers(text, 4) == layers


def _changed(path: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of an FFN expert whose tensors were changed."""
    shutil.copytree(path, out)
    tensors = load_file(out / "ffn.safetensors")
    change(tensors)
    save_file(tensors, out / "ffn.safetensors")
    return out


def test_experts_that_are_damaged_or_another_models_are_refused_by_tensor_and_file(
    shop: SimpleNamespace, tmp_path: Path
) -> None:
    up = "model.layers.2.mlp.up_proj.weight"

    def config_of(key: str, value: object) -> Path:
        out = _trained_all(shop.base, tmp_path / key / "mind", 1)
        record = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(record | {key: value}))
        return out

    def vocabulary() -> Path:
        out = _trained_all(shop.base, tmp_path / "v" / "mind", 1)
        record = json.loads((out / "tokenizer.json").read_text())
        record["model"]["vocab"]["new"] = 399
        (out / "tokenizer.json").write_text(json.dumps(record))
        return out

    source, nan = shop.ffn[2], float("nan")
    cases = {
        "lacks model.layers.2.mlp.up_proj": _changed(source, tmp_path / "a" / "mind", lambda t: t.pop(up)),
        r"trains model.layers.9.*lacks": _changed(
            source, tmp_path / "b" / "mind", lambda t: t.update({up.replace("2", "9"): t[up].clone()})
        ),
        r"ffn.safetensors model.layers.2.* shape \(64, 31\), the base's is \(64, 32\)": _changed(
            source, tmp_path / "c" / "mind", lambda t: t.update({up: t[up][:, :31].contiguous()})
        ),
        r"up_proj.weight holds values that are infinite": _changed(
            source, tmp_path / "d" / "mind", lambda t: t[up][3].fill_(nan)
        ),
        r"ffn.safetensors holds model.layers.2.mlp.up_proj.weight as int32, the base as float32": _changed(
            source, tmp_path / "i" / "mind", lambda t: t.update({up: t[up].int()})
        ),
        r"different types: .* is float32 in .*ffn.safetensors and .* is bfloat16": _changed(
            source, tmp_path / "e" / "mind", lambda t: t.update({n: v.bfloat16() for n, v in t.items()})
        ),
        r"rms_norm_eps = 0.5, base": config_of("rms_norm_eps", 0.5),
        r"rope_theta = 7, base": config_of("rope_theta", 7),
        r"num_hidden_layers = 7, base .* says 3": config_of("num_hidden_layers", 7),
        r"another vocabulary": vocabulary(),
    }
    for words, expert in cases.items():
        with pytest.raises(ExpertError, match=words) as refusal:
            compose_moe(str(shop.base), [*shop.ffn[:2], expert], shop.domains, tmp_path / "moe")
        assert "\n" not in str(refusal.value)
        assert not [path for path in tmp_path.iterdir() if "moe" in path.name]


def test_copying_alone_imports_no_torch(shop: SimpleNamespace, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lora_lexicon.compose.merge import compose_moe\n"
        "base, domains, out, *experts = sys.argv[1:]\n"
        "compose_moe(base, [Path(e) for e in experts], Path(domains), Path(out), verify=False)\n"
        "print('torch' in sys.modules)\n"
    )
    arguments = [str(shop.base), str(shop.domains), str(tmp_path / "moe"), *map(str, shop.ffn)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_killed_composition_leaves_nothing_that_loads_and_the_next_says_so(
    shop: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lora_lexicon.compose.merge import compose_moe\n"
        "done = 0\n"
        "def stop(bytes, total):\n"
        "    global done\n"
        "    done += bytes\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "base, domains, out, *experts = sys.argv[1:]\n"
        "compose_moe(base, [Path(e) for e in experts], Path(domains), Path(out), progress=stop)\n"
    )
    out = tmp_path / "moe"
    arguments = [str(shop.base), str(shop.domains), str(out), *map(str, shop.ffn)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True)
    assert killed.returncode == -9
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(LexiconError):
        load_system(str(left))
    compose_moe(str(shop.base), shop.ffn, shop.domains, out)
    assert "removed" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
