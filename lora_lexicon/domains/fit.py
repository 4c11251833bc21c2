"""Entries to domains, and the folder that holds them. Knows nothing of experts.

FOLDER/domains.json             recipe, inputs, versions, names, sizes, cohesion, separation
FOLDER/router.json, router.safetensors
FOLDER/assignments.safetensors  one int32 (n,) a split, in row order
FOLDER/map.safetensors          points (m, 2) and labels (m,) of the picture
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_lexicon import __version__
from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.cluster import check_clustering, cluster
from lora_lexicon.domains.embed import SHARD, Embedder, Prompt, Report, embed_cached, embedder_name
from lora_lexicon.domains.label import name_domains
from lora_lexicon.domains.learned import Learned, learn
from lora_lexicon.domains.map import draw_map, plane
from lora_lexicon.domains.router import Described, Router, describe, load_router, shown_term
from lora_lexicon.domains.vectors import Vectors, blocks, centred, cosines
from lora_lexicon.errors import DataError, RecipeError, RouterError
from lora_lexicon.folders import new_folder, read_record, write_record
from lora_lexicon.recipe import DomainsRecipe

RECORD, ASSIGNMENTS, MAP = "domains.json", "assignments.safetensors", "map.safetensors"
FORMAT = 1
TRAIN = "train"
_WHAT = "a domains folder"


class EntriesLike(Protocol):
    """What is read of an entries folder (`data.store.Entries` has it)."""

    @property
    def splits(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def split(self, name: str) -> list[Entry]: ...


@dataclass(frozen=True)
class Domains:
    """A domains folder, opened.

    Attributes:
        assignments: per split, (n,) int32: each row's domain number, -1 where the router abstains.
    """

    path: Path
    router: Router
    assignments: dict[str, NDArray[np.int32]]
    record: dict[str, Any]

    def check(self, entries: EntriesLike) -> None:
        """Raises DataError, naming both fingerprints, unless the domains were fitted on these entries."""
        ours = self.record["entries"]
        if ours != entries.fingerprint:
            raise DataError(
                f"{self.path} was fitted on entries {ours[:12]}, these are {entries.fingerprint[:12]}: "
                "give the entries it was fitted on, or run domains fit again"
            )

    def rows(self, entries: EntriesLike, split: str, domain: str) -> list[Entry]:
        """The entries of a split that belong to a domain, in row order.

        Raises:
            DataError: other entries, or no such split.
            RouterError: no such domain.
        """
        self.check(entries)
        if domain not in self.router.names:
            raise RouterError(f"{self.path} has no domain {domain!r}: it has {', '.join(self.router.names)}")
        number = self.router.names.index(domain)
        rows = entries.split(split)
        return [row for row, own in zip(rows, self.assignments[split], strict=True) if own == number]

    def draw(self, file: Path) -> str:
        """Draws the map of the domains as a PNG; returns its alternative text."""
        tensors = _tensors(self.path / MAP)
        points, labels = tensors.get("points"), tensors.get("labels")
        if points is None or labels is None or points.shape != (len(labels), 2):
            raise RouterError(f"{self.path / MAP} is damaged: fit the domains again")
        return draw_map(points, labels, self.router.names, file)


def fit_domains(
    entries: EntriesLike,
    embedder: Embedder,
    recipe: DomainsRecipe,
    out: Path,
    *,
    base: str = "",
    cache: Path | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
    clustering: Callable[[float], None] | None = None,
) -> Domains:
    """Clusters the training prompts and writes a domains folder with their router.

    The training rows keep the clustering's own labels; the rows of other splits go where the
    router sends them.

    Args:
        embedder: as `make_embedder(recipe, ...)` gives it.
        base: the base's name, for the record.
        cache: a folder of embeddings by content.
        progress: told how many prompts were just embedded.
        clustering: told of the inertia a row after each iteration over many rows.

    Raises:
        DataError: no training split, or too few different prompts.
        RecipeError: the embedder is not the recipe's, or settings that no clustering can have.
    """
    check_clustering(recipe)
    if embedder.name != embedder_name(recipe):
        raise RecipeError(f"the recipe asks for the embedder {embedder_name(recipe)!r}, not {embedder.name!r}")
    if TRAIN not in entries.splits:
        raise DataError(f"domains are fitted on the split {TRAIN!r}; these entries have {', '.join(entries.splits)}")
    with new_folder(out, replace=overwrite) as folder:
        rows = entries.split(TRAIN)
        members, mean = embed_centred(embedder, prompts_of(rows), recipe, cache, folder, progress)
        labels = cluster(members, recipe, clustering)
        found = describe_all(members, labels)
        router = make_router(members, labels, found, rows, mean, embedder, recipe)
        assignments = {TRAIN: labels}
        for split in entries.splits:
            if split != TRAIN:
                others = embed_cached(embedder, prompts_of(entries.split(split)), cache, progress, folder)
                assignments[split] = router.route(others).top.astype(np.int32)
        router.save(folder)
        save_file(assignments, folder / ASSIGNMENTS)
        points, drawn = plane(members, labels, recipe.seed)
        save_file({"points": points, "labels": drawn}, folder / MAP)
        record = {
            "format": FORMAT,
            "recipe": asdict(recipe),
            "seed": recipe.seed,
            "entries": entries.fingerprint,
            "base": base,
            "embedder": embedder.name,
            "embedder_identity": embedder.identity,
            "names": list(router.names),
            "sizes": {split: sizes_of(router, own) for split, own in assignments.items()},
            "router_agreement": agreement(members, labels, router.centroids, router.learned),
            **distances(router.names, router.centroids, [part.cohesion for part in found]),
            "versions": {"lora-lexicon": __version__, "numpy": np.__version__, "scikit-learn": version("scikit-learn")},
        }
        write_record(folder / RECORD, record)
    return load_domains(out)


def embed_centred(
    embedder: Embedder,
    prompts: Sequence[Prompt],
    recipe: DomainsRecipe,
    cache: Path | None,
    scratch: Path,
    progress: Report | None = None,
) -> tuple[Vectors, Vectors]:
    """The vectors (n, d) that are clustered, as a memory map (see `embed_cached`), and the mean (d,) taken off them."""
    vectors = embed_cached(embedder, prompts, cache, progress, scratch)
    if not recipe.centre or recipe.method == "none":
        return vectors, np.zeros_like(vectors[0])
    shards = [slice(start, start + SHARD) for start in range(0, len(vectors), SHARD)]
    parts = [vectors[rows].mean(axis=0).astype(np.float64) * len(vectors[rows]) for rows in shards]
    mean = (np.sum(parts, axis=0) / len(vectors)).astype(np.float32)
    if mean.any():
        for rows in shards:
            vectors[rows] = centred(vectors[rows], mean)
    return vectors, mean


def describe_all(members: Vectors, labels: NDArray[np.int32]) -> list[Described]:
    """What `describe` says of each domain."""
    return [describe(members, np.flatnonzero(labels == i)) for i in range(int(labels.max()) + 1)]


def make_router(
    members: Vectors,
    labels: NDArray[np.int32],
    found: Sequence[Described],
    rows: Sequence[Entry],
    mean: Vectors,
    embedder: Embedder,
    recipe: DomainsRecipe,
) -> Router:
    """The router of clustered training rows: `members` (n, d) centred and of unit length, `labels` (n,)."""
    return Router(
        names=tuple(name_domains([[rows[j] for j in np.flatnonzero(labels == i).tolist()] for i in range(len(found))])),
        centroids=np.stack([part.centroid for part in found]),
        quantiles=np.stack([part.quantiles for part in found]),
        mean=mean.astype(np.float32),
        terms=tuple(tuple(shown_term(rows[i].term) for i in part.nearest) for part in found),
        term_vectors=members[np.concatenate([part.nearest for part in found])].astype(np.float16),
        embedder_name=embedder.name,
        embedder_identity=embedder.identity,
        embedder_tensors=embedder.tensors,
        template=PromptTemplate(**embedder.identity.get("template", {})),
        top_k=recipe.top_k,
        temperature=recipe.temperature,
        abstain_quantile=recipe.abstain_quantile,
        learned=learn(members, labels, found, recipe),
    )


def agreement(members: Vectors, labels: NDArray[np.int32], centroids: Vectors, learned: Learned | None) -> float:
    """The share of the members (n, d) whose nearest centroid, or best learned score, is their own domain's."""
    heads, offsets = (centroids, np.float32(0)) if learned is None else (learned.rows, learned.offsets)
    parts = blocks(*members.shape)
    hits = [((members[rows] @ heads.T + offsets).argmax(axis=1) == labels[rows]).sum() for rows in parts]
    return float(sum(hits) / len(labels))


def distances(names: Sequence[str], centroids: Vectors, cohesions: Sequence[float]) -> dict[str, Any]:
    """Cohesion and separation as cosine distances (1 - cosine), after tables 7 and 8 of the paper.

    `cohesion`: per domain, the mean distance of its members to its centroid; small is tight.
    `separation`: per pair of domains, the distance of their centroids; large is far apart (at most
    2, and above 1 only for centred vectors). `mean_*`: their means; the latter is None for one domain.

    Args:
        centroids: (N, d) of unit length.
        cohesions: per domain, as `describe` gives it.
    """
    between = cosines(centroids, centroids)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    separation = [{"a": names[i], "b": names[j], "distance": float(1 - between[i, j])} for i, j in pairs]
    apart = [pair["distance"] for pair in separation]
    return {
        "distance": "cosine",
        "cohesion": dict(zip(names, cohesions, strict=True)),
        "separation": separation,
        "mean_cohesion": float(np.mean(cohesions)),
        "mean_separation": float(np.mean(apart)) if apart else None,
    }


def load_domains(path: Path) -> Domains:
    """Opens a domains folder.

    Raises:
        RouterError: it is none, or damaged; in one line.
    """
    record = read_record(path / RECORD, RouterError, f"{_WHAT} (lora-lexicon domains fit makes one)")
    names, entries = record.get("names"), record.get("entries")
    if record.get("format") != FORMAT or not isinstance(entries, str) or not isinstance(record.get("sizes"), dict):
        raise RouterError(f"{path / RECORD} is not the record of format {FORMAT}: fit the domains again")
    router = load_router(path)
    if names != list(router.names):
        raise RouterError(f"{path}: {RECORD} names {names}, the router {list(router.names)}: fit the domains again")
    assignments = _tensors(path / ASSIGNMENTS)
    for split, own in assignments.items():
        if own.ndim != 1 or own.dtype != np.int32 or (own < -1).any() or (own >= len(router.names)).any():
            raise RouterError(f"{path / ASSIGNMENTS}: split {split!r} is damaged: fit the domains again")
    return Domains(path, router, assignments, record)


def _tensors(file: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{file} is missing or damaged ({error}): fit the domains again") from error


def prompts_of(rows: Sequence[Entry]) -> list[Prompt]:
    """What is embedded of entries: term and context."""
    return [(row.term, row.context) for row in rows]


def sizes_of(router: Router, labels: NDArray[np.int32]) -> dict[str, int]:
    """Rows per domain; `base` counts those where the router abstains, if there are any."""
    sizes = {name: int((labels == i).sum()) for i, name in enumerate(router.names)}
    abstained = int((labels == -1).sum())
    return {**sizes, "base": abstained} if abstained else sizes
