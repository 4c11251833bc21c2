"""`lora-lexicon pack suggest`: which pack fits a few examples best."""

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, emit, guarded, note, progress, quiet_libraries, show_table
from .signing import TrustOption, read_trust

SPLITS = ("test", "valid", "train")  # of an entries folder, held-out entries come first


@guarded
def suggest(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="An entries folder, or what `data prepare` reads.")
    ],
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="FOLDER", help="Where packs lie, at any depth; by default those that ship. Repeatable."
        ),
    ] = None,
    shipped: Annotated[bool, typer.Option("--shipped", help="With --from, look at the packs that ship too.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=2, help="How many entries are looked at.")] = 32,
    base: Annotated[str | None, typer.Option("--base", help="Where the packs' base lies, if elsewhere.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 42,
    trust: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank packs by their loss on a few entries of your own.

    Beside each pack as it routes stand its best single expert, its base, and how often its router abstains. A pack that
    cannot be used, or that --trust does not let in, is a line that says why; packs that hold the same are one row.
    """
    import tempfile

    from lora_lexicon.data.prepare import open_or_prepare
    from lora_lexicon.errors import PackError
    from lora_lexicon.packs.listing import find_packs
    from lora_lexicon.resources import packs

    policy = read_trust(trust)
    found = find_packs([*(from_ or []), *(packs().values() if shipped or not from_ else [])], deep=True)
    if not found:
        raise PackError("there is no pack to look at: give --from with a folder that packs lie in")
    with tempfile.TemporaryDirectory() as scratch:
        entries = open_or_prepare(data, Path(scratch) / "entries", keep_without_context=True)
        splits = [split for split in SPLITS if split in entries.splits]
        rows = [row for split in splits for row in entries.split(split)][:limit]

    from lora_lexicon.evaluation.suggest import suggest as rank

    quiet_libraries()
    with progress() as bar:
        task = bar.add_task("packs", total=len(found))
        report = rank(
            found, rows, base=base, seed=seed, policy=policy, progress=lambda done, _: bar.update(task, completed=done)
        )
    if as_json:
        emit(report)
        return
    from lora_lexicon.evaluation.report import comparison_rows

    names = [row["pack"] for row in report["packs"]]
    shown = [row["path"] if names.count(row["pack"]) > 1 else row["pack"] for row in report["packs"]]
    figures = ("loss", "best_expert", "best_expert_loss", "base_loss")
    table = [
        (name, *(row[key] for key in figures), f"{row['abstains']:.0%}")
        for name, row in zip(shown, report["packs"], strict=True)
    ]
    if table:
        columns = ("pack", "loss", "best expert", "alone", "base", "abstains")
        show_table(f"{len(rows)} entries, loss in nats a {report['unit']} of the definitions", columns, table)
    pairs = zip(shown, shown[1:], report["packs"], strict=False)
    if compared := [{"a": a, "b": b, "metric": "loss", **row["next"]} for a, b, row in pairs]:
        show_table("Differences: negative favours the first", *comparison_rows(compared))
    for row in report["packs"]:
        note(f"{row['pack']}: {' and '.join([row['path'], *row['also']])}")
    for row in report["broken"]:
        note(f"left out: {row['path']}: {row['why']}")
