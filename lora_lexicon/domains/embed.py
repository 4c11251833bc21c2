"""Prompts to vectors of unit length, float32 (n, d). Knows nothing of domains.

Only the prompt is embedded, never the definition. An embedder's `identity` holds all that its
vectors depend on; a router remembers it and refuses any other. Each prompt is computed on its own,
so that its vector does not depend, not even in the last bit, on the prompts beside it.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.vectors import Vectors, unit
from lora_lexicon.errors import RouterError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_lexicon.data.prompt import PromptEncoder

Prompt = tuple[str, str]  # (term, context)
Pool = Literal["mean", "term"]
Report = Callable[[int], None]  # told how many prompts were just embedded


class Embedder(Protocol):
    """Anything that turns prompts into vectors."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for two vectors to be comparable; holds JSON values only."""
        ...

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a fitted embedder learned; empty for the others."""
        ...

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None) -> Vectors:
        """(n, d) float32, rows of unit length, in the order of `prompts`."""
        ...


class _Reached(Exception):
    """Carries the hidden state out of a forward pass that has gone far enough."""

    def __init__(self, states: "torch.Tensor") -> None:
        super().__init__()
        self.states = states


class BaseEmbedder:
    """Pooled hidden states of the shared base: no second model to ship.

    It reads the states after the bottom `layers` decoder layers (0: the token embeddings) and runs
    no further. Experts live above, so the vectors are the same in the base, the mixture and the MoE.

    Args:
        model: any Hugging Face decoder (`get_decoder()`), with or without experts.
        encoder: turns prompts into the base's tokens.
        layers: how many bottom layers to read.
        fingerprint: the base's, whatever model it is part of now.
        pool: `mean` over the prompt's tokens between the special ones; `term`: that mean, and beside
            it (concatenated) the mean over the term's own tokens in question and context.
    """

    name = "base"

    def __init__(
        self,
        model: "PreTrainedModel",
        encoder: "PromptEncoder",
        layers: int,
        fingerprint: str,
        pool: Pool = "mean",
    ) -> None:
        self.encoder, self.layers, self.pool, self.fingerprint = encoder, layers, pool, fingerprint
        self._decoder: Any = model.get_decoder()
        if not 0 <= layers <= len(self._decoder.layers):
            raise RouterError(f"layers is {layers}; this base has {len(self._decoder.layers)} layers")

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.name,
            "base": self.fingerprint,
            "layers": self.layers,
            "pool": self.pool,
            "template": asdict(self.encoder.template),
            "max_length": self.encoder.max_length,
        }

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None) -> Vectors:
        """(n, d) unit vectors of (term, context) prompts; d is the hidden size, twice that for `term`."""
        return self.embed_ids([self.encoder.prompt(*prompt) for prompt in prompts], progress)

    def embed_ids(self, rows: Sequence[Sequence[int]], progress: Report | None = None) -> Vectors:
        """(n, d) unit vectors of prompts already encoded as `PromptEncoder.prompt` does (no padding)."""
        width = self._decoder.config.hidden_size * (2 if self.pool == "term" else 1)
        vectors = np.empty((len(rows), width), dtype=np.float32)
        for i, ids in enumerate(rows):
            vectors[i] = self._pooled(list(ids))
            if progress:
                progress(1)
        return unit(vectors)

    def hidden(self, ids: list[int]) -> "torch.Tensor":
        """(T, H) float32: the states of one prompt after the bottom `layers` layers.

        With all layers read they are those after the final norm, as `output_hidden_states` has them.
        """
        import torch

        thread = threading.get_ident()

        def stop(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            # Another thread may be decoding with the same model.
            if threading.get_ident() == thread:
                raise _Reached(arguments[0] if arguments else keywords["hidden_states"])

        decoder, tokens = self._decoder, torch.tensor([ids], device=self._decoder.embed_tokens.weight.device)
        hooks = [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in decoder.layers[self.layers :][:1]]
        try:
            with torch.no_grad():
                states = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        except _Reached as reached:
            states = reached.states
        finally:
            for hook in hooks:
                hook.remove()
        return states[0].float()

    def _pooled(self, ids: list[int]) -> NDArray[np.float64]:
        states = self.hidden(ids).cpu().numpy().astype(np.float64)
        first = int(ids[:1] == [self.encoder.tokenizer.bos_token_id])
        whole = states[first:-1].mean(axis=0) if len(ids) > first + 1 else states.mean(axis=0)
        if self.pool == "mean":
            return whole
        positions = self.encoder.term_positions(ids)
        term = states[positions].mean(axis=0) if positions else whole
        return np.concatenate([whole / np.linalg.norm(whole), term / np.linalg.norm(term)])
