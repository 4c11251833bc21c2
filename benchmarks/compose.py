"""Four experts of Llama-3.2-1B's shape into a MoE: ours, mergekit-moe, and `cp` of the same bytes, in turn.

    python benchmarks/compose.py                      # 34 GB of disk; mergekit goes into an environment of its own
    python benchmarks/compose.py --layers 2 --vocabulary 2048 --rounds 1      # a quick look
    python benchmarks/compose.py --memory             # our peak memory at Llama-3-8B's width, 6 GB of disk

Every program is timed as a whole, imports included, with cold inputs, until its bytes lie on the disk. Weights are
random: nothing here depends on their values. mergekit-moe reads four whole models, ours the base and four FFNs; what
the two write differs by mergekit's random gates. Peak memory is the largest resident size of the process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from lora_lexicon.compose.sources import factor_names
from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.router import Router
from lora_lexicon.experts.base import EXPERT_FFN, fingerprint
from lora_lexicon.experts.checkpoint import ExpertInfo, write_expert
from lora_lexicon.experts.pretrain import train_tokenizer
from lora_lexicon.experts.shape import shape_of

NAMES = ("one", "two", "three", "four")


def llama(layers: int, vocabulary: int, hidden: int = 2048, inner: int = 8192, tied: bool = True) -> LlamaConfig:
    """Llama-3.2-1B's shape, as its config.json says, or another of its family."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=hidden // 32,
        vocab_size=vocabulary, max_position_embeddings=131072, tie_word_embeddings=tied, rms_norm_eps=1e-5,
    )  # fmt: skip


def tensors_of(config: LlamaConfig, seed: int, *, ffn_only: bool = False) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights; the seed changes the FFNs alone."""
    made = {}
    for i, (name, shape) in enumerate(shape_of(config.to_dict(), "").tensors.items()):
        ffn = EXPERT_FFN.fullmatch(name)
        if ffn or not ffn_only:
            bits = np.random.default_rng([seed if ffn else 0, i]).integers(-9000, -8000, shape, np.int16)
            made[name] = torch.from_numpy(bits).view(torch.bfloat16)
    return made


def make_inputs(folder: Path, layers: int, vocabulary: int) -> None:
    """A base, four FFN experts of ours, the same four as whole models for mergekit, and a router."""
    config = llama(layers, vocabulary)
    tokenizer = train_tokenizer([("a", "b c", "d e f")] * 10, 300)
    for i, name in enumerate(("base", *NAMES)):
        whole = folder / "models" / name
        config.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        save_file(tensors_of(config, i), whole / "model.safetensors", {"format": "pt"})
    identity = fingerprint(folder / "models" / "base")
    for i, name in enumerate(NAMES, 1):
        expert = folder / "experts" / name
        expert.mkdir(parents=True)
        save_file(tensors_of(config, i, ffn_only=True), expert / "ffn.safetensors", {"format": "pt"})
        write_expert(expert, ExpertInfo(name, "ffn", "base", identity, 0, domain=name))
    make_router(folder / "domains", identity)
    experts = [{"source_model": str(folder / "models" / name), "positive_prompts": [name]} for name in NAMES]
    plan = {"base_model": str(folder / "models" / "base"), "gate_mode": "random", "dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(json.dumps(plan | {"experts": experts}))  # JSON is YAML


def make_router(folder: Path, identity: str) -> None:
    """A router over the domains of `NAMES`, which reads no layer."""
    vectors = np.eye(len(NAMES), 16, dtype=np.float32)
    router = Router(
        names=NAMES, centroids=vectors, quantiles=np.zeros((len(NAMES), 101), np.float32), mean=np.zeros(16, "f4"),
        terms=tuple((name,) for name in NAMES), term_vectors=vectors.astype("f2"), embedder_name="base",
        embedder_identity={"base": identity, "layers": 0, "pool": "mean", "max_length": 128}, embedder_tensors={},
        template=PromptTemplate(),
    )  # fmt: skip
    folder.mkdir()
    router.save(folder)


def make_wide(folder: Path) -> None:
    """Two layers of Llama-3-8B's width, its vocabulary, four experts of each kind: zeros, which take no space."""
    config, tokenizer = llama(2, 128256, 4096, 14336, tied=False), train_tokenizer([("a", "b c", "d e f")] * 10, 300)
    shapes = shape_of(config.to_dict(), "").tensors
    base, ffns = folder / "base", {name: shape for name, shape in shapes.items() if EXPERT_FFN.fullmatch(name)}
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_zeros(base / "model.safetensors", shapes)
    identity = fingerprint(base)
    adapter = LoraConfig(r=16, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    factors = {}
    for name, (rows, columns) in {**ffns, **{k: v for k, v in shapes.items() if "q_proj" in k}}.items():
        a, b = factor_names(name)
        factors |= {a: (16, columns), b: (rows, 16)}
    kinds: dict[Literal["ffn", "lora"], tuple[str, Mapping[str, tuple[int, ...]]]] = {
        "ffn": ("ffn.safetensors", ffns),
        "lora": ("adapter_model.safetensors", factors),
    }
    for kind, (file, held) in kinds.items():
        for name in NAMES:
            expert = folder / kind / name
            expert.mkdir(parents=True)
            save_zeros(expert / file, held)
            write_expert(expert, ExpertInfo(name, kind, "base", identity, 0, domain=name))
            if kind == "lora":
                adapter.save_pretrained(str(expert))
    make_router(folder / "domains", identity)


def save_zeros(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """bfloat16 zeros as a file with a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)


def measure_memory(folder: Path) -> None:
    """Prints the peak memory of three compositions at Llama-3-8B's width."""
    make_wide(folder)
    for kind, options in {"ffn": [], "ffn averaged": ["--layers", "1"], "lora": []}.items():
        command = compose(folder / kind.split()[0], folder / "base", folder / "domains", folder / "ours")
        if kind != "ffn":
            command += ["--average-rest", *options]
        print(f"{kind}: {measure(command, folder, folder / 'log.txt')[1]:.0f} MB", flush=True)
        shutil.rmtree(folder / "ours")


def compose(experts: Path, base: Path, domains: Path, out: Path) -> list[str]:
    """Our command."""
    return [
        str(Path(sys.executable).with_name("lora-lexicon")), "compose", "moe", str(experts), "--no-verify",
        "--base", str(base), "--router", str(domains), "--out", str(out),
    ]  # fmt: skip


def forget(folder: Path) -> None:
    """Takes the files of a folder out of the system's cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def peak_of(pid: int) -> int:
    """The largest resident size of a process so far, in kB (wait4 would count this program's own, from before exec)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def measure(command: list[str], folder: Path, log: Path) -> tuple[float, float]:
    """(seconds until the output lies on the disk, peak memory in MB) of one program."""
    forget(folder)
    with log.open("w") as output:
        started = time.perf_counter()
        process, peak = subprocess.Popen(command, stdout=output, stderr=output), 0
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.02)
        os.sync()
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return seconds, peak / 1e3


def peer_of(folder: Path) -> str:
    """mergekit-moe in an environment of its own."""
    tool = folder / "peer" / "bin" / "mergekit-moe"
    if not tool.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "peer"], check=True)
        pinned = f"torch=={torch.__version__.split('+')[0]}"
        subprocess.run([folder / "peer" / "bin" / "pip", "install", "-q", pinned, "mergekit"], check=True)
    return str(tool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-compose"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="a mergekit-moe that is installed already")
    parser.add_argument("--keep", action="store_true", help="leave the inputs for the next run")
    parser.add_argument("--memory", action="store_true", help="measure our memory at Llama-3-8B's width instead")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.memory:
        measure_memory(folder / "wide")
        shutil.rmtree(folder / "wide")
        return
    peer = options.peer or peer_of(folder)
    for out in ("ours", "theirs", "copy"):
        shutil.rmtree(folder / out, ignore_errors=True)
    if not (folder / "mergekit.yaml").exists():
        make_inputs(folder, options.layers, options.vocabulary)
    ours = compose(folder / "experts", folder / "models" / "base", folder / "domains", folder / "ours")
    programs = {
        "lora-lexicon compose moe": (ours, "ours"),
        "mergekit-moe": ([peer, str(folder / "mergekit.yaml"), str(folder / "theirs"), "--quiet"], "theirs"),
        "cp -r": (["cp", "-r", str(folder / "ours"), str(folder / "copy")], "copy"),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(options.rounds):
        for name, (command, out) in programs.items():
            results[name].append(measure(command, folder, folder / "log.txt"))
            size = sum(file.stat().st_size for file in (folder / out).rglob("*") if file.is_file())
            print(f"round {turn + 1}: {name}: {results[name][-1][0]:.1f} s, {size / 1e9:.2f} GB", flush=True)
            if out != "ours":
                shutil.rmtree(folder / out)
        shutil.rmtree(folder / "ours")
    copied = statistics.median(seconds for seconds, _ in results["cp -r"])
    print(f"\n{'':26}  median s   times cp   peak MB")
    for name, runs in results.items():
        seconds, memory = statistics.median(s for s, _ in runs), max(m for _, m in runs)
        print(f"{name:26}{seconds:10.1f}{seconds / copied:11.2f}{memory:10.0f}")
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
