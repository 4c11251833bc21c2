"""`lora-lexicon experiment`: a table or figure of the LM-Lexicon paper, run again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, SetOption, emit, guarded, note, quiet_libraries, show_table, step

if TYPE_CHECKING:
    from lora_lexicon.report.document import Cell, Document

QUIET = ("Settings", "What each figure is", "Examples of faults")  # which the report has


@guarded
def experiment(
    named: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="A YAML file, or a recipe that ships: tiny/table-2, -3, -4, -6, tiny/tables-7-8, tiny/figure-4, -5, "
            "-7, and the same of llama-3-8b. What several have in common is trained once.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder for all of it.")] = Path("experiments-out"),
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run tables and figures of the LM-Lexicon paper again, and report them.

    Those of `tiny` run on the embedded base, in minutes to an hour each. The same command goes on
    where an interrupted one stopped.
    """
    from dataclasses import asdict

    from lora_lexicon.experiments.run import READ_BY_ALL, READS, check_experiment, run_experiment
    from lora_lexicon.recipe import ExperimentRecipe, load_recipe
    from lora_lexicon.report.write import write_report
    from lora_lexicon.resources import find_recipe, recipes

    files = [find_recipe(name) for name in named]
    wanted = []
    for file in files:
        read = READ_BY_ALL | READS[load_recipe(ExperimentRecipe, file).experiment]
        own = [one for one in overrides or [] if len(files) == 1 or one.partition("=")[0].strip() in read]
        wanted.append(load_recipe(ExperimentRecipe, file, own))
        check_experiment(wanted[-1])  # before the first of them takes its time
    for one in overrides or []:
        if not any(one.partition("=")[0].strip() in READ_BY_ALL | READS[recipe.experiment] for recipe in wanted):
            load_recipe(ExperimentRecipe, None, [one])  # which names a slip
            raise typer.BadParameter(f"--set {one}: none of {', '.join(named)} reads it")
    quiet_libraries()
    found = []
    for name, recipe in zip(named, wanted, strict=True):
        shipped = name if name in recipes() and not overrides else ""
        document = run_experiment(recipe, out, name=shipped, step=step)
        made = write_report(document, out / recipe.experiment / "report", overwrite=True)
        found.append({
            "experiment": recipe.experiment, "report": str(made[0]), "summary": list(document.summary),
            "tables": [asdict(table) for table in document.tables()],
        })  # fmt: skip
        if not as_json:
            _show(document)
            note(f"the report is {made[0]}")
    if as_json:
        emit({"out": str(out), "experiments": found})


def _show(document: "Document") -> None:
    """Tables without intervals where there are deviations, since a terminal is narrow; then the summary."""
    from dataclasses import replace

    from lora_lexicon.report.document import Figure, shown

    def brief(cell: "Cell") -> str:
        if isinstance(cell, Figure) and cell.deviation is not None:
            cell = replace(cell, low=None, high=None)
        return shown(cell)

    for table in document.tables():
        if table.title not in QUIET:
            show_table(table.title, table.columns, [[brief(cell) for cell in row] for row in table.rows])
    for line in document.summary:
        note(line)
