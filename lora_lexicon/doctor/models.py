"""Whole models under examination: a base, a merged MoE, a Mixtral."""

import shlex
from typing import Any

from lora_lexicon.compose.collapse import MoeFiles
from lora_lexicon.compose.merge import MOE_RECORD
from lora_lexicon.compose.policy import MOE_TYPE
from lora_lexicon.compose.standard import COLLAPSE_RECORD, EXPORT_RECORD
from lora_lexicon.doctor.chart import Chart
from lora_lexicon.doctor.parts import (
    base_for,
    identity_of,
    no_code,
    router_fits,
    router_of,
    same_vocabulary,
    tensors_fit,
    tokenizer_of,
    weights_of,
)
from lora_lexicon.errors import ExpertError, PackError
from lora_lexicon.experts.base import read_config
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.folders import read_record

MIXTRAL = "mixtral"


def examine_model(chart: Chart, base: str | None) -> None:
    """What config.json calls a model."""
    file = chart.path / "config.json"
    chart.kind, chart.mend = "base", f"hf download OWNER/NAME --local-dir {shlex.quote(str(chart.path))}"
    with chart.going_on(file):
        config = read_record(file, ExpertError, "a model")
        no_code(chart, config, file)
        kind = config.get("model_type")
        if kind == MOE_TYPE:
            examine_moe(chart, base)
        elif kind == MIXTRAL:
            _mixtral(chart, config)
        else:
            _base(chart, config, base)


def _base(chart: Chart, config: dict[str, Any], base: str | None) -> None:
    """A Llama: one to train on, or a whole model to take an expert from."""
    file = chart.path / "config.json"
    if (chart.path / COLLAPSE_RECORD).is_file():
        chart.kind = "expert collapsed to a dense model"
    shape, mend = None, ""
    if config.get("quantization_config"):
        mend = "hf download OWNER/NAME --local-dir FOLDER  # of the model before it was quantised"
    with chart.going_on(file, mend):
        read_config(chart.path)  # which refuses all but Llamas
        shape = shape_of(config, str(file))
        chart.facts["shape"] = (
            f"{shape.layers} layers, hidden {shape.hidden}, FFN {shape.inner}, {shape.vocabulary:,} words"
        )
    weights = weights_of(chart, chart.path)
    if weights is not None and shape is not None:
        tensors_fit(chart, weights, shape.tensors, None)
    identity = tokenizer_of(chart, chart.path, shape and shape.vocabulary, None)
    chart.facts["fingerprint"] = identity_of(chart.path)
    own = base_for(chart, base, "") if base else None
    if shape is None:
        return
    if own is None:
        chart.facts["fits"] = "`train --base` trains experts on it"
        return
    same_vocabulary(chart, identity, own, chart.path, "")
    if shape_of(own.config, own.name).tensors != shape.tensors:
        chart.find(f"has other layers or sizes than base {base!r}", file, "")
    elif own.fingerprint[:12] == chart.facts["fingerprint"]:
        chart.facts["fits"] = f"it is {base}"
    else:
        chart.facts["fits"] = f"a whole model, which compose moe and compose extract take as an expert of {base}"


def examine_moe(chart: Chart, base: str | None) -> None:
    """A merged MoE of ours."""
    chart.kind = "merged MoE"
    path = shlex.quote(str(chart.path))
    chart.mend = f"lora-lexicon compose moe EXPERT... --base BASE --router DOMAINS --out {path} --overwrite"
    record: dict[str, Any] = {}
    if (chart.path / MOE_RECORD).is_file():
        with chart.going_on(chart.path / MOE_RECORD):
            record = read_record(chart.path / MOE_RECORD, PackError, "a MoE")
    else:
        chart.find(f"lacks {MOE_RECORD}: what it was made of is not known", MOE_RECORD, severity="warning")
    made = record.get("base") if isinstance(record.get("base"), dict) else {}
    named, identity = (str(made.get(key, "")) for key in ("name", "fingerprint"))  # type: ignore[union-attr]
    if named:
        chart.mend = chart.mend.replace("BASE", shlex.quote(named), 1)
    files = None
    weights = weights_of(chart, chart.path)
    if weights is not None:
        with chart.going_on("config.json"):
            files = MoeFiles.unchecked(chart.path)
            chart.facts["experts"] = ", ".join(files.experts)
            chart.facts["routing"] = str(files.config.get("routing"))
            tensors_fit(chart, weights, files.shapes(), None)
    router = router_of(chart, chart.path, None)
    if router is not None and files is not None and router.names != files.domains:
        what = f"the router names {', '.join(router.names)}, config.json the experts {', '.join(files.domains)}"
        chart.find(what, "router.json")
    if router is not None and router.embedder_name == "base" and identity:
        reads = router.embedder_identity.get("base")
        if reads != identity:
            what = f"the router reads base {str(reads)[:12]}, the experts were trained on {identity[:12]}"
            chart.find(what, "router.json")
    size = files.config.get("vocab_size") if files else None
    words = tokenizer_of(chart, chart.path, size if isinstance(size, int) else None, None)
    own = base_for(chart, base, named, identity)
    if own is not None:
        same_vocabulary(chart, words, own, chart.path, None)
        if router is not None:
            router_fits(chart, router, own, chart.path / "router.json", None)


def _mixtral(chart: Chart, config: dict[str, Any]) -> None:
    """A Mixtral, such as `compose export` writes."""
    chart.kind = "Mixtral"
    if (chart.path / EXPORT_RECORD).is_file():
        chart.mend = f"lora-lexicon compose export MOE --out {shlex.quote(str(chart.path))} --overwrite"
    weights_of(chart, chart.path)
    size = config.get("vocab_size")
    tokenizer_of(chart, chart.path, size if isinstance(size, int) else None, None)
    if chart.healthy:
        chart.facts["fits"] = "`define`, `evaluate` and `compose compare` read it; nothing is trained on it"
