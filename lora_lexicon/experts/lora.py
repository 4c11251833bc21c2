"""The grouped LoRA layer: N adapters on one linear layer, a different one for each row of the batch.

After LoRA (Hu et al., 2021, arXiv:2106.09685): y = W x + s B A x, here with the factors of all
adapters stacked, so that a batch which mixes experts costs one batched product per projection.
Knows nothing of routers; which expert serves which row it reads from `ActiveRouting`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.routed import ActiveRouting


@dataclass(frozen=True)
class Factors:
    """One adapter's update of one linear layer: y += scaling * (x @ a) @ b, with a (in, r) and b (r, out)."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory: its name, and its factors by the full name of the layer they update."""

    name: str
    factors: Mapping[str, Factors]


class GroupedLinear(nn.Module):
    """A linear layer with N low-rank updates, chosen per row of the batch.

    y_b = W x_b + sum_n weights[b, n] * scaling_n * (x_b A_n) B_n

    Only the k experts with weight are gathered, and laid side by side along the rank: one product
    in, one out, whatever k is. A row without weights gets exactly the base's output, and what a row
    gets does not depend on the other adapters held: N may grow without changing a bit.

    Attributes:
        a: (N, in, r), b: (N, r, out), r the largest rank; smaller ones are padded with zeros.
        scaling: (N,) float32.
    """

    def __init__(self, base: nn.Module, factors: Sequence[Factors | None], active: ActiveRouting) -> None:
        super().__init__()
        self.base = base
        self.active = active
        present = [f for f in factors if f is not None]
        rank, n = max(f.a.shape[1] for f in present), len(factors)
        a = present[0].a.new_zeros(n, present[0].a.shape[0], rank)
        b = present[0].b.new_zeros(n, rank, present[0].b.shape[1])
        for i, f in enumerate(factors):
            if f is not None:
                a[i, :, : f.a.shape[1]] = f.a
                b[i, : f.b.shape[0]] = f.b
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self.scaling: Tensor
        self.register_buffer(
            "scaling", torch.tensor([f.scaling if f else 0.0 for f in factors], device=a.device), False
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, in), B the routing's batch -> (B, T, out). Without an active routing: the base alone."""
        y = self.base(x)
        if self.active.weights is None:
            return y
        index, gains = self.active.index, self.active.gains  # (B, k)
        if len(index) != len(x):
            raise ExpertError(f"a batch of {len(x)} rows meets a routing of {len(index)} rows")
        gains = gains * self.scaling[index]
        if index.shape[1] == 1:
            a, b, gains = (
                self.a[index[:, 0]],
                self.b[index[:, 0]],
                gains[:, :, None],
            )  # (B, in, r), (B, r, out), (B, 1, 1)
        else:
            a = self.a[index].transpose(1, 2).flatten(2)  # (B, in, k * r)
            b = self.b[index].flatten(1, 2)  # (B, k * r, out)
            gains = gains.repeat_interleave(self.a.shape[2], dim=1)[:, None, :]  # (B, 1, k * r)
        low = torch.bmm(x.to(a.dtype), a) * gains.to(a.dtype)  # (B, T, k * r)
        return y + torch.bmm(low, b).to(y.dtype)


def group_adapters(model: nn.Module, adapters: Sequence[LoadedAdapter], active: ActiveRouting) -> None:
    """Puts the adapters on the model's linear layers; expert n of a routing is `adapters[n]`.

    A model that holds grouped layers already gets the new ones in their place, so adding or
    removing an adapter is a call with another list; an empty list leaves the base.

    Raises:
        ExpertError: an adapter updates a layer that the model lacks, or one of another shape.
    """
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, GroupedLinear)]:
        _replace(model, name, module.base)
    layers = dict(model.named_modules())
    for adapter in adapters:
        for name, f in adapter.factors.items():
            _check(adapter.name, name, f, layers.get(name))
    for name in sorted({name for adapter in adapters for name in adapter.factors}):
        device = next(layers[name].parameters()).device
        factors = [_on(adapter.factors.get(name), device) for adapter in adapters]
        _replace(model, name, GroupedLinear(layers[name], factors, active))


def _check(adapter: str, name: str, factors: Factors, layer: nn.Module | None) -> None:
    if layer is None:
        raise ExpertError(f"expert {adapter!r} updates {name}, which the base lacks: it was trained on another base")
    fits = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    shape = (factors.a.shape[0], factors.b.shape[1])
    if fits != shape:
        raise ExpertError(
            f"expert {adapter!r}: {name} maps {shape[0]} to {shape[1]} features, the base's {fits[0]} to {fits[1]}"
        )


def _on(factors: Factors | None, device: torch.device) -> Factors | None:
    return factors and Factors(factors.a.to(device), factors.b.to(device), factors.scaling)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
