"""Base, experts and router to one MoE checkpoint. Knows files and tensors; no model is ever built.

The merge is a plan: each tensor of the result is a list of pieces, read, converted and written in
chunks. What no expert trained is the base's own, so the average of the rest (section 3.3 of the
LM-Lexicon paper) is exact without computing it. Memory: one FFN matrix in float32 for LoRA experts,
some megabytes otherwise, whatever the size of the model.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from lora_lexicon import __version__
from lora_lexicon.compose.moe import LexiconMoeConfig
from lora_lexicon.compose.tensors import SHARD_BYTES, Checkpoint, TensorPlan, is_finite, write_checkpoint
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import ExpertError, PackError, RecipeError, RouterError
from lora_lexicon.experts.base import DTYPES, base_folder, fingerprint, read_config
from lora_lexicon.experts.checkpoint import (
    CONFIG,
    FFN,
    RECORD,
    WEIGHTS,
    ExpertInfo,
    check_base,
    load_adapter,
    read_expert,
)
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.folders import new_folder, sha256_of, write_record

MOE_RECORD = "moe.json"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FFN_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)")
# What a base's folder holds beside its weights and its config.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class MoeExpert:
    """One expert to be merged: its record, and either its FFN tensors or its low-rank factors."""

    name: str
    path: Path
    info: ExpertInfo | None  # None: a plain PEFT adapter, made elsewhere
    ffn: Checkpoint | None = None
    adapter: LoadedAdapter | None = None
    matrices: frozenset[str] = field(default_factory=frozenset)  # such as model.layers.3.mlp.up_proj

    @property
    def first_layer(self) -> int:
        return min(_layer(matrix) for matrix in self.matrices)

    @property
    def trained_parameters(self) -> int:
        if self.ffn is not None:
            return sum(prod(ref.shape) for ref in self.ffn.tensors.values())
        assert self.adapter is not None
        return sum(f.a.numel() + f.b.numel() for f in self.adapter.factors.values())

    def dtype(self, matrix: str) -> torch.dtype:
        """The type one trained matrix is held in."""
        if self.ffn is not None:
            return self.ffn.ref(f"{matrix}.weight").dtype
        assert self.adapter is not None
        return self.adapter.factors[matrix].a.dtype


def expert_folders(paths: Sequence[Path]) -> list[Path]:
    """The expert folders named by `paths`: each is one, or holds several.

    Raises:
        ExpertError: a path is neither.
    """
    found = []
    for path in paths:
        here = [path] if _is_expert(path) else sorted(p for p in path.glob("[!.]*") if _is_expert(p))
        if not here:
            raise ExpertError(f"{path} is neither an expert nor a folder of experts: give what `train` wrote")
        found += here
    return found


def _is_expert(path: Path) -> bool:
    return (path / RECORD).is_file() or (path / CONFIG).is_file()


def match_experts(names: Sequence[str], domains: Sequence[str]) -> None:
    """Refuses experts whose names are not the router's domains, one for one."""
    double = sorted({name for name in names if names.count(name) > 1})
    missing, extra = sorted(set(domains) - set(names)), sorted(set(names) - set(domains))
    if double or missing or extra:
        said = [f"{what}: {', '.join(which)}" for what, which in
                (("given twice", double), ("domains without an expert", missing), ("experts without a domain", extra))
                if which]  # fmt: skip
        raise PackError(
            f"the router's domains ({', '.join(domains)}) and the experts ({', '.join(sorted(names))}) differ; "
            f"{'; '.join(said)}: name the experts one by one, exactly one for each domain"
        )


def check_router_base(router: Router, identity: str, base: str) -> None:
    """Refuses a router whose `base` embedder reads another base."""
    own = router.embedder_identity.get("base")
    if router.embedder_name == "base" and own != identity:
        raise RouterError(
            f"the router reads base {str(own)[:12]}, but {base!r} is {identity[:12]}: fit the domains on this base"
        )


def open_expert(path: Path, identity: str, base: str) -> MoeExpert:
    """An expert folder, checked against the base; tensors of an FFN expert are not read yet.

    Raises:
        ExpertError: another base, a damaged file, or an adapter that trains more than FFNs.
    """
    info = read_expert(path) if (path / RECORD).is_file() else None
    if info is not None:
        check_base(info, identity, base)
    if info is not None and info.kind == "ffn":
        ffn = Checkpoint(path / FFN)
        return MoeExpert(info.name, path, info, ffn=ffn, matrices=_matrices(ffn.tensors, path, ".weight"))
    adapter = load_adapter(path)
    return MoeExpert(adapter.name, path, info, adapter=adapter, matrices=_matrices(adapter.factors, path, ""))


def _matrices(names: Iterable[str], path: Path, suffix: str) -> frozenset[str]:
    for name in names:
        if not name.endswith(suffix) or not FFN_WEIGHT.fullmatch(name.removesuffix(suffix)):
            raise ExpertError(f"{path} trains {name}; a MoE has experts in the FFN only: use `compose adapters`")
    matrices = frozenset(name.removesuffix(suffix) for name in names)
    if not matrices:
        raise ExpertError(f"{path} trains nothing: train the expert again")
    return matrices


def _layer(matrix: str) -> int:
    match = FFN_WEIGHT.fullmatch(matrix)
    assert match is not None
    return int(match[1])


def check_shapes(expert: MoeExpert, base: Checkpoint) -> None:
    """Refuses an expert with a tensor that the base lacks or has in another shape, naming both."""
    for matrix in sorted(expert.matrices):
        weight = f"{matrix}.weight"
        if weight not in base.tensors:
            raise ExpertError(f"expert {expert.name!r} trains {matrix}, which the base lacks: it is another base's")
        own = base.tensors[weight].shape
        if expert.ffn is not None:
            shape = expert.ffn.tensors[weight].shape
        else:
            assert expert.adapter is not None
            factors = expert.adapter.factors[matrix]
            shape = (factors.b.shape[1], factors.a.shape[0])
        if shape != own:
            raise ExpertError(f"expert {expert.name!r}: {matrix} has shape {shape}, the base's is {own}")


def plan_moe(
    base: Checkpoint, experts: Sequence[MoeExpert], layers: int, *, keep_base: bool, dtype: torch.dtype
) -> tuple[list[TensorPlan], int]:
    """(every tensor of the MoE in order, the first layer with experts)."""
    first = min(expert.first_layer for expert in experts)
    replaced = {f"model.layers.{i}.mlp.{p}.weight" for i in range(first, layers) for p in PROJECTIONS}
    plans = [
        TensorPlan(name, ref.shape, dtype, [partial(base.chunks, name, dtype)])
        for name, ref in base.tensors.items()
        if name not in replaced and not name.endswith("rotary_emb.inv_freq")  # old files hold it; it is computed
    ]
    voices: list[MoeExpert | None] = [*experts, None] if keep_base else list(experts)
    for i in range(first, layers):
        inner, hidden = base.ref(f"model.layers.{i}.mlp.gate_proj.weight").shape
        prefix = f"model.layers.{i}.mlp"
        up = [_piece(voice, f"{prefix}.{p}", base, dtype) for voice in voices for p in ("gate_proj", "up_proj")]
        down = [_piece(voice, f"{prefix}.down_proj", base, dtype) for voice in voices]
        plans += [
            TensorPlan(f"{prefix}.experts.gate_up_proj", (len(voices), 2 * inner, hidden), dtype, up),
            TensorPlan(f"{prefix}.experts.down_proj", (len(voices), hidden, inner), dtype, down),
        ]
    return plans, first


def _piece(
    expert: MoeExpert | None, matrix: str, base: Checkpoint, dtype: torch.dtype
) -> Callable[[], Iterable[Tensor]]:
    """One expert's matrix; the base's own where the expert did not train it."""
    if expert is None or matrix not in expert.matrices:
        return partial(base.chunks, f"{matrix}.weight", dtype)
    if expert.ffn is not None:
        return partial(expert.ffn.chunks, f"{matrix}.weight", dtype)
    return partial(_merged, expert, matrix, base, dtype)


def _merged(expert: MoeExpert, matrix: str, base: Checkpoint, dtype: torch.dtype) -> Iterable[Tensor]:
    assert expert.adapter is not None
    factors = expert.adapter.factors[matrix]
    merged = (base.tensor(f"{matrix}.weight").float() + factors.delta).to(dtype)
    if not is_finite(merged):
        raise ExpertError(f"expert {expert.name!r}: {matrix} overflows {dtype} when merged: choose --dtype float32")
    yield merged


def compose_moe(
    base: str,
    experts: Sequence[Path],
    domains: Path,
    out: Path,
    *,
    keep_base: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a MoE checkpoint with its router, tokenizer and record; returns the record.

    Args:
        base: a folder, a Hub name or a shipped pack's name.
        experts: expert folders, FFN or LoRA (also mixed), one for each domain of the router.
        domains: the folder with the router.
        keep_base: the base's FFNs become one more expert, which answers where the router abstains.
        dtype: of all tensors; by default the widest among base and experts, which loses nothing.
        progress: called with (bytes just written, bytes in all).

    Raises:
        LexiconError: parts that do not fit each other, a damaged file, a full disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    path = base_folder(base)
    config, identity, router = read_config(path), fingerprint(path), load_router(domains)
    if config.get("mlp_bias"):
        raise ExpertError(f"base {base!r} has mlp_bias, which transformers' experts lack: use `compose adapters`")
    check_router_base(router, identity, base)
    opened = {expert.name: expert for expert in _open_all(experts, router, identity, base)}
    ordered = [opened[name] for name in router.names]
    weights = Checkpoint(path)
    for expert in ordered:
        check_shapes(expert, weights)
    kind = DTYPES[dtype] if dtype else _widest(weights, ordered)
    plans, first = plan_moe(weights, ordered, config["num_hidden_layers"], keep_base=keep_base, dtype=kind)
    _check_reach(router, first, keep_base)
    total = sum(plan.bytes for plan in plans)
    with new_folder(out, replace=overwrite) as folder:
        report = None if progress is None else lambda done: progress(done, total)
        write_checkpoint(folder, plans, max_shard_bytes=max_shard_bytes, progress=report)
        _moe_config(path, router, first, keep_base, kind).save_pretrained(folder)
        for name in COMPANIONS:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        router.save(folder)
        record = _record(base, identity, ordered, router, first, keep_base, kind, total)
        write_record(folder / MOE_RECORD, record)
        (folder / "README.md").write_text(_card(out.name, record), encoding="utf-8")
    return record


def _open_all(paths: Sequence[Path], router: Router, identity: str, base: str) -> list[MoeExpert]:
    experts = [open_expert(path, identity, base) for path in paths]
    match_experts([expert.name for expert in experts], router.names)
    return experts


def _widest(base: Checkpoint, experts: Sequence[MoeExpert]) -> torch.dtype:
    """The type that holds every tensor of base and experts without loss."""
    kinds = [ref.dtype for ref in base.tensors.values() if ref.dtype.is_floating_point]
    kinds += [expert.dtype(matrix) for expert in experts for matrix in expert.matrices]
    return reduce(torch.promote_types, kinds)


def _check_reach(router: Router, first: int, keep_base: bool) -> None:
    layers = router.embedder_identity.get("layers", 0)
    if router.embedder_name == "base" and layers > first and not keep_base:
        raise RouterError(
            f"the router reads the base's bottom {layers} layers, but the experts begin at layer {first} and the "
            f"base's FFNs there would be gone: add --keep-base, or train experts with first_layer={layers}"
        )


def _moe_config(path: Path, router: Router, first: int, keep_base: bool, dtype: torch.dtype) -> LexiconMoeConfig:
    base = LlamaConfig.from_pretrained(path).to_dict()
    own = {key: value for key, value in base.items() if key not in ("model_type", "architectures", "dtype")}
    return LexiconMoeConfig(
        **own,
        architectures=["LexiconMoeForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
        num_local_experts=len(router.names) + keep_base,
        first_layer=first,
        keep_base=keep_base,
        expert_names=list(router.names),
    )


def _record(
    base: str,
    identity: str,
    experts: Sequence[MoeExpert],
    router: Router,
    first: int,
    keep_base: bool,
    dtype: torch.dtype,
    total: int,
) -> dict[str, Any]:
    """`moe.json`: what the MoE was made of."""
    return {
        "base": {"name": base, "fingerprint": identity},
        "experts": [
            {
                "name": expert.name,
                "kind": "ffn" if expert.ffn is not None else "lora",
                "sha256": sha256_of(expert.path / (FFN if expert.ffn is not None else WEIGHTS)),
                "record": asdict(expert.info) if expert.info else {},
            }
            for expert in experts
        ],
        "router": {"embedder": router.embedder_name, "top_k": router.top_k, "domains": list(router.names)},
        "first_layer": first,
        "keep_base": keep_base,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": total,
        "trained_parameters": sum(expert.trained_parameters for expert in experts),
        "made_by": f"lora-lexicon {__version__}",
        "versions": {"torch": torch.__version__},
    }


def _card(name: str, record: dict[str, Any]) -> str:
    kept = "kept as one more expert" if record["keep_base"] else "not kept"
    rows = "\n".join(f"| {e['name']} | {e['kind']} | `{e['sha256'][:16]}` |" for e in record["experts"])
    base = record["base"]
    return f"""---
library_name: transformers
tags: [lora-lexicon, mixture-of-experts, definition-modelling]
---
# {name}

A mixture of domain experts for definition modelling. One expert writes a whole definition; the router
beside the weights (`router.json`, `router.safetensors`) chooses it from the prompt.

Base: {json.dumps(base["name"])}, fingerprint `{base["fingerprint"][:16]}`.
Experts begin at layer {record["first_layer"]}; the base's own FFN is {kept}. Made by {record["made_by"]}.

| expert | kind | SHA-256 of its weights |
|---|---|---|
{rows}

```python
import lora_lexicon.compose.moe  # registers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```
"""
