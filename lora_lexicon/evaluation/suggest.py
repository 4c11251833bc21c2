"""Which pack fits some entries best, by loss. Knows packs' folders; prints nothing.

Packs of one base take turns on it: it is loaded once, and one base is in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.compose.mixture import MANIFEST, Manifest, base_of, read_manifest, read_pack, revision_of
from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.domains.fit import prompts_of
from lora_lexicon.errors import LexiconError
from lora_lexicon.evaluation.bootstrap import paired_bootstrap
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.folders import sha256_of
from lora_lexicon.inference.engine import losses
from lora_lexicon.packs.trust import Policy
from lora_lexicon.resources import find_model


@dataclass(frozen=True)
class Fit:
    """How a pack does on n entries.

    Attributes:
        nll: (n,) nats of each definition, EOS included, as the pack routes it.
        tokens: (n,) of its base's tokenizer.
        experts: the nats of all definitions by each expert alone.
        base_nll: those by the base alone.
        abstains: the share of the prompts that the router leaves to the base.
        also: where else the same pack lies.
    """

    pack: str
    path: str
    base: str
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    experts: dict[str, float]
    base_nll: float
    abstains: float
    also: list[str] = field(default_factory=list)


def suggest(
    packs: Sequence[Path],
    entries: Sequence[Entry],
    *,
    base: str | None = None,
    dtype: str = "float32",
    seed: int = 42,
    policy: Policy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ranks packs by their loss on entries; those that hold the same files are one.

    Args:
        base: in place of where the packs' base is looked for.
        seed: of the bootstrap.
        policy: whose signature packs must bear, but for those that ship.
        progress: called with (packs that were looked at, all).

    Returns:
        `entries`, `unit` (of all losses: nats a "token" where all packs cut the definitions into as many of them, else
        a "character", since tokens of different tokenizers do not compare), `packs`, the best first (`pack`, `path`,
        `also`, `base`, `domains`, `loss` as routed, `best_expert` and `best_expert_loss`, `base_loss`, `abstains`,
        and `next`: its difference to the next pack with interval and p, None for the last), and `broken` (`path` and
        `why`).

    Raises:
        LexiconError: an entry that no tokenizer takes.
    """
    found: list[Fit] = []
    broken: list[dict[str, str]] = []
    groups: dict[str, dict[str, list[tuple[Path, Path, Manifest]]]] = {}  # by base, and by what they hold
    for path in packs:
        try:
            folder = find_model(str(path))
            if policy is not None:
                policy.check_named(folder)
            manifest = read_manifest(folder)
            same = groups.setdefault(manifest.base_fingerprint, {}).setdefault(sha256_of(folder / MANIFEST), [])
            same.append((path, folder, manifest))
        except LexiconError as error:
            broken.append({"path": str(path), "why": str(error)})
    for group in groups.values():
        loaded: Base | None = None
        for same in sorted(group.values(), key=lambda same: not same[0][2].base_inside):  # which surely has it
            fit: Fit | None = None
            for path, folder, manifest in same:
                try:
                    if fit is not None:
                        read_pack(folder, shapes=True)  # whether it is what its manifest says
                        fit.also.append(str(path))
                    else:
                        if loaded is None:
                            name, revision = base_of(folder, manifest, base), revision_of(manifest, base)
                            loaded = load_base(name, dtype=dtype, revision=revision)
                        fit = _fit(path, folder, loaded, entries)
                        found.append(fit)
                except LexiconError as error:
                    broken.append({"path": str(path), "why": str(error)})
                if progress:
                    progress(sum(1 + len(fit.also) for fit in found) + len(broken), len(packs))
    return {"entries": len(entries), **_ranked(found, entries, seed), "broken": broken}


def _fit(path: Path, folder: Path, loaded: Base, entries: Sequence[Entry]) -> Fit:
    system = load_system(str(folder), loaded=loaded)
    routing = cast(Any, system.route(prompts_of(entries)))
    nll, tokens = losses(system, entries, weights=routing.weights)
    alone = {}
    for n, name in enumerate(system.experts):
        weights = np.zeros_like(routing.weights)
        weights[:, n] = 1
        alone[name] = float(losses(system, entries, weights=weights)[0].sum())
    bare = losses(system, entries, weights=np.zeros_like(routing.weights))[0]
    abstains = float((routing.top == -1).mean())
    return Fit(system.name, str(path), loaded.name, nll, tokens, alone, float(bare.sum()), abstains)


def _ranked(found: Sequence[Fit], entries: Sequence[Entry], seed: int) -> dict[str, Any]:
    """The packs by the nats of all definitions, each compared with the next by a paired bootstrap over headwords."""
    ordered = sorted(found, key=lambda fit: float(fit.nll.sum()))
    same = all(np.array_equal(fit.tokens, ordered[0].tokens) for fit in ordered)
    characters = np.array([max(1, len(entry.definition)) for entry in entries])
    groups = [headword(entry.term) for entry in entries]
    rows = []
    for place, fit in enumerate(ordered):
        weights = fit.tokens if same else characters
        best = min(fit.experts, key=lambda name: fit.experts[name])
        other = ordered[place + 1] if place + 1 < len(ordered) else None
        compared = other and paired_bootstrap(fit.nll, other.nll, weights=weights, groups=groups, seed=seed)
        rows.append(
            {
                "pack": fit.pack,
                "path": fit.path,
                "also": fit.also,
                "base": fit.base,
                "domains": list(fit.experts),
                "loss": float(fit.nll.sum() / weights.sum()),
                "best_expert": best,
                "best_expert_loss": float(fit.experts[best] / weights.sum()),
                "base_loss": float(fit.base_nll / weights.sum()),
                "abstains": fit.abstains,
                "next": asdict(compared) if compared else None,
            }
        )
    return {"unit": "token" if same else "character", "packs": rows}
