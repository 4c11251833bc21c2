"""`lora-lexicon route | define | evaluate`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
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
    emit,
    guarded,
    launcher_of,
    note,
    progress,
    quiet_libraries,
    show_table,
)
from .entries import FormatOption, LanguageOption, ReplaceOption, check_format, write_entries
from .score import BaselineOption, EncoderOption, LayerOption, MetricOption, figure_rows, open_encoder

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System
    from lora_lexicon.domains.explain import Explained
    from lora_lexicon.domains.router import Router
    from lora_lexicon.evaluation.run import Evaluation, Metric
    from lora_lexicon.inference.engine import Definition
    from lora_lexicon.inference.sampling import Decoding

Prompt = tuple[str, str]  # term, context
Writer = Callable[[list[Prompt], Callable[[int], object]], "list[Definition]"]  # is told of how many more are defined
CHUNK = 1024  # prompts of a file that are defined before the first of them is printed


class Dtype(StrEnum):
    """Number formats of a model in memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    """How the base's weights are held."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class Backend(StrEnum):
    """What computes definitions."""

    torch = "torch"
    vllm = "vllm"


class By(StrEnum):
    """What chooses the best of several candidates."""

    likelihood = "likelihood"
    mbr = "mbr"
    experts = "experts"
    reward = "reward"
    reference = "reference"


ModelHelp = "A pack, an expert, a merged model or a base: a folder, or a shipped pack's name."
ContextOption = Annotated[str, typer.Option("--context", "-c", help="A sentence that uses the term.")]
BaseOption = Annotated[str | None, typer.Option(help="The base of a pack or an expert, if it lies elsewhere.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format in memory.")]
QuantizeOption = Annotated[Quantize, typer.Option(help="Hold the base's weights in 4 or 8 bits.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        metavar="SIZE",
        help="Memory for a pack's adapters, such as 200MB: each is loaded when a prompt needs it, the least recently "
        "used make room. By default all are in memory.",
    ),
]
SampleOption = Annotated[
    bool, typer.Option("--sample/--greedy", help="Sample as the paper does (temperature 0.6, top-k 50, top-p 0.9).")
]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")]
BestOption = Annotated[
    int, typer.Option("--best-of", metavar="N", min=1, help="Sample N candidates for each prompt, and choose the best.")
]
ByOption = Annotated[
    By | None,
    typer.Option(
        "--by",
        help="What chooses among --best-of candidates: mbr (agreement with the others, the default), likelihood, "
        "experts (each writes N, the routed model's likelihood decides), a --reward model, or, in evaluation only, "
        "the reference (BLEU with it: what choosing could gain at most).",
    ),
]
RewardOption = Annotated[
    Path | None, typer.Option("--reward", metavar="FOLDER", help="The reward model of --by reward (train reward).")
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        help="What writes: our own engine (torch), or vLLM on a GPU, for packs (docs/vllm.md), in bfloat16 or float16."
    ),
]
TokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="The longest definition, in tokens.")]


@guarded
def route(
    term: Annotated[str, typer.Argument(help="The term to route.")],
    model: Annotated[str, typer.Argument(help="A pack or a merged model.")] = "tiny",
    context: ContextOption = "",
    base: BaseOption = None,
    nearest: Annotated[int, typer.Option(min=0, help="How many of the nearest training terms to show.")] = 5,
    explained: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show why: the quantile of the prompt among each domain's own members, the nearest terms of each, and "
            "whether the router abstains.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show which domain a term goes to. With it: how sure the router is, and the nearest training terms.

    Similarities are cosines to centroids, or the scores of a learned router (`domains fit --router`).
    """
    _need_term(term, context)
    check_given(model, base)
    system = load(model, base)
    if system.routing_level != "domain":
        from lora_lexicon.errors import RouterError

        raise RouterError(
            f"{model} chooses experts by gates in its layers ({system.routing_level}-level), not by domain: "
            "`define` and `evaluate` take it; route needs a pack, or a model composed with --routing domain"
        )
    routing, vectors = system.route([(term, context)]), system.embed([(term, context)])
    if routing is None or vectors is None or system.router is None:
        from lora_lexicon.errors import RouterError

        raise RouterError(f"{model} has no router: give a pack or a merged model")
    from lora_lexicon.inference.formats import finite

    record: dict[str, Any] = {
        "term": term,
        "context": context,
        "domain": routing.name(0),
        "margin": finite(routing.margin[0]),
        "similarities": dict(zip(routing.names, map(float, routing.similarities[0]), strict=True)),
        "weights": dict(zip(routing.names, map(float, routing.weights[0]), strict=True)),
        "nearest": [
            {"term": t, "domain": d, "similarity": float(s)}
            for t, d, s in system.router.nearest_terms(vectors[0], nearest)
        ],
    }
    found: list[Explained] = []
    if explained:
        from lora_lexicon.domains.explain import explain, record_of

        found = explain(system.router, routing, vectors[0], nearest)
        record["explanation"] = record_of(system.router, found)
    if as_json:
        emit(record)
        return
    measure = "similarity" if system.router.method == "centroid" else "score"
    if found:
        _show_explained(record, measure, system.router, found)
        return
    similarities, weights = record["similarities"], record["weights"]
    order = sorted(similarities, key=lambda name: -similarities[name])
    rows = [(name, similarities[name], weights[name]) for name in order]
    show_table(f"{term}: {record['domain']}", ("domain", measure, "weight"), rows)
    if record["margin"] is not None:
        typer.echo(f"margin over the next domain: {record['margin']:.3f}")
    if record["nearest"]:
        listed = ", ".join(
            f"{n['term']} {n['similarity']:.2f}" + (f" ({n['domain']})" if n["domain"] != record["domain"] else "")
            for n in record["nearest"]
        )
        typer.echo(f"nearest training terms: {listed}")


def _show_explained(record: dict[str, Any], measure: str, router: "Router", found: "list[Explained]") -> None:
    """A table of the domains, one of their terms nearest to the prompt, and what both come to."""
    from lora_lexicon.domains.explain import reading

    scored = [(e.domain, e.similarity, e.weight, e.cosine, e.quantile) for e in found]
    if measure == "similarity":  # which is the cosine
        scored = [(*row[:3], row[4]) for row in scored]
    titles = ("domain", measure, "weight", *(["cosine"] if measure == "score" else []), "quantile")
    show_table(f"{record['term']}: {record['domain']}", titles, scored)
    terms = [(e.domain, ", ".join(f"{term} {cosine:.2f}" for term, cosine in e.nearest)) for e in found if e.nearest]
    if terms:
        show_table("Nearest training terms", ("domain", "terms, with their cosine"), terms)
    for line in reading(router, found):
        typer.echo(line)


@guarded
def define(
    terms: Annotated[list[str] | None, typer.Argument(metavar="[TERM]...", help="The terms to define.")] = None,
    context: ContextOption = "",
    model: Annotated[str, typer.Option("--model", "-m", help=ModelHelp)] = "tiny",
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Terms from .jsonl, .csv, .tsv, or text: TERM or TERM<TAB>CONTEXT a line."),
    ] = None,
    sample: SampleOption = False,
    best_of: BestOption = 1,
    by: ByOption = None,
    reward: RewardOption = None,
    seed: SeedOption = 42,
    max_tokens: TokensOption = 48,
    base: BaseOption = None,
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = Quantize.none,
    backend: BackendOption = Backend.torch,
    expert_memory: MemoryOption = None,
    format: FormatOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file of --format; by default standard output.")] = None,
    overwrite: ReplaceOption = False,
    language: LanguageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write definitions, each with the expert that wrote it. Without a TERM or a file, asks for terms."""
    from lora_lexicon.errors import DataError

    check_format(format, out, overwrite, language, as_json)
    check_given(model, base)

    if terms and file:
        raise DataError("give terms or --file, not both")
    if context and not terms:
        raise DataError("--context belongs to a TERM: give one, or write contexts into the file")
    if not terms and file is None and (as_json or not sys.stdin.isatty()):
        raise DataError("nothing to define: give a TERM or --file (in a terminal, neither asks for terms)")
    for term in terms or ():
        _need_term(term, context)
    prompts: Iterable[Prompt] = [(term, context) for term in terms or ()]
    if file is not None:
        from lora_lexicon.inference.requests import read_prompts

        prompts = read_prompts(file)
    elif not terms:
        prompts = asked(input)
    if by is By.reference:
        raise DataError("--by reference needs the gold definition, which only evaluate has: choose by another")
    chooser = _chooser(best_of, by, reward)
    decoding = decoding_of(sample or best_of > 1, seed, max_tokens)
    if backend is Backend.vllm:
        if expert_memory is not None:
            raise DataError("--expert-memory is of our own engine: leave --backend vllm out, or --expert-memory")
        write, origin = _vllm_writer(model, decoding, best_of, base, dtype, quantize)
    else:
        system = load(model, base, dtype, quantize, expert_memory)
        origin = (system.name, system.base, system.base_fingerprint)
        write = _writer(system, decoding, best_of, chooser, reward, base, dtype, quantize)
    # In a terminal each answer comes before the next question.
    answers = _answers(write, prompts, CHUNK if isinstance(prompts, list) else 1)
    if format is not None:
        how = f"sampled, seed {seed}" if decoding.method == "sample" else "greedy"
        chosen = f"{chooser.value} among {best_of}" if best_of > 1 else ""
        write_entries(format, answers, (*origin, how, chosen), language or "en", out, overwrite)
        return
    if as_json:
        from lora_lexicon.inference.formats import record_of

        emit({"definitions": [record_of(answer) for answer in answers]})
        return
    for answer in answers:
        term, domain = typer.style(answer.term, bold=True), typer.style(f"[{answer.domain}]", dim=True)
        typer.echo(f"{term} {domain}: {answer.text}")


@guarded
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=ModelHelp)],
    data: Annotated[Path, typer.Option(help="An entries folder (from `data prepare`).")],
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on this many entries, spread over the split.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and predictions/NAME.jsonl.")] = None,
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
        need_free(out, overwrite)
    for model in models:
        check_given(model, base)
    chooser = _chooser(best_of, by, reward)
    memory = expert_bytes(expert_memory)
    if best_of > 1 and not generate:
        raise DataError("--best-of is of definitions, which --no-generate does not write: leave one of them out")
    names = names_of(metrics or ())
    if names and not generate:
        raise DataError("--metric is of definitions, which --no-generate does not write: leave one of them out")
    check(names, encoder=encoder is not None)
    model_read = open_encoder(encoder, layer, baseline)
    launcher = launcher_of(on, cpus, gpus)

    from lora_lexicon.evaluation.run import SIGNATURES, scores_of
    from lora_lexicon.evaluation.shards import Settings, evaluate_models

    decoding = decoding_of(sample or best_of > 1, seed, max_tokens)
    settings = Settings(
        base, dtype.value, quantize.value, decoding, generate, random_routing, seed, best_of, chooser.value,
        str(reward) if reward else None, memory,
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
        "models": models,
        "data": str(data),
        "entries_fingerprint": folder.fingerprint,
        "split": split,
        "rows": len(entries),
        "decoding": asdict(decoding) if generate else None,
        "best_of": {"n": best_of, "by": chooser, "reward": str(reward or "")} if generate and best_of > 1 else None,
        "signatures": SIGNATURES,
        "systems": [result.summary() for result in results],
        "comparisons": comparisons_of(results, generate, seed),
    }
    if names:
        report["scores"] = {result.name: scores_of(result, names, model_read, seed=seed) for result in results}
    if out is not None:
        _write(out, report, results if generate else [], overwrite)
    if as_json:
        emit(report)
        return
    from lora_lexicon.evaluation.report import comparison_rows, system_rows

    best = f"; best of {best_of} by {chooser}" if report["best_of"] else ""
    show_table(f"{data}, {split}: {len(entries)} entries{best}", *system_rows(report["systems"]))
    if names:
        rows = [(model, *row) for model, found in report["scores"].items() for row in figure_rows(found)]
        show_table("Scores", ("system", "metric", "value", "95 % interval"), rows)
    for metric in ("bleu", "rouge_l") if generate else ():
        note(f"{metric}: {SIGNATURES[metric]}")
    for metric in names:
        note(f"{metric}: {report['scores'][results[0].name][metric]['signature']}")
    if report["comparisons"]:
        show_table("Differences (paired bootstrap over headwords)", *comparison_rows(report["comparisons"]))
    if out is not None:
        note(f"written to {out}")


def asked(read: Callable[[str], str]) -> Iterator[Prompt]:
    """Prompts as a person types them, until an empty term or the end of input."""
    note("an empty term ends")
    while True:
        try:
            term = read("term: ").strip()
            if not term:
                return
            yield term, read("context (may be empty): ").strip()
        except EOFError:
            return


def load(
    model: str,
    base: str | None,
    dtype: Dtype = Dtype.float32,
    quantize: Quantize = Quantize.none,
    expert_memory: str | None = None,
) -> "System":
    from lora_lexicon.experts.cost import expert_bytes

    memory = expert_bytes(expert_memory)
    from lora_lexicon.compose.system import load_system

    quiet_libraries()
    return load_system(model, base=base, dtype=dtype.value, quantize=quantize.value, expert_memory=memory)


def decoding_of(sample: bool, seed: int, max_tokens: int) -> "Decoding":
    from lora_lexicon.inference.sampling import Decoding

    return Decoding(method="sample" if sample else "greedy", seed=seed, max_new_tokens=max_tokens)


def _need_term(term: str, context: str = "") -> None:
    from lora_lexicon.errors import DataError
    from lora_lexicon.inference.requests import is_readable

    if not term.strip():
        raise DataError("the term is empty: write the word to look up")
    if not (is_readable(term.strip()) and is_readable(context, "\n\r\t")):
        raise DataError("control characters, or bytes that are not UTF-8, in the term or its context: take them out")


def _chooser(best_of: int, by: By | None, reward: Path | None) -> By:
    """What chooses; refuses options that do not go together."""
    from lora_lexicon.errors import DataError, ExpertError

    if best_of == 1 and (by or reward):
        raise DataError(f"{'--by' if by else '--reward'} chooses among several candidates: add --best-of N, above 1")
    if (by is By.reward) != (reward is not None):
        missing = "--by reward needs a model that `train reward` made: add --reward FOLDER"
        raise DataError("--reward is what --by reward chooses by: add that" if reward else missing)
    if reward is not None and not (reward / "reward.json").is_file():
        raise ExpertError(f"{reward} is not a reward model: reward.json is missing; `train reward` makes one")
    return by or By.mbr


def _writer(
    system: "System",
    decoding: "Decoding",
    best_of: int,
    by: By,
    reward: Path | None,
    base: str | None,
    dtype: Dtype,
    quantize: Quantize,
) -> "Writer":
    """What defines a chunk of prompts: as the model does, or as the best of its candidates."""
    from lora_lexicon.inference import engine

    if best_of == 1:
        return lambda chunk, told: engine.define(system, chunk, decoding, progress=told)

    from lora_lexicon.inference.rerank import best_of as choose
    from lora_lexicon.inference.reward import load_reward

    options = {"base": base, "dtype": dtype.value, "quantize": quantize.value}
    model = load_reward(reward, system, **options) if reward else None

    def write(chunk: list[Prompt], told: Callable[[int], object]) -> "list[Definition]":
        rate = model.of(chunk) if model else None
        return choose(system, chunk, decoding, best_of, by.value, rate=rate, progress=told)

    return write


def _vllm_writer(
    model: str, decoding: "Decoding", best_of: int, base: str | None, dtype: Dtype, quantize: Quantize
) -> "tuple[Writer, tuple[str, str, str]]":
    """What defines a chunk of prompts by vLLM, and the names of pack and base with the base's fingerprint.

    What it cannot do is said before anything is loaded.
    """
    from lora_lexicon.errors import RecipeError

    if best_of > 1:
        raise RecipeError("--best-of needs our own engine: leave --backend vllm out, or --best-of")
    if quantize is not Quantize.none:
        raise RecipeError("--quantize is of our own engine: leave --backend vllm out, or --quantize")
    from lora_lexicon.compose.mixture import read_manifest
    from lora_lexicon.inference import vllm_engine

    vllm_engine.need_vllm()
    quiet_libraries()
    front = vllm_engine.open_front(model, base, dtype=dtype.value)
    engine = vllm_engine.VllmEngine(front, decoding, dtype=dtype.value)

    def write(chunk: list[Prompt], told: Callable[[int], object]) -> "list[Definition]":
        found = vllm_engine.define(front, engine, chunk, decoding)
        told(len(chunk))
        return found

    manifest = read_manifest(front.folder)
    return write, (manifest.name, base or manifest.base, manifest.base_fingerprint)


def _answers(write: "Writer", prompts: Iterable[Prompt], size: int) -> "Iterator[Definition]":
    """Definitions in order, each chunk as soon as it is done; a bar is there while a list of them is worked on."""
    from itertools import islice

    waiting = iter(prompts)
    with progress(shown=isinstance(prompts, list) and len(prompts) > 1) as bar:
        task = bar.add_task("definitions", total=len(prompts) if isinstance(prompts, list) else None)
        while chunk := list(islice(waiting, size)):
            bar.start()
            found = write(chunk, lambda done: bar.advance(task, done))
            bar.stop()  # it would print what is printed while it runs
            yield from found


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


def need_free(out: Path, overwrite: bool) -> None:
    """Fails before the long work, not after it, where `out` is taken."""
    from lora_lexicon.errors import DataError

    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise DataError(f"{out} exists and is not empty: choose another --out, or add --overwrite")


def _write(out: Path, report: dict[str, Any], results: "list[Evaluation]", overwrite: bool) -> None:
    from lora_lexicon.evaluation.run import write_predictions
    from lora_lexicon.folders import new_folder, write_record

    with new_folder(out, replace=overwrite) as folder:
        write_record(folder / "report.json", report)
        if results:
            (folder / "predictions").mkdir()
        for result in results:
            write_predictions(result, folder / "predictions" / f"{result.name}.jsonl")
