"""`lora-lexicon domains new`: from a new dictionary to a pack that knows it, in one command."""

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, SetOption, emit, guarded, note, progress, quiet_libraries, show_table
from .pack import writable
from .signing import TrustOption, read_trust

if TYPE_CHECKING:
    from lora_lexicon.experts.journal import Step
    from lora_lexicon.recipe import TrainRecipe

MARK = "domain.json"  # in the work folder: whose work it is


class OnConflict(StrEnum):
    """What becomes of an old domain that the new one sits on."""

    KEEP = "keep"
    MERGE = "merge"
    REPLACE = "replace"


@guarded
def new(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="The new domain's entries folder, or what `data prepare` reads."),
    ],
    into: Annotated[str, typer.Option("--into", metavar="PACK", help="A pack's folder, or a shipped pack's name.")],
    name: Annotated[str | None, typer.Option("--name", help="The domain's name; by default the data's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The folder to make: pack/ is the new pack, beside it lie the domain's own pack, its expert and the "
            "report. By default the pack itself changes, and the rest lies in PACK.NAME.",
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", metavar="ENTRIES", help="The old domains' entries; by default sample:wordnet."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="At most so many held-out entries of old and of new domains.")
    ] = 400,
    routers: Annotated[
        bool,
        typer.Option("--routers", help="Compare learned routers too: they learn of the train split of --held-out."),
    ] = False,
    on_conflict: Annotated[
        OnConflict,
        typer.Option("--on-conflict", help="Where the new domain sits on top of an old one."),
    ] = OnConflict.KEEP,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="A YAML file or a shipped recipe; by default as the pack's own experts had it."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of the adapter; by default the recipe's.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="How often the entries are read.")] = None,
    overrides: SetOption = None,
    base: Annotated[str | None, typer.Option("--base", help="Where the pack's base lies, if elsewhere.")] = None,
    keep_without_context: Annotated[
        bool, typer.Option("--keep-without-context", help="Keep entries that have no example.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the headwords' splits, and of the bootstrap.")] = 42,
    trust: TrustOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a domain of a new dictionary, and let it join a pack.

    Prompts are embedded and give the domain's centroid, an adapter is trained on the pack's base, and the report says
    what the domain gains and which held-out prompts of the old domains change hands. The other experts' files stay as
    they are. A run that was stopped goes on where it was when the same command is given again. With --trust, the pack
    must be one that ships, or that somebody trusted signed.
    """
    pack = writable(into, out)
    from lora_lexicon.compose.mixture import read_manifest
    from lora_lexicon.data.prepare import open_or_prepare
    from lora_lexicon.errors import DataError
    from lora_lexicon.experts.checkpoint import check_name

    policy = read_trust(trust)
    if policy is not None:
        policy.check_named(pack)
    manifest = read_manifest(pack)
    settings = _recipe(pack, manifest.domains, recipe, overrides, rank, epochs)
    name = check_name(name or _stem(data[0]))
    work = out or pack.resolve().with_name(f"{pack.resolve().name}.{name}")
    _claim(work, {"domain": name, "into": into, "data": data}, overwrite)
    if out and (out / "pack").exists() and not overwrite:
        raise DataError(f"{out / 'pack'} is there already: choose another --out, or add --overwrite")
    options = {"seed": seed, "keep_without_context": keep_without_context}
    with progress() as bar:
        task = bar.add_task("reading", total=None)
        entries = open_or_prepare(
            data,
            work / "entries",
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )

    from lora_lexicon.evaluation.metrics import mean_bleu
    from lora_lexicon.evaluation.newdomain import Told, Wanted, new_domain
    from lora_lexicon.folders import write_record, write_whole
    from lora_lexicon.report import markdown
    from lora_lexicon.report.document import save, shown
    from lora_lexicon.report.newdomain import conflict, document_of, sentences, tables

    def write(report: dict[str, Any]) -> None:
        document = document_of(report)
        save(document, work)
        write_whole(work / "report.md", markdown.page(document).encode())
        write_record(work / "report.json", report)

    quiet_libraries()
    wanted = Wanted(
        name=name,
        recipe=settings,
        base=base,
        base_name=into if not Path(into).exists() and manifest.base_inside else None,
        held_out=held_out,
        limit=limit,
        routers=routers,
        out=out and out / "pack",
        on_conflict=on_conflict.value,
        seed=seed,
        overwrite=overwrite,
    )
    with progress("loss") as bar:
        training = bar.add_task("training, tokens", total=None, loss="-")
        checking = bar.add_task("decoding prompts", total=None, loss="-")

        def step(step: "Step") -> None:
            loss, done, total = f"{step.loss:.3f}", step.tokens, step.all_tokens
            bar.update(training, completed=done, total=total, loss=loss, seconds=step.seconds)

        told = Told(
            overlap=lambda found: note("warning: " + conflict(name, [overlap.domain for overlap in found])),
            training=step,
            checking=lambda done, total: bar.update(checking, completed=done, total=total),
        )
        report = new_domain(pack, entries, work, wanted, score=mean_bleu, told=told, report=write)
    if as_json:
        emit({**report, "out": str(work)})
        return
    for table in tables(report):
        show_table(table.title, table.columns, [[shown(cell) for cell in row] for row in table.rows])
    for line in sentences(report):
        note(line)
    note(f"the pack is {report['pack']}; report.md, the expert and a pack of {name} alone lie in {work}")


def _stem(data: str) -> str:
    """The name that the data goes by: of a file without its endings, of a sample, of a data set."""
    return data.removeprefix("sample:").rstrip("/").rsplit("/", 1)[-1].split(".")[0]


def _recipe(
    pack: Path, domains: tuple[str, ...], recipe: str | None, overrides: list[str] | None, rank: int | None,
    epochs: float | None,
) -> "TrainRecipe":  # fmt: skip
    """The recipe asked for; by default that of the first of the pack's experts that has one."""
    from lora_lexicon.experts.checkpoint import RECORD, read_expert
    from lora_lexicon.recipe import TrainRecipe, load_recipe
    from lora_lexicon.resources import find_recipe

    given: dict[str, Any] = {}
    if recipe is None:
        folders = [pack / "adapters" / name for name in domains]
        recorded = [read_expert(folder).recipe for folder in folders if (folder / RECORD).is_file()]
        given = next((found for found in recorded if found.get("kind") == "lora"), {})
    file = find_recipe(recipe or "tiny/lora") if not given else None
    wanted = {"rank": rank, "epochs": epochs, "kind": "lora"}
    given = {**given, **{key: value for key, value in wanted.items() if value is not None}}
    return load_recipe(TrainRecipe, file, overrides or [], **given)


def _claim(work: Path, ours: dict[str, Any], overwrite: bool) -> None:
    """Makes the work folder, or goes on in it where the same command made it."""
    from lora_lexicon.errors import LexiconError
    from lora_lexicon.folders import read_record, write_record

    mark = work / MARK
    if mark.is_file():
        if not overwrite and read_record(mark, LexiconError, "the work of `domains new`") != ours:
            raise LexiconError(f"{work} holds the work on another domain: choose another --out, or add --overwrite")
        if overwrite:
            shutil.rmtree(work / "pack", ignore_errors=True)
    elif work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise LexiconError(f"{work} is there, and `domains new` did not make it: choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    write_record(mark, ours)
