"""How an outcome reward model is trained: by equation 3 of the LM-Lexicon paper, on `pairs`.

What was sampled lies in the run's state, so that a run which was killed goes on sampling, or training, where it was.
Knows nothing of how a reward is used.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import set_seed

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import Entry, spread
from lora_lexicon.data.prompt import PromptEncoder, pad_token_id
from lora_lexicon.data.store import load_entries
from lora_lexicon.errors import DivergedError, ExpertError, RecipeError
from lora_lexicon.experts.base import Base, base_folder, contents_hash, load_base
from lora_lexicon.experts.cost import check_rank
from lora_lexicon.experts.kinds import trainable
from lora_lexicon.experts.loop import Progress, Run, TokenRow, check_finite, check_loop
from lora_lexicon.experts.lora import Owners
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.experts.state import last_checkpoint, state_folder
from lora_lexicon.experts.tensors import Checkpoint
from lora_lexicon.folders import new_folder, sha256_of, write_record
from lora_lexicon.inference.pairs import Preference, pairs_of, sample_pairs
from lora_lexicon.inference.reward import (
    REWARD,
    Reward,
    Scorer,
    load_reward,
    preference_loss,
    read_reward,
    save_head,
    side_by_side,
)
from lora_lexicon.recipe import RewardRecipe, TrainRecipe
from lora_lexicon.resources import find_system

SAMPLED = "sampled.jsonl"  # in the state: a line a prompt
Told = Callable[[str, int, int], object]  # (sampling or training, rows done, rows in all)


class PreferenceRow(TokenRow):
    """The gold definition's row, encoded, and those of the sampled ones."""

    sampled: list[list[int]]


def train_reward(
    model: str,
    data: Path,
    out: Path,
    recipe: RewardRecipe,
    *,
    base: str | None = None,
    limit: int | None = None,
    progress: Told | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains a reward model on what a model samples for train entries, and writes it; returns the record.

    One that is already there from the same call is kept; a run that was stopped goes on.

    Args:
        model: samples (see `load_system`). The reward model lies on its base.
        data: an entries folder; pairs of its valid entries, if it has such, are what the record's figures are of.
        limit: train on this many entries at most, spread over the split.

    Raises:
        LexiconError: a recipe that does not fit, no such model, no entries, or training diverged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_loop(recipe, device)
    _check(recipe)
    entries = load_entries(data)
    train = spread(entries.split("train"), limit)
    valid = spread(entries.split("valid"), recipe.valid_rows) if "valid" in entries.splits else []
    if not train:
        raise ExpertError(f"{data} has no train entries: prepare more data")
    system = load_system(model, base=base, dtype=recipe.dtype)
    if not system.base_fingerprint:
        raise ExpertError(f"{model} does not say what base it was made of: sample from a pack, an expert or a base")
    settings = [_contents(model), system.base_fingerprint, entries.fingerprint, limit, asdict(recipe)]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if (out / REWARD).is_file() and read_reward(out).get("key") == key:
        return read_reward(out)
    shape = shape_of(system.model.config.to_dict(), system.base)
    check_rank(shape, recipe.rank, "all" if recipe.attention else "ffn")
    if not 0 <= recipe.first_layer < shape.layers:
        raise RecipeError(f"first_layer is {recipe.first_layer}; the base has layers 0 to {shape.layers - 1}")
    with (
        new_folder(out, replace=overwrite) as folder,
        state_folder(out, key, recipe, overwrite, kept=SAMPLED) as state,
    ):
        told = (lambda done, total: progress("sampling", done, total)) if progress else None
        pairs = sample_pairs(system, [*train, *valid], recipe, state / SAMPLED, told)
        against, held = ([p for p in part if p.sampled] for part in (pairs[: len(train)], pairs[len(train) :]))
        if not against:
            raise ExpertError(f"{model} sampled nothing but the gold definitions: there is nothing to learn from")
        name, template = system.base, system.encoder.template
        del system  # what it holds beside the base is not needed any more
        loaded = load_base(name, dtype=recipe.dtype)
        encoder = PromptEncoder(loaded.tokenizer, template, recipe.max_length)
        report = (lambda done, total: progress("training", done, total)) if progress else None
        losses = _train(loaded, [_row(encoder, pair) for pair in against], recipe, state, folder, report)
        record = {
            "base": loaded.name,
            "base_fingerprint": loaded.fingerprint,
            "template": asdict(template),
            "max_length": recipe.max_length,
            "sampled_by": model,
            "entries_fingerprint": entries.fingerprint,
            "recipe": asdict(recipe),
            "seed": recipe.seed,
            "train": _counts(train, against),
            "valid": _counts(valid, held),
            "losses": losses,
            "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
            "key": key,
        }
        write_record(folder / REWARD, record)
        if held:
            record["valid"] |= measured(load_reward(folder, base=loaded.name, dtype=recipe.dtype), held)
            if not math.isfinite(record["valid"]["loss"]):
                raise DivergedError("training of the reward model diverged: lower its learning_rate")
        write_record(folder / REWARD, record)
    shutil.rmtree(state)
    return record


def measured(reward: Reward, held: Sequence[Preference]) -> dict[str, float]:
    """On held-out pairs: the part in which the gold definition's reward is the higher, and the loss of equation 3."""
    found = [(one.entry.term, one.entry.context, text) for one in held for text in (one.entry.definition, *one.sampled)]
    rewards = torch.tensor(reward.rate(found), dtype=torch.float64)
    gold, sampled = pairs_of([len(one.sampled) for one in held])
    loss = float(preference_loss(rewards, gold, sampled))
    return {"accuracy": float((rewards[gold] > rewards[sampled]).double().mean()), "loss": loss}


class _Run(Run):
    """The shared loop over prompts, each with all its pairs: what is read once serves them all."""

    def __init__(self, scorer: Scorer, rows: Sequence[PreferenceRow], recipe: RewardRecipe, state: Path,
                 watch: Progress, pad: int) -> None:  # fmt: skip
        self.recipe = recipe
        settings = replace(recipe, gradient_checkpointing=False)  # the Trainer would ask the scorer to recompute
        super().__init__(scorer, rows, settings, state, watch, lambda some: collate_pairs(cast(Any, some), pad))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Equation 3 over the batch's pairs."""
        rewards = model(inputs["input_ids"], inputs["last"])
        return preference_loss(rewards, inputs["gold"], inputs["sampled"]) / self.recipe.gradient_accumulation


def collate_pairs(rows: Sequence[PreferenceRow], pad: int) -> dict[str, Tensor]:
    """`input_ids` (B, T) and `last` (B,) of all definitions, `gold` and `sampled` (P,) the rows of each pair."""
    ids, last = side_by_side([one for row in rows for one in (row["input_ids"], *row["sampled"])], pad)
    gold, sampled = pairs_of([len(row["sampled"]) for row in rows])
    return {"input_ids": ids, "last": last, "gold": gold, "sampled": sampled}


def _train(
    base: Base,
    rows: Sequence[PreferenceRow],
    recipe: RewardRecipe,
    state: Path,
    folder: Path,
    report: Callable[[int, int], Any] | None,
) -> list[list[float]]:
    """Trains adapter and head and writes both; returns [step, loss]."""
    keys = ("first_layer", "rank", "alpha", "dropout", "attention", "seed")
    adapter = TrainRecipe(kind="lora", **{key: getattr(recipe, key) for key in keys})
    owners = Owners()
    set_seed(recipe.seed)
    with trainable(base, adapter, [""], None, owners) as [(parameters, save)], owners.of(0):
        scorer = Scorer(base.model, torch.zeros(int(base.model.config.hidden_size), device=base.model.device))
        if recipe.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        run = _Run(scorer, rows, recipe, state, Progress(report), pad_token_id(base.tokenizer))
        run.train(resume_from_checkpoint=last_checkpoint(state))
        check_finite("reward", {**parameters, "head": scorer.head})
        if not all(math.isfinite(loss) for _, loss in run.losses):
            raise DivergedError("training of the reward model diverged: lower its learning_rate")
        save({name: parameter.detach() for name, parameter in parameters.items()}, folder)
        save_head(scorer.head, folder)
        return run.losses


def _check(recipe: RewardRecipe) -> None:
    for key in ("samples", "keep"):
        if getattr(recipe, key) < 1:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be 1 or more")
    if recipe.keep > recipe.samples:
        raise RecipeError(f"keep is {recipe.keep}; it must be at most samples, {recipe.samples}")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"dropout is {recipe.dropout}; it must be at least 0 and below 1")
    if recipe.alpha <= 0:
        raise RecipeError(f"alpha is {recipe.alpha}; it must be positive")


def _row(encoder: PromptEncoder, pair: Preference) -> PreferenceRow:
    entry = pair.entry
    gold = encoder.row(entry.term, entry.context, entry.definition)
    sampled = [encoder.row(entry.term, entry.context, text).ids for text in pair.sampled]
    return {"input_ids": gold.ids, "prompt_length": gold.prompt_length, "cut": gold.cut, "sampled": sampled}


def _counts(entries: Sequence[Entry], pairs: Sequence[Preference]) -> dict[str, Any]:
    return {"entries": len(entries), "prompts": len(pairs), "pairs": sum(len(pair.sampled) for pair in pairs)}


def _contents(model: str) -> str:
    """What identifies a model's folder: its records, and its tensors by the rules of `base.fingerprint`."""
    folder = find_system(model) or base_folder(model)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    found = [
        [path.relative_to(folder).as_posix(),
         sha256_of(path) if path.suffix == ".json" else contents_hash(Checkpoint(path))] for path in files
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
