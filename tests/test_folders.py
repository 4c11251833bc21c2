"""Folders appear whole or not at all, and a failure leaves nothing behind."""

import errno
from pathlib import Path

import pytest

from lora_lexicon.errors import LexiconError
from lora_lexicon.folders import new_folder


def fail_in(path: Path, error: Exception) -> None:
    with new_folder(path) as folder:
        (folder / "half").write_text("x")
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # torch.save
    ],
)
def test_a_full_disk_is_one_error_in_whoever_s_words_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(LexiconError, match="disk full while writing"):
        fail_in(tmp_path / "not" / "yet" / "out", error)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="other"):
        fail_in(tmp_path / "there" / "new" / "out", ValueError("other"))
    assert not list((tmp_path / "there").iterdir())


def test_what_a_killed_run_left_is_removed_and_named_and_a_living_run_is_not_disturbed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    (tmp_path / ".out.abcdefgh.partial" / "shard").write_bytes(bytes(2_000_000))
    (tmp_path / ".out.b.abcdefgh.partial").mkdir()  # of the folder out.b
    with new_folder(tmp_path / "out") as first:
        assert [record.message for record in caplog.records] == [
            f"removed {tmp_path}/.out.abcdefgh.partial: 2.0 MB that an interrupted run left unfinished"
        ]
        with pytest.raises(ValueError, match="second"):
            fail_in(tmp_path / "out", ValueError("second"))
        assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.b.abcdefgh.partial", "out"]


def test_space_is_checked_before_the_first_byte(tmp_path: Path) -> None:
    with (
        pytest.raises(LexiconError, match=r"needs 1,000,000\.00 GB and its disk has"),
        new_folder(tmp_path / "not" / "yet", needs=10**15),
    ):
        pass
    assert not list(tmp_path.iterdir())


def refused(path: Path, message: str) -> None:
    with pytest.raises(LexiconError, match=message), new_folder(path, replace=True):
        pass


def test_only_what_we_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    refused(tmp_path / "thesis", "was not made by lora-lexicon")
    refused(tmp_path / "thesis" / "chapter.txt", "is a file")
    monkeypatch.chdir(tmp_path / "thesis")
    refused(Path("."), "is the folder you are in")
    refused(Path(".."), "is the folder you are in")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"
    with new_folder(Path("made")) as folder:
        (folder / "expert.json").write_text("{}")
        (folder / "expert.json").chmod(0o600)
        (folder / "old").write_text("")
    (tmp_path / "plain").write_text("")
    assert Path("made", "expert.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with new_folder(Path("made"), replace=True):
        pass
    assert not list(Path("made").iterdir())


def test_a_file_system_that_locks_no_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS wants a lock's file open for writing, which a folder never is."""

    def flock(_handle: int, _how: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("lora_lexicon.folders.fcntl.flock", flock)
    left = tmp_path / ".made.abcdefgh.partial"
    left.mkdir()
    with new_folder(tmp_path / "made") as folder:
        (folder / "expert.json").write_text("{}")
    assert (tmp_path / "made" / "expert.json").is_file()
    assert left.is_dir(), "nobody knows whether its run is alive"
