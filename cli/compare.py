"""`lora-lexicon compose compare`: what each form of a composition costs, and what it loses."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, OverwriteOption, check_given, emit, guarded, note, progress, show_table
from .evaluate import comparisons_of, need_free, unused
from .use import BaseOption, Dtype, DtypeOption, ModelHelp, Quantize, TokensOption, decoding_of, load

if TYPE_CHECKING:
    from lora_lexicon.evaluation.run import Evaluation


@guarded
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=ModelHelp)],
    data: Annotated[Path, typer.Option(help="An entries folder (from `data prepare`).")],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The model that the others are held against; else the first.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to compare on.")] = "test",
    limit: Annotated[int, typer.Option(min=1, help="Compare on this many entries, spread over the split.")] = 200,
    also: Annotated[
        list[Quantize] | None,
        typer.Option("--quantize", help="Each model that has a base once more, with the base so. Repeatable."),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Write definitions and score them.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for compare.json and footprint-fidelity.png.")] = None,
    max_tokens: TokensOption = 48,
    base: BaseOption = None,
    dtype: DtypeOption = Dtype.float32,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare compositions: what each costs and what it loses.

    Beside footprint, loss and BLEU: KL divergence from a reference and agreement with it on the definitions' tokens.
    """
    import tempfile
    from functools import partial

    from lora_lexicon import __version__
    from lora_lexicon.data.entry import spread
    from lora_lexicon.data.store import load_entries

    folder = load_entries(data)
    for model in [*models, *([reference] if reference else [])]:
        check_given(model, base)
    from lora_lexicon.compose.system import has_base
    from lora_lexicon.evaluation.fidelity import Reference
    from lora_lexicon.evaluation.report import comparison_rows, footprint_fidelity, system_rows
    from lora_lexicon.evaluation.run import SIGNATURES, evaluate
    from lora_lexicon.folders import new_folder, write_record

    entries = spread(folder.split(split), limit)
    if out is not None:
        need_free(out, overwrite)
    first = reference or models[0]
    jobs = [(model, Quantize.none) for model in dict.fromkeys([first, *models])]
    quantised = [model for model, _ in jobs if also and has_base(model)]
    jobs += [(model, kind) for kind in also or () if kind != Quantize.none for model in quantised]
    results: list[Evaluation] = []
    systems: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        Reference(Path(scratch) / "reference") as recorded,
        progress() as bar,
    ):
        for model, kind in dict.fromkeys(jobs):
            system = load(model, base, dtype, kind)
            name = unused(system.name if kind == Quantize.none else f"{system.name}-{kind}", [r.name for r in results])
            task = bar.add_task(name, total=len(entries) * (2 if generate else 1))
            held = recorded.compare() if results else None
            result = evaluate(
                system,
                entries,
                name=name,
                decoding=decoding_of(False, 42, max_tokens),
                defined=None if generate else 0,
                progress=partial(bar.advance, task),
                observe=held.observe if held else recorded.record,
            )
            results.append(result)
            systems.append(result.summary() | (held.summary() if held else {"kl": 0.0, "agreement": 1.0}))
            del system
    report = {
        "version": __version__,
        "reference": first,
        "models": models,
        "data": str(data),
        "entries_fingerprint": folder.fingerprint,
        "split": split,
        "rows": len(entries),
        "tokens": recorded.shape[0],
        "signatures": SIGNATURES,
        "systems": systems,
        "comparisons": comparisons_of(results, generate, 42),
    }
    if out is not None:
        with new_folder(out, replace=overwrite) as made:
            write_record(made / "compare.json", report)
            footprint_fidelity(systems, made / "footprint-fidelity.png", "kl")
    if as_json:
        emit(report)
        return
    title = (
        f"{data}, {split}: {len(entries)} entries, {recorded.shape[0]:,} tokens; KL and agreement to {results[0].name}"
    )
    show_table(title, *system_rows(systems, leave_out=("perplexity", "rouge_l")))
    if report["comparisons"]:
        show_table("Differences (paired bootstrap over headwords)", *comparison_rows(report["comparisons"]))
    if out is not None:
        note(f"written to {out}")
