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
        start_from: an adapter to branch from.

    Raises:
        ExpertError: it does not fit.
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
    layers = _lora_layers(base, recipe)
    start = _start(start_from, base) if start_from else None
    configs, factors = [], []
    for domain in domains:
        config = _config(base, recipe, recipe.rank_for(domain))
        if start_from and start is not None:
            _check_start(config, layers, start, start_from)
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
            _merge_adapter(modules, _start(start_from, base), start_from)
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


def _lora_layers(base: Base, recipe: TrainRecipe) -> list[str]:
    """The full names of the linear layers that LoRA experts update."""
    wanted = {*FFN_MODULES, *(ATTENTION_MODULES if recipe.attention else ())}
    return [
        f"model.layers.{i}.{name}"
        for i, layer in enumerate(cast(Any, base.model).model.layers)
        if i >= recipe.first_layer
        for name, _ in layer.named_modules()
        if name.rpartition(".")[2] in wanted
    ]


def _config(base: Base, recipe: TrainRecipe, rank: int) -> LoraConfig:
    """What PEFT needs to read the adapter; it does not name this machine's path of the base."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, recipe.alpha),
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=[*FFN_MODULES, *(ATTENTION_MODULES if recipe.attention else ())],
        layers_to_transform=list(range(recipe.first_layer, base.layers)),
        layers_pattern="layers",
        base_model_name_or_path=base.name,
        inference_mode=True,
    )


def _start(path: Path, base: Base) -> Mapping[str, Factors]:
    """The factors of the adapter to branch from, if it was trained on this base (as far as one can tell)."""
    if (path / RECORD).is_file():
        check_base(read_expert(path), base.fingerprint, base.name)
    adapter = load_adapter(path)
    check_fit(base.model, adapter)
    return adapter.factors


def _merge_adapter(modules: dict[str, nn.Module], factors: Mapping[str, Factors], path: Path) -> None:
    """Adds an adapter's updates to the FFNs that will be trained; it may update nothing else."""
    own = {f"{name}.{child}": layer for name, module in modules.items() for child, layer in module.named_children()}
    odd = sorted(set(factors) - set(own))
    if odd:
        raise ExpertError(
            f"{path} updates {odd[0]}, which an ffn expert does not own: branch from an adapter on its FFNs"
        )
    with torch.no_grad():
        for name, f in factors.items():
            weight = cast(Tensor, own[name].weight)
            weight += f.delta.to(weight.device)


def _check_start(config: LoraConfig, layers: Sequence[str], factors: Mapping[str, Factors], path: Path) -> None:
    """Refuses to branch from an adapter of another rank, scaling or layers than the recipe's."""
    theirs = read_adapter_config(path)
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(theirs, key) != getattr(config, key):
            raise ExpertError(
                f"{path} has {key} {getattr(theirs, key)}, the recipe says {getattr(config, key)}: "
                "an expert branches from an adapter of its own shape"
            )
    if set(factors) != set(layers):
        odd = sorted({*layers} ^ {*factors})[0]
        raise ExpertError(f"{path} and the recipe do not train the same layers: they differ at {odd}")
