"""Greedy decoding of a batch that mixes adapters: what they cost over their base, beside PEFT and one pass an adapter.

    python benchmarks/decode.py                        # a random 97M Llama on the CPU
    python benchmarks/decode.py --layers 4 --rounds 1  # a look

The same prompts and as many tokens out, all by transformers' `generate`, in one process, each in turn:

- `base`: without adapters, the floor;
- `merged`: one adapter merged into its weights: one domain, no mixing;
- `ours 4`, `ours 32`: a mixture of so many adapters, each prompt through its own;
- `peft 4`: PEFT's `adapter_names`, which serves a mixed batch as well;
- `apart 4`: a pass for each adapter over its own prompts, merged beforehand, so that loading costs nothing.

Times are medians over the rounds; a ratio is to the base's time of the same round. Tokens of `ours 4` and `peft 4` must
be equal.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lora_lexicon.experts.grouped import group_adapters
from lora_lexicon.experts.lora import Factors, LoadedAdapter
from lora_lexicon.experts.routed import ActiveRouting
from lora_lexicon.recipe import FFN_MODULES

RANK, SCALING = 16, 2.0
PROMPT = 24  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="What mixed adapters cost while decoding.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="tokens out of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with torch.inference_mode():
        report(measure(arguments.layers, arguments.batch, arguments.tokens, arguments.rounds))


def make_base(layers: int) -> LlamaForCausalLM:
    """A random Llama of 97M parameters in 12 layers."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_adapters(model: nn.Module, count: int) -> list[LoadedAdapter]:
    """Random factors, large enough to change what is written."""
    chance = torch.Generator().manual_seed(1)
    layers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in FFN_MODULES]
    adapters = []
    for n in range(count):
        factors = {}
        for name in layers:
            outer, inner = model.get_submodule(name).weight.shape  # type: ignore[misc]
            a, b = (torch.randn(*size, generator=chance) / 40 for size in ((inner, RANK), (RANK, outer)))
            factors[name] = Factors(a, b, SCALING)
        adapters.append(LoadedAdapter(f"domain{n}", factors))
    return adapters


def merged(layers: int, adapter: LoadedAdapter) -> LlamaForCausalLM:
    model = make_base(layers)
    for name, factors in adapter.factors.items():
        model.get_submodule(name).weight += factors.delta  # type: ignore[operator]
    return model


def generate(model: Any, ids: Tensor, tokens: int, **settings: Any) -> Tensor:
    """(B, tokens) greedy tokens; none ends a row."""
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
        max_new_tokens=tokens, **settings,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


def ours(model: nn.Module, adapters: list[LoadedAdapter], ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    active = ActiveRouting()
    group_adapters(model, adapters, active)
    weights = torch.eye(len(adapters))[torch.arange(len(ids)) % len(adapters)]

    def run() -> Tensor:
        with active.using(weights):
            return generate(model, ids, tokens)

    return run


def theirs(model: Any, adapters: list[LoadedAdapter], ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=int(RANK * SCALING), target_modules=list(FFN_MODULES))
    peft = get_peft_model(model, config, adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        peft.add_adapter(adapter.name, config)
    for adapter in adapters:
        for name, factors in adapter.factors.items():
            for half, factor in (("A", factors.a), ("B", factors.b)):
                place = f"base_model.model.{name}.lora_{half}.{adapter.name}.weight"
                peft.get_parameter(place).data.copy_(factor.T)
    peft.eval()
    names = [adapters[i % len(adapters)].name for i in range(len(ids))]
    return partial(generate, peft, ids, tokens, adapter_names=names)


def apart(models: list[LlamaForCausalLM], ids: Tensor, tokens: int) -> Tensor:
    out = torch.empty(len(ids), tokens, dtype=torch.long)
    for n, model in enumerate(models):
        out[n :: len(models)] = generate(model, ids[n :: len(models)], tokens)
    return out


def measure(layers: int, batch: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round."""
    base = make_base(layers)
    ids = torch.randint(3, 16000, (batch, PROMPT), generator=torch.Generator().manual_seed(2))
    adapters = make_adapters(base, 32)
    runs: dict[str, Callable[[], Tensor]] = {
        "base": partial(generate, base, ids, tokens),
        "merged": partial(generate, merged(layers, adapters[0]), ids, tokens),
        "ours 4": ours(make_base(layers), adapters[:4], ids, tokens),
        "ours 32": ours(make_base(layers), adapters, ids, tokens),
        "peft 4": theirs(make_base(layers), adapters[:4], ids, tokens),
        "apart 4": partial(apart, [merged(layers, adapter) for adapter in adapters[:4]], ids, tokens),
    }
    written = {name: run() for name, run in runs.items()}  # and warm
    assert torch.equal(written["ours 4"], written["peft 4"]), "ours and PEFT's write other tokens"
    assert not torch.equal(written["ours 4"], written["base"]), "the adapters change nothing"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        shown = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        print(f"round {number + 1}: {shown}", file=sys.stderr)
    tokens_out = batch * tokens
    for name, times in seconds.items():
        print(f"{name:8}{tokens_out / statistics.median(times):8,.0f} tokens/s")
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    ratios = {
        name: statistics.median(own / base for own, base in zip(times, seconds["base"], strict=True))
        for name, times in seconds.items()
    }
    print(
        json.dumps(
            {
                "claim": "a batch that mixes adapters, decoded in one pass",
                "unit": "the base's time",
                "ratio": ratios,
                "seconds": seconds,
                "environment": {
                    "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                },
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
