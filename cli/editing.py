"""`lora-lexicon domains rename | merge | split`: of a domains folder, or of a pack."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, progress, quiet_libraries, show_table
from .pack import writable
from .packing import show_domains

if TYPE_CHECKING:
    from lora_lexicon.data.store import Entries
    from lora_lexicon.domains.embed import Embedder
    from lora_lexicon.domains.fit import Domains

Where = Annotated[
    str, typer.Argument(metavar="WHERE", help="A folder of `domains fit`, a pack's folder, or a shipped pack's name.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The folder to make; by default WHERE itself changes.")]
Base = Annotated[str | None, typer.Option("--base", help="The base that embeds, if it lies elsewhere.")]


@guarded
def rename(
    where: Where,
    old: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.")],
    out: Out = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give a domain another name: in the router, and of a pack in its adapter and manifest too."""
    if found := _fitted(where):
        from lora_lexicon.domains.edit import rename_in

        _show_fitted(rename_in(found, old, name, out or found.path, overwrite=overwrite or out is None), as_json)
        return
    pack = writable(where, out)
    from lora_lexicon.packs.edit import rename_domain

    quiet_libraries()
    record = rename_domain(pack, old, name, out=out, overwrite=overwrite)
    if as_json:
        emit(record)
        return
    show_domains(record["name"], record["domains"])


@guarded
def merge(
    where: Where,
    names: Annotated[list[str], typer.Argument(metavar="DOMAIN DOMAIN...", help="The domains to make one of.")],
    name: Annotated[str | None, typer.Option("--name", help="Its name; by default that of the first.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="ENTRIES",
            help="Entries that describe the merged domain: for a domains folder those it was fitted on; of a pack, "
            "without any, the domains' own centroids and typical terms do.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Of a pack's merged adapter; by default the sum of theirs, which is exact."),
    ] = None,
    base: Base = None,
    out: Out = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one domain of several.

    Its centroid is the mean of all their members. A pack's merged adapter is the mean of theirs, weighted by their
    training rows: exact at the sum of their ranks, else cut to --rank by the SVD, and the part that is kept is told.
    """
    from lora_lexicon.errors import DataError

    if len(set(names)) < 2:
        raise DataError("one domain cannot be merged: name two or more")
    name = name or names[0]
    if found := _fitted(where):
        from lora_lexicon.domains.edit import merge_in

        if rank is not None:
            raise DataError(f"{where} holds no adapters, so --rank has no meaning: leave it out")
        entries, embedder = _ready(found, data, base)
        with progress() as bar:
            task = bar.add_task("prompts", total=None)
            made = merge_in(
                found,
                names,
                name,
                entries,
                embedder,
                out or found.path,
                cache=_cache(),
                overwrite=overwrite or out is None,
                progress=lambda count: bar.advance(task, count),
            )
        _show_fitted(made, as_json)
        return
    pack = writable(where, out)
    from lora_lexicon.packs.edit import merge_domains

    quiet_libraries()
    rows = _train_rows(data) if data else []
    report = merge_domains(pack, names, name, rank=rank, rows=rows, base=base, out=out, overwrite=overwrite)
    if as_json:
        emit(report)
        return
    show_domains(report["record"]["name"], report["record"]["domains"])
    shares = ", ".join(f"{old} {share:.2f}" for old, share in report["weights"].items())
    note(f"{name} is the mean of {shares}, of rank {report['rank']}, which keeps {report['energy']:.2%} of it")
    many = f" ({report['members']:,} of them)" if report["members"] else ", so that thresholds of abstention are rough"
    note(f"its centroid and quantiles are of {report['described_by']}{many}")


@guarded
def split(
    where: Where,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain to cut in two.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="ENTRIES", help="Entries; those of the domain are clustered."),
    ],
    names: Annotated[
        str, typer.Option("--names", metavar="A,B", help="Names of the two; by default words that tell them apart.")
    ] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of the clustering.")] = 42,
    base: Base = None,
    out: Out = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a domain in two by clustering its entries. In a pack, both start with its adapter."""
    into = [part.strip() for part in names.split(",") if part.strip()]
    if found := _fitted(where):
        from lora_lexicon.domains.edit import split_in

        entries, embedder = _ready(found, data, base)
        with progress() as bar:
            task = bar.add_task("prompts", total=None)
            made = split_in(
                found,
                domain,
                into,
                entries,
                embedder,
                out or found.path,
                seed=seed,
                cache=_cache(),
                overwrite=overwrite or out is None,
                progress=lambda count: bar.advance(task, count),
            )
        _show_fitted(made, as_json)
        return
    pack = writable(where, out)
    from lora_lexicon.packs.edit import split_domain

    quiet_libraries()
    report = split_domain(pack, domain, _train_rows(data), into, seed=seed, base=base, out=out, overwrite=overwrite)
    if as_json:
        emit(report)
        return
    show_domains(report["record"]["name"], report["record"]["domains"])
    shown = ", ".join(f"{child} ({count:,} entries)" for child, count in report["into"].items())
    note(f"{domain} is now {shown}; {report['elsewhere']:,} entries of other domains go to them too")
    note("both answer as it did: train --from its adapter on each one's entries makes them differ")


def _fitted(where: str) -> "Domains | None":
    """The domains folder that lies there, if it is one."""
    if not (Path(where) / "domains.json").is_file():
        return None
    from lora_lexicon.domains.fit import load_domains

    return load_domains(Path(where))


def _ready(found: "Domains", data: Path | None, base: str | None) -> "tuple[Entries, Embedder]":
    """The entries that a domains folder was fitted on, and its router's embedder."""
    from lora_lexicon.data.store import load_entries
    from lora_lexicon.errors import DataError

    if data is None:
        raise DataError(f"{found.path} keeps no vectors: add --data with the entries it was fitted on")
    entries = load_entries(data)
    found.check(entries)
    quiet_libraries()
    if found.router.embedder_name != "base":
        from lora_lexicon.domains.embedders import restore_embedder

        return entries, restore_embedder(found.router)

    from lora_lexicon.compose.moe import own_embedder
    from lora_lexicon.experts.base import load_base

    loaded = load_base(base or found.record["base"])
    return entries, own_embedder(found.router, loaded.model, loaded.tokenizer, loaded.fingerprint)


def _train_rows(data: Path) -> list[Any]:
    from lora_lexicon.data.store import load_entries

    return load_entries(data).split("train")


def _cache() -> Path:
    from .domains import default_cache

    return default_cache()


def _show_fitted(found: "Domains", as_json: bool) -> None:
    if as_json:
        emit({**found.record, "out": str(found.path)})
        return
    sizes, cohesion = found.record["sizes"], found.record["cohesion"]
    rows = [(name, *(own.get(name, 0) for own in sizes.values()), cohesion[name]) for name in found.router.names]
    show_table(str(found.path), ("domain", *sizes, "cohesion ↓"), rows)
