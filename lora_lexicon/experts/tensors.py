"""Safetensors checkpoints read lazily and written in one pass. Knows tensors and bytes, no model.

Nothing here holds a whole model, nor a whole tensor. What stays as it is goes from file to file in small
blocks; what changes moves in chunks of `CHUNK_BYTES`, through plain reads (a memory map would count as
resident memory until the system takes it back). Only the latter imports torch, which takes seconds: types
go by torch's names for them.
"""

import errno
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lexicon.errors import ExpertError, LexiconError
from lora_lexicon.folders import parse_json, read_record, write_record

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

CHUNK_BYTES = 2**20
FORGET_BYTES = 16 * 2**20  # of what was copied, between two reports of progress
BLOCK_BYTES = 2**18  # stays in a core's own cache
BUFFER_BYTES = 4 * 2**20  # of what is written at once
ALIGNMENT = 4096  # of the first tensor in a file, and of what is written past the system's cache
MAX_HEADER_BYTES, MAX_TENSORS = 16 * 2**20, 100_000  # of one file; a header of 100 MB, as safetensors reads, takes 3 GB
SHARD_BYTES = 5 * 10**9
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
NAMES = {code: name for name, code in CODES.items()}
ITEM_BYTES = dict(zip(CODES, (8, 4, 2, 2, 8, 4, 2, 1, 1, 1), strict=True))
# A number is infinite, or none, when all bits of its exponent are set: (an integer of its width, these bits).
EXPONENTS = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}


def promoted(dtypes: Iterable[str]) -> str:
    """The smallest floating-point type that holds all of these, as torch promotes them; integers give way."""
    floats = {dtype for dtype in dtypes if dtype in EXPONENTS}
    return "float32" if floats == {"float16", "bfloat16"} else max(floats, key=ITEM_BYTES.__getitem__)


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's type of this name."""
    import torch

    return getattr(torch, dtype)


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


Piece = TensorRef | Callable[[], "Iterable[Tensor]"]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written: its pieces follow each other in row-major order.

    A piece is a tensor of some file, of the same `dtype`, copied as it lies there; or it is called when its
    turn comes and yields tensors of `dtype`, of any shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: Sequence[Piece]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Checkpoint:
    """A safetensors file, or a folder with `model.safetensors` or its shards.

    Attributes:
        files: the safetensors files.
        tensors: every tensor's place, shape and type, by name, as the validated headers say.

    Raises:
        LexiconError: (of class `error`) a file that is missing, truncated, or no safetensors.
    """

    def __init__(self, path: Path, error: type[LexiconError] = ExpertError) -> None:
        self.path, self._error = Path(path), error
        self.files = self._files()
        self.tensors: dict[str, TensorRef] = {}
        for file in self.files:
            for name, ref in _read_header(file, error).items():
                if name in self.tensors:
                    raise error(f"{path}: tensor {name} is in two files: download or write the checkpoint again")
                self.tensors[name] = ref

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        index = self.path / INDEX
        if not index.is_file():
            return [self.path / WHOLE]
        shards = read_record(index, self._error, "a sharded checkpoint").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise self._error(f"{index}: weight_map must name files of its own folder")
        if (self.path / WHOLE).exists() and set(shards.values()) != {WHOLE}:
            raise self._error(
                f"{self.path} holds {WHOLE} and an index of other files: take away what is not the model's"
            )
        return [self.path / shard for shard in sorted(set(shards.values()))]

    def ref(self, name: str) -> TensorRef:
        """The place of one tensor.

        Raises:
            LexiconError: there is none of that name.
        """
        if name not in self.tensors:
            raise self._error(f"{self.path} holds no tensor {name}: it is not a checkpoint of this architecture")
        return self.tensors[name]

    def piece(self, name: str, dtype: str) -> Piece:
        """The tensor as a piece of a plan: copied if it is held in `dtype`, else converted."""
        ref = self.ref(name)
        return ref if ref.dtype == dtype else partial(self.chunks, name, dtype)

    def chunks(self, name: str, dtype: str | None = None) -> "Iterator[Tensor]":
        """The tensor's values, flat and in order, converted to `dtype`.

        A chunk is whole rows (of the first dimension), at most `CHUNK_BYTES` in float32 unless one row is longer:
        two checkpoints give chunks of equal length, whatever their dtypes.

        Raises:
            LexiconError: a value is infinite or not a number.
        """
        import torch

        ref = self.ref(name)
        row = prod(ref.shape[1:])
        size = max(1, CHUNK_BYTES // (4 * row)) * row * ITEM_BYTES[ref.dtype] if row else 1
        with ref.file.open("rb") as file:
            file.seek(ref.offset)
            left = ref.bytes
            while left:
                # A fresh buffer each time: the tensor shares its memory.
                buffer = bytearray(min(left, size))
                if file.readinto(buffer) != len(buffer):
                    raise _changed(ref, self._error)
                left -= len(buffer)
                chunk = torch.frombuffer(buffer, dtype=torch_dtype(ref.dtype)).to(torch_dtype(dtype or ref.dtype))
                if not is_finite(chunk):
                    raise _not_finite(ref, self._error)
                yield chunk

    def tensor(self, name: str, dtype: str | None = None) -> "Tensor":
        """One whole tensor in memory."""
        import torch

        ref = self.ref(name)
        chunks = [torch.empty(0, dtype=torch_dtype(dtype or ref.dtype)), *self.chunks(name, dtype)]
        return torch.cat(chunks).reshape(ref.shape)


def is_finite(chunk: "Tensor") -> bool:
    """Whether no value is infinite or not a number; the extremes tell, in a tenth of isfinite's time."""
    import torch

    if not chunk.is_floating_point() or not chunk.numel():
        return True
    return bool(torch.isfinite(torch.stack(chunk.aminmax())).all())


def _changed(ref: TensorRef, error: type[LexiconError]) -> LexiconError:
    return error(f"{ref.file} ended within tensor {ref.name}: the file changed while it was read")


def _not_finite(ref: TensorRef, error: type[LexiconError]) -> LexiconError:
    return error(f"{ref.file}: tensor {ref.name} holds values that are infinite or not a number: make it again")


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
            header = parse_json(handle.read(length))
            header.pop("__metadata__", None)
            if len(header) > MAX_TENSORS:
                raise ValueError(f"more than {MAX_TENSORS:,} tensors")
            refs = {name: _ref(name, file, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
            said = str(cause) if isinstance(cause, ValueError) else "its header is none"
            raise error(f"{file} is not a safetensors file ({said}): copy or download it again") from cause
    end = 8 + length
    for ref in sorted(refs.values(), key=lambda ref: (ref.offset, ref.bytes)):
        if ref.offset != end:
            raise error(f"{file}: its header leaves a gap or an overlap at byte {end}: copy or download it again")
        end += ref.bytes
    if end != size:
        raise error(f"{file} is truncated: {size:,} bytes where its header says {end:,}: copy or download it again")
    return refs


def _ref(name: str, file: Path, start: int, entry: dict[str, Any]) -> TensorRef:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (first, last, *shape)):
        raise ValueError(f"{name} has a negative or fractional size")
    ref = TensorRef(name, file, start + first, shape, NAMES[entry["dtype"]])
    if ref.bytes != last - first:
        raise ValueError(f"{name} takes {ref.bytes:,} bytes by its shape {shape}, {last - first:,} by its offsets")
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
    weight_map = write_shards(folder, "model", plans, max_shard_bytes=max_shard_bytes, progress=progress)
    total = sum(plan.bytes for plan in plans)
    if len(set(weight_map.values())) > 1:
        write_index(folder, weight_map, total)
    return total


def write_shards(
    folder: Path,
    stem: str,
    plans: Sequence[TensorPlan],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Writes `plans` as `STEM.safetensors`, or as several of `STEM-*-of-*`; returns {tensor: file}."""
    shards = _shards(plans, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, progress)
        weight_map |= {plan.name: name for plan in shard}
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Writes the index of a sharded checkpoint: {tensor: file}, and the bytes of all tensors."""
    write_record(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def whole(tensor: "Tensor") -> "Iterator[Tensor]":
    """A tensor in memory as what a piece of a plan yields: `partial(whole, tensor)`."""
    yield tensor


def overwrite(ref: TensorRef, tensor: "Tensor") -> None:
    """Puts another tensor of the same shape and dtype in one's place, in its file."""
    assert (tuple(tensor.shape), tensor.dtype) == (ref.shape, torch_dtype(ref.dtype)), f"{ref.name}: another type"
    with ref.file.open("r+b") as handle:
        handle.seek(ref.offset)
        handle.write(_bytes_of(tensor))
        handle.flush()
        os.fsync(handle.fileno())


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
    """Writes one safetensors file, piece by piece.

    Raises:
        LexiconError: a value that is copied is infinite or not a number.
    """
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
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    report = progress or (lambda _: None)
    out = _Output(file)
    try:
        out.write(len(text).to_bytes(8, "little") + text)
        for plan in plans:
            start = out.written
            for piece in plan.pieces:
                if isinstance(piece, TensorRef):
                    assert piece.dtype == plan.dtype, f"{plan.name}: a piece of {piece.dtype}"
                    _copy(piece, out, report)
                else:
                    _compute(piece, plan, out, report)
            written = out.written - start
            assert written == plan.bytes, f"{plan.name}: {plan.bytes} bytes by its shape, {written} by its pieces"
        out.finish()
    finally:
        out.close()


def _compute(
    piece: Callable[[], "Iterable[Tensor]"], plan: TensorPlan, out: "_Output", report: Callable[[int], None]
) -> None:
    for chunk in piece():
        assert chunk.dtype == torch_dtype(plan.dtype), f"{plan.name}: a piece of {chunk.dtype}"
        data = _bytes_of(chunk)
        out.write(data)
        report(len(data))


def _bytes_of(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _copy(ref: TensorRef, out: "_Output", report: Callable[[int], None]) -> None:
    """Appends a tensor's bytes, read once; every value must be finite."""
    block = np.empty(BLOCK_BYTES, np.uint8)
    with ref.file.open("rb", buffering=0) as source:
        source.seek(ref.offset)
        for start in range(0, ref.bytes, BLOCK_BYTES):
            part = block[: ref.bytes - start]
            if source.readinto(part.data) != len(part):
                raise _changed(ref, ExpertError)
            out.write(part.data)
            if _spoilt(part, ref.dtype):
                raise _not_finite(ref, ExpertError)
            done = start + len(part)
            if done == ref.bytes or not done % FORGET_BYTES:
                report((done - 1) % FORGET_BYTES + 1)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(source.fileno(), ref.offset, done, os.POSIX_FADV_DONTNEED)


def _spoilt(block: "NDArray[np.uint8]", dtype: str) -> bool:
    """Whether a block of bytes holds a value that is infinite or not a number; the block is changed."""
    if dtype not in EXPONENTS or not len(block):
        return False
    integer, exponent = EXPONENTS[dtype]
    bits = block.view(integer)
    np.bitwise_and(bits, integer(exponent), out=bits)
    return bool(bits.max() == exponent)


def not_finite(weights: Checkpoint, progress: Callable[[int], None] | None = None) -> list[str]:
    """The tensors with a value that is infinite or not a number; every byte is read, in blocks of `BLOCK_BYTES`.

    Args:
        progress: called with the number of bytes just read.

    Raises:
        LexiconError: a file that ends too soon.
    """
    found, block = [], np.empty(BLOCK_BYTES, np.uint8)
    for ref in sorted(weights.tensors.values(), key=lambda ref: (ref.file, ref.offset)):
        with ref.file.open("rb", buffering=0) as source:
            source.seek(ref.offset)
            for start in range(0, ref.bytes, BLOCK_BYTES):
                part = block[: ref.bytes - start]
                if source.readinto(part.data) != len(part):
                    raise _changed(ref, ExpertError)
                if progress is not None:
                    progress(len(part))
                if _spoilt(part, ref.dtype):
                    found.append(ref.name)
                    break
    return found


class _Output:
    """A new file, written from its start in the background, past the system's cache where it lets us.

    On a machine of two virtual cores a copy took most of its time to find memory for that cache.
    """

    def __init__(self, file: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._handle = os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(file, flags, 0o666)
        self._buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]  # on the borders of pages, as O_DIRECT wants
        self._filled = self._stored = 0  # bytes in the first buffer; bytes on their way before it
        self._writer = ThreadPoolExecutor(1)
        self._waiting: Future[None] | None = None

    @property
    def written(self) -> int:
        return self._stored + self._filled

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            size = min(len(view), BUFFER_BYTES - self._filled)
            self._buffers[0][self._filled : self._filled + size] = view[:size]
            self._filled += size
            view = view[size:]
            if self._filled == BUFFER_BYTES:
                self._flush(BUFFER_BYTES)

    def finish(self) -> None:
        """Returns when all that was written lies on the disk."""
        size = self.written
        self._flush(-(-self._filled // ALIGNMENT) * ALIGNMENT)
        self._wait()
        os.ftruncate(self._handle, size)
        os.fsync(self._handle)

    def close(self) -> None:
        self._writer.shutdown()
        os.close(self._handle)

    def _flush(self, size: int) -> None:
        self._wait()
        self._waiting = self._writer.submit(self._store, memoryview(self._buffers[0])[:size], self._stored)
        self._stored += size
        self._filled = 0
        self._buffers.reverse()

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()

    def _store(self, view: memoryview, offset: int) -> None:
        os.lseek(self._handle, offset, os.SEEK_SET)
        while len(view):
            try:
                view = view[os.write(self._handle, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _leave_direct(self._handle):
                    raise


def _leave_direct(handle: int) -> bool:
    """Lets an open file be written through the cache: some file systems take O_DIRECT and refuse such a write."""
    import fcntl  # not on Windows, which has no O_DIRECT either

    flags, direct = fcntl.fcntl(handle, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
