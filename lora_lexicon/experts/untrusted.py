"""A base's small files, checked before transformers or tokenizers read them. Knows no tensors, and imports no torch.

A base may come in a pack from anywhere. transformers is given a configuration made of the fields below alone, so that
no other can choose other weights, fetch code or fill the memory; a tokenizer's files are checked field by field.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lexicon.errors import ExpertError, LexiconError
from lora_lexicon.folders import read_record, shown

if TYPE_CHECKING:
    from transformers import GenerationConfig, LlamaConfig

MAX_ID = 2**24  # of a token
MAX_TOKEN = 4096  # characters of a token
MAX_STEPS = 32  # of a tokenizer's normalizer, pre-tokenizer, post-processor or decoder
MAX_GROWTH = 64  # times that a tokenizer's replacements may lengthen a text
MAX_PATTERN = 2000  # characters of a regular expression that splits a text
REPEATED = re.compile(r"(?<!\\)\)[*+{]")
# What would have other weights loaded than those whose fingerprint is taken, or code fetched.
REFUSED = (
    ("transformers_weights", "it names other weights than those that are checked"),
    ("quantization_config", "its weights are quantised; a base is held in full, and quantised where it is loaded "
     "(--quantize)"),
    ("attn_implementation", "the attention's code is chosen where the base is loaded"),
)  # fmt: skip
STEPS = {
    "normalizer": {"Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip",
                   "StripAccents"},
    "pre_tokenizer": {"Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Whitespace", "WhitespaceSplit",
                      "Punctuation"},
    "post_processor": {"Sequence", "ByteLevel", "TemplateProcessing"},
    "decoder": {"Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"},
}  # fmt: skip
PARTS = ("normalizers", "pretokenizers", "processors", "decoders")  # what a Sequence calls its steps


def _is_number(value: Any, most: float = 1e30) -> bool:
    return type(value) in (int, float) and -most <= value <= most


def _is_id(value: Any) -> bool:
    return value is None or (type(value) is int and -1 <= value < MAX_ID)


def _is_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and len(value) <= 100 and all(type(i) is int for i in value)
                             and all(map(_is_id, value)))  # fmt: skip


def _is_text(value: Any, most: int = MAX_TOKEN) -> bool:
    return isinstance(value, str) and len(value) <= most


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return value is None or (_is_number(value, 1) and value >= 0)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_rope(value: Any) -> bool:
    def fits(part: Any) -> bool:
        if isinstance(part, list):
            return len(part) <= MAX_TOKEN and all(map(_is_number, part))
        return part is None or isinstance(part, bool) or _is_number(part) or _is_text(part, 64)

    return value is None or (isinstance(value, dict) and len(value) <= 32 and all(map(fits, value.values())))


# All of a config.json that transformers is given, and what it may be there.
CONFIG: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _is_count),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _is_count),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), lambda value: value is None or _is_count(value)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"), _is_flag),
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "attention_dropout"), _is_share),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _is_rope),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _is_ids),
    "rope_theta": _is_number,
    "hidden_act": lambda value: _is_text(value, 32),
    "tokenizer_class": lambda value: value is None or _is_text(value, 64),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_base(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks what a base's folder holds and its config.json says.

    Raises:
        ExpertError: something that would have transformers load other weights or code, or a field of another type.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise ExpertError(
            f"base {folder} holds an adapter_config.json: an adapter has a folder of its own, move it there"
        )
    for key, why in REFUSED:
        if any(value for name, value in config.items() if name.strip("_").removesuffix("_internal") == key):
            raise ExpertError(f"{file} holds {key}: {why}; take the base as it was published")
    _fields(config, file)
    if (folder / "generation_config.json").is_file():
        record = read_record(folder / "generation_config.json", ExpertError, "a base model")
        _fields({key: record[key] for key in IDS if key in record}, folder / "generation_config.json")


def _fields(config: Mapping[str, Any], file: Path) -> None:
    for key, fits in CONFIG.items():
        if key in config and not fits(config[key]):
            raise ExpertError(f"{file} is damaged: {key} is {shown(config[key])}, which no Llama has: copy it again")


def model_config(folder: Path, config: Mapping[str, Any], **changed: Any) -> "LlamaConfig":
    """A checked config.json as transformers has it: the fields that are known here, and no other."""
    from transformers import LlamaConfig

    with told(f"base {folder}: its config.json"):
        made = LlamaConfig(**{**{key: config[key] for key in CONFIG if key in config}, **changed})
        made.name_or_path = str(folder)
        return made


def generation_config(folder: Path, config: Mapping[str, Any]) -> "GenerationConfig":
    """The tokens that begin, end and fill a text, by generation_config.json, else config.json; nothing else is taken.

    How a text is sampled is chosen where it is written.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    record = read_record(file, ExpertError, "a base model") if file.is_file() else config
    return GenerationConfig(**{key: record.get(key) for key in IDS})


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns all that transformers and tokenizers raise while they load `what` into one line.

    Raises:
        ExpertError: they raised something.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, LexiconError):
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ExpertError(f"{what} cannot be loaded: {' '.join(str(error).split())}") from error
    except BaseException as error:  # tokenizers panics with a class that is no Exception
        raise ExpertError(f"{what} cannot be loaded: it is damaged, or of a kind that is not known here") from error


def check_tokenizer(folder: Path) -> None:
    """Checks the JSON files of a base's tokenizer.

    Raises:
        ExpertError: a field of another type, or a step that could lengthen a text without end.
    """
    for name, check in (
        ("tokenizer.json", _check_tokenizer_json),
        ("tokenizer_config.json", _check_settings),
        ("special_tokens_map.json", _check_settings),
        ("added_tokens.json", _check_added),
    ):
        if (folder / name).is_file():
            said = check(read_record(folder / name, ExpertError, "a tokenizer"))
            if said:
                raise ExpertError(f"{folder / name}: {said}: copy the base's own tokenizer there")


def _is_token(value: Any) -> bool:
    """A special token: text, or an object with its content and flags."""
    if not isinstance(value, dict):
        return value is None or _is_text(value)
    flags = all(isinstance(part, bool | str) or _is_id(part) for part in value.values())
    return flags and _is_text(value.get("content")) and len(value) <= 16


def _is_tokens(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [0]
    return value is None or (len(values) <= 10_000 and all(map(_is_token, values)))


def _is_templates(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, dict) and all(isinstance(v, str) for v in part.values()) for part in value)
    return value is None or isinstance(value, str)


def _check_settings(record: Mapping[str, Any]) -> str:
    """What is wrong with a tokenizer_config.json; "" for nothing."""
    for key, value in record.items():
        if key.endswith("_token"):
            fits = isinstance(value, bool) if key.startswith("add_") else _is_token(value)
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            fits = _is_tokens(value)
        elif key == "added_tokens_decoder":
            known = isinstance(value, dict) and all(re.fullmatch(r"\d{1,8}", i) and int(i) < MAX_ID for i in value)
            fits = value is None or (known and len(value) <= 100_000 and all(map(_is_token, value.values())))
        elif key == "chat_template":
            fits = _is_templates(value)
        elif key == "model_input_names":
            fits = isinstance(value, list) and len(value) <= 16 and all(map(_is_text, value))
        elif key.endswith("_class"):
            fits = value is None or (isinstance(value, str) and bool(re.fullmatch(r"\w{1,64}", value)))
        else:  # nothing that is a list or an object; old files have an empty one
            fits = not value or isinstance(value, bool) or _is_number(value) or _is_text(value)
        if not fits:
            return f"{shown(key)} is {shown(value)}, which no tokenizer has there"
    return ""


def _check_added(record: Mapping[str, Any]) -> str:
    """What is wrong with an added_tokens.json; "" for nothing."""
    bad = [key for key, value in record.items() if type(value) is not int or not _is_id(value) or len(key) > MAX_TOKEN]
    return f"{shown(bad[0])} is {shown(record[bad[0]])}, which is no token's number" if bad else ""


def _check_tokenizer_json(record: Mapping[str, Any]) -> str:
    """What is wrong with a tokenizer.json; "" for nothing."""
    model = record.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") not in ("BPE", "Unigram"):
        return "its model is neither BPE nor Unigram, which are read here"
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        sound = all(len(token) <= MAX_TOKEN and type(i) is int and 0 <= i < MAX_ID for token, i in vocabulary.items())
    else:
        sound = isinstance(vocabulary, list) and all(isinstance(p, list) and len(p) == 2 and _is_text(p[0])
                                                     for p in vocabulary)  # fmt: skip
    added = record.get("added_tokens") or []
    if not sound or not isinstance(added, list) or not all(isinstance(t, dict) and _is_token(t) for t in added):
        return "its model.vocab or added_tokens are no tokenizer's"
    if model.get("continuing_subword_prefix") or not all(map(_is_merge, model.get("merges") or [])):
        return "its model.merges are no tokenizer's"
    if model.get("dropout"):
        return "its model has dropout, with which a text is cut by chance"
    padding = record.get("padding")
    if padding is not None and (not isinstance(padding, dict) or padding.get("strategy") != "BatchLongest"):
        return "its padding is to a fixed length; a batch is padded where it is made"
    return next(filter(None, (_check_steps(record.get(stage), stage) for stage in STEPS)), "")


def _is_merge(value: Any) -> bool:
    pair = value if isinstance(value, list) else value.split(" ") if isinstance(value, str) else []
    return len(pair) == 2 and all(map(_is_text, pair))


def _check_steps(value: Any, stage: str) -> str:
    """What is wrong with one stage of a tokenizer; "" for nothing."""
    left, count, growth = [value] if value is not None else [], 0, 1
    while left:
        step, count = left.pop(), count + 1
        kind = step.get("type") if isinstance(step, dict) else None
        if not isinstance(kind, str) or kind not in STEPS[stage] or count > MAX_STEPS:
            what = f"more than {MAX_STEPS} steps" if count > MAX_STEPS else f"a step {shown(kind)}"
            return f"its {stage} has {what}, which is not read here"
        parts = [step[key] for key in PARTS if key in step]
        pattern = step.get("pattern")
        found = next(iter(pattern.values())) if isinstance(pattern, dict) and len(pattern) == 1 else None
        if kind == "Sequence":
            if len(parts) != 1 or not isinstance(parts[0], list) or len(parts[0]) > MAX_STEPS:
                return f"its {stage} has a sequence of more than {MAX_STEPS} steps, or of none"
            left += parts[0]
        elif kind == "Replace":
            content = step.get("content")
            sound = isinstance(pattern, dict) and list(pattern) == ["String"] and bool(found)
            if not (sound and isinstance(content, str) and _is_text(found) and _is_text(content)):
                return f"its {stage} replaces something else than a text, which is not read here"
            growth *= max(1, -(-len(content.encode()) // len(str(found).encode())))
        elif kind == "Prepend" and not _is_text(step.get("prepend"), 64):
            return f"its {stage} prepends something else than a short text"
        elif kind == "Split" and not _is_text(found, MAX_PATTERN):
            return f"its {stage} splits at something else than a pattern of up to {MAX_PATTERN} characters"
        elif kind == "Split" and "Regex" in step["pattern"] and REPEATED.search(str(found)):
            return f"its {stage} repeats a group of an expression, which may take endless tries"
        elif kind == "TemplateProcessing" and not _is_template(step):
            return f"its {stage} adds something else than a few special tokens"
    return "" if growth <= MAX_GROWTH else f"its {stage} lengthens a text {growth} times; at most {MAX_GROWTH} are read"


def _is_template(step: Mapping[str, Any]) -> bool:
    special, lists = step.get("special_tokens"), [step.get("single"), step.get("pair")]
    if not isinstance(special, dict) or not all(isinstance(part, list) and len(part) <= 64 for part in lists):
        return False
    ids = [token.get("ids") if isinstance(token, dict) else None for token in special.values()]
    used = [part["SpecialToken"] for some in lists for part in some or []
            if isinstance(part, dict) and "SpecialToken" in part]  # fmt: skip
    known = all(isinstance(token, dict) and token.get("id") in special for token in used)
    return known and len(ids) <= 64 and all(isinstance(some, list) and len(some) <= 64 and all(map(_is_id, some))
                                            for some in ids)  # fmt: skip
