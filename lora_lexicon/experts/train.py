"""One training loop for both kinds of expert. Knows nothing of domains, routers or metrics' formulas.

transformers' Trainer drives the steps. What the two kinds differ in is one function, `_trainable`:
LoRA factors put on the base by PEFT, or the base's own FFNs; either way the base is left as it was.

A run's state lies in `.NAME.training` beside the expert to be, under a key of recipe, data and base:
the same command goes on from it and, on a CPU, ends with the weights of an unbroken run, bit for
bit; a changed command starts afresh.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import IGNORED, PromptEncoder, PromptTemplate, collate, pad_token_id
from lora_lexicon.errors import ExpertError, RecipeError
from lora_lexicon.experts.base import Base, ffn_modules
from lora_lexicon.experts.checkpoint import (
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
from lora_lexicon.experts.lora import Factors, check_fit
from lora_lexicon.folders import new_folder, sha256_of, write_record
from lora_lexicon.recipe import ATTENTION_MODULES, FFN_MODULES, TrainRecipe

Score = Callable[[list[str], list[str]], float]  # (predictions, references) -> a mean score, larger is better
Progress = Callable[[int, int], None]  # (rows done, rows in all)
TENSORS = "trainable.safetensors"
MEGABATCH = 50  # batches among which rows are sorted by length, as in transformers' own grouping
DECODED_TOKENS = 48
SHORTEST = 8  # tokens of a row


class TokenRow(TypedDict):
    """One encoded entry."""

    input_ids: list[int]
    prompt_length: int


def train_expert(
    base: Base,
    rows: Sequence[Entry],
    out: Path,
    recipe: TrainRecipe,
    *,
    name: str,
    valid: Sequence[Entry] | None = None,
    score: Score | None = None,
    start_from: Path | None = None,
    domain: str = "",
    entries_fingerprint: str = "",
    template: PromptTemplate | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ExpertInfo:
    """Trains one expert on `rows` and writes it to `out`; an expert already there from the same call is kept.

    Args:
        base: left as it was, so that several experts can be trained on one loaded base.
        valid: rows for `recipe.evaluations`; `score` rates greedy definitions of them (BLEU, say).
        start_from: an adapter to branch from: a LoRA expert trains a copy of it instead of starting at
            zero, an FFN expert starts from FFNs that it was merged into.

    Raises:
        RecipeError: the recipe does not fit the base or itself.
        ExpertError: no rows, `start_from` does not fit, or training diverged.
    """
    check_name(name)
    _check_recipe(base, recipe, bool(valid and score))
    if not rows:
        raise ExpertError(f"expert {name!r} has no rows to train on: choose another domain")
    encoder = PromptEncoder(base.tokenizer, template or PromptTemplate(), recipe.max_length)
    data = [_encode(encoder, row) for row in rows]
    if start_from:
        read_adapter_config(start_from)  # refuses what is no adapter
    origin = sha256_of(start_from / WEIGHTS) if start_from else ""
    key = _key(base, data, recipe, name, domain, origin)
    if (out / RECORD).is_file() and read_expert(out).key == key:
        return read_expert(out)
    started = time.monotonic()
    set_seed(recipe.seed)
    rank = recipe.rank_of.get(domain, recipe.rank)
    with (
        new_folder(out, replace=overwrite) as folder,
        _state_folder(out, key) as state,
        _trainable(base, recipe, rank, start_from) as (model, save),
    ):
        watch = _Watch(base, encoder, recipe, valid or (), score, state, progress)
        run = _Run(model, data, recipe, state, encoder, watch)
        run.train(resume_from_checkpoint=_last_checkpoint(state))
        watch.keep_best(model)
        _check_finite(name, model)
        save(folder)
        steps = run.state.global_step
        info = ExpertInfo(
            name=name,
            kind=recipe.kind,
            base=base.name,
            base_fingerprint=base.fingerprint,
            first_layer=recipe.first_layer,
            domain=domain,
            entries_fingerprint=entries_fingerprint,
            rows=len(rows),
            tokens=sum(len(data[i]["input_ids"]) for i in run.order[: steps * run.rows_a_step]),
            trained_parameters=sum(p.numel() for p in _trained(model).values()),
            recipe=dataclasses.asdict(recipe),
            started_from=origin,
            training={
                "steps": steps,
                "seconds": round(time.monotonic() - started, 1),
                "losses": [[e["step"], e["loss"]] for e in run.state.log_history if "loss" in e],
                "evaluations": watch.history,
            },
            versions={p: version(p) for p in ("torch", "transformers", "peft")},
            key=key,
        )
        write_expert(folder, info)
    shutil.rmtree(state)
    return info


def length_grouped(lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """A permutation of the rows in which each run of `batch` rows has similar lengths, in random order of runs."""
    rng = random.Random(seed)
    shuffled = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(shuffled), batch * MEGABATCH):
        group = sorted(shuffled[start : start + batch * MEGABATCH], key=lambda i: lengths[i])
        batches += [group[i : i + batch] for i in range(0, len(group), batch)]
    short = [b for b in batches if len(b) < batch]  # last, so that the others stay aligned
    full = [b for b in batches if len(b) == batch]
    rng.shuffle(full)
    return [i for b in [*full, *short] for i in b]


def collate_for_loss(rows: list[TokenRow], pad: int) -> dict[str, Tensor]:
    """A batch whose logits are computed where a definition's token is predicted, and nowhere else.

    `input_ids`, `labels` (the token that follows, or IGNORED) and `logits_to_keep` (bool) are (B, T).
    There is no attention mask: padding is on the right, where causal attention never looks at it.
    """
    batch = collate(cast("list[dict[str, list[int]]]", rows), pad)
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, :-1] = batch["labels"][:, 1:]
    return {"input_ids": batch["input_ids"], "labels": labels, "logits_to_keep": labels != IGNORED}


def definition_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The mean negative log-likelihood of the definitions' tokens (equation 1 of the paper), over a whole step."""
    kept = labels[labels != IGNORED]
    total = nn.functional.cross_entropy(outputs.logits.float(), kept, reduction="sum")
    return total / (len(kept) if num_items_in_batch is None else num_items_in_batch)


class _Run(Trainer):
    """transformers' Trainer with our order of rows, and checkpoints that hold what is trained and no more."""

    def __init__(
        self,
        model: nn.Module,
        data: list[TokenRow],
        recipe: TrainRecipe,
        state: Path,
        encoder: PromptEncoder,
        watch: "_Watch",
    ) -> None:
        pad = pad_token_id(encoder.tokenizer)
        arguments = _arguments(recipe, state, next(model.parameters()).device)
        self.rows_a_step = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
        self.order = _order([len(row["input_ids"]) for row in data], recipe, self.rows_a_step)
        steps = math.ceil(len(self.order) / self.rows_a_step)
        arguments.max_steps = steps
        arguments.warmup_steps = math.ceil(steps * recipe.warmup_ratio)
        arguments.save_steps = math.ceil(steps / (recipe.checkpoints + 1))
        arguments.logging_steps = max(1, steps // 20)
        watch.plan(steps, self.rows_a_step, len(self.order))
        super().__init__(
            model=cast(PreTrainedModel, model),
            args=arguments,
            train_dataset=cast(Any, data),
            data_collator=lambda rows: collate_for_loss(rows, pad),
            compute_loss_func=definition_loss,
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """All epochs as one sequence that the seed alone decides: a resumed run only has to skip."""
        return self.order

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(cast(str, output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        _save_trained(cast(nn.Module, self.model), folder / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _load_trained(cast(nn.Module, self.model), Path(resume_from_checkpoint) / TENSORS)


class _Watch(TrainerCallback):
    """Reports progress, measures validation loss and score, remembers the best weights, stops early."""

    def __init__(
        self,
        base: Base,
        encoder: PromptEncoder,
        recipe: TrainRecipe,
        valid: Sequence[Entry],
        score: Score | None,
        state: Path,
        progress: Progress | None,
    ) -> None:
        self.base, self.encoder, self.recipe, self.progress, self.score = base, encoder, recipe, progress, score
        self.valid = list(valid)[: recipe.valid_rows]
        self.best, self.record = state / "best.safetensors", state / "evaluations.json"
        self.history: list[dict[str, float]] = []

    def plan(self, steps: int, rows_a_step: int, rows: int) -> None:
        """Spreads the evaluations over the run."""
        count = self.recipe.evaluations if self.valid and self.score else 0
        self.at = {math.ceil(steps * (i + 1) / count) for i in range(count)}
        self.rows_a_step, self.rows = rows_a_step, rows

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.record.is_file():  # later evaluations than the checkpoint's are made again, with the same result
            self.history = [e for e in json.loads(self.record.read_text())["history"] if e["step"] <= state.global_step]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self._evaluate(kwargs["model"], state.global_step)
            control.should_training_stop |= 0 < self.recipe.early_stopping <= self._since_best()
        if self.progress:
            self.progress(min(state.global_step * self.rows_a_step, self.rows), self.rows)

    def keep_best(self, model: nn.Module) -> None:
        """With early stopping, goes back to the weights of the best score."""
        if self.recipe.early_stopping and self.history:
            _load_trained(model, self.best)

    def _evaluate(self, model: nn.Module, step: int) -> None:
        assert self.score is not None
        model.eval()
        predictions = greedy(self.base.model, self.encoder, [(row.term, row.context) for row in self.valid])
        found = self.score(predictions, [row.definition for row in self.valid])
        loss = validation_loss(self.base.model, self.encoder, self.valid, self.recipe.batch_size)
        self.history.append({"step": step, "loss": loss, "score": found})
        if self._since_best() == 0:
            _save_trained(model, self.best)
        write_record(self.record, {"history": self.history})

    def _since_best(self) -> int:
        scores = [e["score"] for e in self.history]
        return len(scores) - 1 - scores.index(max(scores))


@torch.no_grad()
def validation_loss(model: PreTrainedModel, encoder: PromptEncoder, rows: Sequence[Entry], batch_size: int) -> float:
    """The mean negative log-likelihood of the definitions' tokens."""
    data = sorted((_encode(encoder, row) for row in rows), key=lambda row: len(row["input_ids"]))
    total, count, pad = 0.0, 0, pad_token_id(encoder.tokenizer)
    for start in range(0, len(data), batch_size):
        batch = {k: v.to(model.device) for k, v in collate_for_loss(data[start : start + batch_size], pad).items()}
        labels = batch.pop("labels")
        total += float(definition_loss(model(**batch), labels, 1))
        count += int((labels != IGNORED).sum())
    return total / count


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
        )
        for i, row in zip(members, output[:, length:], strict=True):
            texts[i] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return texts


@contextmanager
def _trainable(
    base: Base, recipe: TrainRecipe, rank: int, start_from: Path | None
) -> Iterator[tuple[nn.Module, Callable[[Path], None]]]:
    """(the model to train, how to save what was trained); afterwards the base is as it was.

    The one place where the kinds of expert differ.
    """
    if recipe.kind == "lora":
        model = _lora(base, recipe, rank)
        try:
            if start_from:
                _copy_adapter(model, _start(start_from, base), start_from)
            yield model, lambda folder: save_lora(model, folder, base.model.dtype)
        finally:
            model.unload()
            _freeze(base.model)
        return
    modules = ffn_modules(base.model, recipe.first_layer)
    before = {name: {k: v.clone().cpu() for k, v in module.state_dict().items()} for name, module in modules.items()}
    attention = [cast(Any, layer).self_attn for layer in cast(Any, base.model).model.layers]
    dropout = attention[0].attention_dropout
    dtype = base.model.dtype
    try:
        for module in modules.values():  # float32 masters: AdamW's small steps would be lost in 16 bits
            module.float().requires_grad_(True)
        if start_from:
            _merge_adapter(modules, _start(start_from, base), start_from)
        for layer in attention:  # the one dropout a Llama has
            layer.attention_dropout = recipe.dropout
        yield base.model, lambda folder: save_ffn(base.model, recipe.first_layer, folder, dtype)
    finally:
        for name, module in modules.items():
            module.to(dtype).load_state_dict(before[name])
        for layer in attention:
            layer.attention_dropout = dropout
        _freeze(base.model)


def _freeze(model: PreTrainedModel) -> None:
    model.requires_grad_(False).eval()
    model.zero_grad()
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()


def _lora(base: Base, recipe: TrainRecipe, rank: int) -> PeftModel:
    modules = [*FFN_MODULES, *(ATTENTION_MODULES if recipe.attention else ())]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, recipe.alpha),
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=modules,
        layers_to_transform=list(range(recipe.first_layer, base.layers)),
        layers_pattern="layers",
    )
    model = cast(PeftModel, get_peft_model(base.model, config))
    config.base_model_name_or_path = base.name  # not this machine's path of it
    return model


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


def _copy_adapter(model: PeftModel, factors: Mapping[str, Factors], path: Path) -> None:
    """Fills the new factors with those of an adapter of the same rank, scaling and layers."""
    config, theirs = model.peft_config["default"], read_adapter_config(path)
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(theirs, key) != getattr(config, key):
            raise ExpertError(
                f"{path} has {key} {getattr(theirs, key)}, the recipe says {getattr(config, key)}: "
                "an expert branches from an adapter of its own shape"
            )
    trained = _trained(model)
    wanted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in trained}
    if set(factors) != wanted:
        odd = sorted(wanted ^ set(factors))[0]
        raise ExpertError(f"{path} and the recipe do not train the same layers: they differ at {odd}")
    with torch.no_grad():
        for name, parameter in trained.items():
            layer, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
            tensor = factors[layer].a if half.startswith("A") else factors[layer].b
            parameter.copy_(tensor.T)


def _check_recipe(base: Base, recipe: TrainRecipe, can_evaluate: bool) -> None:
    if not 0 <= recipe.first_layer < base.layers:
        raise RecipeError(f"first_layer is {recipe.first_layer}; base {base.name!r} has layers 0 to {base.layers - 1}")
    for key in ("rank", "batch_size", "gradient_accumulation", "max_length", "valid_rows", "alpha", "learning_rate"):
        if getattr(recipe, key) <= 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be positive")
    for key in ("checkpoints", "evaluations", "early_stopping", "warmup_ratio"):
        if getattr(recipe, key) < 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must not be negative")
    if recipe.max_length < SHORTEST:
        raise RecipeError(
            f"max_length is {recipe.max_length}; a prompt and a definition need at least {SHORTEST} tokens"
        )
    if recipe.warmup_ratio > 1:
        raise RecipeError(f"warmup_ratio is {recipe.warmup_ratio}; it must be at most 1")
    if not 0 <= recipe.seed < 2**32:
        raise RecipeError(f"seed is {recipe.seed}; it must be at least 0 and below 2**32")
    optimizers = [name.value for name in OptimizerNames]
    if recipe.optimizer not in optimizers:
        near = difflib.get_close_matches(recipe.optimizer, optimizers, 1)
        hint = f"did you mean {near[0]!r}?" if near else "give one of transformers' names, such as adamw_torch_fused"
        raise RecipeError(f"optimizer is {recipe.optimizer!r}, which is not known: {hint}")
    wrong = [r for r in recipe.rank_of.values() if not isinstance(r, int) or r <= 0]
    if wrong:
        raise RecipeError(f"rank_of holds {wrong[0]!r}; a rank must be a positive integer")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"dropout is {recipe.dropout}; it must be at least 0 and below 1")
    if recipe.max_steps < 1 and recipe.epochs <= 0:
        raise RecipeError(f"epochs is {recipe.epochs}; it must be positive where max_steps is not given")
    if recipe.kind == "ffn" and recipe.quantize != "none":
        raise RecipeError(f"quantize is {recipe.quantize}; an ffn expert trains the weights themselves: use kind lora")
    if recipe.dtype == "float16" and base.model.device.type == "cpu":
        raise RecipeError("dtype is float16, which a CPU cannot train in: use float32 or bfloat16")
    if (recipe.evaluations or recipe.early_stopping) and not can_evaluate:
        raise RecipeError("evaluations need validation rows: use entries with a split named valid, or evaluations=0")
    if recipe.early_stopping and not recipe.evaluations:
        raise RecipeError("early_stopping counts evaluations, and evaluations is 0: set it too")


def _encode(encoder: PromptEncoder, row: Entry) -> TokenRow:
    ids, prompt_length = encoder.row(row.term, row.context, row.definition)
    return {"input_ids": ids, "prompt_length": prompt_length}


def _order(lengths: list[int], recipe: TrainRecipe, rows_a_step: int) -> list[int]:
    """Row indices of the whole run: epoch after epoch, as many as the recipe asks for."""
    wanted = recipe.max_steps * rows_a_step if recipe.max_steps > 0 else math.ceil(recipe.epochs * len(lengths))
    order: list[int] = []
    while len(order) < wanted:
        order += length_grouped(lengths, recipe.batch_size, recipe.seed + len(order))
    return order[:wanted]


def _arguments(recipe: TrainRecipe, state: Path, device: torch.device) -> TrainingArguments:
    # Without re-entry, recomputation asks for no gradient at the frozen embeddings.
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(state),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": recipe.minimum_learning_rate},
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        optim=recipe.optimizer,
        bf16=recipe.dtype == "bfloat16",
        fp16=recipe.dtype == "float16",
        save_strategy="steps" if recipe.checkpoints else "no",
        save_total_limit=1,
        seed=recipe.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        **(recompute if recipe.gradient_checkpointing else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the base lies on one device; several are torchrun's matter
    return arguments


def _key(base: Base, data: list[TokenRow], recipe: TrainRecipe, name: str, domain: str, origin: str) -> str:
    digest = hashlib.sha256()
    settings = [base.fingerprint, dataclasses.asdict(recipe), name, domain, origin]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for row in data:
        digest.update(json.dumps([row["prompt_length"], *row["input_ids"]]).encode())
    return digest.hexdigest()


@contextmanager
def _state_folder(out: Path, key: str) -> Iterator[Path]:
    """The folder of the run's state, emptied if another run left it; one that no run could go on from is removed."""
    state = out.with_name(f".{out.name}.training")
    marker = state / "key"
    if state.exists() and not (marker.is_file() and marker.read_text() == key):
        shutil.rmtree(state)
    try:
        state.mkdir(parents=True, exist_ok=True)
        marker.write_text(key)
        yield state
    except BaseException as error:
        # A run that diverged or never fitted would end the same way again.
        if isinstance(error, ExpertError | RecipeError) or _last_checkpoint(state) is None:
            shutil.rmtree(state, ignore_errors=True)
        raise


def _last_checkpoint(state: Path) -> str | None:
    """The latest complete checkpoint; one whose writing was cut off is removed. The Trainer writes its state last."""
    last = None
    for folder in sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            last = str(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return last


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save_trained(model: nn.Module, file: Path) -> None:
    partial = file.with_suffix(".partial")
    save_file({name: p.detach().cpu().contiguous() for name, p in _trained(model).items()}, partial)
    os.replace(partial, file)


def _load_trained(model: nn.Module, file: Path) -> None:
    parameters = _trained(model)
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        for name in tensors.keys():  # noqa: SIM118
            parameters[name].copy_(tensors.get_tensor(name))


def _check_finite(name: str, model: nn.Module) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in _trained(model).values()):
        raise ExpertError(f"training of expert {name!r} diverged: lower its learning_rate")
