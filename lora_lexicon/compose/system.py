"""One interface to whatever can define a word: a base, one expert, a MoE, a mixture, a Mixtral.

Knows how to load each and to set its routing; decoding and scores are other layers' work.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lora_lexicon.compose.collapse import BASE, MoeFiles
from lora_lexicon.compose.merge import MOE_RECORD
from lora_lexicon.compose.mixture import MANIFEST, Mixture, load_mixture
from lora_lexicon.compose.moe import Gate, LexiconMoeForCausalLM, own_embedder, settled
from lora_lexicon.compose.policy import MOE_TYPE, Level
from lora_lexicon.compose.standard import COLLAPSE_RECORD, EXPORT_RECORD, record_of
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.embed import FIT_BATCH, BaseEmbedder, Embedder, Prompt
from lora_lexicon.domains.router import Router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.domains.vectors import Vectors
from lora_lexicon.errors import LexiconError, PackError, RecipeError, RouterError
from lora_lexicon.experts.base import Base, Quantize, load_base
from lora_lexicon.experts.checkpoint import CONFIG, JOURNAL, RECORD, check_base, install_ffn, load_adapter, read_expert
from lora_lexicon.experts.grouped import GroupedLinear, group_adapters
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.resident import Residents, Source
from lora_lexicon.experts.routed import ActiveRouting
from lora_lexicon.experts.tensors import ITEM_BYTES, Checkpoint, torch_dtype
from lora_lexicon.folders import folder_bytes, read_record
from lora_lexicon.resources import find_system

Embed = Callable[[Sequence[Prompt], int], Vectors]
Kind = Literal["base", "expert", "moe", "mixture"]
MIXTRAL = "mixtral"  # chooses experts for each token by itself, `compose export` writes it
FUSED = (MOE_TYPE, MIXTRAL)  # whose experts bitsandbytes cannot quantise
ROUNDING = 1e-4  # two cosines closer than this may change places with the batch's shape; scores, by their scale


@dataclass
class System:
    """A loaded model with all that is needed to route and to decode.

    Attributes:
        kind: an `expert` answers under its own name; so do an expert that was collapsed, and a Mixtral.
        experts: the router's domains in the order of the routing weights; () for a base or one expert.
        active: where the routing of the batch in flight is set; None without experts.
        ship_bytes: what is shipped beside the base (for a base or a MoE: all of it).
        base: the name of the base it is, lies on or was made of; "" where that is not known.
        base_fingerprint: that base's, likewise.
        residents: which experts are in memory, where they come on demand; None: all of them are.
        routes_in_passing: a pass that reads prompts can route them on its way: the router takes one expert, by states
            of this model below all experts, and all of these are in memory.
    """

    name: str
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    experts: tuple[str, ...] = ()
    router: Router | None = None
    embedder: Embedder | None = None
    active: ActiveRouting | None = None
    ship_bytes: int = 0
    trained_parameters: int = 0
    base: str = ""
    base_fingerprint: str = ""
    residents: Residents | None = None
    routes_in_passing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.look_for_experts()

    @property
    def memory_bytes(self) -> int:
        """Parameters and buffers in memory, shared ones once, and the scales of quantised ones."""
        tensors = {t.data_ptr(): t for t in [*self.model.parameters(), *self.model.buffers()]}
        for parameter in self.model.parameters():
            state, rows = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)  # 4 bits, 8 bits
            scales = [state.absmax] if state is not None else [rows] if rows is not None else []
            tensors |= {scale.data_ptr(): scale for scale in scales}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def routing_level(self) -> Level:
        """What experts are chosen for: each token, or a prompt, by gates (sequence) or by the router (domain)."""
        return self.model.policy.level if isinstance(self.model, LexiconMoeForCausalLM) else "domain"

    def embed(self, prompts: Sequence[Prompt], batch_size: int = 1) -> Vectors | None:
        """The (n, d) vectors that the router reads; None without a router."""
        if self.embedder is None:
            return None
        if not isinstance(self.model, LexiconMoeForCausalLM):
            return self.embedder.embed(prompts, None, batch_size)
        with self.model.as_base():
            return self.embedder.embed(prompts, None, batch_size)

    def choose(self, prompts: Sequence[Prompt]) -> tuple[NDArray[np.float32] | None, Routing | None]:
        """(the weights of the experts for each prompt, the router's decision that they are).

        Weights are (n, N), or (n, L, N) where sequence gates choose; then no router does. Both are None where there
        is nothing to choose, or each token does.
        """
        if not prompts or self.routing_level == "token":
            return None, None
        if self.routing_level == "domain":
            routing = self.route(prompts)
            return (None, None) if routing is None else (routing.weights, routing)
        moe = cast(LexiconMoeForCausalLM, self.model)
        return moe.route_prompts([self.encoder.prompt(*prompt) for prompt in prompts]).cpu().numpy(), None

    def route(self, prompts: Sequence[Prompt]) -> Routing | None:
        """The router's decision for (term, context) prompts, see `route_prompts`; None without a router."""
        if self.router is None or self.embedder is None:
            return None
        return self._settled(route_prompts(self.router, cast(Embed, self.embed), prompts))

    def _settled(self, routing: Routing) -> Routing:
        if isinstance(self.model, LexiconMoeForCausalLM):
            return settled(routing, self.model.active.keep_base)
        return routing

    def look_for_experts(self) -> None:
        """Sets `routes_in_passing`; to be called when the model got other experts."""
        self.routes_in_passing = False
        if self.residents is not None:
            return
        router, level = self.router, self.routing_level
        if isinstance(self.embedder, BaseEmbedder) and router is not None and takes_one(router) and level == "domain":
            layers, read = self.embedder.decoder.layers, self.embedder.layers
            below = (module for layer in layers[:read] for module in layer.modules())
            self.routes_in_passing = read < len(layers) and not any(isinstance(m, GroupedLinear | Gate) for m in below)

    @contextmanager
    def routing_in_passing(
        self, rows: Sequence[Sequence[int]], weights: Sequence[NDArray[np.float32] | None]
    ) -> Iterator[list[Routing]]:
        """Inside, one pass that reads B encoded prompts, padded on the left, routes them at the router's layer.

        It goes on with the experts chosen there: the same as `route` would choose. Only where `routes_in_passing`.

        Args:
            weights: (N,) for each prompt that is not to be routed.

        Yields:
            a list that then holds the decision for the others, in order.
        """
        embedder, active, thread = cast(BaseEmbedder, self.embedder), cast(ActiveRouting, self.active), _thread()
        asked = [i for i, own in enumerate(weights) if own is None]
        prompts = [rows[i] for i in asked]
        found: list[Routing] = []

        def decide(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if _thread() != thread:  # which embeds with the same model
                return
            hook.remove()  # before a prompt is embedded by itself
            states = arguments[0] if arguments else keywords["hidden_states"]
            routing = self._settled(
                decided(
                    cast(Router, self.router),
                    embedder.pooled(prompts, states if len(asked) == len(rows) else states[asked]),
                    lambda close: embedder.embed_ids([prompts[i] for i in close]),
                )
            )
            found.append(routing)
            chosen = dict(zip(asked, routing.weights, strict=True))
            every = [chosen[i] if own is None else own for i, own in enumerate(weights)]
            active.set(torch.from_numpy(np.stack(every)).to(states.device))

        hook = embedder.decoder.layers[embedder.layers].register_forward_pre_hook(decide, with_kwargs=True)
        try:
            with active.using(None):
                yield found
        finally:
            hook.remove()

    def token_gates(self) -> AbstractContextManager[list[Tensor]]:
        """A list that token gates fill, inside the block, with their logits (B, T, N); it stays empty without any."""
        if self.routing_level == "token":
            return cast(LexiconMoeForCausalLM, self.model).active.recording()
        return nullcontext([])

    def routed(self, weights: Tensor | None) -> AbstractContextManager[None]:
        """Sets the routing, (B, N) or (B, L, N), of the forward passes inside; nothing where there are no experts.

        Raises:
            LexiconError: experts come on demand, and there is no room for these at once, or one cannot be loaded.
        """
        if weights is None or self.active is None:
            return nullcontext()
        if self.residents is not None:
            self.residents.hold_weighted(weights)
        return self.active.using(weights)


_thread = threading.get_ident


def route_prompts(router: Router, embed: Embed, prompts: Sequence[Prompt]) -> Routing:
    """The router's decision for (term, context) prompts, the same alone and among others.

    For a router that takes one expert prompts are embedded in batches. Soft weights and thresholds need every prompt by
    itself.

    Args:
        embed: (prompts, how many are computed together) -> (n, d) vectors of the router's own embedder.
    """
    vectors = embed(prompts, FIT_BATCH if takes_one(router) else 1)
    return decided(router, vectors, lambda close: embed([prompts[i] for i in close], 1))


def takes_one(router: Router) -> bool:
    """Whether a router takes one expert, so that rounding seldom changes a choice."""
    return router.top_k == 1 and router.abstain_quantile == 0


def decided(router: Router, vectors: Vectors, again: Callable[[list[int]], Vectors]) -> Routing:
    """The decision for vectors (n, d); `again` embeds by themselves those whose choice rounding could change."""
    routing = router.route(vectors)
    close = np.flatnonzero(routing.margin < ROUNDING * router.scale).tolist() if takes_one(router) else []
    if close:
        vectors[close] = again(close)
        routing = router.route(vectors)
    return routing


def load_system(
    path: str,
    *,
    base: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    quantize: Quantize = "none",
    routing: str | None = None,
    expert_memory: int | None = None,
    loaded: Base | None = None,
) -> System:
    """Loads a pack, a MoE, an expert, a Mixtral or a base: a folder, a shipped pack's name, or a base's Hub name.

    Args:
        base: in place of the base that the pack or the expert names; it must be the same one.
        routing: a MoE's routing policy in place of its own (see `compose.policy`).
        expert_memory: bytes for a pack's adapters in memory, which then come on demand (see `experts.resident`).
        loaded: a pack's base, in memory: another system on it makes room, and can be used no more.

    Raises:
        LexiconError: nothing of the kind, a damaged file, or parts that do not fit.
    """
    folder = find_system(path)
    if folder is not None and (folder / MANIFEST).is_file():
        options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
        return _mixture(load_mixture(folder, base, **options, expert_memory=expert_memory, loaded=loaded), folder)
    if expert_memory is not None:
        raise RecipeError(f"{path} is no pack, whose experts alone come on demand: leave out the memory for experts")
    if loaded is not None:
        raise PackError(f"{path} is no pack: only packs are put on a base that is loaded")
    if folder is not None and ((folder / RECORD).is_file() or (folder / CONFIG).is_file()):
        return _expert(folder, base, dtype, device, quantize)
    if folder is not None and quantize != "none" and _model_type(folder) in FUSED:
        raise PackError(f"{folder} is a MoE, whose fused experts bitsandbytes cannot quantise: load it without")
    if folder is not None and _model_type(folder) == MOE_TYPE:
        return load_moe(folder, dtype=dtype, device=device, routing=routing)
    if routing is not None:
        raise RecipeError(f"{path} is no MoE made by `compose moe`: it takes no routing policy")
    if folder is not None and _model_type(folder) == MIXTRAL:
        return _mixtral(folder, dtype, device)
    if folder is not None and not (folder / "config.json").is_file():
        raise PackError(f"{folder} is neither a pack, an expert, a MoE nor a base: it has none of their records")
    loaded = load_base(path, dtype=dtype, device=device, quantize=quantize)
    collapsed = record_of(loaded.path, COLLAPSE_RECORD)
    return System(
        name=loaded.path.resolve().name if folder is not None else Path(path).name,
        kind="expert" if collapsed.get("expert", BASE) != BASE else "base",
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        encoder=PromptEncoder(loaded.tokenizer),
        ship_bytes=folder_bytes(loaded.path),
        trained_parameters=int(collapsed.get("trained_parameters", 0)),
        base=path,
        base_fingerprint=loaded.fingerprint,
    )


def has_base(path: str) -> bool:
    """Whether what `load_system` would load there is a base, or lies on one, so that it can be quantised."""
    folder = find_system(path)
    return folder is None or _model_type(folder) not in FUSED


def _model_type(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return ""
    return str(read_record(folder / "config.json", PackError, "a model").get("model_type"))


def encoder_of(router: Router, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    """Prompts as the router's embedder read them, so that experts and router see the same."""
    return PromptEncoder(tokenizer, router.template)


def embedder_of(router: Router, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str) -> Embedder:
    """The router's own embedder, checked."""
    if router.embedder_name == "base":
        embedder: Embedder = own_embedder(router, model, tokenizer, base)
    else:
        from lora_lexicon.domains.embedders import restore_embedder

        embedder = restore_embedder(router)
    router.check(embedder)
    return embedder


def _mixture(mixture: Mixture, folder: Path) -> System:
    loaded, router = mixture.base, mixture.router
    return System(
        name=mixture.manifest.name,
        kind="mixture",
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        encoder=encoder_of(router, loaded.tokenizer),
        experts=router.names,
        router=router,
        embedder=embedder_of(router, loaded.model, loaded.tokenizer, loaded.fingerprint),
        active=mixture.active,
        ship_bytes=folder_bytes(folder) - (folder_bytes(folder / "base") if mixture.manifest.base_inside else 0),
        trained_parameters=parameters_of(mixture.adapters),
        base=loaded.name,
        base_fingerprint=loaded.fingerprint,
        residents=mixture.residents,
    )


def install(
    system: System, router: Router, adapters: Sequence[LoadedAdapter], newcomers: Sequence[Source] = ()
) -> None:
    """Puts another router and its domains' adapters, in its order, on a loaded mixture.

    Args:
        newcomers: where those come from that are new, where experts come on demand.

    Raises:
        ExpertError: an adapter that does not fit; the system is as it was.
    """
    assert system.active is not None
    if system.residents is not None:
        known = {source.like.name: source for source in (*system.residents.sources, *newcomers)}
        system.residents.change([known[adapter.name] for adapter in adapters])
    else:
        group_adapters(system.model, adapters, system.active)
    system.router, system.experts = router, router.names
    system.trained_parameters = parameters_of(adapters)
    system.look_for_experts()


def parameters_of(adapters: Iterable[LoadedAdapter]) -> int:
    """How many parameters the adapters hold."""
    return sum(f.a.numel() + f.b.numel() for adapter in adapters for f in adapter.factors.values())


def _expert(folder: Path, base: str | None, dtype: str, device: str | None, quantize: Quantize) -> System:
    info = read_expert(folder) if (folder / RECORD).is_file() else None
    named = base or (info.base if info else None)
    if named is None:
        raise LexiconError(f"{folder} is a plain PEFT adapter and does not say on which base: add --base")
    loaded = load_base(named, dtype=dtype, device=device, quantize=quantize)
    if info is not None:
        check_base(info, loaded.fingerprint, named)
    return _with_expert(folder, info.kind if info else "lora", loaded, info.name if info else folder.resolve().name)


def _with_expert(folder: Path, kind: Literal["lora", "ffn"], loaded: Base, name: str) -> System:
    model = loaded.model
    if kind == "ffn":
        install_ffn(model, folder)
        trained = sum(
            ref.bytes // ITEM_BYTES[ref.dtype] for ref in Checkpoint(folder / "ffn.safetensors").tensors.values()
        )
    else:
        adapter = load_adapter(folder, name)  # every check; PEFT itself would load what does not fit in part
        trained = parameters_of([adapter])
        model = cast(PreTrainedModel, PeftModel.from_pretrained(model, str(folder)).eval())
    return System(
        name=name,
        kind="expert",
        model=model,
        tokenizer=loaded.tokenizer,
        encoder=PromptEncoder(loaded.tokenizer),
        ship_bytes=folder_bytes(folder, but=JOURNAL),
        trained_parameters=trained,
        base=loaded.name,
        base_fingerprint=loaded.fingerprint,
    )


def load_moe(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    routing: str | None = None,
    gates: Mapping[int, Tensor] | None = None,
    kernel: str | None = None,
) -> System:
    """Loads a MoE.

    Args:
        routing: a policy in place of its own.
        gates: {layer: (N, H)}, in place of what it has or lacks.
        kernel: transformers' `experts_implementation`; by default the fastest.

    Raises:
        LexiconError: no MoE, a damaged file, parts that do not fit, or gates that it lacks.
    """
    record = record_of(folder, MOE_RECORD)  # what transformers saved again has none
    MoeFiles.open(folder)  # refuses parts that do not fit
    given = {"routing": routing, "experts_implementation": kernel, "gates": gates}
    options = {key: value for key, value in given.items() if value}
    model, tokenizer = _fused(LexiconMoeForCausalLM, folder, dtype, device, **options)
    router = model.router
    if router is None:
        raise RouterError(f"{folder} holds no router: compose the MoE again")
    reads = router.embedder_identity.get("base")
    identity = record.get("base", {}).get("fingerprint") if record else reads
    if router.embedder_name == "base" and reads != identity:
        raise RouterError(f"{folder}: the router is another base's than the experts: compose the MoE again")
    return System(
        name=folder.resolve().name,
        kind="moe",
        model=cast(PreTrainedModel, model),
        tokenizer=tokenizer,
        encoder=encoder_of(router, tokenizer),
        experts=router.names,
        router=router,
        embedder=embedder_of(router, cast(PreTrainedModel, model), tokenizer, str(identity)),
        active=model.active,
        ship_bytes=folder_bytes(folder),
        trained_parameters=int(record.get("trained_parameters", 0)),
        base=str(record.get("base", {}).get("name", "")),
        base_fingerprint=str(record.get("base", {}).get("fingerprint", "")),
    )


def _mixtral(folder: Path, dtype: str, device: str | None) -> System:
    model, tokenizer = _fused(MixtralForCausalLM, folder, dtype, device)
    return System(
        name=folder.resolve().name,
        kind="expert",
        model=model,
        tokenizer=tokenizer,
        encoder=PromptEncoder(tokenizer),
        ship_bytes=folder_bytes(folder),
        trained_parameters=int(record_of(folder, EXPORT_RECORD).get("trained_parameters", 0)),
    )


def _fused(
    kind: type[Any], folder: Path, dtype: str, device: str | None, **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model whose experts are fused, and its tokenizer."""
    Checkpoint(folder, PackError)  # a truncated shard is one clear line here, and not in transformers
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = kind.from_pretrained(folder, dtype=torch_dtype(dtype), device_map={"": place}, **options).eval()
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise PackError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
