"""`lora-lexicon route | define`, and the options of all commands that load a model."""

import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    JsonOption,
    check_given,
    emit,
    guarded,
    note,
    progress,
    quiet_libraries,
    show_table,
)
from .entries import FormatOption, LanguageOption, ReplaceOption, check_format, write_entries

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System
    from lora_lexicon.domains.explain import Explained
    from lora_lexicon.domains.router import Router
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
    chooser = chooser_of(best_of, by, reward)
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


def chooser_of(best_of: int, by: By | None, reward: Path | None) -> By:
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
