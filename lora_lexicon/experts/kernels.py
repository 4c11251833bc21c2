"""Liger's fused kernels on a Llama while it trains (Hsu et al., 2024, arXiv:2410.10989): norms, rotary positions, and
the FFN's activation and product in one. The head and its loss stay ours: they see definition tokens alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn
from transformers.models.llama import modeling_llama

from lora_lexicon.errors import MissingExtraError, RecipeError

PATCHED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # names of modeling_llama that Liger replaces


def check_kernels(device: torch.device) -> None:
    """Raises RecipeError where Liger's kernels cannot run."""
    if device.type != "cuda":
        raise RecipeError("liger is true, and its kernels need a GPU: use liger=false")


def need_kernels() -> None:
    """Raises MissingExtraError where Liger's kernels are not installed."""
    if find_spec("liger_kernel") is None:
        raise MissingExtraError("liger", "liger-kernel", "liger")


@contextmanager
def liger_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, a Llama computes with Liger's kernels; afterwards it, and every other one, is as it was."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    names = {name: getattr(modeling_llama, name) for name in PATCHED}
    modules = [(module, dict(vars(module))) for module in model.modules()]
    try:
        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for name, value in names.items():
            setattr(modeling_llama, name, value)
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)
