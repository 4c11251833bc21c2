"""Checkpoints of standard architectures, written whole or not at all. Knows nothing of where the tensors come from."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lexicon import __version__
from lora_lexicon.compose.merge import SPARE_BYTES, check_written, copy_companions
from lora_lexicon.errors import PackError
from lora_lexicon.experts.tensors import TensorPlan, write_checkpoint
from lora_lexicon.folders import new_folder, read_record, write_record

COLLAPSE_RECORD = "collapse.json"
EXPORT_RECORD = "export.json"


def write_model(
    out: Path,
    plans: Sequence[TensorPlan],
    config: dict[str, Any],
    companions: Path,
    file: str,
    facts: dict[str, Any],
    card: Callable[[str, dict[str, Any]], str],
    *,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Writes weights, config, tokenizer, record and card; returns the record.

    Args:
        plans: all tensors, of one type.
        companions: the folder whose tokenizer is copied.
        file: the record's name.
        facts: what the record says beside type, bytes and versions.
        card: the model card's text, from the model's name and the record.
        progress: called with (bytes just written, bytes in all).
    """
    total = sum(plan.bytes for plan in plans)
    record = {
        **facts,
        "dtype": plans[0].dtype,
        "bytes": total,
        "made_by": f"lora-lexicon {__version__}",
        "versions": {"torch": version("torch")},
    }
    with new_folder(out, replace=overwrite, needs=total + SPARE_BYTES) as folder:
        report = None if progress is None else lambda done: progress(done, total)
        write_checkpoint(folder, plans, max_shard_bytes=max_shard_bytes, progress=report)
        check_written(folder, plans)
        write_record(folder / "config.json", {**config, "dtype": record["dtype"]})
        copy_companions(companions, folder)
        write_record(folder / file, record)
        (folder / "README.md").write_text(card(out.name, record), encoding="utf-8")
    return record


def record_of(folder: Path, name: str) -> dict[str, Any]:
    """What one of a model's records says; nothing where there is none."""
    return read_record(folder / name, PackError, "a model") if (folder / name).is_file() else {}


def rope_of_old(config: dict[str, Any]) -> dict[str, Any]:
    """A config's rotary embedding in the keys of transformers before version 5, which ignores `rope_parameters`."""
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    return {"rope_theta": theta, **({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})}
