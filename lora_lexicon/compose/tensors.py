"""Safetensors checkpoints read lazily and written in one pass. Knows tensors and bytes, no model.

Nothing here holds a whole model, nor a whole tensor: data moves in chunks of `CHUNK_BYTES`, through
plain reads (a memory map would count as resident memory until the system takes it back).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lora_lexicon.errors import ExpertError, LexiconError
from lora_lexicon.folders import read_record, write_record

CHUNK_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written: its pieces follow each other in row-major order.

    A piece is called when its turn comes and yields tensors of `dtype`, of any shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[Callable[[], Iterable[Tensor]]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A safetensors file, or a folder with `model.safetensors` or its shards.

    Attributes:
        tensors: every tensor's place, shape and dtype, by name, as the validated headers say.

    Raises:
        LexiconError: (of class `error`) a file that is missing, truncated, or no safetensors.
    """

    def __init__(self, path: Path, error: type[LexiconError] = ExpertError) -> None:
        self.path, self._error = Path(path), error
        self.tensors: dict[str, TensorRef] = {}
        for file in self._files():
            for name, ref in _read_header(file, error).items():
                if name in self.tensors:
                    raise error(f"{path}: tensor {name} is in two files: download or write the checkpoint again")
                self.tensors[name] = ref

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return [self.path / "model.safetensors"]
        shards = read_record(index, self._error, "a sharded checkpoint").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise self._error(f"{index}: weight_map must name files of its own folder")
        return [self.path / shard for shard in sorted(set(shards.values()))]

    def ref(self, name: str) -> TensorRef:
        """The place of one tensor.

        Raises:
            LexiconError: there is none of that name.
        """
        if name not in self.tensors:
            raise self._error(f"{self.path} holds no tensor {name}: it is not a checkpoint of this architecture")
        return self.tensors[name]

    def chunks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The tensor's values, flat and in order, in chunks of at most `CHUNK_BYTES`, converted to `dtype`.

        Raises:
            LexiconError: a value is infinite or not a number.
        """
        ref = self.ref(name)
        with ref.file.open("rb") as file:
            file.seek(ref.offset)
            left = ref.bytes
            while left:
                # A fresh buffer each time: the tensor shares its memory.
                buffer = bytearray(min(left, CHUNK_BYTES))
                if file.readinto(buffer) != len(buffer):
                    raise self._error(f"{ref.file} ended within tensor {name}: the file changed while it was read")
                left -= len(buffer)
                chunk = torch.frombuffer(buffer, dtype=ref.dtype)
                if dtype is not None:
                    chunk = chunk.to(dtype)
                if not is_finite(chunk):
                    raise self._error(f"{ref.file}: tensor {name} holds values that are infinite or not a number")
                yield chunk

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One whole tensor in memory."""
        chunks = list(self.chunks(name, dtype))
        shape = self.ref(name).shape
        return torch.cat(chunks).reshape(shape) if chunks else torch.empty(shape, dtype=dtype or self.ref(name).dtype)


def is_finite(chunk: Tensor) -> bool:
    """Whether no value is infinite or not a number; the extremes tell, in a tenth of isfinite's time."""
    return not chunk.is_floating_point() or bool(torch.isfinite(torch.stack(chunk.aminmax())).all())


def _read_header(file: Path, error: type[LexiconError]) -> dict[str, TensorRef]:
    """Every tensor of one file. What the header says must fit the file to the byte."""
    if not file.is_file():
        raise error(f"{file} is missing: the checkpoint is incomplete")
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise error(f"{file} is truncated or not a safetensors file: copy or download it again")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            refs = {name: _ref(file, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise error(f"{file} is not a safetensors file ({cause}): copy or download it again") from cause
    end = 8 + length
    for ref in sorted(refs.values(), key=lambda ref: (ref.offset, ref.bytes)):
        if ref.offset != end:
            raise error(f"{file}: its header leaves a gap or an overlap at byte {end}: copy or download it again")
        end += ref.bytes
    if end != size:
        raise error(f"{file} is truncated: {size:,} bytes where its header says {end:,}: copy or download it again")
    return refs


def _ref(file: Path, start: int, entry: dict[str, Any]) -> TensorRef:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (first, last, *shape)):
        raise ValueError("a negative or fractional size")
    ref = TensorRef(file, start + first, shape, DTYPES[entry["dtype"]])
    if ref.bytes != last - first:
        raise ValueError("a shape that does not fit its bytes")
    return ref


def write_checkpoint(
    folder: Path,
    plans: Sequence[TensorPlan],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes `plans` as `model.safetensors`, or as shards with their index; returns the bytes of all tensors.

    Args:
        progress: called with the number of bytes just written.
    """
    shards = _shards(plans, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, progress)
        weight_map |= {plan.name: name for plan in shard}
    total = sum(plan.bytes for plan in plans)
    if len(shards) > 1:
        record = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_record(folder / "model.safetensors.index.json", record)
    return total


def _shards(plans: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    used = 0
    for plan in plans:
        if shards[-1] and used + plan.bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(plan)
        used += plan.bytes
    return shards


def write_file(file: Path, plans: Sequence[TensorPlan], progress: Callable[[int], None] | None = None) -> None:
    """Writes one safetensors file, piece by piece."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": CODES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.bytes],
        }
        offset += plan.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for plan in plans:
            _write_tensor(handle, plan, progress)
        handle.flush()
        os.fsync(handle.fileno())


def _write_tensor(handle: BinaryIO, plan: TensorPlan, progress: Callable[[int], None] | None) -> None:
    left = plan.bytes
    for piece in plan.pieces:
        for chunk in piece():
            assert chunk.dtype == plan.dtype, f"{plan.name}: a piece of {chunk.dtype}"
            data = chunk.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            handle.write(cast(Any, data))  # an array is a buffer, which the stubs do not know
            left -= data.nbytes
            if progress is not None:
                progress(data.nbytes)
    assert left == 0, f"{plan.name}: pieces and shape differ by {left} bytes"
