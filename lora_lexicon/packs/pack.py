"""Packs: build, verify, add a domain, remove one. Knows no training and no scores.

Every change is made on a copy that takes the pack's place in one rename.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lora_lexicon.compose.merge import check_router_base, match_experts
from lora_lexicon.compose.mixture import MANIFEST, Manifest, base_of, check_files, read_manifest
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, open_expert
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.prompt import pad_token_id
from lora_lexicon.domains.embed import FIT_BATCH, Prompt
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.errors import ExpertError, PackError
from lora_lexicon.experts.base import base_folder
from lora_lexicon.experts.checkpoint import ExpertInfo, check_name, load_adapter
from lora_lexicon.experts.lora import LoadedAdapter, group_adapters
from lora_lexicon.folders import folder_bytes, new_folder
from lora_lexicon.packs.layout import files_of, fill, place_adapter, place_base, write_manifest

CHECKED_TOKENS = 24  # how far each check prompt is decoded before and after
CHECKED_AT_ONCE = 32


def build_pack(
    base: str,
    experts: Sequence[Path],
    domains: Path,
    out: Path,
    *,
    name: str | None = None,
    include_base: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a pack: the router of `domains` and one LoRA expert for each of its domains; returns its manifest.

    Args:
        base: a folder, a Hub name or a shipped pack's name.
        include_base: the base itself goes in too.

    Raises:
        LexiconError: parts that do not fit each other, or a damaged file.
    """
    own, router = BaseFiles.open(base, base_folder(base)), load_router(domains)
    check_router_base(router, own.fingerprint, base)
    sources = [_open(path, own) for path in experts]
    match_experts([source.name for source in sources], router.names)
    opened = {source.name: source.path for source in sources}
    entries = {source.info.entries_fingerprint for source in sources if source.info} - {""}
    with new_folder(out, replace=overwrite) as folder:
        adapters = []
        for domain in router.names:
            source = opened[domain]
            adapters.append(load_adapter(source, domain))  # first, so that an error names the user's file
            place_adapter(folder, source, domain)
        if include_base:
            place_base(folder, own.path)
        write_manifest(
            folder,
            name=check_name(name or out.resolve().name),
            base={
                "name": own.path.resolve().name if include_base else base,
                "fingerprint": own.fingerprint,
                "path": "base" if include_base else None,
            },
            router=router,
            adapters=adapters,
            made_from={"entries": sorted(entries)},
        )
        read_manifest(folder)
    return _record(out)


def _open(path: Path, base: BaseFiles) -> ExpertSource:
    """A LoRA expert, checked against the base."""
    source = open_expert(path, base)
    if source.kind != "lora":
        raise ExpertError(
            f"expert {source.name!r} is of kind {source.kind}, which a pack cannot hold: use `compose moe`, or "
            "`compose extract` first"
        )
    return source


def verify_pack(pack: Path) -> Manifest:
    """Checks every file of a pack against its manifest, the base inside included; returns the manifest.

    Raises:
        PackError: a file is missing, changed, or not listed.
    """
    manifest = read_manifest(pack)
    for path in files_of(pack):
        if path not in manifest.files:
            raise PackError(f"pack {pack} holds {path!r}, which its manifest does not list: remove that file")
    check_files(pack, manifest, manifest.files)
    router = load_router(pack)
    if router.names != manifest.domains:
        raise PackError(f"pack {pack}: router and manifest name other domains: build the pack again")
    for domain in manifest.domains:
        load_adapter(pack / "adapters" / domain, domain)
    if manifest.base_inside:
        base_of(pack, manifest, None)
    return manifest


def describe_pack(pack: Path) -> dict[str, Any]:
    """What a pack holds, for `pack inspect`: its manifest without the file list, its router, its size."""
    manifest, router = read_manifest(pack), load_router(pack)
    return {
        **{key: value for key, value in _record(pack).items() if key != "files"},
        "router": {"top_k": router.top_k, "temperature": router.temperature, "abstain": router.abstain_quantile},
        "template": asdict(router.template),
        "files": len(manifest.files) + 1,
        "megabytes": round(folder_bytes(pack) / 1e6, 3),
    }


def _record(pack: Path) -> dict[str, Any]:
    return json.loads((pack / MANIFEST).read_text(encoding="utf-8"))


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
    manifest = verify_pack(pack)
    source = base_of(pack, manifest, base)
    given = _open(expert, BaseFiles.open(manifest.base, base_folder(source)))
    folder, name, info = given.path, given.name, given.info
    if name.lower() in {domain.lower() for domain in manifest.domains}:
        raise PackError(f"pack {manifest.name!r} has a domain {name!r} already: rename the expert, or remove that one")
    system = load_system(str(pack), base=source)
    old, adapters = _parts(system, pack)
    newcomer = load_adapter(folder, name)
    assert system.embedder is not None
    router = old.with_domain(name, system.embedder.embed(members, None, FIT_BATCH), [term for term, _ in members])
    report = _compare(system, adapters, [*adapters, newcomer], old, router, check, progress)
    with _changed(pack, out, overwrite) as target:
        place_adapter(target, folder, name)
        _rewrite(target, manifest, router, [*adapters, newcomer], {"added": _history(manifest, name, info, members)})
    return {"pack": str(out or pack), "expert": name, "members": len(members), "domains": list(router.names), **report}


def remove_expert(pack: Path, name: str, *, out: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Takes a domain and its adapter out of a pack; returns the new manifest.

    Raises:
        PackError: a damaged pack, or one without that domain.
    """
    manifest = verify_pack(pack)
    if name not in manifest.domains:
        raise PackError(f"pack {manifest.name!r} has no domain {name!r}: it has {', '.join(manifest.domains)}")
    router = load_router(pack).without_domain(name)
    adapters = [load_adapter(pack / "adapters" / domain, domain) for domain in router.names]
    with _changed(pack, out, overwrite) as target:
        for file in list((target / "adapters" / name).iterdir()):
            file.unlink()
        (target / "adapters" / name).rmdir()
        _rewrite(target, manifest, router, adapters, {})
    return _record(out or pack)


@contextmanager
def _changed(pack: Path, out: Path | None, overwrite: bool) -> Iterator[Path]:
    """A copy of the pack to change, that becomes `out`, or takes the pack's place."""
    in_place = out is None or out.resolve() == pack.resolve()
    with new_folder(pack if in_place else cast(Path, out), replace=in_place or overwrite) as target:
        fill(pack, target, link=in_place)
        # What is written again must not be written through a link.
        for name in (MANIFEST, "router.json", "router.safetensors", "README.md"):
            (target / name).unlink(missing_ok=True)
        yield target


def _rewrite(
    target: Path, manifest: Manifest, router: Router, adapters: list[LoadedAdapter], more: dict[str, Any]
) -> None:
    inside = "base" if manifest.base_inside else None
    write_manifest(
        target,
        name=manifest.name,
        base={"name": manifest.base, "fingerprint": manifest.base_fingerprint, "path": inside},
        router=router,
        adapters=adapters,
        made_from={**manifest.facts.get("made_from", {}), **more},
    )


def _history(manifest: Manifest, name: str, info: ExpertInfo | None, members: Sequence[Prompt]) -> list[dict[str, Any]]:
    before = manifest.facts.get("made_from", {}).get("added", [])
    return [*before, {"name": name, "entries": info.entries_fingerprint if info else "", "members": len(members)}]


def _parts(system: System, pack: Path) -> tuple[Router, list[LoadedAdapter]]:
    assert system.router is not None
    return system.router, [load_adapter(pack / "adapters" / name, name) for name in system.router.names]


@dataclass(frozen=True)
class _Answer:
    """What one prompt got: its domain, the text, and a hash of every logit on the way."""

    domain: str
    text: str
    logits: str


def _compare(
    system: System,
    before: list[LoadedAdapter],
    after: list[LoadedAdapter],
    old: Router,
    new: Router,
    check: Sequence[Prompt],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Decodes every check prompt with both packs, in the same batches, and compares to the bit."""
    assert system.embedder is not None
    assert system.active is not None
    if not check:
        return {"checked": 0, "moved": [], "kept": 0, "unchanged": 0, "changed": []}
    vectors = system.embedder.embed(check)
    routings = [old.route(vectors), new.route(vectors)]
    order = sorted(range(len(check)), key=lambda i: len(system.encoder.prompt(*check[i])))
    answers: list[dict[int, _Answer]] = []
    for step, (routing, adapters) in enumerate(zip(routings, (before, after), strict=True)):
        group_adapters(system.model, adapters, system.active)
        answers.append({})
        for start in range(0, len(order), CHECKED_AT_ONCE):
            batch = order[start : start + CHECKED_AT_ONCE]
            answers[-1].update(zip(batch, _answers(system, [check[i] for i in batch], routing, batch), strict=True))
            if progress is not None:
                progress(step * len(check) + start + len(batch), 2 * len(check))
    moved, changed = [], []
    for i in range(len(check)):
        first, second = answers[0][i], answers[1][i]
        same_weights = bool((routings[0].weights[i] == routings[1].weights[i][: len(old.names)]).all())
        row = {
            "term": check[i][0],
            "context": check[i][1],
            "from": first.domain,
            "to": second.domain,
            "similarity": round(float(routings[1].similarities[i].max()), 4),
            "before": first.text,
            "after": second.text,
        }
        if not same_weights:
            moved.append(row)
        elif first.logits != second.logits:
            changed.append(row)
    kept = len(check) - len(moved)
    return {"checked": len(check), "moved": moved, "kept": kept, "unchanged": kept - len(changed), "changed": changed}


@torch.inference_mode()
def _answers(system: System, prompts: Sequence[Prompt], routing: Routing, rows: Sequence[int]) -> list[_Answer]:
    """Greedy answers to `prompts`, which are rows `rows` of the routing."""
    encoded = [system.encoder.prompt(*prompt) for prompt in prompts]
    width, pad, device = max(map(len, encoded)), pad_token_id(system.tokenizer), system.model.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
    with system.routed(torch.from_numpy(routing.weights[list(rows)]).to(device)):
        made = cast(Any, system.model).generate(
            ids,
            attention_mask=mask,
            max_new_tokens=CHECKED_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
    written = made.sequences[:, width:].cpu()
    logits = torch.stack(made.logits, dim=1).float().cpu()  # (B, steps, V)
    answers = []
    for i, row in enumerate(rows):
        ended = (written[i] == system.tokenizer.eos_token_id).nonzero()
        steps = int(ended[0]) + 1 if len(ended) else written.shape[1]  # after its EOS a row only waits for the others
        text = str(system.tokenizer.decode(written[i, :steps], skip_special_tokens=True)).strip()
        answers.append(
            _Answer(routing.name(row), text, hashlib.sha256(logits[i, :steps].numpy().tobytes()).hexdigest())
        )
    return answers
