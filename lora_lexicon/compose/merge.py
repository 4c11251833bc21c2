"""Base, experts and router to one MoE checkpoint. Knows files and tensors; no model is ever built.

The merge is a plan made from the files' headers: each tensor of the result is a list of pieces. A piece that
nothing changes is copied by the system; what is merged, averaged or cast moves in chunks, in float32. So memory
does not grow with the model. What no expert trained is the base's own, so the average of the rest (algorithm 1 of
the LM-Lexicon paper) is exact without computing it.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lexicon import __version__
from lora_lexicon.compose.policy import DOMAIN, GATE, MOE_TYPE, Level, parse_policy
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, average, is_expert, open_expert
from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import ExpertError, PackError, RecipeError, RouterError
from lora_lexicon.experts.base import DTYPES, EXPERT_FFN, base_folder
from lora_lexicon.experts.shape import parse_layers
from lora_lexicon.experts.tensors import (
    ITEM_BYTES,
    SHARD_BYTES,
    Checkpoint,
    TensorPlan,
    overwrite,
    promoted,
    torch_dtype,
    write_checkpoint,
)
from lora_lexicon.folders import new_folder, write_record

MOE_RECORD = "moe.json"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SPARE_BYTES = 64 * 2**20  # for what lies beside the weights
VERIFIED_PARAMETERS = 10**9  # a MoE up to this size is loaded and compared with its experts unless told not to
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


def expert_folders(paths: Sequence[Path]) -> list[Path]:
    """The expert folders named by `paths`: each is one, or holds several.

    Raises:
        ExpertError: a path is neither.
    """
    found = []
    for path in paths:
        here = [path] if is_expert(path) else sorted(p for p in path.glob("[!.]*") if is_expert(p))
        if not here:
            raise ExpertError(
                f"{path} is neither an expert nor a folder of experts: give what `train` wrote, or a PEFT adapter"
            )
        found += here
    return found


def match_experts(names: Sequence[str], domains: Sequence[str]) -> None:
    """Refuses experts whose names are not the router's domains, one for one."""
    double = sorted({name for name in names if names.count(name) > 1})
    missing, extra = sorted(set(domains) - set(names)), sorted(set(names) - set(domains))
    if double or missing or extra:
        said = [f"{what}: {', '.join(which)}" for what, which in
                (("given twice", double), ("domains without an expert", missing), ("experts without a domain", extra))
                if which]  # fmt: skip
        advice = "name the experts one by one, exactly one for each domain"
        if missing and not double and not extra:
            advice = f"train what is missing, with `train --domain {missing[0]}`"
        raise PackError(
            f"the router's domains ({', '.join(domains)}) and the experts ({', '.join(sorted(names))}) differ; "
            f"{'; '.join(said)}: {advice}"
        )


def check_router_base(router: Router, identity: str, base: str) -> None:
    """Refuses a router whose `base` embedder reads another base."""
    own = router.embedder_identity.get("base")
    if router.embedder_name == "base" and own != identity:
        raise RouterError(
            f"the router reads base {str(own)[:12]}, but {base!r} is {identity[:12]}: fit the domains on this base"
        )


def trained_layers(experts: Sequence[ExpertSource], count: int) -> list[int]:
    """Every layer from the first one on in which some expert trained an FFN."""
    trained = [int(m["layer"]) for e in experts for name in e.changed if (m := EXPERT_FFN.fullmatch(name))]
    if not trained:
        raise ExpertError("no expert trained an FFN, which is what a MoE has experts in: use `compose adapters`")
    return list(range(min(trained), count))


def plan_moe(
    base: Checkpoint,
    experts: Sequence[ExpertSource],
    layers: Sequence[int],
    *,
    keep_base: bool,
    gates: bool,
    dtype: str,
) -> tuple[list[TensorPlan], list[str]]:
    """(every tensor of the MoE in order, the names of those that are averages)."""
    ffns = {f"model.layers.{i}.mlp.{p}.weight" for i in layers for p in PROJECTIONS}
    changed = {name for expert in experts for name in expert.changed}
    plans, averaged = [], []
    for name, ref in base.tensors.items():
        if name in ffns or name.endswith("rotary_emb.inv_freq"):  # old files hold it; it is computed
            continue
        if name in changed:
            averaged.append(name)
            plans.append(TensorPlan(name, ref.shape, dtype, [partial(average, name, experts, base, dtype)]))
        else:
            plans.append(TensorPlan(name, ref.shape, dtype, [base.piece(name, dtype)]))
    for i in layers:
        gate, up, down = (f"model.layers.{i}.mlp.{p}.weight" for p in PROJECTIONS)
        inner, hidden = base.ref(gate).shape
        stacked = {"gate_up_proj": ((gate, up), (2 * inner, hidden)), "down_proj": ((down,), (hidden, inner))}
        for kind, (names, shape) in stacked.items():
            pieces = [expert.piece(name, base, dtype) for expert in experts for name in names]
            if keep_base:
                pieces += [base.piece(name, dtype) for name in names]
            count = len(experts) + keep_base
            plans.append(TensorPlan(f"model.layers.{i}.mlp.experts.{kind}", (count, *shape), dtype, pieces))
        if gates:  # fitted when the rest is there to run
            gate = (len(experts), hidden)
            plans.append(TensorPlan(f"model.layers.{i}{GATE}", gate, dtype, [partial(_zeros, gate, dtype)]))
    return plans, averaged


def compose_moe(
    base: str,
    experts: Sequence[Path],
    domains: Path,
    out: Path,
    *,
    layers: str | None = None,
    average_rest: bool = False,
    keep_base: bool = False,
    routing: str = DOMAIN,
    data: Path | None = None,
    dtype: str | None = None,
    verify: bool | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a MoE checkpoint with its router, tokenizer and record; returns the record.

    Args:
        base: a folder, a Hub name or a shipped pack's name.
        experts: expert folders, one for each domain of the router: FFN experts, LoRA experts, plain PEFT adapters,
            whole Llamas trained on the same base, also mixed.
        domains: the folder with the router.
        layers: those that get experts, such as `4-6,9`; by default every one from the first trained FFN on.
        average_rest: what experts trained elsewhere is averaged over all of them (algorithm 1 of the paper).
        keep_base: the base's FFNs become one more expert, which answers where the router abstains.
        routing: the policy by which experts are chosen (see `compose.policy`). Gates, where it has any, are fitted to
            the router's choices; `train router` trains them further.
        data: an entries folder to fit gates on; by default the sample that ships.
        dtype: of all tensors; by default the widest among base and full experts, which loses nothing but what a
            merged adapter's sum is rounded by.
        verify: the result is loaded and its logits are compared with each expert's before it gets its name; by
            default up to `VERIFIED_PARAMETERS`.
        progress: called with (bytes just written, bytes in all).

    Raises:
        LexiconError: parts that do not fit each other, a damaged file, a full disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    own, router = BaseFiles.open(base, base_folder(base)), load_router(domains)
    if own.config.get("mlp_bias"):
        raise ExpertError(f"base {base!r} has mlp_bias, which transformers' experts lack: use `compose adapters`")
    check_router_base(router, own.fingerprint, base)
    ordered = _open_all(experts, router, own)
    policy = parse_policy(routing, len(ordered))
    if data is not None and not policy.gated:
        raise RecipeError(f"--data is what gates are fitted on, and the routing {routing!r} has none: leave it away")
    kind = dtype or widest(own.weights, ordered)
    chosen = parse_layers(layers, own.layers) if layers else trained_layers(ordered, own.layers)
    plans, averaged = plan_moe(own.weights, ordered, chosen, keep_base=keep_base, gates=policy.gated, dtype=kind)
    _check_rest(ordered, averaged, average_rest, keep_base)
    _check_reach(router, chosen[0], keep_base, averaged)
    total = sum(plan.bytes for plan in plans)
    if verify is None:
        verify = total // ITEM_BYTES[kind] <= VERIFIED_PARAMETERS
    with new_folder(out, replace=overwrite, needs=total + SPARE_BYTES) as folder:
        report = None if progress is None else lambda done: progress(done, total)
        write_checkpoint(folder, plans, max_shard_bytes=max_shard_bytes, progress=report)
        write_record(folder / "config.json", _moe_config(own, router, chosen, keep_base, routing, kind))
        copy_companions(own.path, folder)
        router.save(folder)
        record = {
            "base": {"name": base, "fingerprint": own.fingerprint},
            "experts": [expert_record(expert) for expert in ordered],
            "router": {"embedder": router.embedder_name, "top_k": router.top_k, "domains": list(router.names)},
            "template": vars(router.template),
            "routing": routing,
            "gates": None,
            "expert_layers": chosen,
            "averaged": averaged,
            "keep_base": keep_base,
            "dtype": kind,
            "bytes": total,
            "trained_parameters": sum(expert.trained_parameters for expert in ordered),
            "made_by": f"lora-lexicon {__version__}",
            "versions": {"torch": version("torch")},
            "verified": None,
        }
        check_written(folder, plans)
        if policy.gated:
            record["gates"] = _put_gates(folder, record, data, policy.level)
        if verify:
            from lora_lexicon.compose.verify import verify_moe

            exact = not averaged and promoted([kind, *originals(own.weights, ordered)]) == kind
            record["verified"] = verify_moe(folder, own, ordered, router, exact=exact)
        write_record(folder / MOE_RECORD, record)
        (folder / "README.md").write_text(moe_card(out.name, record), encoding="utf-8")
    return record


def _put_gates(folder: Path, record: dict[str, Any], data: Path | None, level: Level) -> dict[str, Any]:
    """Fits the gates of a MoE that is written but for them; returns how often they choose as the router does."""
    from lora_lexicon.compose.gates import fit_gates

    write_record(folder / MOE_RECORD, record)
    gates, agreement = fit_gates(folder, record["expert_layers"], record["router"]["domains"], data, level)
    weights = Checkpoint(folder)
    for layer, gate in gates.items():
        ref = weights.ref(f"model.layers.{layer}{GATE}")
        overwrite(ref, gate.to(torch_dtype(ref.dtype)))
    return agreement


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the tokenizer and what else lies beside a checkpoint's weights and config."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def check_written(folder: Path, plans: Sequence[TensorPlan]) -> None:
    """Reads the headers back: what lies on the disk is what was planned."""
    written = {name: (ref.shape, ref.dtype) for name, ref in Checkpoint(folder).tensors.items()}
    if written != {plan.name: (plan.shape, plan.dtype) for plan in plans}:
        raise ExpertError(f"{folder}: what was written is not what was planned: check the disk and compose again")


def _zeros(shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
    import torch

    yield torch.zeros(shape, dtype=torch_dtype(dtype))


def originals(base: Checkpoint, experts: Sequence[ExpertSource]) -> list[str]:
    """The types in which the parts hold their numbers; what a merged adapter sums needs float32."""
    merged = ["float32"] if any(expert.kind == "lora" for expert in experts) else []
    parts = [base, *(expert.weights for expert in experts if expert.kind != "lora")]
    return [*merged, *{ref.dtype for part in parts for ref in part.tensors.values()}]


def _open_all(paths: Sequence[Path], router: Router, base: BaseFiles) -> list[ExpertSource]:
    """The experts in the order of the router's domains."""
    experts = [open_expert(path, base) for path in paths]
    match_experts([expert.name for expert in experts], router.names)
    by_name = {expert.name: expert for expert in experts}
    return [by_name[name] for name in router.names]


def widest(base: Checkpoint, experts: Sequence[ExpertSource]) -> str:
    """The type that holds every tensor of base and full experts without loss. Refuses experts in different types."""
    held: dict[str, tuple[ExpertSource, str]] = {}
    for expert in experts:
        for tensor in sorted(expert.changed) if expert.kind != "lora" else ():
            held.setdefault(expert.weights.ref(tensor).dtype, (expert, tensor))
    if len(held) > 1:
        said = " and ".join(f"{tensor} is {dtype} in {expert.weights.path}" for dtype, (expert, tensor) in held.items())
        raise ExpertError(f"experts are held in different types: {said}; choose one with --dtype")
    return promoted([*(ref.dtype for ref in base.tensors.values()), *held])


def _check_rest(experts: Sequence[ExpertSource], averaged: list[str], average_rest: bool, keep_base: bool) -> None:
    if not averaged:
        return
    name = averaged[0]
    expert = next(expert for expert in experts if name in expert.changed)
    if not average_rest:
        raise ExpertError(
            f"expert {expert.name!r}: {expert.path} trains {name}, and no layer of the MoE has experts there: "
            "add --average-rest (algorithm 1 of the paper), or use `compose adapters`"
        )
    if keep_base:
        raise ExpertError(f"{name} would be an average, so that the kept base would not be the base: no --keep-base")


def _check_reach(router: Router, first: int, keep_base: bool, averaged: Sequence[str]) -> None:
    """Refuses a `base` router that reads what the MoE does not hold as the base does."""
    if router.embedder_name != "base":
        return
    layers = router.embedder_identity.get("layers", 0)
    if layers > first and not keep_base:
        raise RouterError(
            f"the router reads the base's bottom {layers} layers, but the experts begin at layer {first} and the "
            f"base's FFNs there would be gone: add --keep-base, or train experts with first_layer={layers}"
        )
    for name in averaged:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if name == "model.embed_tokens.weight" or (match and int(match[1]) < layers):
            raise RouterError(
                f"the router reads the base's bottom {layers} layers, but {name} there would be an average: "
                f"fit the domains with another embedder, or train experts with first_layer={layers}"
            )


def _moe_config(
    base: BaseFiles, router: Router, layers: list[int], keep_base: bool, routing: str, dtype: str
) -> dict[str, Any]:
    """The base's config.json and what `LexiconMoeConfig` adds to it."""
    return {
        **{key: value for key, value in base.config.items() if key not in ("torch_dtype", "quantization_config")},
        "model_type": MOE_TYPE,
        "architectures": ["LexiconMoeForCausalLM"],
        "dtype": dtype,
        "num_local_experts": len(router.names) + keep_base,
        "expert_layers": layers,
        "keep_base": keep_base,
        "expert_names": list(router.names),
        "routing": routing,
    }


def expert_record(expert: ExpertSource) -> dict[str, Any]:
    """What a MoE's record says of one expert."""
    return {
        "name": expert.name,
        "kind": expert.kind,
        "fingerprint": expert.fingerprint(),
        "record": asdict(expert.info) if expert.info else {},
    }


_BESIDE = "the router beside the weights (`router.json`, `router.safetensors`)"
_ROUTED = {
    "domain": f"One choice of experts writes a whole definition; {_BESIDE}\nmakes it from the prompt.",
    "sequence": f"A gate in each layer chooses experts once, from the prompt; {_BESIDE}\nis what they learned from.",
    "token": f"A gate in each layer chooses experts for each token; {_BESIDE}\nis what they learned from.",
}


def moe_card(name: str, record: dict[str, Any]) -> str:
    kept = "kept as one more expert" if record["keep_base"] else "not kept"
    verified = record["verified"]
    compared_with = verified["differences"] if verified else {}
    rows = "\n".join(
        f"| {e['name']} | {e['kind']} | `{e['fingerprint'][:16]}` | "
        f"{format(compared_with[e['name']], '.2g') if e['name'] in compared_with else 'not compared'} |"
        for e in record["experts"]
    )
    compared = (
        f"\nThe last column is over {verified['prompts']} prompts, in float32; the largest logit there is "
        f"{verified['largest_logit']:.1f}.\n"
        if verified
        else ""
    )
    level = parse_policy(record["routing"], len(record["experts"])).level
    base, count = record["base"], len(record["averaged"])
    rest = f"{count} other tensors are averages over the experts" if count else "all else is the base's"
    return f"""---
library_name: transformers
tags: [lora-lexicon, mixture-of-experts, definition-modelling]
---
# {name}

A mixture of domain experts for definition modelling. {_ROUTED[level]}

Base: {json.dumps(base["name"])}, fingerprint `{base["fingerprint"][:16]}`.
Layers with experts (the first is 0): {", ".join(map(str, record["expert_layers"]))}; the base's own FFN is {kept};
{rest}.
Routing: {record["routing"]}. Made by {record["made_by"]}.

| expert | kind | fingerprint | largest difference of a logit from the expert alone |
|---|---|---|---|
{rows}
{compared}
{usage(name, record.get("template") or {}, "import lora_lexicon.compose.moe  # registers the model type")}"""


def usage(name: str, template: dict[str, str], first: str = "") -> str:
    """The part of a card that says how transformers loads the model of this name and asks it for a definition.

    Args:
        template: the fields of a `PromptTemplate`, that of the prompts its experts were trained on.
        first: a line of code that comes first.
    """
    prompt = PromptTemplate(**template).text("glacial", "a glacial wind swept the valley")
    code = "\n".join(filter(None, (first, "from transformers import AutoModelForCausalLM, AutoTokenizer")))
    return f"""```python
{code}

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
prompt = {prompt!r}
text = (tokenizer.bos_token or "") + prompt + tokenizer.eos_token
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=48)[0, ids.shape[1] :], skip_special_tokens=True))
```
"""
