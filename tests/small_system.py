"""A system of three experts on the tiny base, for tests of what uses systems: each expert shifts the embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import torch

from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.routing import Routing
from lora_lexicon.experts.routed import ActiveRouting

EXPERTS = ("river", "stone", "wind")


class SmallSystem:
    """What `compose.system.System` promises, routed by a hash of the term."""

    def __init__(self, base: Path, *, name: str = "small", routed: bool = True) -> None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.name = name
        self.base, self.base_fingerprint = str(base), "ab" * 32
        self.kind = "mixture" if routed else "base"
        self.routing_level = "domain"
        self.routes_in_passing = False
        self.residents = None
        self.model: Any = LlamaForCausalLM.from_pretrained(base).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.encoder = PromptEncoder(self.tokenizer)
        self.experts = EXPERTS if routed else ()
        self.router: Any = SimpleNamespace(
            method="centroid",
            nearest_terms=lambda _, count: [("brook", "river", 0.75)][:count],
            term_vectors=np.array([[1, 0], [0, 1], [-1, -1]], dtype=np.float16),
            centroids=np.eye(2, dtype=np.float32),
            prepare=lambda vectors: vectors,
        )
        self.active = ActiveRouting() if routed else None
        self.ship_bytes = 2_000_000 if routed else 0
        self.memory_bytes = 10_000_000
        self.trained_parameters = 1000
        if self.active is not None:
            self.model.get_input_embeddings().register_forward_hook(self._shift)
        self.shifts = torch.randn(len(EXPERTS), 32, generator=torch.Generator().manual_seed(5)) * 0.3

    def _shift(self, _module: Any, _inputs: Any, states: torch.Tensor) -> torch.Tensor:
        assert self.active is not None
        assert self.active.weights is not None, "a batch without a routing"
        assert len(self.active.weights) == len(states), "a routing of another batch"
        return states + (self.active.weights @ self.shifts)[:, None]

    def embed(self, prompts: Sequence[tuple[str, str]], batch_size: int = 1) -> np.ndarray | None:
        return np.ones((len(prompts), 2), dtype=np.float32) if self.experts else None

    def choose(self, prompts: Sequence[tuple[str, str]]) -> tuple[np.ndarray | None, Routing | None]:
        routing = self.route(prompts)
        return (None, None) if routing is None or not prompts else (routing.weights, routing)

    def token_gates(self) -> nullcontext:
        return nullcontext([])

    def route(self, prompts: Sequence[tuple[str, str]]) -> Routing | None:
        if not self.experts:
            return None
        similarities = np.zeros((len(prompts), len(EXPERTS)), dtype=np.float32)
        weights = np.zeros_like(similarities)
        for row, (term, _) in enumerate(prompts):
            chosen = crc32(term.encode()) % (len(EXPERTS) + 1)
            if chosen < len(EXPERTS):  # else it abstains
                similarities[row, chosen] = 0.5
                weights[row, chosen] = 1
        return Routing(EXPERTS, similarities, weights)

    @contextmanager
    def routed(self, weights: torch.Tensor | None) -> Iterator[None]:
        if self.active is None or weights is None:
            yield
        else:
            with self.active.using(weights):
                yield
