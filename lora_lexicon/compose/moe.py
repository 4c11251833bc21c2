"""The MoE model: a Llama some of whose FFNs are experts, chosen once per sequence by the prompt's domain.

Knows how to compute and to route by itself, not how checkpoints are made (`merge`). The base class is
transformers' Llama, so that attention, biases and RoPE scaling are the base's own code; the experts
are transformers' Mixtral experts with their kernels (`experts_implementation`: eager, grouped_mm,
batched_mm ...). Importing this module registers the model type with `AutoModelForCausalLM`.
"""

from collections.abc import Iterator
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

from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.embed import BaseEmbedder
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.errors import RouterError
from lora_lexicon.experts.routed import ActiveRouting


@strict
class LexiconMoeConfig(LlamaConfig):
    """A Llama's configuration and its experts'."""

    model_type = "lexicon_moe"
    attribute_map = {"num_experts": "num_local_experts"}  # noqa: RUF012 (transformers' own idiom)

    num_local_experts: int = 4  # expert FFNs in a layer, the base's own counted where it is kept
    expert_layers: list[int] | None = None  # the others hold a dense FFN; None: all layers have experts
    keep_base: bool = False  # the last expert is the base's own FFN, for prompts on which the router abstains
    expert_names: list[str] | None = None  # domain names in the order of the experts, without the base


class MoeRouting(ActiveRouting):
    """The active routing of a MoE: where the weights are 0 the kept base answers as one more expert."""

    def __init__(self, keep_base: bool) -> None:
        super().__init__()
        self.keep_base = keep_base

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Sets `weights` (B, N) for the forward passes inside the block.

        Raises:
            RouterError: a row is all 0, and the model does not hold the base's FFN.
        """
        abstains = ~weights.any(dim=1, keepdim=True)
        if self.keep_base:
            weights = torch.cat([weights, abstains.to(weights.dtype)], dim=1)
        elif bool(abstains.any()):
            raise RouterError("a row routes to no expert, and this MoE holds no base: compose it with --keep-base")
        with super().using(weights):
            yield


class DomainGate(nn.Module):
    """In the place of Mixtral's gate: no parameters, it hands each sequence's experts to its tokens."""

    def __init__(self, active: ActiveRouting) -> None:
        super().__init__()
        self.active = active

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Experts (B * T, k) int64 and weights (B * T, k) for hidden states (B, T, H).

        Decoding with several beams or samples per prompt repeats each row, and so does this.

        Raises:
            RouterError: no routing is set, or one for another number of rows.
        """
        rows, length, _ = hidden_states.shape
        routed = len(self.active.index)
        if self.active.weights is None or routed == 0 or rows % routed:
            raise RouterError(
                f"{rows} rows, but the active routing has {routed}: set it with model.active.using(weights)"
            )
        repeats = rows // routed * length
        index = self.active.index.to(hidden_states.device).repeat_interleave(repeats, dim=0)
        gains = self.active.gains.to(hidden_states.device).repeat_interleave(repeats, dim=0)
        return index, gains


class ExpertBlock(nn.Module):
    """One layer's experts behind the gate; takes the place of a Llama MLP, (B, T, H) -> (B, T, H)."""

    def __init__(self, config: LexiconMoeConfig, active: ActiveRouting) -> None:
        super().__init__()
        self.gate = DomainGate(active)
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
        for i in chosen:
            cast(Any, self.layers[i]).mlp = ExpertBlock(config, self.active)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MixtralExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(cast(Tensor, weight), std=self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the model's source, and ours is imported


class LexiconMoeForCausalLM(LlamaForCausalLM):
    """A Llama with domain experts in the layers `config.expert_layers`.

    Attributes:
        active: the routing of the batch in flight; what is set there from outside wins.
        experts: the domains, in the order of the routing weights.
        router: read from the checkpoint's folder; None until then.
        embedder: reads this model's own bottom layers, where the router's embedder is `base`; else None.
    """

    config_class = LexiconMoeConfig
    _can_compile_fullgraph = False  # the routing comes from outside the graph

    def __init__(self, config: LexiconMoeConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's own: it would build a plain decoder
        self.model = LexiconMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.active = self.model.active
        self.experts = tuple(config.expert_names or ())
        self.router: Router | None = None
        self.embedder: BaseEmbedder | None = None
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the router beside the weights is loaded too."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = Path(pretrained_model_name_or_path)
        if (folder / "router.json").is_file():
            model.attach_router(load_router(folder), AutoTokenizer.from_pretrained(folder))
        return loaded

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
        self.router = router
        if router.embedder_name == BaseEmbedder.name:
            base = str(router.embedder_identity.get("base"))
            self.embedder = own_embedder(router, cast(PreTrainedModel, self), tokenizer, base)

    def as_base(self) -> AbstractContextManager[None]:
        """Lets the kept base answer alone, for an embedder that reads into the expert layers."""
        return self.active.using(torch.zeros(1, len(self.experts))) if self.active.keep_base else nullcontext()

    def route_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The model's own routing (B, N) for token rows (B, T), from the prompt alone.

        A prompt ends with the first EOS; what follows (a definition, in training rows) is not read.

        Raises:
            RouterError: the router is missing, or reads an embedder that token ids do not feed.
        """
        if self.router is None or self.embedder is None:
            own = "no router" if self.router is None else f"a router for the embedder {self.router.embedder_name!r}"
            raise RouterError(f"this model has {own}: set the routing with model.active.using(weights)")
        ends = self.config.eos_token_id if isinstance(self.config.eos_token_id, list) else [self.config.eos_token_id]
        if attention_mask is None and self.config.pad_token_id not in (None, *ends):
            attention_mask = input_ids != self.config.pad_token_id
        rows = []
        for i, row in enumerate(input_ids):
            ids = (row if attention_mask is None else row[attention_mask[i].bool()]).tolist()
            end = next((at for at, token in enumerate(ids) if at and token in ends), len(ids))
            rows.append(ids[: end + 1])
        with self.as_base():
            routing = self.router.route(self.embedder.embed_ids(rows))
        return torch.from_numpy(settled(routing, self.active.keep_base).weights)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As a Llama's; routes by itself where no routing is set."""
        if self.active.weights is not None:
            return super().forward(input_ids, attention_mask, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if input_ids is None or (cache is not None and cache.get_seq_length()):
            raise RouterError(
                "nothing to route by: call generate(), or set the routing with model.active.using(weights)"
            )
        with self.active.using(self.route_ids(input_ids, attention_mask)):
            return super().forward(input_ids, attention_mask, *args, **kwargs)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; routes by itself, once, before decoding, where no routing is set."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if self.active.weights is not None or ids is None:
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
        raise RouterError(f"the router's embedder record is damaged ({error!r}): fit the domains again") from error


def settled(routing: Routing, keep_base: bool) -> Routing:
    """The routing as a MoE can serve it: without the base's FFN, an abstaining row goes to its nearest expert."""
    abstains = ~routing.weights.any(axis=1)
    if keep_base or not abstains.any():
        return routing
    weights = routing.weights.copy()
    weights[abstains, routing.similarities[abstains].argmax(axis=1)] = 1
    return replace(routing, weights=weights)


AutoConfig.register(LexiconMoeConfig.model_type, LexiconMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(LexiconMoeConfig, LexiconMoeForCausalLM, exist_ok=True)
