"""How a pack is laid down: which files go where, its manifest and its card. `compose.mixture` reads it.

A pack holds everything but the base, which it names by fingerprint, and may hold that too.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lexicon import __version__
from lora_lexicon.compose.mixture import ALLOWED, FORMAT, MANIFEST
from lora_lexicon.domains.router import Router
from lora_lexicon.errors import PackError
from lora_lexicon.experts.checkpoint import CONFIG, RECORD, WEIGHTS
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.tensors import Checkpoint
from lora_lexicon.folders import folder_bytes, sha256_of, write_record

BASE_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
BASE_NOTES = ("README.md", "NOTICE", "training.json")


def files_of(pack: Path) -> Iterator[str]:
    """The paths, within the pack, of all its files, in order; the manifest is left out."""
    for path in sorted(pack.rglob("*")):
        name = path.relative_to(pack).as_posix()
        if name != MANIFEST and (path.is_symlink() or not path.is_dir()):
            yield name


def place_adapter(pack: Path, adapter: Path, name: str) -> None:
    """Copies an adapter's three files to `adapters/NAME`; nothing else in its folder is taken."""
    target = pack / "adapters" / name
    target.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS, RECORD):
        if (adapter / file).is_file():
            shutil.copyfile(adapter / file, target / file)


def place_base(pack: Path, base: Path) -> None:
    """Copies a base with its tokenizer and notices to `base/`."""
    (pack / "base").mkdir()
    names = [*BASE_FILES, *TOKENIZER_FILES, *BASE_NOTES, *(file.name for file in Checkpoint(base).files)]
    for name in names:
        if (base / name).is_file():
            shutil.copyfile(base / name, pack / "base" / name)


def fill(source: Path, target: Path, *, link: bool) -> None:
    """Fills `target` with the files of a pack.

    Args:
        link: as hard links where the file system has them, for a copy that takes the place of its
            source: a base inside the pack is then not copied.
    """
    for name in [*files_of(source), MANIFEST]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(source / name, target / name)
                continue
            except OSError:
                pass  # another file system, or one without links
        shutil.copyfile(source / name, target / name)


def write_manifest(
    pack: Path,
    *,
    name: str,
    base: dict[str, Any],
    router: Router,
    adapters: list[LoadedAdapter],
    made_from: dict[str, Any],
) -> None:
    """Writes router, card and manifest; the adapters (and the base) lie in the pack already.

    Args:
        base: `name` and `fingerprint`; `path` is "base" where it lies inside, else None.
        made_from: where the entries came from, and what was done to the pack since.

    Raises:
        PackError: the pack holds a file that no pack may hold.
    """
    router.save(pack)
    record = {
        "format": FORMAT,
        "name": name,
        "base": base,
        "embedder": router.embedder_name,
        "domains": [_domain(adapter) for adapter in adapters],
        "made_from": made_from,
        "made_by": f"lora-lexicon {__version__}",
    }
    (pack / "README.md").write_text(_card(record, folder_bytes(pack)), encoding="utf-8")
    names = list(files_of(pack))
    for stray in names:
        if not ALLOWED.fullmatch(stray):
            raise PackError(f"{stray!r} cannot be part of a pack: take it out of the base's folder")
    write_record(pack / MANIFEST, {**record, "files": {file: sha256_of(pack / file) for file in names}})


def _domain(adapter: LoadedAdapter) -> dict[str, Any]:
    factors = adapter.factors
    return {
        "name": adapter.name,
        "adapter": f"adapters/{adapter.name}",
        "rank": max(f.a.shape[1] for f in factors.values()),
        "modules": sorted({layer.rpartition(".")[2] for layer in factors}),
        "trained_parameters": sum(f.a.numel() + f.b.numel() for f in factors.values()),
    }


def _card(record: dict[str, Any], size: int) -> str:
    base = record["base"]
    rows = "\n".join(
        f"| {d['name']} | {d['rank']} | {', '.join(d['modules'])} | {d['trained_parameters']:,} |"
        for d in record["domains"]
    )
    inside = "inside, under `base/`" if base["path"] else "not inside: it is named by its fingerprint"
    return f"""---
library_name: peft
tags: [lora-lexicon, lora, definition-modelling]
---
# {record["name"]}

A pack of domain adapters for definition modelling, with the router that chooses among them from the
prompt. {size / 1e6:.1f} MB. Made by {record["made_by"]}.

Base: {json.dumps(base["name"])}, fingerprint `{base["fingerprint"][:16]}`, {inside}.

| domain | rank | modules | parameters |
|---|---:|---|---:|
{rows}

`lora-lexicon define TERM --context SENTENCE --model FOLDER` uses the whole pack. Each folder under
`adapters/` is a plain PEFT adapter of the same base.
"""
