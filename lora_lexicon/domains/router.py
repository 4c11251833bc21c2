"""The router: a prompt's vector in, experts and weights out (section 3.2 of the LM-Lexicon paper).

Cosine to unit centroids, or a learned score (see `learned`); top-1 or top-k with softmax weights; abstention to the
base below a domain's own quantile. It knows neither models nor data; it refuses vectors of any embedder but its own.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.learned import MAPS, Learned
from lora_lexicon.domains.routing import Routing
from lora_lexicon.domains.vectors import Vectors, blocks, centred, cosines, unit
from lora_lexicon.errors import RouterError
from lora_lexicon.folders import UNSHOWN, Fields, read_record, shown, write_record

if TYPE_CHECKING:
    from lora_lexicon.domains.embed import Embedder

RECORD, TENSORS = "router.json", "router.safetensors"
FORMAT, LEARNED_FORMAT = 1, 2  # of a centroid router, of a learned one
ROUNDING = 1e-3  # of cosines and lengths, some of them held in 16 bits
QUANTILES = np.linspace(0.0, 1.0, 101)
MAX_TERMS = 32  # typical training terms kept per domain
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WHAT = "a router"
_TERMS = "a list of lists of text"
_EMBEDDER = re.compile(r"base|tfidf|(st|hf):[^\x00-\x1f]{1,1024}")
_FITTED = ("vocabulary", "idf", "projection")  # what `tfidf` learns, and no other embedder does
MAX_WEIGHT = 1e6  # of a word, or of its projection
MAX_HEADER_BYTES = 2**20  # of `router.safetensors`
_HELD = ("centroids", "quantiles", "mean", "term_vectors")
# Of the `base` embedder, so that a file cannot ask for work without end.
_BOUNDS = {"layers": (0, 10_000), "max_length": (2, 1_000_000)}


@dataclass(frozen=True)
class Router:
    """N domains over vectors of length d.

    Attributes:
        names: the domains; valid as folder names and unique.
        centroids: (N, d) float32, unit length.
        quantiles: (N, 101) float32, percentiles of the cosine of each domain's own members to its centroid.
        mean: (d,) float32, taken off every vector before it is compared; zeros when not centred.
        terms: per domain at most 32 typical training terms.
        term_vectors: (number of terms, d) float16, their vectors in the same order.
        embedder_name, embedder_identity: the only embedder whose vectors it takes.
        embedder_tensors: what a fitted embedder (`tfidf`) needs to be built again; else empty.
        learned: what scores domains in place of the cosine to their centroids; None: nothing does.
    """

    names: tuple[str, ...]
    centroids: Vectors
    quantiles: Vectors
    mean: Vectors
    terms: tuple[tuple[str, ...], ...]
    term_vectors: NDArray[np.float16]
    embedder_name: str
    embedder_identity: dict[str, Any]
    embedder_tensors: dict[str, NDArray[Any]]
    template: PromptTemplate
    top_k: int = 1
    temperature: float = 0.05
    abstain_quantile: float = 0.0
    learned: Learned | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def prepare(self, vectors: Vectors) -> Vectors:
        """(n, d) embedder vectors, centred and of unit length: the space the centroids live in."""
        if vectors.ndim != 2 or vectors.shape[1] != self.centroids.shape[1]:
            raise RouterError(f"vectors of shape {vectors.shape} for a router of width {self.centroids.shape[1]}")
        return centred(vectors, self.mean)

    def route(self, vectors: Vectors) -> Routing:
        """Experts and weights for vectors (n, d) of the router's own embedder.

        Weights are a softmax of similarity / temperature over the `top_k` domains of the largest; exactly 1 for
        top-1. Similarity is the cosine to the centroid, or the learned score. A prompt whose cosine to the first of
        them is below that domain's `abstain_quantile` gets weight 0: scores say which domain, cosines how typical.
        """
        parts = [self._scored(self.prepare(vectors[rows])) for rows in blocks(*vectors.shape)]
        similarities, near = (np.concatenate(part) for part in zip(*parts, strict=True))
        count = min(self.top_k, len(self.names))
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
        best = np.take_along_axis(similarities, order, axis=1)
        odds = np.exp((best - best[:, :1]) / np.float32(self.temperature))
        weights = np.zeros_like(similarities)
        np.put_along_axis(weights, order, odds / odds.sum(axis=1, keepdims=True), axis=1)
        if self.abstain_quantile > 0:
            first = order[:, :1]
            weights[np.take_along_axis(near, first, axis=1)[:, 0] < self.thresholds()[first[:, 0]]] = 0
        return Routing(self.names, similarities, weights)

    def _scored(self, prepared: Vectors) -> tuple[Vectors, Vectors]:
        """Similarities and cosines (n, N): one and the same without a learned score."""
        near = cosines(prepared, self.centroids)
        return (near, near) if self.learned is None else (self.learned.scores(prepared), near)

    @property
    def method(self) -> str:
        """`centroid`, or how its scores were learned."""
        return "centroid" if self.learned is None else self.learned.method

    @property
    def scale(self) -> float:
        """By how much, at most, a similarity moves for a vector's move by 1: 1 for cosines to unit centroids."""
        return 1.0 if self.learned is None else float(np.linalg.norm(self.learned.rows, axis=1).max())

    def thresholds(self) -> Vectors:
        """(N,) the cosine below which each domain abstains."""
        rows = [np.interp(self.abstain_quantile, QUANTILES, row) for row in self.quantiles]
        return np.array(rows, dtype=np.float32)

    def check(self, embedder: "Embedder") -> None:
        """Raises RouterError, naming both values, unless `embedder` is the router's own."""
        if embedder.name != self.embedder_name:
            raise RouterError(
                f"the router was fitted with the embedder {self.embedder_name!r}, not {embedder.name!r}: "
                "use the router's own, or fit the domains again"
            )
        for key in sorted({*self.embedder_identity, *embedder.identity}):
            ours, theirs = self.embedder_identity.get(key), embedder.identity.get(key)
            if ours != theirs:
                raise RouterError(
                    f"the router's embedder {self.embedder_name!r} has {key} {shown(ours)}, this one {shown(theirs)}: "
                    "use the router's own base and settings, or fit the domains again"
                )

    def with_domain(self, name: str, vectors: Vectors, terms: Sequence[str] = ()) -> "Router":
        """A router with one more domain, whose members have `vectors` (n, d) and `terms` (n, optional).

        Every other domain's centroid, quantiles and scores stay the same to the bit; nothing is trained.
        """
        if not len(vectors):
            raise RouterError(f"domain {name!r} has no prompts to make a centroid of")
        members = self.prepare(vectors)
        found = describe(members)
        chosen = found.nearest[: len(terms)]
        own = tuple(shown_term(terms[i]) for i in chosen)
        learned = self.learned and self.learned.joined(found.centroid, 1 - found.cohesion)
        return self._joined(name, found.centroid, found.quantiles, own, members[chosen].astype(np.float16), learned)

    def with_domain_of(self, other: "Router", name: str) -> "Router":
        """A router with one more domain, taken from another router of the same embedder.

        Where both take off the same mean, the domain stays the same to the bit, and so does its score where the same
        map has made it; else this router's map makes one. Where the means differ, its typical terms describe it
        anew: their vectors, of unit length before the other mean was taken off, are put back where they were.
        """
        at, first = other.names.index(name), sum(len(t) for t in other.terms[: other.names.index(name)])
        terms = other.terms[at]
        vectors = other.term_vectors[first : first + len(terms)]
        if np.array_equal(self.mean, other.mean):
            learned = self.learned and self._adopted(other, at)
            return self._joined(name, other.centroids[at], other.quantiles[at], terms, vectors, learned)
        mean, rows = other.mean.astype(np.float64), unit(vectors.astype(np.float32)).astype(np.float64)
        along = rows @ mean
        # The root of |mean + length * row| = 1 on the row's side.
        length = np.sqrt(np.maximum(along**2 + 1 - mean @ mean, 0)) - along
        return self.with_domain(name, unit(mean + length[:, None] * rows), terms)

    def _adopted(self, other: "Router", at: int) -> Learned | None:
        """What is learned, with another router's domain of that number."""
        if self.learned is None:
            return None
        if other.learned is not None and self.learned.same_map(other.learned):
            return self.learned.with_row(other.learned.rows[at], other.learned.offsets[at])
        # The mean of unit vectors is as long as their mean cosine to it.
        own = other.quantiles[at].astype(np.float64)
        return self.learned.joined(other.centroids[at], float((own[1:] + own[:-1]).mean() / 2))

    def _joined(
        self,
        name: str,
        centroid: Vectors,
        quantiles: Vectors,
        terms: tuple[str, ...],
        vectors: NDArray[np.float16],
        learned: Learned | None,
    ) -> "Router":
        return replace(
            self,
            names=(*self.names, name),
            centroids=np.concatenate([self.centroids, centroid[None]]),
            quantiles=np.concatenate([self.quantiles, quantiles[None]]),
            terms=(*self.terms, terms),
            term_vectors=np.concatenate([self.term_vectors, vectors]),
            learned=learned,
        )

    def without_domain(self, name: str) -> "Router":
        """A router without one of its domains; the others stay the same to the bit."""
        if name not in self.names or len(self.names) == 1:
            raise RouterError(f"cannot take {name!r} out of a router of {', '.join(self.names)}")
        keep = [i for i, other in enumerate(self.names) if other != name]
        owners = np.repeat(np.arange(len(self.names)), [len(t) for t in self.terms])
        return replace(
            self,
            names=tuple(self.names[i] for i in keep),
            centroids=self.centroids[keep],
            quantiles=self.quantiles[keep],
            terms=tuple(self.terms[i] for i in keep),
            term_vectors=self.term_vectors[owners != self.names.index(name)],
            learned=self.learned and self.learned.kept(keep),
        )

    def renamed(self, names: Sequence[str]) -> "Router":
        """The same router with other names for its domains, in order."""
        return replace(self, names=tuple(names))

    def nearest_terms(self, vector: Vectors, count: int = 5, domain: str | None = None) -> list[tuple[str, str, float]]:
        """(term, its domain, cosine) of the typical training terms, of all domains or one, nearest to a vector (d,)."""
        found = cosines(self.term_vectors.astype(np.float32), self.prepare(vector[None]))[:, 0]
        owned = [(term, name) for name, terms in zip(self.names, self.terms, strict=True) for term in terms]
        nearest: dict[str, tuple[str, str, float]] = {}
        for i in np.argsort(-found, kind="stable"):
            if len(nearest) == count:
                break
            if domain in (None, owned[i][1]):
                nearest.setdefault(owned[i][0], (*owned[i], float(found[i])))
        return list(nearest.values())

    def save(self, folder: Path) -> None:
        """Writes `router.safetensors` and `router.json` into a folder."""
        tensors = {
            "centroids": self.centroids,
            "quantiles": self.quantiles,
            "mean": self.mean,
            "term_vectors": self.term_vectors,
            **{f"embedder.{key}": value for key, value in self.embedder_tensors.items()},
        }
        learned = self.learned
        if learned is not None:
            tensors |= {"rows": learned.rows, "offsets": learned.offsets, **learned.map}
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / TENSORS)
        record = {
            "format": FORMAT if learned is None else LEARNED_FORMAT,
            **({} if learned is None else {"method": learned.method}),
            "names": list(self.names),
            "embedder": self.embedder_name,
            "embedder_identity": self.embedder_identity,
            "template": asdict(self.template),
            "top_k": self.top_k,
            "temperature": self.temperature,
            "abstain_quantile": self.abstain_quantile,
            "terms": [list(terms) for terms in self.terms],
        }
        write_record(folder / RECORD, record)


class Described(NamedTuple):
    """How the m members of one domain lie.

    Attributes:
        centroid: (d,) float32, their mean, of unit length.
        quantiles: (101,) float32, percentiles of their cosines to it.
        nearest: the row numbers of at most `MAX_TERMS` of them, nearest to it first.
        cohesion: their mean cosine distance to it.
    """

    centroid: Vectors
    quantiles: Vectors
    nearest: list[int]
    cohesion: float


def describe(vectors: Vectors, members: NDArray[np.int64] | None = None) -> Described:
    """Describes the domain whose members are these rows (m,) of `vectors` (n, d), by default all of them."""
    members = np.arange(len(vectors)) if members is None else members
    parts = [members[rows] for rows in blocks(len(members), vectors.shape[1])]
    total = np.sum([vectors[rows].astype(np.float64).sum(axis=0) for rows in parts], axis=0)
    centroid = unit((total / len(members))[None])
    own = np.concatenate([cosines(vectors[rows], centroid)[:, 0] for rows in parts])
    nearest = members[np.argsort(-own, kind="stable")[:MAX_TERMS]].tolist()
    return Described(centroid[0], np.quantile(own, QUANTILES).astype(np.float32), nearest, float(1 - own.mean()))


def shown_term(term: str) -> str:
    """A training term as a router holds it: on one line, without what could change or hide what is shown."""
    return UNSHOWN.sub(lambda found: " " if found[0] in "\t\n" else "", term)


def load_router(folder: Path) -> Router:
    """Reads a router.

    Raises:
        RouterError: a missing, truncated or edited file, in one line.
    """
    record, file = read_record(folder / RECORD, RouterError, _WHAT), str(folder / RECORD)
    if type(record.get("format")) is not int or record["format"] not in (FORMAT, LEARNED_FORMAT):
        raise RouterError(
            f"{file} has format {shown(record.get('format'))}; this version reads {FORMAT} and {LEARNED_FORMAT}"
        )
    try:
        with (folder / TENSORS).open("rb") as tensor_file:
            if int.from_bytes(tensor_file.read(8), "little") > MAX_HEADER_BYTES:
                raise RouterError(f"{folder / TENSORS} is damaged (its header is none): fit the domains again")
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise RouterError(f"{folder} is not {_WHAT}: {TENSORS} is missing") from error
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{folder / TENSORS} is damaged ({error}): fit the domains again") from error
    except (KeyError, TypeError, ValueError) as error:  # of a type that numpy has not
        raise RouterError(f"{folder / TENSORS} holds tensors of other types: fit the domains again") from error
    said = Fields(record, file, RouterError, "fit the domains again")
    terms = said.of("terms", list, _TERMS)
    if not all(isinstance(own, list) and all(isinstance(term, str) for term in own) for own in terms):
        raise said.refused("terms", _TERMS)
    settings: dict[str, Any] = {
        "names": tuple(said.texts("names")),
        "terms": tuple(map(tuple, terms)),
        "embedder_name": said.text("embedder"),
        "embedder_identity": dict(said.inside("embedder_identity").values),
        "template": _template(said.inside("template")),
        "top_k": said.of("top_k", int, "a whole number"),
        "temperature": said.number("temperature"),
        "abstain_quantile": said.number("abstain_quantile"),
    }
    learned = record["format"] == LEARNED_FORMAT
    method = said.text("method", "|".join(MAPS), f"one of {', '.join(MAPS)}") if learned else None
    for key in (*_HELD, *(("rows", "offsets", *MAPS[method]) if method else ())):
        if key not in tensors:
            raise RouterError(f"{folder / TENSORS} is damaged: it holds no tensor {key}: fit the domains again")
    settings |= {key: tensors[key] for key in _HELD}
    fitted = {k.removeprefix("embedder."): v for k, v in tensors.items() if k.startswith("embedder.")}
    try:
        router = Router(**settings, embedder_tensors=fitted, learned=_learned(method, tensors) if method else None)
        _check_embedder(router)
        return router
    except RouterError as error:
        raise RouterError(f"{folder} is damaged ({error}): fit the domains again") from error


def check_name(name: object) -> str:
    """`name` if it can name a domain: letters, digits, `.`, `_`, `-`, at most 64, beginning with a letter or digit."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RouterError(f"{shown(name)} cannot name a domain: use at most 64 letters, digits, '.', '_' and '-'")
    return name


def _learned(method: str, tensors: dict[str, NDArray[Any]]) -> Learned:
    return Learned(method, tensors["rows"], tensors["offsets"], {key: tensors[key] for key in MAPS[method]})


def _template(given: Fields) -> PromptTemplate:
    """A template from a file: it may hold `{term}` and `{context}`, and no other format expression."""
    names = [field.name for field in fields(PromptTemplate)]
    for key in given.values:
        if key not in names:
            raise given.refused(key, f"left out: a template holds {' and '.join(names)}")
        must = "text whose only expressions are {term} and {context}"
        text = given.text(key, must=must)
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:  # a brace alone
            raise given.refused(key, must) from error
        if any(name not in (None, "term", "context") or spec or conversion for _, name, spec, conversion in parsed):
            raise given.refused(key, must)
    return PromptTemplate(**given.values)


def _check_embedder(router: Router) -> None:
    """Raises RouterError unless the embedder is one that there is, and what it learned fits the router's vectors."""
    name, held = router.embedder_name, router.embedder_tensors
    if not _EMBEDDER.fullmatch(name):
        raise RouterError(f"embedder is {shown(name)}; it must be base, tfidf, st:MODEL or hf:MODEL")
    if held.keys() != set(_FITTED if name == "tfidf" else ()):
        raise RouterError(f"the embedder {name} has the tensors {shown(sorted(held))}, which are not its own")
    if name != "tfidf":
        return
    try:
        words = held["vocabulary"].tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise RouterError("embedder.vocabulary is not in UTF-8") from error
    if len({*words}) != len(words):
        raise RouterError("embedder.vocabulary repeats a word")
    count, width = len(words), len(router.mean)
    wanted: dict[str, tuple[tuple[int, ...], type]] = {
        "vocabulary": ((held["vocabulary"].size,), np.uint8),
        "idf": ((count,), np.float64),
        "projection": ((count, width), np.float32),
    }
    for key, (shape, kind) in wanted.items():
        value = held[key]
        if value.shape != shape or value.dtype != kind:
            raise RouterError(f"embedder.{key} is {value.dtype} {value.shape}; it must be {np.dtype(kind)} {shape}")
        if not np.isfinite(value).all() or np.abs(value).max(initial=0) > MAX_WEIGHT:
            raise RouterError(f"embedder.{key} holds values that are not finite, or above {MAX_WEIGHT:g}")


def _validate(router: Router) -> None:
    """Shapes, types, finite values, unit lengths, names and settings."""
    count = len(router.names)
    for name in router.names:
        check_name(name)
    if not count or len({name.lower() for name in router.names}) != count:
        raise RouterError(f"domain names must be unique, ignoring case: {', '.join(router.names)}")
    width = router.centroids.shape[-1] if router.centroids.ndim == 2 else -1
    wanted: dict[str, tuple[tuple[int, ...], type]] = {
        "centroids": ((count, width), np.float32),
        "quantiles": ((count, len(QUANTILES)), np.float32),
        "mean": ((width,), np.float32),
        "term_vectors": ((sum(len(terms) for terms in router.terms), width), np.float16),
    }
    for key, (shape, kind) in wanted.items():
        value = getattr(router, key)
        if value.shape != shape or value.dtype != kind:
            raise RouterError(f"{key} is {value.dtype} {value.shape}; it must be {np.dtype(kind)} {shape}")
        if not np.isfinite(value).all():
            raise RouterError(f"{key} holds values that are not finite")
    if len(router.terms) != count or not all(isinstance(t, str) for terms in router.terms for t in terms):
        raise RouterError(f"terms must be one list of strings for each of the {count} domains")
    if not np.allclose(np.linalg.norm(router.centroids, axis=1), 1, atol=1e-3):
        raise RouterError("a centroid is not of unit length")
    if np.abs(router.quantiles).max() > 1 + ROUNDING or np.diff(router.quantiles).min() < -1e-5:
        raise RouterError("quantiles are not those of cosines: each row must rise, within -1 and 1")
    if np.linalg.norm(router.term_vectors.astype(np.float32), axis=1).max(initial=0) > 1 + ROUNDING:
        raise RouterError("a term's vector is longer than 1")
    if router.learned is not None:
        router.learned.check(count, width)
    if not isinstance(router.embedder_name, str) or not isinstance(router.embedder_identity, dict):
        raise RouterError("embedder must be a name and embedder_identity an object")
    for key, (low, high) in _BOUNDS.items() if router.embedder_name == "base" else ():
        value = router.embedder_identity.get(key, low)
        if type(value) is not int or not low <= value <= high:
            raise RouterError(f"embedder_identity.{key} is {shown(value)}; it must lie between {low} and {high:,}")
    if type(router.top_k) is not int or not 1 <= router.top_k <= 10_000:
        raise RouterError(f"top_k is {shown(router.top_k)}; it must be a whole number from 1 to 10,000")
    if not 1e-6 <= router.temperature <= 1e6:
        raise RouterError(f"temperature is {shown(router.temperature)}; it must lie between 1e-6 and 1e6")
    if np.linalg.norm(router.mean.astype(np.float64)) > 1 + 1e-3:
        raise RouterError("mean is longer than vectors of unit length can have it")
    if any(UNSHOWN.search(term) for terms in router.terms for term in terms):
        raise RouterError("a term holds line ends, or characters that could change or hide what is shown")
    if not 0 <= router.abstain_quantile <= 1:
        raise RouterError(f"abstain_quantile is {shown(router.abstain_quantile)}; it must lie between 0 and 1")
