"""packs/remote.py: what comes from elsewhere is what went there, and nothing else gets in."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from composing import DOMAINS, workshop
from hub import standing_in
from hypothesis import given
from hypothesis import strategies as st
from signing import make_key
from test_packs_download import ETAG, serving

from lora_lexicon.archive import extract
from lora_lexicon.errors import LexiconError, PackError, TrustError
from lora_lexicon.packs import download
from lora_lexicon.packs.pack import build_pack, copy_pack, remove_expert, verify_pack
from lora_lexicon.packs.remote import Hub, Web, pull_pack, push_pack, read_place
from lora_lexicon.packs.signature import read_key, sign_pack, verify_signature
from lora_lexicon.packs.trust import read_policy


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A signed pack as a folder and as one file, an unsigned one of fewer domains, a policy."""
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.pack, shop.file, shop.less = (shop.folder / name for name in ("pack", "pack.lexpack", "less"))
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack)
    remove_expert(shop.pack, DOMAINS[2], out=shop.less)
    shop.private, shop.public = make_key(shop.folder, "ours")
    sign_pack(shop.pack, key=shop.private)
    copy_pack(shop.pack, shop.file)
    shop.bytes = shop.file.read_bytes()
    shop.policy = shop.folder / "trust.yaml"
    shop.policy.write_text(json.dumps({"trusted": [{"name": "us", "key": "ours.pub"}]}))
    return shop


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_LEXICON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "WAIT", 0)
    return tmp_path / "cache" / "downloads"


@pytest.fixture
def hub() -> Iterator[SimpleNamespace]:
    with standing_in() as state:
        yield state


def contents(pack: Path, work: Path) -> dict[str, bytes]:
    """{path: bytes} of a pack's files, the signature included."""
    if pack.is_file():
        work.mkdir()
        extract(pack, work)
        pack = work
    return {path.relative_to(pack).as_posix(): path.read_bytes() for path in pack.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["made", "made.lexpack"])
@pytest.mark.parametrize("source", ["pack", "pack.lexpack"])
def test_a_path(shop: SimpleNamespace, tmp_path: Path, source: str, name: str) -> None:
    wanted = contents(shop.pack, tmp_path)
    done = pull_pack(str(shop.folder / source), tmp_path / name, policy=read_policy(shop.policy))
    assert (done["domains"], done["signed_by"]) == (list(DOMAINS), "us")
    assert contents(tmp_path / name, tmp_path / "work") == wanted
    pushed = tmp_path / f"pushed-{name}"
    assert push_pack(shop.pack, str(pushed))["target"] == str(pushed)
    assert contents(pushed, tmp_path / "work2") == wanted
    with pytest.raises(LexiconError, match="exists: push to another"):
        push_pack(shop.pack, str(pushed))
    with pytest.raises(LexiconError, match="is the pack itself"):
        push_pack(shop.pack, str(shop.pack), overwrite=True)
    with pytest.raises(LexiconError, match="exists"):
        pull_pack(str(shop.pack), tmp_path / name)
    assert pull_pack(str(shop.less), tmp_path / name, overwrite=True)["domains"] == list(DOMAINS[:2])
    with pytest.raises(PackError, match="--max-size"):
        pull_pack(str(shop.folder / source), tmp_path / "new", limit=1000)


def test_an_address_that_breaks_off(shop: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    tries = iter([9000, 0, 0, 0, 0, 0])
    out, sha256 = tmp_path / "made", hashlib.sha256(shop.bytes).hexdigest()
    with serving(lambda h: h.part(shop.bytes, mark=ETAG, upto=next(tries, None))) as (url, asked):
        with pytest.raises(LexiconError, match="again"):
            pull_pack(url, out, sha256=sha256)
        assert not out.exists()
        done = pull_pack(url, out, sha256=sha256, policy=read_policy(shop.policy))
        assert asked == [None, *["bytes=9000-"] * 6]
        assert (done["source"], done["signed_by"]) == (url, "us")
        assert contents(out, tmp_path) == contents(shop.pack, tmp_path)
        assert list(cache.iterdir()) == []
        pull_pack(f"{url}#sha256={sha256.upper()}", tmp_path / "one.lexpack")
        assert (tmp_path / "one.lexpack").read_bytes() == shop.bytes
        for wrong in ("0" * 64, "zz"):
            with pytest.raises(LexiconError, match="SHA-256"):
                pull_pack(url, tmp_path / "new", sha256=wrong)
        with pytest.raises(LexiconError, match="two hashes"):
            pull_pack(f"{url}#sha256={sha256}", tmp_path / "new", sha256="0" * 64)
        with pytest.raises(PackError, match="--max-size"):
            pull_pack(url, tmp_path / "new", limit=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made", "one.lexpack"]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("what", ["cut", "changed", "page", "unsigned"])
def test_what_an_address_gives_is_not_believed(shop: SimpleNamespace, tmp_path: Path, cache: Path, what: str) -> None:
    body = {"cut": shop.bytes[:-9], "page": b"<html>", "changed": bytearray(shop.bytes)}.get(what, b"")
    if isinstance(body, bytearray):
        body[-5000] ^= 1
    if what == "unsigned":
        copy_pack(shop.less, tmp_path / "less.lexpack")
        body = (tmp_path / "less.lexpack").read_bytes()
    out = tmp_path / "there" / "made"
    refused = pytest.raises(TrustError if what == "unsigned" else PackError)
    with serving(lambda h: h.reply(200, bytes(body))) as (url, _), refused as refusal:
        pull_pack(url, out, policy=read_policy(shop.policy))
    assert "\n" not in str(refusal.value)
    assert url in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)
    assert not out.parent.exists()
    assert list(cache.iterdir()) == []


def test_the_hub(shop: SimpleNamespace, hub: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    wanted = contents(shop.pack, tmp_path)
    done = push_pack(shop.pack, "hf:me/words")
    assert done["url"].endswith(done["commit"])
    assert hub.repos["me/words"]["main"] == (done["commit"], wanted)
    hub.repos["me/words"]["main"][1][".gitattributes"] = b"the Hub's own"
    hub.repos["me/words"]["main"][1]["run.py"] = b"somebody's"
    pulled = pull_pack("me/words", tmp_path / "made", policy=read_policy(shop.policy))
    assert (pulled["source"], pulled["signed_by"]) == ("hf:me/words", "us")
    assert contents(tmp_path / "made", tmp_path) == wanted
    verify_signature(tmp_path / "made", read_key(shop.public))
    push_pack(shop.less, "hf:me/words")
    assert pull_pack("hf:me/words", tmp_path / "less.lexpack")["domains"] == list(DOMAINS[:2])
    there = hub.repos["me/words"]["main"][1]
    assert set(there) == {*contents(shop.less, tmp_path), ".gitattributes", "run.py"}  # no old adapter, no signature
    assert pull_pack(f"hf:me/words@{done['commit']}", tmp_path / "old")["domains"] == list(DOMAINS)
    push_pack(shop.pack, "hf:me/words@next")
    assert pull_pack("hf:me/words@next", tmp_path / "next.lexpack")["domains"] == list(DOMAINS)
    assert list(cache.iterdir()) == []


def test_the_hub_breaks_off_and_goes_on(
    shop: SimpleNamespace, hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what its client loses at most
    push_pack(shop.pack, "hf:me/words")
    weights = "adapters/mind/adapter_model.safetensors"
    hub.breaks.add(weights)
    pull_pack("hf:me/words", tmp_path / "made")
    assert contents(tmp_path / "made", tmp_path) == contents(shop.pack, tmp_path)
    assert ("RANGE", weights) in hub.asked


def test_what_the_hub_holds_is_not_believed(
    shop: SimpleNamespace, hub: SimpleNamespace, tmp_path: Path, cache: Path
) -> None:
    push_pack(shop.pack, "hf:me/words")
    _, files = hub.repos["me/words"]["main"]
    out = tmp_path / "made"
    held = dict(files)
    changes = {
        "another file": lambda: files.update({"router.json": held["router.json"] + b" "}),
        "no manifest": lambda: files.pop("manifest.json"),
        "no router": lambda: files.pop("router.json"),
        "a hostile manifest": lambda: files.update({"manifest.json": b"[" * 100_000}),
        "too large": lambda: hub.sizes.update({"manifest.json": 10**15}),
        "another signature": lambda: files.update({"model.sig": b"{}"}),
    }
    for change in changes.values():
        change()
        with pytest.raises(PackError) as refusal:
            pull_pack("hf:me/words", out, policy=read_policy(shop.policy))
        assert "\n" not in str(refusal.value)
        assert not out.exists()
        assert list(cache.iterdir()) == []
        files.clear()
        files.update(held)
        hub.sizes.clear()
    pull_pack("hf:me/words", out, policy=read_policy(shop.policy))


def test_what_the_hub_refuses_is_one_line(
    shop: SimpleNamespace, hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    push_pack(shop.pack, "hf:me/words")
    for source, said in (
        ("hf:me/other", "not there"),
        ("hf:me/words@v9", "no such revision"),
        ("hf:-a/..b", "refuses"),
    ):
        with pytest.raises(LexiconError, match=said) as refusal:
            pull_pack(source, tmp_path / "made")
        assert "\n" not in str(refusal.value)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(LexiconError, match="hf auth login") as refusal:
        push_pack(shop.pack, "hf:me/words")
    assert "\n" not in str(refusal.value)
    assert list(cache.iterdir()) == []


def test_the_hub_out_of_reach_is_one_line(shop: SimpleNamespace, tmp_path: Path) -> None:
    for use in (lambda: pull_pack("hf:me/words", tmp_path / "made"), lambda: push_pack(shop.pack, "hf:me/words")):
        with pytest.raises(LexiconError, match="out of reach") as refusal:
            use()
        assert "\n" not in str(refusal.value)


@given(
    text=st.text(max_size=60)
    | st.from_regex(r"(https?|ftp|file|hf|HTTP|data):(//)?[a-z@:/#=\[\].%0-9]*", fullmatch=True)
)
def test_any_text_is_a_place_or_refused(text: str) -> None:
    try:
        place = read_place(text)
    except LexiconError:
        return
    assert isinstance(place, Path) != ("://" in text or text.startswith("hf:"))
    assert not isinstance(place, Web) or place.url.startswith(("http://", "https://"))
    assert not isinstance(place, Hub) or place.repository.count("/") == 1


def test_what_a_place_does_not_take_is_said(shop: SimpleNamespace, tmp_path: Path) -> None:
    for use, said in (
        (lambda: push_pack(shop.pack, "https://example.org/x.lexpack"), "takes no packs"),
        (lambda: push_pack(shop.pack, str(tmp_path / "x"), private=True), "--private"),
        (lambda: push_pack(shop.pack, "hf:me/words", overwrite=True), "--overwrite"),
        (lambda: pull_pack(str(shop.pack), tmp_path / "x", sha256="0" * 64), "--sha256"),
        (lambda: pull_pack(str(tmp_path / "absent"), tmp_path / "x"), "absent"),
        (lambda: pull_pack(str(shop.domains), tmp_path / "x"), "not a pack"),
        (lambda: pull_pack("file:///etc/passwd", tmp_path / "x"), "file"),
    ):
        with pytest.raises(LexiconError, match=said):
            use()
    assert not (tmp_path / "x").exists()


def test_the_command_line(
    shop: SimpleNamespace, hub: SimpleNamespace, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("pack", "push", shop.file, "hf:me/words", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["commit"] == hub.repos["me/words"]["main"][0]
    done = cli("pack", "pull", "hf:me/words", "--trust", shop.policy, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["signed_by"] == "us"
    assert verify_pack(tmp_path / "words").domains == DOMAINS
    with serving(lambda h: h.part(shop.bytes, mark=ETAG)) as (url, _):
        done = cli("pack", "pull", url)
        assert done.exit_code == 0, done.output
        assert "changed on its way" in done.stderr
        again = cli("pack", "pull", url)
        assert (again.exit_code, again.stderr.count("\n")) == (1, 1), again.output
        assert cli("pack", "pull", url.replace("x.lexpack", "x")).exit_code == 2
        wrong = cli("pack", "pull", url, "--out", "new", "--max-size", "1kB")
        assert (wrong.exit_code, wrong.stderr.count("\n"), (tmp_path / "new").exists()) == (1, 1, False), wrong.output
    assert (tmp_path / "x.lexpack").read_bytes() == shop.bytes
    shutil.rmtree(tmp_path / "words")
    done = cli("pack", "pull", shop.less, "--out", "words", "--trust", shop.policy)
    assert (done.exit_code, done.stderr.count("\n"), (tmp_path / "words").exists()) == (1, 1, False), done.output


def test_a_pack_in_a_folder_beside(shop: SimpleNamespace, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    copy_pack(shop.pack, tmp_path / "there" / "words")
    monkeypatch.chdir(tmp_path)
    done = cli("pack", "pull", "./there/words")
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "words", tmp_path) == contents(shop.pack, tmp_path)
    for source, message in (
        ("./words", "lies there already: add --out"),
        ("there/words", "words exists: choose another --out"),
        ("./absent", "no model at 'absent'"),
    ):
        wrong = cli("pack", "pull", source)
        assert (wrong.exit_code, wrong.stderr.count("\n"), message in wrong.stderr) == (1, 1, True), wrong.output
