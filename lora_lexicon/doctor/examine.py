"""Recognises an artefact and examines it: entries, a router, a base, an expert or a folder of them, a MoE, a pack."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lora_lexicon.compose.merge import MOE_RECORD, match_experts
from lora_lexicon.compose.mixture import BEFORE, FORMAT, MANIFEST, check_files, files_of, read_manifest
from lora_lexicon.compose.sources import is_expert
from lora_lexicon.data.store import load_entries
from lora_lexicon.doctor.chart import Chart, copied
from lora_lexicon.doctor.experts import examine_adapter, examine_expert
from lora_lexicon.doctor.files import may_be_opened, pickles
from lora_lexicon.doctor.models import examine_model
from lora_lexicon.doctor.parts import base_for, router_fits, router_of
from lora_lexicon.domains.fit import RECORD as DOMAINS_RECORD
from lora_lexicon.domains.router import RECORD as ROUTER_RECORD
from lora_lexicon.errors import PackError
from lora_lexicon.experts.base import base_folder
from lora_lexicon.experts.checkpoint import CONFIG, FFN, RECORD, WEIGHTS
from lora_lexicon.folders import read_record
from lora_lexicon.packs.listing import find_packs
from lora_lexicon.packs.pack import verify_pack

ENTRIES_RECORD = "entries.json"
SHOWN = 3  # names in a folder that is not known


def examine(path: Path, base: str | None = None, progress: Callable[[int], None] | None = None) -> Chart:
    """Looks at the artefact in the folder `path`; what is wrong with it is noted, not raised.

    Args:
        base: to compare it with, in place of the one that it names.
        progress: called with the number of bytes just read.

    Raises:
        LexiconError: there is no such base.
    """
    if base is not None:
        base_folder(base)
    chart = Chart(path.resolve(), progress=progress)
    if may_be_opened(chart):
        with chart.going_on(""):
            _examine(chart, base)
    else:
        chart.kind = "not opened"
    if not chart.healthy:
        chart.facts.pop("fits", None)
    return chart


def _examine(chart: Chart, base: str | None) -> None:
    here = {path.name for path in chart.path.iterdir()}
    if MANIFEST in here or BEFORE in here:
        _pack(chart, base)
    elif RECORD in here:
        examine_expert(chart, base)
    elif CONFIG in here:
        examine_adapter(chart, base)
    elif "config.json" in here:
        examine_model(chart, base)
    elif ROUTER_RECORD in here:
        _router(chart, base)
    elif ENTRIES_RECORD in here:
        _entries(chart)
    elif len(kinds := _kinds(chart.path)) > 1:
        _mixed(chart, kinds)
    elif any(is_expert(path) for path in chart.path.iterdir()):
        _experts(chart, base)
    elif packs := find_packs([chart.path]):
        _packs(chart, packs, base)
    else:
        _unknown(chart, here)


def _kinds(folder: Path) -> dict[str, list[str]]:
    """What lies in a folder's folders, by what it looks like; MoEs and bases alike are models."""
    marks = {MANIFEST: "packs", RECORD: "experts", CONFIG: "experts", MOE_RECORD: "MoEs", "config.json": "models"}
    marks |= {DOMAINS_RECORD: "domains", ROUTER_RECORD: "routers", ENTRIES_RECORD: "entries"}
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            inside = {each.name for each in path.iterdir()}
            kind = next((kind for mark, kind in marks.items() if mark in inside), None)
            if kind is None and any((each / RECORD).is_file() for each in path.iterdir()):
                kind = "folders of experts"
            if kind:
                found.setdefault(kind, []).append(path.name)
    return found


def _mixed(chart: Chart, kinds: dict[str, list[str]]) -> None:
    """A folder of several kinds of things, such as a whole run's: each is examined where it is asked about."""
    chart.kind = "folder"
    for kind, names in kinds.items():
        chart.facts[kind] = ", ".join(names)
    one = chart.path / next(iter(kinds.values()))[0]
    what = "holds things of several kinds, none of which was looked into"
    chart.find(what, "", f"lora-lexicon doctor {shlex.quote(str(one))}", "warning")


def _entries(chart: Chart) -> None:
    chart.kind = "entries"
    chart.mend = f"lora-lexicon data prepare SOURCE... --out {shlex.quote(str(chart.path))} --overwrite"
    with chart.going_on(ENTRIES_RECORD):
        entries = load_entries(chart.path)
        chart.facts["splits"] = ", ".join(f"{name} {entries.record['splits'][name]:,}" for name in entries.splits)
        intact = True
        for name in entries.splits:
            before = len(chart.findings)
            with chart.going_on(name):
                for _ in entries.batches(name):
                    pass
            intact &= len(chart.findings) == before
        if intact and not entries.intact():
            chart.find("the entries are not those that the record was written for: a file was changed", ENTRIES_RECORD)
        if not entries.record["splits"].get("train"):
            chart.find("has no train entries, so that nothing can be trained on it", ENTRIES_RECORD)


def _router(chart: Chart, base: str | None) -> None:
    chart.kind = "router"
    chart.mend = f"lora-lexicon domains fit ENTRIES --base BASE --out {shlex.quote(str(chart.path))} --overwrite"
    router = router_of(chart, chart.path, None)
    if router is not None and router.embedder_name == "base":
        identity = str(router.embedder_identity.get("base"))
        if base is None:
            chart.facts["fits"] = f"bases of fingerprint {identity[:12]}"
            return
        own = base_for(chart, base, base)
        if own is not None:
            router_fits(chart, router, own, chart.path / ROUTER_RECORD, None)
    elif router is not None:
        chart.facts["fits"] = f"any base: it reads the embedder {router.embedder_name!r}"


def _pack(chart: Chart, base: str | None) -> None:
    chart.kind = "pack"
    path = shlex.quote(chart.name)
    chart.mend = f"lora-lexicon pack build EXPERT... --base BASE --router DOMAINS --out {path} --overwrite"
    manifest = None
    if _is_newer(chart.path / MANIFEST):  # and not to be written over
        chart.mend = "pip install --upgrade lora-lexicon"
    with chart.going_on(MANIFEST):
        manifest = read_manifest(chart.path)
    if manifest is None:
        router_of(chart, chart.path, None)
        return
    chart.mend = chart.mend.replace("BASE", shlex.quote(manifest.base))
    chart.facts["name"] = manifest.name
    for stray in files_of(chart.path):
        if stray not in manifest.files:
            remove = f"rm {shlex.quote(str(chart.path / stray))}" if chart.name == str(chart.path) else None
            chart.find("is not listed in the manifest", stray, remove)
    for name in manifest.files:
        with chart.going_on(name):
            check_files(chart.path, manifest, [name])
    router = router_of(chart, chart.path, None)
    if router is not None and router.names != manifest.domains:
        with chart.going_on(ROUTER_RECORD):
            match_experts(manifest.domains, router.names)
            raise PackError("router and manifest name the domains in another order")
    inside = str(chart.path / "base") if manifest.base_inside else None
    if inside is not None:
        _part(chart, chart.path / "base", None)
    own = base_for(chart, base or inside, manifest.base, manifest.base_fingerprint)
    for domain in manifest.domains:
        _part(chart, chart.path / "adapters" / domain, None if own is None else str(own.path))
    if own is not None and router is not None:
        router_fits(chart, router, own, chart.path / ROUTER_RECORD, None)
    if chart.healthy:
        with chart.going_on(""):
            verify_pack(chart.path)


def _is_newer(manifest: Path) -> bool:
    """Whether a manifest says that it is of a later format than ours."""
    try:
        said = read_record(manifest, PackError, "a pack").get("format")
    except PackError:
        return False
    return isinstance(said, int) and said > FORMAT


def _part(chart: Chart, folder: Path, base: str | None) -> None:
    """Examines an artefact inside another; what is found there is the other's too."""
    if not folder.is_dir():
        return
    part = Chart(folder, progress=chart.progress)
    _examine(part, base)
    inside = folder.relative_to(chart.path).as_posix()
    for found in part.findings:
        where = f"{inside}/{found.where}" if found.where else inside
        moved = replace(
            found, where=where, mend=found.mend if chart.kind != "pack" else copied(chart.mend) or found.mend
        )
        if moved not in chart.findings:
            chart.findings.append(moved)
    chart.left_out += part.left_out


def _experts(chart: Chart, base: str | None) -> None:
    """A folder that `train --domain all` or `compose extract` made."""
    folders = sorted(path for path in chart.path.iterdir() if not path.name.startswith(".") and is_expert(path))
    chart.kind = "experts"
    chart.facts["experts"] = ", ".join(folder.name for folder in folders)
    for folder in folders:
        _part(chart, folder, base)


def _packs(chart: Chart, packs: list[Path], base: str | None) -> None:
    """A folder of packs; what is in one file is unpacked only where it is itself asked about."""
    chart.kind = "packs"
    chart.facts["packs"] = ", ".join(pack.name for pack in packs)
    for pack in packs:
        if pack.is_dir():
            _part(chart, pack, base)
        else:
            what = "is a pack in one file, and was not looked into"
            chart.find(what, pack, f"lora-lexicon doctor {shlex.quote(str(pack))}", "warning")


def _unknown(chart: Chart, here: set[str]) -> None:
    """What has lost the file by which it is known, or is none of ours."""
    chart.kind = "unknown"
    path = shlex.quote(str(chart.path))
    if WEIGHTS in here:
        chart.find(
            f"holds a PEFT adapter's weights and no {CONFIG}",
            CONFIG,
            f"hf download OWNER/NAME {CONFIG} --local-dir {path}",
        )
    elif FFN in here:
        what = f"holds an FFN expert's weights and no {RECORD}: what base they belong to is not known"
        chart.find(what, RECORD, "lora-lexicon train --data ENTRIES --base BASE --out EXPERTS --set kind=ffn")
    elif any(name.endswith(".safetensors") for name in here):
        chart.find(
            "holds weights and no config.json", "config.json", f"hf download OWNER/NAME config.json --local-dir {path}"
        )
    elif pickles(chart.path):
        chart.find("holds pickles, which are never read, and no record of ours", pickles(chart.path)[0], "")
    else:
        chart.find(
            "is neither entries, a router, an expert, a MoE, a pack, a PEFT adapter, a base, nor a folder of experts "
            f"or packs: it holds {_named(here)}",
            "",
            "lora-lexicon doctor FOLDER  # the one that such a thing lies in",
        )


def _named(here: set[str]) -> str:
    """What lies in a folder, in a few words."""
    if not here:
        return "nothing"
    return ", ".join(sorted(here)[:SHOWN]) + (f" and {len(here) - SHOWN} more" if len(here) > SHOWN else "")
