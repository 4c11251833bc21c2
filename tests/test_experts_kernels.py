"""The fused functions of a frozen Llama: transformers' own results and gradients, and nothing left behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from lora_lexicon.experts.kernels import fused

SIZES, DTYPES = st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from(["float32", "bfloat16"])


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.3)
    return model.requires_grad_(False)


def result(module: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of their sum weighted by their own cosines."""
    own = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = module(*own)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weighted = [(y * y.detach().cos()).float().sum() for y in outputs]
    return [*outputs, *torch.autograd.grad(sum(weighted), own)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), SIZES, DTYPES)
def test_norms_ffns_and_positions_are_transformers_own(seed: int, tokens: int, size: float, dtype: str) -> None:
    model = llama(seed).to(getattr(torch, dtype))
    layer, chance = model.model.layers[0], torch.Generator().manual_seed(seed)
    x = (torch.randn(1, tokens, 16, generator=chance) * size).to(model.dtype)
    q, k = (torch.randn(1, heads, tokens, 4, generator=chance).to(model.dtype) for heads in (4, 2))
    turns = model.model.rotary_emb(x, torch.arange(tokens)[None])

    def both() -> list[Tensor]:
        turned = result(lambda q, k: modeling_llama.apply_rotary_pos_emb(q, k, *turns), q, k)
        return [*result(layer.input_layernorm, x), *result(layer.mlp, x / size), *turned]

    theirs = both()
    with fused(model):
        ours = both()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **near)


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_a_model_is_trained_through_them_and_is_then_as_it_was(act: str) -> None:
    model, other, ids = llama(hidden_act=act), llama(1), torch.arange(10)[None]
    model.model.norm.weight.requires_grad_(True)  # what is trained keeps transformers' way
    before, others = model(ids).logits, other(ids).logits
    loss = before.square().sum()
    (expected,) = torch.autograd.grad(loss, model.model.norm.weight)
    with fused(model):
        loss = model(ids).logits.square().sum()
    (found,) = torch.autograd.grad(loss, model.model.norm.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(other(ids).logits, others)
