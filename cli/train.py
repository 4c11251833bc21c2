"""`lora-lexicon train`: one expert a domain, the dense baseline, and the embedded base itself."""

from functools import partial
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
    bytes_text,
    check_given,
    check_launcher,
    emit,
    guarded,
    launcher_of,
    note,
    progress,
    quiet_libraries,
    rate_text,
    show_table,
)
from .launch import Sharding, launch

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System
    from lora_lexicon.data.prompt import PromptTemplate
    from lora_lexicon.data.store import Entries
    from lora_lexicon.experts.checkpoint import ExpertInfo
    from lora_lexicon.experts.forecast import Forecast, Machine
    from lora_lexicon.experts.journal import Step
    from lora_lexicon.experts.train import Part

app = typer.Typer(
    invoke_without_command=True,
    help="Train experts, one a domain or one on everything. They are LoRA adapters, or the base's own FFNs.",
)


@app.callback(invoke_without_command=True)
@guarded
def train(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option("--data", metavar="ENTRIES", help="A folder of entries.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to put the experts in, one folder each.")
    ] = None,
    domains: Annotated[
        Path | None, typer.Option("--domains", help="A domains folder, fitted on these entries.")
    ] = None,
    domain: Annotated[
        str, typer.Option("--domain", metavar="NAME|all|none", help="none trains one dense expert on everything.")
    ] = "all",
    name: Annotated[
        str, typer.Option("--name", help="The name of the one expert that --domain none trains.")
    ] = "dense",
    base: Annotated[
        str, typer.Option("--base", help="A Llama-architecture base: a folder, a Hub name or a shipped one.")
    ] = "tiny",
    kind: Annotated[str | None, typer.Option("--kind", help="lora or ffn; by default the recipe's.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="A YAML file or a shipped recipe, such as tiny/lora: see docs/recipes.md."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="nf4 or int8: hold the base in 4 or 8 bits.")
    ] = None,
    overrides: SetOption = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", metavar="ADAPTER", help="Branch from an adapter instead of starting at zero."),
    ] = None,
    on: OnOption = Place.here,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: show what would be, and what it would take.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="With --dry-run: on another machine's card, by name (h100, rtx-4090) or memory (24GB)."
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to",
            metavar="NAME",
            help="Report to tensorboard, trackio or wandb, or measure energy with codecarbon. Repeatable.",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Train in so many processes, one a GPU, each with a shard.")
    ] = 1,
    sharding: Annotated[
        Sharding | None, typer.Option("--sharding", help="Of --processes: fsdp by default, or DeepSpeed's zero3.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one expert for each domain, or one on everything.

    A run that was stopped goes on where it was when the same command is given again; experts that
    are already there from the same command are kept. Here all LoRA experts are trained in one pass
    over the base; --on ray makes each expert a task of its own, for as many devices as there are.
    """
    if context.invoked_subcommand:
        return
    if data is None or out is None:
        raise typer.BadParameter("--data and --out are needed (or a sub-command: see --help)")
    if domains is None and domain != "none":
        raise typer.BadParameter(
            f"--domain {domain} needs --domains, a folder from domains fit; --domain none needs none"
        )

    from lora_lexicon.data.store import load_entries
    from lora_lexicon.recipe import TrainRecipe, load_recipe
    from lora_lexicon.resources import find_recipe

    settings = load_recipe(
        TrainRecipe,
        find_recipe(recipe or ("tiny/ffn" if kind == "ffn" else "tiny/lora")),
        overrides or [],
        kind=kind,
        quantize=quantize,
    )
    if processes > 1 and on is Place.ray:
        raise typer.BadParameter("--processes shares one run, --on ray makes each expert its own: give one of them")
    if processes == 1 and sharding:
        raise typer.BadParameter(f"--sharding {sharding} is of several processes: add --processes")
    if gpu and not dry_run:
        raise typer.BadParameter("--gpu is of a forecast: add --dry-run")
    check_launcher(on, cpus, gpus)
    entries = load_entries(data)
    _check_ranks(settings.rank_of, domains)

    import torch

    from lora_lexicon.evaluation.metrics import mean_bleu
    from lora_lexicon.experts.apart import train_apart
    from lora_lexicon.experts.base import load_base
    from lora_lexicon.experts.check import Where, check_training
    from lora_lexicon.experts.forecast import card_machine, this_machine
    from lora_lexicon.experts.processes import join, rank, several
    from lora_lexicon.experts.train import foresee_experts, train_experts
    from lora_lexicon.tasks import OnRay

    quiet_libraries()
    card = card_machine(gpu, settings.dtype) if gpu else None
    parts, template = _parts(entries, domains, domain, name, out)
    apart = on is Place.ray
    device = torch.device("cuda") if apart else None  # which its machines may have
    where = Where(device, processes, (sharding or Sharding.fsdp).value, elsewhere=card is not None)
    reports = report_to or []
    if dry_run:
        if several():
            raise typer.BadParameter("--dry-run takes one process: give --processes instead of accelerate launch")
        given = {"start_from": start_from, "template": template, "report_to": reports, "overwrite": overwrite}
        found = foresee_experts(base, parts, settings, score=mean_bleu, where=where, apart=apart, **given)
        _show_forecast(found, card or this_machine(settings.dtype), settings.dtype, apart, as_json)
        return
    check_training(base, parts, settings, where, scored=True, start_from=start_from, report_to=reports)
    if processes > 1 and launch(processes, sharding):
        return
    join()
    launcher = launcher_of(on, cpus, gpus)
    if isinstance(launcher, OnRay):
        run = partial(train_apart, launcher, base)
    elif several():  # each run loads it, and shards it
        run = partial(train_experts, load_base(base, dtype=settings.dtype, device="meta"))
    else:
        run = partial(train_experts, load_base(base, dtype=settings.dtype, quantize=settings.quantize))
    with progress("loss", shown=rank() == 0) as bar:
        tasks = {part.name: bar.add_task(f"{part.name}, tokens", total=None, loss="-") for part in parts}

        def show(step: "Step") -> None:
            loss = f"{step.loss:.3f}"
            done, total, seconds = step.tokens, step.all_tokens, step.seconds
            bar.update(tasks[step.expert], completed=done, total=total, loss=loss, seconds=seconds)

        made = run(
            parts,
            settings,
            score=mean_bleu,
            start_from=start_from,
            entries_fingerprint=entries.fingerprint,
            template=template,
            progress=show,
            report_to=reports,
            overwrite=overwrite,
        )
        for info in made:
            if bar.tasks[tasks[info.name]].total is None:  # not trained again
                bar.update(tasks[info.name], description=f"{info.name}, kept", completed=info.tokens, total=info.tokens)
    if rank() > 0:
        return
    if as_json:
        emit({"experts": [{**_row(info), "path": str(out / info.name)} for info in made]})
    else:
        columns = ("name", "kind", "rows", "tokens", "trained", "loss", "FLOP", "seconds")
        rows = [
            {
                **_row(info),
                "trained": info.trained_parameters,
                "FLOP": f"{info.training['flops']:.1e}",
                "seconds": f"{info.training['seconds']:.1f}",
            }
            for info in made
        ]
        show_table(f"Experts in {out}", columns, [[row[column] for column in columns] for row in rows])


def _show_forecast(found: "Forecast", machine: "Machine", dtype: str, apart: bool, as_json: bool) -> None:
    from lora_lexicon.experts.cost import CARDS
    from lora_lexicon.experts.forecast import UTILISATION

    if as_json:
        emit(found.record(machine))
        return
    show_table(
        "Experts",
        ("name", "", "rows", "cut", "steps", "tokens", "trained", "FLOP"),
        [
            (
                f"{e.name}, there" if e.there else e.name,
                "FFN" if e.rank is None else f"rank {e.rank}",
                *(e.rows, e.cut, e.steps, e.tokens, e.trained, f"{e.flops:.1e}"),
            )
            for e in found.experts
        ],
    )
    if not found.turns:
        note("all of them are there: nothing is left to train")
        return
    place = f"{machine.device} ({machine.name}, {bytes_text(machine.memory)})"
    shared = f"{found.processes} processes, {found.sharding.upper()}: each on {place}"
    title = (
        "Each a task on Ray"
        if apart
        else f"{shared if found.processes > 1 else f'On {place}'}, one line after the other"
    )
    show_table(
        title,
        ("together", "steps", "tokens a step", "a pass", "weights", "optimizer", "forward", "backward", "at most"),
        [
            (
                ", ".join(t.experts),
                *(t.steps, t.step_tokens, t.pass_tokens),
                *map(bytes_text, (m.weights, m.states, m.forward, m.backward, m.memory)),
            )
            for t in found.turns
            for m in (t.memory,)
        ],
    )
    if not found.fits(machine):
        most = bytes_text(max(turn.memory.memory for turn in found.turns))
        each = f"{found.processes} times {most}" if found.processes > 1 and machine.device == "cpu" else most
        smaller = ", ".join(f"{change.option} ({bytes_text(change.memory)})" for change in found.advice(machine))
        note(f"{each} do not fit {place}" + (f"; less takes {smaller}" if smaller else ""))
    hours = found.hours(machine)
    if hours is None:
        note(f"hours need a card's peak, which is known in 16 bits of {', '.join(CARDS)}")
        return
    many = f"{found.processes} such devices" if found.processes > 1 and machine.device != "cpu" else "one such device"
    source = f"which a {dtype} matrix product reached here just now" if machine.measured else "its peak in 16 bits"
    note(f"about {_time(hours)} on {many}, at {UTILISATION:.0%} of {rate_text(machine.rate or 0)}, {source}")


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def _parts(
    entries: "Entries", folder: Path | None, domain: str, name: str, out: Path
) -> "tuple[list[Part], PromptTemplate | None]":
    """The experts to train (`name` is the one on everything), and the template of the domains' router."""
    from lora_lexicon.domains.fit import load_domains
    from lora_lexicon.experts.train import part_of

    domains = load_domains(folder) if folder else None
    if domains is None or domain == "none":
        return [part_of(entries, domains, None, out / name)], domains and domains.router.template
    names = domains.router.names if domain == "all" else (domain,)
    return [part_of(entries, domains, n, out / n) for n in names], domains.router.template


def _check_ranks(ranks: dict[str, int], folder: Path | None) -> None:
    """Refuses a rank for a domain that there is not."""
    from lora_lexicon.domains.router import load_router
    from lora_lexicon.errors import RecipeError

    names = load_router(folder).names if folder and ranks else ()
    for name in sorted(set(ranks) - set(names)):
        raise RecipeError(f"rank_of names {name!r}, which is no domain; there are {', '.join(names) or 'none'}")


def _row(info: "ExpertInfo") -> dict[str, Any]:
    losses = info.training["losses"]
    return {
        "name": info.name,
        "kind": info.kind,
        "rows": info.rows,
        "tokens": info.tokens,
        "trained_parameters": info.trained_parameters,
        "loss": losses[-1][1] if losses else "-",
        "flops": info.training["flops"],
        "seconds": info.training["seconds"],
        "evaluations": info.training["evaluations"],
    }


@app.command("router")
@guarded
def train_router(
    moe: Annotated[Path, typer.Argument(metavar="MOE", help="What `compose moe` made.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="ENTRIES", help="A folder of entries of all domains together."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make: a MoE again.")],
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="POLICY",
            help="domain-top-K, token-top-K, sequence-soft or sequence-hard; by default what the MoE has.",
        ),
    ] = None,
    what: Annotated[
        str | None,
        typer.Option("--train", metavar="PART", help="gates, temperature, or experts (they, and what chooses them)."),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="A YAML file or a shipped recipe: see docs/recipes.md.")
    ] = "tiny/router",
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train how a MoE chooses its experts, on the data of all domains (the paper's last stage).

    Token and sequence policies choose by gates, which begin as the router's choices. Domain-level routing needs none
    of this to work.
    """
    from lora_lexicon.recipe import RouterRecipe, load_recipe
    from lora_lexicon.resources import find_recipe

    settings = load_recipe(RouterRecipe, find_recipe(recipe), overrides or [], train=what)

    from lora_lexicon.compose.tune import train_router as tune
    from lora_lexicon.data.store import load_entries
    from lora_lexicon.inference.engine import losses

    quiet_libraries()
    entries = load_entries(data)
    valid = entries.split("valid")[: settings.valid_rows] if "valid" in entries.splits else []

    def loss(system: "System") -> float:
        total, tokens = losses(system, valid, batch_size=settings.batch_size)
        return float(total.sum() / tokens.sum())

    with progress() as bar:
        task = bar.add_task(f"{out.name}, entries", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        record = tune(
            moe,
            data,
            out,
            settings,
            routing=routing,
            measure=loss if valid else None,
            progress=show,
            overwrite=overwrite,
        )
        if bar.tasks[task].total is None:  # not trained again
            rows = record["router_training"]["rows"]
            bar.update(task, description=f"{out.name}, kept", completed=rows, total=rows)
    if as_json:
        emit({"out": str(out), **record})
        return
    done = record["router_training"]
    rows = [
        ("routing", record["routing"]),
        ("trained", f"{done['trained']}, {done['parameters']:,} parameters"),
        ("temperature", f"{done['temperature']:.4f}"),
    ]
    if valid:
        rows += [(f"loss on {len(valid)} valid entries, {when}", f"{done[when]:.4f}") for when in ("before", "after")]
    show_table(str(out), ("", ""), rows)


@app.command("reward")
@guarded
def reward(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="What samples: a pack, an expert, a MoE or a base. It lies on its base."),
    ],
    data: Annotated[Path, typer.Option("--data", metavar="ENTRIES", help="A folder of entries.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base of a pack or an expert, if it lies elsewhere.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Train on this many entries, spread over the split.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Definitions sampled for each prompt; by default the recipe's.")
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep", help="The likeliest of them, which stand against the gold one; by default the recipe's."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="A YAML file or a shipped recipe: see docs/recipes.md.")
    ] = "tiny/reward",
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train an outcome reward model, by which `--best-of` chooses (the paper's equation 3).

    MODEL samples definitions of the train entries; a head and an adapter on its base learn to rate the gold ones
    higher. A run that was stopped goes on where it was, sampling included.
    """
    from lora_lexicon.recipe import RewardRecipe, load_recipe
    from lora_lexicon.resources import find_recipe

    settings = load_recipe(RewardRecipe, find_recipe(recipe), overrides or [], samples=samples, keep=keep)
    check_given(model, base)

    from lora_lexicon.inference.preferences import train_reward

    quiet_libraries()
    with progress() as bar:
        tasks = {stage: bar.add_task(f"{stage}, prompts", total=None) for stage in ("sampling", "training")}

        def show(stage: str, done: int, total: int) -> None:
            bar.update(tasks[stage], completed=done, total=total)

        record = train_reward(model, data, out, settings, base=base, limit=limit, progress=show, overwrite=overwrite)
        for stage, task in tasks.items():
            if bar.tasks[task].total is None:  # not made again
                rows = record["train"]["prompts"]
                bar.update(task, description=f"{stage}, kept", completed=rows, total=rows)
    if as_json:
        emit({"out": str(out), **record})
        return
    trained, held = record["train"], record["valid"]
    rows = [("trained on", f"{trained['pairs']:,} pairs of {trained['prompts']:,} prompts")]
    rows += [("loss, last", f"{record['losses'][-1][1]:.4f}")] if record["losses"] else []
    if "accuracy" in held:
        where = f"on {held['pairs']:,} valid pairs of {held['prompts']:,} prompts"
        rows += [(f"accuracy {where}", f"{held['accuracy']:.3f}"), (f"loss {where}", f"{held['loss']:.4f}")]
    show_table(str(out), ("", ""), rows)


@app.command("base")
@guarded
def base(
    wordnet: Annotated[Path, typer.Argument(help="WordNet's database folder (data.noun and its like).")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="A YAML file or a shipped recipe: see docs/recipes.md.")
    ] = "tiny/base",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the embedded base from nothing; the same command goes on from the last checkpoint."""
    from lora_lexicon.data.readers import read
    from lora_lexicon.data.readers.wordnet import licence
    from lora_lexicon.experts.pretrain import PretrainRecipe, pretrain
    from lora_lexicon.recipe import load_recipe
    from lora_lexicon.resources import find_recipe

    settings = load_recipe(PretrainRecipe, find_recipe(recipe), overrides or [])
    record = pretrain(read([str(wordnet)], "wordnet"), out, settings, licence(wordnet))
    if as_json:
        emit(record)
    else:
        size, loss = record["parameters"], record["final_loss"]
        note(f"{out}: {size:,} parameters, {record['tokens_seen']:,} tokens, loss {loss:.3f}")
