"""Which format an input has, from its content; names decide only between files that belong together."""

from collections.abc import Sequence
from pathlib import Path

from lora_lexicon.data.readers import delimited, dictd, hub, jsonl, naacl2019, wordnet
from lora_lexicon.data.readers.source import Input, head_of
from lora_lexicon.errors import DataError
from lora_lexicon.resources import find_sample

FORMATS = ("jsonl", "csv", "tsv", "3dex", "naacl2019", "wordnet", "dictd", "hub")


def recognise(inputs: Sequence[str], format: str | None = None) -> list[Input]:
    """Each input's format and files; files that belong to one input (`x.txt` and `x.eg`) give one.

    Raises:
        DataError: an input is missing, empty, or not of the given or any known format.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"--format {format!r} is not known: use one of {', '.join(FORMATS)}")
    if not inputs:
        raise DataError("no input: give a file, a folder or a Hugging Face data set")
    found: dict[tuple[str, str], Input] = {}
    for name in inputs:
        for each in _recognise(find_sample(name), format):
            found.setdefault((each.format, each.name), each)
    return list(found.values())


def _recognise(name: str, format: str | None) -> list[Input]:
    path = Path(name)
    if format == "hub":
        return [Input("hub", name)]
    if (
        format in (None, "dictd")
        and (files := dictd.files_of(path))
        and (path != dictd.base_of(path) or not path.exists())
    ):
        return [_input("dictd", dictd.base_of(path), files)]
    if format in (None, "naacl2019") and not path.is_dir() and (files := naacl2019.files_of(path)):
        return [_input("naacl2019", naacl2019.base_of(path), files)]
    if path.is_dir():
        return _folder(path, format)
    if not path.exists():
        if format is None and hub.may_be_name(name):
            return [Input("hub", name)]
        raise DataError(f"{name} does not exist: give a file, a folder, or a Hugging Face data set as OWNER/NAME")
    if not path.is_file():
        raise DataError(f"{name} is neither a file nor a folder: give one")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty: give a file that holds rows")
    head = head_of(path)
    if not head:
        raise DataError(f"{name} holds no text: give a file that holds rows")
    kind = format or _by_content(path, head)
    if kind in ("dictd", "naacl2019"):
        need = "NAME.index and NAME.dict(.dz)" if kind == "dictd" else "NAME.txt and NAME.eg"
        raise DataError(f"{name}: format {kind} needs {need} side by side, and one is missing")
    if kind is None:
        raise DataError(f"{name} is of no known format: name one with --format ({', '.join(FORMATS)})")
    if format is not None:
        _check(path, head, format)
    return [_input(kind, path, (path,))]


def _folder(path: Path, format: str | None) -> list[Input]:
    if format in (None, "wordnet") and wordnet.recognises(path):
        return [_input("wordnet", path, tuple(path / name for name in wordnet.FILES if (path / name).is_file()))]
    pairs = [naacl2019.base_of(file) for file in sorted(path.glob("*.txt")) if naacl2019.files_of(file)]
    if format in (None, "naacl2019") and pairs:
        return [_input("naacl2019", base, naacl2019.files_of(base)) for base in pairs]
    raise DataError(f"{path} is a folder that holds neither WordNet's data files nor NAACL-2019 pairs: give its files")


def _by_content(path: Path, head: list[str]) -> str | None:
    if "\0" in head[0]:  # binary, or UTF-16
        return None
    if wordnet.looks_like_data(head):
        return "wordnet"
    if dictd.looks_like_index(head):
        return "dictd"
    if head[0].lstrip().startswith("{"):
        return "jsonl" if any(jsonl.parse(line) is not None for line in head) else None
    if naacl2019.looks_like(head):
        return "naacl2019"
    return delimited.format_of(head[0])


def _check(path: Path, head: list[str], format: str) -> None:
    """A format the user named must at least be possible."""
    if format == "wordnet" and not wordnet.looks_like_data(head):
        raise DataError(f"{path} is not a WordNet data file: leave --format out to have it recognised")
    if format == "jsonl" and not any(jsonl.parse(line) is not None for line in head):
        raise DataError(f"{path} is not JSON Lines (one object a line): leave --format out to have it recognised")


def _input(kind: str, path: Path, files: tuple[Path, ...]) -> Input:
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty: give a file that holds rows")
    # Progress counts what is read line by line: of a dictd pair that is the index.
    counted = files[:1] if kind == "dictd" else files
    return Input(kind, str(path), files, sum(file.stat().st_size for file in counted))
