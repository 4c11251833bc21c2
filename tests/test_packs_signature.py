"""packs/signature.py and packs/trust.py: a signature holds for these bytes, from that key, and for nothing else."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from composing import DOMAINS, PROMPTS, make_lora, workshop
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from model_signing.hashing import Config as Hashing
from model_signing.signing import Config as Signing
from model_signing.verifying import Config as Verifying
from serving import TOKEN, call
from signing import make_key

from lora_lexicon.compose.system import load_system
from lora_lexicon.errors import LexiconError, MissingExtraError, TrustError
from lora_lexicon.packs.edit import merge_domains, rename_domain
from lora_lexicon.packs.layout import files_of
from lora_lexicon.packs.pack import add_expert, build_pack, copy_pack, remove_expert, verify_pack
from lora_lexicon.packs.signature import Identity, read_key, sign_pack, verify_signature
from lora_lexicon.packs.trust import read_policy
from lora_lexicon.resources import find_model


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A signed pack, another that the same key signed, and keys."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.pack, shop.other = shop.folder / "pack", shop.folder / "other"
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack)
    copy_pack(shop.pack, shop.other, version="2.0")
    shop.private, shop.public = make_key(shop.folder, "ours")
    shop.stranger, shop.strange = make_key(shop.folder, "theirs")
    for pack in (shop.pack, shop.other):
        sign_pack(pack, key=shop.private)
    return shop


@pytest.fixture
def pack(shop: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the signed pack to damage or to change."""
    return Path(shutil.copytree(shop.pack, tmp_path / "pack"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LEXICON_CACHE", str(tmp_path / "cache"))


def in_one_line(refusal: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_the_library_itself_takes_our_signature_and_we_take_its(shop: SimpleNamespace, pack: Path) -> None:
    Verifying().use_elliptic_key_verifier(public_key=shop.public).verify(pack, pack / "model.sig")
    (pack / "model.sig").unlink()
    Signing().use_elliptic_key_signer(private_key=shop.stranger).sign(pack, pack / "model.sig")
    verify_signature(pack, read_key(shop.strange))


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_other_curves_and_encrypted_keys(pack: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private, public = make_key(tmp_path, "key", curve=curve, password=b"secret")
    sign_pack(pack, key=private, password="secret")
    verify_signature(pack, read_key(public))
    for password in (None, "wrong"):
        with pytest.raises(LexiconError, match=r"key\.pem cannot be used") as refusal:
            sign_pack(pack, key=private, password=password)
        assert in_one_line(refusal)


def test_a_signature_goes_where_the_same_bytes_go(shop: SimpleNamespace, tmp_path: Path) -> None:
    key, file, again = read_key(shop.public), tmp_path / "one.lexpack", tmp_path / "again"
    copy_pack(shop.pack, file)
    verify_signature(find_model(str(file)), key)
    copy_pack(find_model(str(file)), again)
    verify_signature(again, key)
    sign_pack(file, key=shop.stranger)  # in its place
    verify_signature(find_model(str(file)), read_key(shop.strange))
    assert verify_pack(find_model(str(file))).files == verify_pack(shop.pack).files
    with pytest.raises(LexiconError, match="exists"):
        sign_pack(shop.pack, file, key=shop.private)
    sign_pack(shop.pack, file, key=shop.private, overwrite=True)
    verify_signature(find_model(str(file)), key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "cache", "one.lexpack"]


def test_a_change_takes_the_signature_off(shop: SimpleNamespace, pack: Path, tmp_path: Path) -> None:
    copy_pack(pack, tmp_path / "renamed", version="1.1")
    add_expert(pack, make_lora(shop.base, tmp_path / "slang", seed=9), [PROMPTS[3]], [], base=str(shop.base))
    for changed in (pack, tmp_path / "renamed"):
        with pytest.raises(TrustError, match="not signed"):
            verify_signature(changed, read_key(shop.public))


def test_and_that_is_said_in_one_line(
    shop: SimpleNamespace, pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Callable[[], object]] = {
        "copy": lambda: copy_pack(pack, tmp_path / "renamed", version="1.1"),
        "rename": lambda: rename_domain(pack, DOMAINS[0], "other", out=tmp_path / "other"),
        "merge": lambda: merge_domains(pack, DOMAINS[:2], "both", out=tmp_path / "both"),
        "remove": lambda: remove_expert(pack, DOMAINS[0]),
    }
    for change in changes.values():
        caplog.clear()
        change()
        (told,) = caplog.messages
        assert str(pack) in told
        assert "sign again with `pack sign`" in told
    caplog.clear()
    remove_expert(pack, DOMAINS[1])  # which has none any more
    copy_pack(shop.pack, tmp_path / "same")
    assert caplog.messages == []
    assert (tmp_path / "same" / "model.sig").read_bytes() == (shop.pack / "model.sig").read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_seen(shop: SimpleNamespace, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*files_of(shop.pack), "manifest.json"]))
    held = (shop.pack / name).read_bytes()
    at = data.draw(st.integers(0, len(held) - 1))
    changed = bytes([held[at] ^ data.draw(st.integers(1, 255))])
    try:
        (shop.pack / name).write_bytes(held[:at] + changed + held[at + 1 :])
        with pytest.raises(TrustError, match=name.rpartition("/")[2]) as refusal:
            verify_signature(shop.pack, read_key(shop.public))
        assert in_one_line(refusal)
    finally:
        (shop.pack / name).write_bytes(held)
    verify_signature(shop.pack, read_key(shop.public))


def _partly(pack: Path, shop: SimpleNamespace) -> None:
    """Signs all but one file, says so in the signature, and changes the file."""
    hashing = Hashing().set_ignored_paths(paths=["model.sig", "router.json"])
    Signing().set_hashing_config(hashing).use_elliptic_key_signer(private_key=shop.private).sign(
        pack, pack / "model.sig"
    )
    Verifying().use_elliptic_key_verifier(public_key=shop.public).verify(pack, pack / "model.sig")


def _edited(pack: Path, change: Callable[[dict], object]) -> None:
    record = json.loads((pack / "model.sig").read_text())
    change(record)
    (pack / "model.sig").write_text(json.dumps(record))


FORGED: dict[str, Callable[[Path, SimpleNamespace], object]] = {
    "no signature": lambda p, _: (p / "model.sig").unlink(),
    "an added file": lambda p, _: (p / "extra.py").write_text(""),
    "an added file of git's": lambda p, _: (p / ".gitattributes").write_text(""),
    "a removed file": lambda p, _: (p / "README.md").unlink(),
    "a renamed file": lambda p, _: (p / "README.md").rename(p / "READ.md"),
    "another pack's signature": lambda p, shop: shutil.copyfile(shop.other / "model.sig", p / "model.sig"),
    "another key's": lambda p, shop: sign_pack(p, key=shop.stranger),
    "another key's under our key's name": lambda p, shop: (
        sign_pack(p, key=shop.stranger),
        _edited(
            p,
            lambda r: r.update(
                verificationMaterial=json.loads((shop.pack / "model.sig").read_text())["verificationMaterial"]
            ),
        ),
    ),
    "one that leaves a file out": _partly,
    "a link": lambda p, shop: (
        (p / "model.sig").unlink(),
        (p / "model.sig").symlink_to(shop.pack / "model.sig"),
    ),
    "an empty one": lambda p, _: (p / "model.sig").write_text(""),
    "one that is no object": lambda p, _: (p / "model.sig").write_text("[]"),
    "one without material": lambda p, _: _edited(p, lambda r: r.update(verificationMaterial={})),
    "one without an envelope": lambda p, _: _edited(p, lambda r: r.pop("dsseEnvelope")),
    "one without signatures": lambda p, _: _edited(p, lambda r: r["dsseEnvelope"].update(signatures=[])),
    "a deep one": lambda p, _: (p / "model.sig").write_text("[" * 100_000),
    "a huge one": lambda p, _: (p / "model.sig").write_bytes(b" " * (2**24 + 1)),
    "bytes": lambda p, _: (p / "model.sig").write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_is_not_signed_is_refused_in_one_line(shop: SimpleNamespace, pack: Path, what: str) -> None:
    FORGED[what](pack, shop)
    with pytest.raises(TrustError) as refusal:
        verify_signature(pack, read_key(shop.public))
    assert in_one_line(refusal)


def _fifo(file: Path) -> None:
    os.mkfifo(file)


def _sparse(file: Path) -> None:
    with file.open("wb") as target:
        target.truncate(10**10)


NO_FILE: dict[str, Callable[[Path], object]] = {
    "a link to what never ends": lambda file: file.symlink_to("/dev/zero"),
    "a link to nothing": lambda file: file.symlink_to("nothing"),
    "a pipe": _fifo,
    "a folder": lambda file: file.mkdir(),
    "10 GB": _sparse,
}


@pytest.mark.parametrize("what", NO_FILE)
def test_what_can_be_no_signature_is_refused_wherever_a_pack_is_read(
    shop: SimpleNamespace, pack: Path, tmp_path: Path, cli, what: str
) -> None:
    file, policy = pack / "model.sig", policy_file(shop.folder, {"require": False, "trusted": [KEY]})
    file.unlink()
    NO_FILE[what](file)
    with pytest.raises(TrustError, match=r"model\.sig"):
        read_policy(policy).check(pack)
    with pytest.raises(TrustError, match=r"model\.sig"):
        load_system(str(pack))
    for command in (
        ("verify", pack),
        ("verify", pack, "--key", shop.public),
        ("inspect", pack),
        ("diff", shop.other, pack),
        ("sign", pack, "--key", shop.private),
        ("copy", pack, "--out", tmp_path / "new"),
        ("push", pack, tmp_path / "new"),
        ("pull", pack, "--out", tmp_path / "new"),
        ("remove", pack, DOMAINS[0], "--out", tmp_path / "new"),
    ):
        done = cli("pack", *command)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), (command, done.output)
        assert "model.sig" in done.stderr
        assert "take it away" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack"]
    assert "model.sig" in cli("pack", "list", tmp_path).stdout


@pytest.mark.parametrize("what", ["absent", "private", "rsa", "bytes", "secp256k1", "pipe", "endless"])
def test_what_is_no_key_is_refused_in_one_line(shop: SimpleNamespace, tmp_path: Path, what: str) -> None:
    file = tmp_path / f"{what}.pem"
    if what == "private":
        file = shop.private
    elif what == "rsa":
        key = rsa.generate_private_key(65537, 2048).public_key()
        file.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    elif what == "pipe":
        os.mkfifo(file)
        for read in (read_policy, lambda pipe: sign_pack(shop.pack, key=pipe)):
            with pytest.raises(LexiconError, match="no plain file"):
                read(file)
    elif what == "endless":
        file = Path("/dev/zero")
        with pytest.raises(LexiconError, match="no plain file"):
            read_policy(file)
    elif what == "bytes":
        file.write_bytes(bytes(range(256)))
    elif what == "secp256k1":
        file = make_key(tmp_path, "odd", curve=ec.SECP256K1())[1]
    with pytest.raises(LexiconError, match=file.name) as refusal:
        read_key(file)
    assert in_one_line(refusal)


def test_without_the_library_the_extra_is_named(shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingExtraError, match=r"'model-signing'.*lora-lexicon\[sign\]"):
        read_key(shop.public)
    with pytest.raises(MissingExtraError, match=r"lora-lexicon\[sign\]"):
        sign_pack(shop.pack, key=shop.private)


def test_sigstore_out_of_reach_is_one_line(shop: SimpleNamespace, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sigstore.models import ClientTrustConfig

    def production(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(ClientTrustConfig, "production", production)
    for use in (
        lambda: sign_pack(pack, key=None),
        lambda: verify_signature(pack, Identity("lab@example.org", "https://accounts.example.org")),
    ):
        with pytest.raises(LexiconError, match="Sigstore does not answer") as refusal:
            use()
        assert in_one_line(refusal)
    verify_signature(pack, read_key(shop.public))  # as it was


def policy_file(folder: Path, content: object) -> Path:
    (folder / "trust.yaml").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "trust.yaml"


def test_a_policy_says_who_signed(shop: SimpleNamespace, pack: Path) -> None:
    (shop.folder / "keys").mkdir()
    shutil.copyfile(shop.strange, shop.folder / "keys" / "strange.pub")
    both = [{"name": "them", "key": "keys/strange.pub"}, {"name": "us", "key": shop.public.read_text()}]
    policy = read_policy(policy_file(shop.folder, {"trusted": both}))
    assert policy.check(pack) == "us"
    sign_pack(pack, key=shop.stranger)
    assert policy.check(pack) == "them"
    online = {"name": "cloud", "identity": "lab@example.org", "issuer": "https://accounts.example.org"}
    assert read_policy(policy_file(shop.folder, {"trusted": [online, *both]})).check(pack) == "them"  # asks nobody
    (pack / "README.md").write_text("another")
    with pytest.raises(TrustError, match="them, us") as refusal:
        policy.check(pack)
    assert in_one_line(refusal)
    (pack / "model.sig").unlink()
    with pytest.raises(TrustError, match="not signed"):
        policy.check(pack)
    lenient = read_policy(policy_file(shop.folder, {"require": False, "trusted": both[:1]}))
    assert lenient.check(pack) is None
    shutil.copyfile(shop.pack / "model.sig", pack / "model.sig")
    with pytest.raises(TrustError):
        lenient.check(pack)


KEY = {"name": "a", "key": "ours.pub"}
MALFORMED = {
    "no YAML": "{",
    "no mapping": "[]",
    "a bomb": "[" * 100_000,
    "too large": " " * (2**20 + 1),
    "nothing": {},
    "an unknown key": {"trusted": [KEY], "requires": True},
    "require": {"trusted": [KEY], "require": "yes please"},
    "no list": {"trusted": KEY},
    "an empty list": {"trusted": []},
    "no text": {"trusted": [{"name": "a", "key": 5}]},
    "a row that is none": {"trusted": ["ours.pub"]},
    "a key and an identity": {"trusted": [KEY | {"identity": "a", "issuer": "b"}]},
    "no issuer": {"trusted": [{"name": "a", "identity": "b"}]},
    "one name twice": {"trusted": [KEY, KEY]},
    "an absent key": {"trusted": [{"name": "a", "key": "absent.pub"}]},
    "a private key": {"trusted": [{"name": "a", "key": "ours.pem"}]},
    "a broken key": {"trusted": [{"name": "a", "key": "-----BEGIN PUBLIC KEY-----\nAAAA"}]},
    "aliases": "a: &a [x, x]\nrequire: [*a, *a]\n",
    "a date": "2001-01-01: 1\ntrusted: []\n",
    "a number of many digits": f"require: {'9' * 5000}\n",
    "a key of no file's name": {"trusted": [{"name": "a", "key": "a\0b"}]},
    "keys of several types": "trusted:\n- {1: a, b: c}\n",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_policy_is_refused_in_one_line(shop: SimpleNamespace, what: str) -> None:
    with pytest.raises(LexiconError) as refusal:
        read_policy(policy_file(shop.folder, MALFORMED[what]))
    assert in_one_line(refusal)


def test_the_command_line(shop: SimpleNamespace, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made, policy = tmp_path / "made.lexpack", policy_file(shop.folder, {"trusted": [KEY]})
    done = cli("pack", "sign", shop.other, "--key", shop.private, "--out", made, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == len(verify_pack(shop.other).files) + 1
    done = cli("pack", "verify", made, "--key", shop.public, "--trust", policy, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["signed_by"] == [str(shop.public), "a"]
    signed = len(verify_pack(shop.other).files) + 1
    done = cli("pack", "verify", made)
    assert (done.exit_code, "add --key" in done.stdout, f"{signed} files" in done.stdout) == (0, True, True)
    assert json.loads(cli("pack", "verify", made, "--json").stdout)["files"] == signed
    for arguments in (("verify", made, "--key", shop.strange), ("verify", shop.base, "--key", shop.public)):
        done = cli("pack", *arguments)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    for arguments in (("sign", made), ("sign", made, "--key", shop.private, "--sigstore")):
        assert cli("pack", *arguments).exit_code == 2
    assert cli("pack", "verify", made, "--sigstore-identity", "a").exit_code == 2
    monkeypatch.setenv("LORA_LEXICON_KEY_PASSWORD", "secret")
    private, public = make_key(tmp_path, "locked", password=b"secret")
    assert cli("pack", "sign", made, "--key", private).exit_code == 0
    assert cli("pack", "verify", made, "--key", public).exit_code == 0
    monkeypatch.setenv("LORA_LEXICON_TRUST", str(policy))
    done = cli("pack", "verify", made)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert cli("pack", "sign", "tiny", "--key", shop.private).exit_code == 1  # a shipped one


def test_add_takes_experts_of_signed_packs_alone(
    shop: SimpleNamespace, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_lexicon.data.prepare import prepare

    rows = [
        {"term": f"engine{i}", "context": f"the engine{i} ran", "definition": "a machine", "source": "s"}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "entries")
    slang, grown = make_lora(shop.base, tmp_path / "slang", seed=9), tmp_path / "grown"
    add_expert(shop.pack, slang, [PROMPTS[3]], [], base=str(shop.base), out=grown)
    monkeypatch.setenv("LORA_LEXICON_TRUST", str(policy_file(shop.folder, {"trusted": [KEY]})))
    data = ("--data", tmp_path / "entries", "--base", shop.base, "--limit", 0)
    for expert in (slang, grown / "adapters" / "slang"):
        done = cli("pack", "add", shop.pack, expert, *data, "--out", tmp_path / "made")
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
        assert not (tmp_path / "made").exists()
    sign_pack(grown, key=shop.private)
    done = cli("pack", "add", shop.pack, grown / "adapters" / "slang", *data, "--out", tmp_path / "made")
    assert done.exit_code == 0, done.output
    assert verify_pack(tmp_path / "made").domains == (*DOMAINS, "slang")


def test_so_do_new_domains_and_suggestions(shop: SimpleNamespace, pack: Path, tmp_path: Path, cli) -> None:
    trust, rows = ("--trust", policy_file(shop.folder, {"trusted": [KEY]})), tmp_path / "rows.csv"
    rows.write_text("term,definition,context\napple,a fruit,the apple is here\nkernel,a seed,the kernel is here\n")
    copy_pack(shop.pack, tmp_path / "packs" / "signed")
    copy_pack(shop.pack, tmp_path / "packs" / "bare", version="3")
    done = cli("pack", "suggest", rows, "--from", tmp_path / "packs", "--base", shop.base, *trust, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [row["path"] for row in report["packs"]] == [str(tmp_path / "packs" / "signed")]
    (left,) = report["broken"]
    assert (left["path"], "is not signed" in left["why"]) == (str(tmp_path / "packs" / "bare"), True)
    for name, said in (("bare", "is not signed"), ("signed", "absent.csv")):
        done = cli("domains", "new", tmp_path / "absent.csv", "--into", tmp_path / "packs" / name, *trust)
        assert (done.exit_code, done.stderr.count("\n"), said in done.stderr) == (1, 1, True), done.output
    assert not (tmp_path / "packs" / "bare.absent").exists()


def test_a_server_takes_signed_packs_alone(shop: SimpleNamespace, tmp_path: Path, cli) -> None:
    from lora_lexicon.serve.app import Settings, create_app

    file = policy_file(shop.folder, {"trusted": [KEY]})
    slang, grown = make_lora(shop.base, tmp_path / "slang", seed=9), tmp_path / "grown"
    add_expert(shop.pack, slang, [PROMPTS[3]], [], base=str(shop.base), out=grown)
    sign_pack(grown, tmp_path / "strange.lexpack", key=shop.stranger)
    sign_pack(grown, tmp_path / "ours.lexpack", key=shop.private)
    system = load_system(str(shop.pack), base=str(shop.base))
    app = create_app(system, Settings(token="secret", packs=[tmp_path], policy=read_policy(file)))
    try:
        for path in ("grown", "strange.lexpack"):
            answer = call(app, "POST", "/domains", json={"path": path}, headers=TOKEN)
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "untrusted")
            assert system.experts == DOMAINS
        answer = call(app, "POST", "/domains", json={"path": "ours.lexpack"}, headers=TOKEN)
        assert (answer.status_code, answer.json().get("added")) == (201, ["slang"]), answer.text
    finally:
        app.state.scheduler.close()
    done = cli("serve", grown, "--base", shop.base, "--trust", file)
    assert (done.exit_code, done.stderr.count("\n"), "not signed" in done.stderr) == (1, 1, True), done.output
