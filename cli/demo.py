"""`lora-lexicon demo`: the whole path on the shipped tiny base and the shipped data, in some minutes."""

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, show_table


@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo-out"),
    base: Annotated[str, typer.Option(help="The base: a shipped pack's name, a folder or a Hub name.")] = "tiny",
    rows: Annotated[int, typer.Option(min=40, help="Training entries to use of the shipped sample.")] = 6000,
    test: Annotated[int, typer.Option(min=10, help="Held-out entries to evaluate on.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of clustering, training and random routing.")] = 42,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train, compose, evaluate and hot-add on the shipped data: no GPU, no network, a few minutes.

    The same command goes on where an interrupted one stopped.
    """
    from lora_lexicon.evaluation.report import comparison_rows, system_rows

    from .tour import Tour

    results = Tour(out, base, rows, test, seed).run(overwrite)
    if as_json:
        emit(results)
        return
    show_table(
        "Some definitions",
        ("term", "context", "definition", "expert"),
        [list(d.values()) for d in results["definitions"]],
    )
    show_table("Differences: negative loss favours the first", *comparison_rows(results["comparisons"]))
    show_table(f"{results['test_entries']} entries of held-out headwords", *system_rows(results["systems"]))
    note(f"{results['seconds']:.0f} s; everything is in {out}: results.json, domains.png, footprint-fidelity.png")
