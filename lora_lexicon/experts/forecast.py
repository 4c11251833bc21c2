"""What a training run will take, told before it starts: `train --dry-run`. Loads no weights.

The rows are encoded, so that steps and tokens are exact; memory is docs/plan.md's arithmetic; hours are FLOPs over
the rate at which this machine's device was just seen to multiply matrices, times a share that is an assumption.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_lexicon.experts.cost import Training, options_of, token_flops, trained_by, training
from lora_lexicon.experts.shape import Shape
from lora_lexicon.recipe import TrainRecipe

if TYPE_CHECKING:
    import torch

    from lora_lexicon.experts.joint import Trainee

UTILISATION = 0.4  # of the matrix rate, that training is taken to reach: `plan` assumes the same
MATRIX = {"cuda": 8192, "cpu": 1024, "mps": 4096}  # rows and columns that are multiplied to find the rate


@dataclass(frozen=True)
class Planned:
    """One expert to be trained.

    Attributes:
        there: it is trained already, and kept.
        rank: of its adapter; None for FFNs.
        cut: rows that are longer than the recipe's limit.
        tokens: read in all its steps.
        trained: parameters.
    """

    name: str
    there: bool
    kind: str
    rank: int | None
    rows: int
    cut: int
    steps: int
    tokens: int
    trained: int
    flops: int


@dataclass(frozen=True)
class Turn:
    """Experts that are trained in one pass over their base.

    Attributes:
        step_tokens: of the largest step of all of them together.
        pass_tokens: that the base reads at once, at most.
        memory: what they need together.
    """

    experts: tuple[str, ...]
    steps: int
    step_tokens: int
    pass_tokens: int
    flops: int
    memory: Training


@dataclass(frozen=True)
class Machine:
    """The device that would train. `memory` in bytes, `rate` in FLOP/s of a matrix product in the recipe's type."""

    device: str
    name: str
    memory: int
    rate: float


@dataclass(frozen=True)
class Forecast:
    """All of a run."""

    experts: tuple[Planned, ...]
    turns: tuple[Turn, ...]

    def hours(self, machine: Machine) -> float:
        """Hours on one such machine."""
        return sum(turn.flops for turn in self.turns) / (machine.rate * UTILISATION) / 3600

    def record(self, machine: Machine) -> dict[str, Any]:
        """As JSON."""
        turns = [{**asdict(turn), "memory": turn.memory.record()} for turn in self.turns]
        return {
            "experts": [asdict(expert) for expert in self.experts],
            "turns": turns,
            "machine": asdict(machine),
            "utilisation": UTILISATION,
            "hours": self.hours(machine),
        }


def forecast(
    shape: Shape, recipe: TrainRecipe, trainees: "Sequence[tuple[Trainee, str, bool]]", apart: bool = False
) -> Forecast:
    """What experts will take.

    Args:
        trainees: each with its domain, and whether it is there already.
        apart: each adapter is trained in a pass of its own.
    """
    experts, missing = [], []
    for trainee, domain, there in trainees:
        rank = recipe.rank_for(domain)
        options = options_of(recipe, shape, rank)
        trained = trained_by(shape, options, recipe.kind)
        experts.append(
            Planned(
                name=trainee.name,
                there=there,
                kind=recipe.kind,
                rank=rank if recipe.kind == "lora" else None,
                rows=len(trainee.rows),
                cut=sum(row["cut"] for row in trainee.rows),
                steps=trainee.last,
                tokens=trainee.tokens,
                trained=trained,
                flops=trainee.tokens * token_flops(shape, options, recipe.kind, trained),
            )
        )
        if not there:
            missing.append((trainee, experts[-1]))
    groups = [[one] for one in missing] if apart or recipe.kind == "ffn" else [missing]
    return Forecast(tuple(experts), tuple(_turn(shape, recipe, group) for group in groups if group))


def _turn(shape: Shape, recipe: TrainRecipe, group: "Sequence[tuple[Trainee, Planned]]") -> Turn:
    steps = max(expert.steps for _, expert in group)
    largest = max(sum(t.read(step + 1) - t.read(step) for t, _ in group) for step in range(steps))
    tokens = min(largest, recipe.pass_tokens)
    ranks = [expert.rank for _, expert in group if expert.rank]
    memory = training(
        "together",
        shape,
        options_of(recipe, shape, max(ranks, default=recipe.rank), tokens),
        recipe.kind,
        sum(expert.trained for _, expert in group),
        recipe.quantize,
        "8-bit AdamW" if "8bit" in recipe.optimizer else "AdamW",
        passes=math.ceil(largest / tokens),
    )
    flops = sum(expert.flops for _, expert in group)
    return Turn(tuple(expert.name for _, expert in group), steps, largest, tokens, flops, memory)


def this_machine(dtype: str, seconds: float = 0.5) -> Machine:
    """The device that training would take here, and its matrix rate, measured for so many seconds."""
    import torch

    from lora_lexicon.experts.tensors import torch_dtype

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, name, memory = torch.device("cuda"), properties.name, properties.total_memory
    else:
        device, name = torch.device("cpu"), f"{torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(device.type, name, memory, matrix_rate(device, torch_dtype(dtype), seconds))


def matrix_rate(device: "torch.device", dtype: "torch.dtype", seconds: float = 0.5) -> float:
    """FLOP/s of a large matrix product: the best of as many as fit into so many seconds."""
    import torch

    size = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
