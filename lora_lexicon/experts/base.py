"""The shared base: where it lies, what identifies it, and how it is loaded. Knows nothing of experts.

A base is identified by its content, not by its path: two copies of one checkpoint agree, a
fine-tuned or re-quantised one does not.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lora_lexicon.errors import ExpertError, LexiconError, MissingExtraError
from lora_lexicon.experts.shape import Shape, hub_errors, llama_config, shape_of
from lora_lexicon.experts.tensors import CODES, Checkpoint, torch_dtype
from lora_lexicon.experts.untrusted import check_base, check_tokenizer, generation_config, model_config, told
from lora_lexicon.folders import read_record, sha256_of
from lora_lexicon.resources import find_base

if TYPE_CHECKING:  # composing reads bases without building models; torch and transformers take seconds to import
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["none", "nf4", "int8"]
DTYPES = ("float32", "bfloat16", "float16")
SAMPLE_BYTES = 1 << 16  # read at each tensor's head, middle and tail
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]  # never a pickle
EXPERT_FFN = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)


@dataclass
class Base:
    """A loaded base, frozen, in evaluation mode.

    Attributes:
        name: as the user gave it (a folder, a Hub name or a shipped pack's name).
        path: the folder its files lie in.
        fingerprint: see `fingerprint`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    path: Path
    fingerprint: str

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return shape_of(self.model.config.to_dict(), self.name)


def fingerprint(path: Path) -> str:
    """What identifies a base: a SHA-256 over its architecture, its vocabulary and its tensors.

    Every tensor counts with name, shape, dtype and the head, middle and tail of its bytes, so that
    an 8B base is identified in a second, without reading 16 GB.

    Raises:
        ExpertError: no Llama checkpoint in safetensors, or a truncated one.
    """
    config = read_config(path)
    digest = hashlib.sha256()
    digest.update(json.dumps({k: config[k] for k in sorted(ARCHITECTURE) if config.get(k) is not None}).encode())
    digest.update(vocabulary_hash(path).encode())
    _add_contents(digest, Checkpoint(path))
    return digest.hexdigest()


def check_tensors(weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]], error: type[LexiconError]) -> None:
    """Refuses a checkpoint that lacks a tensor of its config.json, or holds another, or one in another shape."""
    for fault in tensor_faults(weights, shapes):
        raise error(fault)


def tensor_faults(weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What a checkpoint lacks of its config.json's tensors, and holds beside them or in another shape, a line each."""
    for name in shapes:
        if name not in weights.tensors:
            yield f"{weights.path} holds no tensor {name}: it is not a checkpoint of this architecture"
    for name, ref in weights.tensors.items():
        # Old files hold what is tied, and what is computed.
        spare = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
        if name not in shapes and not spare:
            yield f"{ref.file} holds {name}, which no model of its config.json has: it is another model's"
        if name in shapes and ref.shape != shapes[name]:
            yield f"{ref.file}: {name} has shape {ref.shape}, its config.json says {shapes[name]}"


def contents_hash(weights: Checkpoint) -> str:
    """A SHA-256 over a checkpoint's tensors, by the rules of `fingerprint`."""
    digest = hashlib.sha256()
    _add_contents(digest, weights)
    return digest.hexdigest()


def _add_contents(digest: Any, weights: Checkpoint) -> None:
    for name, ref in sorted(weights.tensors.items()):
        digest.update(f"{name} {CODES[ref.dtype]} {ref.shape}".encode())
        digest.update(_sample(ref.file, ref.offset, ref.offset + ref.bytes))


def read_config(path: Path) -> dict[str, Any]:
    """A base's config.json, checked with what its folder holds; only the Llama architecture is accepted."""
    config = llama_config(path / "config.json")
    check_base(path, config)
    return config


def vocabulary_hash(path: Path) -> str:
    """A SHA-256 over a tokenizer's vocabulary, however its file is laid out; its files are checked before."""
    check_tokenizer(path)
    if (path / "tokenizer.json").is_file():
        record = read_record(path / "tokenizer.json", ExpertError, "a tokenizer")
        try:
            vocabulary = record.get("model", {}).get("vocab", {})
            items = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary
            added = sorted([token["id"], token["content"]] for token in record.get("added_tokens") or [])
        except (KeyError, TypeError, AttributeError) as error:
            raise ExpertError(
                f"{path / 'tokenizer.json'} is damaged: its model.vocab or added_tokens are no tokenizer's: "
                "copy the base's again"
            ) from error
        return hashlib.sha256(json.dumps([items, added]).encode()).hexdigest()
    if (path / "tokenizer.model").is_file():
        return sha256_of(path / "tokenizer.model")
    raise ExpertError(f"base {path} has no tokenizer.json and no tokenizer.model: copy its tokenizer there")


def _sample(file: Path, start: int, end: int) -> bytes:
    with file.open("rb") as stream:
        if end - start <= 3 * SAMPLE_BYTES:
            stream.seek(start)
            return stream.read(end - start)
        parts = []
        for at in (start, (start + end - SAMPLE_BYTES) // 2, end - SAMPLE_BYTES):
            stream.seek(at)
            parts.append(stream.read(SAMPLE_BYTES))
        return b"".join(parts)


def base_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a base: as given, inside the shipped pack of that name, or downloaded from the Hub."""
    name = find_base(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))


def local_base(name: str) -> Path | None:
    """The folder of a base that is on this machine; nothing is downloaded."""
    try:
        place = find_base(name)
    except LexiconError:
        return None
    if Path(place).is_dir():
        return Path(place) if (Path(place) / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """A base's tokenizer; of a base on the Hub nothing else is downloaded."""
    place = find_base(name)
    if Path(place).is_dir():
        return _tokenizer(Path(place))
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        path = Path(snapshot_download(place, allow_patterns=[*HUB_FILES[::2], "merges.txt"]))
    return _tokenizer(path)


def _tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    config = read_config(path)
    check_tokenizer(path)
    from transformers import AutoTokenizer

    with told(f"base {path}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, config=model_config(path, config), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ExpertError(f"base {path}: its tokenizer names no eos_token, with which every prompt ends")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.get("vocab_size", 0):
        raise ExpertError(
            f"base {path}: its tokenizer has ids up to {largest:,}, and the embedding has {config.get('vocab_size')} "
            "rows: it is another model's tokenizer"
        )
    return tokenizer


def known_fingerprint(name: str) -> str:
    """A base's fingerprint; "" for one whose weights are not here."""
    place = Path(find_base(name))
    return fingerprint(place) if any(place.glob("model.safetensors*")) else ""


def load_base(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    quantize: Quantize = "none",
    revision: str | None = None,
) -> Base:
    """Loads a Llama-architecture base, frozen and in evaluation mode.

    Args:
        dtype: float32, bfloat16 or float16; with `quantize`, the type it computes in.
        device: torch's name; by default a GPU where there is one. On `meta` there are no weights, only shapes: what
            each run of several processes loads for itself.
        quantize: nf4 or int8 hold the linear layers in 4 or 8 bits through bitsandbytes.

    Raises:
        ExpertError: another architecture, or a missing or damaged file.
        MissingExtraError: `quantize` without bitsandbytes.
    """
    path = base_folder(name, revision)
    identity, sizes = fingerprint(path), shape_of(read_config(path), str(path))
    check_tensors(Checkpoint(path), sizes.tensors, ExpertError)  # transformers would make up what is missing
    import torch  # takes seconds, and what is wrong is known before

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(path, torch_dtype(dtype), place, quantization(quantize, dtype))
    return Base(model, _tokenizer(path), name, path, identity)


def load_bottom(path: Path, layers: int) -> "PreTrainedModel":
    """The token embeddings and the bottom `layers` decoder layers of a base, on the CPU in float32; no head.

    The norm above them is the whole base's last: only the states below it are the base's own.

    Raises:
        ExpertError: another architecture, or a missing or damaged file.
    """
    import torch
    from transformers import LlamaModel

    return _model(path, torch.float32, "cpu", kind=LlamaModel, num_hidden_layers=layers)


def loaded_again(base: Base) -> Base:
    """The base with a model of its own, for what cannot leave it as it was: on the CPU, from where it is sharded."""
    return replace(base, model=_model(base.path, base.model.dtype, "cpu"))


def _model(
    path: Path,
    dtype: "torch.dtype",
    place: str,
    quantization: "BitsAndBytesConfig | None" = None,
    kind: "type[PreTrainedModel] | None" = None,
    **changed: Any,
) -> "PreTrainedModel":
    """A base's model by its checked files; `changed` are fields of its configuration."""
    from transformers import LlamaForCausalLM

    config = read_config(path)
    with told(f"base {path}"):
        model = (kind or LlamaForCausalLM).from_pretrained(
            path,
            config=model_config(path, config, **changed),
            generation_config=generation_config(path, config),
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": place},
            use_safetensors=True,
        )
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would lay 4-bit weights out anew at the first forward pass on such a CPU, for a product that
            # has no gradient, takes only widths that are multiples of 64, and rounds the scales to bfloat16.
            cast(Any, module).support_avx512bf16_for_cpu = False
    return cast("PreTrainedModel", model).eval()


def quantization(quantize: Quantize, dtype: str) -> "BitsAndBytesConfig | None":
    """How a base is loaded in fewer bits, computing in `dtype`.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"--quantize {quantize}", "bitsandbytes", "quantize") from error
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch_dtype(dtype))


def ffn_modules(model: "nn.Module", first_layer: int) -> "dict[str, nn.Module]":
    """{`model.layers.i.mlp`: module} for the layers from `first_layer` on: the parts an FFN expert owns."""
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] == "mlp" and int(parts[2]) >= first_layer:
            found[name] = module
    return found
