"""An expert on disk: its record, and either a plain PEFT adapter or FFN tensors. Knows nothing of training.

NAME/expert.json
NAME/adapter_config.json, adapter_model.safetensors    kind lora; PEFT's own format
NAME/adapter_config.json, adapter_model.int8.safetensors    the same in 8 bits, which PEFT does not read
NAME/ffn.safetensors                                   kind ffn; the base's own tensor names
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from safetensors import SafetensorError, safe_open

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.cost import MAX_RANK
from lora_lexicon.experts.shape import MAX_LAYERS, linear_names
from lora_lexicon.experts.tensors import Checkpoint, is_finite, torch_dtype
from lora_lexicon.folders import read_record, shown, write_record

if TYPE_CHECKING:  # torch and PEFT take seconds to import, and composing FFN experts does without
    import torch
    from peft import LoraConfig
    from torch import Tensor, nn

    from lora_lexicon.experts.lora import Factors, LoadedAdapter

RECORD = "expert.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INT8 = "adapter_model.int8.safetensors"
SCALE = ".scale"
FFN = "ffn.safetensors"
JOURNAL = "log.jsonl"  # how training went; never shipped
JSON_TYPES = {str: "text", int: "a whole number", dict: "an object"}
NUMBERS = {"rank": int, "alpha": (int, float)}
# Of a module: a regular expression that repeats anything could run for years.
PATTERN = re.compile(r"([\w.^$-]|\\[.dw]){1,256}")
MAX_PATTERNS = 10**6  # names with a rank or alpha of their own times layers; some seconds to compare
MAX_LAYERS_PATTERNS = 16
MAX_VALUE = 1e4  # of a factor; what is trained stays below a hundredth of it
MAX_ALPHA = 1e6  # of an adapter: as a float32 it must leave room for the product that it scales
MIN_ALPHA = 1e-6  # below which nothing is left of it
FACTOR_TYPES = ("float32", "float16", "bfloat16")
MAX_NAMES = 10**7  # layers times targets that are compared
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.[\w.]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY_OF = "base_model.model.{}.lora_{}.weight"
KEY = re.compile(r"base_model\.model\.(?P<layer>[\w.]+)\.lora_(?P<factor>[AB])\.weight")
FFN_KEY = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.[a-z_]+\.(weight|bias)")
# LoRA variants that a sum of low-rank products cannot express, by their field in adapter_config.json.
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# Initialisations that change the base's own weights, so that the adapter does not fit the base as published.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class ExpertInfo:
    """What `expert.json` says of an expert."""

    name: str
    kind: Literal["lora", "ffn"]
    base: str  # as the user named it
    base_fingerprint: str
    first_layer: int  # no trained tensor below this layer
    domain: str = ""  # empty: trained on everything
    entries_fingerprint: str = ""
    rows: int = 0
    tokens: int = 0  # read in training, prompts and all epochs included
    trained_parameters: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    started_from: str = ""  # the adapter it was branched from, by the SHA-256 of its weights
    training: dict[str, Any] = field(default_factory=dict)  # losses, scores, seconds
    versions: dict[str, str] = field(default_factory=dict)
    key: str = ""  # over recipe, data, base and start: the same call has the same key


def check_name(name: str) -> str:
    """A name that is safe as a folder's; returns it."""
    if not NAME.fullmatch(name):
        raise ExpertError(f"{name!r} is no name for an expert: use letters, digits, '.', '_' and '-', at most 64")
    return name


def write_expert(folder: Path, info: ExpertInfo) -> None:
    """Writes `expert.json`."""
    write_record(folder / RECORD, dataclasses.asdict(info))


def read_expert(path: Path) -> ExpertInfo:
    """Reads and checks `expert.json`.

    Raises:
        ExpertError: no expert folder, or a record with missing, unknown or wrong values.
    """
    record = read_record(path / RECORD, ExpertError, "an expert")
    hints = typing.get_type_hints(ExpertInfo)
    for key, value in record.items():
        if key not in hints:
            raise ExpertError(f"{path / RECORD}: unknown key {shown(key)}: a newer lora-lexicon wrote it")
        kind = typing.get_origin(hints[key]) or hints[key]
        if kind is not Literal and type(value) is not kind:
            raise ExpertError(f"{path / RECORD}: {key} is {shown(value)}; it must be {JSON_TYPES[kind]}")
    missing = {"name", "kind", "base", "base_fingerprint", "first_layer"} - set(record)
    if missing:
        raise ExpertError(f"{path / RECORD} lacks {', '.join(sorted(missing))}: train the expert again")
    if record["kind"] not in ("lora", "ffn"):
        raise ExpertError(f"{path / RECORD}: kind is {shown(record['kind'])}; it must be lora or ffn")
    check_name(record["name"])
    return ExpertInfo(**record)


def check_base(info: ExpertInfo, fingerprint: str, base: str) -> None:
    """Refuses an expert of another base, naming both."""
    if info.base_fingerprint != fingerprint:
        raise ExpertError(
            f"expert {info.name!r} was trained on base {info.base!r} ({info.base_fingerprint[:12]}), "
            f"not on {base!r} ({fingerprint[:12]}): give the base it was trained on"
        )


def read_adapter_config(path: Path) -> "LoraConfig":
    """A PEFT adapter's config, if it is plain LoRA.

    Raises:
        ExpertError: no PEFT adapter, or a variant that is not a sum of low-rank products.
    """
    record = read_record(path / CONFIG, ExpertError, "a LoRA adapter")
    for fault in adapter_faults(path, record):
        raise ExpertError(fault)
    return lora_config(path)


def adapter_faults(path: Path, record: Mapping[str, Any]) -> "Iterator[str]":
    """All that keeps the adapter of this `adapter_config.json` from being a sum of low-rank products, a line each."""
    if record.get("peft_type") != "LORA":
        yield f"{path} is a PEFT adapter of type {shown(record.get('peft_type'))}; only LORA is supported"
    for variant in VARIANTS:
        if record.get(variant):
            yield f"{path / CONFIG} sets {variant}, which is not supported: train a plain LoRA adapter"
    if record.get("bias", "none") != "none":
        yield f"{path / CONFIG} sets bias to {shown(record['bias'])}; only adapters without biases are supported"
    start = record.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASE):
        yield f"{path / CONFIG}: init_lora_weights {start!r} changed the base: convert it to plain LoRA with PEFT"
    yield from config_faults(path, record)
    if record.get("peft_type") == "LORA":
        from peft import LoraConfig

        known = {field.name for field in dataclasses.fields(LoraConfig)}
        for key in [key for key, value in record.items() if key not in known and value]:
            said = f"{path / CONFIG} sets {shown(key)}, which this version of PEFT does not know"
            yield f"{said}: upgrade PEFT, or train a plain LoRA adapter"


def config_faults(path: Path, record: Mapping[str, Any]) -> "Iterator[str]":
    """What an `adapter_config.json` holds that is of another type than PEFT has there, or names modules by repetitions.

    PEFT itself looks at no types.
    """
    yield from _number_faults(path, record)
    if record.get("peft_type") == "LORA":
        yield from _field_faults(path, record)


def _number_faults(path: Path, record: Mapping[str, Any]) -> "Iterator[str]":
    for key, kind in NUMBERS.items():
        values = record.get(f"{key}_pattern") or {}
        if not isinstance(values, dict) or not all(PATTERN.fullmatch(name) for name in values):
            yield f"{path / CONFIG}: {key}_pattern must give numbers by modules' names, without repetitions"
            continue
        for value in (record.get("r" if key == "rank" else "lora_alpha", 8), *values.values()):
            if not isinstance(value, kind) or isinstance(value, bool):
                yield f"{path / CONFIG} gives the {key} {shown(value)}, which must be a number"


def _field_faults(path: Path, record: Mapping[str, Any]) -> "Iterator[str]":
    from peft import LoraConfig

    hints = typing.get_type_hints(LoraConfig)
    targets, patterns = record.get("target_modules"), record.get("layers_pattern")
    if not targets:
        yield f"{path / CONFIG}: target_modules is {shown(targets)}; it must name the layers that the adapter updates"
    for key in sorted(hints.keys() & record.keys() - {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}):
        if record[key] is not None and not _is_of(record[key], hints[key]):
            yield f"{path / CONFIG}: {key} is {shown(record[key])}, which is not of the type that PEFT has there"
    if isinstance(patterns, list) and len(patterns) > MAX_LAYERS_PATTERNS:
        yield f"{path / CONFIG}: layers_pattern has {len(patterns):,} names; at most {MAX_LAYERS_PATTERNS} are read"
        return
    for pattern in [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else ():
        if isinstance(pattern, str) and not PATTERN.fullmatch(pattern):
            yield f"{path / CONFIG}: layers_pattern is {shown(pattern)}; it must be a plain name, without repetitions"


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be that of a field with this annotation; what is inside of objects is not looked at."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) for part in parts)
    if origin in (list, set, tuple):
        return isinstance(value, list) and all(any(_is_of(each, part) for part in parts) for each in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, str, bool, types.NoneType):
        return type(value) is hint
    return isinstance(value, str if isinstance(hint, type) and issubclass(hint, Enum) else dict)


def lora_config(path: Path) -> "LoraConfig":
    """An `adapter_config.json` as PEFT reads it.

    Raises:
        ExpertError: PEFT does not read it.
    """
    from peft import LoraConfig

    try:
        return cast("LoraConfig", LoraConfig.from_pretrained(str(path)))
    except ValueError as error:  # PEFT's own words
        raise ExpertError(f"{path / CONFIG} is no LoRA config: {' '.join(str(error).split())}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ExpertError(
            f"{path / CONFIG} is no LoRA config that this version of PEFT reads: save the adapter again with PEFT"
        ) from error


def load_adapter(path: Path, name: str | None = None, *, shapes: bool = False) -> "LoadedAdapter":
    """Reads any plain PEFT LoRA adapter, with or without an `expert.json`, or one that is held in 8 bits.

    Args:
        shapes: without its numbers: the factors are on the meta device.

    Raises:
        ExpertError: a damaged file, a variant of LoRA, a value that is not finite, or shapes that disagree.
    """
    from lora_lexicon.experts.lora import Factors, LoadedAdapter

    config = read_adapter_config(path)
    if name is None:
        name = read_expert(path).name if (path / RECORD).is_file() else path.resolve().name
    if (path / INT8).is_file():
        tensors = dict(_widened(path / INT8))
        tensors = {key: tensor.to("meta") for key, tensor in tensors.items()} if shapes else tensors
    else:
        for fault in type_faults(_checkpoint(path / WEIGHTS)):
            raise ExpertError(fault)
        tensors = dict(_shapes(path / WEIGHTS) if shapes else _tensors(path / WEIGHTS))
    scalings = read_factors(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, config)
    for fault in target_faults(path, config, scalings):
        raise ExpertError(fault)
    for key, tensor in tensors.items():
        if tensor.device.type != "meta" and too_large(tensor):
            raise ExpertError(
                f"{path}: {key} holds values above {MAX_VALUE:g}, as no trained factor does: do not use it"
            )
    factors = {}
    for layer, scaling in scalings.items():
        a, b = (tensors[KEY_OF.format(layer, factor)] for factor in "AB")
        factors[layer] = Factors(a.T.contiguous(), b.T.contiguous(), scaling)
    return LoadedAdapter(check_name(name), factors)


def too_large(factor: "Tensor") -> bool:
    """Whether a factor holds a number that none has which was trained: finite, and yet nothing comes out of it."""
    return bool(factor.numel()) and max(abs(float(extreme)) for extreme in factor.aminmax()) > MAX_VALUE


def type_faults(weights: Checkpoint) -> "Iterator[str]":
    """The tensors of an adapter that are of none of the types that factors are held in, a line each."""
    for name, ref in weights.tensors.items():
        if ref.dtype not in FACTOR_TYPES:
            yield f"{weights.path}: {name} is of type {ref.dtype}; a factor is of {', '.join(FACTOR_TYPES)}"


def target_faults(
    path: Path, config: "LoraConfig", held: Collection[str], linear: Collection[str] | None = None
) -> "Iterator[str]":
    """The layers that a config targets and a file lacks, and those that it holds beside them, a line each.

    Nothing where the config names them by an expression: one that repeats anything could run for years.

    Args:
        held: the layers that the file has factors of.
        linear: the base's; by default those of a Llama whose last layer is the last that is held or named.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        return
    named = config.layers_to_transform
    numbers = [int(match[1]) for name in held if (match := LAYER.fullmatch(name))]
    numbers += [named] if isinstance(named, int) else named or []
    last = max(numbers, default=-1)
    if last >= MAX_LAYERS or min(numbers, default=0) < 0:
        yield f"{path / CONFIG} and its weights name layer {last:,}; at most {MAX_LAYERS:,} are read"
        return
    layers = linear_names(last + 1) if linear is None else linear
    asked = len(config.target_modules or ()) + len(config.exclude_modules or ()) + len(numbers)
    if (len(layers) + len(held)) * asked > MAX_NAMES:
        yield f"{path / CONFIG} names more layers than are read: name modules, such as up_proj, in place of layers"
        return
    for layer in layers:
        if layer not in held and check_target_module_exists(config, layer):
            factor = KEY_OF.format(layer, "A")
            yield f"{path / WEIGHTS} lacks {factor}, a layer that {CONFIG} targets: copy it or train it again"
    strangers = set(held).difference(linear) if linear is not None else set()  # which others refuse by the base's name
    for layer in held:
        if layer not in strangers and not check_target_module_exists(config, layer):
            yield f"{path / WEIGHTS} holds factors of {layer}, a layer that {CONFIG} does not target: make it again"


def changes_nothing(weights: Checkpoint) -> bool:
    """Whether every product of an adapter's two factors is zero, as before any training; values are read in chunks."""
    zero: dict[str, bool] = {}
    for name in weights.tensors:
        layer = name.removesuffix(SCALE).rpartition(".lora_")[0]
        if not zero.get(layer):
            zero[layer] = not any(bool(chunk.any()) for chunk in weights.chunks(name))
    return all(zero.values())


def read_factors(path: Path, shapes: Mapping[str, tuple[int, ...]], config: "LoraConfig") -> dict[str, float]:
    """The layers that an adapter updates, each with the scaling of its product, from the tensors' shapes alone.

    Raises:
        ExpertError: a tensor that is no LoRA factor, one without its other half, or another rank than the config's.
    """
    layers = []
    for key, shape in shapes.items():
        match = KEY.fullmatch(key)
        if not match or len(shape) != 2:
            raise ExpertError(f"{path / WEIGHTS}: {key} is no LoRA factor of a linear layer")
        layers.append(match["layer"])
    if not layers:
        raise ExpertError(f"{path / WEIGHTS} holds no tensor: train the adapter again")
    given = [patterns or {} for patterns in (config.rank_pattern, config.alpha_pattern)]
    if sum(map(len, given)) * max(100, len(layers)) > MAX_PATTERNS:
        raise ExpertError(f"{path / CONFIG}: rank_pattern and alpha_pattern hold more names than are read: name fewer")
    ranks, alphas = map(_by_pattern, given)
    return {
        layer: _scaling(path, layer, shapes, config, _of(ranks, layer, config.r), _of(alphas, layer, config.lora_alpha))
        for layer in dict.fromkeys(layers)
    }


def _by_pattern(given: Mapping[str, float]) -> "list[tuple[re.Pattern[str], float]]":
    """Numbers by the expression of the layers that they are for, as PEFT's `get_pattern_key` has it, but made once."""
    return [(re.compile(rf"(.*\.)?({name})$"), value) for name, value in given.items()]


def _of(given: "list[tuple[re.Pattern[str], float]]", layer: str, default: float) -> float:
    return next((value for pattern, value in given if pattern.match(layer)), default)


def _scaling(
    path: Path,
    layer: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: "LoraConfig",
    rank: float,
    alpha: float,
) -> float:
    a, b = (shapes.get(KEY_OF.format(layer, factor)) for factor in "AB")
    if a is None or b is None:
        raise ExpertError(f"{path / WEIGHTS}: {layer} has only one of its two factors")
    if not 0 < rank <= MAX_RANK:
        raise ExpertError(f"{path / CONFIG} gives {layer} rank {shown(rank)}; only ranks from 1 to {MAX_RANK} are read")
    if a[0] != rank or b[1] != rank:
        raise ExpertError(f"{path / WEIGHTS}: {layer} has factors of rank {a[0]} and {b[1]}, the config says {rank}")
    if not MIN_ALPHA <= abs(alpha) <= MAX_ALPHA:
        raise ExpertError(
            f"{path / CONFIG} gives {layer} alpha {shown(alpha)}; only values from {MIN_ALPHA:g} to {MAX_ALPHA:g} are "
            "read"
        )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def read_ffn(path: Path) -> "Iterator[tuple[str, Tensor]]":
    """The FFN tensors of an expert, one at a time, under the base's own names.

    Raises:
        ExpertError: a damaged file, a name that is no FFN tensor, or a value that is not finite.
    """
    for key, tensor in _tensors(path / FFN):
        if not FFN_KEY.fullmatch(key):
            raise ExpertError(f"{path / FFN}: {key} is no FFN tensor")
        yield key, tensor


def install_ffn(model: "nn.Module", path: Path) -> None:
    """Overwrites the model's FFN tensors with an expert's.

    Raises:
        ExpertError: the model lacks one of them, or has another shape.
    """
    import torch

    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in read_ffn(path):
            if key not in own or own[key].shape != tensor.shape:
                shape = tuple(own[key].shape) if key in own else "none"
                raise ExpertError(f"{path / FFN}: {key} has shape {tuple(tensor.shape)}, the base's is {shape}")
            own[key].copy_(tensor)


def save_lora(
    config: "LoraConfig", factors: "Mapping[str, Factors]", folder: Path, dtype: "torch.dtype | None" = None
) -> None:
    """Writes a plain PEFT adapter, in `dtype` (by default as the factors are)."""
    from safetensors.torch import save_file

    save_file(_peft_tensors(factors, dtype), folder / WEIGHTS, {"format": "pt"})
    save_config(config, folder)


def save_lora_int8(config: "LoraConfig", factors: "Mapping[str, Factors]", folder: Path) -> None:
    """Writes an adapter in 8 bits: each of a factor's r vectors has a scale of its own, its largest value by 127."""
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in _peft_tensors(factors, torch.float32).items():
        scale = tensor.abs().amax(dim=_across(key), keepdim=True) / 127
        tensors[key] = (tensor / scale.where(scale > 0, 1)).round().to(torch.int8)
        tensors[key + SCALE] = scale
    save_file(tensors, folder / INT8, {"format": "pt"})
    save_config(config, folder)


def _widened(file: Path) -> "Iterator[tuple[str, Tensor]]":
    """The float32 tensors of an adapter in 8 bits."""
    import torch

    held = dict(_tensors(file))
    for key in [key for key in held if not key.endswith(SCALE)]:
        tensor, scale = held.pop(key), held.pop(key + SCALE, None)
        wanted = list(tensor.shape)
        if len(wanted) == 2:
            wanted[_across(key)] = 1
        if tensor.dtype != torch.int8 or scale is None or scale.dtype != torch.float32 or list(scale.shape) != wanted:
            raise ExpertError(
                f"{file}: {key} is no factor in 8 bits with a scale for each of its vectors: get it again"
            )
        yield key, tensor.float() * scale
    if held:
        raise ExpertError(f"{file}: {next(iter(held))} belongs to no factor: get it again")


def _across(key: str) -> int:
    """The dimension along which one of a factor's r vectors lies: A is (r, in), B is (out, r)."""
    return 1 if key.endswith(".lora_A.weight") else 0


def _peft_tensors(factors: "Mapping[str, Factors]", dtype: "torch.dtype | None") -> "dict[str, Tensor]":
    return {
        KEY_OF.format(layer, half): factor.detach().T.to(device="cpu", dtype=dtype).contiguous()
        for layer, f in factors.items()
        for half, factor in (("A", f.a), ("B", f.b))
    }


def save_config(config: "LoraConfig", folder: Path) -> None:
    """Writes `adapter_config.json`, the same bytes each time."""
    config.save_pretrained(str(folder))
    record = json.loads((folder / CONFIG).read_text())  # in which PEFT writes a set in any order
    record["target_modules"] = sorted(record["target_modules"])
    (folder / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True))


def save_ffn(tensors: "Mapping[str, Tensor]", folder: Path, dtype: "torch.dtype | None" = None) -> None:
    """Writes FFN tensors, which bear the base's own names, in `dtype` (by default as they are)."""
    from safetensors.torch import save_file

    save_file(
        {name: t.detach().to(device="cpu", dtype=dtype).contiguous() for name, t in tensors.items()}, folder / FFN
    )


def _shapes(file: Path) -> "Iterator[tuple[str, Tensor]]":
    """What `_tensors` yields, as tensors on the meta device: the header alone is read."""
    import torch

    for key, ref in sorted(_checkpoint(file).tensors.items()):
        yield key, torch.empty(ref.shape, dtype=torch_dtype(ref.dtype), device="meta")


def _checkpoint(file: Path) -> Checkpoint:
    if not file.is_file():
        raise ExpertError(f"{file.parent} lacks {file.name}: train the expert again")
    return Checkpoint(file)


def _tensors(file: Path) -> "Iterator[tuple[str, Tensor]]":
    _checkpoint(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                tensor = tensors.get_tensor(key)
                if not is_finite(tensor):
                    raise ExpertError(f"{file}: {key} holds values that are not finite: train the expert again")
                yield key, tensor
    except (SafetensorError, OSError) as error:
        raise ExpertError(f"{file} is damaged ({error}): copy it or train it again") from error
