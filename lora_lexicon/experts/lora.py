"""LoRA adapters in memory, and their training: N of them on one linear layer, each on tokens of its own.

After LoRA (Hu et al., 2021, arXiv:2106.09685): y = W x + s B A x. Each adapter's factors are parameters of their own,
and its tokens lie together in the batch: what N adapters learn there is what each would learn alone. Whose tokens those
are it reads from `Owners`. How adapters answer is `experts.grouped`'s work.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.shape import misfits


@dataclass(frozen=True)
class Factors:
    """One adapter's update of one linear layer: y += scaling * (x @ a) @ b, with a (in, r) and b (r, out)."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def delta(self) -> Tensor:
        """What the factors add to the layer's weight: s B A, (out, in) float32."""
        return (self.b.float().T @ self.a.float().T) * self.scaling


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory: its name, and its factors by the full name of the layer they update."""

    name: str
    factors: Mapping[str, Factors]


class Owners:
    """Whose tokens the batch in flight holds.

    Attributes:
        spans: (adapter, tokens) in the order of the batch's tokens; one adapter alone serves a batch of any
            size; None: the base alone.
    """

    def __init__(self) -> None:
        self.spans: Sequence[tuple[int, int]] | int | None = None

    @contextmanager
    def of(self, spans: Sequence[tuple[int, int]] | int) -> Iterator[None]:
        """Sets `spans` for the passes inside."""
        before, self.spans = self.spans, spans
        try:
            yield
        finally:
            self.spans = before


class TrainedLinear(nn.Module):
    """A linear layer with the factors of N adapters in training, each adapter serving the tokens that are its own."""

    def __init__(self, base: nn.Module, factors: Sequence[Factors], owners: Owners, dropout: float) -> None:
        super().__init__()
        self.base, self.owners, self.dropout = base, owners, dropout
        device = next(base.parameters()).device
        if device.type == "meta":  # of a base that another process holds
            device = torch.device("cpu")
        self.a = nn.ParameterList(nn.Parameter(f.a.to(device, torch.float32, copy=True)) for f in factors)
        self.b = nn.ParameterList(nn.Parameter(f.b.to(device, torch.float32, copy=True)) for f in factors)
        self.scalings = [f.scaling for f in factors]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, in) -> (B, T, out)."""
        spans = self.owners.spans
        if spans is None:
            return self.base(x)
        if isinstance(spans, int):
            spans = [(spans, x.shape[:-1].numel())]
        dropping = self.training and self.dropout > 0
        y, weight = (self.base(x), None) if dropping else _product(self.base, x)
        x = nn.functional.dropout(x, self.dropout, dropping)
        factors = [factor for n, _ in spans for factor in (self.a[n], self.b[n])]
        scalings = [self.scalings[n] for n, _ in spans]
        return cast(Tensor, _Updated.apply(y, x, weight, [count for _, count in spans], scalings, *factors))


def _product(base: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The base's output; or, where it is nothing but a product with a weight of its own, None and that weight."""
    if type(base) is nn.Linear and base.bias is None and not hasattr(base.weight, "ds_id"):  # ZeRO's is not there yet
        return None, base.weight
    return base(x), None


class _Updated(Function):
    """y, to which each run of tokens adds scaling * (x @ a) @ b of its own factors (Hu et al., 2021).

    Autograd's own way through the same products would copy y thrice more forward and x thrice backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        counts: Sequence[int],
        scalings: Sequence[float],
        *factors: Tensor,
    ) -> Tensor:
        """y (..., out), changed in place, or None and a frozen weight (out, in): then it is x times that.

        x is (..., in); of each run there is its number of tokens and its factors a (in, r), b (r, out).
        """
        dtype = factors[0].dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        inputs = x.flatten(0, -2).to(dtype)
        if y is None:
            y = (inputs @ cast(Tensor, weight).to(dtype).T).unflatten(0, x.shape[:-1])
        else:
            ctx.mark_dirty(y)
        lows = []
        own = zip(inputs.split(counts), y.view(-1, y.shape[-1]).split(counts), strict=True)
        for (read, written), scaling, a, b in zip(own, scalings, factors[::2], factors[1::2], strict=True):
            lows.append((read @ a.to(dtype)) * scaling)
            written.addmm_(lows[-1].to(written.dtype), b.to(written.dtype))
        ctx.save_for_backward(inputs, weight, *lows, *factors)
        ctx.counts, ctx.scalings, ctx.like = counts, scalings, (x.shape, x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (inputs, weight, *saved) = gradients, ctx.saved_tensors
        lows, factors = saved[: len(ctx.counts)], saved[len(ctx.counts) :]
        outputs, (shape, dtype) = gradient.flatten(0, -2).to(inputs.dtype), ctx.like
        inner = None
        if ctx.needs_input_grad[1]:
            inner = torch.zeros_like(inputs) if weight is None else outputs @ weight.to(inputs.dtype)
        into = inner.split(ctx.counts) if inner is not None else ()
        own = zip(inputs.split(ctx.counts), outputs.split(ctx.counts), strict=True)
        found: list[Tensor] = []
        for n, ((read, written), low, scaling) in enumerate(zip(own, lows, ctx.scalings, strict=True)):
            a, b = factors[2 * n : 2 * n + 2]
            reached = (written @ b.to(low.dtype).T) * scaling
            if into:
                into[n].addmm_(reached, a.to(low.dtype).T)
            found += [(read.T @ reached).to(a.dtype), (low.T @ written).to(b.dtype)]
        inner = inner if inner is None else inner.view(shape).to(dtype)
        return gradient if weight is None else None, inner, None, None, None, *found


@contextmanager
def adapters_in_training(
    model: nn.Module, adapters: Sequence[Mapping[str, Factors]], owners: Owners, dropout: float
) -> Iterator[list[dict[str, nn.Parameter]]]:
    """Puts trainable copies of the adapters' factors on the model; afterwards it is as it was.

    Args:
        adapters: factors by the full name of the layer they update; all on the same layers.

    Yields:
        each adapter's parameters by their names in the model: LAYER.a.N and LAYER.b.N of adapter N.
    """
    layers = dict(model.named_modules())
    ours = {
        name: TrainedLinear(layers[name], [adapter[name] for adapter in adapters], owners, dropout)
        for name in adapters[0]
    }
    for name, layer in ours.items():
        replace_module(model, name, layer)
    try:
        yield [
            {f"{name}.{half}.{n}": getattr(layer, half)[n] for name, layer in ours.items() for half in "ab"}
            for n in range(len(adapters))
        ]
    finally:
        for name, layer in ours.items():
            replace_module(model, name, layer.base)


def new_factors(model: nn.Module, layers: Sequence[str], rank: int, scaling: float, seed: int) -> dict[str, Factors]:
    """The factors that training begins with, as PEFT begins: A uniform (Kaiming), B zero, so that nothing changes yet.

    The seed alone decides them, so that an adapter begins alike alone and among others.
    """
    modules, chance = dict(model.named_modules()), torch.Generator().manual_seed(seed)
    found = {}
    for name in layers:
        features = (int(getattr(modules[name], key)) for key in ("in_features", "out_features"))
        inner, outer = features
        a = torch.empty(rank, inner)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=chance)
        found[name] = Factors(a.T.contiguous(), torch.zeros(rank, outer), scaling)
    return found


def check_fit(linear: Mapping[str, tuple[int, int]], adapter: LoadedAdapter) -> None:
    """Raises ExpertError unless a base's `linear` layers (in, out) have each one that the adapter updates."""
    sizes = {name: (f.a.shape[0], f.b.shape[1]) for name, f in adapter.factors.items()}
    for fault in misfits(linear, adapter.name, sizes):
        raise ExpertError(fault)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of that full name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
