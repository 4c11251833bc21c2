"""experts/tensors.py: the safetensors library is the oracle; damage of any kind is one clear line."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts import tensors
from lora_lexicon.experts.tensors import Checkpoint, TensorPlan, write_checkpoint, write_file

ANY_FOLDER = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8),
    st.tuples(st.lists(st.integers(0, 5), max_size=3), DTYPES),
    max_size=6,
)


def _plans(contents: dict[str, torch.Tensor]) -> list[TensorPlan]:
    def piece(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
        yield from tensor.flatten().split(2)

    return [
        TensorPlan(n, tuple(t.shape), str(t.dtype).removeprefix("torch."), [partial(piece, t)])
        for n, t in contents.items()
    ]


@ANY_FOLDER
@given(described=TENSORS, limit=st.integers(1, 400))
def test_what_is_written_is_what_the_library_reads(tmp_path: Path, described: dict, limit: int) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    contents = {n: torch.randint(0, 2, tuple(shape)).to(dtype) for n, (shape, dtype) in described.items()}
    total = write_checkpoint(tmp_path, _plans(contents), max_shard_bytes=limit)
    read = {}
    for file in tmp_path.glob("*.safetensors"):
        read |= load_file(file)
    assert read.keys() == contents.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in contents.items())
    assert total == sum(t.numel() * t.element_size() for t in contents.values())
    ours = Checkpoint(tmp_path)
    assert all(torch.equal(ours.tensor(n), t) for n, t in contents.items())


@pytest.mark.parametrize("refused", ["nowhere", "when opened", "when written"])
@ANY_FOLDER
@given(described=TENSORS)
def test_a_copy_is_the_original_in_the_systems_cache_and_past_it(tmp_path: Path, described: dict, refused: str) -> None:
    opened, wrote, direct, buffer = os.open, os.write, getattr(os, "O_DIRECT", 0), 4096

    def refuse_open(file: Path, flags: int, mode: int) -> int:
        if refused == "when opened" and flags & direct:
            raise OSError(errno.EINVAL, "no")
        return opened(file, flags, mode)

    def refuse_write(handle: int, data: memoryview) -> int:
        if refused == "when written" and fcntl.fcntl(handle, fcntl.F_GETFL) & direct:
            raise OSError(errno.EINVAL, "no")
        return wrote(handle, data)

    contents = {n: torch.randint(0, 2, tuple(shape)).to(dtype) for n, (shape, dtype) in described.items()}
    save_file(contents, tmp_path / "x.safetensors")
    refs = Checkpoint(tmp_path / "x.safetensors").tensors
    plans = [TensorPlan(n, (2, *ref.shape), ref.dtype, [ref, ref]) for n, ref in refs.items()]
    reported: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse_open)
        patch.setattr(os, "write", refuse_write)
        patch.setattr(tensors, "BUFFER_BYTES", buffer)
        write_file(tmp_path / "y.safetensors", plans, reported.append)
    read = load_file(tmp_path / "y.safetensors")
    assert read.keys() == contents.keys()
    assert all(torch.equal(read[n], torch.stack([t, t])) for n, t in contents.items())
    assert sum(reported) == sum(plan.bytes for plan in plans)


def test_reading_in_chunks_and_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 16)
    value = torch.randn(5, 7)
    save_file({"a": value, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("a"), value)
    assert torch.equal(checkpoint.tensor("a", "bfloat16"), value.bfloat16())
    assert [len(chunk) for chunk in checkpoint.chunks("a")] == [7] * 5  # whole rows
    assert [len(chunk) for chunk in checkpoint.chunks("b")] == [3]


@ANY_FOLDER
@given(keep=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(tmp_path: Path, keep: float) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4, 4)}, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ExpertError, match=r"truncated|not a safetensors") as refusal:
        Checkpoint(file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},  # a gap
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        "text",
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ExpertError):
        Checkpoint(file)


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExpertError, match="own folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 17, 99])
def test_infinite_values_are_refused(tmp_path: Path, value: float, dtype: torch.dtype, position: int) -> None:
    tensor = torch.randn(100)
    tensor[position] = value
    save_file({"a": tensor.to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(ExpertError, match="infinite"):
        Checkpoint(tmp_path / "x.safetensors").tensor("a")
    ref = Checkpoint(tmp_path / "x.safetensors").ref("a")
    with pytest.raises(ExpertError, match=r"x\.safetensors: tensor a holds values that are infinite"):
        write_file(tmp_path / "y.safetensors", [TensorPlan("b", ref.shape, ref.dtype, [ref])])
