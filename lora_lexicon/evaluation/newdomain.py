"""A new domain joins a pack: embed, describe, train on the pack's own base, compare, compose. Knows no terminal.

The base is loaded once: for the router's vectors, for training, and for the losses before and after. The pack changes
last, when all that is to be reported is known.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon import __version__
from lora_lexicon.compose.compare import Experts, compare_experts, held_experts
from lora_lexicon.compose.mixture import Manifest, base_of
from lora_lexicon.compose.probes import SAMPLE, probe_entries
from lora_lexicon.compose.system import System, install, load_system
from lora_lexicon.data.entry import Entry, headword, spread
from lora_lexicon.data.store import Entries
from lora_lexicon.domains.embed import FIT_BATCH
from lora_lexicon.domains.fit import TRAIN, prompts_of
from lora_lexicon.domains.learned import ROWS
from lora_lexicon.domains.router import Router
from lora_lexicon.domains.vectors import cosines
from lora_lexicon.errors import DataError
from lora_lexicon.evaluation.bootstrap import paired_bootstrap
from lora_lexicon.evaluation.routers import Prompts, compare_routers, rivals
from lora_lexicon.evaluation.run import SIGNATURES
from lora_lexicon.experts.base import Base, base_folder
from lora_lexicon.experts.checkpoint import ExpertInfo, load_adapter
from lora_lexicon.experts.journal import Report
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.experts.watch import Score
from lora_lexicon.folders import sha256_of
from lora_lexicon.inference.engine import losses
from lora_lexicon.packs.edit import check_domains, merged_router, weights_of, write_merged
from lora_lexicon.packs.pack import build_pack, change_pack, history, holding, verify_pack
from lora_lexicon.recipe import TrainRecipe

Conflict = Literal["keep", "merge", "replace"]
MEDIAN = 50  # of a router's 101 percentiles
ALONE, EXPERTS = "alone", "experts"


@dataclass(frozen=True)
class Overlap:
    """An old domain that a new one sits on.

    Attributes:
        similarity: cosine of the two centroids.
        old_median, new_median: of the cosines of each domain's own members to its centroid.
    """

    domain: str
    similarity: float
    old_median: float
    new_median: float


def overlaps(router: Router, name: str) -> list[Overlap]:
    """The domains that `name` sits on, the nearest first.

    Two domains sit on each other where their centroids are nearer to each other than half of the members of either are
    to their own.
    """
    at, medians = router.names.index(name), router.quantiles[:, MEDIAN]
    near = cosines(router.centroids, router.centroids[at : at + 1])[:, 0]
    order = np.argsort(-near, kind="stable").tolist()
    found = [i for i in order if i != at and near[i] >= max(medians[i], medians[at])]
    return [Overlap(router.names[i], float(near[i]), float(medians[i]), float(medians[at])) for i in found]


@dataclass(frozen=True)
class Wanted:
    """What `new_domain` is asked for.

    Attributes:
        base: where the pack's base lies, if elsewhere.
        base_name: the base's name in the new expert's record and pack.
        held_out: entries of the old domains, of which the test split is looked at; None: the WordNet sample.
        limit: at most so many held-out entries of the old domains, and of the new one.
        routers: learned routers are compared with the pack's own; they learn of the train split of `held_out`.
        out: the new pack; None: the pack itself changes.
        on_conflict: what becomes of an old domain that the new one sits on: both are kept, the old one is taken out,
            or the two become one under the old one's name.
        seed: of the bootstrap.
    """

    name: str
    recipe: TrainRecipe
    base: str | None = None
    base_name: str | None = None
    held_out: Path | None = None
    limit: int = 400
    routers: bool = False
    out: Path | None = None
    on_conflict: Conflict = "keep"
    seed: int = 42
    overwrite: bool = False


@dataclass(frozen=True)
class Told:
    """Who is told how it goes: of overlaps before the training, of its steps, and of (prompts decoded, to decode)."""

    overlap: Callable[[Sequence[Overlap]], object] | None = None
    training: Report | None = None
    checking: Callable[[int, int], None] | None = None


def new_domain(
    pack: Path,
    entries: Entries,
    work: Path,
    wanted: Wanted,
    *,
    score: Score | None = None,
    told: Told = Told(),
    report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Adds a domain to a pack, from its entries; returns the report.

    A run that was cut off goes on where it was when it is called again.

    Args:
        entries: of the new domain; `train` describes it and trains its expert, `test` (else `valid`) is what its gain
            is measured on.
        work: a folder for what is made beside the pack: `experts/NAME`, and `alone`, a pack of this domain only.
        score: see `train_experts`.
        report: writes the report; it is called before the pack changes, and again with the hashes of its files.

    Raises:
        LexiconError: a damaged pack, parts that do not fit, no entries, or a name that cannot be.
    """
    with holding(pack, wanted.out):
        return _joined(pack, entries, work, wanted, score, told, report or (lambda _: None))


def _joined(
    pack: Path,
    entries: Entries,
    work: Path,
    wanted: Wanted,
    score: Score | None,
    told: Told,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    manifest = verify_pack(pack)
    name = wanted.name
    check_domains(manifest, [], [name])
    source = base_of(pack, manifest, wanted.base)
    if TRAIN not in entries.splits:
        raise DataError(f"{entries.path} has no split {TRAIN!r} to train on: prepare more data")
    held = probe_entries(wanted.held_out, "test", wanted.limit)
    lessons = probe_entries(wanted.held_out, TRAIN, ROWS) if wanted.routers else None
    system = load_system(str(pack), base=wanted.base, dtype=wanted.recipe.dtype, quantize=wanted.recipe.quantize)
    before = held_experts(system)
    rows = entries.split(TRAIN)
    vectors = system.embed(prompts_of(rows), FIT_BATCH)
    router = before.router.with_domain(name, cast(Any, vectors), [row.term for row in rows])
    taught = _taught(system, before.router, lessons, wanted) if lessons else None
    found = overlaps(router, name)
    if found and told.overlap:
        told.overlap(found)
    base = Base(
        system.model, system.tokenizer, wanted.base_name or source, base_folder(source), system.base_fingerprint
    )
    info = _train(base, system, before, entries, work, wanted, score, told.training)
    joined = Experts(router, [*before.adapters, load_adapter(work / EXPERTS / name, name)])
    with tempfile.TemporaryDirectory() as scratch:
        after, placed, done = _resolved(joined, before, found, pack, work, Path(scratch), manifest, wanted)
        result = {
            "version": __version__,
            "pack": str(wanted.out or pack),
            "domain": name,
            "domains": list(after.router.names),
            "entries": entries.fingerprint,
            "training": _training(info),
            "overlaps": [asdict(overlap) for overlap in found],
            "on_conflict": done,
            "signature": SIGNATURES["loss"],
            "own": _own(system, before, joined, after, entries, done["now"], wanted),
            "held_out": {
                "source": str(wanted.held_out or SAMPLE),
                **_old(system, before, after, held, wanted.seed, told.checking),
            },
        }
        if taught:
            new = Prompts(rows, cast(Any, vectors))
            result["routers"] = _routers(system, before, after, taught, new, held, entries, done["now"], wanted)
        report(result)
        _alone(router, before, work, base)
        more = {"added": history(manifest, done["now"], entries.fingerprint, len(rows))}
        change_pack(pack, manifest, after.router, placed, more, out=wanted.out, overwrite=wanted.overwrite)
    stay = {id(adapter) for adapter in after.adapters}
    result["files"] = _untouched(wanted.out or pack, manifest, [a.name for a in before.adapters if id(a) in stay])
    report(result)
    return result


def _train(
    base: Base,
    system: System,
    before: Experts,
    entries: Entries,
    work: Path,
    wanted: Wanted,
    score: Score | None,
    progress: Report | None,
) -> ExpertInfo:
    """Trains the expert on the system's own base, from which the other experts are taken meanwhile."""
    name, valid = wanted.name, entries.split("valid") if "valid" in entries.splits else []
    install(system, before.router, [])
    try:
        (made,) = train_experts(
            base,
            [Part(name, entries.split(TRAIN), work / EXPERTS / name, name, valid)],
            wanted.recipe,
            score=score,
            entries_fingerprint=entries.fingerprint,
            template=before.router.template,
            progress=progress,
            overwrite=wanted.overwrite,
        )
    finally:
        before.put_on(system)
    return made


def _resolved(
    joined: Experts,
    before: Experts,
    found: Sequence[Overlap],
    pack: Path,
    work: Path,
    scratch: Path,
    manifest: Manifest,
    wanted: Wanted,
) -> tuple[Experts, dict[str, Path], dict[str, Any]]:
    """The experts that the pack shall hold, the folders of those that are new, and what was done where domains overlap.

    `chosen` is what was asked for, `did` what was done, `old` the domain that it was done to, `now` the name that the
    new domain's prompts go by.
    """
    name, chosen = wanted.name, wanted.on_conflict
    own = {name: work / EXPERTS / name}
    if not found or chosen == "keep":
        did = "keep" if found else "nothing"
        return joined, own, {"chosen": chosen, "did": did, "old": found[0].domain if found else None, "now": name}
    old = found[0].domain
    done = {"chosen": chosen, "did": chosen, "old": old, "now": name if chosen == "replace" else old}
    if chosen == "replace":
        adapters = [adapter for adapter in joined.adapters if adapter.name != old]
        return Experts(joined.router.without_domain(old), adapters), own, done
    folders = {old: pack / "adapters" / old, **own}
    weights = weights_of(folders)
    note = write_merged(scratch / old, folders, weights, None, manifest)
    adapters = [*(adapter for adapter in before.adapters if adapter.name != old), load_adapter(scratch / old, old)]
    return Experts(merged_router(joined.router, weights, old), adapters), {old: scratch / old}, {**done, **note}


class _Taught(NamedTuple):
    """Training prompts of the old domains, and (n,) the number of the domain that the pack sends each to."""

    prompts: Prompts
    domains: NDArray[np.int64]


def _taught(system: System, router: Router, rows: Sequence[Entry], wanted: Wanted) -> _Taught:
    """What routers learn of the old domains; prompts that the pack's router leaves to the base are left out.

    Raises:
        DataError: one of the old domains has no prompt, or there is one old domain only.
    """
    if len(router.names) == 1:
        raise DataError(f"of a pack of one domain ({', '.join(router.names)}) no router can learn: leave out --routers")
    prompts = Prompts(rows, cast(Any, system.embed(prompts_of(rows), FIT_BATCH)))
    top = router.route(prompts.vectors).top
    absent = [name for n, name in enumerate(router.names) if n not in top]
    if absent:
        raise DataError(
            f"no training prompt of {wanted.held_out or SAMPLE} goes to {', '.join(absent)}, of which a router cannot "
            "learn then: give --held-out with entries of every old domain, or leave out --routers"
        )
    return _Taught(prompts.of(top >= 0), top[top >= 0])


def _routers(
    system: System,
    before: Experts,
    after: Experts,
    taught: _Taught,
    new: Prompts,
    held: Sequence[Entry],
    entries: Entries,
    now: str,
    wanted: Wanted,
) -> dict[str, Any]:
    """Learned routers beside the pack's own, on held-out prompts of the old domains and of the new one.

    An old prompt's own domain is the one that the pack sent it to before: of training prompts, that is what routers
    learn, and of held-out ones, what is right. A domain that was taken out has become the new one.
    """
    names = after.router.names
    places = np.array([names.index(name if name in names else now) for name in before.router.names])
    last = names.index(now)
    labels = np.concatenate([places[taught.domains], np.full(len(new.rows), last)]).astype(np.int32)
    embedder = cast(Any, system.embedder)
    routers, refused = rivals(after.router, taught.prompts + new, labels, embedder, wanted.seed)
    old = Prompts(held, cast(Any, system.embed(prompts_of(held), FIT_BATCH)))
    truth = before.router.route(old.vectors).top
    old, truth = old.of(truth >= 0), places[truth[truth >= 0]]
    own = _own_rows(entries, wanted)[1]
    after.put_on(system)
    found: dict[str, Any] = {
        "learned_of": {"source": str(wanted.held_out or SAMPLE), "old": len(taught.domains), "new": len(new.rows)},
        "old": {"entries": len(old.rows), "routers": compare_routers(system, routers, old, truth, wanted.seed)},
        "new": None,
        "refused": refused,
    }
    if own:
        prompts = Prompts(own, cast(Any, system.embed(prompts_of(own), FIT_BATCH)))
        rows = compare_routers(system, routers, prompts, np.full(len(own), last), wanted.seed)
        found["new"] = {"entries": len(own), "routers": rows}
    return found


class _Losses(NamedTuple):
    """(n,) nats of each entry's definition, and its tokens."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def mean(self, rows: NDArray[np.bool_] | None = None) -> float:
        """Nats per definition token of these rows."""
        kept = np.ones(len(self.nll), dtype=bool) if rows is None else rows
        return float(self.nll[kept].sum() / self.tokens[kept].sum())


def _one_hot(rows: int, experts: int, n: int) -> NDArray[np.float32]:
    weights = np.zeros((rows, experts), dtype=np.float32)
    weights[:, n] = 1
    return weights


def _difference(a: _Losses, b: _Losses, entries: Sequence[Entry], seed: int) -> dict[str, float]:
    """a - b in nats a token, with its 95 % interval and p; below 0, a is the better one."""
    groups = [headword(entry.term) for entry in entries]
    return asdict(paired_bootstrap(a.nll, b.nll, weights=a.tokens, groups=groups, seed=seed))


def _own_rows(entries: Entries, wanted: Wanted) -> tuple[str | None, list[Entry]]:
    """The split that the new domain's gain is measured on, and its entries; [] where there is none."""
    split = next((name for name in ("test", "valid") if name in entries.splits), None)
    return split, spread(entries.split(split), wanted.limit) if split else []


def _own(
    system: System, before: Experts, joined: Experts, after: Experts, entries: Entries, now: str, wanted: Wanted
) -> dict[str, Any] | None:
    """What the new domain gains on its own held-out entries; None where there are none."""
    split, rows = _own_rows(entries, wanted)
    if not rows:
        return None
    prompts, count = prompts_of(rows), len(before.adapters)

    def alone(n: int, experts: int) -> _Losses:
        return _Losses(*losses(system, rows, weights=_one_hot(len(rows), experts, n)))

    found: dict[str, _Losses] = {}
    before.put_on(system)
    found["base"] = _Losses(*losses(system, rows, weights=np.zeros((len(rows), count), dtype=np.float32)))
    found["former pack"] = _Losses(*losses(system, rows))
    each = [alone(n, count) for n in range(count)]
    best = int(np.argmin([own.mean() for own in each]))
    found["former best expert"] = each[best]
    joined.put_on(system)
    found["new expert alone"] = alone(count, count + 1)
    after.put_on(system)
    at = after.router.names.index(now)
    if now != wanted.name:
        found["merged expert alone"] = alone(at, len(after.adapters))
    routing = cast(Any, system.route(prompts))
    found["new pack"] = _Losses(*losses(system, rows, weights=routing.weights))
    pairs = [("new expert alone", "base"), ("new expert alone", "former best expert")]
    pairs += [("merged expert alone", "former best expert")] if now != wanted.name else []
    pairs += [("new pack", "base"), ("new pack", "former best expert"), ("new pack", "former pack")]
    return {
        "split": split,
        "entries": len(rows),
        "tokens": int(found["base"].tokens.sum()),
        "former_best_expert": before.router.names[best],
        "routed_to_it": float((routing.top == at).mean()),
        "losses": {name: own.mean() for name, own in found.items()},
        "comparisons": [
            {"a": a, "b": b, "metric": "loss", **_difference(found[a], found[b], rows, wanted.seed)} for a, b in pairs
        ],
    }


def _old(
    system: System,
    before: Experts,
    after: Experts,
    held: Sequence[Entry],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Which held-out prompts of the old domains change hands, and what that does to their loss."""
    prompts = prompts_of(held)
    before.put_on(system)
    old = cast(Any, system.route(prompts))
    first = _Losses(*losses(system, held, weights=old.weights))
    checked = compare_experts(system, before, after, prompts, progress)
    new = cast(Any, system.route(prompts))
    second = _Losses(*losses(system, held, weights=new.weights))
    moved = ~before.keep(after, old.weights, new.weights)
    numbers = np.flatnonzero(moved).tolist()
    for i, row in zip(numbers, checked["moved"], strict=True):
        row["loss_before"], row["loss_after"] = (float(own.nll[i] / own.tokens[i]) for own in (first, second))
    domains = [_part(old.top == n, name, moved, first, second, held, seed)
               for n, name in [*enumerate(before.router.names), (-1, "base")]]  # fmt: skip
    every = np.ones(len(held), dtype=bool)
    return {
        **checked,
        "moved": sorted(checked["moved"], key=lambda row: row["loss_before"] - row["loss_after"]),
        "same_loss": int((first.nll[~moved] == second.nll[~moved]).sum()),
        "all": _part(every, "all", moved, first, second, held, seed),
        "moved_only": _part(moved, "those that change hands", moved, first, second, held, seed),
        "domains": [part for part in domains if part],
    }


def _part(
    rows: NDArray[np.bool_],
    name: str,
    moved: NDArray[np.bool_],
    before: _Losses,
    after: _Losses,
    held: Sequence[Entry],
    seed: int,
) -> dict[str, Any] | None:
    """The losses of some rows before and after, and their difference; None without rows."""
    if not rows.any():
        return None
    first, second = (_Losses(own.nll[rows], own.tokens[rows]) for own in (before, after))
    found = _difference(second, first, [held[i] for i in np.flatnonzero(rows).tolist()], seed)
    counts = {"entries": int(rows.sum()), "moved": int((rows & moved).sum())}
    return {"domain": name, **counts, "before": first.mean(), "after": second.mean(), **found}


def _training(info: ExpertInfo) -> dict[str, Any]:
    curve = info.training["losses"]
    return {
        "rows": info.rows,
        "tokens": info.tokens,
        "trained_parameters": info.trained_parameters,
        "steps": info.training["steps"],
        "seconds": info.training["seconds"],
        "loss": curve[-1][1] if curve else None,
        "recipe": info.recipe,
    }


def _alone(router: Router, before: Experts, work: Path, base: Base) -> None:
    """A pack of the new domain only, which can join others."""
    for name in before.router.names:
        router = router.without_domain(name)
    with tempfile.TemporaryDirectory() as folder:
        router.save(Path(folder))
        expert = work / EXPERTS / router.names[0]
        build_pack(base.name, [expert], Path(folder), work / ALONE, name=router.names[0], overwrite=True)


def _untouched(pack: Path, before: Manifest, domains: Sequence[str]) -> list[dict[str, Any]]:
    """The files of the domains that stay, as they lie there now, beside what the pack held."""
    kept = [path for path in sorted(before.files) if path.startswith(tuple(f"adapters/{name}/" for name in domains))]
    found = [(path, sha256_of(pack / path)) for path in kept]
    return [{"file": path, "sha256": digest, "unchanged": digest == before.files[path]} for path, digest in found]
