"""What a training run refuses, told before a weight is loaded: the one check of `train` and of its dry run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_lexicon.errors import ExpertError, LexiconError, RecipeError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base, known_fingerprint, quantization
from lora_lexicon.experts.checkpoint import check_name
from lora_lexicon.experts.cost import Sharding, check_rank
from lora_lexicon.experts.journal import check_reporters, reporter
from lora_lexicon.experts.kernels import check_kernels, need_kernels
from lora_lexicon.experts.kinds import check_start
from lora_lexicon.experts.loop import check_loop
from lora_lexicon.experts.shape import Shape, read_shape
from lora_lexicon.recipe import TrainRecipe

if TYPE_CHECKING:
    from lora_lexicon.experts.train import Part


@dataclass(frozen=True)
class Where:
    """What a run has to train on.

    Attributes:
        device: None: what there is on this machine.
        processes: that share it, each with a device and a shard; 1: none is sharded.
        elsewhere: on another machine, of which is not known what it has and what is installed there.
    """

    device: torch.device | None = None
    processes: int = 1
    sharding: Sharding = "fsdp"
    elsewhere: bool = False


def check_training(
    base: Base | str,
    parts: "Sequence[Part]",
    recipe: TrainRecipe,
    where: Where,
    *,
    scored: bool = False,
    start_from: Path | None = None,
    report_to: Sequence[str] = (),
) -> None:
    """Refuses what cannot be trained, before anything is; the arguments are those of `train.train_experts`.

    Args:
        base: its name does: no weights are loaded.

    Raises:
        RecipeError: the recipe does not fit the base, itself or where it is to run.
        ExpertError: no rows, no such base, or `start_from` does not fit.
        MissingExtraError: a package that it needs is not installed.
    """
    check_reporters(report_to)
    name = base if isinstance(base, str) else base.name
    identity = known_fingerprint(base) if isinstance(base, str) else base.fingerprint
    shape = read_shape(base) if isinstance(base, str) else base.shape
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda") if where.elsewhere else where.device or here
    check_loop(recipe, device)
    for part in parts:
        check_name(part.name)
        _check_recipe(recipe, shape, name, bool(part.valid) and scored)
        if not part.rows:
            raise ExpertError(f"expert {part.name!r} has no rows to train on: choose another domain")
        if recipe.kind == "lora":
            given = f"rank_of {part.domain}" if part.domain in recipe.rank_of else "rank"
            check_rank(shape, recipe.rank_for(part.domain), "all" if recipe.attention else "ffn", given)
    if (where.processes > 1 or processes.several()) and (recipe.quantize != "none" or recipe.dtype == "float16"):
        raise RecipeError("several processes shard a base in bfloat16 or float32: set quantize=none and dtype=bfloat16")
    if recipe.liger:
        check_kernels(device)
    if not where.elsewhere:
        _check_here(recipe, where, report_to)
    if start_from:
        check_start(start_from, shape, name, identity, recipe, [part.domain for part in parts])


def _check_here(recipe: TrainRecipe, where: Where, report_to: Sequence[str]) -> None:
    """Refuses what this machine lacks."""
    for name in report_to:
        reporter(name)
    if recipe.liger:
        need_kernels()
    quantization(recipe.quantize, recipe.dtype)
    if not processes.several() and 0 < torch.cuda.device_count() < where.processes:
        raise LexiconError(f"--processes is {where.processes}, and this machine has {torch.cuda.device_count()} GPUs")
    if where.processes > 1 and where.sharding == "zero3":
        processes.need_deepspeed()


def _check_recipe(recipe: TrainRecipe, shape: Shape, base: str, can_evaluate: bool) -> None:
    if not 0 <= recipe.first_layer < shape.layers:
        raise RecipeError(f"first_layer is {recipe.first_layer}; base {base!r} has layers 0 to {shape.layers - 1}")
    for key in ("rank", "alpha", "pass_tokens"):
        if getattr(recipe, key) <= 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be positive")
    for key in ("evaluations", "early_stopping"):
        if getattr(recipe, key) < 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must not be negative")
    wrong = [r for r in recipe.rank_of.values() if not isinstance(r, int) or r <= 0]
    if wrong:
        raise RecipeError(f"rank_of holds {wrong[0]!r}; a rank must be a positive integer")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"dropout is {recipe.dropout}; it must be at least 0 and below 1")
    if recipe.kind == "ffn" and recipe.quantize != "none":
        raise RecipeError(f"quantize is {recipe.quantize}; an ffn expert trains the weights themselves: use kind lora")
    if (recipe.evaluations or recipe.early_stopping) and not can_evaluate:
        raise RecipeError("evaluations need validation rows: use entries with a split named valid, or evaluations=0")
    if recipe.early_stopping and not recipe.evaluations:
        raise RecipeError("early_stopping counts evaluations, and evaluations is 0: set it too")
