"""What an unfinished training run leaves on the disk, and who may go on from it. Knows no model and no rows.

A run's state lies in `.NAME.training` beside what it is to make, under a key of everything that decides its course: the
same command goes on from it and, on a CPU, ends with the weights of an unbroken run, bit for bit; a changed command is
refused, unless it is to drop what was done.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lexicon.errors import DivergedError, ExpertError, RecipeError
from lora_lexicon.experts import processes
from lora_lexicon.folders import LOGGER, locked, read_record, write_record
from lora_lexicon.recipe import LoopRecipe

RUN, SEAL = "run.json", "files.json"


@contextmanager
def state_folder(
    out: Path, key: str, recipe: LoopRecipe, replace: bool, parts: Sequence[str] = (), kept: str = ""
) -> Iterator[Path]:
    """The folder of the run's state; one that no run could go on from is removed.

    Args:
        key: of all that decides the run's course; the recipe is part of it.
        replace: what another run left is removed.
        parts: keys of what is trained together, by which `unfinished` finds it.
        kept: a file in it that a run can go on from as well as from a checkpoint.

    Raises:
        RecipeError: another run left checkpoints there; says in what it differs.
        ExpertError: another process is at it.
    """
    state = out.with_name(f".{out.name}.training")
    way = "ZeRO" if processes.zero() else "FSDP"
    sharing = f"{processes.count()} ({way})" if processes.several() else "1"  # the optimizer's state lies otherwise
    ours = {"key": key, "processes": sharing, "recipe": asdict(recipe), "parts": list(parts)}
    if processes.rank() > 0:
        processes.wait()
        yield state
        return
    state.mkdir(parents=True, exist_ok=True)
    with locked(state) as held:
        if held is False:
            raise ExpertError(f"{state} is being written by another run: wait for its end, or choose another --out")
        theirs = _run_in(state)
        if theirs != ours:
            _clear(state, _difference(theirs, ours), replace, kept)
        try:
            if theirs != ours:
                write_record(state / RUN, ours)
            processes.wait()
            yield state
        except BaseException as error:
            if isinstance(error, DivergedError) or not _begun(state, kept):  # it would end the same way again
                shutil.rmtree(state, ignore_errors=True)
            raise


def _begun(state: Path, kept: str) -> bool:
    """Whether there is something to go on from."""
    return bool(_checkpoints(state) or (kept and (state / kept).is_file()))


def _clear(state: Path, difference: str, replace: bool, kept: str) -> None:
    """Removes what another run left in its folder."""
    if _begun(state, kept) and not replace:
        raise RecipeError(
            f"{state} holds what an unfinished run has done, {difference}: give its command again "
            "to go on with it, or add --overwrite to drop it"
        )
    if any(state.iterdir()):
        LOGGER.warning("removed what an unfinished run had done in %s, %s", state, difference)
    for left in state.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def unfinished(folder: Path) -> list[tuple[Path, list[str]]]:
    """The states that runs left beside what they were to make, each with the `parts` it trains."""
    return [(state, _run_in(state).get("parts", [])) for state in sorted(folder.glob(".*.training"))]


def _run_in(state: Path) -> dict[str, Any]:
    """What `state_folder` wrote of the run that left this folder; empty where that cannot be read."""
    try:
        return read_record(state / RUN, RecipeError, "the state of a run")
    except RecipeError:
        return {}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """In what two runs differ, for a message."""
    before, now = ({"processes": run.get("processes"), **run.get("recipe", {})} for run in (theirs, ours))
    found = [f"{name} {before[name]} (now {now[name]})" for name in now if before.get(name, now[name]) != now[name]]
    return f"with {', '.join(found)}" if found else "with another base or other rows"


def last_checkpoint(state: Path) -> str | None:
    """The latest complete checkpoint; one whose writing was cut off is removed. The Trainer writes its state last."""
    if processes.rank() > 0:
        return processes.main_says(None)
    last = None
    for step, folder in _checkpoints(state):
        if _is_whole(folder, step):
            last = str(folder)
        else:
            LOGGER.warning("removed %s: it is damaged, or its writing was cut off", folder)
            shutil.rmtree(folder)
    if last:
        LOGGER.warning("going on from step %s, which an interrupted run had come to", last.rpartition("-")[2])
    return processes.main_says(last)


def _checkpoints(state: Path) -> list[tuple[int, Path]]:
    """(step, folder), in order."""
    found = [(path.name.rpartition("-")[2], path) for path in state.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def seal(checkpoint: Path) -> None:
    """Lists a checkpoint's files and their sizes, once they are on the disk and not in its cache alone."""
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with file.open("rb") as written:
            os.fsync(written.fileno())
        sizes[file.relative_to(checkpoint).as_posix()] = file.stat().st_size
    write_record(checkpoint / SEAL, {"bytes": sizes})


def _is_whole(checkpoint: Path, step: int) -> bool:
    """Whether all is there that `seal` found, and the Trainer's state, which is written last."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text())["bytes"]
        at = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        return at == step and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
