"""`lora-lexicon incontext`: definitions by a model that is shown examples, over an OpenAI-compatible interface."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, emit, guarded, note, progress, quiet_libraries, show_table

if TYPE_CHECKING:
    from lora_lexicon.domains.embed import Embedder


class Examples(StrEnum):
    """How a prompt's examples are chosen."""

    random = "random"
    retrieved = "retrieved"


class Api(StrEnum):
    """Which of OpenAI's interfaces is asked."""

    chat = "chat"
    completions = "completions"


@guarded
def incontext(
    entries: Annotated[
        Path, typer.Argument(help="An entries folder (from `data prepare`): examples come from its train split.")
    ],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="The interface's root, such as https://api.openai.com/v1.")
    ],
    model: Annotated[str, typer.Option(help="The model's name there.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for report.json, predictions/EXAMPLES-SHOTS.jsonl, and answers/ as they came. A run that was "
            "stopped goes on there, and asks nothing twice."
        ),
    ],
    shots: Annotated[
        str, typer.Option(metavar="K,K...", help="How many examples a prompt shows; each number is a run.")
    ] = "0,1,2,4,8,16,32,64,128",
    examples: Annotated[
        list[Examples] | None,
        typer.Option(
            "--examples",
            help="random (the default), or retrieved: those whose prompts are nearest, the nearest last. Repeatable.",
        ),
    ] = None,
    embedder: Annotated[
        str, typer.Option(help="What retrieves: tfidf, st:NAME, hf:NAME, or base, with --base.")
    ] = "tfidf",
    base: Annotated[str | None, typer.Option(help="The base of --embedder base.")] = None,
    split: Annotated[str, typer.Option(help="The split that is asked for.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask for this many entries, spread over the split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random examples, and of the intervals.")] = 42,
    api: Annotated[Api, typer.Option(help="Examples as turns of a chat, or in one text.")] = Api.chat,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of sampling; 0: the likeliest token.")] = 0.0,
    no_temperature: Annotated[
        bool, typer.Option("--no-temperature", help="Send no temperature, to models that take none.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, what a model thinks included.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Questions under way at once.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each try.")] = 60,
    retries: Annotated[
        int, typer.Option(min=0, max=100, help="Further tries where a server is busy, fails or is silent.")
    ] = 5,
    as_json: JsonOption = False,
) -> None:
    """Ask any model behind an OpenAI-compatible interface for definitions, after k examples (figure 7 of the paper).

    The key is OPENAI_API_KEY of the environment. docs/incontext.md says how prompts look, and what of an answer counts.
    """
    from dataclasses import asdict

    from lora_lexicon import __version__
    from lora_lexicon.data.entry import spread
    from lora_lexicon.data.store import load_entries
    from lora_lexicon.experiments.endpoint import Endpoint, need_openai

    counts = read_shots(shots)
    ways = list(dict.fromkeys(examples or [Examples.random]))
    if base is not None and embedder != "base":
        raise typer.BadParameter("--base is the base of --embedder base: add that, or leave it out")
    need_openai()
    warmth = None if no_temperature else temperature
    asked = Endpoint(endpoint.rstrip("/"), model, api.value, warmth, max_tokens, concurrency, timeout, retries)
    folder = load_entries(entries)
    tests, train = spread(folder.split(split), limit), folder.split("train") if max(counts) else []

    from lora_lexicon.experiments.incontext import curve, need_folder
    from lora_lexicon.folders import write_record

    need_folder(out)
    found: list[dict[str, Any]] = []
    with progress() as bar:
        for way in ways:
            tool = open_embedder(embedder, base, train) if way is Examples.retrieved and max(counts) else None
            bars = {k: bar.add_task(f"{way}, {k} shots", total=len(tests)) for k in counts}
            found += curve(
                train, tests, asked, out, counts, way.value, seed=seed, embedder=tool,
                progress=lambda k, done, bars=bars: bar.advance(bars[k], done),
            )  # fmt: skip
    report = {
        "version": __version__,
        "endpoint": asdict(asked),
        "data": str(entries),
        "entries_fingerprint": folder.fingerprint,
        "split": split,
        "rows": len(tests),
        "seed": seed,
        "embedder": embedder if Examples.retrieved in ways else None,
        "runs": found,
    }
    write_record(out / "report.json", report)
    if as_json:
        emit(report)
        return
    _show(f"{model}, {entries}, {split}: {len(tests)} entries", found)
    note(f"written to {out}")


def read_shots(text: str) -> list[int]:
    """Numbers of examples, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= 5 for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0,1,2,4", param_hint="--shots")
    return list(dict.fromkeys(map(int, parts)))


def open_embedder(name: str, base: str | None, train: list[Any]) -> "Embedder":
    from lora_lexicon.domains.embed import make_embedder
    from lora_lexicon.experts.base import load_base
    from lora_lexicon.recipe import DomainsRecipe

    quiet_libraries()
    loaded = load_base(base) if base is not None else None
    recipe = DomainsRecipe(embedder=name)
    return make_embedder(recipe, base=loaded, prompts=[(entry.term, entry.context) for entry in train])


def _show(title: str, runs: list[dict[str, Any]]) -> None:
    """A row a run; what does not fit the model is said once more."""
    from .score import figure_rows

    columns = ("examples", "shots", "BLEU", "95 % interval", "ROUGE-L", "95 % interval", "too long", "empty", "cleaned")
    rows = []
    for run in runs:
        scores = figure_rows(run["scores"]) if run["scores"] else [("", "-", "-")] * 2
        values = [value for _, *pair in scores for value in pair]
        counted = [run[key] for key in ("too_long", "empty", "cleaned")]
        rows.append((run["examples"], run["shots"], *values, *counted))
    show_table(title, columns, rows)
    for run in runs:
        if run["too_long"]:
            many = f"{run['too_long']:,} of {run['rows']:,} prompts do not fit what the model reads"
            note(f"{run['shots']} shots, {run['examples']}: {many}{', and score 0' if run['scores'] else ': no score'}")
        if run["cut"]:
            note(f"{run['shots']} shots, {run['examples']}: {run['cut']:,} answers came to --max-tokens")
    tokens = [sum(run[key] for run in runs) for key in ("prompt_tokens", "completion_tokens", "uncounted")]
    uncounted = f" ({tokens[2]:,} answers without a count)" if tokens[2] else ""
    note(f"tokens: {tokens[0]:,} read, {tokens[1]:,} written{uncounted}")
    for name, found in next((run["scores"] for run in runs if run["scores"]), {}).items():
        note(f"{name}: {found['signature']}")
