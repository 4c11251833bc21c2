"""Every routing policy in one model class: compose/policy.py, compose/moe.py's gates, compose/gates.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composing import DOMAINS, PROMPTS, ids_of, make_entries, workshop
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from lora_lexicon.compose.export import export_mixtral
from lora_lexicon.compose.gates import fit_gate
from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.moe import LexiconMoeForCausalLM, top_weights
from lora_lexicon.compose.policy import parse_policy
from lora_lexicon.compose.probes import probe_entries
from lora_lexicon.compose.system import load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.errors import RecipeError, RouterError
from lora_lexicon.inference.batch import gate_leads
from lora_lexicon.inference.engine import define, losses
from lora_lexicon.inference.sampling import Decoding

POLICIES = ("domain", "domain-top-2", "token-top-1", "token-top-2", "sequence-soft", "sequence-hard")
ENTRIES = [Entry(term, context, f"a kind of {term} that is bright", "test") for term, context in PROMPTS]


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return workshop(tiny_base, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def gated(shop: SimpleNamespace) -> Path:
    """A MoE with gates that are far from even."""
    compose_moe(str(shop.base), shop.ffn, shop.domains, shop.folder / "gated")
    weights = load_file(shop.folder / "gated" / "model.safetensors")
    torch.manual_seed(3)
    gates = {f"model.layers.{layer}.mlp.gate.weight": torch.randn(3, 32) * 0.5 for layer in (1, 2)}
    save_file({**weights, **gates}, shop.folder / "gated" / "model.safetensors", {"format": "pt"})
    return shop.folder / "gated"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_entries(tmp_path_factory.mktemp("data"))


def _load(folder: Path, routing: str) -> LexiconMoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, routing=routing, experts_implementation="eager").eval()


@torch.inference_mode()
def test_a_token_gate_is_mixtrals(gated: Path) -> None:
    for k in (1, 2):
        model = _load(gated, f"token-top-{k}")
        gate = model.model.layers[1].mlp.gate
        theirs = MixtralTopKRouter(SimpleNamespace(num_experts_per_tok=k, num_local_experts=3, hidden_size=32))
        theirs.load_state_dict(gate.state_dict())
        states = torch.randn(2, 5, 32)
        index, gains = gate(states)
        _, scores, indices = theirs(states)
        assert torch.equal(index, indices)
        torch.testing.assert_close(gains, scores)


@torch.inference_mode()
def test_a_token_routed_moe_is_exported_as_the_mixtral_that_it_is(
    shop: SimpleNamespace, gated: Path, tmp_path: Path
) -> None:
    config = json.loads((gated / "config.json").read_text())
    moe = shutil.copytree(gated, tmp_path / "moe")
    (moe / "config.json").write_text(json.dumps({**config, "routing": "token-top-2"}))
    record = export_mixtral(moe, tmp_path / "mixtral")
    assert (record["top_k"], record["gates"]) == (2, None)
    mixtral = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").eval()
    assert mixtral.config.model_type == "mixtral"
    ids = ids_of(shop.base)
    torch.testing.assert_close(_load(moe, "token-top-2")(ids).logits, mixtral(ids).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_sequence_s_choice_is_the_mean_of_its_prompt_s_logits_and_holds_for_what_follows(
    shop: SimpleNamespace, gated: Path
) -> None:
    ids = ids_of(shop.base)  # prompts: each ends in EOS
    rows = torch.cat([ids, torch.randint(10, 60, (len(ids), 5))], dim=1)
    soft = _load(gated, "sequence-soft")
    caught = []
    soft.model.layers[1].mlp.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
    free = soft(rows).logits
    states, output = caught[0]
    weight, block = soft.model.layers[1].mlp.gate.weight, soft.model.layers[1].mlp
    shares = (states[:, : ids.shape[1]] @ weight.T).mean(dim=1).softmax(dim=-1)  # soft-sequence-level, appendix
    flat, one = states.flatten(0, 1), torch.ones(states.shape[0] * states.shape[1], 1)
    every = torch.stack([block.experts(flat, torch.full(one.shape, i), one) for i in range(3)])
    wanted = torch.einsum("bn,nbth->bth", shares, every.view(3, *states.shape))
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)

    chosen = soft.route_ids(rows)
    torch.testing.assert_close(chosen[:, 0], shares)
    assert torch.equal(chosen, soft.route_ids(ids)), "the definition was read"
    with soft.active.using(chosen):
        torch.testing.assert_close(soft(rows).logits, free, atol=1e-5, rtol=1e-5)
    hard = _load(gated, "sequence-hard").route_ids(rows)
    assert torch.equal(hard[:, 0], torch.eye(3)[shares.argmax(dim=1)])


@torch.inference_mode()
def test_padding_and_beams_change_nothing(shop: SimpleNamespace, gated: Path) -> None:
    ids = ids_of(shop.base)
    end = int(ids[0, -1])
    padded = torch.cat([torch.full((len(ids), 3), end), ids], dim=1)
    mask = torch.cat([torch.zeros(len(ids), 3), torch.ones(ids.shape)], dim=1).long()
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": end, "num_beams": 2}
    for routing in ("sequence-soft", "sequence-hard", "token-top-2"):
        model = _load(gated, routing)
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
        left = model.generate(padded, attention_mask=mask, **options)[:, padded.shape[1] :]
        assert torch.equal(plain, left), routing


@pytest.mark.parametrize("routing", POLICIES)
def test_the_engine_takes_every_policy_and_answers_alone_as_in_a_batch(gated: Path, routing: str) -> None:
    system = load_system(str(gated), routing=routing)
    short = Decoding(max_new_tokens=6)
    together = define(system, PROMPTS, short)
    for answer, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = define(system, [prompt], short)
        assert (answer.text, answer.domain) == (alone.text, alone.domain)
        assert (answer.similarity is None) == (not routing.startswith("domain"))
    assert {answer.domain for answer in together} <= ({"mixed"} if routing.startswith("token") else set(DOMAINS))
    scored = losses(system, ENTRIES)[0]
    weights, _ = system.choose(PROMPTS)
    if weights is None:
        assert routing.startswith("token")
    else:
        held = {"domain": 1, "domain-top-2": 2, "sequence-soft": 3, "sequence-hard": 1}[routing]
        assert ((weights > 0).sum(axis=-1) == held).all()
        np.testing.assert_allclose(scored, losses(system, ENTRIES, weights=weights)[0], rtol=1e-5)


def test_near_ties_of_gates_are_seen() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    even, clear = torch.tensor([1.0, 1.0 + 1e-6, 3.0]), torch.tensor([1.0, 2.0, 4.0])
    leads = gate_leads([torch.stack([torch.stack([even, clear]), torch.stack([clear, even])])], mask)
    assert leads[0] == 1.0, "padding was counted"
    assert leads[1] < 1e-4


def test_one_expert_alone_still_teaches_its_gate() -> None:
    logits = torch.tensor([[1.0, 0.5, -1.0]], requires_grad=True)
    gains, index = top_weights(logits, 1)
    assert (float(gains.detach()), int(index)) == (1.0, 0)
    gains.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.eye(3)[:1] - logits.detach().softmax(dim=-1))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gates_are_fitted_to_the_routers_choice_one_row_at_a_time(
    shop: SimpleNamespace, data: Path, level: str
) -> None:
    routing = "token-top-1" if level == "token" else "sequence-hard"
    out = shop.folder / level
    record = compose_moe(str(shop.base), shop.ffn, shop.domains, out, routing=routing, data=data)
    assert (record["routing"], list(record["gates"]["agreement"])) == (routing, ["1", "2"])
    system = load_system(str(out), routing="domain")
    states, chosen, caught = [], [], []
    system.model.get_decoder().layers[1].mlp.register_forward_hook(lambda _, inputs, __: caught.append(inputs[0][0]))
    for entry in probe_entries(data, "train", 512):
        weights, found = system.choose([(entry.term, entry.context)])
        ids, prompt, _ = system.encoder.row(entry.term, entry.context, entry.definition)
        with torch.inference_mode(), system.routed(torch.from_numpy(weights)):
            system.model(torch.tensor([ids]))
        own = caught.pop()
        states.append(own if level == "token" else own[:prompt].mean(dim=0, keepdim=True))
        chosen += [found.top[0]] * len(states[-1])
    wanted = fit_gate(torch.cat(states), np.array(chosen), 3)
    gate = load_system(str(out)).model.get_decoder().layers[1].mlp.gate.weight
    torch.testing.assert_close(gate.detach(), wanted, atol=1e-3, rtol=1e-2)
    with pytest.raises(RouterError, match="no prompts to choose by"):
        _load(out, "sequence-soft").model(torch.tensor([[1, 5, 2]]))


def test_what_cannot_be_routed_is_refused(shop: SimpleNamespace, gated: Path, tmp_path: Path) -> None:
    for text, words in (("token", "token-top-2"), ("token-top-0", "must be"), ("domain-top-4", "3 experts")):
        with pytest.raises(RecipeError, match=words):
            parse_policy(text, 3)
        with pytest.raises(RecipeError, match=words):
            compose_moe(str(shop.base), shop.ffn, shop.domains, tmp_path / "out", routing=text)
        assert not (tmp_path / "out").exists()
    plain = shutil.copytree(gated, tmp_path / "plain")
    weights = load_file(plain / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"], weights["model.layers.2.mlp.gate.weight"]
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    for load in (load_system, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(RouterError, match=r"lacks model\.layers\.1\.mlp\.gate\.weight.*train router"):
            load(str(plain), routing="token-top-1")
