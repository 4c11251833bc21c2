"""Experts as sources of tensors: what each changed, and how its values are read. Builds no model.

An expert is FFN tensors, LoRA factors, or a whole Llama that was trained elsewhere on the same base.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_lexicon.compose.policy import MOE_TYPE
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.base import (
    ARCHITECTURE,
    EXPERT_FFN,
    check_tensors,
    contents_hash,
    fingerprint,
    read_config,
    vocabulary_hash,
)
from lora_lexicon.experts.checkpoint import (
    CONFIG,
    FFN,
    KEY_OF,
    RECORD,
    WEIGHTS,
    ExpertInfo,
    check_base,
    check_name,
    read_adapter_config,
    read_expert,
    read_factors,
    target_faults,
    type_faults,
)
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.experts.tensors import CHUNK_BYTES, EXPONENTS, Checkpoint, Piece, is_finite, promoted, torch_dtype
from lora_lexicon.folders import read_record

if TYPE_CHECKING:  # only what is merged or averaged needs torch
    from torch import Tensor


@dataclass(frozen=True)
class BaseFiles:
    """A base on disk, its tensors not read yet. `name` is as the user gave it."""

    name: str
    path: Path
    config: dict[str, Any]
    fingerprint: str
    weights: Checkpoint

    @classmethod
    def open(cls, name: str, path: Path) -> "BaseFiles":
        """The base in the folder `path`.

        Raises:
            ExpertError: no such base, or one whose tensors are not those of its config.json.
        """
        config, weights = read_config(path), Checkpoint(path)
        check_tensors(weights, shape_of(config, str(path / "config.json")).tensors, ExpertError)
        return cls(name, path, config, fingerprint(path), weights)

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])


@dataclass(frozen=True)
class ExpertSource:
    """One expert: its record, its file, and the names of the base's tensors that it has values of its own for.

    Attributes:
        info: None for a plain PEFT adapter or a whole model, made elsewhere.
        scalings: of a LoRA expert, s in W + s B A, by tensor name.
    """

    name: str
    path: Path
    kind: Literal["ffn", "lora", "dense"]
    info: ExpertInfo | None
    weights: Checkpoint
    changed: frozenset[str]
    scalings: dict[str, float] = field(default_factory=dict)

    @property
    def trained_parameters(self) -> int:
        held = self.changed if self.kind == "dense" else self.weights.tensors
        return sum(prod(self.weights.ref(name).shape) for name in held)

    def fingerprint(self) -> str:
        """What identifies its weights: see `experts.base.contents_hash`."""
        return contents_hash(self.weights)

    def held(self, tensor: str) -> tuple[str, ...]:
        """The names, in its own file, of what it holds for the base's tensor."""
        return factor_names(tensor) if self.kind == "lora" else (tensor,)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of the base's tensor as this expert has it."""
        if self.kind != "lora":
            return self.weights.ref(tensor).shape
        a, b = factor_names(tensor)
        return (self.weights.ref(b).shape[0], self.weights.ref(a).shape[1])

    def piece(self, tensor: str, base: Checkpoint, dtype: str) -> Piece:
        """The tensor as this expert has it; the base's own where it changed nothing."""
        if tensor not in self.changed:
            return base.piece(tensor, dtype)
        if self.kind != "lora":
            return self.weights.piece(tensor, dtype)
        return partial(self._merged, tensor, base, dtype)

    def chunks(self, tensor: str, base: Checkpoint, dtype: str) -> "Iterable[Tensor]":
        """The same as values, flat, in chunks of whole rows."""
        if tensor not in self.changed:
            return base.chunks(tensor, dtype)
        return self._merged(tensor, base, dtype) if self.kind == "lora" else self.weights.chunks(tensor, dtype)

    def _merged(self, tensor: str, base: Checkpoint, dtype: str) -> "Iterator[Tensor]":
        a, b = (self.weights.tensor(name, "float32") for name in factor_names(tensor))
        start = 0
        for chunk in base.chunks(tensor, "float32"):
            rows = chunk.view(-1, a.shape[1])
            merged = (rows + (b[start : start + len(rows)] @ a) * self.scalings[tensor]).to(torch_dtype(dtype))
            if not is_finite(merged):
                raise ExpertError(f"expert {self.name!r}: {tensor} overflows {dtype} when merged: add --dtype float32")
            start += len(rows)
            yield merged.flatten()


def factor_names(tensor: str) -> tuple[str, str]:
    """PEFT's names for the factors A and B of a base's tensor."""
    layer = tensor.removesuffix(".weight")
    return KEY_OF.format(layer, "A"), KEY_OF.format(layer, "B")


def average(tensor: str, experts: Sequence[ExpertSource], base: Checkpoint, dtype: str) -> "Iterator[Tensor]":
    """The mean over all experts, summed in float32 (algorithm 1 of the LM-Lexicon paper), in chunks of whole rows.

    An expert that did not change the tensor counts with the base's values.
    """
    own = [expert.chunks(tensor, base, "float32") for expert in experts if tensor in expert.changed]
    for first, *others in zip(base.chunks(tensor, "float32"), *own, strict=True):
        total = first * (len(experts) - len(own))
        for other in others:
            total += other
        yield (total / len(experts)).to(torch_dtype(dtype))


def is_expert(path: Path) -> bool:
    """Whether a folder holds an expert: of ours, a PEFT adapter, or a whole model."""
    return any((path / name).is_file() for name in (RECORD, CONFIG, "config.json"))


def open_expert(path: Path, base: BaseFiles) -> ExpertSource:
    """An expert folder, checked against the base by name, shape and record; no values are read yet.

    Raises:
        ExpertError: another base, a damaged file, a tensor that the base lacks or has in another shape.
    """
    info = read_expert(path) if (path / RECORD).is_file() else None
    if info is not None:
        check_base(info, base.fingerprint, base.name)
    if info is not None and info.kind == "ffn":
        expert = _open_ffn(path, info, base)
    elif info is not None or (path / CONFIG).is_file():
        expert = _open_lora(path, info, base)
    else:
        expert = _open_dense(path, base)
    for tensor in sorted(expert.changed):
        if tensor not in base.weights.tensors:
            raise ExpertError(
                f"expert {expert.name!r}: {expert.weights.path} trains {tensor}, which base {base.name!r} lacks: "
                "it is another base's"
            )
        held = {expert.weights.tensors[name].dtype for name in expert.held(tensor)} - EXPONENTS.keys()
        if held:
            raise ExpertError(
                f"expert {expert.name!r}: {expert.weights.path} holds {tensor} as {held.pop()}, the base as "
                f"{base.weights.tensors[tensor].dtype}: weights are floating-point numbers"
            )
        ours, own = expert.shape(tensor), base.weights.tensors[tensor].shape
        if ours != own:
            raise ExpertError(
                f"expert {expert.name!r}: in {expert.weights.path} {tensor} has shape {ours}, the base's is {own}"
            )
    if not expert.changed:
        raise ExpertError(f"{path} trains nothing: train the expert again")
    return expert


def _open_ffn(path: Path, info: ExpertInfo, base: BaseFiles) -> ExpertSource:
    weights = Checkpoint(path / FFN)
    wanted = {
        name
        for name in base.weights.tensors
        if (match := EXPERT_FFN.fullmatch(name)) and int(match["layer"]) >= info.first_layer
    }
    missing = sorted(wanted - set(weights.tensors))
    if missing:
        raise ExpertError(
            f"expert {info.name!r}: {path / FFN} lacks {missing[0]}, one of {len(wanted)} tensors that an expert from "
            f"layer {info.first_layer} on holds: copy it or train it again"
        )
    return ExpertSource(info.name, path, "ffn", info, weights, frozenset(weights.tensors))


def _open_lora(path: Path, info: ExpertInfo | None, base: BaseFiles) -> ExpertSource:
    config, weights = read_adapter_config(path), Checkpoint(path / WEIGHTS)
    name = check_name(info.name if info else path.resolve().name)
    shapes = {name: ref.shape for name, ref in weights.tensors.items()}
    factors = read_factors(path, shapes, config)
    layers = sorted(name.removesuffix(".weight") for name in base.weights.tensors)
    for fault in (*type_faults(weights), *target_faults(path, config, factors, layers)):
        raise ExpertError(f"expert {name!r}: {fault}")
    scalings = {f"{layer}.weight": scaling for layer, scaling in factors.items()}
    return ExpertSource(name, path, "lora", info, weights, frozenset(scalings), scalings)


def _open_dense(path: Path, base: BaseFiles) -> ExpertSource:
    """A whole Llama. What it holds with the base's own values, in whatever type, does not count as trained."""
    if not (path / "config.json").is_file():
        raise ExpertError(f"{path} is no expert: give a folder that `train` made, a PEFT adapter or a whole model")
    name = check_name(path.resolve().name)
    if read_record(path / "config.json", ExpertError, "a model").get("model_type") == MOE_TYPE:
        raise ExpertError(f"{path} is a MoE, not one expert: take one out of it with `compose collapse`")
    ours, own = _architecture(path, read_config(path)), _architecture(base.path, base.config)
    for key in ARCHITECTURE:
        if ours.get(key) != own.get(key):
            raise ExpertError(
                f"expert {name!r}: {path / 'config.json'} says {key} = {ours.get(key)!r}, "
                f"base {base.name!r} says {own.get(key)!r}"
            )
    if vocabulary_hash(path) != vocabulary_hash(base.path):
        raise ExpertError(f"expert {name!r}: the tokenizer in {path} has another vocabulary than base {base.name!r}'s")
    weights = Checkpoint(path)
    missing = sorted(set(base.weights.tensors) - set(weights.tensors))
    if missing:
        raise ExpertError(f"expert {name!r}: {path} lacks {missing[0]}, which base {base.name!r} holds")
    changed = frozenset(name for name in weights.tensors if not _same(name, weights, base.weights))
    return ExpertSource(name, path, "dense", None, weights, changed)


def _architecture(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with all defaults; transformers before version 5 wrote fewer keys, and RoPE's under other names."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    try:
        full = LlamaConfig.from_dict(dict(config)).to_dict()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ExpertError(f"{path / 'config.json'} is no Llama's: {' '.join(str(error).split())}") from error
    return {**full, "rope_theta": config.get("rope_theta", full["rope_parameters"].get("rope_theta"))}


def _same(tensor: str, left: Checkpoint, right: Checkpoint) -> bool:
    """Whether both hold the tensor with the same shape and values; of one type, with the same bytes."""
    if tensor not in right.tensors:
        return False
    ours, theirs = left.ref(tensor), right.ref(tensor)
    if ours.shape != theirs.shape:
        return False
    if ours.dtype != theirs.dtype:
        if not {ours.dtype, theirs.dtype} <= EXPONENTS.keys():
            return False
        wide = promoted([ours.dtype, theirs.dtype])
        values = zip(left.chunks(tensor, wide), right.chunks(tensor, wide), strict=True)
        return all(bool((one == other).all()) for one, other in values)
    with ours.file.open("rb") as one, theirs.file.open("rb") as other:
        one.seek(ours.offset)
        other.seek(theirs.offset)
        sizes = [min(CHUNK_BYTES, ours.bytes - start) for start in range(0, ours.bytes, CHUNK_BYTES)]
        return all(one.read(size) == other.read(size) for size in sizes)
