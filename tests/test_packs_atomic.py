"""A pack that is changed is the old one or the new one at every moment, and one command changes it at a time."""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composing import DOMAINS, PROMPTS, make_lora, workshop

from lora_lexicon import folders
from lora_lexicon.errors import LexiconError
from lora_lexicon.folders import changing, new_folder, remove_stale, take_place
from lora_lexicon.packs.pack import add_expert, build_pack, copy_pack, remove_expert, verify_pack
from lora_lexicon.packs.remote import pull_pack

WRITES = (
    "os.rename",
    "os.link",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
)


@pytest.fixture(scope="module")
def shop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    shop = workshop(tiny_base, tmp_path_factory.mktemp("shop"), ffn=False)
    shop.pack = shop.folder / "pack"
    build_pack(str(shop.base), shop.lora, shop.domains, shop.pack, include_base=True)
    shop.slang = make_lora(shop.base, shop.folder / "slang", seed=9)
    return shop


def killed_after(count: int, work: Callable[[], Any]) -> bool:
    """Runs work in a process of its own, which ends without a word at its next change of a file after `count`.

    True if it was killed, False if it was done before.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            changes = event in WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3)
            seen += bool(changes)
            if seen > count:
                os._exit(9)

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="fork beside torch")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("swaps", [True, False], ids=["in one step", "in two"])
def test_killed_anywhere_it_is_the_old_pack_or_the_new(
    shop: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(folders, "_swapped", lambda *_: False)
    seen, count, killed = set(), 0, True
    while killed:
        pack = Path(shutil.copytree(shop.pack, tmp_path / "pack"))
        killed = killed_after(count, lambda pack=pack: remove_expert(pack, DOMAINS[2]))
        if not swaps and not pack.exists():  # the moment between two steps
            remove_stale(pack)
        domains = verify_pack(pack).domains
        assert domains in (DOMAINS, DOMAINS[:2])
        seen.add(domains)
        if domains == DOMAINS and count % 7 == 0:
            remove_expert(pack, DOMAINS[2])
            assert verify_pack(pack).domains == DOMAINS[:2]
            assert [path.name for path in tmp_path.iterdir()] == ["pack"], "what the killed run left is gone"
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        count += 1
    assert seen == {DOMAINS, DOMAINS[:2]}
    assert count > 20


@pytest.mark.skipif(sys.platform != "linux", reason="fork beside torch")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_killed_pulls_to_one_file_left_goes_with_the_next(shop: SimpleNamespace, tmp_path: Path) -> None:
    out, left = tmp_path / "one.lexpack", 0
    for count in range(1, 60, 6):
        killed_after(count, lambda: pull_pack(str(shop.pack), out, overwrite=True))
        left += any(path != out for path in tmp_path.iterdir())
        pull_pack(str(shop.pack), out, overwrite=True)
        assert list(tmp_path.iterdir()) == [out]
    assert left > 3


def test_two_at_once_one_is_refused(shop: SimpleNamespace, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(shop.pack, tmp_path / "pack"))
    for change in (lambda: remove_expert(pack, DOMAINS[0]), lambda: add_expert(pack, shop.slang, [PROMPTS[3]], [])):
        with changing(pack), pytest.raises(LexiconError, match="another command changes") as refusal:
            change()
        assert "\n" not in str(refusal.value)
    for replace in (
        lambda: pull_pack(str(shop.pack), pack, overwrite=True),
        lambda: copy_pack(shop.pack, pack, overwrite=True),
        lambda: build_pack(str(shop.base), shop.lora, shop.domains, pack, overwrite=True),
    ):
        with changing(pack), pytest.raises(LexiconError, match="another command changes"):
            replace()
        replace()
    assert verify_pack(pack).domains == DOMAINS
    remove_expert(pack, DOMAINS[0], out=tmp_path / "two")


def test_of_many_changes_none_is_lost(shop: SimpleNamespace, tmp_path: Path) -> None:
    """Each either happened or was refused."""
    pack = Path(shutil.copytree(shop.pack, tmp_path / "pack"))
    done: list[str] = []

    def remove(name: str) -> None:
        with suppress(LexiconError):  # refused
            remove_expert(pack, name)
            done.append(name)

    threads = [threading.Thread(target=remove, args=(name,)) for name in DOMAINS[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done
    assert set(verify_pack(pack).domains) == set(DOMAINS) - set(done)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_takes_another_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
    if not swaps:
        monkeypatch.setattr(folders, "_swapped", lambda *_: False)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    take_place(tmp_path / "new", tmp_path / "old")
    assert ((tmp_path / "old" / "file").read_text(), (tmp_path / "new" / "file").read_text()) == ("new", "old")
    (tmp_path / "old" / "manifest.json").write_text("{}")
    with new_folder(tmp_path / "old", replace=True) as folder:
        (folder / "file").write_text("third")
    assert (tmp_path / "old" / "file").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
