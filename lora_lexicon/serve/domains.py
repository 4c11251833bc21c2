"""What a server shows of its domains: their ranks, where a prompt goes, and a map. Knows nothing of HTTP."""

from typing import Any

import numpy as np

from lora_lexicon.compose.system import System
from lora_lexicon.domains.explain import explain
from lora_lexicon.domains.map import Plane, router_plane
from lora_lexicon.domains.router import Router
from lora_lexicon.packs.live import ranks
from lora_lexicon.serve.define import finite
from lora_lexicon.serve.problems import Problem

NEAREST = 5


class Map:
    """Domains and their typical terms in the plane; drawn anew when the router is another one."""

    def __init__(self) -> None:
        self._router: Router | None = None
        self._plane: Plane | None = None
        self._drawn: dict[str, Any] | None = None

    def of(self, router: Router | None) -> tuple[Plane | None, dict[str, Any] | None]:
        """(the plane, what `GET /domains` shows of it); None where nothing is routed, or no terms are known."""
        if router is not self._router:
            self._router, self._plane, self._drawn = router, None, None
            if router is not None and len(router.term_vectors):
                self._draw(router)
        return self._plane, self._drawn

    def _draw(self, router: Router) -> None:
        vectors = router.term_vectors.astype(np.float32)
        self._plane = router_plane(router)
        centres, places = self._plane.points(router.centroids).tolist(), self._plane.points(vectors).tolist()
        owned = [(term, name) for name, terms in zip(router.names, router.terms, strict=True) for term in terms]
        self._drawn = {
            "centroids": [{"name": name, "x": x, "y": y} for name, (x, y) in zip(router.names, centres, strict=True)],
            "terms": [{"term": t, "domain": d, "x": x, "y": y} for (t, d), (x, y) in zip(owned, places, strict=True)],
        }


def listed(system: System, drawn: Map) -> dict[str, Any]:
    """For `GET /domains`."""
    held = system.residents
    there = system.experts if held is None else held.names
    domains = [{"name": name, "rank": rank, "in_memory": name in there} for name, rank in ranks(system).items()]
    memory = None
    if held is not None:
        memory = {"budget": held.budget, "bytes": held.bytes, "loads": held.loads, "evictions": held.evictions}
    return {
        "model": system.name,
        "kind": system.kind,
        "domains": domains,
        "expert_memory": memory,
        "map": drawn.of(system.router)[1],
    }


def held(system: System) -> dict[str, int]:
    """For `GET /metrics`: what is in memory."""
    found = {"domains": len(system.experts), "memory_bytes": system.memory_bytes}
    if system.residents is not None:
        own = system.residents
        found |= {"expert_memory_bytes": own.bytes, "expert_loads": own.loads, "expert_evictions": own.evictions}
    return found


def routed(system: System, drawn: Map, term: str, context: str) -> dict[str, Any]:
    """For `POST /route`.

    Raises:
        Problem: the system has no router that chooses by domain.
    """
    prompts = [(term, context)]
    routing = system.route(prompts) if system.routing_level == "domain" else None
    vectors = None if routing is None else system.embed(prompts)
    if routing is None or vectors is None or system.router is None:
        raise Problem(409, "not_routed", f"{system.name!r} does not route by domain: serve a pack for that")
    rows = explain(system.router, routing, vectors[0])
    plane = drawn.of(system.router)[0]
    return {
        "term": term,
        "context": context,
        "domain": routing.name(0),
        "router": system.router.method,  # of one that is no `centroid`, similarities are its scores
        "margin": finite(float(routing.margin[0])),
        "domains": [
            {"name": row.domain, "similarity": row.similarity, "weight": row.weight, "quantile": row.quantile}
            for row in rows
        ],
        "nearest": [
            {"term": t, "domain": d, "similarity": s} for t, d, s in system.router.nearest_terms(vectors[0], NEAREST)
        ],
        "place": None if plane is None else plane.points(system.router.prepare(vectors))[0].tolist(),
    }
