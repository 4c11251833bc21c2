"""Archives that were unpacked: the least recently used go first, and never what somebody uses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_lexicon import cache
from lora_lexicon.archive import write_archive
from lora_lexicon.cache import cached, clear_cache, staged, unpacked
from lora_lexicon.errors import LexiconError

SIZE = 100_000  # of the larger file in each


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LORA_LEXICON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_LEXICON_CACHE_BYTES", str(3 * SIZE))
    yield tmp_path / "cache" / "packs"
    release()


def release() -> None:
    """As if the process that used them ended."""
    for folder in list(cache._held):
        os.close(cache._held.pop(folder) or 0)


def archive_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / "parts").mkdir(exist_ok=True)
    (tmp_path / "parts" / "manifest.json").write_text(f'"{name}"')
    (tmp_path / "parts" / "more").write_bytes(bytes(SIZE))
    write_archive(tmp_path / "parts", ["manifest.json", "more"], tmp_path / f"{name}.lexpack")
    return tmp_path / f"{name}.lexpack"


def used(tmp_path: Path, name: str, when: int) -> Path:
    folder = unpacked(archive_of(tmp_path, name))
    release()
    os.utime(folder, (when, when))
    return folder


def names() -> list[str]:
    return [one.folder.name[0] for one in cached()]


def test_the_least_recently_used_go_first(place: Path, tmp_path: Path) -> None:
    old = [used(tmp_path, name, when) for when, name in enumerate("ab")]
    assert names() == ["a", "b"]
    assert unpacked(tmp_path / "a.lexpack") == old[0]
    release()
    assert names() == ["b", "a"]
    used(tmp_path, "c", 10**10)
    assert names() == ["a", "c"]
    (old[0] / "more").write_bytes(b"")  # of what was changed nothing stays, nor counts
    unpacked(tmp_path / "a.lexpack")
    assert (old[0] / "more").stat().st_size == SIZE


def test_what_a_process_uses_stays(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_lexicon.cache import unpacked; "
        "print(unpacked(Path(sys.argv[1])), flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(archive_of(tmp_path, "a"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        os.utime(folder, (0, 0))
        used(tmp_path, "b", 1)
        monkeypatch.setenv("LORA_LEXICON_CACHE_BYTES", "0")
        own = unpacked(archive_of(tmp_path, "c"))  # itself larger than the limit
        assert [(one.folder, one.in_use) for one in cached()] == [(folder, True), (own, True)]
        assert clear_cache() == []
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait(60) == 0
    assert [one.folder for one in clear_cache()] == [folder]
    release()
    assert [one.folder for one in clear_cache()] == [own]


def test_downloads_count_and_go_too(place: Path, tmp_path: Path) -> None:
    with staged("http://one", "one") as first:
        (first / "file.part").write_bytes(bytes(SIZE))
        with pytest.raises(LexiconError, match="another command brings one now"), staged("http://one", "one"):
            pass
    os.utime(first, (0, 0))
    packs = [used(tmp_path, name, when) for when, name in enumerate("ab", 1)]  # which are not larger than two
    assert not first.exists()
    with staged("http://one", "one") as again:
        assert again == first
        (first / "file.part").write_bytes(bytes(2 * SIZE))
        with staged("http://two", "two"):
            assert not any(pack.exists() for pack in packs)
            assert len(cached()) == 2
        assert first not in [one.folder for one in clear_cache()]
    assert [one.name for one in clear_cache()] == [f"downloads/{first.name}"]
    assert not cached()


def test_what_is_not_ours_stays(place: Path, tmp_path: Path) -> None:
    folder = used(tmp_path, "a", 0)
    left = folder.with_name(f".{folder.name}.abcd_123.partial")
    left.mkdir()
    (place / "mine").mkdir()
    (place / folder.name.replace("a-", "b-")).symlink_to(place / "mine")
    (place / folder.name.replace("a-", "c-")).write_text("")
    assert {one.folder for one in clear_cache()} == {folder, left}
    assert len(list(place.iterdir())) == 3


def test_what_cannot_be_is_one_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = archive_of(tmp_path, "a")
    for limit in ("20 GB", "-1", "1e9"):
        monkeypatch.setenv("LORA_LEXICON_CACHE_BYTES", limit)
        with pytest.raises(LexiconError, match="whole number of bytes"):
            unpacked(file)
    monkeypatch.delenv("LORA_LEXICON_CACHE_BYTES")
    place.parent.mkdir()
    place.write_text("")
    with pytest.raises(LexiconError, match="LORA_LEXICON_CACHE"):
        unpacked(file)


def test_the_command_line(place: Path, tmp_path: Path, cli) -> None:
    empty = json.loads(cli("pack", "cache", "--json").stdout)
    assert empty == {"cache": str(place), "limit": 3 * SIZE, "bytes": 0, "packs": [], "removed": []}
    folder, other = used(tmp_path, "a", 0), unpacked(archive_of(tmp_path, "b"))
    shown = cli("pack", "cache")
    assert folder.name[:8] in shown.stdout
    assert "200 kB of 300 kB" in shown.stderr
    done = json.loads(cli("pack", "cache", "--clear", "--json").stdout)
    assert done["removed"] == [folder.name]
    assert [(row["folder"], row["in_use"]) for row in done["packs"]] == [(other.name, True)]
    release()
    assert "removed 1 folders of 100 kB" in cli("pack", "cache", "--clear").stderr
