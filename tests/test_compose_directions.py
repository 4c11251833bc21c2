"""compose/extract.py, collapse.py and export.py: dense models, PEFT and transformers are the oracles."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composing import (
    DOMAINS,
    dense_model,
    ids_of,
    make_entries,
    make_ffn,
    make_lora,
    make_router,
    scaled_base,
    workshop,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig

from lora_lexicon.compose.collapse import collapse
from lora_lexicon.compose.export import UNKNOWN_TO_MIXTRAL, export_mixtral
from lora_lexicon.compose.extract import chosen_method, decompose, extract, parse_ranks
from lora_lexicon.compose.gates import fit_gate
from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.probes import probe_entries
from lora_lexicon.compose.system import load_system
from lora_lexicon.errors import DataError, ExpertError, LexiconError, PackError, RecipeError
from lora_lexicon.experts.base import fingerprint
from lora_lexicon.experts.checkpoint import load_adapter, read_expert
from lora_lexicon.packs.pack import build_pack

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return workshop(tiny_base, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def moe(shop: SimpleNamespace) -> Path:
    """In shards, and with the base kept."""
    out = shop.folder / "moe"
    compose_moe(str(shop.base), shop.ffn, shop.domains, out, keep_base=True, max_shard_bytes=40_000)
    return out


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_entries(tmp_path_factory.mktemp("entries"))


def _same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def _changed_ffn(base: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """An FFN expert whose tensors are `change` of the base's."""
    make_ffn(base, out, seed=0)
    model = dense_model(base)
    own = {name: change(name, model.get_parameter(name).detach()) for name in load_file(out / "ffn.safetensors")}
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, out / "ffn.safetensors")
    return out


# extract


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99), st.floats(0.05, 1.0))
def test_energy_is_what_the_product_keeps_and_grows_with_the_rank(
    rows: int, columns: int, rank: int, seed: int, share: float
) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    a, b, found = decompose(delta, rank)
    kept = 1 - (delta - b @ a).square().sum() / delta.square().sum()
    assert found.energy(rank) == pytest.approx(float(kept), abs=1e-4)
    energies = [found.energy(r) for r in range(min(rows, columns) + 1)]
    assert energies == sorted(energies)
    assert energies[0] == 0
    assert energies[-1] == pytest.approx(1)
    least = found.rank_for(share)
    assert energies[least] >= share - 1e-6
    assert energies[least - 1] < share


def test_the_randomized_svd_is_near_the_exact_one_and_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(400, 40, generator=generator) * torch.logspace(0, -1.5, 40)
    delta = strong @ torch.randn(40, 500, generator=generator) + 0.05 * torch.randn(400, 500, generator=generator)
    a, b, found = decompose(delta, 16)
    exact = decompose(delta, 16, "exact")[2]
    assert len(found.values) == 16 < len(exact.values)
    assert exact.energy(16) - 1e-3 <= found.energy(16) <= exact.energy(16) + 1e-6
    kept = 1 - (delta - b @ a).square().sum() / delta.square().sum()
    assert found.energy(16) == pytest.approx(float(kept), abs=1e-4)
    assert torch.equal(a, decompose(delta, 16)[0])


def test_the_randomized_svd_is_for_small_ranks_of_large_matrices() -> None:
    assert chosen_method((4096, 14336), 16, "auto") == "randomized"
    assert chosen_method((256, 1024), 16, "auto") == "exact"
    assert chosen_method((512, 2048), 200, "auto") == "exact"
    assert chosen_method((4096, 14336), None, "auto") == "exact"


@torch.inference_mode()
def test_at_full_rank_an_extracted_expert_is_the_expert(shop: SimpleNamespace, tmp_path: Path) -> None:
    record = extract(shop.ffn, str(shop.base), tmp_path / "lora", rank=48)
    ids, extracted = ids_of(shop.base), [tmp_path / "lora" / name for name in DOMAINS]
    for full, low in zip(shop.ffn, extracted, strict=True):
        model = PeftModel.from_pretrained(dense_model(shop.base), str(low)).eval()
        assert (model(ids).logits - dense_model(shop.base, full)(ids).logits).abs().max() <= 1e-4
        info, source = read_expert(low), read_expert(full)
        assert (info.kind, info.name, info.domain) == ("lora", source.name, source.domain)
        assert (info.first_layer, info.entries_fingerprint) == (1, source.entries_fingerprint)
        assert info.trained_parameters == sum(f.a.numel() + f.b.numel() for f in load_adapter(low).factors.values())
    assert [e["name"] for e in record["experts"]] == list(DOMAINS)
    assert info.training["extraction"]["extracted_from"] == record["experts"][-1]["extracted_from"]
    moes = [tmp_path / "moe", tmp_path / "again"]
    for out, experts in zip(moes, (shop.ffn, extracted), strict=True):
        compose_moe(str(shop.base), experts, shop.domains, out)
    first, second = (load_file(out / "model.safetensors") for out in moes)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-5
    models = [AutoModelForCausalLM.from_pretrained(out).eval() for out in moes]
    logits = []
    for model in models:
        with model.active.using(torch.eye(3)):
            logits.append(model(ids[:3]).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
    pack = build_pack(str(shop.base), extracted, shop.domains, tmp_path / "pack")
    assert [d["rank"] for d in pack["domains"]] == [32, 32, 32]


def test_ranks_by_energy_differ_between_tensors_and_peft_reads_them(shop: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(3)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("1.mlp.up_proj.weight"):
            return tensor  # as it was: no factors
        inner = 2 if name.endswith("down_proj.weight") else 20
        return tensor + 0.1 * torch.randn(len(tensor), inner) @ torch.randn(inner, tensor.shape[1])

    expert = _changed_ffn(shop.base, tmp_path / "mind", change)
    record = extract([expert], str(shop.base), tmp_path / "out", energy=0.9)
    tensors = record["experts"][0]["tensors"]
    assert {found["rank"] for name, found in tensors.items() if "down_proj" in name} <= {1, 2}
    assert all(found["rank"] > 2 for name, found in tensors.items() if "down_proj" not in name)
    config = json.loads((tmp_path / "out" / "mind" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    model = PeftModel.from_pretrained(dense_model(shop.base), str(tmp_path / "out" / "mind")).merge_and_unload()
    base, full, merged = (
        dense_model(shop.base).state_dict(),
        dense_model(shop.base, expert).state_dict(),
        model.state_dict(),
    )
    for name, tensor in merged.items():
        if name not in tensors:
            assert torch.equal(tensor, base[name]), name
            continue
        delta = full[name] - base[name]
        kept = 1 - (full[name] - tensor).square().sum() / delta.square().sum()
        assert float(kept) == pytest.approx(tensors[name]["energy"], abs=1e-4)
        assert kept >= 0.9
        assert decompose(delta)[2].energy(tensors[name]["rank"] - 1) < 0.9


def test_of_a_whole_model_the_ffns_are_taken_and_the_rest_is_named(shop: SimpleNamespace, tmp_path: Path) -> None:
    model = dense_model(shop.base, shop.ffn[0])
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").add_(0.1)
    model.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(shop.base).save_pretrained(tmp_path / "whole")
    record = extract([tmp_path / "whole", shop.ffn[0]], str(shop.base), tmp_path / "out", rank=8)
    whole, ffn = record["experts"]
    assert whole["left_out"] == ["model.layers.0.self_attn.q_proj.weight"]
    assert (ffn["left_out"], whole["tensors"]) == ([], ffn["tensors"])
    first, second = (load_adapter(tmp_path / "out" / name).factors for name in ("whole", "nature"))
    assert all(torch.equal(first[layer].a, second[layer].a) for layer in second)


def test_factors_are_in_the_experts_type_and_what_is_said_of_them_is_measured_so(
    shop: SimpleNamespace, entries: Path, tmp_path: Path
) -> None:
    expert = make_ffn(shop.base, tmp_path / "mind", seed=1)
    half = {name: tensor.bfloat16() for name, tensor in load_file(expert / "ffn.safetensors").items()}
    save_file(half, expert / "ffn.safetensors")
    made = extract([expert], str(shop.base), tmp_path / "out", rank=32, report_ranks=[4, 32], data=entries)
    factors = load_file(tmp_path / "out" / "mind" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in factors.values()} == {torch.bfloat16}
    (record,), own = made["experts"], dense_model(shop.base).state_dict()
    assert record["bytes"] == sum(tensor.nbytes for tensor in factors.values())
    for layer, found in load_adapter(tmp_path / "out" / "mind").factors.items():
        delta = half[f"{layer}.weight"] - own[f"{layer}.weight"]
        kept = 1 - (delta - found.delta).square().sum() / delta.square().sum()
        assert record["tensors"][f"{layer}.weight"]["energy"] == pytest.approx(float(kept), abs=1e-6)
    zero, low, full = made["report"]
    assert (zero["energy_mean"], zero["rounding"]) == (0, 0)
    assert 0 < low["rounding"] < full["rounding"] < 1e-4
    assert full["energy_mean"] == pytest.approx(1 - full["rounding"], abs=1e-6)  # all that is missing at full rank


def test_the_report_needs_no_output_and_ends_at_the_full_expert(
    shop: SimpleNamespace, entries: Path, tmp_path: Path, cli
) -> None:
    words = ("compose", "extract", shop.ffn[0], "--base", shop.base, "--report-ranks", "4,32,8", "--data", entries)
    done = cli(*words, "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["report"]
    assert [row["rank"] for row in rows] == [0, 4, 8, 32]
    for key in ("energy_mean", "energy_min", "parameters"):
        values = [row[key] for row in rows]
        assert values == sorted(values), key
    assert rows[0]["kl"] > 10 * rows[-1]["kl"]
    assert (rows[0]["energy_mean"], rows[0]["parameters"]) == (0, 0)
    assert rows[-1]["energy_min"] == pytest.approx(1)
    assert rows[-1]["max_abs"] <= 1e-4
    table = cli(*words, "--out", tmp_path / "out")
    assert table.exit_code == 0, table.stderr
    assert "nature" in table.stdout
    assert json.loads((tmp_path / "out" / "extract.json").read_text())["report"] == rows
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["extract.json", "nature"]


# collapse


def test_collapse_of_a_moe_gives_each_expert_to_the_bit(shop: SimpleNamespace, moe: Path, tmp_path: Path) -> None:
    for name, expert in zip(DOMAINS, shop.ffn, strict=True):
        collapse(moe, tmp_path / name, expert=name, max_shard_bytes=60_000)
        _same(
            LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict(), dense_model(shop.base, expert).state_dict()
        )
    collapse(moe, tmp_path / "base", expert="base")
    assert fingerprint(tmp_path / "base") == fingerprint(shop.base)


def test_collapse_of_adapters_equals_pefts_merge(shop: SimpleNamespace, tmp_path: Path, cli) -> None:
    build_pack(str(shop.base), shop.lora, shop.domains, tmp_path / "pack", include_base=True)
    for name, expert in zip(DOMAINS, shop.lora, strict=True):
        wanted = PeftModel.from_pretrained(dense_model(shop.base), str(expert)).merge_and_unload().state_dict()
        collapse(tmp_path / "pack", tmp_path / f"{name}-a", expert=name)
        collapse(expert, tmp_path / f"{name}-b")
        found, alone = (LlamaForCausalLM.from_pretrained(tmp_path / f"{name}-{x}").state_dict() for x in "ab")
        _same(found, alone)
        assert found.keys() == wanted.keys()
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) <= 1e-6
    done = cli("compose", "collapse", tmp_path / "pack", "--expert", "base", "--out", tmp_path / "c", "--json")
    assert json.loads(done.stdout)["expert"] == "base", done.stderr
    assert fingerprint(tmp_path / "c") == fingerprint(shop.base)


def test_collapse_of_an_ffn_expert_can_change_type(shop: SimpleNamespace, tmp_path: Path) -> None:
    collapse(shop.ffn[0], tmp_path / "half", dtype="bfloat16", base=str(shop.base))
    wanted = dense_model(shop.base, shop.ffn[0]).bfloat16().state_dict()
    _same(LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict(), wanted)


# export


def _forced(model: torch.nn.Module, layers: list[int], expert: int) -> None:
    """Sends every token of these layers to one expert."""

    def gate(states: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        tokens = states.reshape(-1, states.shape[-1]).shape[0]
        return None, torch.ones(tokens, 1), torch.full((tokens, 1), expert)

    for layer in layers:
        model.model.layers[layer].mlp.gate.forward = gate  # type: ignore[union-attr, index]


@pytest.fixture(scope="module")
def mixtral(shop: SimpleNamespace, moe: Path, entries: Path) -> Path:
    export_mixtral(moe, shop.folder / "mixtral", data=entries, max_shard_bytes=60_000)
    return shop.folder / "mixtral"


@torch.inference_mode()
def test_each_expert_of_the_mixtral_is_its_dense_model(shop: SimpleNamespace, mixtral: Path) -> None:
    ids = ids_of(shop.base)
    for i, expert in enumerate(shop.ffn):
        model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
        _forced(model, [1, 2], i)  # layer 0 has no experts: it repeats its FFN under its own gate
        assert (model(ids).logits - dense_model(shop.base, expert)(ids).logits).abs().max() <= 1e-5


def test_plain_transformers_loads_what_was_exported_and_collapsed(moe: Path, mixtral: Path, tmp_path: Path) -> None:
    collapse(moe, tmp_path / "dense", expert="craft")
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for path in sys.argv[1:]:\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)\n"
        "    assert not any(info.values()), info\n"
        "    ids = AutoTokenizer.from_pretrained(path)('the apple is here', return_tensors='pt').input_ids\n"
        "    model.generate(ids, max_new_tokens=3, do_sample=False)\n"
        "    print(type(model).__name__)\n"
        "assert 'lora_lexicon' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(mixtral), str(tmp_path / "dense")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MixtralForCausalLM", "LlamaForCausalLM"], done.stderr


def test_what_was_exported_and_collapsed_is_used_as_any_model(
    moe: Path, mixtral: Path, entries: Path, tmp_path: Path, cli
) -> None:
    collapse(moe, tmp_path / "dense", expert="craft")
    models, data = (tmp_path / "dense", mixtral), ("--data", entries, "--limit", 2, "--max-tokens", 3)
    trained = json.loads((moe / "moe.json").read_text())["trained_parameters"]
    for command, more in (("evaluate", ()), ("compose compare", ("--quantize", "nf4"))):
        done = cli(*command.split(), *models, *data, *more, "--json")
        assert done.exit_code == 0, done.stderr
        systems = {system["name"]: system for system in json.loads(done.stdout)["systems"]}
        assert systems.keys() - {"dense-nf4"} == {"dense", "mixtral"}  # fused experts cannot be quantised
        assert systems["mixtral"]["trained_parameters"] == trained
    for model in models:
        done = cli("define", "apple", "--model", model, "--max-tokens", 3, "--json")
        assert json.loads(done.stdout)["definitions"][0]["domain"] == model.name
    refused = cli("define", "apple", "--model", mixtral, "--quantize", "nf4")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "cannot quantise" in refused.stderr


def test_the_mixtrals_record_is_honest(mixtral: Path) -> None:
    record, config = (json.loads((mixtral / name).read_text()) for name in ("export.json", "config.json"))
    assert (record["experts"], record["repeated_layers"]) == (list(DOMAINS), [0])
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["sliding_window"]) == (3, 2, None)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for transformers before version 5
    assert set(record["gates"]["agreement"]) == {"1", "2"}
    for shares in record["gates"]["agreement"].values():
        assert all(0 <= share <= 1 for share in shares.values())
    names = {name for file in mixtral.glob("model*.safetensors") for name in load_file(file)}
    assert "model.layers.2.block_sparse_moe.experts.2.w3.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert not [name for name in names if ".mlp." in name]


@torch.inference_mode()
def test_gates_are_fitted_on_what_enters_each_layers_ffn(moe: Path, mixtral: Path, entries: Path) -> None:
    """The oracle runs the whole MoE on one entry at a time."""
    system, seen = load_system(str(moe)), probe_entries(entries, "train", 512)
    routing = system.route([(entry.term, entry.context) for entry in seen])
    assert routing is not None
    states: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for layer, found in states.items():
        norm = system.model.model.layers[layer].post_attention_layernorm
        norm.register_forward_hook(lambda *call, found=found: found.append(call[2][0]))
    rows = [system.encoder.row(entry.term, entry.context, entry.definition).ids for entry in seen]
    for ids, weights in zip(rows, routing.weights, strict=True):
        with system.routed(torch.from_numpy(weights[None])):
            system.model(torch.tensor([ids]))
    domains = torch.tensor(routing.top).repeat_interleave(torch.tensor([len(ids) for ids in rows]))
    gates = {name: t for file in mixtral.glob("model*.safetensors") for name, t in load_file(file).items()}
    for layer, found in states.items():
        wanted = fit_gate(torch.cat(found), domains.numpy(), len(DOMAINS))
        made = gates[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.nn.functional.cosine_similarity(made, wanted).min() > 0.999


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_gates_softmax_gives_each_domains_states_to_it(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    domains = torch.arange(count).repeat_interleave(100)
    common = 20 * torch.randn(1, 32, generator=generator)  # most of a state says nothing of the domain
    states = common + torch.randn(count, 32, generator=generator)[domains] * 2
    states = states + 0.3 * torch.randn(len(states), 32, generator=generator)
    chances = (states @ fit_gate(states, domains.numpy(), count).T).softmax(dim=1)
    assert chances.shape == (100 * count, count)
    assert bool((chances.argmax(dim=1) == domains).all())
    assert chances[torch.arange(len(domains)), domains].mean() > 0.7


@torch.inference_mode()
def test_rope_scaling_head_size_and_an_untied_head_survive(tiny_base: Path, entries: Path, tmp_path: Path) -> None:
    base = scaled_base(tiny_base, tmp_path / "base")
    make_router(base, tmp_path / "domains", names=("a", "b"))
    experts = [make_ffn(base, tmp_path / name, seed=i) for i, name in enumerate("ab")]
    compose_moe(str(base), experts, tmp_path / "domains", tmp_path / "moe")
    export_mixtral(tmp_path / "moe", tmp_path / "mixtral", top_k=1, data=entries)
    collapse(tmp_path / "moe", tmp_path / "dense", expert="b")
    ids, wanted = ids_of(base), dense_model(base, experts[1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").eval()
    _forced(model, [1, 2], 1)
    assert (model(ids).logits - wanted(ids).logits).abs().max() <= 1e-5
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()(ids).logits, wanted(ids).logits)
    for folder in ("mixtral", "dense"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert (written["rope_theta"], written["rope_scaling"]["rope_type"]) == (10000.0, "llama3")
    record = extract([tmp_path / "dense"], str(base), tmp_path / "lora", rank=4)  # it is still a model of this base
    assert record["experts"][0]["left_out"] == []


def test_mixtral_has_every_other_setting_of_a_llama() -> None:
    missing = LlamaConfig().to_dict().keys() - MixtralConfig().to_dict().keys()
    assert missing == {*UNKNOWN_TO_MIXTRAL, "pretraining_tp"}  # the last is a note on how it was trained


# what cannot be done


def _edited(path: Path, out: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a folder with the tensors of one of its files changed, or of all its shards as `model*.safetensors`."""
    shutil.copytree(path, out)
    tensors = {}
    for shard in out.glob(file):
        tensors |= load_file(shard)
        shard.unlink()
    change(tensors)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, out / file.replace("*", ""), {"format": "pt"})
    return out


def test_bad_inputs_are_refused_in_one_line_and_leave_nothing(
    shop: SimpleNamespace, moe: Path, entries: Path, tmp_path: Path
) -> None:
    build_pack(str(shop.base), shop.lora, shop.domains, tmp_path / "pack")
    plain = make_lora(shop.base, tmp_path / "plain", seed=1)
    (plain / "expert.json").unlink()
    same = _changed_ffn(shop.base, tmp_path / "same", lambda _, tensor: tensor)

    def add_biases(tensors: dict[str, torch.Tensor]) -> None:
        attention = [name for name in tensors if name.endswith("_proj.weight") and "self_attn" in name]
        tensors |= {name.replace("weight", "bias"): torch.zeros(len(tensors[name])) for name in attention}

    biased = _edited(moe, tmp_path / "biased", "model*.safetensors", add_biases)
    config = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    few = shutil.copytree(moe, tmp_path / "few")
    (few / "config.json").write_text(json.dumps({**config, "expert_names": ["nature", "craft"]}))
    base, out, one = str(shop.base), tmp_path / "out", [shop.ffn[0]]
    query, fused = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.down_proj"

    def moe_with(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        return _edited(moe, tmp_path / name, "model*.safetensors", change)

    def lora_with(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> list[Path]:
        return [*shop.lora[:2], _edited(shop.lora[2], tmp_path / name / "mind", "adapter_model.safetensors", change)]

    def add_layer(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {k.replace("layers.2", "layers.9"): v.clone() for k, v in tensors.items() if "layers.2.mlp.up" in k}

    def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.2.mlp.up" in name]:
            del tensors[name]

    lacking, more = lora_with("lacking", drop_layer), lora_with("more", add_layer)
    narrow = moe_with("narrow", lambda t: t.update({query: t[query][:-1].contiguous()}))
    extra = moe_with("extra", lambda t: t.update({"model.extra.weight": t[query].clone()}))
    bare = moe_with("bare", lambda t: t.pop("model.norm.weight"))
    infinite = moe_with("infinite", lambda t: t[fused][1, 2].fill_(float("inf")))
    double = shutil.copytree(moe, tmp_path / "double")
    (double / "config.json").write_text(json.dumps({**config, "expert_names": ["nature", "nature", "mind"]}))
    cases: list[tuple[type[LexiconError], str, Callable[[], object]]] = [
        (RecipeError, "give one of them", lambda: extract(one, base, out, rank=4, energy=0.5)),
        (RecipeError, "rank is 0", lambda: extract(one, base, out, rank=0)),
        (RecipeError, "energy is 1.5", lambda: extract(one, base, out, energy=1.5)),
        (RecipeError, "use exact", lambda: extract(one, base, out, energy=0.5, method="randomized")),
        (RecipeError, "give --out", lambda: extract(one, base, None)),
        (RecipeError, "report-ranks '4,x'", lambda: parse_ranks("4,x")),
        (ExpertError, "LoRA expert already", lambda: extract(shop.lora, base, out)),
        (ExpertError, "is a MoE.*compose collapse", lambda: extract([moe], base, out)),
        (ExpertError, "given twice: nature", lambda: extract([*one, *one], base, out)),
        (ExpertError, "nothing to extract", lambda: extract([*one, same], base, out)),
        (DataError, "data prepare", lambda: extract(one, base, out, report_ranks=[2], data=tmp_path)),
        (PackError, "no expert 'x': it has nature, craft, mind, base", lambda: collapse(moe, out, expert="x")),
        (PackError, "choose one with --expert, among nature", lambda: collapse(tmp_path / "pack", out)),
        (
            PackError,
            "no expert 'x': it has nature, craft, mind, base",
            lambda: collapse(tmp_path / "pack", out, expert="x"),
        ),
        (PackError, "no expert 'x': it has nature", lambda: collapse(shop.ffn[0], out, expert="x")),
        (PackError, "is a pack of adapters", lambda: export_mixtral(tmp_path / "pack", out)),
        (ExpertError, "pack is no expert", lambda: extract([tmp_path / "pack"], base, out)),
        (PackError, "leave --base out", lambda: collapse(moe, out, expert="mind", base=base)),
        (PackError, "num_local_experts 4, and names 2", lambda: collapse(few, out, expert="craft")),
        (ExpertError, "lacks .*layers.2.mlp.up_proj.lora_A", lambda: build_pack(base, lacking, shop.domains, out)),
        (ExpertError, "trains model.layers.9.*lacks", lambda: build_pack(base, more, shop.domains, out)),
        (ExpertError, "kind ffn, which a pack cannot", lambda: build_pack(base, shop.ffn, shop.domains, out)),
        (
            PackError,
            r"q_proj.weight has shape \(31, 32\), .* says \(32, 32\)",
            lambda: collapse(narrow, out, expert="mind"),
        ),
        (PackError, "holds model.extra.weight, which", lambda: collapse(extra, out, expert="mind")),
        (PackError, "no tensor model.norm.weight", lambda: export_mixtral(bare, out, data=entries)),
        (ExpertError, "layers.1.mlp.down_proj.weight holds values", lambda: collapse(infinite, out, expert="craft")),
        (PackError, "names the experts nature, nature", lambda: collapse(double, out, expert="mind")),
        (PackError, "neither a MoE", lambda: collapse(shop.domains, out)),
        (ExpertError, "add --base", lambda: collapse(plain, out)),
        (RecipeError, "dtype is 'int8'", lambda: collapse(moe, out, expert="mind", dtype="int8")),
        (PackError, "attention_bias = True, and Mixtral has no", lambda: export_mixtral(biased, out, data=entries)),
        (RecipeError, "has 3 experts", lambda: export_mixtral(moe, out, top_k=4, data=entries)),
        (PackError, "'llama'; a MoE", lambda: export_mixtral(shop.base, out)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words) as refusal:
            call()
        assert "\n" not in str(refusal.value)
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))


def test_probes_are_spread_over_a_split(entries: Path) -> None:
    found = probe_entries(entries, "train", 10)
    everything = probe_entries(entries, "train", 1000)
    assert len(found) == 10 < len(everything)
    assert found == [everything[i * len(everything) // 10] for i in range(10)]
    assert len(probe_entries(None, "valid", 3)) == 3


def test_the_code_on_a_card_runs(
    shop: SimpleNamespace, moe: Path, entries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(moe, tmp_path / "moe")
    collapse(moe, tmp_path / "dense", expert="mind")
    export_mixtral(moe, tmp_path / "mixtral", data=entries)
    build_pack(str(shop.base), shop.lora, shop.domains, tmp_path / "pack")
    collapse(tmp_path / "pack", tmp_path / "merged", expert="mind")
    monkeypatch.chdir(tmp_path)
    for name in ("moe", "dense", "mixtral", "merged"):
        code = (tmp_path / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert "What is the definition of" in code
        exec(code, {})
