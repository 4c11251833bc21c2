"""A frozen dataclass per stage, read from YAML plus `key=value`. Imports only `errors`.

A field is documented beside it, from where `make docs` takes it into docs/recipes.md; its default suits any base, and
what the embedded one wants is in `configs/tiny`. An unknown key fails and names its nearest neighbour.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_lexicon.errors import LexiconError, RecipeError
from lora_lexicon.folders import read_bounded

R = TypeVar("R")
Experiment = Literal["table-2", "table-3", "table-4", "table-6", "tables-7-8", "figure-4", "figure-5", "figure-7"]
MAX_YAML_BYTES = 2**20
FFN_MODULES = ("gate_proj", "up_proj", "down_proj")
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class DomainsRecipe:
    """How entries become domains (section 3.2 and appendix A of the paper)."""

    domains: int = 4  # how many: N
    # balanced: of equal size; lexical: so too, on TF-IDF of the prompts; none: one domain
    method: Literal["balanced", "kmeans", "lexical", "random", "none"] = "balanced"
    embedder: str = "base"  # base, st:NAME, hf:NAME or tfidf
    layers: int = 2  # `base` embedder: how many bottom layers it reads; experts start above them
    pool: Literal["mean", "last"] = "last"  # `base` embedder: the prompt's last token, or the mean of its tokens
    centre: bool = True  # take the training vectors' mean off before comparing
    max_iterations: int = 1000  # of the clustering
    tolerance: float = 1e-8  # the part of the inertia that an iteration must gain for another to follow
    seed: int = 42  # of the clustering
    # what scores domains: cosine to centroids; or, learned, a projection of them (Nexus) or a linear discriminant
    router: Literal["centroid", "projection", "linear"] = "centroid"
    top_k: int = 1  # experts a prompt is sent to
    temperature: float = 0.05  # softmax over similarities / temperature when top_k > 1, and when a router is learned
    abstain_quantile: float = 0.0  # below this quantile of a domain's own similarities the base answers; 0: never


@dataclass(frozen=True)
class LoopRecipe:
    """How anything is trained on definitions (section 4.1, appendix A and table 12 of the paper)."""

    epochs: float = 1.0  # how often the rows are read
    max_steps: int = -1  # stop after this many steps; -1: `epochs` decides
    batch_size: int = 32  # rows a batch (of each expert)
    gradient_accumulation: int = 1  # batches a step
    learning_rate: float = 2e-3  # the highest, at the end of the warm-up
    minimum_learning_rate: float = 0.0  # where the cosine schedule ends
    warmup_ratio: float = 0.06  # the part of the steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled, as AdamW has it
    adam_beta2: float = 0.999  # of the squared gradients' mean; beta 1 is 0.9
    max_length: int = 128  # tokens, prompt and definition together
    optimizer: str = "adamw_torch_fused"  # any of transformers' names, such as adamw_bnb_8bit (with 8-bit states)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of what is frozen, and of the arithmetic
    gradient_checkpointing: bool = False  # compute activations again for the backward pass, and keep fewer
    valid_rows: int = 200  # validation rows for each evaluation
    checkpoints: int = 4  # how many times, evenly spread, a state to resume from is written; 0: never
    seed: int = 42  # of the rows' order, of new weights and of dropout


@dataclass(frozen=True)
class TrainRecipe(LoopRecipe):
    """How one expert is trained."""

    kind: Literal["lora", "ffn"] = "lora"  # an adapter, or the base's FFNs themselves
    first_layer: int = 2  # experts live in this layer and above; below it everything is the base's
    rank: int = 16  # of a LoRA adapter
    alpha: float = 32.0  # LoRA's updates are scaled by alpha / rank
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dropout: float = 0.0  # of a LoRA adapter's inputs; with kind ffn, of the attention weights
    attention: bool = False  # LoRA on the attention projections too
    rank_of: dict[str, int] = dataclasses.field(default_factory=dict)  # the rank of the domains named, such as {act: 8}
    quantize: Literal["none", "nf4", "int8"] = "none"  # hold the base in 4 or 8 bits (kind lora)
    liger: bool = False  # Liger's fused kernels, on a GPU
    pass_tokens: int = 8192  # the most tokens that the base reads at once; a step of more is read in parts
    evaluations: int = 0  # how often, evenly spread, validation loss and BLEU are measured; 0: never
    early_stopping: int = 0  # evaluations without a better BLEU before training stops; 0: never

    def rank_for(self, domain: str) -> int:
        """The rank of a domain's adapter."""
        return self.rank_of.get(domain, self.rank)


@dataclass(frozen=True)
class RouterRecipe(LoopRecipe):
    """How a merged MoE's choices are trained on all domains together (sections 3.3 and 4.1)."""

    train: Literal["gates", "temperature", "experts"] = "gates"  # experts: they, and what chooses
    balance: float = 0.01  # weight of the load-balance loss of token gates (Switch, arXiv:2101.03961)


@dataclass(frozen=True)
class RewardRecipe(LoopRecipe):
    """How an outcome reward model is trained (appendix A of the paper, equation 3)."""

    samples: int = 32  # definitions sampled for each prompt
    keep: int = 8  # how many of them, the likeliest that differ, stand against the gold definition
    first_layer: int = 0  # the adapter is in this layer and above
    rank: int = 16  # of the adapter
    alpha: float = 32.0  # the adapter's updates are scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's inputs
    attention: bool = True  # the adapter is on the attention projections too


@dataclass(frozen=True)
class ExperimentRecipe:
    """One table or figure of the LM-Lexicon paper, on a base and data (sections 4.2 and 4.3, appendices B and C)."""

    experiment: Experiment = "table-2"  # which one: docs/experiments.md
    base: str = "tiny"  # a Llama-architecture base: a folder, a Hub name or a shipped one
    data: tuple[str, ...] = ("sample:wordnet",)  # what `data prepare` reads, all together
    test_rows: int = 300  # held-out entries, spread over the test split; 0: all
    seeds: tuple[int, ...] = (21, 42, 84)  # of training, sampling and a random cut; clustering has its own
    domains: str = "tiny/domains"  # the recipe of the cut
    lora: str = "tiny/lora"  # the recipe of LoRA experts
    ffn: str = "tiny/ffn"  # the recipe of FFN experts
    # the recipe of a merged MoE's last training: with `train: experts` of every MoE, else of what chooses by gates
    router: str = "tiny/router"
    reward: str = "tiny/reward"  # the recipe of the reward model (table-2)
    reward_rows: int = 0  # train entries that the reward model reads pairs of, spread over the split; 0: all
    branch: bool = True  # an adapter reads every row first; the dense model and the experts go on from it
    # dense: one model on everything; moe: FFN experts, merged; the adapters': the same with LoRA experts
    systems: tuple[str, ...] = ("base", "dense", "moe", "dense adapter", "mixture of adapters")
    partitions: tuple[str, ...] = ("semantic", "none", "random", "lexical")  # table-3: how the data is cut
    policies: tuple[str, ...] = ("domain", "token-top-1", "token-top-2", "sequence-soft")  # table-4
    experts: tuple[int, ...] = (1, 2, 4, 8)  # figure-5: how many
    samples: tuple[int, ...] = (1, 8)  # N: how many definitions are sampled (table-2 chooses among the most)
    shots: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # figure-7: examples in the prompt
    examples: tuple[str, ...] = ("random", "retrieved")  # figure-7: how they are chosen
    endpoint: str = ""  # figure-7: an OpenAI-compatible address; "": our own server, with `base`
    model: str = "base"  # figure-7: the model's name there
    api: Literal["completions", "chat"] = "completions"  # figure-7: what the address is asked by
    decoding: Literal["sample", "greedy"] = "sample"  # of what is not chosen among samples; the paper samples
    max_tokens: int = 48  # the longest definition
    metrics: tuple[str, ...] = ("bleu", "rouge-l")  # docs/scores.md; those without an encoder
    protocol: Literal["one-to-one", "one-to-many", "one-to-many-term"] = "one-to-one"  # what references count
    drop_zeros: bool = False  # rows that score 0 are left out of a mean, as the paper's code does
    watts: float = 700.0  # of a device, for CO2 (table-6); the paper's
    carbon: float = 0.141  # kg of CO2 a kWh; the paper's


def load_recipe(kind: type[R], /, file: Path | None = None, overrides: Sequence[str] = (), **given: Any) -> R:
    """A recipe from defaults, then `file` (YAML), then `given` (None is left out), then `key=value` overrides.

    Raises:
        RecipeError: a file that is missing or no mapping, an unknown key, or a value of the wrong type.
    """
    import yaml

    values: dict[str, tuple[Any, str]] = {}
    if file is not None:
        for key, value in read_yaml(file, RecipeError, "recipe").items():
            values[str(key)] = (value, str(file))
    values |= {key: (value, "command line") for key, value in given.items() if value is not None}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"--set {override!r} is not key=value")
        try:
            values[key.strip()] = (yaml.safe_load(text), "--set")
        except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
            raise RecipeError(f"--set {override!r}: the value is not valid YAML") from error
    return from_values(kind, values)


def from_values(kind: type[R], values: dict[str, tuple[Any, str]]) -> R:
    """Builds a recipe from `{key: (value, where it was given)}`, checking names and types."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    checked = {}
    for key, (value, where) in values.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            mapping, dot, inner = key.partition(".")
            if dot and typing.get_origin(hints.get(mapping)) is dict:
                hint = f"did you mean '{mapping}={{{inner}: {value}}}'?"
            raise RecipeError(f"{where}: unknown key {key!r}: {hint}")
        checked[key] = _checked(key, value, hints[key], where)
    return kind(**checked)


def read_yaml(file: Path, error: type[LexiconError], what: str) -> dict[Any, Any]:
    """Reads a YAML mapping; JSON is YAML too.

    Args:
        error: the class raised for a file that is missing, too large, or no mapping.
        what: names the file in the message, such as "recipe".
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them, one inside the other, stand for more than fits
                raise ValueError("it holds an alias (*), which is not read: write the value itself there")
            return super().compose_node(parent, index)

    try:
        held = read_bounded(file, MAX_YAML_BYTES)
        if held is None:
            raise error(f"{what} {file} is larger than {MAX_YAML_BYTES >> 20} MiB: it cannot be one")
        content = yaml.load(held.decode(), Loader)
    except FileNotFoundError as cause:
        raise error(f"{what} {file} does not exist") from cause
    except OSError as cause:
        raise error(f"{what} {file} cannot be read: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError, yaml.YAMLError) as cause:
        said = "a number of thousands of digits" if "digits" in str(cause) else " ".join(str(cause).split())
        raise error(f"{what} {file} is not readable YAML: {said}") from cause
    if not isinstance(content, dict):
        raise error(f"{what} {file} must be a mapping of keys to values")
    return content


def _checked(key: str, value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise RecipeError(f"{where}: {key} is {value!r}; it must be one of {', '.join(map(str, options))}")
        return value
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 1e-6 as a string
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif origin is tuple and isinstance(value, list | tuple):
        if all(_is(item, typing.get_args(hint)[0]) for item in value):
            return tuple(value)
    elif _is(value, origin or hint):
        inner = typing.get_args(hint)
        items = typing.cast(dict[Any, Any], value).items() if inner else ()
        if all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in items):
            return value
    expected = hint.__name__ if origin is None else str(hint)
    if origin is tuple:
        expected = f"list of {typing.get_args(hint)[0].__name__}"
    raise RecipeError(f"{where}: {key} is {value!r}; it must be of type {expected}")


def _is(value: Any, kind: type) -> bool:
    """`isinstance`, but True and False are no integers."""
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
