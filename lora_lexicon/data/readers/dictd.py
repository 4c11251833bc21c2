"""dictd dictionaries: `NAME.index` (headword, base64 offset and length) beside `NAME.dict` or `NAME.dict.dz`.

One row per sense of an entry (`dictd_entry`), and one per index line that gives none: headers,
further headwords of a text that was read already, entries without a definition.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers.dictd_entry import parse_entry
from lora_lexicon.data.readers.source import Options, lines, read_all, stem
from lora_lexicon.errors import DataError

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_VALUE = {digit: i for i, digit in enumerate(_DIGITS)}
_INDEX_LINE = re.compile(r"^[^\t]+\t[A-Za-z0-9+/]+\t[A-Za-z0-9+/]+(?:\t.*)?$")
_HEADER = re.compile(r"^00-?(?:database|[a-z0-9]+-(?:short|long|url|info)$)")
_SUFFIXES = (".index", ".dict.dz", ".dict")


def base_of(path: Path) -> Path:
    """`path` without the suffix of a dictd file."""
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix))
    return path


def files_of(path: Path) -> tuple[Path, ...]:
    """(index, text) of the dictionary that `path` belongs to, or () where one of them is missing."""
    base = base_of(path)
    if not base.name:  # the root, or the folder that one is in
        return ()
    index = base.with_name(base.name + ".index")
    texts = [base.with_name(base.name + suffix) for suffix in (".dict.dz", ".dict")]
    found = [text for text in texts if text.is_file()]
    return (index, found[0]) if index.is_file() and found else ()


def looks_like_index(head: list[str]) -> bool:
    """Whether these lines are a dictd index."""
    return bool(head) and all(_INDEX_LINE.match(line) for line in head)


def number_of(digits: str) -> int:
    """The value of a number in dictd's base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + _VALUE[digit]
    return value


def read(path: Path, options: Options) -> Iterator[Row]:
    """Yields the rows in the order of the index; `line` is the index's line."""
    files = files_of(path)
    if not files:
        raise DataError(f"{path}: a dictd dictionary needs NAME.index and NAME.dict or NAME.dict.dz side by side")
    index, text_file = files
    content = read_all(text_file)
    source = options.source or _short_name(index, content) or stem(index)
    seen: set[tuple[int, int]] = set()
    for number, line in lines(index, options):
        if line is not None and not line.strip():
            continue
        where = (str(index), number)
        fields = [] if line is None else line.rstrip("\r\n").split("\t")
        place = _place(fields, len(content))
        if place is None:
            yield Row(*where, error="broken row")
        elif _HEADER.match(fields[0]):
            yield Row(*where, term=fields[0], error="dictionary header")
        elif place in seen:
            yield Row(*where, term=fields[0], error="another headword of the same text")
        else:
            seen.add(place)
            entry = parse_entry(fields[0], _text(content, place))
            if not entry.senses:
                yield Row(*where, term=entry.term, error=entry.error)
            for sense in entry.senses:
                yield Row(*where, entry.term, sense.definition, sense.contexts, source, pos=sense.pos or entry.pos)


def _place(fields: list[str], size: int) -> tuple[int, int] | None:
    """(offset, length) of an index line, or None where it is malformed or points outside the text."""
    if len(fields) < 3 or not all(fields[:3]) or not set(fields[1] + fields[2]) <= set(_DIGITS):
        return None
    offset, length = number_of(fields[1]), number_of(fields[2])
    return (offset, length) if length and offset + length <= size else None


def _text(content: bytes, place: tuple[int, int]) -> str:
    return content[place[0] : place[0] + place[1]].decode("utf-8", "surrogateescape")


def _short_name(index: Path, content: bytes) -> str:
    """The dictionary's own name, without the version in brackets after it."""
    for _, line in lines(index, Options()):
        fields = (line or "").rstrip("\r\n").split("\t")
        if fields[0] in ("00-database-short", "00databaseshort") and (place := _place(fields, len(content))):
            name = _text(content, place).strip().split("\n")[-1].strip()
            return re.sub(r"\s*(?:\([^()]*\)|v\.\s*[\d.]+)$", "", name)
    return ""
