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

from transformers import set_seed

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate
from lora_lexicon.domains.fit import Domains, EntriesLike
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base, known_fingerprint, load_tokenizer, loaded_again
from lora_lexicon.experts.check import Where, check_training
from lora_lexicon.experts.checkpoint import (
    JOURNAL,
    RECORD,
    WEIGHTS,
    ExpertInfo,
    read_expert,
    write_expert,
)
from lora_lexicon.experts.forecast import Forecast, forecast
from lora_lexicon.experts.joint import JointRun, PackedModel, trainee_of
from lora_lexicon.experts.journal import Meter, Report, reporters
from lora_lexicon.experts.kernels import fused
from lora_lexicon.experts.kinds import trainable
from lora_lexicon.experts.loop import TokenRow, check_finite, encode
from lora_lexicon.experts.lora import Owners
from lora_lexicon.experts.shape import read_shape
from lora_lexicon.experts.state import last_checkpoint, state_folder, unfinished
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


def part_of(entries: EntriesLike, domains: Domains | None, domain: str | None, out: Path) -> Part:
    """The expert `out` on the entries of a domain, or on all of them; a domain without validation rows watches all.

    Raises:
        DataError: the domains were fitted on other entries.
        RouterError: no such domain.
    """
    watched = entries.split("valid") if "valid" in entries.splits else []
    if domains is not None:
        domains.check(entries)
    if domains is None or domain is None:
        return Part(out.name, entries.split("train"), out, valid=watched)
    own = domains.rows(entries, "valid", domain) if watched else []
    return Part(domain, domains.rows(entries, "train", domain), out, domain, own or watched)


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
    where = Where(None if base.model.device.type == "meta" else base.model.device, processes.count())
    check_training(base, parts, recipe, where, scored=bool(score), start_from=start_from, report_to=report_to)
    encoder = PromptEncoder(base.tokenizer, template or PromptTemplate(), recipe.max_length)
    call = _Call(base, recipe, encoder, score, start_from, entries_fingerprint, progress, report_to, overwrite)
    jobs = _jobs(parts, recipe, encoder, base.fingerprint, call.origin)
    _warn(_missing(jobs, overwrite), recipe)
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
    report_to: Sequence[str] = (),
    overwrite: bool = False,
    where: Where | None = None,
    apart: bool = False,
) -> Forecast:
    """What `train_experts` with a base of this name would do; it loads no weights.

    Args:
        where: it would run; by default here, in one process.
        apart: each expert is to be trained in a process of its own.

    Raises:
        RecipeError, ExpertError: as `train_experts`.
    """
    where = where or Where()
    check_training(base, parts, recipe, where, scored=bool(score), start_from=start_from, report_to=report_to)
    identity = known_fingerprint(base)
    encoder = PromptEncoder(load_tokenizer(base), template or PromptTemplate(), recipe.max_length)
    jobs = _jobs(parts, recipe, encoder, identity, _origin(start_from))
    if identity:  # else what is there cannot be told from what is not
        _missing(jobs, overwrite)
    found = [(trainee_of(job.part.name, job.data, recipe, {}), job.part.domain, _is_made(job)) for job in jobs]
    return forecast(read_shape(base), recipe, found, apart, where.processes, where.sharding)


def _origin(start_from: Path | None) -> str:
    """What identifies the adapter to branch from."""
    return sha256_of(start_from / WEIGHTS) if start_from else ""


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


def _missing(jobs: Sequence[_Job], overwrite: bool) -> list[_Job]:
    """What is left to train; refuses to put it where another expert is."""
    missing = [job for job in jobs if not _is_made(job)]
    for job in missing:
        if (job.part.out / RECORD).is_file() and not overwrite:
            raise ExpertError(
                f"{job.part.out} holds an expert that was trained otherwise (another recipe, base or other data): "
                "choose another --out, or add --overwrite"
            )
    return missing


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
        experts = stack.enter_context(trainable(base, recipe, domains, call.start_from, owners))
        stack.enter_context(fused(base.model, recipe.liger))
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
