"""`lora-lexicon demo`: the whole path on the shipped tiny base and the shipped data, in some minutes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, quiet_libraries, show_table


@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo-out"),
    base: Annotated[str, typer.Option(help="The base: a shipped pack's name, a folder or a Hub name.")] = "tiny",
    limit: Annotated[int | None, typer.Option(min=40, help="Read only so many rows of each shipped sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of clustering, training and random routing.")] = 42,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole path on the data that ships.

    Train, compose, evaluate, hot-add: without GPU or network, in a few minutes.
    The same command goes on where an interrupted one stopped.
    """
    from lora_lexicon.evaluation.report import comparison_rows, system_rows

    from .tour import Tour

    quiet_libraries()
    results = Tour(out, base, limit, seed).run(overwrite)
    if as_json:
        emit(results)
        return
    show_table(
        "Some definitions",
        ("term", "context", "definition", "expert"),
        [list(d.values()) for d in results["definitions"]],
    )
    show_table("Differences: negative loss favours the first", *comparison_rows(results["comparisons"]))
    show_table(_title(results), *system_rows(results["systems"], leave_out=("perplexity",)))
    note(f"{results['seconds']:.0f} s; everything is in {out}: results.json, domains.png, footprint-fidelity.png")


def _title(results: dict[str, Any]) -> str:
    entries, defined = results["test_entries"], results["defined_entries"]
    return f"{entries:,} entries of held-out headwords; BLEU, ROUGE-L and tokens/s on the first {defined:,} of them"
