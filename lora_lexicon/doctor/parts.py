"""What several kinds of artefacts are made of: weights, a tokenizer, a router, a base to compare with.

Each function notes all that it finds, and hands on what the others need. Values are read in blocks, headers whole.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lexicon.compose.merge import check_router_base
from lora_lexicon.compose.sources import BaseFiles
from lora_lexicon.doctor.chart import DAMAGED, Chart
from lora_lexicon.doctor.files import pickles
from lora_lexicon.domains.router import TENSORS, Router, load_router
from lora_lexicon.errors import ExpertError, LexiconError, shown
from lora_lexicon.experts.base import base_folder, fingerprint, local_base, tensor_faults, vocabulary_hash
from lora_lexicon.experts.tensors import Checkpoint, not_finite
from lora_lexicon.experts.untrusted import told
from lora_lexicon.folders import read_record

MAX_ROUTER_BYTES = 2**30  # which is read whole
TO_SAFETENSORS = "from transformers import AutoModelForCausalLM as M; M.from_pretrained({0!r}).save_pretrained({0!r})"
ADAPTER_TO_SAFETENSORS = (
    "import torch; from safetensors.torch import save_file; "
    "save_file(torch.load({0!r}, weights_only=True), {1!r}, {{'format': 'pt'}})"
)


def python(code: str, *values: object) -> str:
    """A command that runs a line of Python with these values in it."""
    return f"python -c {shlex.quote(code.format(*map(str, values)))}"


def weights_of(chart: Chart, file: Path, mend: str | None = None) -> Checkpoint | None:
    """The tensors of a safetensors file or a checkpoint's folder, every value checked; None where no header is read."""
    try:
        weights = Checkpoint(file)
    except LexiconError as error:
        old = pickles(file) if file.is_dir() else []
        if old:
            convert = python(TO_SAFETENSORS, file) if file == chart.path else mend
            chart.find(f"holds its weights in the old format, a pickle, which is never read: {error}", old[0], convert)
        else:
            chart.find(str(error), file, mend)
        return None
    with chart.going_on(file, mend):
        spoilt = not_finite(weights, chart.progress)
        said = [f"tensor {name} holds values that are infinite or not a number" for name in spoilt]
        chart.several(said, weights.tensors[spoilt[0]].file if spoilt else file, mend)
    return weights


def tensors_fit(chart: Chart, weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]], mend: str | None) -> None:
    """Compares a checkpoint's names and shapes with those of its config.json."""
    faults, lacking = list(tensor_faults(weights, shapes)), [name for name in shapes if name not in weights.tensors]
    chart.several([f for f in faults if "holds no tensor" in f], weights.path, mend)
    chart.several([f for f in faults if "which no model of" in f], weights.path, mend)
    chart.several([f for f in faults if "has shape" in f], weights.path, mend)
    if "lm_head.weight" in lacking and "model.embed_tokens.weight" in weights.tensors:
        tie = python(
            "import json, pathlib; p = pathlib.Path({0!r}); c = json.loads(p.read_text()); "
            "c['tie_word_embeddings'] = True; p.write_text(json.dumps(c, indent=2))",
            weights.path / "config.json",
        )
        chart.find("has no head of its own, and config.json does not say that it is tied to the embedding",
                   weights.path / "config.json", tie)  # fmt: skip
    if "lm_head.weight" not in shapes and "lm_head.weight" in weights.tensors:
        _tied_head(chart, weights)


def _tied_head(chart: Chart, weights: Checkpoint) -> None:
    """A head that config.json calls tied must be the embedding: transformers takes that for it."""
    head, embedding = (weights.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head is None or embedding is None:
        return
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same:
        with head.file.open("rb") as one, embedding.file.open("rb") as other:
            one.seek(head.offset)
            other.seek(embedding.offset)
            left = head.bytes
            while same and left:
                size = min(left, 2**20)
                same, left = one.read(size) == other.read(size), left - size
    if not same:
        untie = python(
            "import json, pathlib; p = pathlib.Path({0!r}); c = json.loads(p.read_text()); "
            "c['tie_word_embeddings'] = False; p.write_text(json.dumps(c, indent=2))",
            weights.path / "config.json",
        )
        chart.find("config.json ties the head to the embedding, and the file holds another head, which is not used",
                   weights.path / "config.json", untie)  # fmt: skip


def tokenizer_of(chart: Chart, folder: Path, vocabulary: int | None, mend: str | None) -> str | None:
    """Checks a tokenizer's files, without loading any code for it; returns its vocabulary's hash."""
    try:
        identity = vocabulary_hash(folder)
    except (LexiconError, *DAMAGED) as error:
        said = str(error) if isinstance(error, LexiconError) else "tokenizer.json is damaged"
        chart.find(said, folder, mend)
        return None
    file = folder / "tokenizer.json"
    if not file.is_file():
        return identity
    from tokenizers import Tokenizer

    try:
        with told("it"):
            largest = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1)
    except LexiconError as error:
        chart.find(f"is no tokenizer that can be read: {error}", file, mend)
        return None
    if vocabulary is not None and largest >= vocabulary:
        chart.find(
            f"has ids up to {largest:,}, and the embedding has {vocabulary:,} rows: it is another model's tokenizer",
            file,
            mend,
        )
    settings = folder / "tokenizer_config.json"
    with chart.going_on(settings, mend):
        if settings.is_file() and not read_record(settings, ExpertError, "a tokenizer").get("eos_token"):
            chart.find("names no eos_token, with which every prompt ends", settings, mend)
    return identity


def no_code(chart: Chart, record: Mapping[str, Any], file: Path) -> None:
    """Notes a config that asks for code of its own."""
    if record.get("auto_map"):
        chart.find("asks for code of its own (auto_map), which is never run", file, "", "warning")


def router_of(chart: Chart, folder: Path, mend: str | None) -> Router | None:
    """The router in a folder."""
    tensors = folder / TENSORS
    if tensors.is_file() and tensors.stat().st_size > MAX_ROUTER_BYTES:
        chart.find(f"is larger than {MAX_ROUTER_BYTES >> 30} GiB: it cannot be a router's", tensors, mend)
        return None
    with chart.going_on(folder, mend):
        router = load_router(folder)
        chart.facts["domains"] = ", ".join(router.names)
        chart.facts["embedder"] = router.embedder_name
        return router
    return None


def base_for(chart: Chart, given: str | None, named: str, identity: str = "") -> BaseFiles | None:
    """The base to compare with: as given, else as the artefact names it, if it is here and sound.

    Args:
        identity: the fingerprint that the artefact's record has of its base; "" where it has none.
    """
    if named:
        chart.facts["base"] = f"{named} ({identity[:12]})" if identity else named
    folder = base_folder(given) if given else local_base(named)
    if folder is None:
        chart.facts["compared"] = "with no base: its own is not here; give it with --base"
        return None
    name = given or named
    try:
        own = BaseFiles.open(name, folder)
    except (LexiconError, *DAMAGED) as error:
        said = str(error) if isinstance(error, LexiconError) else "it is damaged"
        inside = Path(name).is_relative_to(chart.path)  # and is examined with the rest
        where, mend = (Path(name), None) if inside else (name, f"lora-lexicon doctor {shlex.quote(name)}")
        chart.find(f"the base to compare with: {said}", where, mend)
        return None
    if identity and own.fingerprint != identity:
        what = f"was made for base {named!r} ({identity[:12]}); {name!r} is another, {own.fingerprint[:12]}"
        chart.find(what, name, f"lora-lexicon doctor {shlex.quote(chart.name)} --base {shlex.quote(named)}")
        return own
    chart.facts["fits"] = f"{shown(name)} ({own.fingerprint[:12]})"
    return own


def router_fits(chart: Chart, router: Router, base: BaseFiles, where: Path, mend: str | None) -> None:
    """Compares the base that a router reads with this one."""
    with chart.going_on(where, mend):
        check_router_base(router, base.fingerprint, base.name)


def same_vocabulary(chart: Chart, identity: str | None, base: BaseFiles, where: Path, mend: str | None) -> None:
    """Compares a tokenizer with the base's."""
    if identity is not None and identity != vocabulary_hash(base.path):
        chart.find(f"the tokenizer has another vocabulary than that of base {base.name!r}", where, mend)


def identity_of(folder: Path) -> str:
    """A base's fingerprint, shortened; "" where it cannot be told."""
    try:
        return fingerprint(folder)[:12]
    except (LexiconError, *DAMAGED):
        return ""
