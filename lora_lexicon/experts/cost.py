"""What it costs to train on a base and to hold it, from its shape alone. Arithmetic; imports no torch.

Bytes are those of tensors, memory is weights and what training adds to them, and a GB is 1e9 bytes. docs/plan.md
states every formula; the tests hold them against transformers, PEFT, bitsandbytes and autograd.
"""

import difflib
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from lora_lexicon.errors import RecipeError
from lora_lexicon.experts.shape import Shape
from lora_lexicon.recipe import ATTENTION_MODULES, FFN_MODULES, TrainRecipe

Kind = Literal["ffn", "lora"]
Optimizer = Literal["AdamW", "8-bit AdamW"]
Quantize = Literal["none", "nf4", "int8"]
Sharding = Literal["fsdp", "zero3"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MODULES = {"ffn": FFN_MODULES, "all": (*ATTENTION_MODULES, *FFN_MODULES)}
MAX_RANK = 4096  # of an adapter
NF4_BLOCK = 64  # weights that share a float32 scale: Dettmers et al. (2023), as `quantize: nf4` loads a base
ADAM_BLOCK = 256  # elements of an 8-bit state that share a float32 scale: Dettmers et al. (2022)
STATES = {"AdamW": 8.0, "8-bit AdamW": 2 * (1 + 4 / ADAM_BLOCK)}  # bytes a trained parameter
HEAD_ROWS = 512  # predicted tokens whose logits are there at once
LOGIT_BYTES = 12  # a predicted token and vocabulary entry: the logits, their softmax and its gradient in float32
PREDICTED = 0.5  # of a row's tokens, at most, are the definition's: 0.32 in the WordNet sample, 0.35 in the jargon
UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
RESERVE = 0.05  # of a card's memory: the driver's context, and what fragments


class Card(NamedTuple):
    """A graphics card: memory in bytes, as sold (none has less), and dense 16-bit FLOP/s with float32 sums."""

    memory: float
    peak: float | None = None

    def peak_in(self, dtype: str) -> float | None:
        """Its FLOP/s in a format, where that is known."""
        return None if dtype == "float32" else self.peak


# Memory in GB and TFLOP/s from NVIDIA's data sheets and architecture papers (bfloat16 without sparsity; the
# T4 has float16 only, the H100 and the H200 are the SXM ones).
CARDS = {
    name: Card(memory * 1e9, peak * 1e12)
    for name, (memory, peak) in {
        "rtx-3090": (24, 71),
        "rtx-4090": (24, 165.2),
        "rtx-5090": (32, 209.5),
        "rtx-a6000": (48, 154.8),
        "t4": (16, 65),
        "l4": (24, 121),
        "a10": (24, 125),
        "l40s": (48, 362),
        "a100-40gb": (40, 312),
        "a100-80gb": (80, 312),
        "h100": (80, 989),
        "h200": (141, 989),
    }.items()
}


@dataclass(frozen=True)
class Options:
    """What is to be planned for; the defaults are those of a Llama-3-8B in the README."""

    experts: int = 4
    rank: int = 16
    modules: Literal["ffn", "all"] = "ffn"  # what the adapters update
    layers: tuple[int, ...] | None = None  # those with experts; None: all
    keep_base: bool = False  # the MoE holds the base's FFNs as one more expert
    extract: tuple[int, ...] = ()  # ranks that trained FFNs are cut down to
    dtype: str = "bfloat16"
    batch: int = 32  # rows trained, or decoded, at once
    length: int = 128  # tokens a row, prompt and definition
    checkpointing: bool = False  # recompute activations instead of keeping them


@dataclass(frozen=True)
class Training:
    """What one expert needs while it trains, in each process. Bytes, and floating-point operations for one token.

    Attributes:
        copies: of trained weights in 16 bits, which autocast drops after each forward pass.
        states: the optimizer's.
        activations: kept for the backward pass.
        layer: activations and copies of one layer, which the end of the backward pass still needs.
        passes: before a step; gradients are kept from one to the next.
        gathered: whole weights of what is computed and what comes next, where each process holds a shard.
    """

    name: str
    trained: int
    weights: int
    copies: int
    gradients: int
    states: int
    activations: int
    layer: int
    token_flops: int
    passes: int = 1
    gathered: int = 0

    @property
    def forward(self) -> int:
        """What the end of a forward pass holds beside weights and states."""
        return self.gathered + self.copies + self.activations + (self.gradients if self.passes > 1 else 0)

    @property
    def backward(self) -> int:
        """What the end of a backward pass holds beside weights and states."""
        return self.gathered + self.gradients + self.layer

    @property
    def memory(self) -> int:
        """Memory to train, at its peak."""
        return self.weights + self.states + max(self.forward, self.backward)

    def record(self) -> dict[str, Any]:
        """As JSON, its sums included."""
        return {**asdict(self), "forward": self.forward, "backward": self.backward, "memory": self.memory}


def options_of(recipe: TrainRecipe, shape: Shape, rank: int, tokens: int = 1) -> Options:
    """What a recipe trains, with one adapter's rank, in passes over the base of so many tokens."""
    return Options(
        rank=rank,
        modules="all" if recipe.attention else "ffn",
        layers=tuple(range(recipe.first_layer, shape.layers)),
        dtype=recipe.dtype,
        batch=1,
        length=tokens,
        checkpointing=recipe.gradient_checkpointing,
    )


def check_options(shape: Shape, options: Options) -> None:
    """Raises RecipeError for what no composition of this shape can have."""
    for key in ("experts", "rank", "batch", "length"):
        if getattr(options, key) < 1:
            raise RecipeError(f"{key} is {getattr(options, key)}; it must be at least 1")
    if options.dtype not in BYTES:
        raise RecipeError(f"dtype is {options.dtype!r}; it must be one of {', '.join(BYTES)}")
    if options.modules not in MODULES:
        raise RecipeError(f"modules is {options.modules!r}; it must be one of {', '.join(MODULES)}")
    if not expert_layers(shape, options) <= set(range(shape.layers)):
        raise RecipeError(f"layers is {options.layers}; this base has layers 0 to {shape.layers - 1}")
    for rank, modules in ((options.rank, options.modules), *((rank, "ffn") for rank in options.extract)):
        check_rank(shape, rank, modules)


def check_rank(shape: Shape, rank: int, modules: str, name: str = "rank") -> None:
    """Raises RecipeError for a rank that no adapter of this shape can have; `name` is where it was given."""
    smallest = min(min(shape.matrices[matrix]) for matrix in MODULES[modules])
    if not 1 <= rank <= smallest:
        raise RecipeError(f"{name} is {rank}; a matrix that it would replace has rank {smallest}: choose 1 to that")
    if rank > MAX_RANK:
        raise RecipeError(f"{name} is {rank}; an adapter holds at most {MAX_RANK}: choose 1 to that")


def expert_layers(shape: Shape, options: Options) -> set[int]:
    """The layers with experts."""
    return set(range(shape.layers) if options.layers is None else options.layers)


def adapter_parameters(shape: Shape, rank: int, modules: str, layers: int) -> int:
    """Elements of one LoRA adapter in so many layers: r (in + out) a matrix (Hu et al., 2021)."""
    return layers * sum(rank * sum(shape.matrices[name]) for name in MODULES[modules])


def nf4_bytes(elements: int) -> int:
    """A matrix in NF4: half a byte an element, and a float32 scale a block (not quantised a second time)."""
    return math.ceil(elements / 2) + 4 * math.ceil(elements / NF4_BLOCK)


def int8_bytes(inner: int, outer: int) -> int:
    """A matrix (out, in) in bitsandbytes' int8: a byte an element, and a float32 scale a row."""
    return outer * (inner + 4)


def base_bytes(shape: Shape, dtype: str, quantize: Quantize = "none") -> int:
    """The base's weights in memory. Quantised are the layers' matrices; embedding, head and norms stay in `dtype`."""
    if quantize == "none":
        return shape.parameters * BYTES[dtype]
    sizes = list(shape.matrices.values())
    held = sum(nf4_bytes(i * o) if quantize == "nf4" else int8_bytes(i, o) for i, o in sizes)
    rest = shape.parameters - shape.layers * sum(i * o for i, o in sizes)
    return shape.layers * held + rest * BYTES[dtype]


def activation_bytes(shape: Shape, options: Options, kind: Kind) -> int:
    """What the backward pass of `batch` rows needs kept, as autograd keeps it of a Llama with fused kernels.

    A layer keeps the input of both norms, queries, keys, values and attention's output, the gate's output
    and the other projection (`kernels.fused`); a trained matrix its input; a LoRA factor its inputs and
    dropout's mask of a byte an element. With checkpointing only a layer's input stays, and one layer is
    computed again at a time.
    """
    size, tokens = BYTES[options.dtype], options.batch * options.length
    chosen = expert_layers(shape, options)
    through = shape.layers - min(chosen)  # the backward pass ends at the lowest layer with experts
    token, own = _layer_bytes(shape, options, kind)
    kept = through * size * shape.hidden + token + own if options.checkpointing else through * token + len(chosen) * own
    return tokens * kept + head_bytes(shape, options)


def head_bytes(shape: Shape, options: Options) -> int:
    """What the head and its loss hold: the logits of some tokens at a time, and the gradient of all their states."""
    predicted = math.ceil(PREDICTED * options.batch * options.length)
    logits = min(predicted, HEAD_ROWS) * shape.vocabulary * LOGIT_BYTES
    return logits + predicted * shape.hidden * BYTES[options.dtype]


def _layer_bytes(shape: Shape, options: Options, kind: Kind) -> tuple[int, int]:
    """What a layer keeps of one token, and what an expert in it keeps beside."""
    size = BYTES[options.dtype]
    vectors = 2 * (shape.hidden + shape.query + shape.key + shape.inner)
    token = size * vectors + 8 + 4 * shape.heads
    if kind == "ffn":
        return token, size * (shape.hidden + shape.inner)
    inputs = [shape.matrices[name][0] for name in MODULES[options.modules]]
    return token, (size + 1) * sum(inputs) + size * options.rank * len(inputs)


def token_flops(shape: Shape, options: Options, kind: Kind, trained: int) -> int:
    """Floating-point operations to train on one token: 2 a parameter for each product that is needed.

    Forward through all, backward to activations from the head down to the lowest layer with experts, and
    for what is trained the weights' gradients; LoRA factors cost all three beside the base. So a model
    trained whole costs 6 a parameter, a frozen one 4. Looking up an embedding and attention's own
    products are left out. Checkpointing computes the layers again.
    """
    through = shape.parameters - (0 if shape.tied else shape.embedding)
    first = min(expert_layers(shape, options))
    above = through - first * shape.layer
    again = (shape.layers - first) * shape.layer if options.checkpointing else 0
    return 2 * (through + above + again) + (2 if kind == "ffn" else 6) * trained


def training(
    name: str,
    shape: Shape,
    options: Options,
    kind: Kind,
    trained: int,
    quantize: Quantize = "none",
    optimizer: Optimizer = "AdamW",
    passes: int = 1,
    processes: int = 1,
    sharding: Sharding = "fsdp",
) -> Training:
    """What it needs to train so many parameters at once, `passes` before each step.

    Trained weights and their gradients are float32, and where `dtype` is not, the forward pass holds
    a copy of them in it; all that is frozen is held in `dtype`, or quantised.

    Args:
        processes: that hold a shard each of weights, gradients and states; the rows of `options` are one's own. They
            gather the whole weights of what is computed in `dtype`, so that no other copy is made.
        sharding: zero3 keeps its shard of what is trained in `dtype` too.
    """
    size, layers = BYTES[options.dtype], len(expert_layers(shape, options))
    copies = 0 if options.dtype == "float32" else size * trained
    held, gathered = 4 * trained, 0
    frozen = base_bytes(shape, options.dtype, quantize) - (trained * size if kind == "ffn" else 0)
    a_layer = options.batch * options.length * sum(_layer_bytes(shape, options, kind))
    if processes > 1:
        factors = trained / layers if kind == "lora" else 0
        gathered = math.ceil(size * (2 * (shape.layer + factors) + shape.embedding))
        held += size * trained if sharding == "zero3" else 0
        copies, a_layer = 0, a_layer + math.ceil((size + 4) * trained / layers)  # whole gradients, and in float32
    return Training(
        name,
        trained,
        weights=math.ceil((frozen + held) / processes),
        copies=copies,
        gradients=math.ceil(4 * trained / processes),
        states=math.ceil(STATES[optimizer] * trained / processes),
        activations=activation_bytes(shape, options, kind),
        layer=a_layer + math.ceil(copies / layers),
        token_flops=token_flops(shape, options, kind, trained),
        passes=passes,
        gathered=gathered,
    )


def trained_by(shape: Shape, options: Options, kind: Kind) -> int:
    """Elements that one expert trains."""
    layers = len(expert_layers(shape, options))
    return layers * shape.ffn if kind == "ffn" else adapter_parameters(shape, options.rank, options.modules, layers)


def trainings(shape: Shape, options: Options) -> list[Training]:
    """Every way to train one expert."""
    ffn, adapter = (trained_by(shape, options, kind) for kind in ("ffn", "lora"))
    return [
        training("FFN", shape, options, "ffn", ffn),
        training("FFN, 8-bit AdamW", shape, options, "ffn", ffn, optimizer="8-bit AdamW"),
        training("LoRA", shape, options, "lora", adapter),
        training("LoRA, 4-bit base", shape, options, "lora", adapter, quantize="nf4"),
    ]


def bytes_of(text: str, unit: str = "b") -> float | None:
    """A size such as `24GB`, `1.5 GiB` or `200-mb` in bytes; None for what is none. Without a unit it is in `unit`."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)[\s_-]*([a-z]+)?", text.strip().lower())
    factor = UNITS.get((size[2] or unit) if size else "")
    return float(size[1]) * factor if size and factor else None


def expert_bytes(text: str | None) -> int | None:
    """The memory that `--expert-memory` gives, in bytes; None where it is not given.

    Raises:
        RecipeError: no size.
    """
    size = None if text is None else bytes_of(text)
    if text is not None and not size:
        raise RecipeError(f"--expert-memory {text!r} is no size: give one such as 200MB or 1.5GB")
    return None if size is None else int(size)


def find_card(name: str) -> Card:
    """A card by name, or by its memory: `24GB`, `80 GiB`.

    Raises:
        RecipeError: neither.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key in CARDS:
        return CARDS[key]
    size = bytes_of(key, "gb")
    if size:
        return Card(size)
    near = difflib.get_close_matches(key, CARDS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"give its memory, such as 24GB, or one of {', '.join(CARDS)}"
    raise RecipeError(f"gpu {name!r} is not known: {hint}")
