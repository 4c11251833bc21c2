"""What a pack weighs, and what it takes to build, check and copy one: four adapters of Llama-3-8B's shape.

    python benchmarks/pack.py                        # rank 16 on the FFNs, made up, in the system's temporary folder
    python benchmarks/pack.py --rank 8 --domains 8

The base is a checkpoint of that shape whose tensors are a hole in a file, which takes no room on the disk and no time.
Seconds are those of one run, beside a copy of the same bytes.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from lora_lexicon.archive import unpack
from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.router import Router, describe
from lora_lexicon.domains.vectors import unit
from lora_lexicon.experts.base import fingerprint
from lora_lexicon.experts.checkpoint import save_lora
from lora_lexicon.experts.lora import new_factors
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.folders import folder_bytes
from lora_lexicon.packs.pack import build_pack, copy_pack, verify_pack
from lora_lexicon.resources import find_base, shapes

AIM = 230e6  # bytes, of four adapters of rank 16


def main() -> None:
    parser = argparse.ArgumentParser(description="What a pack weighs.")
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(shapes()))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--domains", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.shape, arguments.rank, arguments.domains)
    for name, row in result.items():
        print(f"{name:28}{row['megabytes']:10.1f} MB{row['seconds']:8.2f} s")
    print(
        json.dumps(
            {
                "claim": "four adapters for Llama-3-8B stay under 230 MB", "unit": "MB",
                "ours": result["pack, bfloat16"]["megabytes"], "peers": {"aim": AIM / 1e6},
                "ratio": {"aim": AIM / 1e6 / result["pack, bfloat16"]["megabytes"]}, "runs": result,
                "environment": {"python": platform.python_version(), "machine": platform.machine()},
            }
        )
    )  # fmt: skip


def measure(folder: Path, shape: str, rank: int, domains: int) -> dict[str, dict[str, float]]:
    """Megabytes and seconds of each step."""
    base, names = make_base(folder / "base", shape), [f"domain-{i}" for i in range(domains)]
    experts = [make_expert(folder / "experts" / name, base, rank, seed) for seed, name in enumerate(names)]
    make_router(folder / "domains", base, names)
    pack, file = folder / "pack", folder / "pack.lexpack"
    found: dict[str, dict[str, float]] = {}

    def step(name: str, made: Path, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        size = folder_bytes(made) if made.is_dir() else made.stat().st_size
        found[name] = {"megabytes": size / 1e6, "seconds": time.perf_counter() - began}

    step("pack, bfloat16", pack, lambda: build_pack(str(base), experts, folder / "domains", pack, dtype="bfloat16"))
    step("verify", pack, lambda: verify_pack(pack))
    step("one file", file, lambda: copy_pack(pack, file))
    step("unpack", folder / "out", lambda: unpack(file, folder / "out"))
    step("a plain copy", folder / "copy", lambda: shutil.copytree(pack, folder / "copy"))
    step("pack, int8", folder / "int8", lambda: copy_pack(pack, folder / "int8", dtype="int8"))
    return found


def make_base(folder: Path, shape: str) -> Path:
    """A checkpoint of bfloat16 zeros that are not on the disk, with the tokenizer that ships."""
    folder.mkdir()
    for file in Path(find_base("tiny")).glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(shapes()[shape], folder / "config.json")
    end, header = 0, {}
    for name, size in shape_of(json.loads((folder / "config.json").read_text()), shape).tensors.items():
        start, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + end)
    return folder


def make_expert(folder: Path, base: Path, rank: int, seed: int) -> Path:
    """A plain PEFT adapter on every FFN, of random values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    targets = ["gate_proj", "up_proj", "down_proj"]
    layers = [name for name, _ in model.named_modules() if name.endswith(tuple(targets))]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    save_lora(config, new_factors(model, layers, rank, 2.0, seed), folder)
    return folder


def make_router(folder: Path, base: Path, names: list[str]) -> None:
    """A router of random centroids, as wide as the base."""
    folder.mkdir()
    width = int(json.loads((base / "config.json").read_text())["hidden_size"])
    points = unit(np.random.default_rng(0).standard_normal((len(names), 40, width)).reshape(-1, width))
    parts = [describe(points[i * 40 : (i + 1) * 40]) for i in range(len(names))]
    Router(
        names=tuple(names),
        centroids=np.stack([part.centroid for part in parts]),
        quantiles=np.stack([part.quantiles for part in parts]),
        mean=np.zeros(width, dtype=np.float32),
        terms=tuple(tuple(f"term{j}" for j in part.nearest) for part in parts),
        term_vectors=np.concatenate([points[part.nearest] for part in parts]).astype(np.float16),
        embedder_name="base",
        embedder_identity={"kind": "base", "base": fingerprint(base), "layers": 1, "pool": "last"},
        embedder_tensors={},
        template=PromptTemplate(),
    ).save(folder)


if __name__ == "__main__":
    main()
