"""`lora-lexicon evaluate`: models side by side on held-out entries."""

from collections.abc import Sequence
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
    check_given,
    command_line,
    emit,
    guarded,
    launcher_of,
    note,
    progress,
    quiet_libraries,
    show_table,
)
from .score import BaselineOption, EncoderOption, LayerOption, MetricOption, figure_rows, open_encoder, without_interval
from .use import (
    BaseOption,
    BestOption,
    ByOption,
    Dtype,
    DtypeOption,
    MemoryOption,
    ModelHelp,
    Quantize,
    QuantizeOption,
    RewardOption,
    SampleOption,
    SeedOption,
    TokensOption,
    chooser_of,
    decoding_of,
)

if TYPE_CHECKING:
    from lora_lexicon.evaluation.run import Evaluation, Metric


@guarded
def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=ModelHelp)],
    data: Annotated[Path, typer.Option(help="An entries folder (from `data prepare`).")],
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on this many entries, spread over the split.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for what `report` shows: report.json, rows.jsonl, predictions/NAME.jsonl."),
    ] = None,
    random_routing: Annotated[
        bool, typer.Option("--random-routing", help="Evaluate every routed model a second time, routed at random.")
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Write definitions and score them.")
    ] = True,
    metrics: MetricOption = None,
    encoder: EncoderOption = None,
    layer: LayerOption = None,
    baseline: BaselineOption = None,
    sample: SampleOption = False,
    best_of: BestOption = 1,
    by: ByOption = None,
    reward: RewardOption = None,
    seed: SeedOption = 42,
    max_tokens: TokensOption = 48,
    base: BaseOption = None,
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = Quantize.none,
    expert_memory: MemoryOption = None,
    on: OnOption = Place.here,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score models side by side on held-out entries. Each is compared with the first by a paired bootstrap."""
    from dataclasses import asdict, replace

    from lora_lexicon import __version__
    from lora_lexicon.data.entry import spread
    from lora_lexicon.data.store import load_entries
    from lora_lexicon.errors import DataError
    from lora_lexicon.evaluation.registry import check, names_of
    from lora_lexicon.experts.cost import expert_bytes

    folder = load_entries(data)
    entries = spread(folder.split(split), limit)
    if out is not None:
        need_free(out, overwrite, data, *map(Path, models))
    for model in models:
        check_given(model, base)
    chooser = chooser_of(best_of, by, reward)
    memory = expert_bytes(expert_memory)
    if best_of > 1 and not generate:
        raise DataError("--best-of is of definitions, which --no-generate does not write: leave one of them out")
    names = names_of(metrics or ())
    if names and not generate:
        raise DataError("--metric is of definitions, which --no-generate does not write: leave one of them out")
    check(names, encoder=encoder is not None)
    model_read = open_encoder(encoder, layer, baseline)
    launcher = launcher_of(on, cpus, gpus)

    from lora_lexicon.domains.map import POINTS
    from lora_lexicon.evaluation.run import SIGNATURES, further_scores
    from lora_lexicon.evaluation.saved import environment, write_evaluations
    from lora_lexicon.evaluation.shards import Settings, evaluate_models
    from lora_lexicon.folders import new_folder

    decoding = decoding_of(sample or best_of > 1, seed, max_tokens)
    settings = Settings(
        base, dtype.value, quantize.value, decoding, generate, random_routing, seed, best_of, chooser.value,
        str(reward) if reward else None, memory, POINTS if out else 0,
    )  # fmt: skip
    quiet_libraries()
    results: list[Evaluation] = []
    with progress() as bar:
        tasks = [bar.add_task(model, total=None) for model in models]
        found = evaluate_models(
            models,
            entries,
            settings,
            launcher,
            lambda model, done, rows: bar.update(tasks[model], completed=done, total=rows),
        )
    for result in found:
        results.append(replace(result, name=unused(result.name, [other.name for other in results])))
    report = {
        "version": __version__,
        "command": command_line(context),
        "environment": environment(),
        "models": models,
        "data": str(data),
        "entries_fingerprint": folder.fingerprint,
        "split": split,
        "rows": len(entries),
        "limit": limit,
        "base": base,
        "dtype": dtype.value,
        "quantize": quantize.value,
        "expert_memory": expert_memory,
        "random_routing": random_routing,
        "seed": seed,
        "encoder": encoder,
        "decoding": asdict(decoding) if generate else None,
        "best_of": {"n": best_of, "by": chooser, "reward": str(reward or "")} if generate and best_of > 1 else None,
        "signatures": SIGNATURES,
        "systems": [result.summary() for result in results],
        "comparisons": comparisons_of(results, generate, seed),
    }
    if names:
        report["scores"], compared = further_scores(results, names, model_read, seed=seed)
        report["comparisons"] += compared
    if out is not None:
        with new_folder(out, replace=overwrite) as made:
            write_evaluations(made, report, results)
    if as_json:
        emit(report)
        return
    from lora_lexicon.evaluation.report import comparison_rows, system_rows

    best = f"; best of {best_of} by {chooser}" if report["best_of"] else ""
    show_table(f"{data}, {split}: {len(entries)} entries{best}", *system_rows(report["systems"]))
    if names:
        rows = [(model, *row) for model, found in report["scores"].items() for row in figure_rows(found)]
        show_table("Scores", ("system", "metric", "value", "95 % interval"), rows)
    if unsure := without_interval(*report.get("scores", {}).values()):
        note(unsure)
    for metric in ("bleu", "rouge_l") if generate else ():
        note(f"{metric}: {SIGNATURES[metric]}")
    for metric in names:
        note(f"{metric}: {report['scores'][results[0].name][metric]['signature']}")
    if report["comparisons"]:
        show_table("Differences (paired bootstrap over headwords)", *comparison_rows(report["comparisons"]))
    if out is not None:
        note(f"written to {out}; make a report of it with: lora-lexicon report {out} --out NEW")


def comparisons_of(results: "list[Evaluation]", generate: bool, seed: int) -> list[dict[str, Any]]:
    """Every model against the first."""
    from lora_lexicon.evaluation.run import compare

    first, *others = results
    same_tokens = all((other.tokens == first.tokens).all() for other in others)
    metrics: list[Metric] = [*(["loss"] if same_tokens else []), *(["bleu", "rouge_l"] if generate else [])]
    return [compare(other, first, metric, seed=seed) for metric in metrics for other in others]


def unused(name: str, taken: Sequence[str]) -> str:
    """`name` as a file name, with a number where it is taken."""
    import re

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:56] or "model"
    return next(n for i in range(1, len(taken) + 2) if (n := name if i == 1 else f"{name}-{i}") not in taken)


def need_free(out: Path, overwrite: bool, *read: Path) -> None:
    """Fails before the long work, not after it, where `out` is taken, or holds what is to be read."""
    from lora_lexicon.errors import DataError

    for path in read:
        if path.resolve().is_relative_to(out.resolve()):
            raise DataError(f"--out {out} holds {path}, which is read: choose another --out")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise DataError(f"{out} exists and is not empty: choose another --out, or add --overwrite")
