"""The shared base: where it lies, what identifies it, and how it is loaded. Knows nothing of experts.

A base is identified by its content, not by its path: two copies of one checkpoint agree, a
fine-tuned or re-quantised one does not.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lora_lexicon.errors import ExpertError, MissingExtraError
from lora_lexicon.folders import read_record, sha256_of
from lora_lexicon.resources import find_base

Quantize = Literal["none", "nf4", "int8"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER_BYTES = 64 * 2**20
SAMPLE_BYTES = 1 << 16  # read at each tensor's head, middle and tail
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]  # never a pickle
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


class TensorPlace(NamedTuple):
    """Where a tensor lies in a safetensors file; `start` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class Base:
    """A loaded base, frozen, in evaluation mode.

    Attributes:
        name: as the user gave it (a folder, a Hub name or a shipped pack's name).
        path: the folder its files lie in.
        fingerprint: see `fingerprint`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path
    fingerprint: str

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return int(self.model.config.num_hidden_layers)


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
    tensors = [(name, file, place) for file in weight_files(path) for name, place in tensor_table(file).items()]
    for name, file, place in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(f"{name} {place.dtype} {place.shape}".encode())
        digest.update(_sample(file, place.start, place.end))
    return digest.hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """A base's config.json; only the Llama architecture is accepted."""
    config = read_record(path / "config.json", ExpertError, "a base model")
    if config.get("model_type") != "llama":
        raise ExpertError(
            f"base {path} has model_type {config.get('model_type')!r}; only Llama-architecture bases are supported"
        )
    return config


def vocabulary_hash(path: Path) -> str:
    """A SHA-256 over a tokenizer's vocabulary, however its file is laid out."""
    if (path / "tokenizer.json").is_file():
        record = read_record(path / "tokenizer.json", ExpertError, "a tokenizer")
        vocabulary = record.get("model", {}).get("vocab", {})
        items = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary
        added = sorted([token["id"], token["content"]] for token in record.get("added_tokens") or [])
        return hashlib.sha256(json.dumps([items, added]).encode()).hexdigest()
    if (path / "tokenizer.model").is_file():
        return sha256_of(path / "tokenizer.model")
    raise ExpertError(f"base {path} has no tokenizer.json and no tokenizer.model: copy its tokenizer there")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(read_record(index, ExpertError, "a sharded checkpoint").get("weight_map", {}).values())
        files = [path / str(name) for name in sorted(names)]
        strays = [file.name for file in files if file.parent != path]
        if strays or not files:
            raise ExpertError(f"{index} names no shard, or one outside its folder: download the base again")
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ExpertError(f"base {path} lacks {file.name}: only complete safetensors checkpoints are loaded")
    return files


def tensor_table(file: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises:
        ExpertError: the header is malformed, or the file shorter or longer than it says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        table = {name: _place(tensor, 8 + length) for name, tensor in header.items()}
        end = max((place.end for place in table.values()), default=8 + length)
        if end != size or any(not 8 + length <= place.start <= place.end for place in table.values()):
            raise ValueError(f"it should be {end:,} bytes and is {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ExpertError(f"{file} is damaged or truncated ({error}): copy or download it again") from error
    return table


def _place(tensor: dict[str, Any], data: int) -> TensorPlace:
    start, end = tensor["data_offsets"]
    return TensorPlace(str(tensor["dtype"]), tuple(map(int, tensor["shape"])), data + int(start), data + int(end))


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
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ExpertError(f"no base at {name!r}: give a folder, a Hub name or the name of a shipped pack")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExpertError(
            f"base {name!r} is no folder, and the Hugging Face Hub does not give it ({reason}): "
            "check the name and the network, or give a folder"
        ) from error


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
        device: torch's name; by default a GPU where there is one.
        quantize: nf4 or int8 hold the linear layers in 4 or 8 bits through bitsandbytes.

    Raises:
        ExpertError: another architecture, or a missing or damaged file.
        MissingExtraError: `quantize` without bitsandbytes.
    """
    path = base_folder(name, revision)
    identity = fingerprint(path)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = LlamaForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], quantization_config=_quantization(quantize, dtype), device_map={"": place}
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExpertError(f"base {path} cannot be loaded: {' '.join(str(error).split())}") from error
    model.requires_grad_(False)
    return Base(cast(PreTrainedModel, model).eval(), tokenizer, name, path, identity)


def _quantization(quantize: Quantize, dtype: str) -> BitsAndBytesConfig | None:
    if quantize == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"--quantize {quantize}", "bitsandbytes", "quantize") from error
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype])


def ffn_modules(model: nn.Module, first_layer: int) -> dict[str, nn.Module]:
    """{`model.layers.i.mlp`: module} for the layers from `first_layer` on: the parts an FFN expert owns."""
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] == "mlp" and int(parts[2]) >= first_layer:
            found[name] = module
    return found
