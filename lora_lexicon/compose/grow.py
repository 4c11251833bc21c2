"""An expert joins a MoE on disk, or leaves it, and no byte of the others is written again. Builds no model to do so.

Written are a shard of the newcomer's tensors (`compose.places`), the index, `config.json`, the router, the record and
the card. Every change is made in a folder that takes the MoE's place in one step; the other files are linked into it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_lexicon.compose.collapse import BASE, DOWN, GATE_UP, MoeFiles
from lora_lexicon.compose.merge import (
    MOE_RECORD,
    PROJECTIONS,
    SPARE_BYTES,
    VERIFIED_PARAMETERS,
    check_router_base,
    expert_record,
    moe_card,
    originals,
)
from lora_lexicon.compose.policy import GATE, parse_policy
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, open_expert
from lora_lexicon.domains.embed import FIT_BATCH, Prompt
from lora_lexicon.domains.router import RECORD as ROUTER_RECORD
from lora_lexicon.domains.router import TENSORS as ROUTER_TENSORS
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import ExpertError, PackError, RouterError
from lora_lexicon.experts.base import base_folder
from lora_lexicon.experts.tensors import (
    INDEX,
    ITEM_BYTES,
    SHARD_BYTES,
    WHOLE,
    Checkpoint,
    TensorPlan,
    promoted,
    write_index,
    write_shards,
)
from lora_lexicon.folders import changing, new_folder, put_file, read_record, sha256_of, write_record

if TYPE_CHECKING:
    from lora_lexicon.compose.compare import Answers

REWRITTEN = {"config.json", INDEX, ROUTER_RECORD, ROUTER_TENSORS, MOE_RECORD, "README.md"}
ONLY_SHARD = "model-00001-of-00001.safetensors"  # transformers reads no index beside a file of the plain name


@dataclass(frozen=True)
class Joining:
    """Where the row of the router comes from that a new domain gets: its prompts, or another router that has it."""

    members: Sequence[Prompt] = ()
    router: Path | None = None


def join_moe(
    moe: Path,
    expert: Path,
    domain: Joining,
    *,
    base: str | None = None,
    check: Sequence[Prompt] = (),
    out: Path | None = None,
    verify: bool | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    checking: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Adds an expert and its domain to a MoE, in its place or as the new MoE `out`; returns the report.

    Args:
        base: of the MoE, if it lies elsewhere than its record says.
        check: prompts decoded with the MoE as it was and with the new one, each loaded for that.
        verify: the new expert is loaded out of the result and compared with it alone; by default up to
            `VERIFIED_PARAMETERS`. The others' tensors are the same bytes.
        progress: called with (bytes just written, bytes to write).
        checking: called with (check prompts just decoded, to decode, twice each).

    Returns:
        `expert`, `domains`, `bytes` (of the new shards), `added` (their names and SHA-256), `kept` (each old shard's
        name, and its SHA-256 before and after), `verified` as in `verify_moe`, and `prompts`, what `differing` tells
        of the check prompts (None without any).

    Raises:
        LexiconError: a MoE that routes by gates or holds averages, parts that do not fit, a full disk.
    """
    with _held(moe, out):
        files, record = MoeFiles.open(moe), _record(moe)
        _check_open(files, record)
        own = _base(record, base)
        source = open_expert(expert, own)
        _check_newcomer(files, source)
        router = _router_with(load_router(moe), source.name, domain, own)
        slot = max(files.fused, *(slot + 1 for slot in files.slots))
        plans = _plans(files, source, own, slot)
        first = _answered(moe, files, check, checking)
        total = sum(plan.bytes for plan in plans)
        before = {_name(file): sha256_of(file) for file in files.weights.files}
        slots = [*files.slots]
        slots.insert(len(files.domains), slot)  # a kept base stays the last
        changes = {
            "experts": [*record["experts"], expert_record(source)],
            "trained_parameters": record["trained_parameters"] + source.trained_parameters,
        }
        with _changed(files, files.weights.files, out, overwrite, total) as folder:
            report = None if progress is None else lambda done: progress(done, total)
            stem = f"model-expert-{slot:05d}"
            added = write_shards(folder, stem, plans, max_shard_bytes=max_shard_bytes, progress=report)
            record = _rewrite(folder, files, _config(files, router, slots), router, record | changes, added)
            found = _compared(folder, own, source, router, plans[0].dtype) if _worth(record, verify) else None
            _finish(folder, (out or moe).resolve().name, record, found)
            prompts = _changes(check, first, _answered(folder, files, check, checking))
            shards = {name: sha256_of(folder / name) for name in (*before, *sorted(set(added.values())))}
    return {
        "moe": str(out or moe),
        "expert": source.name,
        "domains": list(router.names),
        "bytes": total,
        "added": [{"file": name, "sha256": shards[name]} for name in shards if name not in before],
        "kept": [{"file": name, "before": value, "after": shards[name]} for name, value in before.items()],
        "verified": found,
        "prompts": prompts,
    }


def leave_moe(moe: Path, name: str, *, out: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Takes an expert and its domain out of a MoE; returns the report.

    An expert that joined later takes its shards along. Of one that the MoE was composed with, the bytes stay in the
    fused tensors, where nothing reads them.

    Returns:
        `expert`, `domains` and `removed`, the names of the shards that are gone.

    Raises:
        PackError: a MoE that routes by gates, no such expert, or none but it.
    """
    with _held(moe, out):
        files, record = MoeFiles.open(moe), _record(moe)
        _check_gates(files)
        if name not in files.domains:
            raise PackError(f"{moe} has no expert {name!r} that could leave: it has {', '.join(files.domains)}")
        router = load_router(moe).without_domain(name)
        parse_policy(str(files.config.get("routing")), len(router.names))
        place = files.slots[files.experts.index(name)]
        removed = [file for file in files.weights.files if _holds_only(files.weights, file, place)]
        leaving = next((each for each in record["experts"] if each["name"] == name), {})
        trained = int(leaving.get("record", {}).get("trained_parameters", 0))
        verified = record.get("verified")
        changes = {
            "experts": [each for each in record["experts"] if each["name"] != name],
            "trained_parameters": record["trained_parameters"] - trained,
            "verified": verified and {**verified, "differences": _without(verified["differences"], name)},
        }
        stay = [file for file in files.weights.files if file not in removed]
        with _changed(files, stay, out, overwrite, 0) as folder:
            config = _config(files, router, [slot for slot in files.slots if slot != place])
            record = _rewrite(folder, files, config, router, record | changes, {}, removed)
            _finish(folder, (out or moe).resolve().name, record, None)
    return {"moe": str(out or moe), "expert": name, "domains": list(router.names), "removed": [f.name for f in removed]}


def _held(moe: Path, out: Path | None) -> AbstractContextManager[None]:
    """Holds a MoE that is changed in its place: two at once would each leave out what the other added."""
    return changing(moe) if moe.is_dir() and _in_place(moe, out) else nullcontext()


def _in_place(moe: Path, out: Path | None) -> bool:
    return out is None or out.resolve() == moe.resolve()


def _record(moe: Path) -> dict[str, Any]:
    record = read_record(moe / MOE_RECORD, PackError, "a MoE made by `compose moe`")
    base = record.get("base")
    if not isinstance(base, dict) or not isinstance(record.get("experts"), list):
        raise PackError(f"{moe / MOE_RECORD} does not say what the MoE was made of: compose it again")
    return record


def _check_open(files: MoeFiles, record: dict[str, Any]) -> None:
    """Refuses a MoE of which a newcomer would change more than it adds."""
    _check_gates(files)
    if record.get("averaged"):
        raise PackError(
            f"{files.path}: {record['averaged'][0]} is an average over the experts, which one more would change: "
            "compose the MoE again with all of them"
        )


def _check_gates(files: MoeFiles) -> None:
    if files.policy.gated or any(name.endswith(GATE) for name in files.weights.tensors):
        raise PackError(
            f"{files.path} holds gates that were fitted to choose among its {len(files.domains)} experts: change the "
            "experts of a MoE that routes by domain, then `train router --routing` makes gates for all of them"
        )


def _base(record: dict[str, Any], base: str | None) -> BaseFiles:
    """The base that the MoE was made of."""
    name = base or str(record["base"].get("name"))
    own = BaseFiles.open(name, base_folder(name))
    if own.fingerprint != record["base"].get("fingerprint"):
        raise PackError(
            f"the MoE was made of base {record['base'].get('name')!r} ({str(record['base'].get('fingerprint'))[:12]}), "
            f"but {name!r} is {own.fingerprint[:12]}: give that base with --base"
        )
    return own


def _check_newcomer(files: MoeFiles, expert: ExpertSource) -> None:
    """Refuses a name that is taken, and what the MoE has no place for."""
    if expert.name.lower() in {name.lower() for name in (*files.experts, BASE)}:
        raise PackError(f"{files.path} has an expert {expert.name!r} already: rename the new one, or remove that one")
    ffns = {f"model.layers.{i}.mlp.{p}.weight" for i in files.layers for p in PROJECTIONS}
    outside = sorted(expert.changed - ffns)
    if outside:
        raise ExpertError(
            f"expert {expert.name!r}: {expert.path} trains {outside[0]}, and {files.path} has experts in the FFNs of "
            f"layers {', '.join(map(str, files.layers))} only: train it there, or use `compose adapters`"
        )


def _router_with(old: Router, name: str, domain: Joining, base: BaseFiles) -> Router:
    if domain.router is not None:
        other = load_router(domain.router)
        if name not in other.names:
            raise RouterError(f"{domain.router} has no domain {name!r}: it has {', '.join(other.names)}")
        if (other.embedder_name, other.embedder_identity) != (old.embedder_name, old.embedder_identity):
            raise RouterError(
                f"{domain.router} reads the embedder {other.embedder_name!r} with other settings than the MoE's router "
                f"({old.embedder_name!r}): fit its domains as those of the MoE, or give the domain's entries"
            )
        check_router_base(other, base.fingerprint, base.name)
        return old.with_domain_of(other, name)
    from lora_lexicon.compose.system import embedder_of
    from lora_lexicon.experts.base import load_base

    loaded: Any = load_base(base.name) if old.embedder_name == "base" else None
    embedder = embedder_of(old, loaded and loaded.model, loaded and loaded.tokenizer, base.fingerprint)
    vectors = embedder.embed(domain.members, None, FIT_BATCH)
    return old.with_domain(name, vectors, [term for term, _ in domain.members])


def _plans(files: MoeFiles, expert: ExpertSource, base: BaseFiles, slot: int) -> list[TensorPlan]:
    """The newcomer's tensors."""
    plans = []
    for i in files.layers:
        gate, up, down = (f"model.layers.{i}.mlp.{p}.weight" for p in PROJECTIONS)
        for kind, names in ((GATE_UP, (gate, up)), (DOWN, (down,))):
            prefix = f"model.layers.{i}.mlp.experts"
            ref = files.weights.ref(f"{prefix}.{kind}")
            pieces = [expert.piece(name, base.weights, ref.dtype) for name in names]
            plans.append(TensorPlan(f"{prefix}.{slot}.{kind}", ref.shape[1:], ref.dtype, pieces))
    return plans


def _config(files: MoeFiles, router: Router, slots: Sequence[int]) -> dict[str, Any]:
    return {
        **files.config,
        "num_local_experts": len(slots),
        "expert_names": list(router.names),
        "fused_experts": files.fused,
        "expert_slots": list(slots),
    }


@contextmanager
def _changed(files: MoeFiles, shards: Sequence[Path], out: Path | None, overwrite: bool, more: int) -> Iterator[Path]:
    """A folder with these shards of the MoE and all else that stays, which becomes `out`, or takes the MoE's place."""
    moe = files.path
    in_place = _in_place(moe, out)
    copied = 0 if in_place else sum(file.stat().st_size for file in shards)
    with new_folder(
        moe if in_place else cast(Path, out), replace=in_place or overwrite, needs=copied + more + SPARE_BYTES
    ) as folder:
        for file in sorted(moe.rglob("*")):
            name = str(file.relative_to(moe))
            if file.is_file() and name not in REWRITTEN and file not in files.weights.files:
                put_file(file, folder / name, link=in_place)
        for file in shards:
            put_file(file, folder / _name(file), link=in_place)
        yield folder


def _rewrite(
    folder: Path,
    files: MoeFiles,
    config: dict[str, Any],
    router: Router,
    record: dict[str, Any],
    added: dict[str, str],
    removed: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes config, index and router; returns the record."""
    stay = {name: ref for name, ref in files.weights.tensors.items() if ref.file not in removed}
    weight_map = {name: _name(ref.file) for name, ref in stay.items()} | added
    write_record(folder / "config.json", config)
    write_index(folder, weight_map, 0)
    total = sum(ref.bytes for ref in Checkpoint(folder, PackError).tensors.values())
    write_index(folder, weight_map, total)
    MoeFiles.open(folder)  # what lies on the disk is what the config says
    router.save(folder)
    names = {**record["router"], "domains": list(router.names)}
    return {**record, "router": names, "bytes": total}


def _name(file: Path) -> str:
    """A shard's name once there is an index."""
    return ONLY_SHARD if file.name == WHOLE else file.name


def _holds_only(weights: Checkpoint, file: Path, slot: int) -> bool:
    return all(f".experts.{slot}." in name for name, ref in weights.tensors.items() if ref.file == file)


def _worth(record: dict[str, Any], verify: bool | None) -> bool:
    """Whether the result is to be loaded: as asked, by default up to `VERIFIED_PARAMETERS`."""
    return record["bytes"] // ITEM_BYTES[record["dtype"]] <= VERIFIED_PARAMETERS if verify is None else verify


def _compared(folder: Path, base: BaseFiles, expert: ExpertSource, router: Router, dtype: str) -> dict[str, Any]:
    from lora_lexicon.compose.verify import verify_moe

    exact = promoted([dtype, *originals(base.weights, [expert])]) == dtype
    return verify_moe(folder, base, [expert], router, exact=exact)


def _answered(
    moe: Path, files: MoeFiles, check: Sequence[Prompt], progress: Callable[[int, int], None] | None
) -> "Answers | None":
    """What a MoE answers to the check prompts, each by itself: in a batch, a bit may depend on who shares an expert."""
    if not check:
        return None
    from lora_lexicon.compose.compare import answers
    from lora_lexicon.compose.system import load_system

    system = load_system(str(moe), dtype=str(files.config.get("dtype") or "float32"))
    return answers(system, check, progress and (lambda _, total: progress(1, 2 * total)), at_once=1)


def _changes(check: Sequence[Prompt], before: "Answers | None", after: "Answers | None") -> dict[str, Any] | None:
    if before is None or after is None or before.routing is None or after.routing is None:
        return None
    from lora_lexicon.compose.compare import differing

    was, now = before.routing.weights, after.routing.weights  # (n, N) and (n, N + 1)
    keep = (now[:, :-1] == was).all(axis=1) & (now[:, -1] == 0)
    return differing(check, before, after, keep)


def _finish(folder: Path, name: str, record: dict[str, Any], found: dict[str, Any] | None) -> None:
    """Writes record and card, with what another comparison of an expert alone found."""
    before = record["verified"]
    if found and before:
        largest = max(before["largest_logit"], found["largest_logit"])
        found = {**found, "largest_logit": largest, "differences": before["differences"] | found["differences"]}
    record = {**record, "verified": found or before}
    write_record(folder / MOE_RECORD, record)
    (folder / "README.md").write_text(moe_card(name, record), encoding="utf-8")


def _without(differences: dict[str, float], name: str) -> dict[str, float]:
    return {key: value for key, value in differences.items() if key != name}
