"""What a training run will take, told before it starts: `train --dry-run`. Loads no weights.

The rows are encoded, so that steps and tokens are exact; memory is docs/plan.md's arithmetic; hours are FLOPs over
the rate at which this machine's device was just seen to multiply matrices, or over a named card's peak, times a share
that is an assumption.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_lexicon.experts.cost import (
    RESERVE,
    Sharding,
    Training,
    find_card,
    options_of,
    token_flops,
    trained_by,
    training,
)
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
        pass_tokens: that the base reads at once, at most, in one process.
        busiest: FLOPs of the process that has most to do, added up over the steps.
        memory: what they need together, in each process.
    """

    experts: tuple[str, ...]
    steps: int
    step_tokens: int
    pass_tokens: int
    flops: int
    busiest: int
    memory: Training


@dataclass(frozen=True)
class Machine:
    """The device that would train, or each of several.

    Attributes:
        device: cuda, cpu or mps.
        memory: bytes, of which 5% are left free.
        rate: FLOP/s of a matrix product in the recipe's type; None: not known.
        measured: the rate was, here; otherwise it is a data sheet's.
    """

    device: str
    name: str
    memory: int
    rate: float | None
    measured: bool = True


@dataclass(frozen=True)
class Change:
    """What would make a run smaller, as the command line says it, and what each process would need then, in bytes."""

    option: str
    processes: int
    memory: int


@dataclass(frozen=True)
class Forecast:
    """All of a run.

    Attributes:
        processes: that share each turn, by `sharding`.
        changes: that would make the largest turn smaller, the most telling first.
    """

    experts: tuple[Planned, ...]
    turns: tuple[Turn, ...]
    processes: int = 1
    sharding: Sharding = "fsdp"
    changes: tuple[Change, ...] = ()

    def hours(self, machine: Machine) -> float | None:
        """Hours on such a device for each process; processes on CPUs share one machine. None: its rate is not known."""
        flops = sum(turn.flops if machine.device == "cpu" else turn.busiest for turn in self.turns)
        return flops / (machine.rate * UTILISATION) / 3600 if machine.rate else None

    def fits(self, machine: Machine) -> bool:
        """Whether there is memory for the largest turn."""
        return self._needs(max((turn.memory.memory for turn in self.turns), default=0), self.processes, machine)

    def advice(self, machine: Machine) -> list[Change]:
        """What would help where it does not fit."""
        smaller = [c for c in self.changes if c.processes == self.processes or machine.device != "cpu"]
        return [] if self.fits(machine) else smaller

    @staticmethod
    def _needs(memory: int, processes: int, machine: Machine) -> bool:
        return memory * (processes if machine.device == "cpu" else 1) <= machine.memory * (1 - RESERVE)

    def record(self, machine: Machine) -> dict[str, Any]:
        """As JSON."""
        turns = [{**asdict(turn), "memory": turn.memory.record()} for turn in self.turns]
        return {
            "experts": [asdict(expert) for expert in self.experts],
            "turns": turns,
            "machine": asdict(machine),
            "processes": self.processes,
            "sharding": self.sharding if self.processes > 1 else None,
            "fits": self.fits(machine),
            "advice": [asdict(change) for change in self.advice(machine)],
            "utilisation": UTILISATION,
            "hours": self.hours(machine),
        }


Group = Sequence[tuple["Trainee", str, Planned]]  # each with its domain


def forecast(
    shape: Shape,
    recipe: TrainRecipe,
    trainees: "Sequence[tuple[Trainee, str, bool]]",
    apart: bool = False,
    processes: int = 1,
    sharding: Sharding = "fsdp",
) -> Forecast:
    """What experts will take.

    Args:
        trainees: each with its domain, and whether it is there already.
        apart: each adapter is trained in a pass of its own.
        processes: that share each pass, by `sharding`.
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
            missing.append((trainee, domain, experts[-1]))
    groups = [[one] for one in missing] if apart or recipe.kind == "ffn" else [missing]
    groups = [group for group in groups if group]
    turns = tuple(_turn(shape, recipe, group, processes, sharding) for group in groups)
    changes: tuple[Change, ...] = ()
    if turns:
        n = max(range(len(turns)), key=lambda n: turns[n].memory.memory)
        found = [
            Change(option, count, _turn(shape, other, groups[n], count, sharding).memory.memory)
            for option, other, count in _smaller(recipe, turns[n], processes, apart)
        ]
        helpful = [change for change in found if change.memory < turns[n].memory.memory]
        changes = tuple(sorted(helpful, key=lambda change: change.memory))
    return Forecast(tuple(experts), turns, processes, sharding, changes)


def _smaller(recipe: TrainRecipe, turn: Turn, processes: int, apart: bool) -> Iterator[tuple[str, TrainRecipe, int]]:
    """What is not done yet of all that may need less: (option, the recipe then, processes then)."""
    changes: dict[str, Any] = {}
    if not recipe.gradient_checkpointing:
        changes["gradient_checkpointing=true"] = {"gradient_checkpointing": True}
    if "8bit" not in recipe.optimizer:
        changes["optimizer=adamw_bnb_8bit"] = {"optimizer": "adamw_bnb_8bit"}
    half = max(recipe.max_length, turn.pass_tokens // 2)
    if half < turn.pass_tokens:
        changes[f"pass_tokens={half}"] = {"pass_tokens": half}
    if recipe.kind == "lora":
        halves = {domain: max(1, rank // 2) for domain, rank in recipe.rank_of.items()}
        own = {"rank": max(1, recipe.rank // 2)} | ({"rank_of": halves} if halves else {})
        changes[" ".join(f"{key}={value}".replace("'", "") for key, value in own.items())] = own
    for words, values in changes.items():
        yield f"--set {words}", replace(recipe, **values), processes
    if recipe.kind == "lora" and recipe.quantize != "nf4" and processes == 1:
        yield "--quantize nf4", replace(recipe, quantize="nf4"), processes
    if recipe.quantize == "none" and not apart:
        yield f"--processes {2 * processes}", recipe, 2 * processes


def _turn(shape: Shape, recipe: TrainRecipe, group: Group, processes: int, sharding: Sharding) -> Turn:
    steps = max(expert.steps for _, _, expert in group)
    step_tokens = share = busiest = 0
    for step in range(steps):
        tokens, flops = [0] * processes, [0] * processes
        for trainee, _, expert in group:
            batch = trainee.batch(step)
            for n in range(processes):  # as `joint` deals them out
                own = sum(len(row["input_ids"]) for row in batch[n::processes])
                tokens[n] += own
                flops[n] += own * expert.flops // expert.tokens
        step_tokens, share, busiest = max(step_tokens, sum(tokens)), max(share, max(tokens)), busiest + max(flops)
    tokens = min(share, recipe.pass_tokens)
    ranks = [recipe.rank_for(domain) for _, domain, _ in group]
    memory = training(
        "together",
        shape,
        options_of(recipe, shape, max(ranks), tokens),
        recipe.kind,
        sum(trained_by(shape, options_of(recipe, shape, rank), recipe.kind) for rank in ranks),
        recipe.quantize,
        "8-bit AdamW" if "8bit" in recipe.optimizer else "AdamW",
        passes=math.ceil(share / tokens),
        processes=processes,
        sharding=sharding,
    )
    flops = sum(expert.flops for _, _, expert in group)
    return Turn(tuple(expert.name for _, _, expert in group), steps, step_tokens, tokens, flops, busiest, memory)


def card_machine(name: str, dtype: str) -> Machine:
    """A card that need not be in this machine; see `cost.find_card`."""
    card = find_card(name)
    return Machine("cuda", name, int(card.memory), card.peak_in(dtype), measured=False)


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
