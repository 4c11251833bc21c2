"""`lora-lexicon domains`: entries in, semantic domains and their router out, and what they look like."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    CpusOption,
    GpusOption,
    JsonOption,
    OnOption,
    OverwriteOption,
    Place,
    SetOption,
    emit,
    guarded,
    launcher_of,
    note,
    progress,
    quiet_libraries,
    show_table,
)
from .editing import merge, rename, split
from .newdomain import new

if TYPE_CHECKING:
    from lora_lexicon.data.store import Entries
    from lora_lexicon.domains.embed import Embedder
    from lora_lexicon.domains.fit import Domains
    from lora_lexicon.domains.router import Router
    from lora_lexicon.recipe import DomainsRecipe

MEMBERS = 6  # typical members shown per domain

app = typer.Typer(no_args_is_help=True, help="Cut entries into semantic domains, and look at them.")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-lexicon" / "embeddings"


EntriesArgument = Annotated[Path, typer.Argument(metavar="ENTRIES", help="A folder made by `data prepare`.")]
OutOption = Annotated[Path, typer.Option("--out", help="The folder to make.")]
BaseOption = Annotated[str, typer.Option("--base", help="The base: a folder, a Hub name, or a shipped pack.")]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="balanced (default), kmeans, lexical, random or none.")
]
EmbedderOption = Annotated[str | None, typer.Option("--embedder", help="base (default), st:NAME, hf:NAME or tfidf.")]
LayersOption = Annotated[
    int | None, typer.Option("--layers", min=0, help="How many bottom layers of the base are read.")
]
RouterOption = Annotated[
    str | None,
    typer.Option(
        "--router",
        help="What scores domains: centroid (default, the cosine to it), or, learned on all domains' prompts, "
        "projection (of centroids) or linear (a discriminant). A domain joins any of them without training.",
    ),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="A YAML file, or a shipped recipe (tiny/domains): see docs/recipes.md.")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Where embeddings are kept by content (the user's cache folder).")
]


@app.command("fit")
@guarded
def fit(
    entries: EntriesArgument,
    out: OutOption,
    base: BaseOption = "tiny",
    domains: Annotated[int | None, typer.Option("--domains", min=1, help="How many domains (4).")] = None,
    method: MethodOption = None,
    embedder: EmbedderOption = None,
    layers: LayersOption = None,
    router: RouterOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    cache: CacheOption = None,
    on: OnOption = Place.here,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cluster the training prompts and write the domains with their router.

    Only the prompt is read, the term in its context; never the definition. Embedding that was
    stopped goes on where it was when the same command is given again. With --on ray the prompts are
    embedded by tasks on Ray; --cache must lie where all machines see it.
    """
    given = {"domains": domains, "method": method, "embedder": embedder, "layers": layers, "router": router}
    loaded, wanted, maker, base = _ready(entries, base, recipe, set_, given)
    from lora_lexicon.domains.embed import embed_apart
    from lora_lexicon.domains.fit import fit_domains, prompts_of
    from lora_lexicon.experts.base import load_base
    from lora_lexicon.tasks import OnRay

    cache, launcher = cache or default_cache(), launcher_of(on, cpus, gpus)
    with progress() as bar:
        if isinstance(launcher, OnRay):
            embedding = bar.add_task("prompts, on Ray", total=None)
            lists = [prompts_of(loaded.split(split)) for split in loaded.splits]
            embed_apart(
                launcher,
                lists,
                cache,
                wanted,
                base,
                load_base,
                lambda done, total: bar.update(embedding, completed=done, total=total),
            )
        task = bar.add_task("prompts", total=sum(loaded.record["splits"].values()))
        iterations = bar.add_task("clustering", total=None, visible=False)
        found = fit_domains(
            loaded,
            maker,
            wanted,
            out,
            base=base,
            cache=cache,
            overwrite=overwrite,
            progress=lambda count: bar.advance(task, count),
            clustering=lambda inertia: bar.update(
                iterations, advance=1, visible=True, description=f"clustering, inertia {inertia:.4f} a row"
            ),
        )
        bar.update(iterations, total=bar.tasks[iterations].completed)
    if as_json:
        emit({**found.record, "out": str(out)})
        return
    _tables(found)
    note(f"written to {out}; draw them with: lora-lexicon domains show {out} --map domains.png")


@app.command("sweep")
@guarded
def sweep(
    entries: EntriesArgument,
    out: OutOption,
    domains: Annotated[str, typer.Option("--domains", metavar="N,N,...", help="The numbers of domains.")] = "2,4,8,16",
    base: BaseOption = "tiny",
    method: MethodOption = None,
    embedder: EmbedderOption = None,
    layers: LayersOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    cache: CacheOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare numbers of domains by cohesion, separation and silhouette, as a table and a picture.

    The prompts are embedded once, and each number is clustered as `domains fit` would.
    """
    from lora_lexicon.errors import RecipeError

    if not all(number.strip().isdecimal() for number in domains.split(",")):
        raise RecipeError(f"--domains {domains!r} is no list of whole numbers: write it like 2,4,8")
    counts = sorted({int(number) for number in domains.split(",")})
    given = {"method": method, "embedder": embedder, "layers": layers}
    loaded, wanted, maker, base = _ready(entries, base, recipe, set_, given)
    from lora_lexicon.domains.sweep import PICTURE, TRAIN, sweep_domains

    with progress() as bar:
        task = bar.add_task("prompts", total=loaded.record["splits"].get(TRAIN, 0))
        cuts = bar.add_task("numbers of domains", total=len(counts))
        record = sweep_domains(
            loaded,
            maker,
            wanted,
            counts,
            out,
            base=base,
            cache=cache or default_cache(),
            overwrite=overwrite,
            progress=lambda count: bar.advance(task, count),
            done=lambda: bar.advance(cuts, 1),
        )
    if as_json:
        emit({**record, "out": str(out)})
        return
    columns = ("domains", "cohesion", "separation", "silhouette", "router_agreement")
    titles = ("domains", "cohesion ↓", "separation ↑", "silhouette ↑", "router agrees ↑")
    show_table("Numbers of domains", titles, [[row[name] for name in columns] for row in record["rows"]])
    note(
        f"cohesion falls with any number: look for where silhouette and separation stop rising; drawn: {out / PICTURE}"
    )


def _ready(
    entries: Path, base: str, recipe: str | None, set_: list[str] | None, given: dict[str, Any]
) -> "tuple[Entries, DomainsRecipe, Embedder, str]":
    """Entries, recipe and embedder as the options say, and the base's name where the embedder needs it, else ""."""
    from lora_lexicon.recipe import DomainsRecipe, load_recipe
    from lora_lexicon.resources import find_base, find_recipe

    wanted = load_recipe(DomainsRecipe, find_recipe(recipe or "tiny/domains"), set_ or [], **given)

    from lora_lexicon.data.store import load_entries

    loaded = load_entries(entries)
    find_base(base)  # what is mistyped is said before torch is imported

    from lora_lexicon.domains.embed import embedder_name, make_embedder
    from lora_lexicon.domains.fit import TRAIN, prompts_of
    from lora_lexicon.experts.base import load_base

    quiet_libraries()
    name = embedder_name(wanted)
    model = load_base(base) if name == "base" else None
    prompts = prompts_of(loaded.split(TRAIN)) if name == "tfidf" else []
    return loaded, wanted, make_embedder(wanted, base=model, prompts=prompts), base if model else ""


@app.command("show")
@guarded
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by `domains fit`.")],
    entries: Annotated[
        Path | None, typer.Argument(metavar="[ENTRIES]", help="Its entries, to show members with their definitions.")
    ] = None,
    map_: Annotated[Path | None, typer.Option("--map", metavar="FILE.png", help="Draw the map of the domains.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show sizes, cohesion and separation (tables 7 and 8 of the paper), names and typical members."""
    from lora_lexicon.domains.fit import load_domains

    found = load_domains(folder)
    members = _with_definitions(found, entries) if entries else {}
    if map_:
        note(f"{map_}: {found.draw(map_)}")
    if as_json:
        typical = {name: list(dict.fromkeys(terms)) for name, terms in _terms(found.router).items()}
        emit({**found.record, "members": typical, "definitions": members})
        return
    _tables(found)
    for name, rows in members.items():
        show_table(name, ("term", "definition"), rows)


def _terms(router: "Router") -> dict[str, list[str]]:
    return {name: list(dict.fromkeys(terms)) for name, terms in zip(router.names, router.terms, strict=True)}


def _tables(found: "Domains") -> None:
    record, terms = found.record, _terms(found.router)
    splits = list(record["sizes"])
    rows = [(name, *(record["sizes"][s][name] for s in splits), record["cohesion"][name]) for name in record["names"]]
    show_table("Domains", ("domain", *splits, "cohesion ↓"), rows)
    members = [(name, ", ".join(terms[name][:MEMBERS])) for name in record["names"]]
    show_table("What they hold", ("domain", "typical members"), members)
    if record["separation"]:
        pairs = [(f"{pair['a']}, {pair['b']}", pair["distance"]) for pair in record["separation"]]
        show_table("Separation", ("pair", "distance ↑"), [*pairs, ("mean", record["mean_separation"])])
    note("cohesion: mean cosine distance to the own centroid; separation: cosine distance of two centroids")


def _with_definitions(found: "Domains", entries: Path) -> dict[str, list[tuple[str, str]]]:
    """Typical members of each domain with a definition of theirs in it."""
    from lora_lexicon.data.store import load_entries
    from lora_lexicon.domains.fit import TRAIN

    loaded = load_entries(entries)
    shown = {}
    for name, terms in _terms(found.router).items():
        definitions = {row.term: row.definition for row in found.rows(loaded, TRAIN, name)}
        shown[name] = [(term, definitions[term]) for term in terms[:MEMBERS]]
    return shown


for command in (new, rename, merge, split):
    app.command(command.__name__)(command)
