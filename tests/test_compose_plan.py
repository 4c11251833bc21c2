"""compose/plan.py: transformers, PEFT, bitsandbytes, autograd and the files that `compose` writes are the oracles."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from composing import make_ffn, workshop
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.moe import LexiconMoeConfig, LexiconMoeForCausalLM
from lora_lexicon.compose.plan import cache_bytes, computes, fits, footprints, moe_parameters
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.cost import (
    BYTES,
    CARDS,
    MODULES,
    Card,
    Options,
    activation_bytes,
    adapter_parameters,
    base_bytes,
    check_options,
    find_card,
    head_bytes,
    nf4_bytes,
    trainings,
)
from lora_lexicon.experts.kernels import fused
from lora_lexicon.experts.shape import Shape, read_shape, shape_of
from lora_lexicon.packs.pack import build_pack
from lora_lexicon.recipe import TrainRecipe, load_recipe
from lora_lexicon.resources import find_recipe, packs, shapes

CLI = Callable[..., Result]
PUBLISHED = {  # parameters, as their checkpoints' metadata count them
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384,
}


def llama(**changes: Any) -> LlamaConfig:
    """A small Llama with GQA."""
    values = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**values, **changes})


def of(config: LlamaConfig) -> Shape:
    """The shape that is read from a config as transformers writes it."""
    return shape_of(json.loads(config.to_json_string(use_diff=False)), "config.json")


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def lora(model: nn.Module, options: Options, **changes: Any) -> Any:
    layers = list(options.layers or range(model.config.num_hidden_layers))  # type: ignore[union-attr, arg-type]
    modules = list(MODULES[options.modules])
    config = LoraConfig(r=options.rank, target_modules=modules, layers_to_transform=layers, **changes)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for file in folder.rglob("*.safetensors") for tensor in load_file(file).values())


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    groups, shared, head = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 8))
    return llama(
        vocab_size=draw(st.integers(8, 200)),
        hidden_size=groups * shared * draw(st.integers(2, 12)),
        intermediate_size=draw(st.integers(8, 90)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=groups * shared,
        num_key_value_heads=groups,
        head_dim=head,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(configs(), st.data())
def test_parameters_are_those_of_the_real_models(config: LlamaConfig, data: st.DataObject) -> None:
    shape = of(config)
    options = Options(
        experts=data.draw(st.integers(1, 4)),
        rank=data.draw(st.integers(1, 2)),
        modules=data.draw(st.sampled_from(["ffn", "all"])),
        layers=tuple(sorted(data.draw(st.sets(st.integers(0, shape.layers - 1), min_size=1)))),
        keep_base=data.draw(st.booleans()),
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        ffns = [base.model.layers[i].mlp for i in options.layers or ()]
        assert shape.parameters == count(base.parameters())
        assert trainings(shape, options)[0].trained == sum(count(ffn.parameters()) for ffn in ffns)
        if not config.mlp_bias:  # which transformers' experts lack
            own = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype", "architectures")}
            experts, layers = options.experts + options.keep_base, list(options.layers or ())
            moe = LexiconMoeForCausalLM(LexiconMoeConfig(**own, num_local_experts=experts, expert_layers=layers))
            assert moe_parameters(shape, options) == count(moe.parameters())
        adapted = lora(base, options)
        trained = count(p for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(shape, options.rank, options.modules, len(options.layers or ())) == trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_that_compose_writes(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    shop, shape = workshop(tiny_base, tmp_path), read_shape(str(tiny_base))
    options = Options(experts=3, rank=4, layers=(1, 2), keep_base=True, dtype=dtype)
    merged = next(row for row in footprints(shape, options) if row.name == "merged MoE")
    record = compose_moe(
        str(tiny_base), shop.ffn, shop.domains, tmp_path / "moe", keep_base=True, dtype=dtype, max_shard_bytes=40_000
    )
    router = tensor_bytes(shop.domains)
    assert merged.ship == merged.disk == record["bytes"] == tensor_bytes(tmp_path / "moe") - router
    assert merged.trained == record["trained_parameters"]
    if dtype == "float32":  # which the experts here are held in
        adapters = footprints(shape, options)[1]
        build_pack(str(tiny_base), shop.lora, shop.domains, tmp_path / "pack", include_base=True)
        assert adapters.ship == tensor_bytes(tmp_path / "pack" / "adapters")
        assert adapters.disk == tensor_bytes(tmp_path / "pack") - router
        assert adapters.domain == tensor_bytes(shop.lora[0])
        assert merged.domain == tensor_bytes(make_ffn(tiny_base, tmp_path / "one", seed=0))


def test_known_shapes_have_their_published_size() -> None:
    assert {name: read_shape(name).parameters for name in shapes()} == PUBLISHED


def test_llama_3_8b(cli: CLI) -> None:
    made = json.loads(cli("plan", "llama-3-8b", "--json").stdout)
    merged, adapters = made["footprint"][:2]
    ffn = made["shape"]["ffn"]
    assert [round(n / 1e9, 2) for n in (ffn, made["shape"]["parameters"] - ffn)] == [5.64, 2.39]
    assert (round(merged["parameters"] / 1e9, 1), round(merged["ship"] / 1e9, 1)) == (24.9, 49.9)
    assert (round(adapters["ship"] / 1e6), round(adapters["disk"] / 1e9, 1)) == (226, 16.3)
    assert (round(made["training"][2]["trained"] / 1e6, 1), round(adapters["domain"] / 1e6)) == (28.3, 57)
    every = json.loads(cli("plan", "llama-3-8b", "--modules", "all", "--json").stdout)["footprint"][1]
    assert round(every["domain"] / 1e6) == 84


def test_nf4_bytes_are_bitsandbytes(tiny_base: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for rows, columns in ((32, 48), (7, 9), (64, 64)):
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
        absmax = layer.weight.quant_state.absmax
        assert nf4_bytes(rows * columns) == layer.weight.nbytes + absmax.nbytes
    model = load_base(str(tiny_base), device="cpu", quantize="nf4").model
    scales = sum(p.quant_state.absmax.nbytes for p in model.parameters() if hasattr(p, "quant_state"))
    assert base_bytes(read_shape(str(tiny_base)), "float32", "nf4") == scales + sum(
        p.nbytes for p in model.parameters()
    )


def test_int8_bytes_are_bitsandbytes(tiny_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_base(str(tiny_base), device="cpu", quantize="int8").model
    scales = sum(p.SCB.nbytes for p in model.parameters() if getattr(p, "SCB", None) is not None)
    assert scales
    assert base_bytes(read_shape(str(tiny_base)), "float32", "int8") == scales + sum(
        p.nbytes for p in model.parameters()
    )


def test_optimizer_states_are_the_optimizers() -> None:
    shape = of(llama())
    plain, eight = trainings(shape, Options())[:2]
    bnb = pytest.importorskip("bitsandbytes")
    for row, kind in ((plain, torch.optim.AdamW), (eight, bnb.optim.AdamW8bit)):
        weight = nn.Parameter(torch.ones(128, 256))
        weight.grad = torch.ones_like(weight)
        optimizer = kind([weight])
        optimizer.step()
        held = [
            t
            for name, t in optimizer.state[weight].items()
            if torch.is_tensor(t) and t.numel() > 1 and "qmap" not in name
        ]  # the maps of the 8-bit codes are one for all
        assert sum(t.nbytes for t in held) / weight.numel() == pytest.approx(row.states / row.trained)
        assert row.gradients / row.trained == weight.grad.nbytes / weight.numel()


def _saved_by_a_layer(kind: str, options: Options, dtype: torch.dtype) -> float:
    """Bytes that autograd keeps a layer, parameters' own storages left out: a difference, so that the ends cancel."""
    held = []
    for layers in (2, 4):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama(num_hidden_layers=layers)).to(dtype).requires_grad_(False)
        if kind == "ffn":
            for layer in model.model.layers:
                layer.mlp.float().requires_grad_(True)  # type: ignore[operator, union-attr]
        else:
            model = lora(model, options, lora_dropout=0.1)
        trained = {p.shape[::-1] for p in model.parameters() if p.requires_grad}
        trained |= {p.shape for p in model.parameters() if p.requires_grad}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor, own: set = own, found: dict = found, trained: set = trained) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.shape not in trained:  # a weight's copy counts as weight
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(0, 96, (options.batch, options.length))
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            fused(model),  # type: ignore[arg-type]
        ):
            output = model.train()(input_ids=ids)  # held, so that no storage is used twice
        held.append(sum(found.values()))
        del output
    return (held[1] - held[0]) / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "modules"), [("ffn", "ffn"), ("lora", "ffn"), ("lora", "all")])
def test_activations_are_what_autograd_keeps(kind: Any, modules: Any, dtype: str) -> None:
    options = Options(batch=3, length=32, rank=4, modules=modules, dtype=dtype)
    shape, tokens = of(llama()), 3 * 32
    ours = (activation_bytes(shape, options, kind) - head_bytes(shape, options)) / shape.layers
    kept = _saved_by_a_layer(kind, options, getattr(torch, dtype))
    if kind == "lora":  # dropout's masks are a byte an element on a GPU, a float32 on a CPU
        ours += 3 * tokens * sum(shape.matrices[name][0] for name in MODULES[modules])
    assert ours == kept


@pytest.mark.parametrize(("tied", "first"), [(False, 0), (True, 0), (False, 2)])
@pytest.mark.parametrize("kind", ["ffn", "lora"])
def test_flops_are_what_torch_counts(kind: str, tied: bool, first: int) -> None:
    config = llama(num_hidden_layers=8, tie_word_embeddings=tied, vocab_size=512)
    shape, options = of(config), Options(batch=1, length=32, rank=4, layers=tuple(range(first, 8)))
    model = LlamaForCausalLM(config).requires_grad_(False)
    if kind == "ffn":
        for layer in model.model.layers[first:]:
            layer.mlp.requires_grad_(True)  # type: ignore[union-attr]
    else:
        model = lora(model, options)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits.sum().backward()
    products = [n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)]
    counted = sum(products) / 32
    ours = trainings(shape, options)[0 if kind == "ffn" else 2].token_flops
    # The lowest layer with experts needs no gradient below them, which the plan does not take off.
    assert counted <= ours <= counted + 2 * shape.layer + 2 * shape.layers * 3 * shape.hidden


def test_cache_bytes_are_transformers() -> None:
    config, shape = llama(), of(llama())
    cache = LlamaForCausalLM(config)(torch.zeros(3, 7, dtype=torch.long), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(shape, "float32", 3 * 7) == held


@settings(max_examples=40, deadline=None)
@given(configs(), st.floats(1e4, 1e7), st.integers(1, 40), st.booleans())
def test_the_most_rows_fit_and_one_more_does_not(config: LlamaConfig, memory: float, batch: int, lean: bool) -> None:
    shape, options = of(config), Options(rank=1, batch=batch, length=4, checkpointing=lean)
    for job in fits(shape, options, Card(memory)):
        rows = job.rows_checkpointed if lean and job.rows_checkpointed is not None else job.rows
        for tried, fitting in ((rows, True), (rows + 1, False)):
            if tried:
                again = next(f for f in fits(shape, replace(options, batch=tried), Card(memory)) if f.job == job.job)
                assert again.fits is fitting


def test_gpu_hours() -> None:
    shape, card = read_shape("llama-3-8b"), find_card("H100")
    options = Options(experts=4)
    one, three = (computes(shape, options, 1e8, card.peak, cards, 0.4) for cards in (1, 3))
    for alone, together in zip(one, three, strict=True):
        assert alone.gpu_hours == together.gpu_hours == alone.hours
        assert alone.flops == 1e8 * alone.token_flops == pytest.approx(alone.gpu_hours * 3600 * 0.4 * 989e12)  # type: ignore[operator]
        assert together.hours == pytest.approx(alone.hours / 2)  # type: ignore[operator]  # 3 cards, then 1
    assert one[2].token_flops < one[0].token_flops
    assert computes(shape, options, 1e8, None, 1, 0.4)[0].gpu_hours is None
    assert 4.2e18 / (291 * 3600 * 989e12) < 0.01  # the paper's, as docs/plan.md says
    assert (find_card("24 GiB").memory, find_card("rtx 4090")) == (24 * 2**30, CARDS["rtx-4090"])


@pytest.mark.parametrize(("name", "row", "card"), [("ffn", 1, "h100"), ("lora", 2, "24GB"), ("lora-nf4", 3, "12GB")])
def test_shipped_recipes_fit_the_cards_they_name(name: str, row: int, card: str) -> None:
    recipe = load_recipe(TrainRecipe, find_recipe(f"llama-3-8b/{name}"))
    options = Options(
        rank=recipe.rank,
        layers=tuple(range(recipe.first_layer, read_shape("llama-3-8b").layers)),
        dtype=recipe.dtype,
        batch=recipe.batch_size,
        length=recipe.max_length,
        checkpointing=recipe.gradient_checkpointing,
    )
    shape = read_shape("llama-3-8b")
    planned = trainings(shape, options)[row].name
    assert next(f for f in fits(shape, options, find_card(card)) if f.job == f"train {planned}").fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-3-8b", "--experts", "0"], "experts is 0"),
        (["llama-3-8b", "--rank", "0"], "rank is 0"),
        (["llama-3-8b", "--rank", "5000"], "has rank 4096"),
        (["llama-3-8b", "--rank", "1025", "--modules", "all"], "has rank 1024"),
        (["llama-3-8b", "--extract-rank", "9999"], "has rank 4096"),
        (["llama-3-8b", "--layers", "8-32"], "layers 0 to 31"),
        (["llama-3-8b", "--modules", "head"], "ffn, all"),
        (["llama-3-8b", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["llama-3-8b", "--gpu", "rtx-4099"], "did you mean 'rtx-4090'"),
        (["llama-3-8b", "--gpu", "0GB"], "24GB"),
        (["llama-3-8b", "--tokens", "nan"], "must be positive"),
        (["llama-3-8b", "--tokens", "1e8", "--utilisation", "2"], "at most 1"),
        (["llama-3-8b", "--tokens", "1e8", "--gpus", "0"], "gpus is 0"),
        (["llama-3-8b", "--tokens", "1e8", "--peak", "-1"], "must be positive"),
        (["llama-9"], "llama-3-8b"),
        (["nobody/nothing"], "check the name and the network"),
    ],
)
def test_nonsense_is_one_clear_line(cli: CLI, arguments: list[str], message: str) -> None:
    result = cli("plan", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "only Llama-architecture"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
    ],
)
def test_a_config_that_is_no_llama_is_refused(cli: CLI, tmp_path: Path, change: dict, message: str) -> None:
    config = json.loads(shapes()["llama-3.2-1b"].read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    result = cli("plan", tmp_path)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_base_is_named_in_any_way(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(shapes()["llama-3.2-1b"].read_text())  # no weights beside it
    named = [read_shape(str(base)) for base in (tmp_path, tmp_path / "config.json", "llama-3.2-1b")]
    assert named[0] == named[1] == named[2]
    check_options(named[0], Options(dtype="float16"))
    tables = cli("plan", "tiny", "--gpu", "rtx-3090", "--tokens", "1e6", "--dtype", "bfloat16")
    assert tables.exit_code == 0
    assert all(word in tables.stdout for word in ("merged MoE", "at most", "checkpointing", "GPU-hours"))
    assert "on 1e+06 tokens, 3 epochs: 3e+06 read" in tables.stdout
    assert base_bytes(read_shape("tiny"), "bfloat16") == tensor_bytes(packs()["tiny"] / "base")


def test_gpu_hours_need_a_peak_not_a_name(cli: CLI) -> None:
    def hours(*words: str) -> float | None:
        return json.loads(cli("plan", "llama-3-8b", "--tokens", "1e8", *words, "--json").stdout)["compute"][0][
            "gpu_hours"
        ]

    assert hours("--peak", "989") == hours("--gpu", "h100") == hours("--gpu", "h100", "--peak", "989")
    assert hours("--gpu", "24GB") is hours("--gpu", "h100", "--dtype", "float32") is None
    assert hours("--peak", "67", "--dtype", "float32") is not None
    assert "--peak" in cli("plan", "llama-3-8b", "--tokens", "1e8").stderr


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from lora_lexicon.cli.main import app\n"
        "assert CliRunner().invoke(app, ['plan', 'llama-3-8b', '--gpu', 'h100']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_dtype_has_its_size() -> None:
    assert {name: getattr(torch, name).itemsize for name in BYTES} == BYTES
