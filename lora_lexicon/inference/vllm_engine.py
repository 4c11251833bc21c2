"""A pack whose base and adapters vLLM holds, with our router in front. Knows nothing of our own decoding.

The router chooses before vLLM sees a prompt; each prompt goes there as token ids, with the LoRARequest of its
domain, or with none where the router abstains. For the embedder `base` the bottom layers of the base are loaded
once more, on the CPU in float32: routing is that of our engine there.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_lexicon.compose.mixture import MANIFEST, base_of, read_pack
from lora_lexicon.compose.system import embedder_of, encoder_of, route_prompts
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.embed import Embedder
from lora_lexicon.domains.router import Router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.errors import LexiconError, MissingExtraError, PackError, RecipeError
from lora_lexicon.experts.base import base_folder, load_bottom, load_tokenizer, read_config
from lora_lexicon.experts.checkpoint import read_adapter_config
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.untrusted import generation_config
from lora_lexicon.inference.batch import ends_of
from lora_lexicon.inference.engine import GREEDY, Definition, Prompt, text_of
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.resources import find_system

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

# What vLLM 0.33 takes: `MaxLoRARanks` of its config/lora.py, but for 1; what its Llama applies adapters to, but for the
# embeddings and the head; what the kernels of its lora/ops/triton_ops compute in.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("bfloat16", "float16")
TEMPERATURES = (0.01, 2.0)  # it raises lower ones without a word to the caller, and refuses higher ones
SLOTS = 16  # adapters in one batch at most: each has its place in the card's memory


@dataclass(frozen=True)
class Order:
    """One prompt as vLLM gets it.

    Attributes:
        tokens: its token ids, `BOS prompt EOS`.
        domain: the adapter that serves it; "base" for none.
        adapter: the adapter's number, from 1 in the router's order; 0 for none.
        seed: of its own random numbers, 63 bits.
    """

    tokens: list[int]
    domain: str
    adapter: int
    seed: int


class Engine(Protocol):
    """What writes the definitions of orders."""

    def write(self, orders: Sequence[Order], decoding: Decoding) -> list[list[int]]:
        """The tokens of each, in the order given, the one that ends it included."""
        ...


@dataclass
class Front:
    """A pack without its base's upper layers: all that is needed to route, and to ask vLLM for the rest.

    Attributes:
        folder: the pack's, absolute.
        base: the folder of the base, absolute.
        rank: the `max_lora_rank` that its adapters need.
        ends: the tokens that end a definition.
    """

    folder: Path
    base: Path
    router: Router
    embedder: Embedder
    encoder: PromptEncoder
    ends: set[int]
    rank: int

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base's."""
        return self.encoder.tokenizer

    @property
    def adapters(self) -> dict[str, Path]:
        """{domain: its adapter's folder}, in the router's order."""
        return {name: self.folder / "adapters" / name for name in self.router.names}

    def route(self, prompts: Sequence[Prompt]) -> Routing:
        """The router's decision for (term, context) prompts, the same alone and among others."""
        return route_prompts(self.router, lambda some, size: self.embedder.embed(some, None, size), prompts)

    def orders(self, prompts: Sequence[Prompt], routing: Routing, decoding: Decoding = GREEDY) -> list[Order]:
        """What vLLM is asked for prompts that were routed so."""
        return [
            Order(self.encoder.prompt(*prompt), routing.name(i), int(best) + 1, decoding.seed_of(*prompt) % 2**63)
            for i, (prompt, best) in enumerate(zip(prompts, routing.top, strict=True))
        ]


def open_front(model: str, base: str | None = None, *, dtype: str = "bfloat16") -> Front:
    """A verified pack, its router and its tokenizer, ready to route.

    Args:
        model: a pack's folder, or a shipped pack's name.
        base: in place of the base that the pack names; it must be the same one.
        dtype: what vLLM will compute in.

    Raises:
        LexiconError: no pack, a damaged one, another base, or something that vLLM cannot serve.
    """
    folder = find_system(model)
    if folder is None or not (folder / MANIFEST).is_file():
        raise PackError(f"{model} is not a pack, and vLLM serves packs alone: make one with `compose adapters`")
    folder = folder.resolve()
    manifest, router, adapters = read_pack(folder)
    configs = [read_adapter_config(folder / "adapters" / adapter.name) for adapter in adapters]
    rank = check_servable(router, adapters, configs, dtype)
    path = base_folder(base_of(folder, manifest, base)).resolve()
    tokenizer = load_tokenizer(str(path))
    return Front(
        folder,
        path,
        router,
        _embedder(router, path, tokenizer, manifest.base_fingerprint),
        encoder_of(router, tokenizer),
        ends_of(tokenizer, generation_config(path, read_config(path))),
        rank,
    )


def check_servable(
    router: Router, adapters: Sequence[LoadedAdapter], configs: "Sequence[LoraConfig]", dtype: str
) -> int:
    """Refuses what vLLM cannot serve; returns the `max_lora_rank` that the adapters need.

    `rank_pattern`, `alpha_pattern` and rsLoRA it reads as PEFT does; the variants that it refuses are not read by
    `checkpoint.read_adapter_config` either.

    Args:
        adapters, configs: in the router's order.

    Raises:
        PackError: weighted experts, a rank that is too large, or a layer that it does not adapt.
        RecipeError: a number format that its LoRA kernels do not compute in.
    """
    if router.top_k > 1:
        raise PackError(
            f"the router weighs {router.top_k} experts for each prompt, and vLLM serves a request by one adapter: "
            "use our own engine (leave --backend out), or fit the domains with top_k=1"
        )
    if dtype not in DTYPES:
        raise RecipeError(f"vLLM computes adapters in bfloat16 or float16, not in {dtype}: add --dtype bfloat16")
    most = 0
    for adapter, config in zip(adapters, configs, strict=True):
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        if rank > RANKS[-1]:
            raise PackError(
                f"adapter {adapter.name!r} has rank {rank}; vLLM takes at most {RANKS[-1]}: use our own engine, or "
                "train it with a smaller one"
            )
        for layer in adapter.factors:
            if layer.rpartition(".")[2] not in PROJECTIONS:
                raise PackError(
                    f"adapter {adapter.name!r} changes {layer}; with vLLM only {', '.join(PROJECTIONS)} are served: "
                    "use our own engine"
                )
        most = max(most, rank)
    return next(rank for rank in RANKS if rank >= most)


def _embedder(router: Router, base: Path, tokenizer: "PreTrainedTokenizerBase", fingerprint: str) -> Embedder:
    """The router's own; `base` with the layers that it reads, and one above, at which it stops."""
    model: Any = None
    if router.embedder_name == "base":
        reads, total = router.embedder_identity.get("layers"), int(read_config(base)["num_hidden_layers"])
        model = load_bottom(base, min(max(reads, 0) + 1, total) if isinstance(reads, int) else 1)
    return embedder_of(router, model, tokenizer, fingerprint)


def options(front: Front, dtype: str = "bfloat16") -> dict[str, Any]:
    """The arguments of `vllm.LLM`, and as options those of `vllm serve`, but for the base."""
    count = len(front.router.names)
    return {
        "dtype": dtype,
        "enable_lora": True,
        "max_lora_rank": front.rank,
        "max_loras": min(count, SLOTS),
        "max_cpu_loras": count,
        "generation_config": "vllm",  # else the base's own defaults, such as a temperature, would come in
    }


def serve_command(front: Front, dtype: str = "bfloat16") -> list[str]:
    """The words of the `vllm serve` that serves the pack's adapters under their domains' names, the base as `base`.

    Raises:
        PackError: a domain has that name.
    """
    if "base" in front.router.names:
        raise PackError("a domain is called 'base', as vLLM would call the base: rename that domain")
    words = ["vllm", "serve", str(front.base), "--served-model-name", "base"]
    for name, value in options(front, dtype).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [*words, "--lora-modules", *(f"{name}={path}" for name, path in front.adapters.items())]


def sampling(decoding: Decoding, seed: int, ends: Collection[int]) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams` that decode as `decoding` says.

    The penalty, the temperature, top-k and top-p are applied in our engine's order, and the penalty to the same
    tokens. Random numbers are vLLM's own: samples of one seed are not ours.

    Raises:
        RecipeError: a temperature that vLLM does not take.
    """
    chosen: dict[str, Any] = {"temperature": 0.0}
    if decoding.method == "sample":
        low, high = TEMPERATURES
        if not low <= decoding.temperature <= high:
            raise RecipeError(
                f"decoding: temperature is {decoding.temperature}; with vLLM it must be from {low} to {high}"
            )
        chosen = {
            "temperature": decoding.temperature,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "repetition_penalty": decoding.repetition_penalty,
            "seed": seed,
        }
    # Ours end it, and no others: those that vLLM finds by itself it leaves out.
    ending = {"stop_token_ids": sorted(ends), "ignore_eos": True, "detokenize": False}
    return {**chosen, "max_tokens": decoding.max_new_tokens, **ending}


def define(front: Front, engine: Engine, prompts: Sequence[Prompt], decoding: Decoding = GREEDY) -> list[Definition]:
    """Defines each prompt, in the order given.

    Raises:
        LexiconError: an empty term.
    """
    if any(not term.strip() for term, _ in prompts):
        raise LexiconError("a term is empty: every request needs a term to define")
    if not prompts:
        return []
    routing = front.route(prompts)
    orders = front.orders(prompts, routing, decoding)
    written = engine.write(orders, decoding)
    return [
        Definition(
            term=prompts[i][0],
            context=prompts[i][1],
            text=text_of(front, written[i]),
            domain=order.domain,
            similarity=float(routing.similarities[i].max()),
            margin=float(routing.margin[i]),
            tokens=len(written[i]),
        )
        for i, order in enumerate(orders)
    ]


def need_vllm() -> None:
    """Raises MissingExtraError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingExtraError("--backend vllm", "vllm", "vllm")


class VllmEngine:
    """`vllm.LLM` with a pack's base and adapters.

    Raises:
        MissingExtraError: vLLM is not installed.
        PackError: vLLM refuses the base, or finds no card or no room on it.
    """

    def __init__(self, front: Front, decoding: Decoding = GREEDY, *, dtype: str = "bfloat16") -> None:
        need_vllm()
        # It logs to standard output, where the answers go, and tells its makers of its use, unless told not to.
        for name, value in (("VLLM_LOGGING_STREAM", "ext://sys.stderr"), ("VLLM_NO_USAGE_STATS", "1")):
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise LexiconError(f"vLLM is installed but cannot be imported: {' '.join(str(error).split())}") from error

        self.ends = front.ends
        self._requests: Mapping[int, Any] = {
            number: LoRARequest(name, number, str(path))
            for number, (name, path) in enumerate(front.adapters.items(), start=1)
        }
        try:
            self._llm: Any = LLM(
                model=str(front.base),
                max_model_len=front.encoder.max_length * 3 // 4 + decoding.max_new_tokens,
                **options(front, dtype),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise PackError(f"vLLM cannot serve {front.folder}: {' '.join(str(error).split())}") from error

    def write(self, orders: Sequence[Order], decoding: Decoding) -> list[list[int]]:
        """See `Engine`."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        answers = self._llm.generate(
            [TokensPrompt(prompt_token_ids=order.tokens) for order in orders],
            [SamplingParams(**sampling(decoding, order.seed, self.ends)) for order in orders],
            lora_request=[self._requests.get(order.adapter) for order in orders],
            use_tqdm=False,
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]
