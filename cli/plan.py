"""`lora-lexicon plan`: what a composition will weigh, need and cost, before a weight is downloaded."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, bytes_text, count_text, emit, guarded, note, show_table

if TYPE_CHECKING:
    from lora_lexicon.experts.cost import Card


@guarded
def plan(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="A folder with config.json, that file, a Hub name, a shipped pack, or a known shape (llama-3-8b).",
        ),
    ],
    experts: Annotated[int, typer.Option("--experts", help="How many experts.")] = 4,
    rank: Annotated[int, typer.Option("--rank", help="The adapters' rank.")] = 16,
    modules: Annotated[str, typer.Option("--modules", help="ffn, or all: attention's projections too.")] = "ffn",
    layers: Annotated[
        str | None, typer.Option("--layers", help="The layers with experts, such as 8-31 or 4-6,9; by default all.")
    ] = None,
    keep_base: Annotated[bool, typer.Option("--keep-base", help="The MoE keeps the base's FFNs too.")] = False,
    extract: Annotated[
        list[int] | None,
        typer.Option("--extract-rank", help="Cut trained FFNs down to this rank. Repeatable."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default what the config says.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows trained or decoded at once.")] = 32,
    length: Annotated[int, typer.Option("--length", help="Tokens a row, prompt and definition together.")] = 128,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Train with gradient checkpointing.")] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="What fits this card: its memory (24GB) or its name (rtx-4090, h100).")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="How many such cards.")] = 1,
    tokens: Annotated[
        float | None, typer.Option("--tokens", help="Training tokens of all domains together, such as 3e7.")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="How often they are read.")] = 3.0,
    utilisation: Annotated[
        float, typer.Option("--utilisation", help="The part of the card's peak that training reaches.")
    ] = 0.4,
    peak: Annotated[
        float | None, typer.Option("--peak", help="The card's TFLOP/s in this format, where --gpu is no named card.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Foresee size, memory and GPU-hours.

    All from a config.json: no weights are needed or fetched. docs/plan.md states the formulas.
    """
    from lora_lexicon.compose.plan import computes, fits, footprints, record
    from lora_lexicon.experts.cost import CARDS, RESERVE, Options, check_options, find_card, trainings
    from lora_lexicon.experts.shape import parse_layers, read_shape

    shape = read_shape(base)
    options = Options(
        experts=experts,
        rank=rank,
        modules=modules,  # type: ignore[arg-type]  # checked next
        layers=tuple(parse_layers(layers, shape.layers)) if layers else None,
        keep_base=keep_base,
        extract=tuple(extract or sorted({max(1, shape.hidden // part) for part in (64, 16)})),
        dtype=dtype or shape.dtype,
        batch=batch,
        length=length,
        checkpointing=checkpointing,
    )
    check_options(shape, options)
    card = find_card(gpu) if gpu else None
    composed, trained = footprints(shape, options), trainings(shape, options)
    fitting = fits(shape, options, card) if card else []
    read = None if tokens is None else tokens * epochs
    spent = [] if read is None else computes(shape, options, read, _peak(card, options.dtype, peak), gpus, utilisation)
    if as_json:
        tables = {"footprint": composed, "training": trained, "fits": fitting, "compute": spent}
        emit(
            {
                "base": base,
                "shape": {**asdict(shape), "parameters": shape.parameters, "ffn": shape.layers * shape.ffn},
                "options": asdict(options),
                "card": card and card._asdict(),
                **{name: [record(row) for row in rows] for name, rows in tables.items()},
            }
        )
        return
    show_table(
        f"{base}: {count_text(shape.parameters)} parameters, {count_text(shape.layers * shape.ffn)} of them in FFNs",
        (_plural(experts, "expert"), "parameters", "to ship", "with base", "one more", "in memory", "to serve"),
        [
            (f.name, count_text(f.parameters), *map(bytes_text, (f.ship, f.disk, f.domain, f.weights, f.serve)))
            for f in composed
        ],
    )
    show_table(
        f"Training one expert, {_plural(batch, 'row')} of {_plural(length, 'token')} at once",
        ("expert", "trained", "weights", "optimizer", "forward", "backward", "at most"),
        [
            (
                t.name,
                count_text(t.trained),
                *map(bytes_text, (t.weights, t.states, t.forward, t.backward, t.memory)),
            )
            for t in trained
        ],
    )
    if card:
        show_table(
            f"{gpu}: {bytes_text(card.memory)}, {RESERVE:.0%} of it left free",
            ("job", "needs", "fits", "most rows", "with checkpointing"),
            [
                (f.job, bytes_text(f.needs), "yes" if f.fits else "no", f.rows, _known(f.rows_checkpointed, "d"))
                for f in fitting
            ],
        )
    if read is not None:
        show_table(
            f"Training {_plural(experts, 'expert')} on {tokens:.3g} tokens, "
            f"{epochs:g} epoch{'' if epochs == 1 else 's'}: {read:.3g} read",
            ("experts", "FLOP a token", "FLOP", "GPU-hours", f"hours on {gpus}"),
            [
                (c.name, f"{c.token_flops:.2e}", f"{c.flops:.2e}", _known(c.gpu_hours, ".2f"), _known(c.hours, ".2f"))
                for c in spent
            ],
        )
        if spent[0].gpu_hours is None:
            note(
                "GPU-hours need the card's peak: --peak TFLOP/s, or in 16 bits (--dtype bfloat16) a named card "
                f"(--gpu {', '.join(CARDS)})"
            )
        else:
            note(f"GPU-hours at {utilisation:.0%} of the card's peak")
    elif peak is not None:
        note("--peak is for GPU-hours, which need --tokens too")


def _peak(card: "Card | None", dtype: str, given: float | None) -> float | None:
    """A card's FLOP/s: as given in TFLOP/s, or a named card's, which is known in 16 bits."""
    if given is not None:
        return given * 1e12
    return card.peak_in(dtype) if card else None


def _known(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, f",{form}")


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
