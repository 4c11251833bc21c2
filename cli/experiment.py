"""`lora-lexicon experiment`: a table or figure of the LM-Lexicon paper, run again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, SetOption, emit, guarded, note, quiet_libraries, show_table, step

if TYPE_CHECKING:
    from lora_lexicon.report.document import Cell

QUIET = ("Settings", "What each figure is", "Examples of faults")  # which the report has


@guarded
def experiment(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file, or a recipe that ships: tiny/table-2, -3, -4, -6, tiny/tables-7-8, tiny/figure-4, -5, "
            "-7, and the same of llama-3-8b.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for all of it; by default the recipe's name.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a table or figure of the LM-Lexicon paper again, and report it.

    Those of `tiny` run on the embedded base, in minutes. The same command goes on where an
    interrupted one stopped.
    """
    from dataclasses import asdict, replace

    from lora_lexicon.recipe import ExperimentRecipe, load_recipe
    from lora_lexicon.resources import find_recipe, recipes

    settings = load_recipe(ExperimentRecipe, find_recipe(recipe), overrides or [])
    folder = out or Path(f"{Path(recipe).stem}-out")

    from lora_lexicon.experiments.run import run_experiment
    from lora_lexicon.report.document import Figure, shown
    from lora_lexicon.report.write import write_report

    quiet_libraries()
    named = recipe if recipe in recipes() and not overrides else ""
    document = run_experiment(settings, folder, name=named, step=step)
    made = write_report(document, folder / "report", overwrite=True)
    if as_json:
        emit({"out": str(folder), "experiment": settings.experiment, "summary": list(document.summary),
              "tables": [asdict(table) for table in document.tables()]})  # fmt: skip
        return

    def brief(cell: "Cell") -> str:
        """Without an interval where there is a deviation: a terminal is narrow."""
        if isinstance(cell, Figure) and cell.deviation is not None:
            cell = replace(cell, low=None, high=None)
        return shown(cell)

    for table in document.tables():
        if table.title not in QUIET:
            show_table(
                table.title,
                table.columns,
                [[brief(cell) for cell in row] for row in table.rows],
            )
    for line in document.summary:
        note(line)
    note(f"everything is in {folder}; the report is {made[0]}")
