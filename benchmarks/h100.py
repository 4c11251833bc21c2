"""What one GPU reaches in training: LoRA alone, four together, on an NF4 base, a full-FFN expert, and three peers.

    pip install trl bitsandbytes psutil liger-kernel
    python benchmarks/h100.py --out h100.json                   # Llama-3-8B's shape, random weights: ten minutes
    python benchmarks/h100.py --shape CONFIG.json --steps 4     # any shape; without a GPU, a small one

Nothing is downloaded: the weights are random, which speed does not see, and the rows are those of the WordNet sample
that ships, in the shipped tokenizer's tokens (it has 8,192; Llama-3's would be fewer). Each job is its own process.

- `rate`: FLOP/s of one large matrix product in bfloat16, the best of many. All shares are shares of it.
- ours: real tokens a second between the first report of a run and its last, so that no loading and no saving counts.
- peers, for one expert (each would be trained after the other, at the same rate): those of benchmarks/train.py, their
  second run over the same rows, so that nothing is compiled or allocated for the first time.

FLOPs are `plan`'s: 4 a frozen parameter and token, 6 a trained one, attention's own products left out. The hours are
those of three epochs over as many rows as 3D-EX has, at the mean length of these rows.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import train as peers
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.data.store import load_entries
from lora_lexicon.experts.base import load_base, load_tokenizer
from lora_lexicon.experts.cost import options_of, token_flops, trained_by
from lora_lexicon.experts.forecast import matrix_rate
from lora_lexicon.experts.journal import Step
from lora_lexicon.experts.loop import encode
from lora_lexicon.experts.shape import read_shape
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.recipe import TrainRecipe
from lora_lexicon.resources import shapes

PAPER_ROWS, EPOCHS = 1_309_312, 3
ROWS = 4000
LORA = TrainRecipe(
    first_layer=0, rank=16, batch_size=64, learning_rate=1e-4, dtype="bfloat16", checkpoints=0, pass_tokens=16384
)
FFN = replace(LORA, kind="ffn", optimizer="adamw_bnb_8bit", gradient_checkpointing=True)
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", help="a shape that ships, or a config.json")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--work", type=Path, help="where base and rows lie; a temporary folder")
    parser.add_argument("--out", type=Path, help="a JSON file to write too")
    parser.add_argument("--job", choices=JOBS, help="run one of them, and print what it took")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(JOBS[options.job](options.work, options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        make_base(options.shape, work / "base")
        prepare(["sample:wordnet"], work / "entries", limit=ROWS)
        found: dict[str, Found] = {}
        for name in options.jobs:
            command = [sys.executable, __file__, "--job", name, "--work", work, "--steps", options.steps]
            started = time.perf_counter()
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            if done.returncode:  # one that does not fit is a finding too
                found[name] = {"failed": done.stderr.strip().splitlines()[-1][-300:]}
            else:
                found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name} ({time.perf_counter() - started:.0f} s): {found[name]}", file=sys.stderr, flush=True)
    result = summary(options.shape, options.steps, found)
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_base(shape: str, folder: Path) -> None:
    """A Llama of this shape with random weights in bfloat16, and the shipped base's tokenizer."""
    file = shapes().get(shape, Path(shape))
    config = LlamaConfig.from_dict(json.loads(file.read_text()))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)


def rate(work: Path, steps: int) -> Found:
    return {"flops_per_second": matrix_rate(device(), torch.bfloat16, seconds=5)}


def ours(recipe: TrainRecipe, experts: int) -> Callable[[Path, int], Found]:
    def job(work: Path, steps: int) -> Found:
        rows = load_entries(work / "entries").split("train")
        base = load_base(str(work / "base"), dtype=recipe.dtype, quantize=recipe.quantize)
        encoder, told = PromptEncoder(base.tokenizer), list[Step]()
        with tempfile.TemporaryDirectory(dir=work) as folder:
            parts = [Part(str(i), rows[i::experts], Path(folder) / str(i)) for i in range(experts)]
            train_experts(base, parts, replace(recipe, max_steps=steps), progress=told.append)
        by_step = [list(own) for _, own in groupby(told, key=lambda step: step.step)]
        first, last = (sum(step.tokens for step in own) for own in (by_step[0], by_step[-1]))
        seconds = by_step[-1][-1].seconds - by_step[0][-1].seconds
        shape = read_shape(str(work / "base"))
        options = options_of(recipe, shape, recipe.rank)
        flops = token_flops(shape, options, recipe.kind, trained_by(shape, options, recipe.kind))
        return {
            "tokens_per_second": (last - first) / seconds,
            "token_flops": flops,
            "tokens_a_row": sum(len(encode(encoder, row)["input_ids"]) for row in rows) / len(rows),
            "loss": sum(step.loss for step in by_step[-1]) / experts,
            "peak_gb": peak_gb(),
        }

    return job


def peer(name: str) -> Callable[[Path, int], Found]:
    def job(work: Path, steps: int) -> Found:
        peers.RECIPE = LORA
        rows = load_entries(work / "entries").split("train")
        train = {"padded": peers.trainer(peers.WIDTH), "grouped": peers.trainer(0), "packed": peers.packed}[name]
        base = load_base(str(work / "base"), dtype=LORA.dtype)
        encoder = PromptEncoder(base.tokenizer)
        tokens, seconds, loss = train(base, [encode(encoder, row) for row in rows], steps, twice=True)
        return {"tokens_per_second": tokens / seconds, "loss": loss, "peak_gb": peak_gb()}

    return job


def peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


JOBS: dict[str, Callable[[Path, int], Found]] = {
    "rate": rate,
    "four LoRA": ours(LORA, 4),
    "four LoRA, Liger": ours(replace(LORA, liger=True), 4),
    "one LoRA": ours(LORA, 1),
    "four LoRA, NF4": ours(replace(LORA, quantize="nf4", gradient_checkpointing=True), 4),
    "FFN, 8-bit AdamW": ours(FFN, 1),
    "packed": peer("packed"),
    "grouped": peer("grouped"),
    "padded": peer("padded"),
}


def summary(shape: str, steps: int, found: dict[str, Found]) -> Found:
    """The whole as JSON: shares of the matrix rate, hours, ratios to the peers, card and versions."""
    best = found.get("rate", {}).get("flops_per_second")
    for job in found.values():
        if best and "token_flops" in job:
            job["share"] = job["tokens_per_second"] * job["token_flops"] / best
        if "tokens_a_row" in job:
            job["hours_3d_ex"] = PAPER_ROWS * EPOCHS * job["tokens_a_row"] / job["tokens_per_second"] / 3600
    speeds = {name: job["tokens_per_second"] for name, job in found.items() if "tokens_per_second" in job}
    ours = speeds.get("four LoRA")
    cuda = torch.cuda.is_available()
    return {
        "claim": "four LoRA experts trained in one pass",
        "unit": "real tokens/s",
        "ours": ours,
        "peers": {name: speeds[name] for name in ("padded", "grouped", "packed") if name in speeds},
        "ratio": {name: ours / speeds[name] for name in ("padded", "grouped", "packed") if ours and name in speeds},
        "jobs": found,
        "settings": {"shape": shape, "steps": steps, "rows_a_step": LORA.batch_size, "pass_tokens": LORA.pass_tokens},
        "environment": {
            "card": torch.cuda.get_device_name() if cuda else platform.machine(),
            "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
            "python": platform.python_version(),
            **{
                name: installed(name)
                for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "triton")
            },
        },
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
