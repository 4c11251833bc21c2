"""How both kinds of expert are trained. Knows nothing of domains, routers or metrics' formulas.

The steps are those of `loop`, which also says how a stopped run goes on. What the kinds differ in is one function,
`_trainable`: LoRA factors put on the base by PEFT, or the base's own FFNs; either way the base is left as it was.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate, pad_token_id
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
from lora_lexicon.experts.loop import (
    Progress,
    Run,
    TokenRow,
    check_finite,
    check_loop,
    collate_for_loss,
    encode,
    last_checkpoint,
    load_trained,
    save_trained,
    state_folder,
    trained,
    validation_loss,
)
from lora_lexicon.experts.lora import Factors, check_fit
from lora_lexicon.folders import new_folder, sha256_of, write_record
from lora_lexicon.recipe import ATTENTION_MODULES, FFN_MODULES, TrainRecipe

Score = Callable[[list[str], list[str]], float]  # (predictions, references) -> a mean score, larger is better
Report = Callable[[int, int], None]  # (rows done, rows in all)
DECODED_TOKENS = 48


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
    progress: Report | None = None,
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
    data = [encode(encoder, row) for row in rows]
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
        state_folder(out, key) as state,
        _trainable(base, recipe, rank, start_from) as (model, save),
    ):
        watch = _Watch(base, encoder, recipe, valid or (), score, state, progress)
        pad = pad_token_id(base.tokenizer)
        run = Run(model, data, recipe, state, watch, lambda rows: collate_for_loss(rows, pad))
        run.train(resume_from_checkpoint=last_checkpoint(state))
        watch.keep_best(model)
        check_finite(name, model)
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
            trained_parameters=sum(p.numel() for p in trained(model).values()),
            recipe=dataclasses.asdict(recipe),
            started_from=origin,
            training={
                "steps": steps,
                "seconds": round(time.monotonic() - started, 1),
                "losses": run.losses,
                "evaluations": watch.history,
            },
            versions={p: version(p) for p in ("torch", "transformers", "peft")},
            key=key,
        )
        write_expert(folder, info)
    shutil.rmtree(state)
    return info


class _Watch(Progress):
    """Reports progress, measures validation loss and score, remembers the best weights, stops early."""

    def __init__(
        self,
        base: Base,
        encoder: PromptEncoder,
        recipe: TrainRecipe,
        valid: Sequence[Entry],
        score: Score | None,
        state: Path,
        progress: Report | None,
    ) -> None:
        super().__init__(progress)
        self.base, self.encoder, self.recipe, self.score = base, encoder, recipe, score
        self.valid = list(valid)[: recipe.valid_rows]
        self.best, self.record = state / "best.safetensors", state / "evaluations.json"
        self.history: list[dict[str, float]] = []

    def plan(self, steps: int, rows_a_step: int, rows: int) -> None:
        """Spreads the evaluations over the run."""
        super().plan(steps, rows_a_step, rows)
        count = self.recipe.evaluations if self.valid and self.score else 0
        self.at = {math.ceil(steps * (i + 1) / count) for i in range(count)}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.record.is_file():  # later evaluations than the checkpoint's are made again, with the same result
            self.history = [e for e in json.loads(self.record.read_text())["history"] if e["step"] <= state.global_step]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self._evaluate(kwargs["model"], state.global_step)
            control.should_training_stop |= 0 < self.recipe.early_stopping <= self._since_best()
        super().on_step_end(args, state, control, **kwargs)

    def keep_best(self, model: nn.Module) -> None:
        """With early stopping, goes back to the weights of the best score."""
        if self.recipe.early_stopping and self.history:
            load_trained(model, self.best)

    def _evaluate(self, model: nn.Module, step: int) -> None:
        assert self.score is not None
        model.eval()
        predictions = greedy(self.base.model, self.encoder, [(row.term, row.context) for row in self.valid])
        found = self.score(predictions, [row.definition for row in self.valid])
        loss = validation_loss(self.base.model, self.encoder, self.valid, self.recipe.batch_size)
        self.history.append({"step": step, "loss": loss, "score": found})
        if self._since_best() == 0:
            save_trained(model, self.best)
        write_record(self.record, {"history": self.history})

    def _since_best(self) -> int:
        scores = [e["score"] for e in self.history]
        return len(scores) - 1 - scores.index(max(scores))


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
    parameters = trained(model)
    wanted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in parameters}
    if set(factors) != wanted:
        odd = sorted(wanted ^ set(factors))[0]
        raise ExpertError(f"{path} and the recipe do not train the same layers: they differ at {odd}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            layer, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
            tensor = factors[layer].a if half.startswith("A") else factors[layer].b
            parameter.copy_(tensor.T)


def _check_recipe(base: Base, recipe: TrainRecipe, can_evaluate: bool) -> None:
    if not 0 <= recipe.first_layer < base.layers:
        raise RecipeError(f"first_layer is {recipe.first_layer}; base {base.name!r} has layers 0 to {base.layers - 1}")
    for key in ("rank", "alpha"):
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
    if recipe.kind == "ffn" and recipe.quantize != "none":
        raise RecipeError(f"quantize is {recipe.quantize}; an ffn expert trains the weights themselves: use kind lora")
    if (recipe.evaluations or recipe.early_stopping) and not can_evaluate:
        raise RecipeError("evaluations need validation rows: use entries with a split named valid, or evaluations=0")
    if recipe.early_stopping and not recipe.evaluations:
        raise RecipeError("early_stopping counts evaluations, and evaluations is 0: set it too")
    check_loop(recipe, base.model.device)


def _key(base: Base, data: list[TokenRow], recipe: TrainRecipe, name: str, domain: str, origin: str) -> str:
    digest = hashlib.sha256()
    settings = [base.fingerprint, dataclasses.asdict(recipe), name, domain, origin]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for row in data:
        digest.update(json.dumps([row["prompt_length"], *row["input_ids"]]).encode())
    return digest.hexdigest()
