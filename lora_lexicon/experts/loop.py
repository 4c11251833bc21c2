"""One loop for whatever is trained on definitions. Knows rows, batches and checkpoints; not what the model is made of.

transformers' Trainer drives the steps; where a run goes on after a kill is `state`'s matter.
"""

import difflib
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import IGNORED, PromptEncoder, collate, pad_token_id
from lora_lexicon.errors import DivergedError, ExpertError, RecipeError
from lora_lexicon.experts import processes
from lora_lexicon.experts.state import seal
from lora_lexicon.recipe import LoopRecipe
from lora_lexicon.resources import accelerate_config

TENSORS = "trainable.safetensors"
SHORTEST = 8  # tokens of a row
MEGABATCH = 50  # batches among which rows are sorted by length, as in transformers' own grouping


class TokenRow(TypedDict):
    """One encoded entry; `cut` where it was longer than the recipe's limit."""

    input_ids: list[int]
    prompt_length: int
    cut: bool


def check_loop(recipe: LoopRecipe, device: torch.device) -> None:
    """Refuses settings that no run can have.

    Raises:
        RecipeError: naming the key, its value and what it must be.
    """
    for key in ("batch_size", "gradient_accumulation", "max_length", "valid_rows", "learning_rate"):
        if getattr(recipe, key) <= 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be positive")
    for key in ("checkpoints", "warmup_ratio", "weight_decay", "minimum_learning_rate"):
        if getattr(recipe, key) < 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must not be negative")
    if recipe.max_length < SHORTEST:
        raise RecipeError(
            f"max_length is {recipe.max_length}; a prompt and a definition need at least {SHORTEST} tokens"
        )
    if recipe.minimum_learning_rate > recipe.learning_rate:
        raise RecipeError(
            f"minimum_learning_rate is {recipe.minimum_learning_rate}; "
            f"it must be at most learning_rate, {recipe.learning_rate}"
        )
    if not 0 <= recipe.adam_beta2 < 1:
        raise RecipeError(f"adam_beta2 is {recipe.adam_beta2}; it must be at least 0 and below 1")
    if recipe.warmup_ratio > 1:
        raise RecipeError(f"warmup_ratio is {recipe.warmup_ratio}; it must be at most 1")
    if not 0 <= recipe.seed < 2**32:
        raise RecipeError(f"seed is {recipe.seed}; it must be at least 0 and below 2**32")
    optimizers = [name.value for name in OptimizerNames]
    if recipe.optimizer not in optimizers:
        near = difflib.get_close_matches(recipe.optimizer, optimizers, 1)
        hint = f"did you mean {near[0]!r}?" if near else "give one of transformers' names, such as adamw_torch_fused"
        raise RecipeError(f"optimizer is {recipe.optimizer!r}, which is not known: {hint}")
    if recipe.max_steps == 0 or recipe.max_steps < -1:
        raise RecipeError(f"max_steps is {recipe.max_steps}; it must be positive, or -1 for as many as `epochs` takes")
    if recipe.max_steps < 1 and recipe.epochs <= 0:
        raise RecipeError(f"epochs is {recipe.epochs}; it must be positive where max_steps is not given")
    if recipe.dtype == "float16" and device.type == "cpu":
        raise RecipeError("dtype is float16, which a CPU cannot train in: use float32 or bfloat16")


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


class Progress(TrainerCallback):
    """Reports how many rows are done."""

    def __init__(self, report: Callable[[int, int], None] | None) -> None:
        self.report = report

    def plan(self, rows_a_step: int, rows: int) -> None:
        """Is told the run's length before it starts."""
        self.rows_a_step, self.rows = rows_a_step, rows

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report:
            self.report(min(state.global_step * self.rows_a_step, self.rows), self.rows)


class Loop(Trainer):
    """transformers' Trainer with checkpoints that hold what is trained and no more."""

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate's FSDP or DeepSpeed, on CPUs too, which it leaves out; gradients are added in float32."""
        super().create_accelerator_and_postprocess()
        if processes.zero():
            self._create_zero()
            return
        if not processes.several():
            return
        state, plugin = self.accelerator.state, FullyShardedDataParallelPlugin()
        if self.args.bf16:  # inputs stay as they are: the loss's shares are float32
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                torch.bfloat16, torch.float32, cast_forward_inputs=False
            )
        type(state)._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        self.is_fsdp_enabled = True

    def _create_zero(self) -> None:
        """accelerate's DeepSpeed, of whose configuration the sharding is kept; `JointRun` clips and has it step."""
        from transformers.integrations.deepspeed import propagate_args_to_deepspeed, unset_hf_deepspeed_config

        state, plugin = self.accelerator.state, cast(Any, self.args).deepspeed_plugin
        type(state)._shared_state.update(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugins=plugin)
        plugin.select(_from_accelerator_state=True)
        propagate_args_to_deepspeed(self.accelerator, self.args)
        found, config = plugin.hf_ds_config, plugin.deepspeed_config
        if not found.is_zero3() or found.is_offload() or config.keys() & {"optimizer", "scheduler"}:
            raise ExpertError(
                "a DeepSpeed configuration must be ZeRO stage 3, without offloading, and leave optimizer and scheduler "
                f"to the recipe: start from {accelerate_config('zero3')}"
            )
        config.pop("gradient_clipping", None)  # it would be one norm for all that is trained
        config |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        self.is_deepspeed_enabled = True
        unset_hf_deepspeed_config()  # the next run, too, begins with whole parameters

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's; it would have DeepSpeed's checkpoint hold all weights."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(resume_from_checkpoint)
        cast(Any, self.model_wrapped).load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained; all processes take part."""
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not processes.several():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if processes.zero():  # the Trainer would write the whole model beside it, here and there
            cast(Any, self.model_wrapped).save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's.

        Raises:
            RecipeError: it needs a package that is not installed, or settings that a recipe has not.
        """
        if self.optimizer is None:
            try:
                self.optimizer = self._new_optimizer(model)
            except (ImportError, ValueError) as error:
                name, why = OptimizerNames(self.args.optim).value, str(error).strip().splitlines()[0]
                raise RecipeError(f"optimizer is {name}, which cannot be had: {why}") from error
        return self.optimizer

    def _new_optimizer(self, model: Any) -> torch.optim.Optimizer:
        return super().create_optimizer(model)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        processes.wait()  # what comes next says that the checkpoint is complete
        if self.args.should_save:
            seal(Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(cast(str, output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_parameters(trained(cast(nn.Module, self.model)), folder / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parameters(trained(cast(nn.Module, self.model)), Path(resume_from_checkpoint) / TENSORS)


class Run(Loop):
    """The loop over padded batches of rows in our order."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[TokenRow],
        recipe: LoopRecipe,
        state: Path,
        watch: Progress,
        collate: Callable[[list[TokenRow]], dict[str, Tensor]],
    ) -> None:
        if processes.several():
            raise ExpertError("only experts are trained by several processes: start this in one")
        self.rows_a_step = recipe.batch_size * recipe.gradient_accumulation
        self.order = order_of([len(row["input_ids"]) for row in data], recipe, self.rows_a_step)
        steps = math.ceil(len(self.order) / self.rows_a_step)
        arguments = arguments_of(recipe, state, next(model.parameters()).device, steps)
        watch.plan(self.rows_a_step, len(self.order))
        super().__init__(
            model=cast(PreTrainedModel, model),
            args=arguments,
            train_dataset=cast(Any, data),
            data_collator=collate,
            compute_loss_func=definition_loss,
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)

    @property
    def losses(self) -> list[list[float]]:
        """[step, mean training loss since the one before], as often as it was logged."""
        return [[e["step"], e["loss"]] for e in self.state.log_history if "loss" in e]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """All epochs as one sequence that the seed alone decides: a resumed run only has to skip."""
        return self.order


@torch.no_grad()
def validation_loss(model: PreTrainedModel, encoder: PromptEncoder, rows: Sequence[Entry], batch_size: int) -> float:
    """The mean negative log-likelihood of the definitions' tokens."""
    data = sorted((encode(encoder, row) for row in rows), key=lambda row: len(row["input_ids"]))
    total, count, pad = 0.0, 0, pad_token_id(encoder.tokenizer)
    for start in range(0, len(data), batch_size):
        batch = {k: v.to(model.device) for k, v in collate_for_loss(data[start : start + batch_size], pad).items()}
        labels = batch.pop("labels")
        total += float(definition_loss(model(**batch), labels, 1))
        count += int((labels != IGNORED).sum())
    return total / count


def encode(encoder: PromptEncoder, row: Entry) -> TokenRow:
    """The entry's prompt and definition as token ids."""
    ids, prompt_length, cut = encoder.row(row.term, row.context, row.definition)
    return {"input_ids": ids, "prompt_length": prompt_length, "cut": cut}


def order_of(lengths: list[int], recipe: LoopRecipe, rows_a_step: int) -> list[int]:
    """Row indices of the whole run: epoch after epoch, as many as the recipe asks for."""
    wanted = recipe.max_steps * rows_a_step if recipe.max_steps > 0 else math.ceil(recipe.epochs * len(lengths))
    order: list[int] = []
    while len(order) < wanted:
        order += length_grouped(lengths, recipe.batch_size, recipe.seed + len(order))
    return order[:wanted]


def arguments_of(recipe: LoopRecipe, state: Path, device: torch.device, steps: int) -> TrainingArguments:
    """The Trainer's arguments for a run of so many steps."""
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
        max_steps=steps,
        warmup_steps=math.ceil(steps * recipe.warmup_ratio),
        save_steps=math.ceil(steps / (recipe.checkpoints + 1)),
        logging_steps=max(1, steps // 20),
        seed=recipe.seed,
        report_to="none",
        project="lora-lexicon",
        run_name=state.name.removeprefix(".").removesuffix(".training"),
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        **(recompute if recipe.gradient_checkpointing else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the base lies on one device; several are torchrun's matter
    return arguments


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_parameters(parameters: Mapping[str, nn.Parameter], file: Path) -> None:
    """Writes parameters, in one rename; all processes take part, the main one writes."""
    tensors, partial = processes.gathered(parameters), file.with_suffix(".partial")
    if processes.rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, file)
    processes.wait()


def load_parameters(parameters: Mapping[str, nn.Parameter], file: Path) -> None:
    """Gives parameters the values that `save_parameters` wrote."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            processes.put(parameters[name], tensors.get_tensor(name))


def check_finite(name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses, after training, parameters that are infinite or not numbers."""
    if not all(bool(torch.isfinite(processes.whole(p)).all()) for p in parameters.values()):
        raise DivergedError(f"training of {name!r} diverged: lower its learning_rate")
