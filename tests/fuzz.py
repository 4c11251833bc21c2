"""Feeds damaged files to what reads them: each is read as it should be, or refused in one line. Not in `make test`.

    python tests/fuzz.py                      # 25,000 inputs for each of the parsers, made by chance
    python tests/fuzz.py --runs 200000 archive
    pip install atheris; python tests/fuzz.py --atheris archive -runs=100000     # guided by coverage, on Linux

What is read must hold: finite values, names that are safe, files inside their folder. Anything but a `LexiconError` of
one line stops it, and the input lies in `fuzz-failure`.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lora_lexicon.archive import unpack, write_archive
from lora_lexicon.compose.mixture import ALLOWED, read_manifest
from lora_lexicon.domains.router import load_router
from lora_lexicon.errors import LexiconError
from lora_lexicon.experts.checkpoint import load_adapter, read_expert
from lora_lexicon.experts.tensors import Checkpoint
from lora_lexicon.resources import packs

PACK = packs()["tiny"]
ADAPTER = PACK / "adapters" / "make-cause"
MEMORY = 6 * 2**30  # of address space beside what is held at the start: what asks for more fails
WORDS = [b"{", b"}", b"[", b"]", b"NaN", b"1e999", b"-1", b"null", b"true", b'"..\\/"', b"../", b"/etc/passwd"]
WORDS += [b"\\u0000", b"9" * 5000, b"[" * 10_000, b"PK\x03\x04", b"PK\x05\x06", b"\xff" * 8, b"\x00" * 8, b'"F32"']


class Target(ABC):
    """One parser: the seeds to damage, and what reads a file of them in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Files that are whole, or nearly."""

    @abstractmethod
    def read(self, content: bytes) -> None:
        """Reads a file of this content, and asserts what must hold of what it read."""


class Archive(Target):
    def seeds(self) -> list[bytes]:
        out, found = self.folder / "seed.lexpack", []
        for names in (["manifest.json", "router.json", "README.md"], ["manifest.json"]):
            write_archive(PACK, names, out)
            found.append(out.read_bytes())
        return found

    def read(self, content: bytes) -> None:
        file, out = self.folder / "x.lexpack", self.folder / "out"
        file.write_bytes(content)
        try:
            unpack(file, out)
            for path in out.rglob("*"):
                assert not path.is_symlink()
                assert path.read_bytes() == (PACK / path.name).read_bytes()  # whose CRC nothing damaged has by chance
        finally:
            shutil.rmtree(out, ignore_errors=True)
            assert {path.name for path in self.folder.iterdir()} <= {"x.lexpack", "seed.lexpack"}


class Manifest(Target):
    def seeds(self) -> list[bytes]:
        return [(PACK / "manifest.json").read_bytes()]

    def read(self, content: bytes) -> None:
        (self.folder / "manifest.json").write_bytes(content)
        found = read_manifest(self.folder)
        assert all(ALLOWED.fullmatch(path) for path in found.files)
        assert all(".." not in name and "/" not in name for name in found.domains)


class Router(Target):
    """The record; its tensors are as they were."""

    file = "router.json"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in ("router.json", "router.safetensors"):
            shutil.copyfile(PACK / name, folder / name)

    def seeds(self) -> list[bytes]:
        return [(PACK / self.file).read_bytes()]

    def read(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)
        found = load_router(self.folder)
        assert np.isfinite(found.centroids).all()
        assert len(found.names) == len(found.centroids)


class RouterTensors(Router):
    file = "router.safetensors"


class Adapter(Target):
    """The config of an adapter; its weights are as they were."""

    file = "adapter_config.json"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in ("adapter_config.json", "adapter_model.safetensors", "expert.json"):
            shutil.copyfile(ADAPTER / name, folder / name)

    def seeds(self) -> list[bytes]:
        return [(ADAPTER / self.file).read_bytes()]

    def read(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)
        found = load_adapter(self.folder)
        assert all(np.isfinite(f.scaling) and f.a.isfinite().all() for f in found.factors.values())


class AdapterTensors(Adapter):
    file = "adapter_model.safetensors"

    def seeds(self) -> list[bytes]:
        whole = (ADAPTER / self.file).read_bytes()
        return [whole[: 8 + int.from_bytes(whole[:8], "little") + 4096], whole]


class Expert(Adapter):
    file = "expert.json"

    def read(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)
        assert "/" not in read_expert(self.folder).name


class Header(Target):
    """Our own reader of safetensors."""

    def seeds(self) -> list[bytes]:
        whole = (ADAPTER / "adapter_model.safetensors").read_bytes()
        header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
        return [len(header).to_bytes(8, "little") + header + bytes(24), whole]

    def read(self, content: bytes) -> None:
        file = self.folder / "x.safetensors"
        file.write_bytes(content)
        for ref in Checkpoint(file).tensors.values():
            assert ref.offset + ref.bytes <= len(content)
            for _ in Checkpoint(file).chunks(ref.name):
                pass


TARGETS: dict[str, Callable[[Path], Target]] = {
    "archive": Archive, "manifest": Manifest, "router": Router, "router-tensors": RouterTensors, "adapter": Adapter,
    "adapter-tensors": AdapterTensors, "expert": Expert, "header": Header,
}  # fmt: skip


def damaged(seed: bytes, chance: random.Random) -> bytes:
    """A seed with some bytes changed, words put in, parts taken out, doubled or moved, or its end cut off."""
    content = bytearray(seed)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        at, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        if chance.random() < 0.5:  # near the head, where the structure is
            at, end = at % 512, at % 512 + chance.randrange(64)
        kind = chance.randrange(7)
        if kind == 0:
            content[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            content[at:at] = chance.choice(WORDS)
        elif kind == 2:
            word = chance.choice(WORDS)
            content[at : at + len(word)] = word
        elif kind == 3:
            del content[at : min(end, at + 64)]
        elif kind == 4:
            content[at:at] = content[at : min(end, at + 4096)]
        elif kind == 5 and content:
            content[min(at, len(content) - 1)] ^= 1 << chance.randrange(8)
        elif chance.random() < 0.2:
            del content[at:]
        content = content or bytearray(b"x")
    return bytes(content)


def tried(target: Target, content: bytes) -> bool:
    """Whether the content was read; False where it was refused in one line."""
    try:
        target.read(content)
    except LexiconError as refusal:
        if "\n" in str(refusal):
            Path("fuzz-failure").write_bytes(content)
            raise AssertionError(f"a refusal of several lines: {refusal}") from refusal
        return False
    except BaseException:
        Path("fuzz-failure").write_bytes(content)
        raise
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed damaged files to what reads them.")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], default=[])
    parser.add_argument("--runs", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--atheris", action="store_true", help="Let atheris choose; what follows is libFuzzer's.")
    arguments, rest = parser.parse_known_args()
    warnings.simplefilter("ignore")  # PEFT's, of keys that it does not know
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.atheris:
            guided(TARGETS[arguments.targets[0]](Path(scratch)), Path(scratch + "-seeds"), rest)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        for name in arguments.targets or TARGETS:
            folder = Path(scratch) / name
            folder.mkdir()
            target, chance = TARGETS[name](folder), random.Random(arguments.seed)
            seeds, began, read = target.seeds(), time.perf_counter(), 0
            for _ in range(arguments.runs):
                read += tried(target, damaged(chance.choice(seeds), chance))
            seconds = time.perf_counter() - began
            print(
                f"{name:16} {arguments.runs:,} inputs, {read:,} read, the others refused; {seconds:.0f} s", flush=True
            )


def guided(target: Target, corpus: Path, options: list[str]) -> None:
    """Lets atheris choose the inputs, by what they reach in our code."""
    import atheris  # type: ignore[import-not-found]

    corpus.mkdir()
    for i, seed in enumerate(target.seeds()):
        (corpus / str(i)).write_bytes(seed)
    for module in [m for name, m in sys.modules.items() if name.startswith("lora_lexicon.")]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, name, atheris.instrument_func(value))
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda content: tried(target, content) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
