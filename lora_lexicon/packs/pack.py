"""Packs: build, copy, verify, compare, add a domain, remove one. Knows no training and no scores.

Every change is made on a copy that takes the pack's place in one step, while no other process changes it.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from lora_lexicon.archive import SUFFIX, placed
from lora_lexicon.compose.compare import Experts, compare_experts, held_experts
from lora_lexicon.compose.merge import check_router_base, match_experts
from lora_lexicon.compose.mixture import (
    MANIFEST,
    SIGNATURE,
    Manifest,
    base_of,
    check_files,
    check_listed,
    check_made_for,
    read_manifest,
    signature_of,
)
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, open_expert
from lora_lexicon.compose.system import load_system
from lora_lexicon.domains.embed import FIT_BATCH, Prompt
from lora_lexicon.domains.router import RECORD as ROUTER
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import ExpertError, LexiconError, PackError
from lora_lexicon.experts.base import base_folder, local_base, vocabulary_hash
from lora_lexicon.experts.checkpoint import (
    CONFIG,
    INT8,
    WEIGHTS,
    changes_nothing,
    check_name,
    load_adapter,
    read_adapter_config,
    save_lora,
    save_lora_int8,
)
from lora_lexicon.experts.lora import LoadedAdapter, check_fit
from lora_lexicon.experts.shape import Shape, shape_of
from lora_lexicon.experts.tensors import Checkpoint, torch_dtype
from lora_lexicon.folders import LOGGER, Fields, changing, folder_bytes, shown
from lora_lexicon.packs.layout import (
    About,
    about_of,
    domain_record,
    fill,
    place_adapter,
    place_base,
    router_record,
    write_manifest,
)

DTYPES = ("float32", "float16", "bfloat16", "int8")
REVISION = re.compile(r"[0-9a-f]{40}")  # a commit, which is the name of a folder in the Hub's cache


def build_pack(
    base: str,
    experts: Sequence[Path],
    domains: Path,
    out: Path,
    *,
    name: str | None = None,
    about: About | None = None,
    include_base: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a pack: the router of `domains` and one LoRA expert for each of its domains; returns its manifest.

    The same parts give the same bytes.

    Args:
        base: a folder, a Hub name or a shipped pack's name.
        out: a folder, or one file where it ends in `.lexpack`.
        about: what it says of itself; its name gives way to `name`.
        include_base: the base itself goes in too.
        dtype: what the adapters are held in (see `DTYPES`); by default as they are.

    Raises:
        LexiconError: parts that do not fit each other, or a damaged file.
    """
    own, router = BaseFiles.open(base, base_folder(base)), load_router(domains)
    check_router_base(router, own.fingerprint, base)
    sources = [_open(path, own) for path in experts]
    match_experts([source.name for source in sources], router.names)
    opened = {source.name: source.path for source in sources}
    entries = {source.info.entries_fingerprint for source in sources if source.info} - {""}
    called = check_name(name or (about.name if about else "") or out.resolve().name.removesuffix(SUFFIX))
    with placed(out, overwrite=overwrite) as folder:
        for domain in router.names:
            load_adapter(opened[domain], domain)  # first, so that an error names the user's file
            place_adapter(folder, opened[domain], domain)
        if include_base:
            place_base(folder, own.path)
        _hold_as(folder, router.names, dtype)
        # A path that begins where the user stands would elsewhere be another folder, or a name of the Hub.
        named = str(own.path.resolve()) if Path(base).is_dir() else base
        inside = {"name": own.path.resolve().name, "path": "base"} if include_base else {"name": named, "path": None}
        write_manifest(
            folder,
            about=replace(about or About(called), name=called),
            base={
                **inside,
                "revision": own.path.name if REVISION.fullmatch(own.path.name) else "",
                **_said_of(own),
            },
            router=router,
            adapters=_adapters(folder, router),
            made_from={"entries": sorted(entries)},
        )
        return read_manifest(folder).record


def copy_pack(
    pack: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False, **about: Any
) -> dict[str, Any]:
    """Writes a pack again, as a folder or as one file, and returns its manifest.

    With neither `dtype` nor `about` it holds the same bytes, a signature included.

    Args:
        dtype: as in `build_pack`.
        about: fields of `About` in place of its own.

    Raises:
        LexiconError: a damaged pack, or an `out` that is there already.
    """
    manifest = verify_pack(pack)
    if out.resolve() == pack.resolve():
        raise PackError(f"{pack} cannot be copied onto itself: choose another --out")
    with placed(out, overwrite=overwrite) as target:
        fill(pack, target, link=False)
        if dtype or about:
            router = load_router(target)
            _hold_as(target, router.names, dtype)
            _rewrite(pack, target, manifest, router, {}, about)
        elif signature := signature_of(pack):
            shutil.copyfile(signature, target / SIGNATURE)
        return read_manifest(target).record


def _hold_as(pack: Path, domains: Sequence[str], dtype: str | None) -> None:
    """Writes the adapters in a pack anew, in another type."""
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise PackError(f"{dtype!r} is no type that adapters are held in: use one of {', '.join(DTYPES)}")
    for domain in domains:
        folder = pack / "adapters" / domain
        config, adapter = read_adapter_config(folder), load_adapter(folder, domain)
        for file in (CONFIG, WEIGHTS, INT8):
            (folder / file).unlink(missing_ok=True)
        if dtype == "int8":
            save_lora_int8(config, adapter.factors, folder)
        else:
            save_lora(config, adapter.factors, folder, torch_dtype(dtype))


def _adapters(pack: Path, router: Router) -> list[LoadedAdapter]:
    return [load_adapter(pack / "adapters" / name, name) for name in router.names]


def _open(path: Path, base: BaseFiles) -> ExpertSource:
    """A LoRA expert, checked against the base."""
    source = open_expert(path, base)
    if source.kind != "lora":
        raise ExpertError(
            f"expert {source.name!r} is of kind {source.kind}, which a pack cannot hold: use `compose moe`, or "
            "`compose extract` first"
        )
    return source


class Checked(NamedTuple):
    """A pack that holds what its manifest says.

    Attributes:
        idle: the domains whose adapters change nothing: one of each two factors is zero, as before any training.
    """

    manifest: Manifest
    idle: tuple[str, ...]


def verify_pack(pack: Path) -> Manifest:
    """`check_pack`, for what only needs the manifest."""
    return check_pack(pack).manifest


def check_pack(pack: Path) -> Checked:
    """Checks every file of a pack against its manifest, and what the manifest says against the files.

    The base inside is checked too, and the adapters against it; a base elsewhere only where it is on this machine.

    Raises:
        LexiconError: a file is missing, changed, or not listed, or a part does not fit the others.
    """
    manifest = read_manifest(pack)
    check_listed(pack, manifest)
    check_files(pack, manifest, manifest.files)
    router = load_router(pack)
    if router.names != manifest.domains:
        raise PackError(f"pack {pack}: router and manifest name other domains: build the pack again")
    check_router_base(router, manifest.base_fingerprint, manifest.base)
    said = Fields(manifest.record, str(pack / MANIFEST), PackError, "get the pack again, or build it again")
    for key, value in router_record(router).items():
        _check_said(said.inside(key), value)
    base = _base_at_hand(pack, manifest)
    shape = shape_of(base.config, base.name) if base else None
    if base is not None and shape is not None:
        _check_said(said.inside("base"), _said_of(base))
        _check_reads(router, shape, pack)
    idle = []
    for domain in said.each("domains"):
        name = domain.values["name"]
        folder = pack / "adapters" / name
        adapter = load_adapter(folder, name)
        if shape is not None:
            check_fit(shape.linear, adapter)
        held = domain_record(pack, adapter)
        _check_said(domain, {key: held[key] for key in ("rank", "modules", "dtype", "trained_parameters")})
        if changes_nothing(Checkpoint(folder / (INT8 if (folder / INT8).is_file() else WEIGHTS))):
            idle.append(name)
    return Checked(manifest, tuple(idle))


def _check_said(said: Fields, held: Mapping[str, Any]) -> None:
    """Compares an object of the manifest with what the files hold."""
    for key, value in held.items():
        if said.values.get(key) != value:
            raise said.refused(key, f"{shown(value)}, as the files have it")


def _base_at_hand(pack: Path, manifest: Manifest) -> BaseFiles | None:
    """The base inside, or the very one that the manifest names, if it is on this machine."""
    if manifest.base_inside:
        base = BaseFiles.open(manifest.base, pack / "base")
        check_made_for(manifest, base.fingerprint, str(base.path))
        return base
    folder = local_base(manifest.base)
    try:
        base = BaseFiles.open(manifest.base, folder) if folder else None
    except LexiconError:  # another one of that name
        return None
    return base if base and base.fingerprint == manifest.base_fingerprint else None


def _said_of(base: BaseFiles) -> dict[str, str]:
    """What a manifest says of its base beside its name, from the files."""
    architectures = base.config.get("architectures")
    return {
        "architecture": str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        "vocabulary": vocabulary_hash(base.path),
        "fingerprint": base.fingerprint,
    }


def _check_reads(router: Router, base: Shape, pack: Path) -> None:
    """Refuses a router whose `base` embedder reads layers, or vectors of a width, that the base has not."""
    if router.embedder_name != "base":
        return
    where, mend = str(pack / ROUTER), "build the pack again"
    identity = Fields(router.embedder_identity, where, PackError, mend, "embedder_identity.")
    if identity.whole("layers") > base.layers:
        raise identity.refused("layers", f"at most {base.layers}, the base's")
    identity.whole("max_length")
    identity.text("pool", "last|mean", "last or mean")
    width = router.centroids.shape[1]
    if width != base.hidden:
        raise PackError(f"{where}: the centroids are {width} wide, the base's states {base.hidden}: {mend}")


def describe_pack(pack: Path) -> dict[str, Any]:
    """What a pack holds, for `pack inspect`: its manifest without the file list, its router, its size."""
    manifest, router = read_manifest(pack), load_router(pack)
    return {
        **vars(about_of(manifest)),
        **{key: value for key, value in manifest.record.items() if key != "files"},
        "router": {
            "method": router.method,
            "top_k": router.top_k,
            "temperature": router.temperature,
            "abstain": router.abstain_quantile,
        },
        "files": len(manifest.files) + 1,
        "megabytes": round(folder_bytes(pack) / 1e6, 3),
    }


def diff_packs(one: Path, other: Path) -> dict[str, Any]:
    """How the second pack differs from the first.

    Returns:
        `fields` ({path of a field: [its value here, there]}, those of domains and files left out), `added`, `removed`
        and `changed` domains (of the last, each `name`, `adapter` whether its weights differ, and `cosine` of its two
        centroids, None where the routers' embedders or means differ), and `files` (how many differ or are in one only).
    """
    manifests, routers = [verify_pack(pack) for pack in (one, other)], [load_router(pack) for pack in (one, other)]
    left, right = (_flat({k: v for k, v in m.record.items() if k not in ("domains", "files")}) for m in manifests)
    files = [manifest.files for manifest in manifests]
    same_space = routers[0].embedder_identity == routers[1].embedder_identity and np.array_equal(
        routers[0].mean, routers[1].mean
    )
    changed = []
    for name in (name for name in routers[0].names if name in routers[1].names):
        held = [{path: sha for path, sha in f.items() if path.startswith(f"adapters/{name}/")} for f in files]
        rows = [router.centroids[router.names.index(name)] for router in routers]
        cosine = float(rows[0].astype(np.float64) @ rows[1].astype(np.float64)) if same_space else None
        if held[0] != held[1] or cosine is None or not np.array_equal(*rows):
            changed.append({"name": name, "adapter": held[0] != held[1], "cosine": cosine})
    return {
        "fields": {k: [left.get(k), right.get(k)] for k in sorted({*left, *right}) if left.get(k) != right.get(k)},
        "added": [name for name in routers[1].names if name not in routers[0].names],
        "removed": [name for name in routers[0].names if name not in routers[1].names],
        "changed": changed,
        "files": sum(files[0].get(path) != files[1].get(path) for path in {*files[0], *files[1]}),
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{`a.b`: value} for all values in a JSON object that are no object themselves."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{path}.{key}" if path else key).items()}


def add_expert(
    pack: Path,
    expert: Path,
    members: Sequence[Prompt],
    check: Sequence[Prompt],
    *,
    base: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Adds a LoRA expert and its domain to a pack, in its place or as the new pack `out`; returns the report.

    Args:
        members: prompts of the new domain; their mean is its centroid.
        check: prompts decoded with the old pack and with the new one.
        progress: called with (check prompts done, to do).

    Returns:
        `checked`, `moved` (prompts that the new domain takes over, with both texts), `kept` (the number of
        the others), `unchanged` (how many of those have the same routing weights and logits to the bit)
        and `changed` (the prompts that do not).

    Raises:
        LexiconError: a damaged pack, an expert of another base, or a name that the pack has already.
    """
    with holding(pack, out):
        manifest = verify_pack(pack)
        return _add(pack, manifest, expert, members, check, base, out, overwrite, progress)


def _add(
    pack: Path,
    manifest: Manifest,
    expert: Path,
    members: Sequence[Prompt],
    check: Sequence[Prompt],
    base: str | None,
    out: Path | None,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    source = base_of(pack, manifest, base)
    given = _open(expert, BaseFiles.open(manifest.base, base_folder(source)))
    folder, name, info = given.path, given.name, given.info
    if name.lower() in {domain.lower() for domain in manifest.domains}:
        raise PackError(f"pack {manifest.name!r} has a domain {name!r} already: rename the expert, or remove that one")
    system = load_system(str(pack), base=base)
    before = held_experts(system)
    newcomer = load_adapter(folder, name)
    assert system.embedder is not None
    vectors = system.embedder.embed(members, None, FIT_BATCH)
    router = before.router.with_domain(name, vectors, [term for term, _ in members])
    report = compare_experts(system, before, Experts(router, [*before.adapters, newcomer]), check, progress)
    more = {"added": history(manifest, name, info.entries_fingerprint if info else "", len(members))}
    change_pack(pack, manifest, router, {name: folder}, more, out=out, overwrite=overwrite)
    return {"pack": str(out or pack), "expert": name, "members": len(members), "domains": list(router.names), **report}


def remove_expert(pack: Path, name: str, *, out: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Takes a domain and its adapter out of a pack; returns the new manifest.

    Raises:
        PackError: a damaged pack, or one without that domain.
    """
    with holding(pack, out):
        manifest = verify_pack(pack)
        if name not in manifest.domains:
            raise PackError(f"pack {manifest.name!r} has no domain {name!r}: it has {', '.join(manifest.domains)}")
        return change_pack(pack, manifest, load_router(pack).without_domain(name), {}, {}, out=out, overwrite=overwrite)


def change_pack(
    pack: Path,
    manifest: Manifest,
    router: Router,
    adapters: Mapping[str, Path],
    made_from: Mapping[str, Any],
    *,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Gives a pack another router, in its place or as the new pack `out`; returns the new manifest.

    Domains that the router no longer names go with their adapters; every file of the others stays as it is. To be
    called inside of `holding`.

    Args:
        manifest: as `verify_pack` gave it.
        adapters: the folder of each adapter that is new, or takes another's place; none lies in the pack.
        made_from: goes beside what the manifest says of where the pack came from.

    Raises:
        PackError: a domain without an adapter.
    """
    absent = [name for name in router.names if name not in adapters and name not in manifest.domains]
    if absent:
        raise PackError(f"pack {manifest.name!r} has no adapter for the domain {absent[0]!r}: give one")
    with _changed(pack, out, overwrite) as target:
        for name in manifest.domains:
            if name in adapters or name not in router.names:
                shutil.rmtree(target / "adapters" / name)
        for name, folder in adapters.items():
            place_adapter(target, folder, name)
        _rewrite(pack, target, manifest, router, dict(made_from))
        return read_manifest(target).record


def _in_place(pack: Path, out: Path | None) -> bool:
    return out is None or out.resolve() == pack.resolve()


def holding(pack: Path, out: Path | None) -> AbstractContextManager[None]:
    """Keeps other processes from changing a pack that is to be changed in its place."""
    return changing(pack) if _in_place(pack, out) else nullcontext()


@contextmanager
def _changed(pack: Path, out: Path | None, overwrite: bool) -> Iterator[Path]:
    """A copy of the pack to change, that becomes `out`, or takes the pack's place."""
    in_place = _in_place(pack, out)
    with placed(pack if in_place else cast(Path, out), overwrite=in_place or overwrite, held=in_place) as target:
        fill(pack, target, link=in_place)
        # What is written again must not be written through a link.
        for name in (MANIFEST, "router.json", "router.safetensors", "README.md"):
            (target / name).unlink(missing_ok=True)
        yield target


def _rewrite(
    pack: Path,
    target: Path,
    manifest: Manifest,
    router: Router,
    more: dict[str, Any],
    about: dict[str, Any] | None = None,
) -> None:
    """Writes what says of a pack's changed copy what it holds, and that its signature is not in it."""
    write_manifest(
        target,
        about=replace(about_of(manifest), **(about or {})),
        base=manifest.record["base"],
        router=router,
        adapters=_adapters(target, router),
        made_from={**manifest.record.get("made_from", {}), **more},
    )
    if signature_of(pack):
        LOGGER.warning("the signature of %s no longer holds and was left out: sign again with `pack sign`", pack)


def history(manifest: Manifest, name: str, entries: str, members: int) -> list[dict[str, Any]]:
    """The domains that were added to a pack, with the one that joins now."""
    before = manifest.record.get("made_from", {}).get("added", [])
    return [*before, {"name": name, "entries": entries, "members": members}]
