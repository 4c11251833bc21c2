"""compose/mixture.py and packs/: plain PEFT is the oracle; a pack's every byte counts."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composing import DOMAINS, PROMPTS, ids_of, make_lora, scaled_base, workshop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load, load_file, save, save_file
from transformers import LlamaForCausalLM

from lora_lexicon.compose.mixture import read_pack
from lora_lexicon.compose.system import load_system
from lora_lexicon.doctor.examine import examine
from lora_lexicon.errors import ExpertError, LexiconError, PackError, RouterError
from lora_lexicon.experts.base import SAMPLE_BYTES, fingerprint, load_base
from lora_lexicon.experts.tensors import Checkpoint
from lora_lexicon.packs.pack import add_expert, build_pack, check_pack, describe_pack, remove_expert, verify_pack


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    build_pack(str(shop.base), shop.lora, shop.domains, shop.folder / "pack", include_base=True)
    shop.pack = shop.folder / "pack"
    return shop


@pytest.fixture
def pack(shop: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy to damage or to change."""
    return Path(shutil.copytree(shop.pack, tmp_path / "pack"))


@torch.inference_mode()
def test_every_row_of_a_mixed_batch_is_plain_peft(shop: SimpleNamespace) -> None:
    system = load_system(str(shop.pack))
    ids, weights = ids_of(shop.base), torch.eye(4, 3)  # the last row abstains
    with system.routed(weights):
        mixed = system.model(ids).logits
    base = LlamaForCausalLM.from_pretrained(shop.base).eval()
    assert torch.equal(mixed[3], base(ids).logits[3])
    for i in range(3):
        peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(shop.base), str(shop.lora[i])).eval()
        assert (mixed[i] - peft(ids[i : i + 1]).logits[0]).abs().max() <= 1e-5
        packed = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(shop.base), str(shop.pack / "adapters" / DOMAINS[i])
        ).eval()
        assert torch.equal(packed(ids).logits, peft(ids).logits)


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(shop: SimpleNamespace) -> None:
    system = load_system(str(shop.pack))
    ids = ids_of(shop.base)
    with system.routed(torch.eye(4, 3)):
        first = system.model(ids).logits[0]
    with system.routed(torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])):
        again = system.model(torch.cat([ids[:1], ids[1:].flip(0)])).logits[0]
    assert torch.equal(first, again)


def test_the_pack_routes_and_says_what_it_is(shop: SimpleNamespace) -> None:
    system = load_system(str(shop.pack))
    routing = system.route(PROMPTS)
    assert routing is not None
    assert [routing.name(i) for i in range(3)] == list(DOMAINS)
    assert (system.kind, system.experts, system.name) == ("mixture", DOMAINS, "pack")
    assert system.trained_parameters == 3 * 2 * 3 * 4 * (32 + 64)
    assert 0 < system.ship_bytes < sum(f.stat().st_size for f in shop.pack.rglob("*") if f.is_file())


@torch.inference_mode()
@pytest.mark.parametrize("rank", [4, 16])
def test_a_new_domain_leaves_every_other_prompt_unchanged_to_the_bit(
    shop: SimpleNamespace, pack: Path, tmp_path: Path, rank: int
) -> None:
    slang = make_lora(shop.base, tmp_path / "slang", seed=9, rank=rank)
    before = load_system(str(pack))
    ids, weights = ids_of(shop.base), torch.eye(4, 3)
    with before.routed(weights):
        wanted = before.model(ids).logits
    report = add_expert(pack, slang, [PROMPTS[3]], PROMPTS)
    assert [row["term"] for row in report["moved"]] == ["engine"]
    assert report["moved"][0]["to"] == "slang"
    assert (report["checked"], report["kept"], report["unchanged"], report["changed"]) == (4, 3, 3, [])
    after = load_system(str(pack))
    assert after.experts == (*DOMAINS, "slang")
    with after.routed(torch.nn.functional.pad(weights, (0, 1))):
        assert torch.equal(after.model(ids).logits, wanted)
    verify_pack(pack)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(PackError, match="already"):
        add_expert(pack, slang, [PROMPTS[3]], PROMPTS)


@torch.inference_mode()
def test_removing_it_again_gives_the_old_pack(shop: SimpleNamespace, pack: Path, tmp_path: Path) -> None:
    slang = make_lora(shop.base, tmp_path / "slang", seed=9)
    grown = tmp_path / "grown"
    add_expert(pack, slang, [PROMPTS[3]], [], out=grown)
    assert verify_pack(pack).domains == DOMAINS
    remove_expert(grown, "slang")
    assert verify_pack(grown).domains == DOMAINS
    for name in ("router.json", "router.safetensors", *(f"adapters/{d}/adapter_model.safetensors" for d in DOMAINS)):
        assert (grown / name).read_bytes() == (pack / name).read_bytes()
    with pytest.raises(PackError, match="no domain"):
        remove_expert(grown, "slang")


def _edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(pack: Path) -> None:
        record = json.loads((pack / "manifest.json").read_text())
        change(record)
        (pack / "manifest.json").write_text(json.dumps(record))

    return damage


ADAPTER = "adapters/craft/adapter_model.safetensors"


def _file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Another content for a file of a pack, whose manifest says so: it was made by someone who meant it."""

    def damage(pack: Path) -> None:
        content = change((pack / name).read_bytes())
        (pack / name).write_bytes(content)
        own = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        _edit(lambda record: record["files"].update({name: own}))(pack)

    return damage


def _tensors(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        tensors = load(content)
        change(tensors)
        return save(tensors)

    return changed


def _header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        return len(raw).to_bytes(8, "little") + raw + content[8 + length :]

    return changed


def _first(tensors: dict) -> str:
    return min(key for key in tensors if key != "__metadata__")


def _overlap(header: dict) -> None:
    one, other = sorted(key for key in header if key != "__metadata__")[:2]
    header[one]["data_offsets"] = header[other]["data_offsets"]
    header[one]["shape"] = header[other]["shape"]


CONFIG = "adapters/craft/adapter_config.json"


def _listed(pack: Path, name: str, content: bytes) -> None:
    (pack / name).write_bytes(b"")
    _file(name, lambda _: content)(pack)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "no JSON": lambda p: (p / "manifest.json").write_text("{"),
    "another format": _edit(lambda r: r.update(format=99)),
    "no base": _edit(lambda r: r.pop("base")),
    "names that are none": _edit(lambda r: r["domains"][0].update(name=5)),
    "a path out of the pack": _edit(lambda r: r["files"].update({"../secret": "0"})),
    "an absolute path": _edit(lambda r: r["files"].update({"/etc/passwd": "0"})),
    "a domain out of the pack": _edit(lambda r: r["domains"][0].update(name="../../x")),
    "a missing file": lambda p: (p / ADAPTER).unlink(),
    "a truncated file": lambda p: (p / ADAPTER).write_bytes((p / ADAPTER).read_bytes()[:-8]),
    "an edited file": lambda p: (p / "router.json").write_text((p / "router.json").read_text() + " "),
    "a manifest elsewhere": lambda p: (
        (p / "manifest.json").rename(p.parent / "away"),
        (p / "manifest.json").symlink_to(p.parent / "away"),
    ),
    "a folder elsewhere": lambda p: (
        (p / ADAPTER).parent.rename(p.parent / "away"),
        (p / ADAPTER).parent.symlink_to(p.parent / "away"),
    ),
    "a link": lambda p: ((p / ADAPTER).rename(p.parent / "away"), (p / ADAPTER).symlink_to(p.parent / "away")),
    "other domains than the router's": _edit(lambda r: r["domains"].reverse()),
    "two domains of one name": _edit(lambda r: r["domains"].append({**r["domains"][0], "name": "CRAFT"})),
    "names that a terminal obeys": _edit(lambda r: r.update(description="\x1b]0;x\x07")),
    "a name that is none": _edit(lambda r: r.update(name="a b")),
    "no size": _edit(lambda r: r["files"]["router.json"].pop("bytes")),
    "a size below 0": _edit(lambda r: r["files"]["router.json"].update(bytes=-1)),
    "a hash that is none": _edit(lambda r: r["files"]["router.json"].update(sha256="0")),
    "files in other letters": _edit(lambda r: r["files"].update({"ROUTER.json": r["files"]["router.json"]})),
    "nested ten thousand deep": lambda p: (p / "manifest.json").write_text("[" * 10_000 + "]" * 10_000),
    "a number of many digits": lambda p: (p / "manifest.json").write_text('{"format": ' + "9" * 5000 + "}"),
    "a key twice": lambda p: (p / "manifest.json").write_text('{"format": 2, "format": 2}'),
    "format 1": lambda p: (p / "manifest.json").rename(p / "pack.json"),
    "code": lambda p: _listed(p, "base/modeling.py", b"raise SystemExit"),
    "a pickle": lambda p: _listed(p, "base/pytorch_model.bin", b"x"),
    "an adapter within the base": lambda p: _listed(p, "base/adapter_config.json", b"{}"),
    "a link in the base": lambda p: (
        (p / "base/model.safetensors").rename(p.parent / "away"),
        (p / "base/model.safetensors").symlink_to(p.parent / "away"),
    ),
    "a rank that is text": _edit(lambda r: r["domains"][0].update(rank="x")),
    "a number without end": _edit(lambda r: r["domains"][0].update(trained_parameters=10**400)),
    "a temperature of nothing": _file(
        "router.json", lambda c: c.replace(b'"temperature": 0.05', b'"temperature": 1e-300')
    ),
    "terms that a terminal obeys": _file("router.json", lambda c: c.replace(b'"apple"', b'"\\u001b[31m"')),
    "swapped files": lambda p: _swap(p / ADAPTER, p / "adapters/mind/adapter_model.safetensors"),
    "an adapter that is not finite": _file(ADAPTER, _tensors(lambda t: t[_first(t)].fill_(float("nan")))),
    "a tensor that matches nothing": _file(ADAPTER, _tensors(lambda t: t.update(other=torch.zeros(2, 2)))),
    "half an adapter": _file(ADAPTER, _tensors(lambda t: t.pop(_first(t)))),
    "offsets that overlap": _file(ADAPTER, _header(_overlap)),
    "a header of absurd size": _file(ADAPTER, lambda content: (2**62).to_bytes(8, "little") + content[8:]),
    "an absurd shape": _file(ADAPTER, _header(lambda h: h[_first(h)].update(shape=[2**40, 2**40]))),
    "a rank that is none": _file(CONFIG, lambda content: content.replace(b'"r": 4', b'"r": 0')),
    "a variant": _file(CONFIG, lambda content: content.replace(b'"use_dora": false', b'"use_dora": true')),
    "centroids that are not finite": _file("router.safetensors", _tensors(lambda t: t["centroids"].fill_(torch.inf))),
}


def _config(**changes: object) -> Callable[[Path], object]:
    return _file(CONFIG, lambda content: json.dumps({**json.loads(content), **changes}).encode())


def _without_layer(tensors: dict) -> None:
    for name in [name for name in tensors if "layers.2.mlp.up_proj" in name]:
        del tensors[name]


def _identity(**changes: object) -> Callable[[Path], object]:
    def changed(content: bytes) -> bytes:
        record = json.loads(content)
        record["embedder_identity"].update(changes)
        return json.dumps(record).encode()

    return _file("router.json", changed)


def _narrow(tensors: dict) -> None:
    for name in [name for name in tensors if "up_proj.lora_A" in name]:
        tensors[name] = tensors[name][:, :31].clone()


# What each file is whole by itself with, and the pack is not; a reader that loads the pack refuses it too.
MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an alpha of 0": (_config(lora_alpha=0), "alpha 0"),
    "a module that the config targets": (_file(ADAPTER, _tensors(_without_layer)), r"lacks .*2\.mlp\.up_proj"),
    "a layer that it does not target": (_config(layers_to_transform=[2]), "does not target"),
    "a layer beyond all": (_config(layers_to_transform=[1, 2, 10**12]), "at most 10,000"),
    "float64": (_file(ADAPTER, _tensors(lambda t: t.update({k: v.double() for k, v in t.items()}))), "of type float64"),
    "integers": (_file(ADAPTER, _tensors(lambda t: t.update({k: v.long() for k, v in t.items()}))), "of type int64"),
    "another width": (_file(ADAPTER, _tensors(_narrow)), "maps 31 to 64 features"),
    "a prompt of no tokens": (_identity(max_length=0), r"embedder_identity\.max_length is 0"),
    "a prompt without end": (_identity(max_length=10**12), r"embedder_identity\.max_length is 10"),
    "layers without end": (_identity(layers=10**9), r"embedder_identity\.layers is 10"),
    "a base elsewhere": (_edit(lambda r: r["base"].update(path="../base")), r"base\.path is '\.\./base'"),
    "no base inside": (_edit(lambda r: r["base"].update(path=None)), r"base\.path is null"),
    "a base's branch": (_edit(lambda r: r["base"].update(revision="main")), r"base\.revision is 'main'"),
    "an adapter elsewhere": (
        _edit(lambda r: r["domains"][0].update(adapter="adapters/mind")),
        r"domains\[0\]\.adapter",
    ),
    "a name whose path would fill the memory": (
        _edit(lambda r: r.update({"x" * 10**6: [0] * 10**5})),
        "a name of 1,000,000 characters in a field's name",
    ),
    "lists without end": (
        lambda p: (p / "manifest.json").write_text(f'{{"format": 2, "x": [{"0," * 2**21}0]}}'),
        "more than 2,097,152 values",
    ),
    "lists in lists": (_edit(lambda r: r.update(x=json.loads("[" * 99 + "]" * 99))), "more than 64 values inside"),
    "a reference to a group that is none": (_config(rank_pattern={"\\8": 4}), "rank_pattern must give numbers"),
    "an expression cut short": (_config(rank_pattern={"up_proj\\": 4}), "rank_pattern must give numbers"),
    "names without end": (_config(layers_pattern=["layers"] * 17), "layers_pattern has 17 names"),
    "ranks without end": (_config(rank_pattern={f"x{n}": 4 for n in range(200_000)}), "rank_pattern .* more names"),
    "values that nothing is left of": (
        _file(ADAPTER, _tensors(lambda t: t[_first(t)].fill_(1e30))),
        "values above 10000",
    ),
    "a base's name that no file system has": (_edit(lambda r: r["base"].update(name="a" * 300)), r"base\.name is 'aaa"),
    "a header without end": (
        _file(ADAPTER, lambda content: (17 << 20).to_bytes(8, "little") + b" " * (17 << 20)),
        "not a safetensors file",
    ),
    "lists in a header": (_file(ADAPTER, _header(lambda h: h.update(x=[0] * 2**21))), "more than 2,097,152 values"),
    "a mark that is not seen": (_edit(lambda r: r.update(description="a\u200eb")), r"U\+200E in description"),
    "a tag": (_edit(lambda r: r["domains"][1].update(description="\U000e0041")), r"U\+E0041 in domains\[1\]"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_parts_that_do_not_fit_are_refused_in_one_line(pack: Path, what: str) -> None:
    damage, said = MISFITS[what]
    damage(pack)
    for use in (verify_pack, lambda p: load_system(str(p))):
        with pytest.raises((PackError, ExpertError, RouterError), match=said) as refusal:
            use(pack)
        assert "\n" not in str(refusal.value)


LIES: list[tuple[Callable[[dict], object], str]] = [
    (lambda r: r["domains"][0].update(rank=5), r"domains\[0\]\.rank is 5; it must be 4"),
    (lambda r: r["domains"][1].update(modules=["up_proj"]), r"domains\[1\]\.modules"),
    (lambda r: r["domains"][0].update(dtype="int8"), r"domains\[0\]\.dtype is 'int8'; it must be 'float32'"),
    (lambda r: r["domains"][2].update(trained_parameters=1), r"domains\[2\]\.trained_parameters is 1"),
    (lambda r: r["embedder"].update(name="tfidf"), r"embedder\.name is 'tfidf'"),
    (lambda r: r["embedder"].update(fingerprint="0" * 64), r"embedder\.fingerprint"),
    (lambda r: r["template"].update(with_context="{term}"), r"template\.with_context"),
    (lambda r: r["base"].update(architecture="GPT2LMHeadModel"), r"base\.architecture is 'GPT2LMHeadModel'"),
    (lambda r: r["base"].update(vocabulary="0" * 64), r"base\.vocabulary"),
]


@pytest.mark.parametrize(("lie", "said"), LIES)
def test_a_manifest_that_says_what_the_files_do_not_is_refused(
    pack: Path, lie: Callable[[dict], object], said: str
) -> None:
    _edit(lie)(pack)
    with pytest.raises(PackError, match=rf"manifest\.json is damaged: {said}"):
        verify_pack(pack)


def test_a_base_that_is_elsewhere_is_held_against_too(shop: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    build_pack(str(shop.base), shop.lora, shop.domains, out)
    verify_pack(out)
    _edit(lambda record: record["base"].update(vocabulary="0" * 64))(out)
    with pytest.raises(PackError, match=r"base\.vocabulary"):
        verify_pack(out)
    for name in ("../base", "a/b/c", "..", "./b"):
        _edit(lambda record, name=name: record["base"].update(name=name))(out)
        with pytest.raises(PackError, match=r"base\.name"):
            verify_pack(out)


def test_a_base_given_by_a_path_from_here_is_named_by_a_whole_one(
    shop: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop.base.parent)
    build_pack(shop.base.name, shop.lora, shop.domains, tmp_path / "pack")
    monkeypatch.chdir(tmp_path)
    assert load_system(str(tmp_path / "pack")).base_fingerprint == fingerprint(shop.base)


def test_joiners_that_words_are_written_with_are_kept(pack: Path) -> None:
    _edit(lambda record: record.update(description="\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200d"))(pack)
    verify_pack(pack)


def test_a_base_inside_is_compared_byte_by_byte(tiny_base: Path, tmp_path: Path) -> None:
    """Zeros where the fingerprint takes no sample."""
    shop = workshop(scaled_base(tiny_base, tmp_path / "wide", intermediate_size=2048), tmp_path / "shop", ffn=False)
    build_pack(str(shop.base), shop.lora, shop.domains, tmp_path / "pack", include_base=True)
    file = tmp_path / "pack" / "base" / "model.safetensors"
    place = Checkpoint(file).tensors["model.layers.0.mlp.up_proj.weight"]
    with file.open("r+b") as stream:
        stream.seek(place.offset + SAMPLE_BYTES + 100)
        stream.write(bytes(1000))
    assert fingerprint(file.parent) == fingerprint(shop.base)
    for use in (verify_pack, lambda p: load_system(str(p))):
        with pytest.raises(PackError, match=r"base/model\.safetensors is not the file that was packed"):
            use(tmp_path / "pack")
    load_system(str(tmp_path / "pack"), base=str(shop.base))  # of which the pack holds nothing


def test_a_chat_template_inside_is_not_run_and_no_stray_file_is_read(shop: SimpleNamespace, tmp_path: Path) -> None:
    own = shutil.copytree(shop.base, tmp_path / "own")
    (own / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    build_pack(str(own), shop.lora, shop.domains, tmp_path / "pack", include_base=True)
    assert load_base(str(own)).tokenizer.chat_template
    assert load_system(str(tmp_path / "pack"), base=str(own)).tokenizer.chat_template  # as the user chose
    assert load_system(str(tmp_path / "pack")).tokenizer.chat_template is None
    (tmp_path / "pack" / "base" / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    with pytest.raises(PackError, match=r"base/special_tokens_map\.json', which its manifest does not list"):
        load_system(str(tmp_path / "pack"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_adapter_that_changes_nothing_is_told_of(
    shop: SimpleNamespace, tmp_path: Path, cli: Callable[..., Any], dtype: str
) -> None:
    idle = Path(shutil.copytree(shop.lora[1], tmp_path / "craft"))
    _untrain(idle / "adapter_model.safetensors")
    assert [f.severity for f in examine(idle).findings] == ["warning"]
    pack = tmp_path / "pack"
    build_pack(str(shop.base), [shop.lora[0], idle, shop.lora[2]], shop.domains, pack, dtype=dtype)
    assert check_pack(pack).idle == ("craft",)
    done = cli("pack", "verify", pack)
    assert (done.exit_code, "craft the adapter changes nothing" in done.stderr) == (0, True)
    assert json.loads(cli("pack", "verify", pack, "--json").stdout)["idle"] == ["craft"]
    assert [f.what for f in examine(pack).findings if f.severity == "warning" and "changes nothing" in f.what]


def _untrain(file: Path) -> None:
    tensors = load_file(file)
    save_file({k: v.zero_() if "lora_B" in k else v for k, v in tensors.items()}, file, {"format": "pt"})


PYTHON = re.compile(r"not supported between|object is not|NoneType|KeyError|Traceback|<class|\bdict\b|has no attribute")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_field_of_another_type_is_read_or_refused_in_plain_words(pack: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest.json", "router.json", CONFIG]))
    whole = {path: (pack / path).read_bytes() for path in ("manifest.json", name)}
    record = json.loads(whole[name])
    part: Any = record
    while True:  # to a field at any depth
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    if isinstance(part, dict) and data.draw(st.integers(0, 4)) == 0:
        del part[key]
    else:
        part[key] = data.draw(JSON)
    content = json.dumps(record).encode()
    (pack / name).write_bytes(content) if name == "manifest.json" else _file(name, lambda _: content)(pack)
    try:
        said = [_refusal(use, pack) for use in (verify_pack, read_pack, describe_pack)]
        said += [finding.what for finding in examine(pack).findings]
        assert not any(PYTHON.search(text) or "\n" in text for text in said), said
    finally:
        for path, before in whole.items():
            (pack / path).write_bytes(before)


def _refusal(use: Callable[[Path], object], pack: Path) -> str:
    """What is said of a pack that is refused; "" of one that is read."""
    try:
        use(pack)
    except LexiconError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_pack_is_refused_in_one_line(pack: Path, what: str) -> None:
    DAMAGE[what](pack)
    for use in (verify_pack, lambda p: load_system(str(p))):
        with pytest.raises((PackError, ExpertError, RouterError)) as refusal:
            use(pack)
        assert "\n" not in str(refusal.value)


def test_a_stray_file_is_refused(pack: Path) -> None:
    (pack / "adapters" / "craft" / "run.py").write_text("")
    with pytest.raises(PackError, match=r"run\.py"):
        verify_pack(pack)


def test_another_base_is_refused_with_both_names(shop: SimpleNamespace, pack: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shop.base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(PackError, match="give that base"):
        load_system(str(pack), base=str(other))
    stranger = make_lora(other, tmp_path / "slang", seed=1)
    with pytest.raises(ExpertError, match="not on"):
        add_expert(pack, stranger, [PROMPTS[3]], [])
    with pytest.raises(ExpertError, match="not on"):
        build_pack(str(shop.base), [*shop.lora[:2], stranger], shop.domains, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@torch.inference_mode()
def test_a_plain_peft_adapter_and_a_base_are_systems_too(shop: SimpleNamespace, tmp_path: Path) -> None:
    ids = ids_of(shop.base)
    plain = Path(shutil.copytree(shop.lora[0], tmp_path / "plain"))
    (plain / "expert.json").unlink()
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(shop.base), str(plain)).eval()
    expert, same = load_system(str(plain), base=str(shop.base)), load_system(str(shop.lora[0]))
    assert torch.equal(expert.model(ids).logits, peft(ids).logits)
    assert torch.equal(same.model(ids).logits, peft(ids).logits)
    assert (same.name, same.kind, same.experts, same.route(PROMPTS)) == ("nature", "expert", (), None)
    base = load_system(str(shop.base))
    assert torch.equal(base.model(ids).logits, LlamaForCausalLM.from_pretrained(shop.base)(ids).logits)
    assert base.memory_bytes == pytest.approx(base.ship_bytes, rel=0.6)
    with pytest.raises(PackError, match="neither"):
        load_system(str(tmp_path))


def test_the_command_line(shop: SimpleNamespace, pack: Path, tmp_path: Path, cli) -> None:
    from lora_lexicon.data.prepare import prepare

    source = tmp_path / "slang.jsonl"
    rows = [
        {"term": f"engine{i}", "context": f"the engine{i} ran", "definition": "a machine", "source": "s"}
        for i in range(60)
    ]
    source.write_text("\n".join(json.dumps(row) for row in rows))
    prepare([str(source)], tmp_path / "entries")
    slang = make_lora(shop.base, tmp_path / "slang", seed=9)
    out = tmp_path / "new"
    done = cli(
        "compose",
        "adapters",
        shop.folder / "lora",
        "--base",
        shop.base,
        "--router",
        shop.domains,
        "--out",
        out,
        "--json",
    )
    assert done.exit_code == 0, done.output
    assert [d["name"] for d in json.loads(done.stdout)["domains"]] == list(DOMAINS)
    done = cli("pack", "add", pack, slang, "--data", tmp_path / "entries", "--out", tmp_path / "five", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["checked"] == len(report["moved"]) + report["kept"]
    assert report["kept"] == report["unchanged"]
    for command in (("verify", pack), ("inspect", pack), ("remove", tmp_path / "five", "slang")):
        done = cli("pack", *command, "--json")
        assert done.exit_code == 0, done.output
        assert isinstance(json.loads(done.stdout), dict)
    done = cli("pack", "add", pack, slang, "--data", tmp_path / "entries", "--out", tmp_path / "six")
    assert done.exit_code == 0, done.output
    assert "unchanged to the bit" in done.stdout
    done = cli("pack", "verify", tmp_path / "entries")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)


def test_the_command_line_of_moe(shop: SimpleNamespace, tmp_path: Path, cli) -> None:
    dense = Path(shutil.copytree(shop.lora[0], shop.folder / "lora" / "dense"))
    out = tmp_path / "moe"
    arguments = ("--base", shop.base, "--router", shop.domains, "--out", out, "--keep-base", "--dtype", "bfloat16")
    done = cli("compose", "moe", shop.folder / "lora", *arguments, "--json")
    shutil.rmtree(dense)
    assert done.exit_code == 0, done.output
    assert "left out: dense" in done.stderr
    record = json.loads(done.stdout)
    assert (record["keep_base"], record["dtype"]) == (True, "bfloat16")
    again = cli("compose", "moe", shop.folder / "lora", *arguments)
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    wrong = cli("compose", "moe", shop.lora[0], "--base", shop.base, "--router", shop.domains, "--out", tmp_path / "x")
    assert wrong.exit_code == 1
    assert "domains without an expert" in wrong.stderr


def test_a_file_that_is_not_listed_is_refused_wherever_a_pack_is_loaded(shop: SimpleNamespace, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(shop.pack, tmp_path / "pack"))
    (pack / "evil.py").write_text("1")
    with pytest.raises(PackError, match=r"holds 'evil.py', which its manifest does not list: remove that file"):
        load_system(str(pack), base=str(shop.base))
