"""Domains renamed, merged and split: routers, and the folders of `domains fit`. Knows neither experts nor packs.

What a router says of the domains that are left alone stays the same to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lora_lexicon.data.entry import Entry
from lora_lexicon.domains.cluster import cluster
from lora_lexicon.domains.embed import Embedder, embed_cached
from lora_lexicon.domains.fit import (
    ASSIGNMENTS,
    MAP,
    RECORD,
    TRAIN,
    Domains,
    EntriesLike,
    agreement,
    distances,
    load_domains,
    prompts_of,
    sizes_of,
)
from lora_lexicon.domains.label import RESERVED, name_domains
from lora_lexicon.domains.map import plane
from lora_lexicon.domains.router import MAX_TERMS, QUANTILES, Router, check_name, describe
from lora_lexicon.domains.vectors import Vectors, blocks, cosines, unit
from lora_lexicon.errors import RouterError
from lora_lexicon.folders import new_folder, write_record
from lora_lexicon.recipe import DomainsRecipe


@dataclass(frozen=True)
class Members:
    """Entries with their embedder's vectors (n, d)."""

    vectors: Vectors
    rows: Sequence[Entry]

    def __len__(self) -> int:
        return len(self.rows)

    def taken(self, numbers: NDArray[np.int64]) -> "Members":
        """Those of these row numbers (m,)."""
        return Members(self.vectors[numbers], [self.rows[i] for i in numbers.tolist()])


def named(names: Sequence[str], taken: Sequence[str]) -> None:
    """Raises RouterError unless the names can join those `taken` as domains."""
    lower = {name.lower() for name in taken}
    for name in names:
        if check_name(name).lower() in RESERVED:
            raise RouterError(f"{name!r} means something else on the command line: choose another name for the domain")
        if name.lower() in lower:
            raise RouterError(f"there is a domain {name!r} already: choose another name")
        lower.add(name.lower())


def merged_router(router: Router, weights: Mapping[str, float], into: str, members: Members | None = None) -> Router:
    """A router in which one domain, the last, takes the place of those that `weights` name.

    Args:
        weights: the domains' shares of all members.
        members: describe the merged domain. None: its centroid is that of the domains' members, as their own centroids,
            shares and mean similarities give it; its quantiles come from their typical terms alone, which lie nearer
            to it than others do, so that a router with a threshold abstains more often there.
    """
    spare = _spare(router)
    if members is not None:
        router = router.with_domain(spare, members.vectors, [row.term for row in members.rows])
    else:
        router = router.with_domain_of(_pooled(router, weights, spare), spare)
    for name in weights:
        router = router.without_domain(name)
    return router.renamed([into if name == spare else name for name in router.names])


def split_router(router: Router, name: str, into: Sequence[str], members: Sequence[Members]) -> Router:
    """A router in which domains of these members, the last ones, take the place of one."""
    spares = []
    for own in members:
        spares.append(_spare(router))
        router = router.with_domain(spares[-1], own.vectors, [row.term for row in own.rows])
    renamed = dict(zip(spares, into, strict=True))
    return (router := router.without_domain(name)).renamed([renamed.get(other, other) for other in router.names])


def halved(
    vectors: Vectors, rows: Sequence[Entry], into: Sequence[str], taken: Sequence[str], seed: int
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """The row numbers of two clusters of prepared vectors (n, d), and a name for each.

    Args:
        into: their names; by default the words that tell each from the other, which the names `taken` do not hold.

    Raises:
        DataError: fewer than two different prompts.
        RouterError: not two names.
    """
    if into and len(into) != 2:
        raise RouterError(f"{len(into)} names for two domains: give two")
    labels = cluster(np.ascontiguousarray(vectors), DomainsRecipe(domains=2, method="kmeans", seed=seed))
    halves = [np.flatnonzero(labels == n) for n in range(2)]
    return halves, list(into) or name_domains([[rows[i] for i in half.tolist()] for half in halves], taken)


def _spare(router: Router) -> str:
    """A name that no domain has."""
    return next(name for i in range(len(router.names) + 1) if (name := f"spare-{i}") not in router.names)


def _pooled(router: Router, weights: Mapping[str, float], name: str) -> Router:
    """A router of one domain, which is several of `router`'s together."""
    ends = np.cumsum([len(terms) for terms in router.terms])
    total, terms, vectors = np.zeros(router.centroids.shape[1]), [], []
    for other, weight in weights.items():
        at = router.names.index(other)
        # The mean of members is as long as their mean cosine to their centroid.
        total += weight * float(router.quantiles[at].mean()) * router.centroids[at].astype(np.float64)
        terms += router.terms[at]
        vectors.append(router.term_vectors[ends[at] - len(router.terms[at]) : ends[at]])
    centroid, found = unit(total[None]), np.concatenate(vectors)
    own = cosines(unit(found.astype(np.float32)), centroid)[:, 0] if len(found) else np.ones(1, dtype=np.float32)
    nearest = np.argsort(-own, kind="stable")[: min(MAX_TERMS, len(terms))]
    return replace(
        router,
        names=(name,),
        centroids=centroid,
        quantiles=np.quantile(own, QUANTILES).astype(np.float32)[None],
        terms=(tuple(terms[i] for i in nearest.tolist()),),
        term_vectors=found[nearest],
        learned=None,  # the router that it joins makes its own
    )


# ---- the folders that `domains fit` makes


def rename_in(found: Domains, old: str, new: str, out: Path, *, overwrite: bool = False) -> Domains:
    """Writes a domains folder in which a domain has another name; all else is as it was."""
    _need(found, [old])
    named([new], [name for name in found.router.names if name != old])

    def other(name: str) -> str:
        return new if name == old else name

    record = found.record
    with new_folder(out, replace=overwrite) as folder:
        found.router.renamed([other(name) for name in found.router.names]).save(folder)
        for file in (ASSIGNMENTS, MAP):
            (folder / file).write_bytes((found.path / file).read_bytes())
        changed = {
            "names": [other(name) for name in record["names"]],
            "sizes": {split: {other(name): n for name, n in own.items()} for split, own in record["sizes"].items()},
            "cohesion": {other(name): value for name, value in record["cohesion"].items()},
            "separation": [{**pair, "a": other(pair["a"]), "b": other(pair["b"])} for pair in record["separation"]],
        }
        write_record(folder / RECORD, {**record, **changed})
    return load_domains(out)


def merge_in(
    found: Domains,
    names: Sequence[str],
    into: str,
    entries: EntriesLike,
    embedder: Embedder,
    out: Path,
    *,
    cache: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Domains:
    """Writes a domains folder in which one domain holds the members of several.

    Args:
        entries: those that the domains were fitted on; they describe the merged one.
        embedder: the router's own.
    """
    _need(found, names)
    named([into], [name for name in found.router.names if name not in names])

    def change(members: Members, labels: NDArray[np.int32]) -> tuple[Router, list[NDArray[np.int64]]]:
        own = np.flatnonzero(np.isin(labels, [found.router.names.index(name) for name in names]))
        return merged_router(found.router, dict.fromkeys(names, 1.0), into, members.taken(own)), [own]

    return _rewritten(found, change, entries, embedder, out, {"merged": list(names)}, cache, overwrite, progress)


def split_in(
    found: Domains,
    name: str,
    into: Sequence[str],
    entries: EntriesLike,
    embedder: Embedder,
    out: Path,
    *,
    seed: int = 42,
    cache: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Domains:
    """Writes a domains folder in which the members of one domain are clustered into two; see `merge_in`."""
    _need(found, [name])
    rest = [other for other in found.router.names if other != name]
    named(into, rest)

    def change(members: Members, labels: NDArray[np.int32]) -> tuple[Router, list[NDArray[np.int64]]]:
        own = np.flatnonzero(labels == found.router.names.index(name))
        parent = members.taken(own)
        halves, names = halved(found.router.prepare(parent.vectors), parent.rows, into, found.router.names, seed)
        router = split_router(found.router, name, names, [parent.taken(half) for half in halves])
        return router, [own[half] for half in halves]

    return _rewritten(found, change, entries, embedder, out, {"split": name}, cache, overwrite, progress)


def _need(found: Domains, names: Sequence[str]) -> None:
    for name in names:
        if name not in found.router.names:
            raise RouterError(f"{found.path} has no domain {name!r}: it has {', '.join(found.router.names)}")


def _rewritten(
    found: Domains,
    change: Callable[[Members, NDArray[np.int32]], tuple[Router, list[NDArray[np.int64]]]],
    entries: EntriesLike,
    embedder: Embedder,
    out: Path,
    note: dict[str, Any],
    cache: Path | None,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> Domains:
    """Writes a domains folder after a change, which gives the router, and the training rows of its last domains.

    Training rows of the other domains stay theirs; the rows of other splits go where the new router sends them.
    """
    found.check(entries)
    found.router.check(embedder)
    with new_folder(out, replace=overwrite) as folder:
        rows, labels = entries.split(TRAIN), found.assignments[TRAIN]
        vectors = embed_cached(embedder, prompts_of(rows), cache, progress, folder)
        router, fresh = change(Members(vectors, rows), labels)
        for part in blocks(*vectors.shape):
            vectors[part] = router.prepare(vectors[part])
        places = np.array([router.names.index(n) if n in router.names else -1 for n in found.router.names], np.int32)
        train = places[labels]
        for n, own in enumerate(fresh, len(router.names) - len(fresh)):
            train[own] = n
        assignments = {TRAIN: train}
        for split in entries.splits:
            if split != TRAIN:
                others = embed_cached(embedder, prompts_of(entries.split(split)), cache, progress, folder)
                assignments[split] = router.route(others).top.astype(np.int32)
        kept = [found.record["cohesion"][name] for name in router.names[: -len(fresh)]]
        cohesions = [*kept, *(describe(vectors, own).cohesion for own in fresh)]
        router.save(folder)
        save_file(assignments, folder / ASSIGNMENTS)
        points, drawn = plane(vectors, train, found.record["seed"])
        save_file({"points": points, "labels": drawn}, folder / MAP)
        record = {
            **found.record,
            "names": list(router.names),
            "sizes": {split: sizes_of(router, own) for split, own in assignments.items()},
            "router_agreement": agreement(vectors, train, router.centroids, router.learned),
            **distances(router.names, router.centroids, cohesions),
            "edits": [*found.record.get("edits", []), {**note, "into": list(router.names[-len(fresh) :])}],
        }
        write_record(folder / RECORD, record)
    return load_domains(out)
