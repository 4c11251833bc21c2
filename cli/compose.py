"""`lora-lexicon compose`: experts and a router into one model, either as a MoE or as a pack of adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import compare, packing
from .console import JsonOption, OverwriteOption, emit, guarded, note, progress, quiet_libraries, show_table
from .pack import show_report
from .packing import Base, Domains, Experts, Out, chosen_experts, prompts_of

app = typer.Typer(no_args_is_help=True, help="Compose experts and a router into one model.")
app.command("compare")(compare.compare)
app.command("adapters")(packing.build)

Report = Callable[[int, int], None]  # called with (how many more, in all)


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
    routing: Annotated[
        str,
        typer.Option(
            "--routing",
            metavar="POLICY",
            help="What chooses experts: domain, domain-top-K, token-top-K, sequence-soft or sequence-hard.",
        ),
    ] = "domain",
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="ENTRIES", help="What token and sequence gates are fitted on, unless a sample."),
    ] = None,
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
    chosen = chosen_experts(experts, domains)
    with _counting("writing bytes") as report:
        record = compose_moe(
            base,
            chosen,
            domains,
            out,
            layers=layers,
            average_rest=average_rest,
            keep_base=keep_base,
            routing=routing,
            data=data,
            dtype=dtype,
            verify=verify,
            overwrite=overwrite,
            progress=report,
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
    note(f"{record['bytes'] / 1e6:,.1f} MB in {record['dtype']}; layers with experts (the first is 0): {layers_said}")
    if record["gates"]:
        show_gates("gates", record["gates"])


class Method(StrEnum):
    """Ways to a singular value decomposition."""

    auto = "auto"
    exact = "exact"
    randomized = "randomized"


class Target(StrEnum):
    """Formats that a MoE can be exported to."""

    mixtral = "mixtral"


Rewritten = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default what the parts are held in.")
]


@app.command("extract")
@guarded
def extract(
    experts: Experts,
    base: Base,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to make, with a folder for each expert.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Rank of the factors; 16 unless --energy is given.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Each matrix gets the least rank that keeps this share of its squared change."),
    ] = None,
    method: Annotated[
        Method, typer.Option("--method", help="auto is randomized where that is faster and nearly as good.")
    ] = Method.auto,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the randomized method.")] = 42,
    report_ranks: Annotated[
        str | None,
        typer.Option("--report-ranks", help="Compare ranks, such as 2,4,8,16, with the full expert. Needs no --out."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Entries whose test prompts the report reads; by default the sample that ships."),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn full FFN experts into LoRA experts: the best approximation of what they changed, by a truncated SVD."""
    from lora_lexicon.compose.extract import extract as run
    from lora_lexicon.compose.extract import parse_ranks
    from lora_lexicon.compose.merge import expert_folders

    quiet_libraries()
    ranks = parse_ranks(report_ranks) if report_ranks else []
    with _counting("decomposing matrices") as report:
        record = run(
            expert_folders(experts),
            base,
            out,
            rank=rank,
            energy=energy,
            method=method.value,
            seed=seed,
            report_ranks=ranks,
            data=data,
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        emit({"out": str(out) if out else None, **record})
        return
    if out is not None:
        show_table(
            str(out),
            ("expert", "ranks", "energy", "least energy", "parameters", "type", "MB"),
            [
                (
                    e["name"],
                    _span(e),
                    e["energy_mean"],
                    e["energy_min"],
                    e["trained_parameters"],
                    ", ".join(e["dtypes"]),
                    f"{e['bytes'] / 1e6:,.2f}",
                )
                for e in record["experts"]
            ],
        )
        note("`compose adapters` packs them, as it does trained ones")
    for expert in record["experts"]:
        if expert["left_out"]:
            note(f"{expert['name']}: {len(expert['left_out'])} other tensors that it trained are left out")
    if record["report"]:
        types = ", ".join(sorted({dtype for expert in record["experts"] for dtype in expert["dtypes"]}))
        rounded = {"energy lost by rounding": "rounding"} if types != "float32" else {}
        columns = {"energy": "energy_mean", "least energy": "energy_min"}
        small = {**rounded, "logit difference": "max_abs", "KL": "kl"}
        rows = [
            [row["expert"], row["rank"], row["parameters"]]
            + [row[key] for key in columns.values()]
            + [f"{row[key]:.2g}" for key in small.values()]
            for row in record["report"]
        ]
        show_table("distance from the full expert", ("expert", "rank", "parameters", *columns, *small), rows)
        note(
            f"rank 0 is the base; of factors in {types}; the largest logit difference, and KL in nats a token, "
            "over the tokens of prompts"
        )


def _span(expert: dict[str, Any]) -> str:
    ranks = [tensor["rank"] for tensor in expert["tensors"].values()]
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


@app.command("collapse")
@guarded
def collapse(
    model: Annotated[str, typer.Argument(help="A MoE, a pack or one expert: a folder, or a shipped pack's name.")],
    out: Out,
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="NAME", help="Which expert; `base` is the base's own FFN.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The base of a pack or an expert, if it lies elsewhere.")
    ] = None,
    dtype: Rewritten = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one expert as a plain dense Llama checkpoint, which anything loads."""
    from lora_lexicon.resources import find_model

    folder = find_model(model)
    from lora_lexicon.compose.collapse import collapse as run

    with _counting("writing bytes") as report:
        record = run(
            folder,
            out,
            expert=expert,
            base=base,
            dtype=dtype,
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        emit({"out": str(out), **record})
        return
    note(f"{out}: {record['expert']}, {record['bytes'] / 1e6:,.1f} MB in {record['dtype']}")


@app.command("export")
@guarded
def export(
    model: Annotated[Path, typer.Argument(metavar="MOE", help="What `compose moe` made.")],
    out: Out,
    to: Annotated[Target, typer.Option("--to", help="The format.")] = Target.mixtral,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Experts a token is sent to; by default the gates' own number, or 2.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Entries to fit the gates on, and to test them; by default the sample that ships."),
    ] = None,
    dtype: Rewritten = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a MoE as a standard Mixtral, its gates fitted to the router's choices.

    Mixtral chooses experts for each token, not for a whole prompt: the table says how often the two agree.
    """
    from lora_lexicon.compose.export import export_mixtral

    quiet_libraries()
    with _counting("fitting gates, then writing bytes") as report:
        record = export_mixtral(
            model,
            out,
            top_k=top_k,
            data=data,
            dtype=dtype,
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        emit({"out": str(out), **record})
        return
    if record["gates"]:
        show_gates(str(out), record["gates"])
    else:
        note(f"{out}: the gates are the MoE's own, {record['top_k']} experts a token")
    repeated = len(record["repeated_layers"])
    note(
        f"{record['bytes'] / 1e6:,.1f} MB in {record['dtype']}"
        + (f"; {repeated} layers without experts hold their FFN once for each expert" if repeated else "")
    )


Moe = Annotated[Path, typer.Argument(metavar="MOE", help="What `compose moe` made.")]
Changed = Annotated[Path | None, typer.Option("--out", help="Write a new MoE; by default the MoE itself changes.")]


@app.command("add")
@guarded
def add(
    moe: Moe,
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="An FFN or LoRA expert, or a plain PEFT adapter.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="ENTRIES", help="The new domain's entries: train gives its centroid."),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option("--router", "--domains", metavar="DOMAINS", help="Or a router that has the domain already."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="ENTRIES", help="Entries decoded before and after: which change hands."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="The split of --check to decode.")] = "valid",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most this many prompts are decoded.")] = 200,
    base: Annotated[str | None, typer.Option("--base", help="Where the MoE's base lies, if elsewhere.")] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Compare the new expert with itself alone; the default to 1B."),
    ] = None,
    out: Changed = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add an expert to a MoE: new shards, and not a byte of the others' written again.

    The table shows each shard's SHA-256, before and after; with --check, another which prompts change hands, and that
    every other one's output is unchanged to the bit.
    """
    from lora_lexicon.compose.grow import Joining, join_moe

    if (data is None) == (router is None):
        raise typer.BadParameter("give either --data or --router: the new domain's centroid comes from there")
    quiet_libraries()
    domain = Joining(router=router) if data is None else Joining(prompts_of(data, "train", None))
    checked = prompts_of(check, split, limit) if check else []
    with _counting("writing bytes") as report, _counting("decoding prompts", shown=bool(checked)) as checking:
        found = join_moe(
            moe,
            expert,
            domain,
            base=base,
            check=checked,
            out=out,
            verify=verify,
            overwrite=overwrite,
            progress=report,
            checking=checking,
        )
    if as_json:
        emit(found)
        return
    rows = [(each["file"], each["before"][:16], each["after"][:16]) for each in found["kept"]]
    rows += [(each["file"], "", each["sha256"][:16]) for each in found["added"]]
    show_table(f"{found['expert']} joins {found['moe']}", ("shard", "before", "after"), rows)
    note(f"{found['bytes'] / 1e6:,.1f} MB new; experts: {', '.join(found['domains'])}")
    if found["verified"]:
        note(
            f"largest difference of a logit from the expert alone: {max(found['verified']['differences'].values()):.2g}"
        )
    if checked:
        show_report(f"{found['expert']} joins {found['moe']}", found["prompts"])


@app.command("remove")
@guarded
def remove(
    moe: Moe,
    expert: Annotated[str, typer.Argument(metavar="NAME", help="The expert to take out.")],
    out: Changed = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take an expert and its domain out of a MoE.

    One that was added takes its shards along; of one that the MoE was composed with, the bytes stay, unread.
    """
    from lora_lexicon.compose.grow import leave_moe

    found = leave_moe(moe, expert, out=out, overwrite=overwrite)
    if as_json:
        emit(found)
        return
    note(f"{found['expert']} left {found['moe']}; experts: {', '.join(found['domains'])}")
    note(
        f"removed: {', '.join(found['removed'])}" if found["removed"] else "its bytes stay in the fused tensors, unread"
    )


@contextmanager
def _counting(what: str, shown: bool = True) -> Iterator[Report]:
    """A progress bar of a number that is known once work begins."""
    with progress(shown=shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda more, total: bar.update(task, advance=more, total=total)


def show_gates(title: str, fitted: dict[str, Any]) -> None:
    """How often the gates of each layer choose as the router does."""
    kinds = list(next(iter(fitted["agreement"].values())))
    rows = [(layer, *shares.values()) for layer, shares in fitted["agreement"].items()]
    show_table(title, ("layer", *(f"{kind}s" for kind in kinds)), rows)
    note(
        f"shares of held-out {'tokens' if len(kinds) > 1 else 'prompts'} ({fitted['tokens']:,}) whose gate prefers the "
        f"router's expert; the most frequent expert alone has {fitted['chance']:.3f}"
    )
