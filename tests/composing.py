"""Experts and routers for tests of composing, made in a moment instead of trained. Not a test itself."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import WORDS
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate
from lora_lexicon.domains.embed import BaseEmbedder
from lora_lexicon.domains.router import Router, describe
from lora_lexicon.domains.vectors import unit
from lora_lexicon.experts.base import ffn_modules, fingerprint, load_base
from lora_lexicon.experts.checkpoint import ExpertInfo, install_ffn, save_ffn, write_expert

DOMAINS = ("nature", "craft", "mind")
PROMPTS = [("apple", "the apple is here"), ("kernel", ""), ("sorrow", "a kind of sorrow"), ("engine", "the engine ran")]


def make_lora(
    base: Path, out: Path, *, seed: int, rank: int = 4, first_layer: int = 1, attention: bool = False
) -> Path:
    """A LoRA expert with random factors."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    modules = ["gate_proj", "up_proj", "down_proj", *(["q_proj"] if attention else [])]
    layers = list(range(first_layer, model.config.num_hidden_layers))
    peft = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, layers_to_transform=layers)
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    out.mkdir(parents=True)
    peft.save_pretrained(str(out), save_embedding_layers=False)
    write_expert(out, _info(base, out.name, "lora", first_layer))
    return out


def make_ffn(base: Path, out: Path, *, seed: int, first_layer: int = 1) -> Path:
    """An FFN expert: the base's FFNs and noise."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    out.mkdir(parents=True)
    own = tuple(f"{name}." for name in ffn_modules(model, first_layer))
    save_ffn({n: p for n, p in model.named_parameters() if n.startswith(own)}, out, torch.float32)
    write_expert(out, _info(base, out.name, "ffn", first_layer))
    return out


def _info(base: Path, name: str, kind: str, first_layer: int) -> ExpertInfo:
    return ExpertInfo(name, kind, str(base), fingerprint(base), first_layer, domain=name, entries_fingerprint="e" * 64)  # type: ignore[arg-type]


def make_router(base: Path, out: Path, *, names: tuple[str, ...] = DOMAINS, layers: int = 1, **settings) -> Router:
    """A router whose centroids are the vectors of the first prompts."""
    loaded = load_base(str(base))
    embedder = BaseEmbedder(loaded.model, PromptEncoder(loaded.tokenizer), layers, loaded.fingerprint)
    vectors = embedder.embed(PROMPTS[: len(names)])
    mean = vectors.mean(axis=0)
    parts = [describe(unit(vector[None] - mean)) for vector in vectors]
    router = Router(
        names=names,
        centroids=torch.stack([torch.from_numpy(p[0]) for p in parts]).numpy(),
        quantiles=torch.stack([torch.from_numpy(p[1]) for p in parts]).numpy(),
        mean=mean,
        terms=tuple((PROMPTS[i][0],) for i in range(len(names))),
        term_vectors=unit(vectors - mean).astype("float16"),
        embedder_name="base",
        embedder_identity=embedder.identity,
        embedder_tensors={},
        template=PromptTemplate(),
        **settings,
    )
    out.mkdir(parents=True)
    router.save(out)
    return router


def workshop(base: Path, folder: Path, *, ffn: bool = True) -> SimpleNamespace:
    """Three LoRA experts, three FFN experts and a router on one base."""
    router = make_router(base, folder / "domains")
    return SimpleNamespace(
        base=base,
        folder=folder,
        router=router,
        domains=folder / "domains",
        lora=[make_lora(base, folder / "lora" / name, seed=i) for i, name in enumerate(DOMAINS)],
        ffn=[make_ffn(base, folder / "ffn" / name, seed=i) for i, name in enumerate(DOMAINS) if ffn],
    )


def dense_model(base: Path, expert: Path | None = None) -> LlamaForCausalLM:
    """The base in float32, with an FFN expert's tensors in it."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if expert is not None:
        install_ffn(model, expert)
    return model


def scaled_base(tiny_base: Path, out: Path, **settings: object) -> Path:
    """A Llama with RoPE scaling, a head of its own and other settings that a composition must carry on."""
    config = LlamaConfig.from_pretrained(tiny_base)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    config.tie_word_embeddings, config.head_dim, config.rms_norm_eps = False, 16, 1e-4
    config.update(settings)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(out)
    return out


def ids_of(base: Path, count: int = 4) -> torch.Tensor:
    """(count, 9) prompts of one length, each ending in EOS."""
    config = LlamaForCausalLM.from_pretrained(base).config
    torch.manual_seed(5)
    ids = torch.randint(10, config.vocab_size, (count, 9))
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
    return ids


def make_entries(folder: Path) -> Path:
    """Some entries of every domain: the prompts that the domains were made of are among them."""
    contexts = {"train": ("the {} is here", "", "a kind of {}"), "test": ("one {}",)}
    rows = [
        {"term": word, "definition": f"like {other}", "context": form.format(word), "source": "t", "split": split}
        for word, other in pairwise(WORDS)
        for split, forms in contexts.items()
        for form in forms
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(folder / "rows.jsonl")], folder / "entries", keep_without_context=True)
    return folder / "entries"
