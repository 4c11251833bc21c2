"""What lies between a frozen Llama's products while it trains, in few passes over memory: norms, rotary positions, and
the FFN's activation and product. By Liger's kernels (Hsu et al., 2024, arXiv:2410.10989), or by functions here, whose
gradients are written out: autograd's own way through the same formulas reads and writes each several times more. The
head and its loss are elsewhere: they see definition tokens alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from lora_lexicon.errors import MissingExtraError, RecipeError

PATCHED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # names of modeling_llama that are replaced


def check_kernels(device: torch.device) -> None:
    """Raises RecipeError where Liger's kernels cannot run."""
    if device.type != "cuda":
        raise RecipeError("liger is true, and its kernels need a GPU: use liger=false")


def need_kernels() -> None:
    """Raises MissingExtraError where Liger's kernels are not installed."""
    if find_spec("liger_kernel") is None:
        raise MissingExtraError("liger", "liger-kernel", "liger")


@contextmanager
def fused(model: PreTrainedModel, liger: bool = False) -> Iterator[None]:
    """Inside, a Llama computes with fused kernels; afterwards it, and every other one, is as it was."""
    names = {name: getattr(modeling_llama, name) for name in PATCHED}
    modules = [(module, dict(vars(module))) for module in model.modules()]
    try:
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
        else:
            _apply(model)
        yield
    finally:
        for name, value in names.items():
            setattr(modeling_llama, name, value)
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)


def _apply(model: PreTrainedModel) -> None:
    modeling_llama.apply_rotary_pos_emb = _rotated_pair
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm) and not module.weight.requires_grad:
            cast(Any, module).forward = partial(_norm, module)
        elif isinstance(module, modeling_llama.LlamaMLP) and model.config.hidden_act == "silu":
            cast(Any, module).forward = partial(_ffn, module)


def _norm(module: Any, x: Tensor) -> Tensor:
    return cast(Tensor, Norm.apply(x, module.weight, module.variance_epsilon))


def _ffn(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _rotated_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


class Norm(Function):
    """RMSNorm with a frozen weight (Zhang and Sennrich, 2019, arXiv:1910.07467), as transformers' Llama has it.

    x (..., H) -> weight * x / rms(x), computed in float32; the same shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(epsilon).rsqrt_()  # 1 / rms
        ctx.save_for_backward(x, weight, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight) if weight.dtype == x.dtype else weight * normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        wide, inner = x.float(), (gradients[0] * weight).float()
        along = torch.linalg.vecdot(inner, wide).unsqueeze(-1) * scale.pow(3) / -x.shape[-1]
        return inner.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class SwiGLU(Function):
    """silu(gate) * up (Shazeer, 2020, arXiv:2002.05202), all of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (gate, up) = gradients, ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, nn.functional.silu(gate).mul_(gradient)


class Rotary(Function):
    """Rotary positions (Su et al., 2021, arXiv:2104.09864): each pair (x_i, x_{i + d/2}) turned by its token's angles.

    x (B, heads, T, d), cos and sin (B, 1, T, d) of the angles, equal in both halves of d.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, turned = x.shape[-1] // 2, x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned
