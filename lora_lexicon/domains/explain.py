"""Why a prompt goes where it goes: what the router compared, in numbers a reader can check. Knows no models."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_lexicon.domains.router import QUANTILES, Router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.domains.vectors import Vectors, cosines


@dataclass(frozen=True)
class Explained:
    """What the router compared of one prompt and one domain.

    Attributes:
        similarity: what the router ranks domains by: the cosine, or a learned router's score.
        cosine: to the domain's centroid.
        quantile: the part of the domain's own members that are no nearer to the centroid.
        threshold: the cosine below which the router abstains where this domain is the first; None: it never does.
        nearest: (term, cosine) of its nearest typical training terms.
    """

    domain: str
    similarity: float
    weight: float
    cosine: float
    quantile: float
    threshold: float | None
    nearest: tuple[tuple[str, float], ...]


def explain(router: Router, routing: Routing, vector: Vectors, count: int = 0) -> list[Explained]:
    """Every domain's part in the routing (of one row) of a vector (d,), the most similar first.

    Args:
        count: how many of each domain's terms.
    """
    own = cosines(router.prepare(vector[None]), router.centroids)[0]
    thresholds = router.thresholds() if router.abstain_quantile > 0 else [None] * len(router.names)
    return [
        Explained(
            domain=router.names[i],
            similarity=float(routing.similarities[0, i]),
            weight=float(routing.weights[0, i]),
            cosine=float(own[i]),
            quantile=float(np.interp(own[i], router.quantiles[i], QUANTILES)),
            threshold=None if thresholds[i] is None else float(thresholds[i]),
            nearest=tuple((term, near) for term, _, near in router.nearest_terms(vector, count, router.names[i])),
        )
        for i in np.argsort(-routing.similarities[0], kind="stable").tolist()
    ]


def reading(router: Router, rows: list[Explained]) -> list[str]:
    """What `explain` found, in sentences."""
    first, *others = rows
    said = [_compared(router)]
    if others:
        margin = first.similarity - others[0].similarity
        odds = "" if router.learned is None else f": odds of e^{margin / router.temperature:.1f} to 1"
        said.append(f"margin of {first.domain} over {others[0].domain}: {margin:.3f}{odds}")
    said.append(
        f"quantile: {100 * first.quantile:.0f} % of the members of {first.domain} are no nearer to its centroid"
    )
    if first.threshold is None:
        return [*said, "abstention: never (abstain_quantile is 0)"]
    share = f"{100 * router.abstain_quantile:g} % of the members of {first.domain} lie below"
    verdict = "is not below it"
    if first.cosine < first.threshold:
        verdict = "is, and the base answers" if not first.weight else "is, but this model keeps no base to answer"
    return [*said, f"abstention: under a cosine of {first.threshold:.3f} ({share}); {first.cosine:.3f} {verdict}"]


def _compared(router: Router) -> str:
    if router.learned is None:
        return "similarity: the cosine to a domain's centroid (router: centroid)"
    return (
        f"score: learned (router: {router.method}), no cosine; over the temperature, {router.temperature:g}, it is a "
        "logit"
    )


def record_of(router: Router, rows: list[Explained]) -> dict[str, Any]:
    """The same for `--json`."""
    keys = ("similarity", "weight", "cosine", "quantile", "threshold")
    return {
        "router": router.method,
        "top_k": router.top_k,
        "temperature": router.temperature,
        "abstain_quantile": router.abstain_quantile,
        "abstains": rows[0].threshold is not None and rows[0].cosine < rows[0].threshold,
        "domains": [
            {
                "domain": row.domain,
                **{key: getattr(row, key) for key in keys},
                "nearest": [{"term": term, "similarity": cosine} for term, cosine in row.nearest],
            }
            for row in rows
        ],
    }
