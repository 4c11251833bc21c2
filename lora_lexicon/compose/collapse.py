"""One expert of a composed model as a plain dense Llama. Knows files and tensors; no model is ever built.

Out of a MoE an expert's matrices are ranges of bytes, which the system copies; an adapter is merged in float32.
"""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from lora_lexicon.compose.merge import MOE_RECORD, usage, widest
from lora_lexicon.compose.mixture import MANIFEST, base_of, check_files, read_manifest
from lora_lexicon.compose.policy import DOMAIN, GATE, MOE_TYPE, Policy, parse_policy
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, is_expert, open_expert
from lora_lexicon.compose.standard import COLLAPSE_RECORD, record_of, rope_of_old, write_model
from lora_lexicon.domains.router import load_router
from lora_lexicon.errors import ExpertError, PackError, RecipeError
from lora_lexicon.experts.base import DTYPES, base_folder, check_tensors, contents_hash
from lora_lexicon.experts.checkpoint import RECORD, read_expert
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.experts.tensors import ITEM_BYTES, SHARD_BYTES, Checkpoint, Piece, TensorPlan, TensorRef
from lora_lexicon.folders import read_record
from lora_lexicon.recipe import FFN_MODULES

PLACES = ("fused_experts", "expert_slots")  # where experts lie that joined later; else they are not there
MOE_KEYS = ("num_local_experts", "expert_layers", "keep_base", "expert_names", "routing", *PLACES)
BASE = "base"  # names the base's own FFN beside the experts
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # an expert's tensors, fused as transformers has them


@dataclass(frozen=True)
class MoeFiles:
    """A MoE on disk, its tensors not read yet.

    Attributes:
        config: as `config.json` has it.
        experts: the names of its expert FFNs in their order; the last is `base` where the base's own is kept.
        layers: those that have experts.
        fused: how many FFNs lie in each fused tensor: those it was composed with.
        slots: where each of `experts` lies: below `fused` in the fused tensors, else in tensors of that number, which
            joined later.
    """

    path: Path
    config: dict[str, Any]
    weights: Checkpoint
    experts: tuple[str, ...]
    layers: tuple[int, ...]
    fused: int
    slots: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> "MoeFiles":
        """The MoE in the folder `path`.

        Raises:
            PackError: no such MoE, or one whose parts do not fit.
        """
        moe = cls.unchecked(path)
        check_tensors(moe.weights, moe.shapes(), PackError)
        return moe

    @classmethod
    def unchecked(cls, path: Path) -> "MoeFiles":
        """The same, its tensors not compared with what its config.json says.

        Raises:
            PackError: no such MoE, or a damaged file.
        """
        if (path / MANIFEST).is_file():
            raise PackError(f"{path} is a pack of adapters; a MoE made by `compose moe` is needed")
        config = read_record(path / "config.json", PackError, "a MoE made by `compose moe`")
        if config.get("model_type") != MOE_TYPE:
            raise PackError(
                f"{path} has model_type {config.get('model_type')!r}; a MoE made by `compose moe` is needed"
            )
        _check_config(path / "config.json", config)
        layers = config.get("expert_layers")
        layers = range(config.get("num_hidden_layers", 0)) if layers is None else layers
        names = [*(config.get("expert_names") or ()), *([BASE] if config.get("keep_base") else [])]
        slots = tuple(config.get("expert_slots") or range(len(names)))
        fused = config.get("fused_experts") or len(names)
        moe = cls(path, config, Checkpoint(path, PackError), tuple(names), tuple(layers), fused, slots)
        if not names or len(set(names)) != len(names):
            raise PackError(f"{path / 'config.json'} names the experts {', '.join(names)}: compose the MoE again")
        return moe

    @property
    def domains(self) -> tuple[str, ...]:
        """The experts that a router or gate chooses among."""
        return self.experts[:-1] if self.config.get("keep_base") else self.experts

    @property
    def policy(self) -> Policy:
        """How experts are chosen.

        Raises:
            PackError: `config.json` names no policy.
        """
        try:
            return parse_policy(str(self.config.get("routing", DOMAIN)), len(self.domains))
        except RecipeError as error:
            raise PackError(f"{self.path / 'config.json'}: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor that the MoE of this config.json has."""
        llama = shape_of(self.llama_config(), str(self.path / "config.json"))
        found, one = llama.tensors, {GATE_UP: (2 * llama.inner, llama.hidden), DOWN: (llama.hidden, llama.inner)}
        for layer in self.layers:
            prefix = f"model.layers.{layer}.mlp"
            for name in FFN_MODULES:
                found.pop(f"{prefix}.{name}.weight", None)
            for kind, shape in one.items():
                found[f"{prefix}.experts.{kind}"] = (self.fused, *shape)
                found |= {f"{prefix}.experts.{slot}.{kind}": shape for slot in self.slots if slot >= self.fused}
            # A MoE with gates can be routed by its router all the same.
            if self.policy.gated or f"{prefix}.gate.weight" in self.weights.tensors:
                found[f"{prefix}.gate.weight"] = (len(self.domains), llama.hidden)
        return found

    def expert(self, name: str) -> Checkpoint:
        """The tensors of a dense Llama with this expert's FFNs, where they lie in the MoE's own files.

        Raises:
            PackError: there is no expert of that name.
        """
        check_known(name, self.experts, self.path)
        index, dense = self.experts.index(name), copy(self.weights)
        dense.tensors = {}
        for ref in self.weights.tensors.values():
            if ref.name.endswith(GATE):
                continue
            prefix, inside, kind = ref.name.partition(".experts.")
            if not inside:
                dense.tensors[ref.name] = ref
            if kind == DOWN:
                parts = [replace(self.blocks(ref.name)[index], name=f"{prefix}.down_proj.weight")]
            elif kind == GATE_UP:
                own = self.blocks(ref.name)[index]
                half = (own.shape[0] // 2, own.shape[1])
                halves = enumerate(("gate_proj", "up_proj"))
                parts = [replace(_block(own, i, half), name=f"{prefix}.{name}.weight") for i, name in halves]
            else:
                continue
            dense.tensors |= {part.name: part for part in parts}
        return dense

    def blocks(self, fused: str) -> list[TensorRef]:
        """Each expert's own part of the fused tensor of this name, in the experts' order, wherever it lies."""
        ref, (prefix, _, kind) = self.weights.ref(fused), fused.rpartition(".")
        return [
            _block(ref, slot, ref.shape[1:]) if slot < self.fused else self.weights.ref(f"{prefix}.{slot}.{kind}")
            for slot in self.slots
        ]

    def plans(self) -> list[TensorPlan]:
        """Every tensor as it lies there, but that each fused one holds all experts in their order, and no others."""
        plans = []
        for name, ref in self.weights.tensors.items():
            kind = name.partition(".experts.")[2]
            if kind in (GATE_UP, DOWN):
                plans.append(TensorPlan(name, (len(self.experts), *ref.shape[1:]), ref.dtype, self.blocks(name)))
            elif not kind:
                plans.append(TensorPlan(name, ref.shape, ref.dtype, [ref]))
        return plans

    def llama_config(self) -> dict[str, Any]:
        """The configuration of one expert as a dense Llama."""
        return {
            **{key: value for key, value in self.config.items() if key not in MOE_KEYS},
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
        }


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Refuses what a MoE's config.json says of its experts unless it fits together."""
    names, layers, count = config.get("expert_names"), config.get("expert_layers"), config.get("num_hidden_layers")
    said = names if isinstance(names, list) else []
    if not said or not all(isinstance(name, str) for name in said):
        raise PackError(f"{file} has expert_names {names!r}, which must be the experts' names: compose the MoE again")
    if config.get("num_local_experts") != len(said) + bool(config.get("keep_base")):
        raise PackError(
            f"{file} has num_local_experts {config.get('num_local_experts')!r}, and names {len(said)} experts"
            f"{' beside the base' if config.get('keep_base') else ''}: compose the MoE again"
        )
    _check_slots(file, config.get("fused_experts"), config.get("expert_slots"), config["num_local_experts"])
    known = range(count) if isinstance(count, int) else ()
    if layers is not None and (not isinstance(layers, list) or not all(layer in known for layer in layers)):
        raise PackError(f"{file} has expert_layers {layers!r}, and {count!r} layers: compose the MoE again")


def _check_slots(file: Path, fused: Any, slots: Any, count: int) -> None:
    """Refuses places of experts that are not one for each; a MoE as it was composed has none of its own."""
    if fused is None and slots is None:
        return
    right = type(fused) is int and fused > 0 and isinstance(slots, list) and len(slots) == count
    if not right or not all(type(slot) is int and slot >= 0 for slot in slots) or len(set(slots)) != count:
        raise PackError(
            f"{file} has fused_experts {fused!r} and expert_slots {slots!r} for {count} experts: compose the MoE again"
        )


def _block(ref: TensorRef, index: int, shape: tuple[int, ...]) -> TensorRef:
    """Block `index` of a tensor that is blocks of `shape`, one after the other."""
    return replace(ref, offset=ref.offset + index * prod(shape) * ITEM_BYTES[ref.dtype], shape=shape)


def check_known(name: str, known: tuple[str, ...], path: Path) -> None:
    """Refuses the name of an expert that is not among the known ones."""
    if name not in known:
        raise PackError(f"{path} has no expert {name!r}: it has {', '.join(known)}")


@dataclass(frozen=True)
class _Dense:
    """What a dense checkpoint is made of: its tensors, its config, where the tokenizer lies, and the record's facts."""

    refs: dict[str, TensorRef]
    piece: Callable[[str, str], Piece]
    dtype: str
    config: dict[str, Any]
    companions: Path
    facts: dict[str, Any]


def collapse(
    model: Path,
    out: Path,
    *,
    expert: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes one expert as a dense Llama checkpoint with its tokenizer; returns the record.

    Args:
        model: a MoE, a pack, or one expert's folder.
        expert: its name; `base` is the base's own FFN, in a pack or in a MoE that kept it. Not needed where there is
            only one.
        base: of a pack or an expert, if it lies elsewhere than they say.
        dtype: of all tensors; by default the widest among those that are put together.
        progress: called with (bytes just written, bytes in all).

    Raises:
        LexiconError: nothing of the kind, an unknown name, parts that do not fit, a full disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    dense = _open(model, expert, base)
    kind = dtype or dense.dtype
    plans = [
        TensorPlan(name, ref.shape, kind, [dense.piece(name, kind)])
        for name, ref in dense.refs.items()
        if not name.endswith("rotary_emb.inv_freq")  # old files hold it; it is computed
    ]
    config = {key: value for key, value in dense.config.items() if key != "torch_dtype"}
    rope = rope_of_old(config)
    if rope != {"rope_theta": 10000.0}:  # which every version assumes
        config |= rope
    return write_model(
        out,
        plans,
        config,
        dense.companions,
        COLLAPSE_RECORD,
        dense.facts,
        _card,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def _open(path: Path, expert: str | None, base: str | None) -> _Dense:
    if (path / MANIFEST).is_file():
        return _of_pack(path, expert, base)
    if (path / "config.json").is_file():
        return _of_moe(path, expert, base)
    if is_expert(path):
        return _of_expert(path, expert, base)
    raise PackError(f"{path} is neither a MoE, a pack nor an expert: give what `compose` or `train` wrote")


def _only(path: Path, expert: str | None, known: tuple[str, ...]) -> str:
    """The expert asked for, or the only one."""
    if expert is None and len(known) > 1:
        raise PackError(f"{path} has several experts: choose one with --expert, among {', '.join(known)}")
    name = next(iter(known)) if expert is None else expert
    check_known(name, known, path)
    return name


def _of_moe(path: Path, expert: str | None, base: str | None) -> _Dense:
    moe = MoeFiles.open(path)
    if base is not None:
        raise PackError(f"{path} is a MoE, which holds all that is needed: leave --base out")
    name = _only(path, expert, moe.experts)
    view = moe.expert(name)
    record = record_of(path, MOE_RECORD)
    trained = {each["name"]: each["record"].get("trained_parameters", 0) for each in record.get("experts", ())}
    facts = {
        "expert": name,
        "template": record.get("template") or {},
        "from": {"kind": "moe", "name": path.resolve().name, "fingerprint": contents_hash(moe.weights)},
        "trained_parameters": trained.get(name, 0),
    }
    return _Dense(view.tensors, view.piece, widest(view, []), moe.llama_config(), path, facts)


def _of_pack(path: Path, expert: str | None, base: str | None) -> _Dense:
    manifest = read_manifest(path)
    name = _only(path, expert, (*manifest.domains, BASE))
    check_files(path, manifest, [file for file in manifest.files if file.startswith(f"adapters/{name}/")])
    place = base_of(path, manifest, base)
    own = BaseFiles.open(manifest.base, base_folder(place))
    source = open_expert(path / "adapters" / name, own) if name in manifest.domains else None
    template = vars(load_router(path).template)
    return _of_base(own, source, {"kind": "pack", "name": manifest.name}, template)


def _of_expert(path: Path, expert: str | None, base: str | None) -> _Dense:
    info = read_expert(path) if (path / RECORD).is_file() else None
    named = base or (info.base if info else None)
    if named is None:
        raise ExpertError(f"{path} is a plain PEFT adapter and does not say on which base: add --base")
    own = BaseFiles.open(named, base_folder(named))
    source = open_expert(path, own)
    _only(path, expert, (source.name,))
    return _of_base(own, source, {"kind": source.kind, "name": source.name}, {})


def _of_base(own: BaseFiles, source: ExpertSource | None, origin: dict[str, Any], template: dict[str, str]) -> _Dense:
    """A base with what one expert changed; without an expert the base as it is."""
    facts = {
        "expert": source.name if source else BASE,
        "template": template,
        "from": {**origin, **({"fingerprint": source.fingerprint()} if source else {})},
        "base": {"name": own.name, "fingerprint": own.fingerprint},
        "trained_parameters": source.trained_parameters if source else 0,
    }

    def piece(name: str, dtype: str) -> Piece:
        return source.piece(name, own.weights, dtype) if source else own.weights.piece(name, dtype)

    kind = widest(own.weights, [source] if source else [])
    return _Dense(own.weights.tensors, piece, kind, dict(own.config), own.path, facts)


def _card(name: str, record: dict[str, Any]) -> str:
    origin = record["from"]
    return f"""---
library_name: transformers
tags: [lora-lexicon, definition-modelling]
---
# {name}

The expert {json.dumps(record["expert"])} of {json.dumps(origin["name"])} ({origin["kind"]}), collapsed to a plain dense
Llama in {record["dtype"]}. Made by {record["made_by"]}.

{usage(name, record["template"])}"""
