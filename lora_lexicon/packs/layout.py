"""How a pack is laid down: which files go where, its manifest and its card. `compose.mixture` reads it.

A pack holds everything but the base, which it names by fingerprint, and may hold that too.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lora_lexicon import __version__
from lora_lexicon.compose.mixture import ALLOWED, FORMAT, MANIFEST, Manifest, files_of
from lora_lexicon.domains.router import Router
from lora_lexicon.errors import PackError
from lora_lexicon.experts.checkpoint import CONFIG, INT8, RECORD, SCALE, WEIGHTS, read_expert
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.tensors import Checkpoint
from lora_lexicon.folders import HIDDEN, folder_bytes, put_file, sha256_of, write_record

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
TERMS = 8  # typical ones, that describe a domain
BASE_NOTES = ("README.md", "NOTICE", "training.json")


def place_adapter(pack: Path, adapter: Path, name: str) -> None:
    """Copies an adapter's files to `adapters/NAME`; nothing else in its folder is taken."""
    target = pack / "adapters" / name
    target.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS, INT8, RECORD):
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
        put_file(source / name, target / name, link=link)


@dataclass(frozen=True)
class About:
    """What a pack says of itself, beside what it holds.

    Attributes:
        licence: an SPDX expression; "" where none is given.
        languages: BCP 47 tags of what its definitions are written in.
        scores: each `system`, `metric`, `value`, `signature` and `rows`, as an evaluation's report has them.
    """

    name: str
    version: str = "0.1.0"
    licence: str = ""
    languages: tuple[str, ...] = ("en",)
    description: str = ""
    scores: tuple[dict[str, Any], ...] = ()


def about_of(manifest: Manifest) -> About:
    """What a pack says of itself."""
    found = {field.name: manifest.record.get(field.name, field.default) for field in fields(About)}
    return About(**{**found, "languages": tuple(found["languages"]), "scores": tuple(found["scores"])})


def write_manifest(
    pack: Path,
    *,
    about: About,
    base: dict[str, Any],
    router: Router,
    adapters: list[LoadedAdapter],
    made_from: dict[str, Any],
) -> None:
    """Writes router, card and manifest; the adapters (and the base) lie in the pack already.

    Args:
        base: `name`, `revision`, `architecture`, `vocabulary` and `fingerprint`; `path` is "base" where it lies inside,
            else None.
        made_from: where the entries came from, and what was done to the pack since.

    Raises:
        PackError: the pack holds a file that no pack may hold.
    """
    router.save(pack)
    record = {
        "format": FORMAT,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(about).items()},
        "base": base,
        **router_record(router),
        "domains": [domain_record(pack, a, terms) for a, terms in zip(adapters, router.terms, strict=True)],
        "made_from": made_from,
        "made_by": f"lora-lexicon {__version__}",
    }
    (pack / "README.md").write_text(_card(record, folder_bytes(pack)), encoding="utf-8")
    names = list(files_of(pack))
    for stray in names:
        if not ALLOWED.fullmatch(stray):
            raise PackError(f"{stray!r} cannot be part of a pack: take it out of the base's folder")
    files = {file: {"sha256": sha256_of(pack / file), "bytes": (pack / file).stat().st_size} for file in names}
    write_record(pack / MANIFEST, {**record, "files": files})


def router_record(router: Router) -> dict[str, Any]:
    """What a manifest says of its router."""
    return {
        "embedder": {"name": router.embedder_name, "fingerprint": _embedder_fingerprint(router)},
        "template": asdict(router.template),
    }


def _embedder_fingerprint(router: Router) -> str:
    """SHA-256 over all that the router's vectors depend on."""
    seen = hashlib.sha256(json.dumps(router.embedder_identity, sort_keys=True).encode())
    for key, tensor in sorted(router.embedder_tensors.items()):
        seen.update(f"{key} {tensor.dtype} {tensor.shape}".encode() + np.ascontiguousarray(tensor).tobytes())
    return seen.hexdigest()


def domain_record(pack: Path, adapter: LoadedAdapter, terms: Sequence[str] = ()) -> dict[str, Any]:
    """What a manifest says of a domain, whose adapter lies in the pack already."""
    factors, folder = adapter.factors, pack / "adapters" / adapter.name
    info = read_expert(folder) if (folder / RECORD).is_file() else None
    held = folder / (INT8 if (folder / INT8).is_file() else WEIGHTS)
    such = HIDDEN.sub("", ", ".join(terms[:TERMS]))
    dtypes = {ref.dtype for name, ref in Checkpoint(held, PackError).tensors.items() if not name.endswith(SCALE)}
    return {
        "name": adapter.name,
        "description": f"Terms such as {such}." if terms else "",
        "adapter": f"adapters/{adapter.name}",
        "rank": max(f.rank for f in factors.values()),
        "modules": sorted({layer.rpartition(".")[2] for layer in factors}),
        "dtype": ", ".join(sorted(dtypes)),
        "trained_parameters": sum(f.a.numel() + f.b.numel() for f in factors.values()),
        "recipe": info.recipe if info else {},
        "data": {"entries": info.entries_fingerprint, "rows": info.rows, "tokens": info.tokens} if info else {},
    }


def _card(record: dict[str, Any], size: int) -> str:
    base = record["base"]
    rows = "\n".join(
        f"| {d['name']} | {d['rank']} | {', '.join(d['modules'])} | {d['dtype']} | {d['trained_parameters']:,} | "
        f"{d['data'].get('rows') or '–'} |"
        for d in record["domains"]
    )
    scores = "".join(
        f"| {s['system']} | {s['metric']} | {s['value']:.4f} | {s['rows']} | `{s['signature']}` |\n"
        for s in record["scores"]
    )
    inside = "inside, under `base/`" if base["path"] else "not inside: it is named by its fingerprint"
    licence = record["licence"] or "unknown"
    own = licence.removeprefix("LicenseRef-")  # one that SPDX does not know
    front: dict[str, Any] = {"license": licence} if own == licence else {"license": "other", "license_name": own}
    front |= {"language": record["languages"], "library_name": "peft"}
    front |= {"base_model": base["name"], "tags": ["lora-lexicon", "lora", "definition-modelling"]}
    head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    table = f"\n| system | metric | value | rows | signature |\n|---|---|---:|---:|---|\n{scores}" if scores else ""
    plain = any(d["dtype"] == "int8" for d in record["domains"])
    peft = (
        "Adapters are held in 8 bits, which PEFT does not read: `lora-lexicon pack copy FOLDER --dtype float32` makes "
        "plain PEFT adapters of them."
        if plain
        else "Each folder under `adapters/` is a plain PEFT adapter of the same base."
    )
    return f"""---
{head}
---
# {record["name"]} {record["version"]}

{" ".join(record["description"].split()) or "A pack of domain adapters for definition modelling."}

It holds one adapter a domain, and the router that chooses among them from the prompt. {size / 1e6:.1f} MB. Made by
{record["made_by"]}.

Base: {json.dumps(base["name"])}, fingerprint `{base["fingerprint"][:16]}`, {inside}.

| domain | rank | modules | held as | parameters | training rows |
|---|---:|---|---|---:|---:|
{rows}
{table}
`lora-lexicon define TERM --context SENTENCE --model FOLDER` uses the whole pack. {peft}
"""
