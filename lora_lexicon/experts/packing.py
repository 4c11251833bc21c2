"""Rows of many lengths as one row of tokens, without padding, and attention that does not cross them.

Every layer of a Llama but attention works on single tokens, so it computes nothing for padding here. Attention alone
lays the rows side by side again, padded on the right, where causal attention never looks: its fast path needs no
mask. Knows rows of tokens; not what is trained on them, or how.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "lexicon_packed"  # its name among transformers' attention implementations


@dataclass(frozen=True)
class Packing:
    """Where R rows, the longest of L tokens, lie among T packed ones.

    Attributes:
        gather: (R, L) int64, the packed place of each row's tokens; 0 after its end.
        scatter: (T,) int64, the place of each packed token among the R * L.
    """

    gather: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> "Packing":
        """Rows of these lengths, one after the other."""
        sizes = torch.tensor(lengths)
        places = torch.arange(int(sizes.max())).expand(len(lengths), -1)
        real = places < sizes[:, None]
        starts = sizes.cumsum(0) - sizes
        gather = torch.where(real, starts[:, None] + places, 0)
        return cls(gather.to(device), real.flatten().nonzero()[:, 0].to(device))


def positions(lengths: Sequence[int]) -> Tensor:
    """(T,) int64, the place of each packed token in its own row."""
    return torch.cat([torch.arange(length) for length in lengths])


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed row: (1, heads, T, d) -> (1, T, heads, d), as transformers wants it."""
    rows, width = packing.gather.shape

    def side_by_side(states: Tensor) -> Tensor:
        heads, count, size = states.shape[1:]
        flat = states[0].transpose(0, 1).reshape(count, heads * size)
        return flat.index_select(0, packing.gather.flatten()).view(rows, width, heads, size).transpose(1, 2)

    output = nn.functional.scaled_dot_product_attention(
        *(side_by_side(states) for states in (query, key, value)),
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat = output.transpose(1, 2).reshape(rows * width, -1).index_select(0, packing.scatter)
    return flat.view(1, -1, query.shape[1], query.shape[3]), None


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's forward passes take packed rows: `model(ids, position_ids=..., packing=...)`."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


AttentionInterface.register(ATTENTION, packed_attention)
