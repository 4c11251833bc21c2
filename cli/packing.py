"""`lora-lexicon pack build` and `pack copy`: packs made of experts, or of other packs, and what their type costs."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note, progress, quiet_libraries, show_table

if TYPE_CHECKING:
    from lora_lexicon.domains.embed import Prompt
    from lora_lexicon.experts.lora import LoadedAdapter

Experts = Annotated[
    list[Path], typer.Argument(metavar="EXPERT...", help="Expert folders, or a folder that holds one for each domain.")
]
Base = Annotated[str, typer.Option("--base", help="The base: a folder, a Hub name, or a shipped pack.")]
Domains = Annotated[Path, typer.Option("--router", "--domains", metavar="DOMAINS", help="What `domains fit` made.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to make.")]


class PackType(StrEnum):
    """What adapters can be held in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


TypeOption = Annotated[
    PackType | None,
    typer.Option("--dtype", help="What the adapters are held in, and what it costs is said; by default as they are."),
]
CostData = Annotated[
    Path | None,
    typer.Option("--data", metavar="ENTRIES", help="Its test split says what --dtype costs; by default a sample's."),
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Where the pack's base lies, if elsewhere.")]
COST_ENTRIES = 200


@guarded
def build(
    experts: Experts,
    base: Base,
    domains: Domains,
    out: Annotated[Path, typer.Option("--out", help="The folder to make, or one file that ends in .lexpack.")],
    name: Annotated[str | None, typer.Option("--name", help="The pack's name; by default the folder's.")] = None,
    include_base: Annotated[bool, typer.Option("--include-base", help="Put the base into the pack too.")] = False,
    dtype: TypeOption = None,
    data: CostData = None,
    version: Annotated[str, typer.Option("--version", help="The pack's version.")] = "0.1.0",
    licence: Annotated[str, typer.Option("--licence", help="Its licence, an SPDX expression.")] = "",
    language: Annotated[
        list[str] | None, typer.Option("--language", help="Of its definitions, as en or pt-BR; may be repeated.")
    ] = None,
    description: Annotated[str, typer.Option("--description", help="A sentence for its card.")] = "",
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="FOLDER", help="What `evaluate --out` wrote, for its card.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pack LoRA experts with their router: a mixture on one shared base, as a folder or as one file.

    Each adapter still loads in plain PEFT, unless it is held in 8 bits. The same parts give the same bytes.
    """
    from lora_lexicon.experts.checkpoint import load_adapter
    from lora_lexicon.packs.layout import About
    from lora_lexicon.packs.pack import build_pack

    quiet_libraries()
    chosen = chosen_experts(experts, domains)
    about = About("", version, licence, tuple(language or ["en"]), description, tuple(_scores(scores)))
    record = build_pack(
        base, chosen, domains, out, name=name, about=about, include_base=include_base, dtype=dtype, overwrite=overwrite
    )
    cost = _cost(out, [load_adapter(path) for path in chosen], base, data) if dtype else None
    _show(out, record, cost, as_json)


@guarded
def copy(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="A pack's folder or file, or a shipped pack's name.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make, or one file that ends in .lexpack.")],
    dtype: TypeOption = None,
    data: CostData = None,
    base: BaseOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Another name.")] = None,
    version: Annotated[str | None, typer.Option("--version", help="Another version.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Another licence, an SPDX expression.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="Another sentence for its card.")] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="FOLDER", help="What `evaluate --out` wrote, for its card.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a pack again: as a folder or one file, in another type, or with other words about itself."""
    from lora_lexicon.resources import find_model

    source = find_model(pack)
    from lora_lexicon.experts.checkpoint import check_name, load_adapter
    from lora_lexicon.packs.pack import copy_pack

    quiet_libraries()
    given = {
        "name": name and check_name(name),
        "version": version,
        "licence": licence,
        "description": description,
        "scores": tuple(_scores(scores)) or None,
    }
    about = {key: value for key, value in given.items() if value is not None}
    record = copy_pack(source, out, dtype=dtype, overwrite=overwrite, **about)
    cost = None
    if dtype:
        before = [load_adapter(source / domain["adapter"], domain["name"]) for domain in record["domains"]]
        cost = _cost(out, before, base, data)
    _show(out, record, cost, as_json)


def show_domains(title: str, domains: list[dict[str, Any]]) -> None:
    """A pack's domains as a table."""
    rows = [(d["name"], d["rank"], ", ".join(d["modules"]), d["dtype"], d["trained_parameters"]) for d in domains]
    show_table(title, ("domain", "rank", "modules", "held as", "parameters"), rows)


def _show(out: Path, record: dict[str, Any], cost: dict[str, float] | None, as_json: bool) -> None:
    if as_json:
        emit({"out": str(out), **record, "dtype_cost": cost})
        return
    show_domains(str(out), record["domains"])
    if cost:
        note(
            f"loss on {cost['rows']} held-out entries: {cost['before']:.5f} as they were, {cost['after']:.5f} as "
            f"{record['domains'][0]['dtype']} ({cost['difference']:+.5f} nats per token)"
        )


def _cost(out: Path, before: "list[LoadedAdapter]", base: str | None, data: Path | None) -> dict[str, float]:
    """The loss of held-out entries with the adapters as they were, and as the pack holds them now."""
    from lora_lexicon.compose.probes import probe_entries
    from lora_lexicon.compose.system import load_system
    from lora_lexicon.experts.grouped import group_adapters
    from lora_lexicon.inference.engine import losses

    entries, system = probe_entries(data, "test", COST_ENTRIES), load_system(str(out), base=base)
    assert system.active is not None
    found = []
    with progress() as bar:
        task = bar.add_task("what the type costs", total=2 * len(entries))
        for adapters in (None, {adapter.name: adapter for adapter in before}):
            if adapters is not None:
                group_adapters(system.model, [adapters[name] for name in system.experts], system.active)
            nats, tokens = losses(system, entries, progress=lambda done: bar.advance(task, done))
            found.append(float(nats.sum() / tokens.sum()))
    after, was = found
    return {"rows": len(entries), "before": was, "after": after, "difference": after - was}


def _scores(folder: Path | None) -> list[dict[str, Any]]:
    """The scores of an evaluation's report, each with its signature."""
    from lora_lexicon.errors import PackError
    from lora_lexicon.folders import read_record

    if folder is None:
        return []
    report = read_record(folder / "report.json", PackError, "an evaluation")
    try:
        return [
            {"system": s["name"], "metric": metric, "value": s[metric], "signature": signature, "rows": report["rows"]}
            for s in report["systems"]
            for metric, signature in report["signatures"].items()
            if s.get(metric) is not None
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{folder / 'report.json'} is damaged ({error!r}): run `evaluate --out` again") from error


def chosen_experts(experts: list[Path], domains: Path) -> list[Path]:
    """The expert folders named; of a folder of experts, those whose names are domains of the router."""
    from lora_lexicon.compose.merge import expert_folders
    from lora_lexicon.domains.router import load_router

    names = load_router(domains).names
    chosen = []
    for path in experts:
        found = expert_folders([path])
        ours = [folder for folder in found if folder.name in names]
        if found == [path] or not ours:  # experts of quite other domains are for the composition to refuse
            ours = found
        left_out = [folder.name for folder in found if folder not in ours]
        if left_out:
            note(f"not domains of the router, left out: {', '.join(left_out)}")
        chosen += ours
    return chosen


def prompts_of(entries: Path, split: str, limit: int | None) -> "list[Prompt]":
    """The distinct prompts of a split, in order."""
    from lora_lexicon.data.store import load_entries

    rows = load_entries(entries).split(split)
    return list(dict.fromkeys((entry.term, entry.context) for entry in rows))[:limit]
