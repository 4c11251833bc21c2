"""What every command shares: where output goes, how errors end, tables and progress bars.

Results go to standard output (one JSON object with `--json`), everything else to standard error.
"""

import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_lexicon.tasks import Launcher


class Place(StrEnum):
    """Where tasks run."""

    here = "here"
    ray = "ray"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
OnOption = Annotated[
    Place,
    typer.Option("--on", help="ray: as tasks on the Ray at RAY_ADDRESS, or on one started on this machine."),
]
CpusOption = Annotated[
    int | None,
    typer.Option("--cpus", min=1, help="CPUs of each Ray task: one beside a GPU, else those of a machine."),
]
GpusOption = Annotated[
    float | None,
    typer.Option("--gpus", min=0, max=1, help="GPUs of each Ray task, such as 0.5: one where there are any."),
]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Overrides a key of the recipe; docs/recipes.md lists all keys, and how a map is written. Repeatable.",
    ),
]


LAUNCHED = "LORA_LEXICON_LAUNCHED"  # set in processes that `launch` started
ROOM = 20  # characters of a name that stay beside its numbers
_NUMBER = re.compile(r"[-+]?[\d,.]*(?:e[-+]?\d+)?(?:[KMBT]| [kMGT]?B)?")  # also 24.9B parameters, 49.9 GB


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The one boundary for errors a user can cause: one line on standard error and exit code 1.

    The traceback appears with LORA_LEXICON_DEBUG=1. A full disk and an interrupt are such errors too.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from lora_lexicon.errors import LexiconError
        from lora_lexicon.folders import is_disk_full

        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # of a Hub out of reach, our one line is enough
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it could have, unasked
        logging.getLogger("DeepSpeed").addFilter(_is_error)  # transformers imports it; it logs to standard output
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            known = isinstance(error, LexiconError | OSError) or is_disk_full(error)
            if not known or os.environ.get("LORA_LEXICON_DEBUG") == "1":
                raise
            if os.environ.get("RANK", "0") == "0" and LAUNCHED not in os.environ:
                typer.echo(f"error: {_one_line(error)}", err=True)
            else:  # one of several processes: what started them says it once
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
            raise typer.Exit(1) from None

    return run


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file system'}: {error.strerror}"
    from lora_lexicon.folders import plain

    return plain(" ".join(str(error).split()))


def launcher_of(on: Place, cpus: int | None, gpus: float | None) -> "Launcher":
    """Where tasks run. Starts Ray, if it is to be started: what can be refused before is refused before."""
    from lora_lexicon.tasks import Here, connect

    check_launcher(on, cpus, gpus)
    return connect(cpus, gpus) if on is Place.ray else Here()


def check_launcher(on: Place, cpus: int | None, gpus: float | None) -> None:
    """Refuses what `launcher_of` would, but for what the cluster has; starts nothing."""
    from lora_lexicon.tasks import need_ray

    if on is Place.ray:
        need_ray()
    elif cpus is not None or gpus is not None:
        raise typer.BadParameter("--cpus and --gpus are of Ray tasks: add --on ray")


def command_line(context: typer.Context) -> str:
    """The command that was given, as a line for a shell: its arguments, and the options that are no defaults."""
    arguments: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        values = [str(each) for each in (value if isinstance(value, list | tuple) else [value])]
        if parameter.param_type_name == "argument":
            arguments += values
        elif isinstance(value, bool):
            options.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            options += [word for each in values for word in (parameter.opts[0], each)]
    words = ["lora-lexicon", *context.command_path.split()[1:]]
    if any(argument.startswith("-") for argument in arguments):
        return shlex.join([*words, *options, "--", *arguments])
    return shlex.join([*words, *arguments, *options])


def check_given(model: str, base: str | None = None) -> None:
    """Refuses a model or a base that is mistyped; called first, as torch takes seconds to import."""
    from lora_lexicon.resources import check_system, find_base

    check_system(model)
    if base:
        find_base(base)


def emit(record: dict[str, Any]) -> None:
    """Prints one JSON object on standard output."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """A line for a person, on standard error."""
    typer.echo(text, err=True)


def quiet_libraries() -> None:
    """No progress bars and no advice from transformers and peft; errors still come through."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A Rich table on standard output; numbers are right-aligned.

    Where the terminal is too narrow, titles of number columns are broken first, then text at its
    spaces; where the names before numbers have too little room, the columns go into two tables.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, shown = Console(markup=False), [[_cell(value) for value in row] for row in rows]
    cells = [[row[i] for row in shown] for i in range(len(columns))]
    longest = [max(map(len, [*name.split(), *found]), default=0) for name, found in zip(columns, cells, strict=True)]
    numbers = [bool(found) and all(_NUMBER.fullmatch(cell) for cell in found) for found in cells]
    gaps = 2 * (len(columns) - 1)
    narrow = sum(map(max, longest, map(len, columns))) + gaps > console.width
    if len(columns) > 2 and all(numbers[1:]) and min(longest[0], ROOM) + sum(longest[1:]) + gaps > console.width:
        half = 1 + len(columns) // 2
        show_table(title, columns[:half], [row[:half] for row in shown])
        show_table("", [columns[0], *columns[half:]], [[row[0], *row[half:]] for row in shown])
        return
    whole = [number or not any(" " in cell for cell in found) for number, found in zip(numbers, cells, strict=True)]
    if sum(width for width, kept in zip(longest, whole, strict=True) if kept) + gaps > 0.7 * console.width:
        whole = numbers  # single words are broken only where there is little room beside them
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, width, number, kept in zip(columns, longest, numbers, whole, strict=True):
        fixed = width if narrow and kept else None
        table.add_column(name, justify="right" if number else "left", width=fixed, overflow="fold")
    for row in shown:
        table.add_row(*row)
    if title:
        console.print(Text(title, style="italic"))
    console.print(table)
    console.print()


def bytes_text(number: float) -> str:
    """A number of bytes to three digits, such as `49.9 GB`."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def count_text(number: float) -> str:
    """A number of elements to three digits, such as `24.9B`."""
    return _scaled(number, ("", "K", "M", "B", "T"))


def rate_text(number: float) -> str:
    """FLOP/s to three digits, such as `61.2 GFLOP/s`."""
    return _scaled(number, tuple(f" {unit}FLOP/s" for unit in ("", "k", "M", "G", "T", "P")))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, int(math.log10(max(1, number)) / 3))
    value = number / 1000**power
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(value)))
    return f"{value:,.{digits}f}{units[power]}"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def progress(*fields: str, shown: bool = True, of_bytes: bool = False) -> Any:
    """A Rich progress display on standard error with rate and time left; use it as a context manager.

    Args:
        of_bytes: what is counted is bytes.
        fields: names of more that each task shows: add_task(..., loss="") and update(..., loss="2.31").

    The rate is of the last half minute of reports, or with update(..., seconds=), by the clock of who reports, of all
    since its first one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

    def rate(task: Any) -> float | None:
        if "first" not in task.fields:
            return task.speed
        done, began = task.fields["first"]
        seconds = task.fields["seconds"] - began
        return max(0.0, task.completed - done) / seconds if seconds > 0 else None

    class Rate(ProgressColumn):
        def render(self, task: Any) -> str:  # type: ignore[override]
            found = rate(task)
            return f"{bytes_text(found) if of_bytes else f'{found:,.0f}'}/s" if found else ""

    class Left(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Any) -> str:  # type: ignore[override]
            found = rate(task)
            return str(timedelta(seconds=math.ceil(task.remaining / found))) if found and task.remaining else ""

    class Bars(Progress):
        def update(self, task_id: Any, **changes: Any) -> None:  # type: ignore[override]
            super().update(task_id, **changes)
            task = self.tasks[task_id]
            if "seconds" in changes and task.completed <= task.fields.get("first", (math.inf,))[0]:
                task.fields["first"] = (task.completed, changes["seconds"])  # also where a run begins again before it

        def __exit__(self, kind: Any, *cause: Any) -> None:
            if kind is None:
                return self.stop()
            self.live.transient = True  # of an error only its own line is left to read
            return self.live.stop()

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        Rate(),
        Left(),
    )
    columns += tuple(TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields)
    return Bars(*columns, console=Console(stderr=True), disable=not shown)


class Advance:
    """Moves one progress bar: called with how many more are done, or `to` how many of how many."""

    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def __call__(self, more: int) -> None:
        self.bar.update(self.task, advance=more)

    def to(self, done: float, total: float) -> None:
        self.bar.update(self.task, completed=done, total=total)


@contextmanager
def step(title: str, total: int | None = None) -> Iterator[Advance]:
    """A progress bar for one stage, and a line that says how long it took."""
    started = time.perf_counter()
    if not sys.stderr.isatty():  # no bar is drawn there
        note(f"{title} ...")
    with progress() as bar:
        task = bar.add_task(title, total=total)
        yield Advance(bar, task)
        bar.update(task, visible=False)
    note(f"{title}: {time.perf_counter() - started:.1f} s")
