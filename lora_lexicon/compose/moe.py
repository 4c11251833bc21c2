"""The MoE model: a Llama some of whose FFNs are experts, chosen by one of the policies of `compose.policy`.

Knows how to compute and to route by itself, not how checkpoints are made (`merge`). The base class is
transformers' Llama, so that attention, biases and RoPE scaling are the base's own code; the experts
are transformers' Mixtral experts with their kernels (`experts_implementation`: eager, grouped_mm,
batched_mm ...). Importing this module registers the model type with `AutoModelForCausalLM`, whose
`from_pretrained(folder, routing="token-top-2")` loads a MoE under another policy than its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import update_wrapper
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import (
    initialization as init,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_lexicon.compose.places import register_places
from lora_lexicon.compose.policy import DOMAIN, GATE, MOE_TYPE, Policy, parse_policy
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.embed import BaseEmbedder
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.errors import RouterError
from lora_lexicon.experts.routed import ActiveRouting


@strict
class LexiconMoeConfig(LlamaConfig):
    """A Llama's configuration and its experts'."""

    model_type = MOE_TYPE
    attribute_map = {"num_experts": "num_local_experts"}  # noqa: RUF012 (transformers' own idiom)

    num_local_experts: int = 4  # expert FFNs in a layer, the base's own counted where it is kept
    expert_layers: list[int] | None = None  # the others hold a dense FFN; None: all layers have experts
    keep_base: bool = False  # the last expert is the base's own FFN, for prompts on which the router abstains
    expert_names: list[str] | None = None  # domain names in the order of the experts, without the base
    routing: str = DOMAIN  # the routing policy; `token` and `sequence` ones need gates in the checkpoint
    fused_experts: int | None = None  # on disk: the FFNs in each fused tensor, where others lie beside it
    expert_slots: list[int] | None = None  # on disk: the place of each expert, see `compose.places`

    @property
    def domain_experts(self) -> int:
        """The experts that a router or gate chooses among."""
        return self.num_local_experts - self.keep_base

    @property
    def policy(self) -> Policy:
        """The routing policy, parsed."""
        return parse_policy(self.routing, self.domain_experts)


class MoeRouting(ActiveRouting):
    """The active routing of a MoE: where the weights are 0 the kept base answers as one more expert.

    Attributes:
        prompts: (B, T) bool, the tokens over which sequence gates choose; None: nothing to choose by.
        record: where each gate puts the logits of its choice, layer by layer; None: nowhere.
    """

    def __init__(self, keep_base: bool) -> None:
        super().__init__()
        self.keep_base = keep_base
        self.prompts: Tensor | None = None
        self.record: list[Tensor] | None = None

    def set(self, weights: Tensor) -> None:
        """Sets `weights`, (B, N) or (B, L, N), until the block that this is in ends.

        Raises:
            RouterError: a row is all 0, and the model does not hold the base's FFN.
        """
        abstains = ~weights.any(dim=-1, keepdim=True)
        if self.keep_base:
            weights = torch.cat([weights, abstains.to(weights.dtype)], dim=-1)
        elif bool(abstains.any()):
            raise RouterError("a row routes to no expert, and this MoE holds no base: compose it with --keep-base")
        super().set(weights)

    @contextmanager
    def choosing_by(self, prompts: Tensor) -> Iterator[None]:
        """Lets sequence gates choose by the tokens where `prompts` (B, T) is true."""
        before, self.prompts = self.prompts, prompts
        try:
            yield
        finally:
            self.prompts = before

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Yields a list that gates fill with their logits: (B, T, N) for tokens, (B, N) for sequences."""
        before, self.record = self.record, []
        try:
            yield self.record
        finally:
            self.record = before


class Gate(nn.Module):
    """In the place of Mixtral's gate: hands each token its experts.

    What is set in the active routing wins. Where nothing is, the policy's own choice is made from `weight` (N, H),
    which a domain-level policy has none of.
    """

    def __init__(self, config: LexiconMoeConfig, active: MoeRouting, position: int) -> None:
        super().__init__()
        self.active, self.position, self.policy = active, position, config.policy
        weight = torch.empty(config.domain_experts, config.hidden_size) if self.policy.gated else None
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Experts (B * T, k) int64 and weights (B * T, k) for hidden states (B, T, H)."""
        length = hidden_states.shape[1]
        if self.active.weights is not None or self.weight is None:
            index, gains = self._given(len(hidden_states))
        else:
            gains, index = self._chosen(hidden_states, self.weight)
        each = length if index.ndim == 2 else 1  # a sequence's choice is each of its tokens'
        index, gains = (
            t.to(hidden_states.device).flatten(0, -2).repeat_interleave(each, dim=0) for t in (index, gains)
        )
        return index, gains

    def _given(self, rows: int) -> tuple[Tensor, Tensor]:
        """The active routing's (B, k). Several beams or samples per prompt repeat each row, and so does this.

        Raises:
            RouterError: no routing is set, or one for another number of rows.
        """
        routed = len(self.active.index)
        if self.active.weights is None or routed == 0 or rows % routed:
            raise RouterError(
                f"{rows} rows, but the active routing has {routed}: set it with model.active.using(weights)"
            )
        index, gains = self.active.index, self.active.gains
        if index.ndim == 3:
            index, gains = index[:, self.position], gains[:, self.position]
        repeats = rows // routed
        return index.repeat_interleave(repeats, dim=0), gains.repeat_interleave(repeats, dim=0)

    def _chosen(self, hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gate's own (weights, experts): (B, T, k) for tokens, (B, k) for sequences."""
        logits = nn.functional.linear(hidden_states, weight).float()
        if self.policy.level == "sequence":
            if self.active.prompts is None:
                raise RouterError("no prompts to choose by: call the model itself, or model.active.using(weights)")
            counted = self.active.prompts.to(logits)
            logits = torch.einsum("btn,bt->bn", logits, counted) / counted.sum(dim=1, keepdim=True)
        if self.active.record is not None:
            self.active.record.append(logits)
        return top_weights(logits, cast(int, self.policy.top_k))


def top_weights(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights, indices), each (..., k), of the `k` largest logits (..., N): their softmax among themselves.

    That is Mixtral's rule and the paper's. Of one alone it is 1 whatever the logit, and would teach a gate nothing:
    there the gradient is that of the softmax over all, as in Switch (Fedus et al., 2022), the value still 1.
    """
    best, index = logits.topk(k, dim=-1)
    if k > 1 or not logits.requires_grad:
        return best.softmax(dim=-1), index
    share = logits.softmax(dim=-1).gather(-1, index)
    return share / share.detach(), index


class ExpertBlock(nn.Module):
    """One layer's experts behind the gate; takes the place of a Llama MLP, (B, T, H) -> (B, T, H)."""

    def __init__(self, config: LexiconMoeConfig, active: MoeRouting, position: int) -> None:
        super().__init__()
        self.gate = Gate(config, active, position)
        self.experts = MixtralExperts(config)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> Tensor:
        index, gains = self.gate(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.experts(flat, index, gains).view_as(hidden_states)


class LexiconMoeModel(LlamaModel):
    """A Llama's decoder with expert blocks in the layers `config.expert_layers`."""

    config_class = LexiconMoeConfig
    _can_compile_fullgraph = False  # the routing comes from outside the graph

    def __init__(self, config: LexiconMoeConfig) -> None:
        super().__init__(config)
        self.active = MoeRouting(config.keep_base)
        chosen = range(config.num_hidden_layers) if config.expert_layers is None else config.expert_layers
        for position, i in enumerate(chosen):
            cast(Any, self.layers[i]).mlp = ExpertBlock(config, self.active, position)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MixtralExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(cast(Tensor, weight), std=self.config.initializer_range)
        elif isinstance(module, Gate) and module.weight is not None:
            init.normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the model's source, and ours is imported


class LexiconMoeForCausalLM(LlamaForCausalLM):
    """A Llama with domain experts in the layers `config.expert_layers`, routed as `config.routing` says.

    Attributes:
        policy: the routing policy.
        active: the routing of the batch in flight; what is set there from outside wins.
        experts: the domains, in the order of the routing weights.
        router: read from the checkpoint's folder; None until then.
        embedder: reads this model's own bottom layers, where the router's embedder is `base`; else None.
    """

    config_class = LexiconMoeConfig
    _can_compile_fullgraph = False  # the routing comes from outside the graph
    # A MoE with gates can be routed by its router too, and then has no use for them.
    _keys_to_ignore_on_load_unexpected = [r"\.mlp\.gate\.weight$"]  # noqa: RUF012 (transformers' own idiom)

    def __init__(self, config: LexiconMoeConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's own: it would build a plain decoder
        self.model = LexiconMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.active = self.model.active
        self.policy = config.policy
        self.experts = tuple(config.expert_names or ())
        self.router: Router | None = None
        self.embedder: BaseEmbedder | None = None
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, gates: Mapping[int, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers; the router beside the weights is loaded too.

        Args:
            gates: {layer: (N, H)}, in place of what the checkpoint has or lacks.

        Raises:
            RouterError: the policy chooses by gates, and the checkpoint holds none.
        """
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, found = loaded
        model.config.fused_experts = model.config.expert_slots = (
            None  # in memory they lie in one tensor, and are saved so
        )
        folder = Path(pretrained_model_name_or_path)
        missing = sorted(name for name in found["missing_keys"] if name.endswith(GATE))
        for layer, gate in (gates or {}).items():
            model.get_submodule(f"model.layers.{layer}.mlp.gate").weight.data.copy_(gate)
        if missing and not gates:
            raise RouterError(
                f"{folder} lacks {missing[0]}, and the routing {model.config.routing!r} chooses by gates: "
                f"fit them with `train router --routing {model.config.routing}`"
            )
        if (folder / "router.json").is_file():
            model.attach_router(load_router(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        return (model, found) if wanted else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the router is saved too."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.router is not None:
            self.router.save(Path(save_directory))

    def attach_router(self, router: Router, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the model the router that it uses when no routing is set from outside.

        Raises:
            RouterError: its domains are not the experts of this model, in their order.
        """
        if router.names != self.experts:
            raise RouterError(f"the router names {', '.join(router.names)}, the experts are {', '.join(self.experts)}")
        top_k = None if self.policy.gated else self.policy.top_k
        self.router = router if top_k is None else replace(router, top_k=top_k)
        if router.embedder_name == BaseEmbedder.name:
            base = str(router.embedder_identity.get("base"))
            self.embedder = own_embedder(router, cast(PreTrainedModel, self), tokenizer, base)

    def as_base(self) -> AbstractContextManager[None]:
        """Lets the kept base answer alone, for an embedder that reads into the expert layers."""
        return self.active.using(torch.zeros(1, len(self.experts))) if self.active.keep_base else nullcontext()

    def prompts_of(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) bool, the tokens of the prompt in token rows (B, T).

        A prompt ends with the first EOS; what follows (a definition, in training rows) is not read.
        """
        config = self.config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if attention_mask is None and config.pad_token_id not in (None, *ends):
            attention_mask = input_ids != config.pad_token_id
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        end = torch.isin(input_ids, torch.tensor(ends, device=input_ids.device)) & valid & (valid.cumsum(1) > 1)
        return valid & (end.cumsum(1) - end.long() == 0)

    def route_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The model's own routing of token rows (B, T), from the prompt alone: (B, N), or (B, L, N) by sequence gates.

        Raises:
            RouterError: the policy chooses for each token, or the router is missing, or reads an embedder that token
                ids do not feed.
        """
        prompts = self.prompts_of(input_ids, attention_mask)
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, prompts, strict=True)]
        if self.policy.gated:
            return self.route_prompts(rows)
        if self.router is None or self.embedder is None:
            own = "no router" if self.router is None else f"a router for the embedder {self.router.embedder_name!r}"
            raise RouterError(f"this model has {own}: set the routing with model.active.using(weights)")
        with self.as_base():
            routing = self.router.route(self.embedder.embed_ids(rows))
        return torch.from_numpy(settled(routing, self.active.keep_base).weights)

    @torch.no_grad()
    def route_prompts(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The choice (B, L, N) of sequence gates for prompts; each runs by itself, and gets the same in any company.

        Raises:
            RouterError: the policy is no sequence-level one.
        """
        if self.policy.level != "sequence":
            raise RouterError(
                f"a MoE whose routing is {self.config.routing!r} makes no choice for a whole prompt by gates"
            )
        found = []
        for row in rows:
            ids = torch.tensor([row], device=self.device)
            with self.active.choosing_by(torch.ones_like(ids, dtype=torch.bool)), self.active.recording() as choices:
                self.model(ids, use_cache=False)
            logits = torch.cat(choices)  # (L, N)
            gains, index = top_weights(logits, cast(int, self.policy.top_k))
            found.append(torch.zeros_like(logits).scatter(-1, index, gains))
        return torch.stack(found)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As a Llama's; routes by itself where no routing is set."""
        if self.active.weights is not None or self.policy.level == "token":
            return super().forward(input_ids, attention_mask, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if input_ids is None or (cache is not None and cache.get_seq_length()):
            raise RouterError(
                "nothing to route by: call generate(), or set the routing with model.active.using(weights)"
            )
        if self.policy.level == "sequence":
            chosen = self.active.choosing_by(self.prompts_of(input_ids, attention_mask))
        else:
            chosen = self.active.using(self.route_ids(input_ids, attention_mask))
        with chosen:
            return super().forward(input_ids, attention_mask, *args, **kwargs)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; where no routing is set, routes by itself, unless for each token once before decoding."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if self.active.weights is not None or ids is None or self.policy.level == "token":
            return cast(Any, super()).generate(inputs, *args, **kwargs)
        with self.active.using(self.route_ids(ids, kwargs.get("attention_mask"))):
            return cast(Any, super()).generate(inputs, *args, **kwargs)


# transformers reads the names of a model's arguments from these two.
update_wrapper(LexiconMoeForCausalLM.forward, LlamaForCausalLM.forward)
update_wrapper(LexiconMoeForCausalLM.generate, cast(Any, GenerationMixin).generate)


def own_embedder(router: Router, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str) -> BaseEmbedder:
    """The `base` embedder that a router asks for, reading `model`'s bottom layers; `base` is the base's fingerprint."""
    identity = router.embedder_identity
    try:
        encoder = PromptEncoder(tokenizer, router.template, int(identity["max_length"]))
        return BaseEmbedder(model, encoder, int(identity["layers"]), base, identity["pool"])
    except (KeyError, TypeError, ValueError) as error:
        raise RouterError(
            "the router's embedder_identity must hold numbers max_length and layers, and pool: fit the domains again"
        ) from error


def settled(routing: Routing, keep_base: bool) -> Routing:
    """The routing as a MoE can serve it: without the base's FFN, an abstaining row goes to its nearest expert."""
    abstains = ~routing.weights.any(axis=1)
    if keep_base or not abstains.any():
        return routing
    weights = routing.weights.copy()
    weights[abstains, routing.similarities[abstains].argmax(axis=1)] = 1
    return replace(routing, weights=weights)


register_places(MOE_TYPE)
AutoConfig.register(LexiconMoeConfig.model_type, LexiconMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(LexiconMoeConfig, LexiconMoeForCausalLM, exist_ok=True)
