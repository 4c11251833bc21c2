"""Domains of a pack renamed, merged or split; every file of the others stays as it is. Knows no training and no scores.

Two adapters are merged as the mean of what they add to the base, weighted by their training rows. That mean is a
product of rank r1 + r2, which is written as it is: nothing is lost but by the mean itself. A lower rank is the best of
its size (the SVD of that product, cut off), and the share of the squared change that it keeps is told.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lora_lexicon.compose.extract import low_rank_config
from lora_lexicon.compose.mixture import Manifest
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.domains.edit import Members, halved, merged_router, named, split_router
from lora_lexicon.domains.embed import FIT_BATCH
from lora_lexicon.domains.fit import prompts_of
from lora_lexicon.domains.router import load_router
from lora_lexicon.errors import ExpertError, PackError
from lora_lexicon.experts.checkpoint import (
    RECORD,
    ExpertInfo,
    check_name,
    load_adapter,
    read_expert,
    save_lora,
    write_expert,
)
from lora_lexicon.experts.cost import MAX_RANK
from lora_lexicon.experts.lora import Factors, LoadedAdapter
from lora_lexicon.packs.pack import change_pack, holding, verify_pack


def rename_domain(
    pack: Path, old: str, new: str, *, out: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Gives a domain another name, in the pack's place or as the new pack `out`; returns the new manifest.

    Raises:
        LexiconError: a damaged pack, no such domain, or a name that cannot be.
    """
    with _workshop(pack, out) as folder:
        manifest, router = verify_pack(pack), load_router(pack)
        check_domains(manifest, [old], [new])
        place = _copied(pack / "adapters" / old, folder / new, new, {"renamed_from": old})
        router = router.renamed([new if name == old else name for name in router.names])
        return change_pack(pack, manifest, router, {new: place}, {}, out=out, overwrite=overwrite)


def merge_domains(
    pack: Path,
    names: Sequence[str],
    into: str,
    *,
    rank: int | None = None,
    rows: Sequence[Entry] = (),
    base: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes one domain of several, in the pack's place or as the new pack `out`.

    Args:
        rank: of the merged adapter; None: the sum of theirs, which is exact.
        rows: entries, of which those that the router sends to one of the domains describe the merged one. Without
            any, the domains' own centroids, weighted by their members, and their typical terms do.

    Returns:
        `domains`, `merged`, `into`, `weights` (by domain), `rank` (the largest), `energy` (the share of the squared
        change that the rank keeps), `described_by` ("entries" or "typical terms"), `members` (entries that described
        it) and `record` (the new manifest).

    Raises:
        LexiconError: a damaged pack, no such domain, or a name that cannot be.
    """
    with _workshop(pack, out) as folder:
        manifest, router = verify_pack(pack), load_router(pack)
        check_domains(manifest, names, [into])
        folders = {name: pack / "adapters" / name for name in names}
        weights, members = weights_of(folders), None
        if rows:
            members = _members(load_system(str(pack), base=base), rows, names)
        router = merged_router(router, weights, into, members)
        made = write_merged(folder / into, folders, weights, rank, manifest)
        record = change_pack(pack, manifest, router, {into: folder / into}, {}, out=out, overwrite=overwrite)
    described = {"described_by": "entries" if members else "typical terms", "members": len(members or ())}
    return {"domains": list(router.names), "merged": list(names), "into": into, **made, **described, "record": record}


def split_domain(
    pack: Path,
    name: str,
    rows: Sequence[Entry],
    into: Sequence[str] = (),
    *,
    seed: int = 42,
    base: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes two domains of one by clustering its entries; both start with its adapter.

    Args:
        rows: entries, of which those that the router sends to the domain are clustered.
        into: two names; by default see `halved`.

    Returns:
        `domains`, `split`, `into` (entries by child), `elsewhere` (how many of the other entries go to a child now)
        and `record` (the new manifest).

    Raises:
        LexiconError: a damaged pack, no such domain, a name that cannot be, or too few entries of the domain.
    """
    with _workshop(pack, out) as folder:
        manifest, before = verify_pack(pack), load_router(pack)
        check_domains(manifest, [name], into)
        system = load_system(str(pack), base=base)
        members = _members(system, rows, [name])
        halves, names = halved(before.prepare(members.vectors), members.rows, into, before.names, seed)
        check_domains(manifest, [name], names)
        router = split_router(before, name, names, [members.taken(half) for half in halves])
        parent, note = pack / "adapters" / name, {"split_from": name}
        places = {child: _copied(parent, folder / child, child, note) for child in names}
        record = change_pack(pack, manifest, router, places, {}, out=out, overwrite=overwrite)
    vectors = cast(Any, system.embed(prompts_of(rows), FIT_BATCH))
    was, now = before.route(vectors), router.route(vectors)
    elsewhere = sum(was.name(i) != name and now.name(i) in names for i in range(len(rows)))
    sizes = {child: len(half) for child, half in zip(names, halves, strict=True)}
    return {"domains": list(router.names), "split": name, "into": sizes, "elsewhere": elsewhere, "record": record}


def check_domains(manifest: Manifest, old: Sequence[str], new: Sequence[str]) -> None:
    """Refuses domains that the pack lacks, and names that it cannot take in their place."""
    for name in old:
        if name not in manifest.domains:
            raise PackError(f"pack {manifest.name!r} has no domain {name!r}: it has {', '.join(manifest.domains)}")
    named(new, [name for name in manifest.domains if name not in old])


def weights_of(folders: Mapping[str, Path]) -> dict[str, float]:
    """The share of each domain in the training rows of all; equal ones where an adapter does not say how many."""
    rows = {name: read_expert(path).rows if (path / RECORD).is_file() else 0 for name, path in folders.items()}
    if not all(rows.values()):
        rows = dict.fromkeys(rows, 1)
    return {name: count / sum(rows.values()) for name, count in rows.items()}


def write_merged(
    folder: Path, adapters: Mapping[str, Path], weights: Mapping[str, float], rank: int | None, manifest: Manifest
) -> dict[str, Any]:
    """Writes the merged adapter of these folders; returns `weights`, `rank` and `energy` (see `merge_domains`)."""
    loaded = [load_adapter(path, name) for name, path in adapters.items()]
    merged, energy = merged_adapter(loaded, [weights[name] for name in adapters], rank, check_name(folder.name))
    folder.mkdir(parents=True)
    factors = merged.factors
    save_lora(low_rank_config({layer: f.rank for layer, f in factors.items()}, manifest.base), factors, folder)
    note = {"weights": dict(weights), "rank": max(f.rank for f in factors.values()), "energy": energy}
    infos = [read_expert(path) for path in adapters.values() if (path / RECORD).is_file()]
    layers = [int(part) for layer in factors for part in layer.split(".") if part.isdecimal()]
    info = ExpertInfo(
        name=folder.name,
        kind="lora",
        base=manifest.base,
        base_fingerprint=manifest.base_fingerprint,
        first_layer=min([*(info.first_layer for info in infos), *layers]),
        domain=folder.name,
        rows=sum(info.rows for info in infos),
        tokens=sum(info.tokens for info in infos),
        trained_parameters=sum(f.a.numel() + f.b.numel() for f in factors.values()),
        training={"merged_from": note},
        versions={p: version(p) for p in ("torch", "peft")},
    )
    write_expert(folder, info)
    return note


def merged_adapter(
    adapters: Sequence[LoadedAdapter], weights: Sequence[float], rank: int | None, name: str
) -> tuple[LoadedAdapter, float]:
    """The weighted mean of what adapters add, and the share of its squares that `rank` keeps (1 where all is kept).

    Raises:
        ExpertError: a rank that cannot be.
    """
    if rank is not None and not 0 < rank <= MAX_RANK:
        raise ExpertError(f"rank is {rank}; it must lie between 1 and {MAX_RANK}")
    factors, kept, total = {}, 0.0, 0.0
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.factors):
        parts = [(a.factors[layer], w) for a, w in zip(adapters, weights, strict=True) if layer in a.factors]
        dtype = parts[0][0].a.dtype
        a = torch.cat([f.a.double() for f, _ in parts], dim=1)  # (in, R)
        b = torch.cat([f.b.double() * (f.scaling * weight) for f, weight in parts])  # (R, out)
        a, b, values = _compact(a, b)
        most = rank or min(sum(f.rank for f, _ in parts), MAX_RANK)
        kept, total = kept + float(values[:most].square().sum()), total + float(values.square().sum())
        factors[layer] = Factors(a[:, :most].to(dtype).contiguous(), b[:most].to(dtype).contiguous(), 1.0)
    return LoadedAdapter(name, factors), kept / total if total else 1.0


def _compact(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a @ b as factors whose first r columns and rows are its best approximation of rank r, and its singular values.

    a is (in, R) and b (R, out); no (in, out) matrix is made.
    """
    left, upper = torch.linalg.qr(a)
    right, lower = torch.linalg.qr(b.T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = values.sqrt()
    return left @ u * root, root[:, None] * (v @ right.T), values


def _members(system: System, rows: Sequence[Entry], names: Sequence[str]) -> Members:
    """The entries that the router sends to one of the domains."""
    prompts = prompts_of(rows)
    vectors, routing = system.embed(prompts, FIT_BATCH), system.route(prompts)
    if vectors is None or routing is None:
        raise PackError(f"{system.name!r} has no router")
    own = np.array([i for i in range(len(rows)) if routing.name(i) in names], dtype=np.int64)
    if not len(own):
        raise PackError(f"no entry goes to {' or '.join(names)}: give entries of that domain")
    return Members(vectors[own], [rows[i] for i in own])


def _copied(adapter: Path, folder: Path, name: str, note: dict[str, Any]) -> Path:
    """A copy of an adapter under another name, which its record says too."""
    shutil.copytree(adapter, folder)
    if (folder / RECORD).is_file():
        info = read_expert(folder)
        write_expert(
            folder, dataclasses.replace(info, name=name, domain=name, training={**info.training, **note}, key="")
        )
    return folder


@contextmanager
def _workshop(pack: Path, out: Path | None) -> Iterator[Path]:
    """A folder to make adapters in, while no other process changes the pack."""
    with holding(pack, out), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
