"""Four LoRA experts: all in one pass over the base, and by three peers one after the other.

    pip install trl psutil
    python benchmarks/train.py                        # a random 17M Llama, rows of the WordNet sample that ships
    python benchmarks/train.py --base tiny --rounds 1

The same rows in the same order, as many a step, with the same optimizer and schedule:

- `padded`: PEFT and transformers' Trainer, every row padded to 128 tokens, as in the paper;
- `grouped`: the same with rows of like length in a batch, padded to the longest of it, as careful people do;
- `packed`: TRL's SFTTrainer with packing, of as many tokens a step as the others have on average.

Each is a process of its own, in turn; measured are the seconds of training alone, imports, loading and tokenizing left
out, and the process's largest resident size. A real token is one that is no padding. The losses are the means of the
last tenth of the steps: those of ours, `padded` and `grouped` are of the same tokens and must agree.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.prompt import PromptEncoder, collate, pad_token_id
from lora_lexicon.data.store import load_entries
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.experts.loop import TokenRow, encode, order_of
from lora_lexicon.experts.lora import new_factors
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import FFN_MODULES, TrainRecipe

EXPERTS = ("one", "two", "three", "four")
WIDTH = 128
RECIPE = TrainRecipe(first_layer=0, rank=16, alpha=32, batch_size=16, learning_rate=1e-3, checkpoints=0, seed=42)
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Real tokens a second of training, beside three peers.")
    parser.add_argument("--base", default="", help="a folder or a shipped base; by default a random one of 17M")
    parser.add_argument("--steps", type=int, default=40, help="steps of each expert")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=RUNS, help="run one of them, and print what it took")
    parser.add_argument("--work", type=Path, help="where base and rows lie")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](arguments.base, arguments.work, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = arguments.base or make_base(work / "base")
        prepare(["sample:wordnet"], work / "entries", limit=4000)
        rounds: dict[str, list[Found]] = {name: [] for name in RUNS}
        for number in range(arguments.rounds):
            for name in RUNS:
                command = (sys.executable, __file__, "--run", name, "--base", base, "--work", work)
                found = run([*map(str, command), "--steps", str(arguments.steps)])
                rounds[name].append(found)
                print(f"round {number + 1}, {name}: {found}", file=sys.stderr)
    report(rounds)


def run(command: Sequence[str]) -> Found:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_base(folder: Path) -> str:
    """A random Llama of 17M parameters with the shipped base's tokenizer."""
    tiny = load_base("tiny")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny.tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=512, bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id, pad_token_id=tiny.tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


def shares(work: Path) -> list[list[Any]]:
    """The entries of each expert: a quarter of all, rows of every length in each."""
    rows = load_entries(work / "entries").split("train")
    return [rows[i :: len(EXPERTS)] for i in range(len(EXPERTS))]


def recipe_of(steps: int) -> TrainRecipe:
    return replace(RECIPE, max_steps=steps)


def ours(name: str, work: Path, steps: int) -> Found:
    base = load_base(name)
    parts = [Part(n, rows, work / f"ours-{os.getpid()}" / n) for n, rows in zip(EXPERTS, shares(work), strict=True)]
    made = train_experts(base, parts, recipe_of(steps))
    seconds = made[0].training["seconds"]  # the same for all, saving included
    losses = [info.training["losses"][-1][1] for info in made]
    return result(sum(info.tokens for info in made), seconds, losses)


def one_by_one(train: Callable[..., tuple[int, float, float]]) -> Callable[..., Found]:
    """Runs a peer for one expert after the other."""

    def measure(name: str, work: Path, steps: int) -> Found:
        tokens, seconds, losses = 0, 0.0, []
        for rows in shares(work):
            base = load_base(name)
            encoder = PromptEncoder(base.tokenizer)
            read, took, loss = train(base, [encode(encoder, row) for row in rows], steps)
            tokens, seconds, losses = tokens + read, seconds + took, [*losses, loss]
        return result(tokens, seconds, losses)

    return measure


def result(tokens: int, seconds: float, losses: Sequence[float]) -> Found:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    loss = round(statistics.mean(losses), 4)
    return {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": tokens / seconds, "loss": loss,
            "peak_megabytes": round(peak)}  # fmt: skip


def adapted(base: Base) -> Any:
    """The base with a new adapter of PEFT's, whose factors are those that ours begins with."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RECIPE.rank, lora_alpha=int(RECIPE.alpha), target_modules=list(FFN_MODULES)
    )
    layers = [name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in FFN_MODULES]
    start = new_factors(base.model, layers, RECIPE.rank, RECIPE.alpha / RECIPE.rank, RECIPE.seed)
    model = get_peft_model(base.model, config)
    with torch.no_grad():
        for name, factors in start.items():
            model.get_parameter(f"base_model.model.{name}.lora_A.default.weight").copy_(factors.a.T)
    return model


def settings(folder: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": RECIPE.batch_size, "max_steps": steps,
        "learning_rate": RECIPE.learning_rate, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.0}, "warmup_steps": -(-steps * 6 // 100), "save_strategy": "no",
        "logging_steps": max(1, steps // 20), "seed": RECIPE.seed, "report_to": "none", "disable_tqdm": True,
        "optim": RECIPE.optimizer, "use_cpu": not torch.cuda.is_available(), "remove_unused_columns": False,
        "bf16": RECIPE.dtype == "bfloat16",
    }  # fmt: skip


class InOrder(Trainer):
    """Reads the rows in the order given."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return range(len(cast(Any, self.train_dataset)))


def trainer(pad_to: int) -> Callable[..., tuple[int, float, float]]:
    """PEFT and transformers' Trainer; batches padded to `pad_to`, 0 being the longest row."""

    def train(base: Base, rows: list[TokenRow], steps: int, twice: bool = False) -> tuple[int, float, float]:
        ordered = [rows[i] for i in order_of([len(r["input_ids"]) for r in rows], recipe_of(steps), RECIPE.batch_size)]
        pad = pad_token_id(base.tokenizer)

        def batch(own: list[Any]) -> dict[str, torch.Tensor]:
            made = collate(own, pad)
            room = max(0, pad_to - made["input_ids"].shape[1])
            fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
            return {key: torch.nn.functional.pad(t, (0, room), value=fill[key]) for key, t in made.items()}

        model = adapted(base)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(**settings(folder, steps))
            run = InOrder(model, arguments, batch, train_dataset=cast(Any, ordered))
            return timed(run, sum(len(row["input_ids"]) for row in ordered), twice)

    return train


def packed(base: Base, rows: list[TokenRow], steps: int, twice: bool = False) -> tuple[int, float, float]:
    """TRL's SFTTrainer with packing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    order = order_of([len(row["input_ids"]) for row in rows], recipe_of(steps), RECIPE.batch_size)
    ordered = [rows[i] for i in order]
    tokens = sum(len(row["input_ids"]) for row in ordered)
    data = Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [int(i >= row["prompt_length"]) for i in range(len(row["input_ids"]))],
            }
            for row in ordered
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        given = {**settings(folder, -1), "per_device_train_batch_size": 1, "num_train_epochs": 1, "warmup_steps": 0}
        arguments = SFTConfig(
            **given, packing=True, max_length=tokens // steps, completion_only_loss=True, gradient_checkpointing=False,
        )  # fmt: skip
        run = SFTTrainer(
            model=adapted(base), args=arguments, train_dataset=data, processing_class=base.tokenizer,
        )  # fmt: skip
        return timed(run, tokens, twice)


def timed(run: Any, tokens: int, twice: bool) -> tuple[int, float, float]:
    """(tokens, seconds of training, last loss); `twice`: the first time does not count."""
    if twice:
        run.train()
    start = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - start
    return tokens, seconds, [entry["loss"] for entry in run.state.log_history if "loss" in entry][-1]


RUNS: dict[str, Callable[..., Found]] = {
    "ours": ours,
    "padded": one_by_one(trainer(WIDTH)),
    "grouped": one_by_one(trainer(0)),
    "packed": one_by_one(packed),
}


def report(rounds: dict[str, list[Found]]) -> None:
    middle = {
        name: {key: statistics.median(found[key] for found in all_found) for key in all_found[0]}
        for name, all_found in rounds.items()
    }
    for name, found in middle.items():
        print(
            f"{name:8}{found['tokens_per_second']:8,.0f} real tokens/s  {found['peak_megabytes']:6,.0f} MB  "
            f"loss {found['loss']:.4f}"
        )
    speed = {name: found["tokens_per_second"] for name, found in middle.items()}
    peers = {name: value for name, value in speed.items() if name != "ours"}
    print(
        json.dumps(
            {
                "claim": "four LoRA experts trained in one pass",
                "unit": "real tokens/s",
                "ours": speed["ours"],
                "peers": peers,
                "ratio": {name: speed["ours"] / value for name, value in peers.items()},
                "rounds": rounds,
                "environment": {
                    "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                },
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
