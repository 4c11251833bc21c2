"""Experts trained apart, each as a task of its own on Ray, from a base that it loads itself.

`train.train_experts` trains LoRA experts together, in one pass over one base on one device; this takes as many passes
as there are experts, on as many devices as there are. Either way an expert has the same key and, to rounding, the
same weights.
"""

import socket
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.checkpoint import ExpertInfo, check_name
from lora_lexicon.experts.journal import Report
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.folders import locked, remove_stale
from lora_lexicon.recipe import TrainRecipe
from lora_lexicon.tasks import OnRay


def train_apart(
    ray: OnRay,
    base: str,
    parts: Sequence[Part],
    recipe: TrainRecipe,
    *,
    progress: Report | None = None,
    **settings: Any,
) -> list[ExpertInfo]:
    """What `train_experts` does, each expert as a task. A task whose process dies goes on from its last checkpoint.

    Args:
        base: its name; each task loads it.
        parts: their folders lie beside each other, on a file system that all machines share.
        settings: further ones of `train_experts`.

    Raises:
        LexiconError: as `train_experts` and `load_base` do, or the folders are on one machine's own disk.
    """
    for part in parts:
        check_name(part.name)
    folder = parts[0].out.parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder / "shared")
    with TemporaryDirectory(prefix=".shared.", suffix=".partial", dir=folder) as seen, locked(Path(seen)):
        tasks = [(base, part, recipe, settings, Path(seen)) for part in parts]
        return ray.run(_train, tasks, [part.name for part in parts], progress and (lambda _, step: progress(step)))


def _train(
    base: str, part: Part, recipe: TrainRecipe, settings: dict[str, Any], seen: Path, report: Report
) -> ExpertInfo:
    if not seen.is_dir():
        raise ExpertError(
            f"{part.out.parent} as {socket.gethostname()} sees it is another folder: "
            "with --on ray, --out must be on a file system that all machines share"
        )
    loaded = load_base(base, dtype=recipe.dtype, quantize=recipe.quantize)
    return train_experts(loaded, [part], recipe, progress=report, **settings)[0]
