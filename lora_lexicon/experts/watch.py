"""What goes on beside the steps of training: reports, validation, early stopping. Knows no kind of expert."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptEncoder, pad_token_id
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base
from lora_lexicon.experts.checkpoint import JOURNAL
from lora_lexicon.experts.cost import options_of, token_flops
from lora_lexicon.experts.joint import REPORTS, JointRun, Trainee
from lora_lexicon.experts.journal import Journal, Report, Step
from lora_lexicon.experts.loop import load_parameters, save_parameters, validation_loss
from lora_lexicon.experts.lora import Owners
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.folders import read_record, write_record
from lora_lexicon.recipe import TrainRecipe

Score = Callable[[list[str], list[str]], float]  # (predictions, references) -> a mean score, larger is better
DECODED_TOKENS = 48


class Watch(TrainerCallback):
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
        trainees: Sequence[Trainee],
        valid: Sequence[Sequence[Entry]],
        ranks: Sequence[int],
        owners: Owners,
        score: Score | None,
        state: Path,
        progress: Report | None,
    ) -> None:
        self.base, self.encoder, self.recipe, self.score = base, encoder, recipe, score
        self.trainees, self.owners, self.state, self.progress = trainees, owners, state, progress
        self.valid = [rows[: recipe.valid_rows] for rows in valid]
        self.record = state / "evaluations.json"
        self.journal = Journal(state / JOURNAL if processes.rank() == 0 else Path(os.devnull))
        self.history: dict[str, list[dict[str, float]]] = {trainee.name: [] for trainee in trainees}
        shape = shape_of(base.model.config.to_dict(), base.name)
        self.token_flops = [
            token_flops(
                shape,
                options_of(recipe, shape, rank),
                recipe.kind,
                sum(p.numel() for p in trainee.parameters.values()),
            )
            for rank, trainee in zip(ranks, trainees, strict=True)
        ]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.journal.go_on(state.global_step)
        if self.record.is_file():  # later evaluations than the checkpoint's are made again, with the same result
            kept = read_record(self.record, ExpertError, "evaluations of a run")
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
