"""`lora-lexicon doctor`: what an artefact is, what it fits, what is wrong, and the command that mends it."""

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, emit, guarded, note, progress, quiet_libraries, show_table


@guarded
def doctor(
    path: Annotated[
        str,
        typer.Argument(help="Entries, domains, a base, an expert or a folder of them, a MoE, a pack, a PEFT adapter."),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Compare with this base; by default with the one that it names.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at any artefact: what it is, what it fits, what is wrong, and the command that mends it.

    Every value is read, in small blocks; no code is run, and no link out of the folder is followed. Exit code 1 says
    that something is wrong.
    """
    from lora_lexicon.archive import SUFFIX
    from lora_lexicon.errors import LexiconError
    from lora_lexicon.folders import folder_bytes
    from lora_lexicon.resources import find_model

    if Path(path).is_file() and Path(path).suffix != SUFFIX:
        raise LexiconError(
            f"{path} is one file, and what is looked at is a folder, or a pack in one {SUFFIX} file: give the folder "
            f"that it lies in, {Path(path).parent}"
        )
    folder = find_model(path)
    from lora_lexicon.doctor.examine import examine

    quiet_libraries()
    with progress() as bar:
        task = bar.add_task("reading bytes", total=folder_bytes(folder))
        chart = examine(folder, base, lambda done: bar.update(task, advance=done))
    if as_json:
        emit(chart.record())
    else:
        typer.echo(f"{path}: {chart.kind}")
        for key, value in chart.facts.items():
            typer.echo(f"{key}: {value}")
        if chart.findings:
            commands = list(dict.fromkeys(f.mend for f in chart.findings if f.mend))
            numbers = {command: str(number) for number, command in enumerate(commands, 1)}
            rows = [(f.severity, f.what, f.where or ".", numbers.get(f.mend, "")) for f in chart.findings]
            show_table("", ("severity", "what", "where", "mend"), rows)
            for command, number in numbers.items():  # in a line of its own, to be copied
                typer.echo(f"mend {number}: {command}")
        if chart.left_out:
            note(f"and {chart.left_out:,} more findings")
        if chart.healthy:
            note("nothing is wrong" if not chart.findings else "nothing is wrong beside the warnings")
    raise typer.Exit(0 if chart.healthy else 1)
