"""How both kinds of expert are trained. Knows nothing of domains, routers or metrics' formulas.

The steps are those of `joint`, the state that a stopped run goes on from is that of `loop`. LoRA experts are trained
together, in one pass over their base; FFN experts one after the other, since each is the base's own FFNs for a while.
Either way the base is left as it was.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate, pad_token_id
from lora_lexicon.errors import ExpertError, RecipeError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base, ffn_modules, known_fingerprint, load_tokenizer, loaded_again
from lora_lexicon.experts.checkpoint import (
    JOURNAL,
    RECORD,
    WEIGHTS,
    ExpertInfo,
    check_base,
    check_name,
    load_adapter,
    read_adapter_config,
    read_expert,
    save_ffn,
    save_lora,
    write_expert,
)
from lora_lexicon.experts.cost import options_of, token_flops
from lora_lexicon.experts.forecast import Forecast, forecast
from lora_lexicon.experts.joint import REPORTS, JointRun, PackedModel, Trainee, trainee_of
from lora_lexicon.experts.journal import Journal, Meter, Report, Step, reporters
from lora_lexicon.experts.loop import (
    TokenRow,
    check_finite,
    check_loop,
    encode,
    last_checkpoint,
    load_parameters,
    save_parameters,
    state_folder,
    trained,
    validation_loss,
)
from lora_lexicon.experts.lora import Factors, Owners, adapters_in_training, check_fit, new_factors
from lora_lexicon.experts.shape import read_shape, shape_of
from lora_lexicon.folders import LOGGER, new_folder, sha256_of, write_record
from lora_lexicon.recipe import ATTENTION_MODULES, FFN_MODULES, TrainRecipe

Score = Callable[[list[str], list[str]], float]  # (predictions, references) -> a mean score, larger is better
DECODED_TOKENS = 48


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
    origin = _origin(start_from)
    _check(parts, recipe, base.layers, base.name, bool(score))
    jobs = _jobs(parts, recipe, encoder, base.fingerprint, origin)
    missing = [job for job in jobs if not _is_made(job)]
    for job in missing:
        if (job.part.out / RECORD).is_file() and not overwrite:
            raise ExpertError(
                f"{job.part.out} holds an expert that was trained otherwise (another recipe, base or other data): "
                "choose another --out, or add --overwrite"
            )
    for together in [missing] if recipe.kind == "lora" else [[job] for job in missing]:
        if together:
            _warn(together, recipe)
            _train(
                base,
                together,
                recipe,
                encoder,
                score,
                start_from,
                origin,
                entries_fingerprint,
                progress,
                report_to,
                overwrite,
            )
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
        jobs.append(_Job(part, data, _key(identity, data, recipe, part.name, part.domain, origin)))
    return jobs


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


def _train(
    base: Base,
    jobs: Sequence[_Job],
    recipe: TrainRecipe,
    encoder: PromptEncoder,
    score: Score | None,
    start_from: Path | None,
    origin: str,
    entries_fingerprint: str,
    progress: Report | None,
    report_to: Sequence[str],
    overwrite: bool,
) -> None:
    """Trains the experts of one run together."""
    main = processes.rank() == 0
    if processes.several():
        base = loaded_again(base)
    set_seed(recipe.seed)
    owners = Owners()
    first, others = jobs[0].part.out, len(jobs) - 1
    place = first if not others else first.with_name(f"{first.name}+{others}")
    with ExitStack() as stack:
        make = partial(new_folder, replace=overwrite) if main else nullcontext
        folders = [stack.enter_context(make(job.part.out)) for job in jobs]
        key = hashlib.sha256("".join(job.key for job in jobs).encode()).hexdigest() if others else jobs[0].key
        state = stack.enter_context(state_folder(place, key, recipe, overwrite))
        experts = stack.enter_context(_trainable(base, recipe, jobs, start_from, owners))
        trainees = [
            trainee_of(job.part.name, job.data, recipe, parameters)
            for job, (parameters, _) in zip(jobs, experts, strict=True)
        ]
        listeners = stack.enter_context(reporters(report_to if main else (), first.parent, state))
        watch = _Watch(base, encoder, recipe, jobs, trainees, owners, score, state, progress)
        watch.run = run = JointRun(PackedModel(base.model), owners, trainees, recipe, state, [watch, *listeners])
        run.train(resume_from_checkpoint=last_checkpoint(state))
        watch.keep_best()
        seconds = round(run.seconds, 1)
        meters = [listener for listener in listeners if isinstance(listener, Meter)]
        for n, (job, trainee, folder, (_, save)) in enumerate(zip(jobs, trainees, folders, experts, strict=True)):
            check_finite(trainee.name, trainee.parameters)
            tensors = processes.gathered(trainee.parameters)
            if not main:
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
                entries_fingerprint=entries_fingerprint,
                rows=len(job.data),
                tokens=trainee.tokens,
                trained_parameters=sum(p.numel() for p in trainee.parameters.values()),
                recipe=dataclasses.asdict(recipe),
                started_from=origin,
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
    if main:
        shutil.rmtree(state)
    processes.wait()


class _Watch(TrainerCallback):
    """Reports and writes down progress; at each expert's own steps measures validation loss and score, and stops it
    early.

    Attributes:
        run: what it watches.
        token_flops: floating-point operations to train on one token of each expert.
    """

    run: JointRun

    def __init__(
        self,
        base: Base,
        encoder: PromptEncoder,
        recipe: TrainRecipe,
        jobs: Sequence[_Job],
        trainees: Sequence[Trainee],
        owners: Owners,
        score: Score | None,
        state: Path,
        progress: Report | None,
    ) -> None:
        self.base, self.encoder, self.recipe, self.score = base, encoder, recipe, score
        self.trainees, self.owners, self.state, self.progress = trainees, owners, state, progress
        self.valid = [list(job.part.valid)[: recipe.valid_rows] for job in jobs]
        self.record = state / "evaluations.json"
        self.journal = Journal(state / JOURNAL if processes.rank() == 0 else Path(os.devnull))
        self.history: dict[str, list[dict[str, float]]] = {trainee.name: [] for trainee in trainees}
        shape = shape_of(base.model.config.to_dict(), base.name)
        self.token_flops = [
            token_flops(
                shape,
                options_of(recipe, shape, recipe.rank_of.get(job.part.domain, recipe.rank)),
                recipe.kind,
                sum(p.numel() for p in trainee.parameters.values()),
            )
            for job, trainee in zip(jobs, trainees, strict=True)
        ]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.journal.go_on(state.global_step)
        if self.record.is_file():  # later evaluations than the checkpoint's are made again, with the same result
            kept = json.loads(self.record.read_text())
            for trainee in self.trainees:
                self.history[trainee.name] = [e for e in kept[trainee.name] if e["step"] <= state.global_step]
                self._stop_early(trainee)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, due = state.global_step, control.should_log
        for n, trainee in enumerate(self.trainees):
            if step > trainee.steps:
                continue
            if step in self._evaluations(n):
                self._evaluate(n, step)
                self._stop_early(trainee)
            every = math.ceil(trainee.last / REPORTS)
            if step % every == 0 or step == trainee.steps:
                self._report(n, step, trainee.losses[-every:])
        control.should_log = due  # which reporting an evaluation took back
        control.should_training_stop |= all(step >= trainee.steps for trainee in self.trainees)

    def _report(self, n: int, step: int, losses: Sequence[float]) -> None:
        trainee = self.trainees[n]
        found = Step(
            expert=trainee.name,
            step=step,
            steps=trainee.last,
            tokens=trainee.read(step),
            all_tokens=trainee.read(trainee.last),
            loss=sum(losses) / len(losses),
            learning_rate=cast(Any, self.run.lr_scheduler).get_last_lr()[n],
            seconds=self.run.seconds,
        )
        self.journal.write(dataclasses.asdict(found))
        if self.progress:
            self.progress(found)

    def keep_best(self) -> None:
        """With early stopping, goes back to the weights of each expert's best score."""
        for trainee in self.trainees:
            if self.recipe.early_stopping and self.history[trainee.name]:
                load_parameters(trainee.parameters, self._best(trainee))

    def _best(self, trainee: Trainee) -> Path:
        return self.state / f"best-{trainee.name}.safetensors"

    def _evaluations(self, n: int) -> set[int]:
        """The steps after which an expert is evaluated, evenly spread."""
        count = self.recipe.evaluations if self.valid[n] and self.score else 0
        return {math.ceil(self.trainees[n].last * (i + 1) / count) for i in range(count)}

    def _evaluate(self, n: int, step: int) -> None:
        assert self.score is not None
        trainee, rows, history = self.trainees[n], self.valid[n], self.history[self.trainees[n].name]
        self.base.model.eval()
        with self.owners.of(n):
            predictions = greedy(self.base.model, self.encoder, [(row.term, row.context) for row in rows])
            loss = validation_loss(self.base.model, self.encoder, rows, self.recipe.batch_size)
        found = processes.main_says(self.score(predictions, [row.definition for row in rows]))
        history.append({"step": step, "loss": loss, "score": found})
        self.journal.write({"expert": trainee.name, "step": step, "valid_loss": loss, "score": found})
        self.run.log({f"eval_loss/{trainee.name}": loss, f"eval_score/{trainee.name}": found})
        if self._since_best(trainee) == 0:
            save_parameters(trainee.parameters, self._best(trainee))
        if processes.rank() == 0:
            write_record(self.record, self.history)

    def _since_best(self, trainee: Trainee) -> int:
        scores = [e["score"] for e in self.history[trainee.name]]
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def _stop_early(self, trainee: Trainee) -> None:
        if 0 < self.recipe.early_stopping <= self._since_best(trainee):
            trainee.end = int(self.history[trainee.name][-1]["step"])


@torch.no_grad()
def greedy(model: PreTrainedModel, encoder: PromptEncoder, prompts: Sequence[tuple[str, str]]) -> list[str]:
    """Greedy definitions of (term, context) prompts; prompts of one length share a batch, so nothing is padded."""
    encoded = [encoder.prompt(term, context) for term, context in prompts]
    texts = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        members = [i for i, ids in enumerate(encoded) if len(ids) == length]
        ids = torch.tensor([encoded[i] for i in members], device=model.device)
        tokenizer = encoder.tokenizer
        # Prompts end with EOS, which must not stop the decoding: only new tokens count, as generate does.
        output = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=DECODED_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_token_id(tokenizer),
            synced_gpus=processes.several(),
        )
        for i, row in zip(members, output[:, length:], strict=True):
            texts[i] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return texts


# What is trained, and what saves its tensors in a folder.
Expert = tuple[dict[str, nn.Parameter], Callable[[Mapping[str, Tensor], Path], None]]


@contextmanager
def _trainable(
    base: Base, recipe: TrainRecipe, jobs: Sequence[_Job], start_from: Path | None, owners: Owners
) -> Iterator[list[Expert]]:
    """Makes the experts' parameters; afterwards the base is as it was. The one place where the kinds differ."""
    make = _lora_experts if recipe.kind == "lora" else _ffn_expert
    try:
        with make(base, recipe, [job.part.domain for job in jobs], start_from, owners) as experts:
            yield experts
    finally:
        _freeze(base.model)


@contextmanager
def _lora_experts(
    base: Base, recipe: TrainRecipe, domains: Sequence[str], start_from: Path | None, owners: Owners
) -> Iterator[list[Expert]]:
    layers = _lora_layers(base, recipe)
    start = _start(start_from, base) if start_from else None
    configs, factors = [], []
    for domain in domains:
        config = _config(base, recipe, recipe.rank_of.get(domain, recipe.rank))
        if start_from and start is not None:
            _check_start(config, layers, start, start_from)
            factors.append({name: start[name] for name in layers})
        else:
            scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
            factors.append(new_factors(base.model, layers, config.r, scaling, recipe.seed))
        configs.append(config)
    with adapters_in_training(base.model, factors, owners, recipe.dropout) as training:

        def save(n: int, tensors: Mapping[str, Tensor], folder: Path) -> None:
            own = {
                name: Factors(tensors[f"{name}.a.{n}"], tensors[f"{name}.b.{n}"], f.scaling)
                for name, f in factors[n].items()
            }
            save_lora(configs[n], own, folder, dtype=base.model.dtype)

        yield [(parameters, partial(save, n)) for n, parameters in enumerate(training)]


@contextmanager
def _ffn_expert(
    base: Base, recipe: TrainRecipe, domains: Sequence[str], start_from: Path | None, owners: Owners
) -> Iterator[list[Expert]]:
    modules = ffn_modules(base.model, recipe.first_layer)
    before = {}
    if not processes.several():  # whose base is their own
        before = {n: {k: v.clone().cpu() for k, v in module.state_dict().items()} for n, module in modules.items()}
    attention = [cast(Any, layer).self_attn for layer in cast(Any, base.model).model.layers]
    dropout = attention[0].attention_dropout
    dtype = base.model.dtype
    try:
        for module in modules.values():  # float32 masters: AdamW's small steps would be lost in 16 bits
            module.float().requires_grad_(True)
            if base.model.device.type == "meta":  # the main process holds its values
                module.to_empty(device="cpu")
        if start_from:
            _merge_adapter(modules, _start(start_from, base), start_from)
        for layer in attention:  # the one dropout a Llama has
            layer.attention_dropout = recipe.dropout
        yield [(trained(base.model), partial(save_ffn, dtype=dtype))]
    finally:
        for name, state in before.items():
            modules[name].to(dtype).load_state_dict(state)
        for layer in attention:
            layer.attention_dropout = dropout


def _freeze(model: PreTrainedModel) -> None:
    model.requires_grad_(False).eval()
    model.zero_grad()
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()


def _lora_layers(base: Base, recipe: TrainRecipe) -> list[str]:
    """The full names of the linear layers that LoRA experts update."""
    wanted = {*FFN_MODULES, *(ATTENTION_MODULES if recipe.attention else ())}
    return [
        f"model.layers.{i}.{name}"
        for i, layer in enumerate(cast(Any, base.model).model.layers)
        if i >= recipe.first_layer
        for name, _ in layer.named_modules()
        if name.rpartition(".")[2] in wanted
    ]


def _config(base: Base, recipe: TrainRecipe, rank: int) -> LoraConfig:
    """What PEFT needs to read the adapter; it does not name this machine's path of the base."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, recipe.alpha),
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=[*FFN_MODULES, *(ATTENTION_MODULES if recipe.attention else ())],
        layers_to_transform=list(range(recipe.first_layer, base.layers)),
        layers_pattern="layers",
        base_model_name_or_path=base.name,
        inference_mode=True,
    )


def _start(path: Path, base: Base) -> Mapping[str, Factors]:
    """The factors of the adapter to branch from, if it was trained on this base (as far as one can tell)."""
    if (path / RECORD).is_file():
        check_base(read_expert(path), base.fingerprint, base.name)
    adapter = load_adapter(path)
    check_fit(base.model, adapter)
    return adapter.factors


def _merge_adapter(modules: dict[str, nn.Module], factors: Mapping[str, Factors], path: Path) -> None:
    """Adds an adapter's updates to the FFNs that will be trained; it may update nothing else."""
    own = {f"{name}.{child}": layer for name, module in modules.items() for child, layer in module.named_children()}
    odd = sorted(set(factors) - set(own))
    if odd:
        raise ExpertError(
            f"{path} updates {odd[0]}, which an ffn expert does not own: branch from an adapter on its FFNs"
        )
    with torch.no_grad():
        for name, f in factors.items():
            weight = cast(Tensor, own[name].weight)
            weight += f.delta.to(weight.device)


def _check_start(config: LoraConfig, layers: Sequence[str], factors: Mapping[str, Factors], path: Path) -> None:
    """Refuses to branch from an adapter of another rank, scaling or layers than the recipe's."""
    theirs = read_adapter_config(path)
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(theirs, key) != getattr(config, key):
            raise ExpertError(
                f"{path} has {key} {getattr(theirs, key)}, the recipe says {getattr(config, key)}: "
                "an expert branches from an adapter of its own shape"
            )
    if set(factors) != set(layers):
        odd = sorted({*layers} ^ {*factors})[0]
        raise ExpertError(f"{path} and the recipe do not train the same layers: they differ at {odd}")


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
    if recipe.kind == "ffn" and recipe.quantize != "none":
        raise RecipeError(f"quantize is {recipe.quantize}; an ffn expert trains the weights themselves: use kind lora")
    if (recipe.evaluations or recipe.early_stopping) and not can_evaluate:
        raise RecipeError("evaluations need validation rows: use entries with a split named valid, or evaluations=0")
    if recipe.early_stopping and not recipe.evaluations:
        raise RecipeError("early_stopping counts evaluations, and evaluations is 0: set it too")


def _key(identity: str, data: list[TokenRow], recipe: TrainRecipe, name: str, domain: str, origin: str) -> str:
    digest = hashlib.sha256()
    settings = [identity, dataclasses.asdict(recipe), name, domain, origin]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for row in data:
        digest.update(json.dumps([row["prompt_length"], *row["input_ids"]]).encode())
    return digest.hexdigest()
