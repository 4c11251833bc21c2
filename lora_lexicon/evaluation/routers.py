"""Routers beside each other: which domain each chooses for the same prompts, and what that does to the loss.

A learned router needs prompts of all domains to learn from. It is told twice: `joined`, learned from the old domains
alone, so that the new one gets its row from the same map, and `learned again`, from all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.compose.system import System
from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.domains.embed import Embedder
from lora_lexicon.domains.fit import describe_all, make_router
from lora_lexicon.domains.learned import MAPS
from lora_lexicon.domains.router import Router
from lora_lexicon.domains.vectors import Vectors, centred
from lora_lexicon.errors import DataError, RecipeError
from lora_lexicon.evaluation.bootstrap import paired_bootstrap
from lora_lexicon.inference.engine import losses
from lora_lexicon.recipe import DomainsRecipe, load_recipe

ORACLE = "oracle"
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Prompts:
    """Entries with their embedder's vectors (n, d)."""

    rows: Sequence[Entry]
    vectors: Vectors

    @property
    def headwords(self) -> list[str]:
        return [headword(row.term) for row in self.rows]

    def of(self, numbers: NDArray[np.bool_]) -> "Prompts":
        return Prompts([self.rows[i] for i in np.flatnonzero(numbers).tolist()], self.vectors[numbers])

    def __add__(self, other: "Prompts") -> "Prompts":
        return Prompts([*self.rows, *other.rows], np.concatenate([self.vectors, other.vectors]))


@dataclass(frozen=True)
class Fitter:
    """Makes routers as `domains fit` does, of domains that are given."""

    embedder: Embedder
    recipe: DomainsRecipe

    def fit(self, prompts: Prompts, labels: Labels, method: str) -> Router:
        """A router of prompts whose domains are labels (n,), 0 to N - 1, each of them there."""
        mean = prompts.vectors.mean(axis=0) if self.recipe.centre else np.zeros_like(prompts.vectors[0])
        members = centred(prompts.vectors, mean)
        recipe = load_recipe(DomainsRecipe, None, **{**vars(self.recipe), "router": method})
        found = describe_all(members, labels)
        return make_router(members, labels, found, prompts.rows, mean, self.embedder, recipe)

    def join(self, prompts: Prompts, labels: Labels, method: str, last: int) -> Router:
        """As `fit`, but the domain of that number, here the last, joins the router of the others."""
        others = labels != last
        router = self.fit(prompts.of(others), (labels - (labels > last)).astype(np.int32)[others], method)
        newcomers = prompts.of(~others)
        return router.with_domain("newcomer", newcomers.vectors, [row.term for row in newcomers.rows])


class Losses:
    """What every expert, and last the base, loses on every entry: each router then only chooses among them.

    Attributes:
        nll: (n, N + 1) nats of the definitions; the base's column is that of a router's -1, too.
        tokens: (n,).
    """

    def __init__(self, system: System, prompts: Prompts) -> None:
        self.headwords, count, found = prompts.headwords, len(system.experts), []
        for weights in (*np.eye(count, dtype=np.float32), np.zeros(count, dtype=np.float32)):
            nll, self.tokens = losses(system, prompts.rows, weights=np.tile(weights, (len(prompts.rows), 1)))
            found.append(nll)
        self.nll = np.stack(found, axis=1)

    def best(self, known: int) -> NDArray[np.int64]:
        """(n,) each entry's best expert of the first `known`, as none can take who does not know the definition."""
        return self.nll[:, :known].argmin(axis=1)

    def told(
        self, chosen: NDArray[np.int64], before: NDArray[np.int64], part: NDArray[np.bool_], seed: int = 42
    ) -> dict[str, Any]:
        """The `loss` (nats per definition token) of a part (n,) by the experts `chosen`, and its `difference`.

        Args:
            before: those that it is compared with; None is told where both lose the same.
        """
        own, other = (self.nll[np.arange(len(top)), top][part] for top in (chosen, before))
        headwords = [self.headwords[i] for i in np.flatnonzero(part).tolist()]
        tokens = self.tokens[part]
        return {
            "loss": float(own.sum() / tokens.sum()),
            "difference": difference(own, other, tokens, headwords, seed),
        }


def difference(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    weights: NDArray[np.generic],
    headwords: Sequence[str],
    seed: int = 42,
) -> dict[str, float] | None:
    """a - b with interval and p by a paired bootstrap over headwords; None where they are the same."""
    return None if np.array_equal(a, b) else vars(paired_bootstrap(a, b, weights=weights, groups=headwords, seed=seed))


def rivals(
    router: Router, prompts: Prompts, labels: Labels, embedder: Embedder, seed: int
) -> tuple[dict[str, Router], dict[str, str]]:
    """A router in use, first, and beside it those that can be learned of the same domains; and why others cannot.

    Args:
        prompts: of all domains, of which the last is the one that joined.
        labels: (n,) their domains; each of the router's is among them.
    """
    recipe = load_recipe(
        DomainsRecipe,
        None,
        centre=bool(router.mean.any()),
        temperature=router.temperature,
        abstain_quantile=router.abstain_quantile,
        seed=seed,
    )
    fitter, last = Fitter(embedder, recipe), len(router.names) - 1
    found, refused = {f"{router.method}, the pack's own": router}, {}
    if router.learned is not None:
        found["centroid, joined"] = fitter.join(prompts, labels, "centroid", last)
    for method in MAPS:
        try:
            joined, again = fitter.join(prompts, labels, method, last), fitter.fit(prompts, labels, method)
        except (DataError, RecipeError) as error:
            refused[method] = str(error)
        else:
            found |= {f"{method}, joined": joined, f"{method}, learned again": again}
    return found, refused


def compare_routers(
    system: System, routers: dict[str, Router], prompts: Prompts, truth: NDArray[np.int64], seed: int
) -> list[dict[str, Any]]:
    """A row a router, and the oracle's: its first choices among the system's experts for these prompts.

    Args:
        routers: the first is what the others are compared with.
        truth: (n,) the domain that each prompt belongs to.

    Returns:
        for each `router`, `accuracy`, and `loss` and `difference` as `Losses.told` has them.
    """
    found, every = Losses(system, prompts), np.ones(len(prompts.rows), dtype=bool)
    chosen = {name: cast(Any, router.route(prompts.vectors)).top for name, router in routers.items()}
    first = next(iter(chosen.values()))
    chosen[ORACLE] = found.best(len(system.experts))
    return [
        {"router": name, "accuracy": float((top == truth).mean()), **found.told(top, first, every, seed)}
        for name, top in chosen.items()
    ]
