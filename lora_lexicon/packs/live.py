"""Domains join a loaded mixture, and leave it, in memory. Writes nothing, and knows nothing of requests in flight.

The slow half, reading and checking, changes nothing of the system. The quick half is done wholly or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lexicon.archive import is_archive
from lora_lexicon.cache import unpacked
from lora_lexicon.compose.mixture import source_of
from lora_lexicon.compose.system import System, install
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import ConflictError, LexiconError, PackError
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.grouped import grouped_adapters
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.resident import Source
from lora_lexicon.packs.pack import verify_pack
from lora_lexicon.packs.trust import Policy


@dataclass(frozen=True)
class Newcomers:
    """Domains that were read and checked; `router` is their pack's, and may know others.

    Attributes:
        adapters: without numbers where experts come on demand; then `sources` load them.
    """

    adapters: list[LoadedAdapter]
    router: Router
    sources: Sequence[Source] = ()


def read_newcomers(system: System, pack: Path, names: Sequence[str] = (), policy: Policy | None = None) -> Newcomers:
    """Reads domains of a pack, by default all that the system lacks.

    Raises:
        TrustError: the policy does not let the pack in.
        ConflictError: the system holds no adapters or has such domains; or the pack is another base's or embedder's.
        PackError: a damaged pack, or one without such a domain.
    """
    _need_mixture(system)
    pack = unpacked(pack) if is_archive(pack) else pack
    if policy is not None:
        policy.check(pack)
    manifest = verify_pack(pack)
    if manifest.base_fingerprint != system.base_fingerprint:
        raise ConflictError(
            f"pack {manifest.name!r} was made for base {manifest.base!r} ({manifest.base_fingerprint[:12]}), not for "
            f"that of {system.name!r} ({system.base_fingerprint[:12]}): train its experts on that base"
        )
    router = load_router(pack)
    try:
        assert system.embedder is not None
        router.check(system.embedder)
    except LexiconError as error:
        raise ConflictError(f"pack {manifest.name!r} is routed in another way than {system.name!r}: {error}") from error
    unknown = [name for name in names if name not in manifest.domains]
    if unknown:
        raise PackError(f"pack {manifest.name!r} has no domain {unknown[0]!r}: it has {', '.join(manifest.domains)}")
    chosen = list(dict.fromkeys(names)) or [name for name in manifest.domains if name not in system.experts]
    if not chosen:
        raise ConflictError(f"{system.name!r} has all domains of pack {manifest.name!r} already: remove one first")
    _need_new(system, chosen)
    if system.residents is not None:
        likes = [load_adapter(pack / "adapters" / name, name, shapes=True) for name in chosen]
        sources = [source_of(pack, manifest, like) for like in likes]
        return Newcomers(likes, router, sources)
    return Newcomers([load_adapter(pack / "adapters" / name, name) for name in chosen], router)


def add_domains(system: System, newcomers: Newcomers) -> None:
    """Puts domains into the system; what it held stays the same to the bit. No batch may be in flight.

    Raises:
        LexiconError: they do not fit; the system is as it was.
    """
    assert system.router is not None
    _need_new(system, [adapter.name for adapter in newcomers.adapters])
    router = system.router
    for adapter in newcomers.adapters:
        router = router.with_domain_of(newcomers.router, adapter.name)
    install(system, router, [*_adapters(system), *newcomers.adapters], newcomers.sources)


def remove_domain(system: System, name: str) -> None:
    """Takes a domain out of the system, and its adapter out of memory. No batch may be in flight.

    Raises:
        ConflictError: it is the last one, or the system holds no adapters.
        PackError: no such domain.
    """
    _need_mixture(system)
    if name not in system.experts:
        raise PackError(f"no domain {name!r}: there are {', '.join(system.experts)}")
    if len(system.experts) == 1:
        raise ConflictError(f"{name!r} is the last domain of {system.name!r}: add another one before")
    assert system.router is not None
    kept = [adapter for adapter in _adapters(system) if adapter.name != name]
    install(system, system.router.without_domain(name), kept)


def ranks(system: System) -> dict[str, int | None]:
    """Each domain's largest rank; None where experts are no adapters."""
    if system.kind != "mixture":
        return dict.fromkeys(system.experts)
    return {adapter.name: max(f.rank for f in adapter.factors.values()) for adapter in _adapters(system)}


def _adapters(system: System) -> list[LoadedAdapter]:
    """Those of all domains, in order; without numbers where they come on demand."""
    if system.residents is not None:
        return [source.like for source in system.residents.sources]
    return grouped_adapters(system.model, system.experts)


def _need_mixture(system: System) -> None:
    if system.kind != "mixture":
        raise ConflictError(f"{system.name!r} is of kind {system.kind}, whose experts cannot change: serve a pack")


def _need_new(system: System, names: Sequence[str]) -> None:
    taken = {name.lower() for name in system.experts}
    for name in names:
        if name.lower() in taken:
            raise ConflictError(f"{system.name!r} has a domain {name!r} already: remove that one first")
