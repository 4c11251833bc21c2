"""How many domains? Cohesion, separation and silhouette for each number, from one embedding. Knows nothing of experts.

FOLDER/sweep.json   recipe, inputs, a row a number
FOLDER/sweep.png    the rows as a picture
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_lexicon import __version__
from lora_lexicon.domains.cluster import check_clustering, cluster
from lora_lexicon.domains.embed import Embedder, Report
from lora_lexicon.domains.fit import TRAIN, EntriesLike, agreement, describe_all, distances, embed_centred, prompts_of
from lora_lexicon.domains.learned import learn
from lora_lexicon.domains.map import draw_sweep
from lora_lexicon.domains.vectors import Vectors
from lora_lexicon.errors import DataError, RecipeError
from lora_lexicon.folders import new_folder, write_record
from lora_lexicon.recipe import DomainsRecipe

RECORD, PICTURE = "sweep.json", "sweep.png"
FORMAT = 1
SILHOUETTE_ROWS = 5000  # entries whose distances to each other are computed


def sweep_domains(
    entries: EntriesLike,
    embedder: Embedder,
    recipe: DomainsRecipe,
    counts: Sequence[int],
    out: Path,
    *,
    base: str = "",
    cache: Path | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
    done: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Clusters the training prompts into each number of domains, writes what that gives, and returns the record.

    A row has `domains`, `cohesion` and `separation` (the means of `domains fit`'s), `silhouette`
    (scikit-learn's, of cosine distances, on at most 5,000 entries drawn at random) and
    `router_agreement`.

    Args:
        done: called after each number.

    Raises:
        DataError: fewer than two domains, or as many as there are prompts.
        RecipeError: the method `none`, which knows one domain, or settings that no clustering can have.
    """
    if recipe.method == "none":
        raise RecipeError("the method 'none' makes one domain: choose another --method to sweep over their number")
    rows = entries.split(TRAIN)
    for count in counts:
        if not 2 <= count < len(rows):
            raise DataError(
                f"cannot compare {count} domains of {len(rows)} prompts: give --domains from 2 to below that"
            )
        check_clustering(replace(recipe, domains=count))
    with new_folder(out, replace=overwrite) as folder:
        members, _ = embed_centred(embedder, prompts_of(rows), recipe, cache, folder, progress)
        found = []
        for count in counts:
            found.append(_measure(members, replace(recipe, domains=count)))
            if done:
                done()
        record = {
            "format": FORMAT,
            "recipe": asdict(recipe),
            "entries": entries.fingerprint,
            "base": base,
            "embedder": embedder.name,
            "embedder_identity": embedder.identity,
            "distance": "cosine",
            "silhouette_rows": min(SILHOUETTE_ROWS, len(rows)),
            "rows": found,
            "versions": {"lora-lexicon": __version__, "numpy": np.__version__},
        }
        write_record(folder / RECORD, record)
        draw_sweep(found, folder / PICTURE)
    return record


def _measure(members: Vectors, recipe: DomainsRecipe) -> dict[str, Any]:
    from sklearn.metrics import silhouette_score

    labels = cluster(members, recipe)
    parts = describe_all(members, labels)
    centroids = np.stack([part.centroid for part in parts])
    spread = distances([str(i) for i in range(len(parts))], centroids, [part.cohesion for part in parts])
    some = np.sort(np.random.default_rng(recipe.seed).permutation(len(members))[:SILHOUETTE_ROWS])
    return {
        "domains": recipe.domains,
        "cohesion": spread["mean_cohesion"],
        "separation": spread["mean_separation"],
        "silhouette": float(silhouette_score(members[some], labels[some], metric="cosine")),
        "router_agreement": agreement(members, labels, centroids, learn(members, labels, parts, recipe)),
    }
