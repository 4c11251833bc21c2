"""Several experts trained in one pass over their base. Knows rows and parameters, not how either came about.

A step takes one batch of each expert's own rows, packed one after the other; the base reads them once. What decides an
expert's course is its own: the order of its rows, the mean of its loss, the clipping of its gradient, its learning
rate, its end. So each ends as it would have ended alone, and one that has ended costs nothing more.

Several processes share a step's rows of each expert, and shard base and experts by FSDP as accelerate's configuration
says; what they make is what one makes.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from lora_lexicon.errors import DivergedError
from lora_lexicon.experts import processes
from lora_lexicon.experts.cost import HEAD_ROWS
from lora_lexicon.experts.loop import Loop, TokenRow, arguments_of, order_of
from lora_lexicon.experts.lora import Owners
from lora_lexicon.experts.packing import Packing, packed, positions
from lora_lexicon.recipe import LoopRecipe, TrainRecipe

REPORTS = 1000  # times at most that a run, and each expert in it, says where it is
PROGRESS = "progress.json"  # in a checkpoint: losses and seconds so far
PackedRow = tuple[int, float, TokenRow]  # expert, share of each token's loss, row
Span = tuple[int, int, int]  # expert, its tokens in a run of packed ones, at how many of them it predicts


@dataclass
class Trainee:
    """One expert in training.

    Attributes:
        order: row numbers in the order in which they are read, all epochs.
        parameters: what is trained, by its name in the model; no other expert's.
        losses: of every step so far, nats a definition token.
        end: the step it stopped at before its last; None: it has not.
    """

    name: str
    rows: Sequence[TokenRow]
    order: Sequence[int]
    rows_a_step: int
    parameters: dict[str, nn.Parameter]
    losses: list[float] = field(default_factory=list)
    end: int | None = None

    def __post_init__(self) -> None:
        self._read = [0, *accumulate(len(self.rows[i]["input_ids"]) for i in self.order)]

    @property
    def last(self) -> int:
        """How many steps it has in all."""
        return math.ceil(len(self.order) / self.rows_a_step)

    @property
    def steps(self) -> int:
        """How many steps it takes; fewer than `last` where it stopped early."""
        return self.last if self.end is None else self.end

    @property
    def tokens(self) -> int:
        """Tokens read in these steps."""
        return self.read(self.steps)

    def read(self, step: int) -> int:
        """Tokens read in the steps up to this one."""
        return self._read[min(step * self.rows_a_step, len(self.order))]

    def batch(self, step: int) -> list[TokenRow]:
        """The rows of one step, counted from 0."""
        return [self.rows[i] for i in self.order[step * self.rows_a_step : (step + 1) * self.rows_a_step]]

    def curve(self, points: int = 20) -> list[list[float]]:
        """[step, mean loss of the steps since the one before]."""
        every = max(1, self.steps // points)
        ends = range(every, len(self.losses) + 1, every)
        return [[end, _mean(self.losses[end - every : end])] for end in ends]


class PackedModel(nn.Module):
    """A Llama that takes packed rows of several experts and returns the loss of each (inside `passing`)."""

    def __init__(self, llama: PreTrainedModel, owners: Owners) -> None:
        super().__init__()
        self.llama, self.owners = llama, owners
        self._no_split_modules = llama._no_split_modules  # this and the next four are what accelerate shards by
        self.base_model_prefix = "decoder"
        self.get_input_embeddings, self.get_output_embeddings = llama.get_input_embeddings, llama.get_output_embeddings
        self.tie_weights = llama.tie_weights

    @property
    def decoder(self) -> nn.Module:
        return self.llama.model

    @contextmanager
    def passing(self, spans: Sequence[Span]) -> Iterator[None]:
        """For a forward pass over packed rows and its backward pass, which may be a second forward one.

        Nothing reads what the last layer's FFN makes of tokens at which no definition is predicted: it sees no others.
        """
        last = cast(Any, self.decoder).layers[-1]

        def forward(hidden_states: Tensor, predicting: Tensor, **kwargs: Any) -> Tensor:
            attended, _ = last.self_attn(hidden_states=last.input_layernorm(hidden_states), **kwargs)
            states = (hidden_states + attended).index_select(1, predicting)
            with self.owners.of([(n, predicted) for n, _, predicted in spans]):
                return states + last.mlp(last.post_attention_layernorm(states))

        last.forward = forward
        try:
            with packed(self.llama), self.owners.of([(n, tokens) for n, tokens, _ in spans]):
                yield
        finally:
            del last.forward

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        gather: Tensor,
        scatter: Tensor,
        predicting: Tensor,
        labels: Tensor,
        shares: Tensor,
        owner: Tensor,
        experts: int,
    ) -> Tensor:
        """(N,) the losses of N experts, each the sum over its definition tokens times their shares.

        Args:
            input_ids, position_ids: (1, T) packed rows; `gather` and `scatter` are their `Packing`.
            predicting: (K,) the packed places at which definition tokens are predicted; the last FFN and the head are
                computed there and nowhere else. `labels`, `shares` and `owner` are theirs, (K,) too.
        """
        output = self.decoder(
            input_ids,
            position_ids=position_ids,
            packing=Packing(gather, scatter),
            predicting=predicting,
            use_cache=False,
        )
        states = output.last_hidden_state.squeeze(0)
        losses = cast(Tensor, HeadLoss.apply(states, self.llama.lm_head.weight, labels)) * shares
        return losses.new_zeros(experts).index_add(0, owner, losses)


class HeadLoss(Function):
    """Negative log-likelihoods (K,) float32 of labels (K,), from last states (K, H) and a frozen head (V, H).

    Gradients are made with the losses, `HEAD_ROWS` rows at a time, after Liger's fused head (Hsu et al., 2024,
    arXiv:2410.10989): never are there logits of all. None is made for the head.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        device, dtype = states.device.type, states.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        head, losses, gradients = head.to(dtype), [], []
        for own, wanted in zip(states.split(HEAD_ROWS), labels[:, None].split(HEAD_ROWS), strict=True):
            logits = (own.to(dtype) @ head.T).float()
            total = logits.logsumexp(1, keepdim=True)
            losses.append(total - logits.gather(1, wanted))
            logits.sub_(total).exp_().scatter_add_(1, wanted, -torch.ones_like(total))
            gradients.append((logits.to(dtype) @ head).to(states.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return own * gradients[0][:, None].to(own.dtype), None, None


class JointRun(Loop):
    """transformers' Trainer over steps that hold a batch of each expert."""

    def __init__(
        self,
        model: PackedModel,
        trainees: Sequence[Trainee],
        recipe: TrainRecipe,
        state: Path,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.trainees, self.recipe, self.packed = trainees, recipe, model
        self._seconds_before, self._started = 0.0, time.monotonic()
        steps = max(trainee.last for trainee in trainees)
        # The Trainer counts in steps, and would ask our module to recompute.
        settings = replace(recipe, batch_size=1, gradient_accumulation=1, gradient_checkpointing=False)
        device = processes.join() if processes.several() else model.llama.device
        arguments = arguments_of(settings, state, device, steps)
        arguments.logging_steps = math.ceil(steps / REPORTS)
        if recipe.gradient_checkpointing:
            model.llama.gradient_checkpointing_enable({"use_reentrant": False})
        super().__init__(
            model=cast(PreTrainedModel, model),
            args=arguments,
            train_dataset=cast(Any, range(steps)),
            data_collator=lambda numbers: {"step": torch.tensor(numbers)},
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        if processes.zero():
            processes.shard(model, torch.bfloat16 if arguments.bf16 else None)
        if processes.several():
            set_seed(recipe.seed + processes.rank())  # each has dropout of its own

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, its parts before it was resumed included."""
        return self._seconds_before + time.monotonic() - self._started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each expert's own loss to what the Trainer reports."""
        if "loss" in logs:
            running = [trainee for trainee in self.trainees if len(trainee.losses) >= self.state.global_step]
            logs |= {f"loss/{t.name}": _mean(t.losses[-int(self.args.logging_steps) :]) for t in running}
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps' numbers, all of them in every process."""
        return DataLoader(cast(Any, self.train_dataset), batch_size=1, collate_fn=self.data_collator)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one step, each expert's of the mean over the definition tokens of its own rows."""
        model.train()
        step = int(inputs["step"])
        losses = torch.zeros(len(self.trainees), device=self.args.device)
        for batch, spans in self._passes(step):
            with self.packed.passing(spans):
                found = model(**self._prepare_inputs(batch), experts=len(self.trainees))
                self._backward(found.sum() * processes.count())  # which gradients are averaged over
            losses += found.detach()
        losses = processes.total(losses)
        active = [n for n, trainee in enumerate(self.trainees) if step < trainee.steps]
        for n, loss in zip(active, losses[active].tolist(), strict=True):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"training of {self.trainees[n].name!r} diverged: its loss is {loss} at step {step + 1}: "
                    "lower its learning_rate"
                )
            self.trainees[n].losses.append(loss)
        return losses.sum() / max(1, len(active))

    def _backward(self, loss: Tensor) -> None:
        if not processes.zero():
            self.accelerator.backward(loss)
            return
        engine = cast(Any, self.model_wrapped)
        engine.set_gradient_accumulation_boundary(False)  # it would step: `_clip_grad_norm` has it do so
        engine.backward(loss)

    def _passes(self, step: int) -> Iterator[tuple[dict[str, Any], list[Span]]]:
        """This process's rows of the step, packed, as many at once as the recipe's `pass_tokens` hold.

        Shards are exchanged as long as all processes pass through the same layers and parameters: each makes as many
        passes as the one that makes most, with a row that counts for nothing where it has none left, and through the
        factors of every expert that is not done.
        """
        world = processes.count()
        active = [(n, trainee.batch(step)) for n, trainee in enumerate(self.trainees) if step < trainee.steps]
        shares: list[list[PackedRow]] = [[] for _ in range(world)]
        for n, batch in active:
            share = 1 / max(1, sum(len(row["input_ids"]) - row["prompt_length"] for row in batch))
            for i, row in enumerate(batch):
                shares[i % world].append((n, share, row))
        passes = [self._parts(rows) for rows in shares]
        idle = [(n, 0.0, batch[0]) for n, batch in active[:1]]
        for rows in islice(chain(passes[processes.rank()], repeat(idle)), max(map(len, passes))):
            batch, spans = pack(rows)
            if world > 1:
                spans += [(n, 0, 0) for n, _ in active if n not in {n for n, *_ in spans}]
            yield batch, spans

    def _parts(self, rows: Sequence[PackedRow]) -> list[list[PackedRow]]:
        parts: list[list[PackedRow]] = []
        count = 0
        for row in rows:
            size = len(row[2]["input_ids"])
            if not parts or count + size > self.recipe.pass_tokens:
                parts.append([])
                count = 0
            parts[-1].append(row)
            count += size
        return parts

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips each expert's gradient by its own norm; returns the largest."""
        if processes.zero():
            return self._clip_and_step(cast(Any, model))
        self.accelerator.unscale_gradients()
        norms = [
            nn.utils.clip_grad_norm_(list(trainee.parameters.values()), self.args.max_grad_norm)
            for trainee in self.trainees
        ]
        return torch.stack([processes.whole(cast(Tensor, norm)).to(self.args.device) for norm in norms]).max()

    def _clip_and_step(self, engine: Any) -> Tensor:
        """The same with ZeRO's shards of the gradients; and its step, which its engine takes."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        norms = []
        for trainee, group in zip(self.trainees, engine.optimizer.param_groups, strict=True):
            if self.state.global_step >= trainee.steps:  # what it holds is its last step's
                group["lr"] = 0.0
                continue
            gradients = [safe_get_local_grad(parameter) for parameter in trainee.parameters.values()]
            norm = processes.total(torch.stack([gradient.square().sum() for gradient in gradients]).sum()).sqrt()
            factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
            for parameter, gradient in zip(trainee.parameters.values(), gradients, strict=True):
                safe_set_local_grad(parameter, gradient * factor)
            norms.append(norm)
        if not norms:  # all had ended when the run was resumed
            return torch.zeros(())
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        return torch.stack(norms).max()

    def _new_optimizer(self, model: Any) -> torch.optim.Optimizer:
        """With a group of parameters for each expert."""
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
        decay = {"weight_decay": self.args.weight_decay}
        return kind([{"params": list(trainee.parameters.values()), **decay} for trainee in self.trainees], **settings)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Each expert's own schedule, over its own steps."""
        if self.lr_scheduler is None:
            floor = self.recipe.minimum_learning_rate / self.recipe.learning_rate
            shapes = [
                partial(cosine, warmup=math.ceil(t.last * self.recipe.warmup_ratio), steps=t.last, floor=floor)
                for t in self.trainees
            ]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, cast(Any, shapes))
            self._created_lr_scheduler = True
        now = dict(self.packed.llama.named_parameters())  # to shard a model is to give it new parameters
        for trainee in self.trainees:
            trainee.parameters = {name: now[name] for name in trainee.parameters}
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if processes.rank() > 0:
            return
        so_far = {
            "losses": [trainee.losses for trainee in self.trainees],
            "seconds": self.seconds,
        }
        (Path(cast(str, output_dir)) / PROGRESS).write_text(json.dumps(so_far))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        so_far = json.loads((Path(resume_from_checkpoint) / PROGRESS).read_text())
        self._seconds_before = so_far["seconds"]
        for trainee, losses in zip(self.trainees, so_far["losses"], strict=True):
            trainee.losses[:] = losses


def pack(rows: Sequence[PackedRow]) -> tuple[dict[str, Any], list[Span]]:
    """(what `PackedModel` takes, whose tokens they are) for (expert, share of each token's loss, row)."""
    lengths = [len(row["input_ids"]) for _, _, row in rows]
    ids = torch.tensor([token for _, _, row in rows for token in row["input_ids"]])
    predicting, shares, owner = [], [], []
    spans: list[Span] = []
    start = 0
    for (n, share, row), length in zip(rows, lengths, strict=True):
        count = length - row["prompt_length"]
        predicting += range(start + row["prompt_length"] - 1, start + length - 1)
        shares += [share] * count
        owner += [n] * count
        _, tokens, predicted = spans.pop() if spans and spans[-1][0] == n else (n, 0, 0)
        spans.append((n, tokens + length, predicted + count))
        start += length
    places, packing = torch.tensor(predicting), Packing.of(lengths)
    batch = {
        "input_ids": ids[None],
        "position_ids": positions(lengths)[None],
        "gather": packing.gather,
        "scatter": packing.scatter,
        "predicting": places,
        "labels": ids[places + 1],
        "shares": torch.tensor(shares),
        "owner": torch.tensor(owner),
    }
    return batch, spans


def trainee_of(name: str, rows: Sequence[TokenRow], recipe: LoopRecipe, parameters: dict[str, nn.Parameter]) -> Trainee:
    """An expert at its beginning."""
    size = recipe.batch_size * recipe.gradient_accumulation
    return Trainee(name, rows, order_of([len(row["input_ids"]) for row in rows], recipe, size), size, parameters)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def cosine(step: int, warmup: int, steps: int, floor: float) -> float:
    """The share of the learning rate at a step: up a line, then down a cosine to `floor`."""
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
