"""How both kinds of expert are trained. Knows nothing of domains, routers or metrics' formulas.

The steps are those of `joint`, the state that a stopped run goes on from is that of `loop`, what is trained comes from
`kinds`. LoRA experts are trained together, in one pass over their base; FFN experts one after the other, since each is
the base's own FFNs for a while. Either way the base is left as it was.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import set_seed

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate
from lora_lexicon.errors import ExpertError, RecipeError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base, known_fingerprint, load_tokenizer, loaded_again
from lora_lexicon.experts.checkpoint import (
    JOURNAL,
    RECORD,
    WEIGHTS,
    ExpertInfo,
    check_name,
    read_adapter_config,
    read_expert,
    write_expert,
)
from lora_lexicon.experts.forecast import Forecast, forecast
from lora_lexicon.experts.joint import JointRun, PackedModel, trainee_of
from lora_lexicon.experts.journal import Meter, Report, reporters
from lora_lexicon.experts.kernels import check_kernels, liger_kernels
from lora_lexicon.experts.kinds import trainable
from lora_lexicon.experts.loop import (
    TokenRow,
    check_finite,
    check_loop,
    encode,
    last_checkpoint,
    state_folder,
    unfinished,
)
from lora_lexicon.experts.lora import Owners
from lora_lexicon.experts.shape import read_shape
from lora_lexicon.experts.watch import Score, Watch
from lora_lexicon.folders import LOGGER, new_folder, sha256_of
from lora_lexicon.recipe import TrainRecipe


@dataclass(frozen=True)
class Part:
    """One expert to train.

    Attributes:
        out: the folder to make.
        domain: "" is everything.
        valid: rows for the recipe's evaluations.
    """

    name: str
    rows: Sequence[Entry]
    out: Path
    domain: str = ""
    valid: Sequence[Entry] = ()


@dataclass(frozen=True)
class _Job:
    """A part made ready: its rows encoded, and the key of everything that decides what becomes of it."""

    part: Part
    data: list[TokenRow]
    key: str


@dataclass(frozen=True)
class _Call:
    """What the runs of one `train_experts` share; see there."""

    base: Base
    recipe: TrainRecipe
    encoder: PromptEncoder
    score: Score | None
    start_from: Path | None
    entries_fingerprint: str
    progress: Report | None
    report_to: Sequence[str]
    overwrite: bool

    @cached_property
    def origin(self) -> str:
        return _origin(self.start_from)


def train_experts(
    base: Base,
    parts: Sequence[Part],
    recipe: TrainRecipe,
    *,
    score: Score | None = None,
    start_from: Path | None = None,
    entries_fingerprint: str = "",
    template: PromptTemplate | None = None,
    progress: Report | None = None,
    report_to: Sequence[str] = (),
    overwrite: bool = False,
) -> list[ExpertInfo]:
    """Trains experts and writes each to its folder; those already there from the same call are kept.

    Args:
        base: left as it was, so that more experts can be trained on one loaded base. Several processes load it anew
            for each run, so that here the shapes are enough: `load_base(..., device="meta")`.
        score: rates greedy definitions of a part's `valid` rows (BLEU, say) for `recipe.evaluations`.
        start_from: an adapter to branch from: LoRA experts train copies of it instead of starting at
            zero, FFN experts start from FFNs that it was merged into.
        progress: told of each expert's steps, a thousand times at most.
        report_to: tensorboard, trackio, wandb, codecarbon.

    Raises:
        RecipeError: the recipe does not fit the base or itself.
        ExpertError: no rows, `start_from` does not fit, or training diverged.
    """
    processes.join()
    check_loop(recipe, base.model.device)
    encoder = PromptEncoder(base.tokenizer, template or PromptTemplate(), recipe.max_length)
    _check(parts, recipe, base.layers, base.name, bool(score))
    call = _Call(base, recipe, encoder, score, start_from, entries_fingerprint, progress, report_to, overwrite)
    jobs = _jobs(parts, recipe, encoder, base.fingerprint, call.origin)
    missing = [job for job in jobs if not _is_made(job)]
    for job in missing:
        if (job.part.out / RECORD).is_file() and not overwrite:
            raise ExpertError(
                f"{job.part.out} holds an expert that was trained otherwise (another recipe, base or other data): "
                "choose another --out, or add --overwrite"
            )
    _warn(missing, recipe)
    by_key = {job.key: job for job in jobs}
    for together in processes.main_says(_runs(jobs, recipe.kind) if processes.rank() == 0 else []):
        _train(call, [by_key[key] for key in together])
    return [read_expert(part.out) for part in parts]


def foresee_experts(
    base: str,
    parts: Sequence[Part],
    recipe: TrainRecipe,
    *,
    score: Score | None = None,
    start_from: Path | None = None,
    template: PromptTemplate | None = None,
    apart: bool = False,
) -> Forecast:
    """What `train_experts` with a base of this name would do; it loads no weights.

    Args:
        apart: each expert is to be trained in a process of its own.

    Raises:
        RecipeError, ExpertError: as `train_experts`.
    """
    shape, tokenizer, identity = read_shape(base), load_tokenizer(base), known_fingerprint(base)
    check_loop(recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    _check(parts, recipe, shape.layers, base, bool(score))
    encoder = PromptEncoder(tokenizer, template or PromptTemplate(), recipe.max_length)
    jobs = _jobs(parts, recipe, encoder, identity, _origin(start_from))
    found = [(trainee_of(job.part.name, job.data, recipe, {}), job.part.domain, _is_made(job)) for job in jobs]
    return forecast(shape, recipe, found, apart)


def _origin(start_from: Path | None) -> str:
    """What identifies the adapter to branch from."""
    if not start_from:
        return ""
    read_adapter_config(start_from)  # refuses what is no adapter
    return sha256_of(start_from / WEIGHTS)


def _jobs(parts: Sequence[Part], recipe: TrainRecipe, encoder: PromptEncoder, identity: str, origin: str) -> list[_Job]:
    jobs = []
    for part in parts:
        data = [encode(encoder, row) for row in part.rows]
        jobs.append(_Job(part, data, _key(identity, data, recipe, part, origin)))
    return jobs


def _runs(jobs: Sequence[_Job], kind: str) -> list[list[str]]:
    """Keys of the experts to train together: first those of runs that were cut off, then what is left.

    A run that was killed while its experts took their places goes on with all of them, made or not; one that was
    killed after that has left its state, which is removed.
    """
    known, left = {job.key for job in jobs}, [job.key for job in jobs if not _is_made(job)]
    runs: list[list[str]] = []
    for folder in dict.fromkeys(job.part.out.parent for job in jobs):
        for state, keys in unfinished(folder):
            if not keys or not known.issuperset(keys):
                continue  # of other experts
            if set(keys).isdisjoint(left):
                shutil.rmtree(state, ignore_errors=True)
            else:
                runs.append(keys)
                left = [key for key in left if key not in keys]
    if left:
        runs += [left] if kind == "lora" else [[key] for key in left]
    return runs


def _is_made(job: _Job) -> bool:
    return (job.part.out / RECORD).is_file() and read_expert(job.part.out).key == job.key


def _warn(jobs: Sequence[_Job], recipe: TrainRecipe) -> None:
    """Says what a run will make little of."""
    a_step = recipe.batch_size * recipe.gradient_accumulation
    for job in jobs:
        cut, count = sum(row["cut"] for row in job.data), len(job.data)
        if cut:
            LOGGER.warning(
                "expert %r: %s of %s rows are longer than max_length %s, and are cut to it",
                *(job.part.name, cut, count, recipe.max_length),
            )
        if count < a_step:
            LOGGER.warning(
                "expert %r has %s rows, fewer than one step reads (%s): it will learn little; fit fewer domains",
                *(job.part.name, count, a_step),
            )


def _train(call: _Call, jobs: Sequence[_Job]) -> None:
    """Trains the experts of one run together."""
    recipe, main = call.recipe, processes.rank() == 0
    base = loaded_again(call.base) if processes.several() else call.base
    set_seed(recipe.seed)
    owners = Owners()
    first, others = jobs[0].part.out, len(jobs) - 1
    place = first if not others else first.with_name(f"{first.name}+{others}")
    with ExitStack() as stack:
        make = partial(new_folder, replace=call.overwrite) if main else nullcontext
        keys, made = [job.key for job in jobs], [_is_made(job) for job in jobs]
        key = hashlib.sha256("".join(keys).encode()).hexdigest() if others else jobs[0].key
        state = stack.enter_context(state_folder(place, key, recipe, call.overwrite, keys))
        folders = [
            None if there else stack.enter_context(make(job.part.out)) for job, there in zip(jobs, made, strict=True)
        ]
        domains = [job.part.domain for job in jobs]
        if recipe.liger:
            stack.enter_context(liger_kernels(base.model))
        experts = stack.enter_context(trainable(base, recipe, domains, call.start_from, owners))
        trainees = [
            trainee_of(job.part.name, job.data, recipe, parameters)
            for job, (parameters, _) in zip(jobs, experts, strict=True)
        ]
        listeners = stack.enter_context(reporters(call.report_to if main else (), first.parent, state))
        valid, ranks = [job.part.valid for job in jobs], [recipe.rank_for(domain) for domain in domains]
        watch = Watch(base, call.encoder, recipe, trainees, valid, ranks, owners, call.score, state, call.progress)
        watch.run = run = JointRun(PackedModel(base.model, owners), trainees, recipe, state, [watch, *listeners])
        run.train(resume_from_checkpoint=last_checkpoint(state))
        watch.keep_best()
        seconds = round(run.seconds, 1)
        meters = [listener for listener in listeners if isinstance(listener, Meter)]
        for n, (job, trainee, folder, (_, save)) in enumerate(zip(jobs, trainees, folders, experts, strict=True)):
            check_finite(trainee.name, trainee.parameters)
            tensors = processes.gathered(trainee.parameters)
            if folder is None or not main:
                continue
            save(tensors, folder)
            watch.journal.copy(trainee.name, folder / JOURNAL)
            info = ExpertInfo(
                name=trainee.name,
                kind=recipe.kind,
                base=base.name,
                base_fingerprint=base.fingerprint,
                first_layer=recipe.first_layer,
                domain=job.part.domain,
                entries_fingerprint=call.entries_fingerprint,
                rows=len(job.data),
                tokens=trainee.tokens,
                trained_parameters=sum(tensor.numel() for tensor in tensors.values()),
                recipe=dataclasses.asdict(recipe),
                started_from=call.origin,
                training={
                    "steps": trainee.steps,
                    "seconds": seconds,
                    "flops": watch.token_flops[n] * trainee.tokens,
                    **({"energy": meters[0].found} if meters else {}),
                    "together": [job.part.name for job in jobs],
                    "losses": trainee.curve(),
                    "evaluations": watch.history[trainee.name],
                },
                versions={p: version(p) for p in ("torch", "transformers", "peft")},
                key=job.key,
            )
            write_expert(folder, info)
    if processes.zero():
        processes.release(run.model_wrapped)
    if main:
        shutil.rmtree(state)
    processes.wait()


def _check(parts: Sequence[Part], recipe: TrainRecipe, layers: int, base: str, scored: bool) -> None:
    """Refuses what cannot be trained, before anything is."""
    for part in parts:
        check_name(part.name)
        _check_recipe(recipe, layers, base, bool(part.valid) and scored)
        if not part.rows:
            raise ExpertError(f"expert {part.name!r} has no rows to train on: choose another domain")


def _check_recipe(recipe: TrainRecipe, layers: int, base: str, can_evaluate: bool) -> None:
    if not 0 <= recipe.first_layer < layers:
        raise RecipeError(f"first_layer is {recipe.first_layer}; base {base!r} has layers 0 to {layers - 1}")
    for key in ("rank", "alpha", "pass_tokens"):
        if getattr(recipe, key) <= 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be positive")
    for key in ("evaluations", "early_stopping"):
        if getattr(recipe, key) < 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must not be negative")
    wrong = [r for r in recipe.rank_of.values() if not isinstance(r, int) or r <= 0]
    if wrong:
        raise RecipeError(f"rank_of holds {wrong[0]!r}; a rank must be a positive integer")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"dropout is {recipe.dropout}; it must be at least 0 and below 1")
    if processes.several() and (recipe.quantize != "none" or recipe.dtype == "float16"):
        raise RecipeError("several processes shard a base in bfloat16 or float32: set quantize=none and dtype=bfloat16")
    if recipe.liger:
        check_kernels()
    if recipe.kind == "ffn" and recipe.quantize != "none":
        raise RecipeError(f"quantize is {recipe.quantize}; an ffn expert trains the weights themselves: use kind lora")
    if (recipe.evaluations or recipe.early_stopping) and not can_evaluate:
        raise RecipeError("evaluations need validation rows: use entries with a split named valid, or evaluations=0")
    if recipe.early_stopping and not recipe.evaluations:
        raise RecipeError("early_stopping counts evaluations, and evaluations is 0: set it too")


def _key(identity: str, data: list[TokenRow], recipe: TrainRecipe, part: Part, origin: str) -> str:
    digest = hashlib.sha256()
    settings = [identity, dataclasses.asdict(recipe), part.name, part.domain, origin]
    valid = part.valid[: recipe.valid_rows] if recipe.evaluations else ()
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for row in data:
        digest.update(json.dumps([row["prompt_length"], *row["input_ids"]]).encode())
    for row in valid:
        digest.update(json.dumps([row.term, row.context, row.definition]).encode())
    return digest.hexdigest()
