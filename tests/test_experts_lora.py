"""The grouped LoRA layer against plain PEFT, and against itself with more adapters and other batches."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.grouped import GroupedLinear, Stack, group_adapters, grouped_adapters
from lora_lexicon.experts.lora import Factors, LoadedAdapter
from lora_lexicon.experts.routed import ActiveRouting

CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8.0, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    {"r": 8, "lora_alpha": 4.0, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {
        "r": 2,
        "target_modules": ["gate_proj"],
        "layers_to_transform": [1, 2],
        "rank_pattern": {"layers.2.mlp.gate_proj": 6},
    },
]


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three PEFT adapters with random factors, of different ranks, scalings and modules."""
    folder, paths = tmp_path_factory.mktemp("adapters"), []
    for i, config in enumerate(CONFIGS):
        torch.manual_seed(i)
        model = get_peft_model(load_base(str(tiny_base)).model, LoraConfig(init_lora_weights=False, **config))
        model.save_pretrained(str(folder / f"a{i}"), save_embedding_layers=False)
        paths.append(folder / f"a{i}")
    return paths


def test_a_mixed_batch_equals_plain_peft_row_by_row(tiny_base: Path, adapters: list[Path]) -> None:
    ids = torch.randint(5, 300, (8, 11), generator=torch.Generator().manual_seed(1))
    expert = [0, 1, 2, None, 2, 1, 0, 0]
    weights = torch.stack(
        [torch.zeros(3) if n is None else nn.functional.one_hot(torch.tensor(n), 3).float() for n in expert]
    )
    model, active = load_base(str(tiny_base)).model, ActiveRouting()
    group_adapters(model, [load_adapter(path) for path in adapters], active)
    with torch.no_grad(), active.using(weights):
        ours = model(ids).logits
    base = load_base(str(tiny_base)).model
    with torch.no_grad():
        plain: dict[int | None, torch.Tensor] = {None: base(ids).logits}
        for n, path in enumerate(adapters):
            plain[n] = PeftModel.from_pretrained(load_base(str(tiny_base)).model, str(path))(ids).logits
    for row, n in enumerate(expert):
        torch.testing.assert_close(ours[row], plain[n][row], atol=1e-5, rtol=1e-5)
        if n is not None:
            assert (plain[n][row] - plain[None][row]).abs().max() > 1e-2
    assert torch.equal(ours[3], plain[None][3])


def test_without_a_routing_and_without_adapters_the_base_answers(tiny_base: Path, adapters: list[Path]) -> None:
    ids = torch.arange(5, 25).reshape(2, 10)
    model, active = load_base(str(tiny_base)).model, ActiveRouting()
    with torch.no_grad():
        before = model(ids).logits
        group_adapters(model, [load_adapter(path) for path in adapters], active)
        assert torch.equal(model(ids).logits, before)
        group_adapters(model, [], active)
        assert torch.equal(model(ids).logits, before)
    assert not any(isinstance(module, GroupedLinear) for module in model.modules())


def random_factors(n: int, rank: int, seed: int) -> list[Factors]:
    torch.manual_seed(seed)
    return [Factors(torch.randn(12, rank), torch.randn(rank, 10), 0.5 + i) for i in range(n)]


def grouped(linear: nn.Linear, factors: list[Factors], active: ActiveRouting) -> nn.Module:
    """A layer with an update of each expert."""
    model = nn.ModuleDict({"up_proj": linear})
    group_adapters(model, [LoadedAdapter(str(i), {"up_proj": f}) for i, f in enumerate(factors)], active)
    return model["up_proj"]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_weights_blend_experts_by_the_formula(n: int, k: int, rank: int, seed: int) -> None:
    factors, linear, active = (
        [*random_factors(n - 1, rank, seed), *random_factors(1, 3, seed)],
        nn.Linear(12, 10),
        ActiveRouting(),
    )
    layer, x = grouped(linear, factors, active), torch.randn(5, 3, 12)
    weights = torch.rand(5, n) * (torch.rand(5, n) < k / n)
    with torch.no_grad(), active.using(weights):
        ours = layer(x)
        want = linear(x) + sum(weights[:, i, None, None] * f.scaling * (x @ f.a @ f.b) for i, f in enumerate(factors))
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([2, 4, 8, 31]), st.integers(0, 99))
def test_one_more_adapter_of_any_rank_changes_no_other_row(n: int, tokens: int, rank: int, seed: int) -> None:
    factors, linear, active = random_factors(n, 4, seed), nn.Linear(12, 10), ActiveRouting()
    factors += random_factors(1, rank, seed + 1)
    x, index = torch.randn(6, tokens, 12), torch.randint(0, n, (6,))
    with torch.no_grad(), active.using(nn.functional.one_hot(index, n).float()):
        few = grouped(linear, factors[:n], active)(x)
    with torch.no_grad(), active.using(nn.functional.one_hot(index, n + 1).float()):
        more = grouped(linear, factors, active)(x)
    assert torch.equal(few, more)


WAYS = [("gate_proj", "up_proj"), ("gate_proj",), ("up_proj",)]


def siblings(ways: list[int], ranks: list[int], seed: int) -> list[LoadedAdapter]:
    """Adapters of layers that read one input, each of the layers of its way."""
    torch.manual_seed(seed)
    return [
        LoadedAdapter(
            str(n), {name: Factors(torch.randn(12, rank), torch.randn(rank, 10), 0.5 + n) for name in WAYS[way]}
        )
        for n, (way, rank) in enumerate(zip(ways, ranks, strict=True))
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([2, 4])), min_size=1, max_size=5), st.data())
def test_siblings_get_the_same_to_the_bit_in_any_order_and_beside_any_others(
    kinds: list[tuple[int, int]], data: st.DataObject
) -> None:
    """What a row gets is decided by its own adapter: by no other one, nor by who was asked first, or with a copy."""
    own = siblings([way for way, _ in kinds], [rank for _, rank in kinds], 3)
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(own) - 1), min_size=1, max_size=6)))
    x, bases = torch.randn(len(index), data.draw(st.integers(1, 9)), 12), [nn.Linear(12, 10) for _ in range(2)]

    def ask(
        adapters: list[LoadedAdapter], order: list[tuple[str, bool]], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        model, active = nn.ModuleDict(dict(zip(WAYS[0], bases, strict=True))), ActiveRouting()
        group_adapters(model, adapters, active)
        with torch.no_grad(), active.using(nn.functional.one_hot(rows, len(adapters)).float()):
            return {name: model[name](x.clone() if copied else x) for name, copied in order}

    given_order = data.draw(st.permutations([(name, data.draw(st.booleans())) for name in WAYS[0]]))
    many = ask(own, given_order, index)
    used = sorted(set(index.tolist()))
    few = ask(
        [own[n] for n in used],
        [("up_proj", False), ("gate_proj", False)],
        torch.searchsorted(torch.tensor(used), index),
    )
    for name, base in zip(WAYS[0], bases, strict=True):
        assert torch.equal(many[name], few[name])
        for row, n in enumerate(index.tolist()):
            f, want = own[n].factors.get(name), base(x)[row]
            if f is None:
                assert torch.equal(many[name][row], want)
            else:
                torch.testing.assert_close(
                    many[name][row], want + f.scaling * (x[row] @ f.a @ f.b), atol=1e-4, rtol=1e-4
                )


def test_siblings_share_one_product_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model, active = nn.ModuleDict({name: nn.Linear(12, 10) for name in WAYS[0]}), ActiveRouting()
    group_adapters(model, siblings([0, 0], [4, 4], 1), active)
    shapes: list[torch.Size] = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, a: (shapes.append(a.shape), product(x, a))[1])
    for _ in range(2):
        x = torch.randn(2, 3, 12)
        with torch.no_grad(), active.using(torch.eye(2)):
            for name in WAYS[0]:
                model[name](x)
    assert shapes == [(2, 12, 8)] * 2
    (stack,) = cast(GroupedLinear, model["up_proj"]).stacks
    assert cast(Any, stack)._met is None  # no input outlives its layers


def test_what_was_put_on_a_model_is_found_there(tiny_base: Path, adapters: list[Path]) -> None:
    model, loaded = load_base(str(tiny_base)).model, [load_adapter(path) for path in adapters]
    group_adapters(model, loaded, ActiveRouting())
    for wanted, found in zip(loaded, grouped_adapters(model, [adapter.name for adapter in loaded]), strict=True):
        assert wanted.factors.keys() == found.factors.keys()
        for name, f in wanted.factors.items():
            assert torch.equal(f.a, found.factors[name].a)
            assert torch.equal(f.b, found.factors[name].b)
            assert f.scaling == found.factors[name].scaling


def test_the_grouped_layer_trains_only_the_experts_in_the_batch() -> None:
    active = ActiveRouting()
    layer = grouped(nn.Linear(12, 10).requires_grad_(False), random_factors(3, 4, 0), active)
    layer.requires_grad_(True)
    with active.using(torch.eye(3)[[0, 2]]):
        layer(torch.randn(2, 5, 12)).sum().backward()
    (stack,) = cast(GroupedLinear, layer).stacks
    learned = [cast(Stack, stack).a[str(n)].grad for n in range(3)]
    assert [grad is not None and bool(grad.any()) for grad in learned] == [True, False, True]


def test_an_adapter_of_another_base_or_batch_is_refused(tiny_base: Path) -> None:
    model = load_base(str(tiny_base)).model
    (wrong,) = random_factors(1, 2, 0)
    with pytest.raises(ExpertError, match="maps 12 to 10 features, the base's 32 to 64 features"):
        group_adapters(model, [LoadedAdapter("odd", {"model.layers.1.mlp.gate_proj": wrong})], ActiveRouting())
    with pytest.raises(ExpertError, match="which the base lacks"):
        group_adapters(model, [LoadedAdapter("odd", {"model.layers.7.mlp.gate_proj": wrong})], ActiveRouting())
    active = ActiveRouting()
    layer = grouped(nn.Linear(12, 10), [wrong], active)
    with active.using(torch.ones(3, 1)), pytest.raises(ExpertError, match="2 rows meets a routing of 3"):
        layer(torch.randn(2, 4, 12))
