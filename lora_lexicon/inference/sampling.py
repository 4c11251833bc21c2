"""How the next token is chosen. Knows nothing of models, prompts' wording, or batches.

A sampled token comes from one uniform number per request and step, drawn from the request's own
stream, so what a request samples does not depend on its neighbours in the batch.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_lexicon.errors import RecipeError


@dataclass(frozen=True)
class Decoding:
    """How definitions are decoded; the numbers for sampling are the paper's (section 4.1)."""

    method: Literal["greedy", "sample"] = "greedy"
    temperature: float = 0.6  # sampling only, as are the next three
    top_k: int = 50  # 0: all tokens
    top_p: float = 0.9
    repetition_penalty: float = 1.05  # over prompt and definition, as transformers applies it
    max_new_tokens: int = 48  # EOS included
    seed: int = 42

    def __post_init__(self) -> None:
        limits = {
            "method": (self.method in ("greedy", "sample"), "must be greedy or sample"),
            "temperature": (self.temperature > 0, "must be above 0 (use greedy decoding instead of 0)"),
            "top_k": (self.top_k >= 0, "must be 0 or more"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, "must be 1 or more"),
        }
        for name, (right, rule) in limits.items():
            if not right:
                raise RecipeError(f"decoding: {name} is {getattr(self, name)!r}; it {rule}")

    @property
    def tolerance(self) -> float:
        """The margin (see `choose`) below which float32 rounding could turn a choice.

        Of sampled ones it grows as temperature falls, by which logits, and so their rounding, are divided.
        """
        return 3e-4 if self.method == "greedy" else 1e-5 * max(1.0, 0.6 / self.temperature)

    def uniforms(self, term: str, context: str, sample: int = 0) -> NDArray[np.float64]:
        """(max_new_tokens,) numbers in [0, 1) that depend on the seed, the request and the sample's number alone."""
        return np.random.default_rng(self.seed_of(term, context, sample)).random(self.max_new_tokens)

    def seed_of(self, term: str, context: str, sample: int = 0) -> int:
        """128 bits, a request's own seed, which depends on the same."""
        request = f"{self.seed}\0{term}\0{context}" + (f"\0{sample}" if sample else "")
        return int.from_bytes(blake2b(request.encode(errors="surrogatepass"), digest_size=16).digest())


def choose(logits: Tensor, ids: Tensor, uniform: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """The next token of each row, and by how much the choice was safe.

    Args:
        logits: (B, V) float32.
        ids: (B, T) the tokens so far, which the repetition penalty reads.
        uniform: (B,) float64 in [0, 1); greedy decoding leaves it unread.

    Returns:
        tokens (B,) and margins (B,): the lead of the best logit over the second (greedy), or the
        distance of `uniform` from the nearest edge of the cumulative distribution (sample).
    """
    if decoding.method == "greedy":
        best = logits.topk(2, dim=1)
        return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]
    size = min(decoding.top_k or logits.shape[1], logits.shape[1])
    values, tokens = _warpers(decoding)(ids, logits).topk(size, dim=1)  # type: ignore[arg-type]
    edges = values.double().softmax(dim=1).cumsum(dim=1)
    place = (edges <= uniform[:, None]).sum(dim=1, keepdim=True)
    last = values.isfinite().sum(dim=1, keepdim=True) - 1
    inner = torch.where(torch.arange(size, device=edges.device) < last, edges, torch.inf)
    margins = (inner - uniform[:, None]).abs().amin(dim=1)
    return tokens.gather(1, place.minimum(last)).squeeze(1), margins


def _warpers(decoding: Decoding) -> LogitsProcessorList:
    """transformers' own, in the order of its `generate`."""
    warpers = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(float(decoding.top_p)))
    return warpers
