"""vLLM behind our router: what it is asked for, what it is not given. Where it is installed, its own readers are the
oracle; where a GPU is, its texts are."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import DOMAINS, PROMPTS, make_lora, scaled_base, workshop
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st

from lora_lexicon.compose.extract import extract
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.embed import BaseEmbedder
from lora_lexicon.errors import LexiconError, PackError, RecipeError
from lora_lexicon.experts.base import load_base, load_bottom
from lora_lexicon.experts.checkpoint import load_adapter, read_adapter_config
from lora_lexicon.experts.lora import Factors, LoadedAdapter
from lora_lexicon.inference import engine
from lora_lexicon.inference.batch import end_tokens
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.inference.vllm_engine import (
    PROJECTIONS,
    RANKS,
    Front,
    Order,
    check_servable,
    define,
    open_front,
    options,
    sampling,
    serve_command,
)
from lora_lexicon.packs.pack import build_pack

SHORT = Decoding(max_new_tokens=6)
MANY = [*PROMPTS, *((word, f"one {word} here") for word in WORDS)]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"))
    shop.pack = shop.folder / "pack"
    build_pack(str(tiny_base), shop.lora, shop.domains, shop.pack, include_base=True)
    return shop


@pytest.fixture(scope="module")
def front(shop: SimpleNamespace) -> Front:
    return open_front(str(shop.pack))


class OurEngine:
    """Carries orders out with our own engine: expert n - 1 for the adapter n, nothing for 0."""

    def __init__(self, system: System) -> None:
        self.system, self.seen = system, []

    def write(self, orders: Sequence[Order], decoding: Decoding) -> list[list[int]]:
        self.seen = list(orders)
        weights = np.concatenate([np.zeros((1, len(DOMAINS))), np.eye(len(DOMAINS))]).astype(np.float32)
        uniform = np.full(decoding.max_new_tokens, 0.5)
        rows = [engine.Row(order.tokens, weights[order.adapter], uniform, decoding) for order in orders]
        engine.write(self.system, rows)
        return [row.written for row in rows]


@pytest.mark.parametrize("abstain", [0.0, 1.0])
def test_orders_carried_out_are_what_our_engine_defines(shop: SimpleNamespace, front: Front, abstain: float) -> None:
    system = load_system(str(shop.pack), device="cpu")
    assert system.router is not None
    system.router = replace(system.router, abstain_quantile=abstain)
    system.look_for_experts()
    front = replace(front, router=system.router)
    ours = OurEngine(system)
    for asked, wanted in zip(define(front, ours, MANY, SHORT), engine.define(system, MANY, SHORT), strict=True):
        close = {name: pytest.approx(getattr(wanted, name), abs=1e-5) for name in ("similarity", "margin")}
        assert asdict(asked) == {**asdict(wanted), **close}
    served = {order.domain: order.adapter for order in ours.seen}
    assert served == {name: (("base", *DOMAINS).index(name)) for name in served}
    assert ("base" in served) == bool(abstain), "a prompt without an adapter, and only where the router abstains"
    assert len(set(served) - {"base"}) > 1


def test_what_vllm_is_asked_for_without_any_prompt_or_term(front: Front) -> None:
    assert define(front, OurEngine(None), []) == []  # type: ignore[arg-type]
    with pytest.raises(LexiconError, match="a term is empty"):
        define(front, OurEngine(None), [("apple", ""), (" ", "")])  # type: ignore[arg-type]


def test_a_definition_ends_where_our_engine_ends_it(shop: SimpleNamespace, front: Front, tmp_path: Path) -> None:
    assert front.ends == end_tokens(load_system(str(shop.pack)))
    base = Path(shutil.copytree(shop.base, tmp_path / "base"))
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    pack = tmp_path / "pack"
    build_pack(str(base), shop.lora, shop.domains, pack)
    assert open_front(str(pack)).ends == end_tokens(load_system(str(pack))) == {1, 7}
    (base / "generation_config.json").unlink()
    assert open_front(str(pack)).ends == end_tokens(load_system(str(pack)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_bottom_of_a_base_embeds_as_all_of_it(tiny_base: Path, tmp_path: Path, tied: bool) -> None:
    """To the bit, at every depth, pooled either way, alone and in batches."""
    whole = load_base(str(tiny_base if tied else scaled_base(tiny_base, tmp_path / "base")), device="cpu")
    encoder = PromptEncoder(whole.tokenizer)
    for layers in range(whole.layers + 1):
        kept = min(layers + 1, whole.layers)
        bottom = load_bottom(whole.path, kept)
        assert len(bottom.get_decoder().layers) == kept
        assert all("lm_head" not in name for name, _ in bottom.named_parameters())
        for pool in ("last", "mean"):
            wanted, found = (BaseEmbedder(m, encoder, layers, "f", pool) for m in (whole.model, bottom))
            for size in (1, 64):
                np.testing.assert_array_equal(
                    found.embed(MANY, batch_size=size), wanted.embed(MANY, batch_size=size), strict=True
                )


def test_the_front_routes_as_the_whole_pack_with_less_of_the_base(shop: SimpleNamespace, front: Front) -> None:
    routing, wanted = front.route(MANY), load_system(str(shop.pack), device="cpu").route(MANY)
    assert wanted is not None
    np.testing.assert_array_equal(routing.similarities, wanted.similarities)
    np.testing.assert_array_equal(routing.weights, wanted.weights)
    assert isinstance(front.embedder, BaseEmbedder)
    assert len(front.embedder.decoder.layers) == 2, "of three: the router reads one, and stops at the next"


@given(
    seed=st.integers(0, 2**32),
    terms=st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True),
)
def test_a_seed_is_the_request_s_own(seed: int, terms: list[str]) -> None:
    seeds = [Decoding(seed=s).seed_of(term, "c") % 2**63 for term in terms for s in (seed, seed + 1)]
    assert len(set(seeds)) == 4
    assert all(0 <= own < 2**63 for own in seeds)


def test_greedy_and_sampled_decoding_in_vllm_s_words() -> None:
    ending = {"stop_token_ids": [1, 7], "ignore_eos": True, "detokenize": False}
    assert sampling(Decoding(max_new_tokens=9), 3, {7, 1}) == {"temperature": 0.0, "max_tokens": 9, **ending}
    assert sampling(Decoding(method="sample", top_k=0), 3, {1, 7}) == {
        "temperature": 0.6,
        "top_k": 0,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "seed": 3,
        "max_tokens": 48,
        **ending,
    }
    for temperature in (0.001, 2.5):
        with pytest.raises(RecipeError, match=r"temperature is .* from 0\.01 to 2"):
            sampling(Decoding(method="sample", temperature=temperature), 3, {1})
        sampling(Decoding(temperature=temperature), 3, {1})  # greedy leaves it unread


def adapter(rank: int, layer: str = "model.layers.1.mlp.up_proj", **config: Any) -> tuple[LoadedAdapter, Any]:
    factors = Factors(torch.zeros(4, rank), torch.zeros(rank, 4), 1.0)
    return LoadedAdapter("craft", {layer: factors}), SimpleNamespace(**{"r": rank, "rank_pattern": None, **config})


@given(st.lists(st.integers(1, RANKS[-1]), min_size=1, max_size=4))
def test_the_rank_asked_for_is_the_least_that_holds_all(shop: SimpleNamespace, ranks: list[int]) -> None:
    adapters, configs = zip(*[adapter(rank) for rank in ranks], strict=True)
    found = check_servable(shop.router, adapters, configs, "bfloat16")
    assert found >= max(ranks)
    assert all(rank < max(ranks) for rank in RANKS if rank < found)


def test_what_vllm_cannot_serve_is_refused(shop: SimpleNamespace) -> None:
    def check(given: tuple[LoadedAdapter, Any], dtype: str = "float16", top_k: int = 1) -> int:
        return check_servable(replace(shop.router, top_k=top_k), [given[0]], [given[1]], dtype)

    assert check(adapter(8, rank_pattern={"up_proj": 100})) == 128
    cases: list[tuple[str, Callable[[], int]]] = [
        ("weighs 2 experts .*leave --backend out", lambda: check(adapter(8), top_k=2)),
        ("not in float32: add --dtype bfloat16", lambda: check(adapter(8), "float32")),
        ("'craft' has rank 513; vLLM takes at most 512", lambda: check(adapter(513))),
        ("'craft' has rank 600", lambda: check(adapter(8, rank_pattern={"up_proj": 600}))),
        ("'craft' changes lm_head;", lambda: check(adapter(8, "lm_head"))),
    ]
    for message, refused in cases:
        with pytest.raises(LexiconError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def test_only_whole_packs_are_opened(shop: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="vLLM serves packs alone"):
        open_front(str(shop.base))
    pack = Path(shutil.copytree(shop.pack, tmp_path / "pack"))
    file = pack / "adapters" / "mind" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(PackError, match="not the file that was packed"):
        open_front(str(pack))


def test_the_command_serves_each_adapter_under_its_domain(cli: Callable, shop: SimpleNamespace, front: Front) -> None:
    words = json.loads(cli("pack", "vllm", shop.pack, "--json").stdout)["command"]
    assert words == serve_command(front)
    assert words[:3] == ["vllm", "serve", str(shop.pack / "base")]
    assert words[-3:] == [f"{name}={shop.pack / 'adapters' / name}" for name in DOMAINS]
    assert words[words.index("--max-lora-rank") + 1] == str(options(front)["max_lora_rank"]) == "8"
    shown = cli("pack", "vllm", shop.pack, "--dtype", "float16")
    assert shown.stdout.startswith("vllm serve ")
    assert "--dtype float16" in shown.stdout
    with pytest.raises(PackError, match="a domain is called 'base'"):
        serve_command(replace(front, router=front.router.renamed(("base", "craft", "mind"))))


def test_define_refuses_what_the_backend_cannot_do(
    cli: Callable, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        result = cli("define", "apple", "--model", shop.pack, "--backend", "vllm", *arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
        return result.stderr

    assert "--best-of needs our own engine" in refused("--best-of", 4)
    assert "--quantize is of our own engine" in refused("--quantize", "nf4")
    monkeypatch.setattr("lora_lexicon.inference.vllm_engine.find_spec", lambda _: None)
    assert refused().endswith("run pip install 'lora-lexicon[vllm]'\n")
    monkeypatch.setattr("lora_lexicon.inference.vllm_engine.find_spec", lambda _: object())
    assert "not in float32" in refused()


def test_vllm_s_own_readers_take_what_we_write(
    shop: SimpleNamespace, front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed: its checks, its sampling parameters, and its scalings and factors of each layer."""
    pytest.importorskip("vllm")
    import vllm.lora.lora_model as reader
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    if not torch.cuda.is_available():
        monkeypatch.setattr(reader, "PIN_MEMORY", False)
    for decoding in (SHORT, Decoding(method="sample"), Decoding(method="sample", top_k=0, top_p=1.0)):
        taken = SamplingParams(**sampling(decoding, 2**63 - 1, front.ends))
        assert taken.stop_token_ids == sorted(front.ends)
        assert taken.max_tokens == decoding.max_new_tokens
    extract([shop.ffn[0]], str(shop.base), tmp_path / "cut", energy=0.9)  # ranks that differ from layer to layer
    attention = make_lora(shop.base, tmp_path / "all" / "wide", seed=3, rank=20, attention=True)
    for number, path in enumerate([*front.adapters.values(), tmp_path / "cut" / DOMAINS[0], attention], start=1):
        assert LoRARequest(path.name, number, str(path)).lora_int_id == number
        own, config = load_adapter(path), read_adapter_config(path)
        rank = check_servable(shop.router, [own], [config], "bfloat16")
        helper = PEFTHelper.from_local_dir(str(path), 256)
        helper.validate_legal(LoRAConfig(max_lora_rank=rank))
        read = reader.LoRAModel.from_local_checkpoint(
            str(path), set(PROJECTIONS), helper, lora_model_id=number, device="cpu", dtype=torch.float32
        )
        assert set(read.loras) == set(own.factors)
        for layer, factors in own.factors.items():
            its = read.loras[layer]
            assert torch.equal(its.lora_a, factors.a.T.float())
            assert torch.equal(its.lora_b, factors.b.T.float())
            assert its.scaling == pytest.approx(factors.scaling, rel=1e-12)
    LoRAConfig(**{name: value for name, value in options(front).items() if "lora" in name and name != "enable_lora"})


@pytest.mark.timeout(900)
def test_vllm_writes_what_our_engine_would() -> None:
    """On a GPU, with the pack that ships: each token that vLLM chose greedily is one of our engine's likeliest.

    It computes in bfloat16, so that near ties may fall the other way; another expert's, or the base's, tokens do not
    pass.
    """
    pytest.importorskip("vllm")
    if not torch.cuda.is_available():
        pytest.skip("vLLM needs a GPU")
    from lora_lexicon.inference.vllm_engine import VllmEngine

    front, decoding = open_front("tiny"), Decoding(max_new_tokens=16)
    prompts = [(word, f"the {word} is here") for word in WORDS]
    system = load_system("tiny", device="cpu")
    written: list[list[int]] = []

    class Recording:
        engine = VllmEngine(front, decoding)

        def write(self, orders: Sequence[Order], decoding: Decoding) -> list[list[int]]:
            written.extend(self.engine.write(orders, decoding))
            return written

    found, ours = define(front, Recording(), prompts, decoding), engine.define(system, prompts, decoding)
    assert [answer.domain for answer in found] == [answer.domain for answer in ours]
    weights = front.route(prompts).weights
    behind = [lead(system, front.encoder.prompt(*prompts[i]), written[i], weights[i]) for i in range(len(prompts))]
    assert max(behind) < 0.25, "nats behind the best token; bfloat16 has 8 bits"
    others = [lead(system, front.encoder.prompt(*prompts[i]), written[i], weights[i - 1]) for i in range(len(prompts))]
    assert max(others) > 0.25, "the measure tells experts apart"
    assert sum(f.text == o.text for f, o in zip(found, ours, strict=True)) > len(prompts) / 2


def lead(system: System, prompt: list[int], written: list[int], weights: np.ndarray) -> float:
    """By how much, in nats, the likeliest token was ahead of the one written, at worst."""
    ids = torch.tensor([[*prompt, *written]])
    with torch.no_grad(), system.routed(torch.from_numpy(weights[None])):
        logits = system.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return float((logits.amax(dim=1) - logits[torch.arange(len(written)), written]).max())
