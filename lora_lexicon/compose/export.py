"""A MoE as a standard Mixtral checkpoint, which transformers and others load without a line of ours.

Mixtral chooses experts anew for each token and layer, by a linear gate, where ours chooses once for a whole prompt: the
gates are fitted to that choice (`gates`).
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from lora_lexicon.compose.collapse import MoeFiles
from lora_lexicon.compose.gates import fit_gates
from lora_lexicon.compose.merge import MOE_RECORD, usage, widest
from lora_lexicon.compose.policy import GATE
from lora_lexicon.compose.standard import EXPORT_RECORD, record_of, rope_of_old, write_model
from lora_lexicon.errors import PackError, RecipeError
from lora_lexicon.experts.base import DTYPES, contents_hash
from lora_lexicon.experts.tensors import SHARD_BYTES, Checkpoint, TensorPlan, torch_dtype, whole

UNKNOWN_TO_MIXTRAL = ("attention_bias", "mlp_bias")  # Llama's settings that change what is computed
W = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's name on disk, ours


def export_mixtral(
    moe: Path,
    out: Path,
    *,
    top_k: int | None = None,
    data: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a Mixtral checkpoint of a MoE's domain experts, with its tokenizer; returns the record.

    A layer without experts repeats its FFN for every expert under a gate of zeros: all weights are then equal, so that
    it computes what it did. A base that the MoE kept is left out: a gate cannot abstain. The gates of a MoE that routes
    tokens are its own; for any other they are fitted to its router.

    Args:
        top_k: experts a token is sent to; by default what the MoE's own gates choose, else 2.
        data: an entries folder; gates are fitted on its train entries, and measured on its test entries. By default
            the sample that ships.
        dtype: of all tensors; by default the MoE's own.
        progress: called with (bytes just written, bytes in all).

    Raises:
        LexiconError: no MoE, a setting that Mixtral cannot express, entries that leave a domain out, a full disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    files = MoeFiles.open(moe)
    names = files.domains
    policy, record = files.policy, record_of(moe, MOE_RECORD)
    top_k = top_k or (policy.top_k if policy.level == "token" else None) or min(2, len(names))
    if not 1 <= top_k <= len(names):
        raise RecipeError(f"top-k is {top_k}; {moe} has {len(names)} experts to choose among")
    views = [files.expert(name) for name in names]
    kind = dtype or widest(files.weights, [])
    config = mixtral_config(files, len(names), top_k, kind)
    if policy.level == "token":
        own = {layer: files.weights.tensor(f"model.layers.{layer}{GATE}", "float32") for layer in files.layers}
        gates, agreement = own, None
    else:
        gates, agreement = fit_gates(moe, files.layers, names, data)
    plans = _plan(config, views, gates, kind)
    written = json.loads(config.to_json_string())
    facts = {
        "to": "mixtral",
        "template": record.get("template") or {},
        "from": {"name": moe.resolve().name, "fingerprint": contents_hash(files.weights)},
        "experts": list(names),
        "top_k": top_k,
        "trained_parameters": record.get("trained_parameters", 0),
        "gates": agreement,
        "repeated_layers": [i for i in range(config.num_hidden_layers) if i not in files.layers],
    }
    return write_model(
        out,
        plans,
        {**written, **rope_of_old(written)},
        moe,
        EXPORT_RECORD,
        facts,
        _card,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def mixtral_config(moe: MoeFiles, experts: int, top_k: int, dtype: str) -> MixtralConfig:
    """The MoE's Llama settings as a Mixtral's.

    Raises:
        PackError: a setting that changes what is computed, and that Mixtral does not have.
    """
    own = LlamaConfig.from_dict(moe.llama_config()).to_dict()
    for key in UNKNOWN_TO_MIXTRAL:
        if own.get(key):
            raise PackError(f"{moe.path} sets {key} = {own[key]!r}, and Mixtral has no {key}: it cannot be exported so")
    shared = {key: own[key] for key in MixtralConfig().to_dict() if key in own and key not in ("model_type", "dtype")}
    return MixtralConfig(
        **{**shared, "architectures": ["MixtralForCausalLM"]},
        dtype=dtype,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,  # a Llama attends to everything
    )


def _plan(config: MixtralConfig, views: Sequence[Checkpoint], gates: dict[int, Tensor], dtype: str) -> list[TensorPlan]:
    """Every tensor of the Mixtral, in the names that its files have had since the first."""
    plans = [
        TensorPlan(name, ref.shape, dtype, [views[0].piece(name, dtype)])
        for name, ref in views[0].tensors.items()
        if ".mlp." not in name and not name.endswith("rotary_emb.inv_freq")  # old files hold it; it is computed
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        gate = gates.get(layer, torch.zeros(len(views), config.hidden_size)).to(torch_dtype(dtype))
        plans.append(TensorPlan(f"{prefix}.gate.weight", tuple(gate.shape), dtype, [partial(whole, gate)]))
        for j, view in enumerate(views):
            for short, ours in W.items():
                name = f"model.layers.{layer}.mlp.{ours}.weight"
                shape, piece = view.ref(name).shape, view.piece(name, dtype)
                plans.append(TensorPlan(f"{prefix}.experts.{j}.{short}.weight", shape, dtype, [piece]))
    return plans


def _card(name: str, record: dict[str, Any]) -> str:
    return f"""---
library_name: transformers
tags: [lora-lexicon, mixture-of-experts, mixtral, definition-modelling]
---
# {name}

{json.dumps(record["from"]["name"])} as a standard Mixtral: experts {", ".join(record["experts"])}; {record["top_k"]} a
token, in {record["dtype"]}. Made by {record["made_by"]}.

{_gates(record["gates"])}

{usage(name, record["template"])}"""


def _gates(fitted: dict[str, Any] | None) -> str:
    """Where the gates come from."""
    if fitted is None:
        return "Its gates are those of the model it comes from, which chooses experts for each token too."
    rows = "\n".join(
        f"| {layer} | {found['prompt']:.2f} | {found['definition']:.2f} |"
        for layer, found in fitted["agreement"].items()
    )
    return f"""The model it comes from chooses experts for a whole prompt; this one chooses for each token and layer, by
gates that were fitted to the router's choice and not trained further. How often a gate's first choice is the expert
that the router gave the prompt, over {fitted["tokens"]:,} tokens of held-out entries (the most frequent expert has
{fitted["chance"]:.2f} of them):

| layer | tokens of prompts | tokens of definitions |
|---:|---:|---:|
{rows}"""
