"""`lora-lexicon compose`: experts and a router into one model, either as a MoE or as a pack of adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import compare
from .console import JsonOption, OverwriteOption, emit, guarded, note, progress, quiet_libraries, show_table

app = typer.Typer(no_args_is_help=True, help="Compose experts and a router into one model.")
app.command("compare")(compare.compare)

Experts = Annotated[
    list[Path], typer.Argument(metavar="EXPERT...", help="Expert folders, or a folder that holds one for each domain.")
]
Base = Annotated[str, typer.Option("--base", help="The base: a folder, a Hub name, or a shipped pack.")]
Domains = Annotated[Path, typer.Option("--router", "--domains", metavar="DOMAINS", help="What `domains fit` made.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to make.")]


@app.command("moe")
@guarded
def moe(
    experts: Experts,
    base: Base,
    domains: Domains,
    out: Out,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="The layers that get experts, such as 4-6,9; by default from the first trained."),
    ] = None,
    average_rest: Annotated[
        bool, typer.Option("--average-rest", help="Average over all experts what they trained beside these FFNs.")
    ] = False,
    keep_base: Annotated[
        bool, typer.Option("--keep-base", help="Keep the base's FFNs as one more expert, for when the router abstains.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; by default the widest that the parts are held in."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Load the result and compare it with each expert; the default to 1B."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge FFN or LoRA experts into one mixture-of-experts checkpoint, its router beside it.

    transformers loads it once lora_lexicon.compose.moe is imported. Several GB are merged in some MB of memory.
    """
    from lora_lexicon.compose.merge import compose_moe

    if verify is not False:  # else no model is built, and transformers is not imported
        quiet_libraries()
    chosen = _chosen(experts, domains)
    with progress() as bar:
        task = bar.add_task("writing bytes", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, advance=done, total=total)

        record = compose_moe(
            base,
            chosen,
            domains,
            out,
            layers=layers,
            average_rest=average_rest,
            keep_base=keep_base,
            dtype=dtype,
            verify=verify,
            overwrite=overwrite,
            progress=show,
        )
    if as_json:
        emit({"out": str(out), **record})
        return
    compared = record["verified"] and record["verified"]["differences"]
    rows = [
        (each["name"], each["kind"], f"{compared[each['name']]:.2g}" if compared else "not compared")
        for each in record["experts"]
    ]
    show_table(str(out), ("expert", "kind", "largest logit difference"), rows)
    layers_said = ", ".join(map(str, record["expert_layers"]))
    note(f"{record['bytes'] / 1e6:,.1f} MB in {record['dtype']}; experts in layers {layers_said}")


@app.command("adapters")
@guarded
def adapters(
    experts: Experts,
    base: Base,
    domains: Domains,
    out: Out,
    name: Annotated[str | None, typer.Option("--name", help="The pack's name; by default the folder's.")] = None,
    include_base: Annotated[bool, typer.Option("--include-base", help="Put the base into the pack too.")] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pack LoRA experts with their router: a mixture on one shared base. Each adapter still loads in plain PEFT."""
    from lora_lexicon.packs.pack import build_pack

    quiet_libraries()
    chosen = _chosen(experts, domains)
    record = build_pack(base, chosen, domains, out, name=name, include_base=include_base, overwrite=overwrite)
    if as_json:
        emit({"out": str(out), **record})
        return
    show_domains(str(out), record["domains"])


def show_domains(title: str, domains: list[dict[str, Any]]) -> None:
    """A pack's domains as a table."""
    rows = [(d["name"], d["rank"], ", ".join(d["modules"]), d["trained_parameters"]) for d in domains]
    show_table(title, ("domain", "rank", "modules", "parameters"), rows)


def _chosen(experts: list[Path], domains: Path) -> list[Path]:
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
