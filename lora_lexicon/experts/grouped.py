"""Adapters that answer: N of them on a model's linear layers, a different one for each row of the batch.

The factors of a batch's rows are laid side by side, so that a batch which mixes experts costs two batched products a
projection, the first of which is one for all layers that read the same input. Knows nothing of routers; which expert
serves which row it reads from `ActiveRouting`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.lora import Factors, LoadedAdapter, check_fit, replace_module
from lora_lexicon.experts.routed import ActiveRouting

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input
Key = tuple[int, tuple[int, ...], str]


@dataclass(frozen=True)
class _Met:
    """What a stack made of an input x under a routing, known by its `index`; `waiting`: the layers still to have it."""

    x: Tensor
    index: Tensor
    low: Tensor
    b: list[Tensor]
    waiting: set[int]


class Stack(nn.Module):
    """The factors of one rank and type on the same layers, which read one input: one product with A serves them all.

    One stack for each rank and each set of layers, instead of padding to the largest: a product's bits depend on its
    sizes, so a newcomer of larger rank, or of more layers, would change what the others compute.

    Attributes:
        layers: the full names of its G layers, siblings of one module.
        key: what it holds: (rank, number of each of its layers among all siblings, type).
        a: of each expert that is held, by its number, (G * r, in): the layers' factors below each other, transposed.
        b: of each layer, of each expert that is held, by its number, (r, out).
        scalings: of each expert that is held, each layer's.
    """

    def __init__(self, layers: Sequence[str], key: Key) -> None:
        super().__init__()
        self.layers, self.key = tuple(layers), key
        self.a = nn.ParameterDict()
        self.b = nn.ModuleList(nn.ParameterDict() for _ in layers)
        self.scalings: dict[int, tuple[float, ...]] = {}
        self._met: _Met | None = None

    def put(self, n: int, factors: Sequence[Factors]) -> None:
        """Holds expert n's factors, one for each layer."""
        self.a[str(n)] = nn.Parameter(torch.cat([f.a.T for f in factors]), requires_grad=False)
        for held, f in zip(self._b, factors, strict=True):
            held[str(n)] = nn.Parameter(f.b, requires_grad=False)
        self.scalings[n] = tuple(f.scaling for f in factors)

    def drop(self, n: int) -> None:
        """Lets go of expert n's factors."""
        del self.scalings[n]
        for held in (self.a, *self._b):
            del held[str(n)]

    def factors(self, n: int, place: int) -> Factors:
        """Expert n's factors of the layer at `place`, without a copy."""
        rank = self.key[0]
        own = self.a[str(n)][place * rank : (place + 1) * rank].T
        return Factors(own, self._b[place][str(n)], self.scalings[n][place])

    def update(self, x: Tensor, place: int, active: ActiveRouting) -> tuple[Tensor, Tensor] | None:
        """(B, T, k * r) and (B, k * r, out), whose product the layer at `place` adds to its output.

        x is (B, T, in). None where the stack holds no row's expert.
        """
        met = self._met
        if met is None or met.x is not x or met.index is not active.index or place not in met.waiting:
            gathered = self._gathered(active)
            if gathered is None:
                return None
            a, *b = gathered
            # The whole product even where one layer asks alone: its bits do not depend on who asked before.
            low = torch.bmm(x.to(a.dtype), a.transpose(1, 2))
            met = _Met(x, active.index, low, b, set(range(len(b))))
        met.waiting.remove(place)
        self._met = met if met.waiting and not torch.is_grad_enabled() else None
        width = met.b[place].shape[1]
        return met.low[..., place * width : (place + 1) * width], met.b[place]

    def _gathered(self, active: ActiveRouting) -> tuple[Tensor, ...] | None:
        """a (B, G * k * r, in) and each layer's b (B, k * r, out) of the experts of each row, weighted and scaled in b.

        They stay the same as long as the routing does, and are kept for it while they are few.
        """
        if self in active.kept:
            return active.kept[self]
        asked = [n for row in active.experts for n in row]
        held = next((n for n in asked if n in self.scalings), None)
        found = None
        if held is not None:
            # What has no weight here, or is held elsewhere, is multiplied by 0.
            own = [n if n in self.scalings else held for n in asked]
            some = [self.scalings[n] if n in self.scalings else (0.0,) * len(self.layers) for n in asked]
            shape, count = active.index.shape, len(self.layers)
            # Side by side along the rank: one product in, one out, whatever k is.
            a = torch.stack([self.a[str(n)] for n in own])
            a = a.unflatten(1, (count, -1)).unflatten(0, shape).transpose(1, 2).flatten(1, 3)
            gains = active.gains[..., None] * torch.tensor(some).view(*shape, count).to(active.gains.device)
            found = (a, *(self._weighted(held, own, gains[..., g]) for g, held in enumerate(self._b)))
        if not torch.is_grad_enabled():
            active.keep(self, found)
        return found

    @staticmethod
    def _weighted(held: nn.ParameterDict, own: Sequence[int], gains: Tensor) -> Tensor:
        """(B, k * r, out) of gains (B, k)."""
        b = torch.stack([held[str(n)] for n in own]).unflatten(0, gains.shape)
        return (b * gains[..., None, None].to(b.dtype)).flatten(1, 2)

    @property
    def _b(self) -> list[nn.ParameterDict]:
        return cast(list[nn.ParameterDict], list(self.b))


class GroupedLinear(nn.Module):
    """A linear layer with N low-rank updates, chosen per row of the batch.

    y_b = W x_b + sum_n weights[b, n] * scaling_n * (x_b A_n) B_n

    A row without weights gets exactly the base's output, and what a row gets does not depend on
    the other adapters held: N may grow without changing a bit.
    """

    def __init__(self, base: nn.Module, active: ActiveRouting) -> None:
        super().__init__()
        self.base = base
        self.active = active
        self.stacks = nn.ModuleList()  # by their keys: the order of the sum is the same whatever came first
        self.places: list[int] = []  # of this layer in each

    def hold(self, stacks: Sequence[tuple[Stack, int]]) -> None:
        """Has these stacks, each with this layer's place in it, in place of those it had."""
        ordered = sorted(stacks, key=lambda own: own[0].key)
        self.stacks, self.places = nn.ModuleList(stack for stack, _ in ordered), [place for _, place in ordered]

    @property
    def held(self) -> list[tuple[Stack, int]]:
        """Its stacks, each with this layer's place in it."""
        return list(zip(cast(Sequence[Stack], self.stacks), self.places, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, in), B the routing's batch -> (B, T, out). Without an active routing: the base alone."""
        y = self.base(x)
        if self.active.weights is None:
            return y
        if len(self.active.index) != len(x):
            raise ExpertError(f"a batch of {len(x)} rows meets a routing of {len(self.active.index)} rows")
        for stack, place in zip(self.stacks, self.places, strict=True):
            update = cast(Stack, stack).update(x, place, self.active)
            if update is not None:
                low, b = update
                y = torch.baddbmm(y, low, b) if y.dtype == b.dtype else y + torch.bmm(low, b).to(y.dtype)
        return y


def group_adapters(model: nn.Module, adapters: Sequence[LoadedAdapter], active: ActiveRouting) -> None:
    """Puts the adapters on the model's linear layers; expert n of a routing is `adapters[n]`.

    A model that holds grouped layers already gets the new ones in their place, so adding or
    removing an adapter is a call with another list; an empty list leaves the base.

    Raises:
        ExpertError: an adapter updates a layer that the model lacks, or one of another shape; the model is as it was.
    """
    linear = linear_layers(model)
    for adapter in adapters:
        check_fit(linear, adapter)
    for n in sorted({n for stack in _stacks(_grouped(model)) for n in stack.scalings}):
        drop_adapter(model, n, active)
    for n, adapter in enumerate(adapters):
        _put(model, n, adapter, active)


def put_adapter(model: nn.Module, n: int, adapter: LoadedAdapter, active: ActiveRouting) -> None:
    """Puts an adapter on the model as expert n of a routing; `drop_adapter` takes it off again.

    Raises:
        ExpertError: as `group_adapters` does.
    """
    check_fit(linear_layers(model), adapter)
    _put(model, n, adapter, active)


def _put(model: nn.Module, n: int, adapter: LoadedAdapter, active: ActiveRouting) -> None:
    active.forget()
    own: dict[tuple[Any, ...], dict[int, str]] = {}
    for name, f in adapter.factors.items():
        parent, _, child = name.rpartition(".")
        siblings = next((names for names in SIBLINGS if child in names), (child,))
        own.setdefault((parent, siblings, len(f.a), f.rank, str(f.a.dtype)), {})[siblings.index(child)] = name
    for (_, _, _, rank, dtype), members in own.items():
        places = sorted(members)
        names = [members[place] for place in places]
        grouped = [_grouped_layer(model, name, active) for name in names]
        key = (rank, tuple(places), dtype)
        stack = next((stack for stack, _ in grouped[0].held if stack.key == key), None)
        if stack is None:
            stack = Stack(names, key)
            for place, layer in enumerate(grouped):
                layer.hold([*layer.held, (stack, place)])
        device = next(grouped[0].base.parameters()).device
        stack.put(n, [_on(adapter.factors[name], device) for name in names])


def drop_adapter(model: nn.Module, n: int, active: ActiveRouting) -> None:
    """Takes expert n off the model; layers that no expert updates any more are the base's own again."""
    active.forget()
    grouped = _grouped(model)
    for stack in _stacks(grouped):
        if n in stack.scalings:
            stack.drop(n)
    for name, layer in grouped.items():
        layer.hold([(stack, place) for stack, place in layer.held if stack.scalings])
        if not layer.places:
            replace_module(model, name, layer.base)


def grouped_adapters(model: nn.Module, names: Sequence[str]) -> list[LoadedAdapter]:
    """The adapters that `group_adapters` put on the model, without a copy; `names` are theirs, in order."""
    found: list[dict[str, Factors]] = [{} for _ in names]
    for stack in _stacks(_grouped(model)):
        for n in stack.scalings:
            found[n] |= {layer: stack.factors(n, place) for place, layer in enumerate(stack.layers)}
    return [LoadedAdapter(name, factors) for name, factors in zip(names, found, strict=True)]


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of the model's linear layers by their full names, under which adapters know them."""
    layers = {name: cast(Any, module) for name, module in model.named_modules() if hasattr(module, "in_features")}
    bases = {f"{name}.base": name for name in _grouped(model)}
    return {bases.get(name, name): (layer.in_features, layer.out_features) for name, layer in layers.items()}


def _on(factors: Factors, device: torch.device) -> Factors:
    return Factors(factors.a.to(device), factors.b.to(device), factors.scaling)


def _grouped(model: nn.Module) -> dict[str, GroupedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupedLinear)}


def _grouped_layer(model: nn.Module, name: str, active: ActiveRouting) -> GroupedLinear:
    """The grouped layer of that name, put there if it is not."""
    layer = model.get_submodule(name)
    if not isinstance(layer, GroupedLinear):
        layer = GroupedLinear(layer, active)
        replace_module(model, name, layer)
    return layer


def _stacks(grouped: Mapping[str, GroupedLinear]) -> list[Stack]:
    """Each once."""
    return list({id(stack): cast(Stack, stack) for layer in grouped.values() for stack in layer.stacks}.values())
