"""Entries to domains, and the folder that holds them. Knows nothing of experts.

FOLDER/domains.json             recipe, inputs, versions, names, sizes, cohesion, separation
FOLDER/router.json, router.safetensors
FOLDER/assignments.safetensors  one int32 (n,) a split, in row order
FOLDER/map.safetensors          points (m, 2) and labels (m,) of the picture
"""

from collections.abc import Sequence
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
from lora_lexicon.domains.cluster import cluster
from lora_lexicon.domains.embed import Embedder, Prompt, Report, embed_cached, embedder_name
from lora_lexicon.domains.label import name_domains
from lora_lexicon.domains.map import draw_map, plane
from lora_lexicon.domains.router import Router, describe, load_router
from lora_lexicon.domains.vectors import Vectors, cosines, unit
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
) -> Domains:
    """Clusters the training prompts and writes a domains folder with their router.

    The training rows keep the clustering's own labels; the rows of other splits go where the
    router sends them.

    Args:
        embedder: as `make_embedder(recipe, ...)` gives it.
        base: the base's name, for the record.
        cache: a folder of embeddings by content.
        progress: told how many prompts were just embedded.

    Raises:
        DataError: no training split, or too few different prompts.
        RecipeError: the embedder is not the recipe's.
    """
    if embedder.name != embedder_name(recipe):
        raise RecipeError(f"the recipe asks for the embedder {embedder_name(recipe)!r}, not {embedder.name!r}")
    if TRAIN not in entries.splits:
        raise DataError(f"domains are fitted on the split {TRAIN!r}; these entries have {', '.join(entries.splits)}")
    with new_folder(out, replace=overwrite) as folder:
        rows = entries.split(TRAIN)
        vectors = embed_cached(embedder, _prompts(rows), cache, progress)
        mean = vectors.mean(axis=0) if recipe.centre and recipe.method != "none" else np.zeros_like(vectors[0])
        members = unit(vectors - mean) if mean.any() else vectors
        labels = cluster(members, recipe)
        router = make_router(members, labels, rows, mean, embedder, recipe)
        assignments = {TRAIN: labels}
        for split in entries.splits:
            if split != TRAIN:
                found = embed_cached(embedder, _prompts(entries.split(split)), cache, progress)
                assignments[split] = router.route(found).top.astype(np.int32)
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
            "sizes": {split: _sizes(router, own) for split, own in assignments.items()},
            "router_agreement": float((router.route(vectors).similarities.argmax(axis=1) == labels).mean()),
            **distances(router, members, labels),
            "versions": {"lora-lexicon": __version__, "numpy": np.__version__, "scikit-learn": version("scikit-learn")},
        }
        write_record(folder / RECORD, record)
    return load_domains(out)


def make_router(
    members: Vectors,
    labels: NDArray[np.int32],
    rows: Sequence[Entry],
    mean: Vectors,
    embedder: Embedder,
    recipe: DomainsRecipe,
) -> Router:
    """The router of clustered training rows: `members` (n, d) centred and of unit length, `labels` (n,)."""
    groups = [np.flatnonzero(labels == i) for i in range(int(labels.max()) + 1)]
    parts = [describe(members[group]) for group in groups]
    typical = [group[best] for group, (_, _, best) in zip(groups, parts, strict=True)]
    return Router(
        names=tuple(name_domains([[rows[i] for i in group.tolist()] for group in groups])),
        centroids=np.stack([centroid for centroid, _, _ in parts]),
        quantiles=np.stack([quantiles for _, quantiles, _ in parts]),
        mean=mean.astype(np.float32),
        terms=tuple(tuple(rows[i].term for i in best) for best in typical),
        term_vectors=members[np.concatenate(typical)].astype(np.float16),
        embedder_name=embedder.name,
        embedder_identity=embedder.identity,
        embedder_tensors=embedder.tensors,
        template=PromptTemplate(**embedder.identity.get("template", {})),
        top_k=recipe.top_k,
        temperature=recipe.temperature,
        abstain_quantile=recipe.abstain_quantile,
    )


def distances(router: Router, members: Vectors, labels: NDArray[np.int32]) -> dict[str, Any]:
    """Cohesion and separation as cosine distances (1 - cosine), after tables 7 and 8 of the paper.

    `cohesion`: per domain, the mean distance of its members (n, d) to its centroid; small is tight.
    `separation`: per pair of domains, the distance of their centroids; large is far apart (at most
    2, and above 1 only for centred vectors). `mean_*`: their means; the latter is None for one domain.
    """
    near, names = cosines(members, router.centroids), router.names
    between = cosines(router.centroids, router.centroids)
    cohesion = {name: float(1 - near[labels == i, i].mean()) for i, name in enumerate(names)}
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    separation = [{"a": names[i], "b": names[j], "distance": float(1 - between[i, j])} for i, j in pairs]
    apart = [pair["distance"] for pair in separation]
    return {
        "distance": "cosine",
        "cohesion": cohesion,
        "separation": separation,
        "mean_cohesion": float(np.mean(list(cohesion.values()))),
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


def _prompts(rows: Sequence[Entry]) -> list[Prompt]:
    return [(row.term, row.context) for row in rows]


def _sizes(router: Router, labels: NDArray[np.int32]) -> dict[str, int]:
    """Rows per domain; `base` counts those where the router abstains, if there are any."""
    sizes = {name: int((labels == i).sum()) for i, name in enumerate(router.names)}
    abstained = int((labels == -1).sum())
    return {**sizes, "base": abstained} if abstained else sizes
