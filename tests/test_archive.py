"""A pack in one file: the same bytes each time, mapped as it lies, and nothing gets out of it that should not."""

import json
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from composing import DOMAINS, PROMPTS, workshop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lora_lexicon import archive
from lora_lexicon.archive import ALIGNMENT, unpack, write_archive
from lora_lexicon.cache import unpacked
from lora_lexicon.compose.system import load_system
from lora_lexicon.errors import LexiconError, PackError
from lora_lexicon.inference.engine import define
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.packs.pack import build_pack, copy_pack, verify_pack

SHORT = Decoding(max_new_tokens=5)


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.pack, shop.file = shop.folder / "pack", shop.folder / "pack.lexpack"
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack, name="three", include_base=True)
    build_pack(str(shop.base), shop.lora, shop.domains, shop.file, name="three", include_base=True)
    return shop


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LEXICON_CACHE", str(tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_and_file_hold_the_same_bytes_each_time(shop: SimpleNamespace, tmp_path: Path) -> None:
    again, file = tmp_path / "again", tmp_path / "again.lexpack"
    build_pack(str(shop.base), shop.lora, shop.domains, again, name="three", include_base=True)
    copy_pack(shop.pack, file)
    assert contents(again) == contents(shop.pack)
    assert file.read_bytes() == shop.file.read_bytes()
    copy_pack(unpacked(file), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(shop.pack)


def test_a_file_answers_as_its_folder(shop: SimpleNamespace, cli) -> None:
    texts = [define(load_system(str(path)), PROMPTS, SHORT) for path in (shop.pack, shop.file)]
    assert texts[0] == texts[1]
    charts = [cli("doctor", path, "--json").stdout for path in (shop.pack, shop.file)]
    assert json.loads(charts[1])["healthy"]
    assert charts[0].replace(str(shop.pack), str(shop.file)) == charts[1]


def test_tensors_are_mapped_where_they_lie(shop: SimpleNamespace) -> None:
    """With nothing but the zip's directory and the safetensors header, which is what another reader would do."""
    wanted = load_file(shop.pack / "router.safetensors")["centroids"]
    with zipfile.ZipFile(shop.file) as held:
        assert held.namelist()[0] == "manifest.json"
        raw = shop.file.read_bytes()
        for info in held.infolist():
            name, extra = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
            start = info.header_offset + 30 + name + extra
            assert start % ALIGNMENT == 0, info.filename
            assert raw[start : start + info.file_size] == held.read(info)
            if info.filename == "router.safetensors":
                length = struct.unpack("<Q", raw[start : start + 8])[0]
                place = json.loads(raw[start + 8 : start + 8 + length])["centroids"]["data_offsets"][0]
                mapped = np.memmap(shop.file, np.float32, "r", start + 8 + length + place, wanted.shape)
                assert np.array_equal(mapped, wanted)


def _member(name: str, content: bytes = b"x", **fields: object) -> Callable[[zipfile.ZipFile], None]:
    def write(held: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo(name)
        room = -(held.fp.tell() + 36 + len(name.encode())) % ALIGNMENT  # type: ignore[union-attr]
        info.extra = struct.pack("<HHH", archive.PADDING, 2 + room, ALIGNMENT) + bytes(room)
        for key, value in fields.items():
            setattr(info, key, value)
        held.writestr(info, content)

    return write


def _members(*names: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda held: [_member(name)(held) for name in names] and None


NAMED, TWICE = "which no pack may hold", "two files of one name"
HOSTILE: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "a parent": (_member("../out"), NAMED),
    "deeper": (_member("adapters/../../out"), NAMED),
    "absolute": (_member("/etc/out"), NAMED),
    "of Windows": (_member("C:\\out"), NAMED),
    "backslashes": (_member("..\\out"), NAMED),
    "a folder": (_member("adapters/"), NAMED),
    "hidden": (_member(".bashrc"), NAMED),
    "a link": (_member("adapters", b"/etc", external_attr=(stat.S_IFLNK | 0o777) << 16), NAMED),
    "a device": (_member("null", external_attr=(stat.S_IFCHR | 0o666) << 16), NAMED),
    "twice": (_members("router.json", "router.json"), TWICE),
    "another case": (_members("router.json", "ROUTER.json"), TWICE),
    "in a file": (_members("router.json", "Router.json/x"), "inside another"),
    "a bomb": (_member("router.json", bytes(10**6), compress_type=zipfile.ZIP_DEFLATED), "compressed"),
    "too deep": (_member("a/b/c/d/e/f"), NAMED),
    "not ASCII": (_member("é"), NAMED),
    "too many": (_members(*(f"f{i}" for i in range(archive.MAX_FILES))), "more than a pack may hold"),
    "a comment": (lambda held: setattr(held, "comment", b"x"), "only the first part"),
    "a file's comment": (_member("a", comment=b"x"), "entry of 'a'"),
    "another extra field": (_member("a", extra=struct.pack("<HHH", 0x5455, 2, 0)), "extra field"),
    "padding that tells": (_member("a", extra=struct.pack("<HHHB", archive.PADDING, 3, 64, 1)), "extra field"),
    "too much padding": (_member("a", extra=struct.pack("<HHH", archive.PADDING, 66, 64) + bytes(64)), "extra field"),
    "another alignment": (_member("a", extra=struct.pack("<HHH", archive.PADDING, 2, 4)), "extra field"),
    "padded twice": (_member("a", extra=struct.pack("<HHH", archive.PADDING, 2, 64) * 2), "extra field"),
    "not aligned": (_member("a", extra=b""), "multiple of 64"),
    "a gap": (lambda held: (setattr(held, "start_dir", held.start_dir + 64), _member("a")(held))[1], "before it ends"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_archive_writes_nothing(tmp_path: Path, what: str) -> None:
    file, (write, said) = tmp_path / "bad.lexpack", HOSTILE[what]
    with zipfile.ZipFile(file, "w") as held:
        _member("manifest.json")(held)
        write(held)
    for use in (lambda: unpack(file, tmp_path / "deep" / "down" / "out"), lambda: unpacked(file)):
        with pytest.raises(PackError, match=said) as refusal:
            use()
        assert str(refusal.value).startswith(f"{file} ") or str(refusal.value).startswith(f"{file}: ")
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.lexpack"]


def _ends(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """What comes before an archive's central directory, the directory, and the end record."""
    length, begin = struct.unpack("<2L", raw[-10:-2])
    return raw[:begin], raw[begin : begin + length], raw[-22:]


def _end(count: int, length: int, begin: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, begin, 0)


BESIDE: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "something before": lambda files, own, end: b"#!/bin/sh\n" + files + own + end,
    "before, and told of": lambda f, own, end: bytes(64) + f + own + _end(3, len(own), len(f) + 64),
    "before the directory": lambda files, own, end: files + b"x" + own + _end(3, len(own), len(files) + 1),
    "after the directory": lambda files, own, end: files + own + b"x" + end,
    "a longer directory": lambda files, own, end: files + own + b"x" + _end(3, len(own) + 1, len(files)),
    "two directories": lambda files, own, end: files + own + own + _end(3, len(own), len(files) + len(own)),
    "two ends": lambda files, own, end: files + own + end + end,
    "two zips": lambda files, own, end: 2 * (files + own + end),
    "something after": lambda files, own, end: files + own + end + b"\0",
    "too few": lambda files, own, end: files + own + _end(2, len(own), len(files)),
    "too many": lambda files, own, end: files + own + _end(4, len(own), len(files)),
    "half a count": lambda files, own, end: files + own + end[:8] + b"\2" + end[9:],
    "all ones, without a zip64": lambda files, own, end: files + own + end[:8] + b"\xff\xff" + end[10:],
    "of several disks": lambda files, own, end: files + own + end[:4] + b"\1" + end[5:],
    "a zip64 that lies": lambda files, own, end: files + own + struct.pack(
        "<4sQ2H2L4Q4sLQL", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(own), len(files) - 1,
        b"PK\6\7", 0, len(files + own), 1) + end,
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
def test_nothing_lies_beside_the_parts(shop: SimpleNamespace, tmp_path: Path, what: str) -> None:
    file = tmp_path / "bad.lexpack"
    file.write_bytes(BESIDE[what](*_ends(small(shop, tmp_path))))
    with pytest.raises(PackError) as refusal:
        archive.members(file)
    assert str(refusal.value).startswith(f"{file} ")


def test_a_size_beyond_all_disks_is_refused(tmp_path: Path) -> None:
    """The second file lies, as both headers of the first say, where no file reaches."""
    file, size, full = tmp_path / "bad.lexpack", 2**63, 2**32 - 1
    local = struct.pack("<4s5H3L2H1sHHQQHHH7x", b"PK\3\4", 45, 0, 0, 0, 0, 0, full, full, 1, 33, b"a",
                        1, 16, size, size, archive.PADDING, 9, ALIGNMENT)  # fmt: skip
    entries = [(b"a", (size, size, 0)), (b"b", (size, size, len(local) + size))]
    own = b"".join(
        struct.pack("<4s6H3L5H2L1sHHQQQ", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, full, full, 1, 28, 0, 0, 0, 0, full, name,
                    1, 24, *numbers) for name, numbers in entries
    )  # fmt: skip
    file.write_bytes(local + own + _end(2, len(own), len(local)))
    with pytest.raises(PackError, match="is damaged"):
        archive.members(file)


def read(file: Path) -> dict[str, bytes]:
    return {one.name: b"".join(archive.blocks(file, one)) for one in archive.members(file)}


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 60, 300, 0], ids=["zip", "large files", "far files", "all"])
def test_each_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Put in one byte anywhere, take it out or change it: the archive is refused, or holds the same."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)  # from where on zipfile writes 64 bits
    held = {"manifest.json": b"{}", "a/empty": b"", "a/long": bytes(range(100)), "z": b"z"}
    for name, content in held.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    file = tmp_path / "one.lexpack"
    write_archive(tmp_path / "folder", list(held), file)
    assert read(file) == held
    raw, free = file.read_bytes(), set()
    assert (b"PK\6\7" in raw) == (limit < 1000)
    for at in range(len(raw) + 1):
        byte = raw[at : at + 1]
        swapped = {bytes([byte[0] ^ mask]) for mask in (1, 16, 128, 255)} | {b"\0", b"\xff"} - {byte} if byte else set()
        for put in [b"\0" + byte, b"P" + byte, b"", *swapped] if byte else [b"\0", b"\xff"]:
            file.write_bytes(raw[:at] + put + raw[at + 1 :])
            try:
                assert read(file) == held
                free.add(at)
                assert len(put) == len(byte), "nothing may be put in or taken out"
            except PackError:
                pass
    # Versions and attributes: 10 bytes of an entry, 2 of a header, and 4 of the zip64's end.
    assert len(free) == len(held) * 12 + 4 * (limit < 1000)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_in_one_line(shop: SimpleNamespace, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, put in, taken out: the pack is refused, or what was changed is not part of what it holds."""
    raw = bytearray(small(shop, tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, len(raw) - 1), st.integers(max(0, len(raw) - 900), len(raw) - 1)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    file, out = tmp_path / "fuzzed.lexpack", tmp_path / "fuzzed"
    file.write_bytes(raw)
    shutil.rmtree(out, ignore_errors=True)
    refusal = ""
    try:
        unpack(file, out)
    except PackError as error:
        refusal = str(error)
    assert bool(refusal) != out.exists()
    assert "\n" not in refusal
    assert refusal or contents(out) == contents(tmp_path / "small")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "holds no manifest.json"),
    "no manifest": (_without("manifest.json"), "holds no manifest.json"),
    "a damaged manifest": (_written("manifest.json", "{"), "/manifest.json is not valid JSON"),
    "no router": (_without("router.json"), "router.json"),
    "another router": (_written("router.json", "{}"), "router.json"),
    "no base": (_without("base/config.json"), "base/config.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_messages_name_the_users_file(shop: SimpleNamespace, tmp_path: Path, cli, what: str) -> None:
    folder, file, (spoil, said) = tmp_path / "folder", tmp_path / "my own.lexpack", BROKEN[what]
    shutil.copytree(shop.pack, folder)
    spoil(folder)
    write_archive(folder, sorted(contents(folder)), file)
    commands = [("pack", "verify", file), ("pack", "copy", file, "--out", tmp_path / "new")]
    commands += [("define", "word", "--model", file), ("route", "word", file)]
    if what not in ("another router", "no base"):  # which it does not read
        commands += [("pack", "inspect", file)]
    if said == "holds no manifest.json":
        commands += [("doctor", file), ("pack", "list", tmp_path, "--json")]
    for command in commands:
        done = cli(*command)
        told = done.stderr if done.exit_code else done.stdout
        assert done.exit_code == (command[1] != "list"), command
        assert str(file) in told
        assert said in told
        assert "cache" not in told
        assert told.count("\n") == 1
    if said == "holds no manifest.json":
        assert not (tmp_path / "cache").exists()
        return
    chart = json.loads(cli("doctor", file, "--json").stdout)
    assert (chart["path"], chart["healthy"]) == (str(file), False)
    assert "cache" not in json.dumps(chart)
    assert f"--out '{file}'" in json.dumps(chart)


def small(shop: SimpleNamespace, tmp_path: Path) -> bytes:
    """A small archive of plain files; the folder it was made of is beside it."""
    folder, file = tmp_path / "small", tmp_path / "small.lexpack"
    if not file.is_file():
        (folder / "adapters" / "craft").mkdir(parents=True)
        for name in ("manifest.json", "router.json", "adapters/craft/adapter_config.json"):
            shutil.copyfile(shop.pack / name, folder / name)
        write_archive(folder, ["manifest.json", "adapters/craft/adapter_config.json", "router.json"], file)
    return file.read_bytes()


def test_what_was_changed_in_the_cache_is_unpacked_again(shop: SimpleNamespace) -> None:
    folder = unpacked(shop.file)
    assert unpacked(shop.file) == folder
    (folder / "router.json").write_text("{}")
    assert contents(unpacked(shop.file)) == contents(shop.pack)
    (folder / "stray.py").write_text("")
    assert contents(unpacked(shop.file)) == contents(shop.pack)


def test_a_folder_is_never_the_half_of_one(shop: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(LexiconError, match="exists"):
        copy_pack(shop.pack, shop.file)
    with pytest.raises(PackError, match="onto itself"):
        copy_pack(shop.pack, shop.pack, overwrite=True)
    cut = tmp_path / "cut.lexpack"
    cut.write_bytes(shop.file.read_bytes()[:-30])
    with pytest.raises(PackError, match="first part"):
        verify_pack(unpacked(cut))
    assert not list((tmp_path / "cache").glob("**/*"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float32"])
def test_a_narrower_type_is_near(shop: SimpleNamespace, tmp_path: Path, dtype: str) -> None:
    """Within the type's own rounding, and what was narrowed once stays as it is."""
    made = copy_pack(shop.pack, tmp_path / dtype, dtype=dtype)
    assert {domain["dtype"] for domain in made["domains"]} == {dtype}
    verify_pack(tmp_path / dtype)
    ours, theirs = load_system(str(tmp_path / dtype)), load_system(str(shop.pack))
    bound = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127, "float32": 0}[dtype]
    for name in DOMAINS:
        from lora_lexicon.experts.checkpoint import load_adapter

        one, other = (load_adapter(p / "adapters" / name, name).factors for p in (tmp_path / dtype, shop.pack))
        for layer, factors in one.items():
            for half, dim in (("a", 0), ("b", 1)):
                new, old = getattr(factors, half).float(), getattr(other[layer], half)
                room = old.abs().amax(dim=dim, keepdim=True) if dtype == "int8" else old.abs()
                assert ((new - old).abs() <= bound * room + 2**-25).all()  # below it float16 has but few steps
    assert len(define(ours, PROMPTS, SHORT)) == len(define(theirs, PROMPTS, SHORT))
    sizes = [
        sum(f.stat().st_size for f in (p / "adapters").rglob("*.safetensors")) for p in (tmp_path / dtype, shop.pack)
    ]
    assert sizes[0] <= sizes[1]
    copy_pack(tmp_path / dtype, tmp_path / "again", dtype=dtype)
    again = contents(tmp_path / "again")
    weights = [name for name in again if name.endswith(".safetensors") and name.startswith("adapters")]
    assert all(again[name] == (tmp_path / dtype / name).read_bytes() for name in weights) or dtype == "int8"


def test_the_command_line(shop: SimpleNamespace, tmp_path: Path, cli) -> None:
    one = tmp_path / "one.lexpack"
    settings = ("--version", "1.2", "--licence", "CC0-1.0", "--language", "en", "--description", "Three domains.")
    parts = (shop.folder / "lora", "--base", shop.base, "--router", shop.domains)
    done = cli("pack", "build", *parts, "--out", one, "--include-base", *settings, "--json")
    assert done.exit_code == 0, done.output
    done = cli("pack", "copy", one, "--out", tmp_path / "half", "--dtype", "float16", "--json")
    assert done.exit_code == 0, done.output
    cost = json.loads(done.stdout)["dtype_cost"]
    assert cost["rows"] == 200
    assert abs(cost["difference"]) < 1e-2
    assert cost["before"] != cost["after"]
    shown = json.loads(cli("pack", "inspect", tmp_path / "half", "--json").stdout)
    assert (shown["version"], shown["licence"], shown["name"]) == ("1.2", "CC0-1.0", "one")
    found = json.loads(cli("pack", "diff", one, tmp_path / "half", "--json").stdout)
    assert [row["name"] for row in found["changed"]] == list(DOMAINS)
    assert {row["cosine"] > 0.999999 for row in found["changed"]} == {True}
    assert (found["added"], found["removed"], found["fields"]) == ([], [], {})
    (tmp_path / "broken.lexpack").write_bytes(b"PK")
    rows = json.loads(cli("pack", "list", tmp_path, "--json").stdout)["packs"]
    assert [Path(row["pack"]).name for row in rows] == ["broken.lexpack", "half", "one.lexpack"]
    assert ["fault" in row for row in rows] == [True, False, False]
    for command in (("inspect", one), ("diff", one, tmp_path / "half"), ("list", tmp_path), ("verify", one)):
        assert cli("pack", *command).exit_code == 0
    refused = cli("pack", "remove", one, DOMAINS[0])
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "--out" in refused.stderr
    assert cli("pack", "remove", one, DOMAINS[0], "--out", tmp_path / "two.lexpack").exit_code == 0
    assert os.path.getsize(tmp_path / "two.lexpack") < os.path.getsize(one)
