"""What a composition will weigh, need and cost, from a base's shape alone. Arithmetic; imports no torch.

Bytes are those of tensors (a safetensors file adds its header), memory is weights and what training or
decoding adds to them, and a GB is 1e9 bytes. docs/plan.md states every formula; the tests hold them
against transformers, PEFT, bitsandbytes and what `compose` writes.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_lexicon.errors import RecipeError
from lora_lexicon.experts.cost import (
    BYTES,
    RESERVE,
    Card,
    Options,
    Quantize,
    Training,
    adapter_parameters,
    base_bytes,
    expert_layers,
    trainings,
)
from lora_lexicon.experts.shape import Shape

ROWS = range(1, 2**40)  # among which the largest batch is looked for


@dataclass(frozen=True)
class Footprint:
    """One way to compose the experts. Bytes; `parameters` and `trained` count elements."""

    name: str
    parameters: int  # in all, the base included
    trained: int  # by all experts together
    ship: int  # what is shipped: for adapters beside the base
    disk: int  # with the base
    domain: int  # that one domain more adds to `ship`
    weights: int  # in memory
    cache: int  # keys and values of `batch` rows of `length` tokens

    @property
    def serve(self) -> int:
        """Memory to serve."""
        return self.weights + self.cache


def moe_parameters(shape: Shape, options: Options) -> int:
    """Elements of the merged MoE: the base, and its FFNs once more for every expert but one."""
    copies = options.experts + options.keep_base - 1
    return shape.parameters + copies * len(expert_layers(shape, options)) * shape.ffn


def cache_bytes(shape: Shape, dtype: str, tokens: int) -> int:
    """Keys and values of `tokens` tokens in every layer."""
    return 2 * shape.layers * shape.key * tokens * BYTES[dtype]


def footprints(shape: Shape, options: Options) -> list[Footprint]:
    """Every way to compose the experts; the merged MoE first, where transformers' experts can hold the FFNs."""
    size, base = BYTES[options.dtype], base_bytes(shape, options.dtype)
    cache = cache_bytes(shape, options.dtype, options.batch * options.length)
    ffn = len(expert_layers(shape, options)) * shape.ffn
    rows = []
    if not shape.mlp_bias:
        moe = moe_parameters(shape, options)
        rows.append(
            Footprint("merged MoE", moe, options.experts * ffn, moe * size, moe * size, ffn * size, moe * size, cache)
        )

    def mixture(
        name: str, rank: int, modules: str, trained: int | None = None, quantize: Quantize = "none"
    ) -> Footprint:
        adapter = adapter_parameters(shape, rank, modules, len(expert_layers(shape, options)))
        ship = options.experts * adapter * size
        return Footprint(
            name,
            shape.parameters + options.experts * adapter,
            options.experts * (trained or adapter),
            ship,
            base + ship,
            adapter * size,
            base_bytes(shape, options.dtype, quantize) + ship,
            cache,
        )

    rows.append(mixture(f"adapters, rank {options.rank}", options.rank, options.modules))
    rows.append(mixture(f"adapters, rank {options.rank}, 4-bit base", options.rank, options.modules, quantize="nf4"))
    rows += [mixture(f"FFNs cut to rank {rank}", rank, "ffn", ffn) for rank in options.extract]
    return rows


@dataclass(frozen=True)
class Fit:
    """Whether a job fits a card. `rows` and `rows_checkpointed` are the largest batches that would."""

    job: str
    needs: int
    fits: bool
    rows: int
    rows_checkpointed: int | None = None  # None: decoding recomputes nothing


def fits(shape: Shape, options: Options, card: Card) -> list[Fit]:
    """Every way to serve and to train, held against the memory of one card."""
    room = card.memory * (1 - RESERVE)

    def most(needs: Callable[[Options], int], **settings: bool) -> int:
        """The largest batch for which it needs no more than there is room."""
        return bisect_right(ROWS, room, key=lambda batch: needs(replace(options, batch=batch, **settings)))

    found = []
    for n, row in enumerate(footprints(shape, options)):
        rows = most(lambda tried, n=n: footprints(shape, tried)[n].serve)
        found.append(Fit(f"serve {row.name}", row.serve, row.serve <= room, rows))
    for n, row in enumerate(trainings(shape, options)):
        kept, lean = (
            most(lambda tried, n=n: trainings(shape, tried)[n].memory, checkpointing=on) for on in (False, True)
        )
        found.append(Fit(f"train {row.name}", row.memory, row.memory <= room, kept, lean))
    return found


@dataclass(frozen=True)
class Compute:
    """What it takes to train all experts. `gpu_hours` is None where the card's peak is not known."""

    name: str
    token_flops: int
    flops: float
    gpu_hours: float | None = None
    hours: float | None = None  # on all cards, each of which trains one expert at a time


def computes(
    shape: Shape, options: Options, tokens: float, peak: float | None, cards: int, utilisation: float
) -> list[Compute]:
    """FLOPs and hours to read `tokens` tokens, each of them by one expert; the experts read equally many.

    Args:
        peak: one card's FLOP/s in `options.dtype`; None where it is not known.

    Raises:
        RecipeError: a number that is not positive, or a utilisation above 1.
    """
    given = {"tokens times epochs": tokens, "gpus": cards, "utilisation": utilisation, "peak": peak}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise RecipeError(f"{name} is {value}; it must be positive")
    if utilisation > 1:
        raise RecipeError(f"utilisation is {utilisation}; it is the part of a card's peak that is reached, at most 1")
    found = []
    for row in trainings(shape, options):
        flops = row.token_flops * tokens
        spent = flops / (peak * utilisation) / 3600 if peak else None
        turns = math.ceil(options.experts / cards)
        found.append(Compute(row.name, row.token_flops, flops, spent, spent and spent / options.experts * turns))
    return found


def record(row: Footprint | Training | Fit | Compute) -> dict[str, Any]:
    """A row as JSON, its sums included."""
    if isinstance(row, Footprint):
        return {**asdict(row), "serve": row.serve}
    return row.record() if isinstance(row, Training) else asdict(row)
