"""Experts under examination: FFN tensors, LoRA adapters of ours, and PEFT adapters made anywhere."""

import shlex
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lexicon.compose.sources import BaseFiles, factor_names
from lora_lexicon.doctor.chart import Chart
from lora_lexicon.doctor.files import pickles
from lora_lexicon.doctor.parts import (
    ADAPTER_TO_SAFETENSORS,
    base_for,
    python,
    same_vocabulary,
    tokenizer_of,
    weights_of,
)
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.base import EXPERT_FFN
from lora_lexicon.experts.checkpoint import (
    CONFIG,
    FFN,
    FFN_KEY,
    INT8,
    KEY,
    MAX_VALUE,
    RECORD,
    SCALE,
    WEIGHTS,
    ExpertInfo,
    adapter_faults,
    changes_nothing,
    config_faults,
    load_adapter,
    lora_config,
    read_expert,
    read_factors,
    target_faults,
    too_large,
    type_faults,
)
from lora_lexicon.experts.shape import misfits, shape_of
from lora_lexicon.experts.tensors import Checkpoint
from lora_lexicon.folders import read_record
from lora_lexicon.recipe import FFN_MODULES

if TYPE_CHECKING:
    from peft import LoraConfig

# What a file's tensors say of a variant, whatever its config says.
FOREIGN = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding_": "factors of an embedding layer",
    "modules_to_save": "whole layers that were trained beside the factors (modules_to_save)",
    "embed_tokens": "an embedding that was trained whole",
    "lm_head": "a head that was trained",
    ".bias": "biases",
}
MERGE = (
    "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
    "m = M.from_pretrained({0!r}).merge_and_unload(); m.save_pretrained({1!r}); "
    "T.from_pretrained(m.name_or_path).save_pretrained({1!r})"
)


def examine_expert(chart: Chart, base: str | None) -> None:
    """An expert that `train` or `compose extract` made."""
    chart.kind, info = "expert", None
    path = shlex.quote(str(chart.path.parent))
    chart.mend = (
        f"lora-lexicon train --data ENTRIES --domains DOMAINS --domain NAME --base BASE --out {path} --overwrite"
    )
    with chart.going_on(chart.path / RECORD):
        info = read_expert(chart.path)
        chart.mend = chart.mend.replace("BASE", shlex.quote(info.base)).replace("NAME", info.domain or info.name)
        chart.kind = {"lora": "LoRA expert", "ffn": "FFN expert"}[info.kind]
        chart.facts["name"] = info.name
    if info is not None and info.kind == "ffn":
        _ffn(chart, info, base)
    elif (chart.path / CONFIG).is_file() or info is not None:
        examine_adapter(chart, base, info)
    elif (chart.path / FFN).is_file():
        weights_of(chart, chart.path / FFN)


def _ffn(chart: Chart, info: ExpertInfo, base: str | None) -> None:
    weights = weights_of(chart, chart.path / FFN)
    own = base_for(chart, base, info.base, info.base_fingerprint)
    if weights is None:
        return
    strange = [f"{name} is no FFN tensor" for name in weights.tensors if not FFN_KEY.fullmatch(name)]
    chart.several(strange, FFN)
    below = [n for n in weights.tensors if (m := FFN_KEY.fullmatch(n)) and int(m["layer"]) < info.first_layer]
    chart.several([f"{name} lies below first_layer, {info.first_layer}" for name in below], FFN)
    if own is None:
        return
    theirs = {n: s for n, s in shape_of(own.config, own.name).tensors.items() if FFN_KEY.fullmatch(n)}
    lacking = [n for n in theirs if (m := EXPERT_FFN.fullmatch(n)) and int(m["layer"]) >= info.first_layer]
    chart.several([f"lacks {name}" for name in lacking if name not in weights.tensors], FFN)
    unknown = [n for n in weights.tensors if FFN_KEY.fullmatch(n) and n not in theirs]
    chart.several([f"trains {name}, which base {own.name!r} lacks" for name in unknown], FFN)
    wrong = [n for n in theirs if n in weights.tensors and weights.tensors[n].shape != theirs[n]]
    said = [f"{n} has shape {weights.tensors[n].shape}, the base's is {theirs[n]}" for n in wrong]
    chart.several(said, FFN)


def examine_adapter(chart: Chart, base: str | None, info: ExpertInfo | None = None) -> None:
    """A LoRA adapter, of ours where it has a record, or made elsewhere with PEFT."""
    if info is None and not (chart.path / RECORD).is_file():
        chart.kind, chart.mend = "PEFT adapter", "lora-lexicon train --data ENTRIES --base BASE --out EXPERTS"
    record: dict[str, Any] = {}
    with chart.going_on(CONFIG):
        record = read_record(chart.path / CONFIG, ExpertError, "a LoRA adapter")
    merged = Path(f"{chart.path}-merged")
    merge = python(MERGE, chart.path, merged)
    # Of what was trained outside FFNs nothing is left by an extraction.
    targets = record.get("target_modules")
    ffn = isinstance(targets, list) and any(module in FFN_MODULES for module in targets)
    extract = f"{merge} && lora-lexicon compose extract {shlex.quote(str(merged))} --base BASE --out EXPERTS"
    extract = extract if ffn else chart.mend
    for fault in adapter_faults(chart.path, record) if record else ():
        chart.find(fault, CONFIG, extract if info is None else None)
    config = None
    if record.get("peft_type") == "LORA" and not any(config_faults(chart.path, record)):
        with chart.going_on(CONFIG):
            config = lora_config(chart.path)
            chart.facts["rank"] = f"{config.r}, alpha {config.lora_alpha}"
    weights = _adapter_weights(chart)
    sizes = _factors(chart, weights, config, extract if info is None else None) if weights is not None else {}
    named = info.base if info else str(record.get("base_model_name_or_path") or "")
    own = base_for(chart, base, named, info.base_fingerprint if info else "")
    linear = shape_of(own.config, own.name).linear if own is not None else None
    if linear is not None and any(misfits(linear, chart.path.name, sizes)):
        linear = None  # it is of another base, whose layers are not to be counted
    if config is not None and sizes:
        faults = list(target_faults(chart.path, config, sizes, linear))
        for words in ("lacks", "does not target", "at most", "more layers"):
            chart.several([fault for fault in faults if words in fault], WEIGHTS)
    if weights is not None and not (chart.path / INT8).is_file():
        chart.several(list(type_faults(weights)), WEIGHTS)
    if weights is not None and sizes:
        held = weights.tensors if (chart.path / WEIGHTS).is_file() else ()
        high = [name for name in held if chart.healthy and any(map(too_large, weights.chunks(name)))]
        chart.several([f"{name} holds values above {MAX_VALUE:g}, as no trained factor does" for name in high], WEIGHTS)
        if chart.healthy and changes_nothing(weights):
            what = "changes nothing: of each layer one of the two factors is zero, as before any training"
            chart.find(what, WEIGHTS, severity="warning")
        chart.facts["targets"] = ", ".join(sorted({layer.rpartition(".")[2] for layer in sizes}))
        chart.facts["parameters"] = f"{sum(prod(ref.shape) for ref in weights.tensors.values()):,}"
    if own is not None:
        _fits(chart, own, sizes, info)
    elif not named and base is None:
        chart.find("does not say which base it was trained on", CONFIG,
                   f"lora-lexicon doctor {shlex.quote(str(chart.path))} --base BASE", "warning")  # fmt: skip


def _adapter_weights(chart: Chart) -> Checkpoint | None:
    file, old = chart.path / WEIGHTS, pickles(chart.path)
    if (chart.path / INT8).is_file():
        with chart.going_on(INT8):  # whether each factor has its scales
            load_adapter(chart.path, "adapter", shapes=True)
        return weights_of(chart, chart.path / INT8)
    if not file.is_file() and old:
        what = "holds its weights in the old format, a pickle, which is never read"
        chart.find(what, old[0], python(ADAPTER_TO_SAFETENSORS, old[0], file))
        return None
    return weights_of(chart, file)


def _factors(
    chart: Chart, weights: Checkpoint, config: "LoraConfig | None", mend: str | None
) -> dict[str, tuple[int, int]]:
    """{layer: (in, out)} of a file's factors; notes what else it holds, and ranks that the config does not give."""
    shapes = {name: ref.shape for name, ref in weights.tensors.items() if not name.endswith(SCALE)}
    strange = {n for n, shape in shapes.items() if not KEY.fullmatch(n) or len(shape) != 2}
    strange |= {name for name in shapes if ".lm_head." in name or ".embed_tokens." in name}
    left = set(strange)
    for mark, what in FOREIGN.items():
        held = sorted(name for name in left if mark in name)
        chart.several([f"{name} is of {what}, which a sum of low-rank products has no place for" for name in held],
                      WEIGHTS, mend)  # fmt: skip
        left -= set(held)
    chart.several([f"{name} is no LoRA factor of a linear layer" for name in sorted(left)], WEIGHTS, mend)
    if not shapes:
        chart.find("holds no tensor", WEIGHTS)
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in shapes.keys() - strange:
        match = KEY.fullmatch(name)
        assert match is not None
        halves.setdefault(match["layer"], {})[name] = shapes[name]
    faults: list[str] = []
    sizes: dict[str, tuple[int, int]] = {}
    for layer, own in sorted(halves.items()):
        if config is not None or len(own) < 2:
            try:
                read_factors(chart.path, own, config or _any_config())
            except ExpertError as error:
                faults.append(str(error))
        a, b = (own.get(name) for name in factor_names(f"{layer}.weight"))
        if a is not None and b is not None:
            sizes[layer] = (a[1], b[0])
    chart.several([fault for fault in faults if "only one of its two" in fault], WEIGHTS)
    chart.several([fault for fault in faults if "only one of its two" not in fault], WEIGHTS, _with_rank(chart, halves))
    return sizes


def _any_config() -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig()


def _with_rank(chart: Chart, halves: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str | None:
    """The command that gives the config the one rank that all factors have, if they have one."""
    ranks = {
        shape[0] if name.endswith("lora_A.weight") else shape[1]
        for own in halves.values()
        for name, shape in own.items()
    }
    if len(ranks) != 1:
        return None
    code = (
        "import json, pathlib; p = pathlib.Path({0!r}); c = json.loads(p.read_text()); "
        "c |= dict(r={1}, rank_pattern=dict()); p.write_text(json.dumps(c, indent=2))"
    )
    return python(code, chart.path / CONFIG, ranks.pop())


def _fits(
    chart: Chart,
    base: BaseFiles,
    sizes: Mapping[str, tuple[int, int]],
    info: ExpertInfo | None,
) -> None:
    """Compares an adapter's layers with the base's."""
    linear = shape_of(base.config, base.name).linear
    faults = list(misfits(linear, info.name if info else chart.path.name, sizes))
    again = f"lora-lexicon train --data ENTRIES --base {shlex.quote(base.name)} --out EXPERTS"
    chart.several([fault for fault in faults if "lacks" in fault], WEIGHTS, again)
    chart.several([fault for fault in faults if "lacks" not in fault], WEIGHTS, again)
    if any((chart.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        same_vocabulary(chart, tokenizer_of(chart, chart.path, None, None), base, chart.path, "")
    if info is None and chart.healthy and sizes:
        chart.facts["fits"] += (
            ", by the names and shapes of its layers; PEFT does not record whose weights it learned on"
        )
        place = f"{shlex.quote(str(chart.path))} --base {shlex.quote(base.name)}"
        chart.facts["use"] = f"lora-lexicon compose moe EXPERT... {place}, pack build, or pack add PACK"
