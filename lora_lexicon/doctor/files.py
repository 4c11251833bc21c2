"""The files of a folder that nobody vouches for: what may be opened at all, and what no loader reads."""

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from lora_lexicon.doctor.chart import Chart

MAX_FILES = 100_000
MAX_DEPTH = 16
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def may_be_opened(chart: Chart) -> bool:
    """Whether every file is a plain one inside the folder; what is not is noted, and nothing is opened then."""
    inside = [chart.path, *_blobs(chart.path)]
    fine = True
    for count, path in enumerate(_walk(chart.path)):
        if count == MAX_FILES:
            chart.find(f"holds more than {MAX_FILES:,} files: it is none of ours", mend="")
            return False
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            target = path.resolve()
            if not any(target.is_relative_to(folder) for folder in inside):
                copy = f"cp --remove-destination {shlex.quote(str(target))} {shlex.quote(str(path))}"
                chart.find("is a link out of the folder, and was not followed", path, copy)
                fine = False
            mode = path.stat().st_mode if path.exists() else 0
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            chart.find("is neither a file nor a folder, and was not opened", path, f"rm {shlex.quote(str(path))}")
            fine = False
    return fine


def _blobs(folder: Path) -> list[Path]:
    """Where the Hub's cache holds the files that its snapshots link to."""
    blobs = folder.parent.parent / "blobs"
    return [blobs] if folder.parent.name == "snapshots" and blobs.is_dir() else []


def _walk(folder: Path) -> Iterator[Path]:
    """All below a folder, links not followed."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if len(here.relative_to(folder).parts) >= MAX_DEPTH:
            folders.clear()
        yield from (here / name for name in (*folders, *files))


def pickles(folder: Path) -> list[Path]:
    """The files of a folder that hold pickles, which no command of ours opens."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in PICKLES and path.is_file()]
