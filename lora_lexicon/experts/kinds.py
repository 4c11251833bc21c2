"""The two kinds of expert, as parameters to train on a base: LoRA factors on some of its layers, or its own FFNs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts import processes
from lora_lexicon.experts.base import Base, ffn_modules
from lora_lexicon.experts.checkpoint import (
    RECORD,
    check_base,
    load_adapter,
    read_adapter_config,
    read_expert,
    save_ffn,
    save_lora,
)
from lora_lexicon.experts.loop import trained
from lora_lexicon.experts.lora import Factors, Owners, adapters_in_training, check_fit, new_factors
from lora_lexicon.experts.shape import Shape
from lora_lexicon.recipe import ATTENTION_MODULES, FFN_MODULES, TrainRecipe

# What is trained, and what saves its tensors in a folder.
Expert = tuple[dict[str, nn.Parameter], Callable[[Mapping[str, Tensor], Path], None]]


@contextmanager
def trainable(
    base: Base, recipe: TrainRecipe, domains: Sequence[str], start_from: Path | None, owners: Owners
) -> Iterator[list[Expert]]:
    """Makes the parameters of an expert for each domain; afterwards the base is as it was.

    The one place where the kinds differ.

    Args:
        start_from: an adapter to branch from, which `check_start` has accepted.
    """
    make = _lora_experts if recipe.kind == "lora" else _ffn_expert
    try:
        with make(base, recipe, domains, start_from, owners) as experts:
            yield experts
    finally:
        _freeze(base.model)


@contextmanager
def _lora_experts(
    base: Base, recipe: TrainRecipe, domains: Sequence[str], start_from: Path | None, owners: Owners
) -> Iterator[list[Expert]]:
    layers = _layers(base.shape, recipe)
    start = load_adapter(start_from).factors if start_from else None
    configs, factors = [], []
    for domain in domains:
        config = _config(base.name, base.layers, recipe, recipe.rank_for(domain))
        if start is not None:
            factors.append({name: start[name] for name in layers})
        else:
            scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
            factors.append(new_factors(base.model, layers, config.r, scaling, recipe.seed))
        configs.append(config)
    with adapters_in_training(base.model, factors, owners, recipe.dropout) as training:

        def save(n: int, tensors: Mapping[str, Tensor], folder: Path) -> None:
            own = {
                name: Factors(tensors[f"{name}.a.{n}"], tensors[f"{name}.b.{n}"], f.scaling)
                for name, f in factors[n].items()
            }
            save_lora(configs[n], own, folder, dtype=base.model.dtype)

        yield [(parameters, partial(save, n)) for n, parameters in enumerate(training)]


@contextmanager
def _ffn_expert(
    base: Base, recipe: TrainRecipe, domains: Sequence[str], start_from: Path | None, owners: Owners
) -> Iterator[list[Expert]]:
    modules = ffn_modules(base.model, recipe.first_layer)
    before = {}
    if not processes.several():  # whose base is their own
        before = {n: {k: v.clone().cpu() for k, v in module.state_dict().items()} for n, module in modules.items()}
    attention = [cast(Any, layer).self_attn for layer in cast(Any, base.model).model.layers]
    dropout = attention[0].attention_dropout
    dtype = base.model.dtype
    try:
        for module in modules.values():  # float32 masters: AdamW's small steps would be lost in 16 bits
            module.float().requires_grad_(True)
            if base.model.device.type == "meta":  # the main process holds its values
                module.to_empty(device="cpu")
        if start_from:
            _merge_adapter(modules, load_adapter(start_from).factors)
        for layer in attention:  # the one dropout a Llama has
            layer.attention_dropout = recipe.dropout
        yield [(trained(base.model), partial(save_ffn, dtype=dtype))]
    finally:
        for name, state in before.items():
            modules[name].to(dtype).load_state_dict(state)
        for layer in attention:
            layer.attention_dropout = dropout


def _freeze(model: PreTrainedModel) -> None:
    model.requires_grad_(False).eval()
    model.zero_grad()
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()


def _layers(shape: Shape, recipe: TrainRecipe) -> list[str]:
    """The full names of the linear layers that an expert trains or updates, in the model's order."""
    wanted = {*FFN_MODULES, *(ATTENTION_MODULES if recipe.kind == "lora" and recipe.attention else ())}
    named = {name: name.split(".") for name in shape.linear}
    return [name for name, parts in named.items() if int(parts[2]) >= recipe.first_layer and parts[-1] in wanted]


def _config(base: str, layers: int, recipe: TrainRecipe, rank: int) -> LoraConfig:
    """What PEFT needs to read the adapter; it does not name this machine's path of the base."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, recipe.alpha),
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=[*FFN_MODULES, *(ATTENTION_MODULES if recipe.attention else ())],
        layers_to_transform=list(range(recipe.first_layer, layers)),
        layers_pattern="layers",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def check_start(
    path: Path, shape: Shape, base: str, identity: str, recipe: TrainRecipe, domains: Sequence[str]
) -> None:
    """Refuses to branch from an adapter of another base, or of other layers, rank or scaling than the recipe's.

    Args:
        identity: the fingerprint of `base`; "" is not compared.

    Raises:
        ExpertError: saying in what they differ.
    """
    if identity and (path / RECORD).is_file():
        check_base(read_expert(path), identity, base)
    adapter, layers = load_adapter(path), _layers(shape, recipe)
    check_fit(shape.linear, adapter)
    if recipe.kind == "ffn":
        odd = sorted({*adapter.factors} - {*layers})
        if odd:
            raise ExpertError(
                f"{path} updates {odd[0]}, which an ffn expert does not own: branch from an adapter on its FFNs"
            )
        return
    theirs = read_adapter_config(path)
    for domain in domains:
        config = _config(base, shape.layers, recipe, recipe.rank_for(domain))
        for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            if getattr(theirs, key) != getattr(config, key):
                raise ExpertError(
                    f"{path} has {key} {getattr(theirs, key)}, the recipe says {getattr(config, key)}: "
                    "an expert branches from an adapter of its own shape"
                )
    if {*adapter.factors} != {*layers}:
        odd = sorted({*layers} ^ {*adapter.factors})
        raise ExpertError(f"{path} and the recipe do not train the same layers: they differ at {odd[0]}")


def _merge_adapter(modules: dict[str, nn.Module], factors: Mapping[str, Factors]) -> None:
    """Adds an adapter's updates to the FFNs that will be trained."""
    own = {f"{name}.{child}": layer for name, module in modules.items() for child, layer in module.named_children()}
    with torch.no_grad():
        for name, f in factors.items():
            weight = cast(Tensor, own[name].weight)
            weight += f.delta.to(weight.device)
