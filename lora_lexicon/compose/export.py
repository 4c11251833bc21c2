"""A MoE as a standard Mixtral checkpoint, which transformers and others load without a line of ours.

Mixtral chooses experts anew for each token and layer, by a softmax of a linear gate, where ours chooses once for a
whole prompt. The gates are fitted to that choice: a logistic regression, in each layer, from the states that enter its
FFN to the domain of the prompt they belong to. Its softmax is the gate's own, so that scale and mixing weights are
those of greatest likelihood, and need no temperature; it has no intercept, because the gate has none. On the tiny base
and 200 held-out entries its first choice was the router's for 0.60 and 0.64 (layers 4 and 5) of the tokens of
definitions, that of plain means for 0.44 and 0.44, of centred means of unit length for 0.42 and 0.42.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig

from lora_lexicon import __version__
from lora_lexicon.compose.collapse import MoeFiles, rope_of_old
from lora_lexicon.compose.merge import SPARE_BYTES, check_written, copy_companions, widest
from lora_lexicon.compose.probes import probe_entries
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.domains.embed import FIT_BATCH, by_length
from lora_lexicon.errors import PackError, RecipeError
from lora_lexicon.experts.base import DTYPES, contents_hash
from lora_lexicon.experts.tensors import SHARD_BYTES, Checkpoint, TensorPlan, torch_dtype, write_checkpoint
from lora_lexicon.folders import new_folder, read_record, write_record

EXPORT_RECORD = "export.json"
UNKNOWN_TO_MIXTRAL = ("attention_bias", "mlp_bias")  # Llama's settings that change what is computed
W = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's name on disk, ours
FIT_ENTRIES = 512
HELD_OUT_ENTRIES = 128
INVERSE_PENALTY = 0.1  # scikit-learn's C, for states of mean square 1
ITERATIONS = 200


@dataclass(frozen=True)
class States:
    """What enters the expert layers' FFNs over the tokens of some entries, each routed to one domain.

    Attributes:
        layers: {layer: (tokens, H) float32}.
        domains: (tokens,) the domain of the prompt that a token belongs to, or follows.
        written: (tokens,) whether the token belongs to the definition, which experts write, not to the prompt.
    """

    layers: dict[int, Tensor]
    domains: NDArray[np.int64]
    written: NDArray[np.bool_]


def export_mixtral(
    moe: Path,
    out: Path,
    *,
    top_k: int = 2,
    data: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a Mixtral checkpoint of a MoE's domain experts, with its tokenizer; returns the record.

    A layer without experts repeats its FFN for every expert under a gate of zeros: all weights are then equal, so that
    it computes what it did. A base that the MoE kept is left out: a gate cannot abstain.

    Args:
        top_k: experts a token is sent to.
        data: an entries folder; the gates are fitted on its train entries, and measured on its test entries. By default
            the sample that ships.
        dtype: of all tensors; by default the MoE's own.
        progress: called with (bytes just written, bytes in all).

    Raises:
        LexiconError: no MoE, a setting that Mixtral cannot express, entries that leave a domain out, a full disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    files = MoeFiles.open(moe)
    names = files.experts[:-1] if files.config.get("keep_base") else files.experts
    if not 1 <= top_k <= len(names):
        raise RecipeError(f"top-k is {top_k}; {moe} has {len(names)} experts to choose among")
    views = [files.expert(name) for name in names]
    kind = dtype or widest(files.weights, [])
    config = mixtral_config(files, len(names), top_k, kind)
    gates, agreement = _fit(files, names, data)
    plans = _plan(config, views, gates, kind)
    total = sum(plan.bytes for plan in plans)
    with new_folder(out, replace=overwrite, needs=total + SPARE_BYTES) as folder:
        report = None if progress is None else lambda done: progress(done, total)
        write_checkpoint(folder, plans, max_shard_bytes=max_shard_bytes, progress=report)
        check_written(folder, plans)
        config.save_pretrained(folder)
        written = read_record(folder / "config.json", PackError, "a Mixtral")
        write_record(folder / "config.json", {**written, **rope_of_old(written)})
        copy_companions(moe, folder)
        record = {
            "to": "mixtral",
            "from": {"name": moe.resolve().name, "fingerprint": contents_hash(files.weights)},
            "experts": list(names),
            "top_k": top_k,
            "gates": agreement,
            "repeated_layers": [i for i in range(config.num_hidden_layers) if i not in files.layers],
            "dtype": kind,
            "bytes": total,
            "made_by": f"lora-lexicon {__version__}",
            "versions": {"torch": torch.__version__},
        }
        write_record(folder / EXPORT_RECORD, record)
        (folder / "README.md").write_text(_card(out.name, record), encoding="utf-8")
    return record


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


def fit_gate(states: Tensor, domains: NDArray[np.int64], count: int) -> Tensor:
    """The weights (count, H) of a gate whose softmax over `states` (n, H) is nearest to `domains` (n,), 0 to count - 1.

    Every domain weighs the same, however many tokens it has.
    """
    if count == 1:
        return torch.zeros(1, states.shape[1])
    size = float(states.square().mean().sqrt())
    regression = LogisticRegression(
        C=INVERSE_PENALTY, fit_intercept=False, class_weight="balanced", max_iter=ITERATIONS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a gate decide nothing
        regression.fit((states / size).numpy(), domains)
    weights = torch.from_numpy(np.asarray(regression.coef_)).float() / size
    return torch.cat([-weights / 2, weights / 2]) if count == 2 else weights  # of two, it gives the difference


def _fit(moe: MoeFiles, names: tuple[str, ...], data: Path | None) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """(the gate of each expert layer, how often its first choice is the router's)."""
    system = load_system(str(moe.path), dtype=str(moe.config.get("dtype") or "float32"))
    seen = collect_states(system, probe_entries(data, "train", FIT_ENTRIES), moe.layers)
    unseen = [name for i, name in enumerate(names) if i not in seen.domains]
    if unseen:
        raise PackError(
            f"no entry of {data or 'the sample that ships'} is routed to {', '.join(unseen)}, so that there is nothing "
            "to fit a gate on: give --data with entries of every domain"
        )
    gates = {layer: fit_gate(states, seen.domains, len(names)) for layer, states in seen.layers.items()}
    del seen
    held_out = collect_states(system, probe_entries(data, "test", HELD_OUT_ENTRIES), moe.layers)
    layers = {}
    for layer, gate in gates.items():
        right = (held_out.layers[layer] @ gate.T).argmax(dim=1).numpy() == held_out.domains
        layers[str(layer)] = {
            "prompt": float(right[~held_out.written].mean()),
            "definition": float(right[held_out.written].mean()),
        }
    chance = float(np.bincount(held_out.domains).max() / len(held_out.domains))
    return gates, {"agreement": layers, "chance": chance, "tokens": len(held_out.domains)}


@torch.inference_mode()
def collect_states(system: System, entries: Sequence[Entry], layers: Sequence[int]) -> States:
    """Runs a MoE over the training rows of entries, each by its prompt's expert; those it abstains on are left out."""
    routing = system.route([(entry.term, entry.context) for entry in entries])
    assert routing is not None, "a MoE has a router"
    rows = [system.encoder.row(entry.term, entry.context, entry.definition) for entry in entries]
    caught: dict[int, Tensor] = {}
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    domains, written = [], []

    def catch(layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        caught[layer] = output

    blocks = cast(Any, system.model).model.layers
    hooks = [blocks[i].post_attention_layernorm.register_forward_hook(partial(catch, i)) for i in layers]
    try:
        for batch in by_length([ids for ids, _ in rows], FIT_BATCH):
            batch = [i for i in batch if routing.top[i] >= 0]
            if not batch:
                continue
            ids = torch.tensor([rows[i][0] for i in batch], device=system.model.device)
            with system.routed(torch.from_numpy(routing.weights[batch]).to(ids.device)):
                cast(Any, system.model).model(ids, use_cache=False)
            for layer, found in states.items():
                found.append(caught[layer].float().cpu().flatten(0, 1))
            length = ids.shape[1]
            domains.append(np.repeat(routing.top[batch], length))
            written += [np.arange(length) >= rows[i][1] for i in batch]
    finally:
        for hook in hooks:
            hook.remove()
    if not domains:
        raise PackError(
            "the router abstains on every entry, so that there is nothing to fit gates on: give other --data"
        )
    return States({k: torch.cat(v) for k, v in states.items()}, np.concatenate(domains), np.concatenate(written))


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
        plans.append(TensorPlan(f"{prefix}.gate.weight", tuple(gate.shape), dtype, [partial(_one, gate)]))
        for j, view in enumerate(views):
            for short, ours in W.items():
                name = f"model.layers.{layer}.mlp.{ours}.weight"
                shape, piece = view.ref(name).shape, view.piece(name, dtype)
                plans.append(TensorPlan(f"{prefix}.experts.{j}.{short}.weight", shape, dtype, [piece]))
    return plans


def _one(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _card(name: str, record: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {layer} | {found['prompt']:.2f} | {found['definition']:.2f} |"
        for layer, found in record["gates"]["agreement"].items()
    )
    return f"""---
library_name: transformers
tags: [lora-lexicon, mixture-of-experts, mixtral, definition-modelling]
---
# {name}

{json.dumps(record["from"]["name"])} as a standard Mixtral: experts {", ".join(record["experts"])}; {record["top_k"]} a
token, in {record["dtype"]}. Made by {record["made_by"]}.

The model it comes from chooses one expert for a whole prompt; this one chooses for each token and layer, by gates that
were fitted to that choice and not trained further. How often a gate's first choice is the expert that the router gave
the prompt, over {record["gates"]["tokens"]:,} tokens of held-out entries (the most frequent expert has
{record["gates"]["chance"]:.2f} of them):

| layer | tokens of prompts | tokens of definitions |
|---:|---:|---:|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```
"""
