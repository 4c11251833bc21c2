"""doctor/: every fault is made for real on a small artefact, and a healthy one of each kind has none."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composing import make_entries, make_ffn, scaled_base, workshop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from lora_lexicon.compose.collapse import collapse
from lora_lexicon.compose.export import export_mixtral
from lora_lexicon.compose.grow import Joining, join_moe
from lora_lexicon.compose.merge import compose_moe
from lora_lexicon.compose.mixture import MANIFEST
from lora_lexicon.doctor.examine import examine
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.tensors import Checkpoint, not_finite
from lora_lexicon.packs.pack import build_pack, copy_pack

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def ward(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A healthy artefact of each kind, on one base, and another base."""
    folder = tmp_path_factory.mktemp("ward")
    shop = workshop(tiny_base, folder / "shop")
    plain = shutil.copytree(shop.lora[0], folder / "plain")
    (plain / "expert.json").unlink()
    compose_moe(str(tiny_base), shop.ffn, shop.domains, folder / "moe", verify=False)
    wider = shutil.copytree(folder / "moe", folder / "wider")
    join_moe(wider, make_ffn(tiny_base, folder / "new" / "engines", seed=9), Joining([("engine", "")]), verify=False)
    build_pack(str(tiny_base), shop.lora, shop.domains, folder / "pack")
    build_pack(str(tiny_base), shop.lora, shop.domains, folder / "whole", include_base=True)
    copy_pack(folder / "pack", folder / "int8", dtype="int8")
    collapse(folder / "moe", folder / "dense", expert="mind")
    entries = make_entries(folder)
    export_mixtral(folder / "moe", folder / "mixtral", data=entries)
    other = scaled_base(tiny_base, folder / "other", hidden_size=48)
    return SimpleNamespace(
        folder=folder,
        base=tiny_base,
        other=other,
        healthy={
            "entries": entries,
            "router": shop.domains,
            "base": tiny_base,
            "other": other,
            "LoRA expert": shop.lora[0],
            "FFN expert": shop.ffn[0],
            "PEFT adapter": plain,
            "experts": shop.lora[0].parent,
            "merged MoE": folder / "moe",
            "wider": wider,
            "pack": folder / "pack",
            "whole": folder / "whole",
            "int8": folder / "int8",
            "expert collapsed to a dense model": folder / "dense",
            "Mixtral": folder / "mixtral",
        },
    )


KINDS = [
    "entries",
    "router",
    "base",
    "other",
    "LoRA expert",
    "FFN expert",
    "PEFT adapter",
    "experts",
    "merged MoE",
    "wider",
    "pack",
    "whole",
    "int8",
    "expert collapsed to a dense model",
    "Mixtral",
]
SAME_KIND = {"other": "base", "wider": "merged MoE", "whole": "pack", "int8": "pack"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_artefact_has_no_finding(ward: SimpleNamespace, kind: str) -> None:
    chart = examine(ward.healthy[kind])
    assert chart.findings == []
    assert chart.kind == SAME_KIND.get(kind, kind)
    if kind not in ("entries", "other", "experts", "Mixtral"):
        again = examine(ward.healthy[kind], str(ward.base))
        assert again.findings == []
        assert "fits" in again.facts


def _json(name: str, **changes: object) -> Damage:
    """Sets keys of a JSON record; None takes one out."""

    def damage(folder: Path) -> None:
        record = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in record.items() if value is not None}))

    return damage


def _tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})

    return damage


def _gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _short(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 7)


def _nan(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """A value that is no number in the last of the tensors whose names hold `part`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[max(name for name in tensors if part in name)].view(-1)[-1] = float("nan")

    return change


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _narrow(part: str, dim: int = 1) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1).clone()

    return change


def _pickle(weights: str, name: str) -> Damage:
    def damage(folder: Path) -> None:
        torch.save(load_file(folder / weights), folder / name)
        (folder / weights).unlink()

    return damage


def _more_words(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)


def _head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def _deep(name: str) -> Damage:
    return lambda folder: (folder / name).write_text("[" * 100_000 + "]" * 100_000)


def _entries(folder: Path, split: str = "train") -> Path:
    return folder / split / "data-00000-of-00001.arrow"


def _swapped(folder: Path) -> None:
    """Another split's entries under this one's name."""
    _entries(folder).write_bytes(_entries(folder, "test").read_bytes())
    _json("entries.json", splits={"train": 19, "test": 19})(folder)


ADAPTER, MODEL, RAW = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
FFNS, UP = "ffn.safetensors", "base_model.model.model.layers.2.mlp.up_proj"
_lora, _ffn, _model = (partial(_tensors, name) for name in (ADAPTER, FFNS, MODEL))


def _more(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(3, 3)})


# kind, what is done to it, what is said, where, a part of the command that mends it
FAULTS: list[tuple[str, Damage, str, str, str]] = [
    ("entries", lambda f: _entries(f).unlink(), "is missing or damaged", "train", "data prepare"),
    ("entries", lambda f: os.truncate(_entries(f), 900), "damaged|rows, not", "train", "data prepare"),
    ("entries", _json("entries.json", format=0), "is not the record of format 1", "entries.json", "data prepare"),
    ("entries", _swapped, "not those that the record was written for", "entries.json", "data prepare"),
    ("entries", _json("entries.json", splits={"test": 19}), "has no train entries", "entries.json", "data prepare"),
    ("router", _gone("router.safetensors"), "router.safetensors is missing", "", "domains fit"),
    ("router", _json("router.json", format=7), "has format 7", "", "domains fit"),
    ("router", _json("router.json", terms=None), "it lacks terms", "", "domains fit"),
    ("router", _tensors("router.safetensors", _nan("centroids")), "not finite", "", "domains fit"),
    ("router", _short("router.safetensors"), "damaged", "", "domains fit"),
    ("base", _json("config.json", model_type="gpt2"), "model_type 'gpt2'", "config.json", ""),
    ("base", _json("config.json", num_hidden_layers=10**9), "at most 10,000 are read", "config.json", ""),
    ("base", _json("config.json", quantization_config={"bits": 4}), "are quantised", "config.json", "hf download"),
    ("base", _json("config.json", auto_map={"a": "b"}), "asks for code of its own", "config.json", ""),
    ("base", _gone("tokenizer.json"), "no tokenizer.json", "", "hf download"),
    ("base", _more_words, "has ids up to", "tokenizer.json", "hf download"),
    ("base", _json("tokenizer_config.json", eos_token=None), "no eos_token", "tokenizer_config.json", "hf download"),
    ("base", _json("tokenizer.json", model={"type": "?", "vocab": {}}), "neither BPE nor", "", "hf download"),
    ("base", _json("tokenizer.json", version="9"), "no tokenizer that", "tokenizer.json", "hf download"),
    ("base", _model(_nan("up_proj")), "layers.2.mlp.up_proj.weight holds values that", MODEL, "hf download"),
    ("base", _model(lambda t: t.pop("model.norm.weight")), "no tensor model.norm.weight", "", "hf download"),
    ("base", _model(_renamed("model.norm", "extra")), "holds extra.weight, which", "", "hf download"),
    ("base", _model(_narrow("k_proj")), "k_proj.weight has shape .* 2 more like it", "", "hf download"),
    ("base", _json("config.json", tie_word_embeddings=False), "does not say that it is tied", "config.json", "= True"),
    ("base", _model(_head), "holds another head", "config.json", "= False"),
    ("base", _short(MODEL), "is truncated", "", "hf download"),
    ("base", _pickle(MODEL, "pytorch_model.bin"), "old format, a pickle", "pytorch_model.bin", "save_pretrained"),
    ("base", _gone("config.json"), "no config.json", "config.json", "hf download OWNER/NAME config.json"),
    ("base", _deep("config.json"), "valid JSON|damaged", "config.json", "hf download"),
    ("LoRA expert", _json("expert.json", kind="dora"), "kind is 'dora'", "expert.json", "train"),
    ("LoRA expert", _json("expert.json", epochs=3), "unknown key 'epochs'", "expert.json", "train"),
    ("LoRA expert", _json("expert.json", base_fingerprint="0" * 64), "was made for base .*is another", "", "--base"),
    ("LoRA expert", _gone(ADAPTER), "is missing", ADAPTER, "train"),
    ("LoRA expert", _lora(_nan("lora_B")), "infinite or not a number", ADAPTER, "train"),
    ("LoRA expert", _lora(lambda t: t.pop(max(t))), "only one of its two factors", ADAPTER, "train"),
    ("FFN expert", _gone(FFNS), "is missing", FFNS, "train"),
    ("FFN expert", _gone("expert.json"), "what base they belong to", "expert.json", "train"),
    ("FFN expert", _json("expert.json", first_layer=2), "below first_layer", FFNS, "train"),
    ("FFN expert", _ffn(_nan("down")), "infinite or not", FFNS, "train"),
    ("FFN expert", _ffn(lambda t: t.pop(min(t))), "lacks model.layers.1", FFNS, "train"),
    ("FFN expert", _ffn(_narrow("up_proj")), "up_proj.weight has shape", FFNS, "train"),
    ("FFN expert", _ffn(_renamed("layers.2", "layers.9")), "which base .* lacks", FFNS, "train"),
    ("FFN expert", _ffn(_renamed(".mlp.up", ".at.up")), "is no FFN tensor", FFNS, "train"),
    ("PEFT adapter", _json(RAW, use_dora=True), "sets use_dora", RAW, "compose extract"),
    ("PEFT adapter", _json(RAW, modules_to_save=["lm_head"]), "sets modules_to_save", RAW, "merge_and_unload"),
    ("PEFT adapter", _json(RAW, bias="all"), "sets bias to 'all'", RAW, "merge_and_unload"),
    ("PEFT adapter", _json(RAW, init_lora_weights="pissa"), "changed the base", RAW, ""),
    ("PEFT adapter", _json(RAW, peft_type="IA3"), "of type 'IA3'", RAW, ""),
    ("PEFT adapter", _json(RAW, r=8), "factors of rank 4 and 4, the config says 8", ADAPTER, "r=4"),
    ("PEFT adapter", _json(RAW, r="four"), "gives the rank 'four'", RAW, ""),
    ("PEFT adapter", _json(RAW, target_modules=[7]), "target_modules is .7., which is not", RAW, ""),
    ("PEFT adapter", _json(RAW, rank_pattern={"(.*)*x": 4}), "without repetitions", RAW, ""),
    ("PEFT adapter", _json(RAW, use_new=True), "this version of PEFT does not know", RAW, ""),
    ("PEFT adapter", _json(RAW, base_model_name_or_path=None), "does not say which base", RAW, "doctor"),
    ("PEFT adapter", _json(RAW, target_modules=["up_proj", "q_proj"]), "lacks .*q_proj.lora_A", ADAPTER, ""),
    ("PEFT adapter", _json(RAW, layers_to_transform=[1]), "layers.2.* a layer that .* not target", ADAPTER, ""),
    ("PEFT adapter", _json(RAW, layers_pattern="(a*)*x"), "a plain name", RAW, ""),
    ("PEFT adapter", _json(RAW, lora_alpha=0), "alpha 0; only values from", ADAPTER, ""),
    ("PEFT adapter", _lora(lambda t: t.update({k: v.double() for k, v in t.items()})), "of type float64", ADAPTER, ""),
    ("PEFT adapter", _lora(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]),
     "changes nothing", ADAPTER, ""),
    ("PEFT adapter", _gone(RAW), f"no {RAW}", RAW, "hf download"),
    ("PEFT adapter", _pickle(ADAPTER, "adapter_model.bin"), "old format, a pickle", "adapter_model.bin", "torch.load"),
    ("PEFT adapter", _lora(_renamed("layers.2", "layers.9")), "layers.9.* base lacks", ADAPTER, "lora-lexicon train"),
    ("PEFT adapter", _lora(_narrow("up_proj.lora_A")), "maps 31 to 64 features", ADAPTER, "lora-lexicon train"),
    ("PEFT adapter", _lora(_more("base_model.model.lm_head.weight")),
     "is of a head that was trained", ADAPTER, "compose extract"),
    ("PEFT adapter", _lora(_more(f"{UP}.lora_magnitude_vector")),
     "DoRA's magnitudes", ADAPTER, "compose extract"),
    ("PEFT adapter", _lora(_more("base_model.model.model.embed_tokens.lora_embedding_A")),
     "factors of an embedding", ADAPTER, "compose extract"),
    ("PEFT adapter", _lora(_more(f"{UP}.bias")),
     "is of biases", ADAPTER, "compose extract"),
    ("PEFT adapter", _lora(_more("what")), "what is no LoRA factor", ADAPTER, ""),
    ("PEFT adapter", _lora(_more("w\x1bhat")), "w<U\\+001B>hat is no LoRA factor", ADAPTER, ""),
    ("PEFT adapter", _lora(lambda t: t.clear()), "holds no tensor", ADAPTER, ""),
    ("experts", lambda f: _short(ADAPTER)(f / "mind"), "is truncated", f"mind/{ADAPTER}", "--domain mind"),
    ("merged MoE", _gone("router.json"), "router.json is missing", "", "compose moe"),
    ("merged MoE", _gone("moe.json"), "what it was made of", "moe.json", "compose moe"),
    ("merged MoE", _gone("tokenizer.json"), "no tokenizer.json", "", "compose moe"),
    ("merged MoE", _model(_nan("experts.down_proj")), "infinite or not a number", MODEL, "compose moe"),
    ("merged MoE", _model(_narrow("gate_up_proj", 0)), "gate_up_proj has shape", "", "compose moe"),
    ("merged MoE", _model(_renamed("model.norm", "extra")), "no tensor model.norm.weight", "", "compose moe"),
    ("merged MoE", _json("config.json", num_local_experts=7), "num_local_experts 7", "config.json", "compose moe"),
    ("merged MoE", _json("config.json", expert_names=["craft", "mind", "nature"]), "router names", "router", "moe"),
    ("merged MoE", _json("config.json", routing="token-top-2"), "no tensor .*gate.weight", "", "compose moe"),
    ("merged MoE", _json("moe.json", base={"name": "b", "fingerprint": "0"}), "reads base", "router.json", "b"),
    ("merged MoE", _more_words, "has ids up to", "tokenizer.json", "compose moe"),
    ("wider", lambda f: (f / "model-expert-00003.safetensors").unlink(), "is missing", "", "compose moe"),
    ("pack", _gone("router.json"), "lacks router.json", "router.json", "pack build"),
    ("pack", _short(f"adapters/mind/{ADAPTER}"), "is not the file that was packed", "adapters/mind", "pack build"),
    ("pack", lambda f: (f / "manifest.json\x1b[m").write_text("x"), "not listed", "manifest.json<U", ""),
    ("PEFT adapter", _tensors(ADAPTER, lambda t: t[min(t)].fill_(1e30)), "values above 10000", ADAPTER, ""),
    ("pack", lambda f: (f / "note.txt").write_text("x"), "not listed in the manifest", "note.txt", "rm "),
    ("pack", _json(MANIFEST, format=99), "has format 99", MANIFEST, "pip install --upgrade"),
    ("pack", lambda f: (f / MANIFEST).rename(f / "pack.json"), "is a pack of format 1", MANIFEST, "pack build"),
    ("pack", _deep(MANIFEST), "valid JSON|damaged", MANIFEST, "pack build"),
    ("int8", _tensors("adapters/mind/adapter_model.int8.safetensors", lambda t: t.pop(max(t))),
     "is no factor in 8 bits", "adapters/mind", "pack build"),
    ("whole", _gone("base/tokenizer.json"), "lacks base/tokenizer.json", "base/tokenizer.json", "pack build"),
    ("whole", _tensors(f"base/{MODEL}", _nan("up_proj")), "infinite or not a number", "base", "pack build"),
    ("Mixtral", _model(_nan("w1")), "infinite or not a number", MODEL, "compose export"),
    ("Mixtral", _gone("tokenizer.json"), "no tokenizer.json", "", "compose export"),
]  # fmt: skip
WARNINGS = ("asks for code", "does not say which", "what it was made of", "changes nothing")


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{kind}: {said}" for kind, _, said, _, _ in FAULTS])
def test_each_fault_is_found(ward: SimpleNamespace, tmp_path: Path, number: int) -> None:
    kind, damage, said, where, mend = FAULTS[number]
    sick = Path(shutil.copytree(ward.healthy[kind], tmp_path / "sick"))
    damage(sick)
    before = _contents(sick)
    chart = examine(sick)
    found = [f for f in chart.findings if re.search(said, f.what) and f.where.startswith(where) and mend in f.mend]
    assert found, chart.findings
    assert found[0].severity == ("warning" if said.startswith(WARNINGS) else "error")
    assert chart.healthy == said.startswith(WARNINGS)
    assert not any(set("\n\x1b") & set(text) for finding in chart.findings for text in (finding.what, finding.mend))
    assert _contents(sick) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


AGAINST: list[tuple[str, str]] = [
    ("router", "the router reads base"),
    ("LoRA expert", "is another"),
    ("FFN expert", "is another"),
    ("PEFT adapter", "features, the base's"),
    ("merged MoE", "is another"),
    ("pack", "is another"),
    ("base", "other layers or sizes"),
]


@pytest.mark.parametrize(("kind", "said"), AGAINST)
def test_another_base_does_not_fit(ward: SimpleNamespace, kind: str, said: str) -> None:
    chart = examine(ward.healthy[kind], str(ward.other))
    assert any(said in finding.what for finding in chart.findings), chart.findings
    assert "fits" not in chart.facts
    with pytest.raises(ExpertError):
        examine(ward.healthy[kind], str(ward.folder / "nowhere"))


def test_another_vocabulary_is_found(ward: SimpleNamespace, tmp_path: Path) -> None:
    for kind in ("PEFT adapter", "merged MoE", "expert collapsed to a dense model"):
        sick = Path(shutil.copytree(ward.healthy[kind], tmp_path / kind))
        _more_words(sick) if (sick / "tokenizer.json").is_file() else _foreign_words(ward.base, sick)
        assert any("another vocabulary" in f.what for f in examine(sick, str(ward.base)).findings)


def _foreign_words(base: Path, folder: Path) -> None:
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    _more_words(folder)


def test_several_faults_are_all_found(ward: SimpleNamespace, tmp_path: Path) -> None:
    sick = Path(shutil.copytree(ward.healthy["merged MoE"], tmp_path / "moe"))
    for damage in (_gone("router.json"), _gone("tokenizer.json"), _tensors(MODEL, _nan("up")), _gone("moe.json")):
        damage(sick)
    said = " ".join(finding.what for finding in examine(sick).findings)
    assert all(
        words in said for words in ("router.json is missing", "no tokenizer.json", "not a number", "lacks moe.json")
    )


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens"]}],
)
def test_adapters_that_peft_itself_wrote_and_we_cannot_use(
    ward: SimpleNamespace, tmp_path: Path, options: dict
) -> None:
    model = LlamaForCausalLM.from_pretrained(ward.base)
    peft = get_peft_model(model, LoraConfig(**{"target_modules": ["up_proj"], "r": 4, **options}))
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    chart = examine(tmp_path / "adapter", str(ward.base))
    assert not chart.healthy
    mend = "lora-lexicon train" if "target_modules" in options else "compose extract"  # which takes FFNs alone
    assert any(mend in finding.mend for finding in chart.findings)
    assert chart.facts["base"] == str(ward.base)


def test_the_command_given_for_an_adapter_that_does_not_fit_works(ward: SimpleNamespace, tmp_path: Path) -> None:
    """DoRA merged into its base is a whole model, which `compose extract` makes a plain adapter of."""
    torch.manual_seed(3)
    peft = get_peft_model(
        LlamaForCausalLM.from_pretrained(ward.base),
        LoraConfig(target_modules=["up_proj", "down_proj"], r=2, use_dora=True, init_lora_weights=False),
    )
    peft.save_pretrained(tmp_path / "dora")
    (found,) = {f.mend for f in examine(tmp_path / "dora").findings if "extract" in f.mend}
    merge, _, extract = found.partition(" && ")
    subprocess.run(merge.replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
    from lora_lexicon.compose.extract import extract as run
    from lora_lexicon.compose.merge import expert_folders

    run(expert_folders([Path(extract.split()[3])]), str(ward.base), tmp_path / "experts", rank=8)
    chart = examine(tmp_path / "experts", str(ward.base))
    assert chart.findings == []


@pytest.mark.parametrize("kind", ["base", "PEFT adapter"])
def test_other_commands_given_mend_what_they_are_given_for(ward: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    damages = {
        "base": [_json("config.json", tie_word_embeddings=False), _pickle(MODEL, "pytorch_model.bin")],
        "PEFT adapter": [_json(RAW, r=8), _pickle(ADAPTER, "adapter_model.bin")],
    }
    for i, damage in enumerate(damages[kind]):
        sick = Path(shutil.copytree(ward.healthy[kind], tmp_path / str(i)))
        damage(sick)
        command = next(f.mend for f in examine(sick).findings if f.mend.startswith("python"))
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
        assert examine(sick).findings == []


def test_nothing_outside_the_folder_is_opened(ward: SimpleNamespace, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"model_type": "secret"}')
    for name in ("config.json", "tokenizer.json", "adapters"):
        sick = Path(shutil.copytree(ward.healthy["base"], tmp_path / name / "sick"))
        (sick / name).unlink(missing_ok=True)
        (sick / name).symlink_to(secret if name != "adapters" else tmp_path)
        opened: list[str] = []
        _watch(opened, secret)
        chart = examine(sick)
        assert [(f.where, f.what) for f in chart.findings] == [
            (name, "is a link out of the folder, and was not followed")
        ]
        assert (chart.kind, opened) == ("not opened", [])
    sick = Path(shutil.copytree(ward.healthy["base"], tmp_path / "pipe"))
    (sick / "tokenizer_config.json").unlink()
    os.mkfifo(sick / "tokenizer_config.json")
    assert "neither a file nor a folder" in examine(sick).findings[0].what
    cached = tmp_path / "models--a--b"  # as the Hub's cache lays a model out
    shutil.copytree(ward.healthy["base"], cached / "snapshots" / "1")
    (cached / "blobs").mkdir()
    shutil.move(cached / "snapshots" / "1" / "config.json", cached / "blobs" / "c")
    (cached / "snapshots" / "1" / "config.json").symlink_to("../../blobs/c")
    assert examine(cached / "snapshots" / "1").findings == []


def _watch(opened: list[str], file: Path) -> None:
    sys.addaudithook(lambda event, given: opened.append(event) if event == "open" and given[0] == str(file) else None)


def test_values_are_read_in_blocks(ward: SimpleNamespace, tmp_path: Path) -> None:
    """A file of 600 MB, mostly a hole, with one wrong value at its very end: found in a few MB of memory."""
    big = Path(shutil.copytree(ward.healthy["FFN expert"], tmp_path / "big"))
    size = 600 * 2**20
    header = json.dumps(
        {"model.layers.1.mlp.up_proj.weight": {"dtype": "F32", "shape": [size // 128, 32], "data_offsets": [0, size]}}
    )
    with (big / "ffn.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\xc0\x7f")
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom lora_lexicon.doctor.examine import examine\n"
        "before, done = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []\n"
        "chart = examine(Path(sys.argv[1]), progress=done.append)\n"
        "print(any('not a number' in f.what for f in chart.findings), sum(done),\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(big)], capture_output=True, text=True, check=True)
    found, read, grown = done.stdout.split()
    assert (found, int(read)) == ("True", size)
    assert int(grown) < 100_000  # KiB


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["router", "LoRA expert", "PEFT adapter", "FFN expert", "merged MoE", "base", "pack"]),
    data=st.data(),
)
def test_whatever_a_file_holds_it_is_told_and_not_raised(
    ward: SimpleNamespace, tmp_path: Path, kind: str, data
) -> None:
    sick = tmp_path / "sick"
    shutil.rmtree(sick, ignore_errors=True)
    shutil.copytree(ward.healthy[kind], sick)
    file = sick / data.draw(st.sampled_from(sorted(str(p.relative_to(sick)) for p in sick.rglob("*") if p.is_file())))
    whole = bytearray(file.read_bytes())
    if file.suffix == ".json" and data.draw(st.booleans()):
        record = json.loads(whole)
        key = data.draw(st.sampled_from(sorted(record)))
        odd = st.sampled_from([None, -1, 10**30, 1.5, "", "x" * 10**5, [], [[]], {}, {"a": []}, True])
        file.write_text(json.dumps({**record, key: data.draw(odd)}))
    else:
        at = data.draw(st.integers(0, min(len(whole) - 1, 2000)))
        whole[at : at + 4] = data.draw(st.binary(max_size=8))
        file.write_bytes(whole)
    examine(sick).record()


def test_the_scan_finds_what_torch_finds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {f"t{i}": torch.randn(200_000).to(dtype) for i, dtype in enumerate(types)}
    tensors |= {
        "whole": torch.arange(9),
        "empty": torch.empty(0),
        "edge": torch.full((5,), 65504.0, dtype=torch.float16),
    }
    tensors["t1"][131_072], tensors["t3"][-1] = float("inf"), float("-inf")
    save_file(tensors, tmp_path / "f.safetensors")
    wanted = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    assert sorted(not_finite(Checkpoint(tmp_path / "f.safetensors"))) == sorted(wanted) == ["t1", "t3"]


def test_the_command_line(cli, ward: SimpleNamespace, tmp_path: Path) -> None:
    done = cli("doctor", ward.healthy["pack"], "--json")
    record = json.loads(done.stdout)
    assert (done.exit_code, record["kind"], record["healthy"], record["findings"]) == (0, "pack", True, [])
    sick = Path(shutil.copytree(ward.healthy["PEFT adapter"], tmp_path / "sick"))
    _json(RAW, r=8)(sick)
    done = cli("doctor", sick, "--json")
    assert done.exit_code == 1
    assert {*json.loads(done.stdout)["findings"][0]} == {"severity", "what", "where", "mend"}
    shown = cli("doctor", sick, "--base", ward.base)
    assert (shown.exit_code, "PEFT adapter" in shown.stdout, "mend" in shown.stdout) == (1, True, True)
    assert cli("doctor", ward.healthy["base"]).exit_code == 0
    nowhere = cli("doctor", tmp_path / "nowhere")
    assert (nowhere.exit_code, nowhere.stderr.count("\n")) == (1, 1)
    (tmp_path / "empty").mkdir()
    assert "is neither entries" in json.loads(cli("doctor", tmp_path / "empty", "--json").stdout)["findings"][0]["what"]
    (tmp_path / "note.txt").write_text("a note")
    file = cli("doctor", tmp_path / "note.txt")
    assert (file.exit_code, "is one file" in file.stderr, file.stderr.count("\n")) == (1, True, 1)


def test_a_folder_of_packs_is_looked_at_pack_by_pack(ward: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("pack", "int8"):
        shutil.copytree(ward.healthy[name], tmp_path / name)
    copy_pack(ward.healthy["pack"], tmp_path / "one.lexpack")
    chart = examine(tmp_path)
    assert (chart.kind, chart.facts["packs"]) == ("packs", "int8, one.lexpack, pack")
    assert [(f.severity, f.where) for f in chart.findings] == [("warning", "one.lexpack")]
    _json(MANIFEST, description=7)(tmp_path / "int8")
    found = [f for f in examine(tmp_path).findings if f.severity == "error"]
    assert [(f.where, "description is 7" in f.what) for f in found] == [(f"int8/{MANIFEST}", True)]


def test_what_a_pack_does_not_say_of_itself_has_no_line(cli, ward: SimpleNamespace) -> None:
    shown = cli("pack", "inspect", ward.healthy["pack"])
    assert shown.exit_code == 0
    assert all(line.strip() for line in shown.stderr.splitlines())


def test_a_folder_of_several_kinds_says_what_they_are(ward: SimpleNamespace) -> None:
    chart = examine(ward.folder)
    assert chart.kind == "folder"
    assert {"packs", "MoEs"} <= set(chart.facts)
    assert chart.findings[0].mend.startswith("lora-lexicon doctor ")
