"""Domains join a loaded mixture, and leave it, in memory. Writes nothing, and knows nothing of requests in flight.

The slow half, reading and checking, changes nothing of the system. The quick half is done wholly or not at all.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_lexicon.archive import is_archive
from lora_lexicon.cache import staged, unpacked
from lora_lexicon.compose.mixture import MANIFEST, SIGNATURE, files_of, signature_of, source_of
from lora_lexicon.compose.system import System, install
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import ConflictError, LexiconError, PackError, show_as
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.grouped import grouped_adapters
from lora_lexicon.experts.lora import LoadedAdapter
from lora_lexicon.experts.resident import Source
from lora_lexicon.folders import put_file
from lora_lexicon.packs.pack import verify_pack
from lora_lexicon.packs.trust import Policy

MEND = "free some space, or name another folder in LORA_LEXICON_CACHE"


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
    folder = unpacked(pack) if is_archive(pack) else pack
    if policy is None:
        return _read(system, folder, folder, names)
    policy.check(folder)
    if folder != pack:  # which lies in the cache of the user's own
        return _read(system, folder, folder, names)
    with _copied(folder) as copy:
        policy.check(copy)
        return _read(system, copy, folder, names)


@contextmanager
def _copied(pack: Path) -> Iterator[Path]:
    """A copy of a pack in the user's cache: who may write where the pack lies changes nothing of what is checked."""
    with staged(f"checked {pack.resolve()}", pack) as stage:
        copy = stage / "pack"
        show_as(copy, pack)
        try:
            _copy(pack, copy)
            yield copy
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _copy(pack: Path, copy: Path) -> None:
    """Copies the files of a pack that is not checked yet; of a base inside, which stays unused, hard links will do."""
    try:
        shutil.rmtree(copy, ignore_errors=True)  # of a killed run
        copy.mkdir()
        for name in [*files_of(pack), MANIFEST, *([SIGNATURE] if signature_of(pack) else [])]:
            if (pack / name).is_symlink():
                raise PackError(f"pack {pack}: {name} is a link to another place: copy the file itself there")
            put_file(pack / name, copy / name, link=name.startswith("base/"))
    except OSError as error:
        raise PackError(f"pack {pack} cannot be copied to check it ({error.strerror or error}): {MEND}") from error


def _read(system: System, pack: Path, place: Path, names: Sequence[str]) -> Newcomers:
    """As `read_newcomers`, of a folder; what comes on demand is read from `place`, and compared with the manifest."""
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
        sources = [source_of(place, manifest, like) for like in likes]
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
