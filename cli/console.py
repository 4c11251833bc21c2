"""What every command shares: where output goes, how errors end, tables and progress bars.

Results go to standard output (one JSON object with `--json`), everything else to standard error.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]


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
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None

    return run


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file system'}: {error.strerror}"
    return " ".join(str(error).split())


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
    """A Rich table on standard output; numbers are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        cells = [_cell(row[i]) for row in rows]
        if cells and all(_NUMBER.fullmatch(cell) for cell in cells):
            table.add_column(column, justify="right", width=max(map(len, [*cells, *column.split()])))
        else:
            table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[_cell(value) for value in row])
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def progress() -> Any:
    """A Rich progress display on standard error with rate and time left; use it as a context manager."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Any) -> str:  # type: ignore[override]
            return f"{task.speed:,.0f}/s" if task.speed else "-/s"

    class Bars(Progress):
        def __exit__(self, kind: Any, *cause: Any) -> None:
            if kind is None:
                return self.stop()
            self.live.transient = True  # of an error only its own line is left to read
            return self.live.stop()

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Bars(*columns, console=Console(stderr=True))
