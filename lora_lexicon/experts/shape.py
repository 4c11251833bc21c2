"""What a Llama is made of, from its config.json alone. Knows no tensors, and imports no torch."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lexicon.errors import ExpertError, RecipeError
from lora_lexicon.folders import read_record
from lora_lexicon.recipe import ATTENTION_MODULES, FFN_MODULES
from lora_lexicon.resources import find_base, hub_answers, shapes

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MAX_LAYERS = 10_000  # so that a file cannot ask for names without end
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, all of them numbers of elements."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head: int  # the width of one attention head
    vocabulary: int
    tied: bool = False  # the head is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"  # as the config says

    @property
    def query(self) -> int:
        """The width of all query heads."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """The width of all key heads, and of all value heads."""
        return self.key_value_heads * self.head

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """{projection: (in, out)} of one layer."""
        attention = ((self.hidden, self.query), *[(self.hidden, self.key)] * 2, (self.query, self.hidden))
        ffn = (*[(self.hidden, self.inner)] * 2, (self.inner, self.hidden))
        return dict(zip((*ATTENTION_MODULES, *FFN_MODULES), (*attention, *ffn), strict=True))

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """{full name: (in, out)} of every linear layer but the head, in the model's order."""
        matrices = self.matrices
        return {name: matrices[name.rpartition(".")[2]] for name in linear_names(self.layers)}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor, as a checkpoint names them; a tied head is the embedding and has none."""
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        for i in range(self.layers):
            prefix = f"model.layers.{i}"
            found |= {f"{prefix}.{norm}.weight": (self.hidden,) for norm in NORMS}
            for part, names, bias in (
                ("self_attn", ATTENTION_MODULES, self.attention_bias),
                ("mlp", FFN_MODULES, self.mlp_bias),
            ):
                for name in names:
                    inner, outer = self.matrices[name]
                    found[f"{prefix}.{part}.{name}.weight"] = (outer, inner)
                    if bias:
                        found[f"{prefix}.{part}.{name}.bias"] = (outer,)
        return found

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        return _weights(self, ATTENTION_MODULES) + self.attention_bias * (self.query + 2 * self.key + self.hidden)

    @property
    def ffn(self) -> int:
        """Parameters of one layer's FFN."""
        return _weights(self, FFN_MODULES) + self.mlp_bias * (2 * self.inner + self.hidden)

    @property
    def layer(self) -> int:
        """Parameters of one layer, its two norms included."""
        return self.attention + self.ffn + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head where it is not tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.layers * self.layer + self.hidden + self.embedding * (1 if self.tied else 2)


def linear_names(layers: int) -> list[str]:
    """The full name of every linear layer but the head of a Llama of so many layers, in the model's order."""
    parts = (("self_attn", ATTENTION_MODULES), ("mlp", FFN_MODULES))
    return [f"model.layers.{i}.{part}.{name}" for i in range(layers) for part, names in parts for name in names]


def _weights(shape: Shape, names: tuple[str, ...]) -> int:
    return sum(shape.matrices[name][0] * shape.matrices[name][1] for name in names)


def llama_config(file: Path) -> dict[str, Any]:
    """A base's config.json; only the Llama architecture is accepted."""
    config = read_record(file, ExpertError, "a base model")
    if config.get("model_type") != "llama":
        raise ExpertError(
            f"base {file.parent} has model_type {config.get('model_type')!r}; "
            "only Llama-architecture bases are supported"
        )
    return config


def read_shape(base: str) -> Shape:
    """The shape of a base whose weights need not be there.

    Args:
        base: a folder with a config.json, such a file, the name of a shipped pack or shape, or a Hub
            name, of which only config.json is fetched.

    Raises:
        ExpertError: there is no such base, or its config is not a Llama's.
    """
    file = _config_file(base)
    return shape_of(llama_config(file), str(file))


def shape_of(config: dict[str, Any], where: str) -> Shape:
    """The shape that a Llama's configuration describes; `where` names it in errors."""
    for key in SIZES:
        _check_size(config.get(key), key, where)
    hidden, inner, layers, heads, vocabulary = (config[key] for key in SIZES)
    if layers > MAX_LAYERS:
        raise ExpertError(f"{where}: num_hidden_layers is {layers}; at most {MAX_LAYERS:,} are read")
    key_value_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    for key, value in (("num_key_value_heads", key_value_heads), ("head_dim", head)):
        _check_size(value, key, where)
    if heads % key_value_heads:
        raise ExpertError(f"{where}: {heads} attention heads cannot share {key_value_heads} key-value heads")
    dtype = config.get("dtype") or config.get("torch_dtype")  # the second is the older name
    return Shape(
        hidden,
        inner,
        layers,
        heads,
        key_value_heads,
        head,
        vocabulary,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        dtype=dtype if isinstance(dtype, str) else "bfloat16",
    )


def misfits(linear: Mapping[str, tuple[int, int]], expert: str, sizes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """The layers of a LoRA expert, of sizes (in, out), that a base's `linear` ones do not have so, a line each."""
    for name, size in sizes.items():
        if name not in linear:
            yield f"expert {expert!r} updates {name}, which the base lacks: it was trained on another base"
        elif linear[name] != size:
            ours, theirs = (f"{i} to {o} features" for i, o in (linear[name], size))
            yield f"expert {expert!r}: {name} maps {theirs}, the base's {ours}"


def _check_size(value: Any, key: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ExpertError(f"{where}: {key} is {value!r}; a Llama's config has a positive integer there")


def _config_file(base: str) -> Path:
    if Path(base).is_file():
        return Path(base)
    if base in shapes() and not Path(base).exists():
        return shapes()[base]
    try:
        path = Path(find_base(base))
    except ExpertError as error:
        raise ExpertError(f"{error}; or one of the shapes {', '.join(shapes())}") from error
    if path.is_dir():
        return path / "config.json"
    from huggingface_hub import hf_hub_download

    with hub_errors(base):
        return Path(hf_hub_download(base, "config.json"))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the Hub's client raises for base `name` into one line, soon where the Hub is out of reach."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reached = hub_answers()
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason if reached else "it is out of reach"
        raise ExpertError(
            f"{name!r} is no folder and ships with nothing here, and the Hugging Face Hub does not give it ({reason}): "
            "check the name and the network, or give a folder"
        ) from error


def parse_layers(text: str, count: int) -> list[int]:
    """Layer numbers from a list such as `4-6,9`.

    Raises:
        RecipeError: no such list, or a layer that a base of `count` layers lacks.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise RecipeError(f"--layers {text!r}: {part!r} is no layer and no range: write it as 4-6,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise RecipeError(f"--layers {text!r}: the base has layers 0 to {count - 1}, and a range goes upwards")
        layers.update(range(first, last + 1))
    return sorted(layers)
