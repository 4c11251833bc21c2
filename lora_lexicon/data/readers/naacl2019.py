"""The NAACL-2019 data (Ishiwatari et al.): `NAME.txt` with the definitions beside `NAME.eg` with the examples.

`.txt`: word%sense, part of speech, source, definition, two lists of synonyms, separated by tabs.
`.eg`: word%sense, an example with `<TRG>` where the word stood. A pair named after a split gives that split.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers.source import Options, lines
from lora_lexicon.data.split import split_name
from lora_lexicon.errors import DataError

_TXT_LINE = re.compile(r"^[^\t]+%[^\t]*\t[^\t]*\t[^\t]*\t[^\t]+")
_EG_LINE = re.compile(r"^[^\t]+%[^\t]*\t.*<TRG>")
_SENSE = re.compile(r"%[^%]*$")


def base_of(path: Path) -> Path:
    """`path` without `.txt` or `.eg`."""
    return path.with_suffix("") if path.suffix in (".txt", ".eg") else path


def files_of(path: Path) -> tuple[Path, ...]:
    """(definitions, examples) of the pair that `path` belongs to, or () where one of them is missing."""
    base = base_of(path)
    pair = (base.with_name(base.name + ".txt"), base.with_name(base.name + ".eg"))
    return pair if all(file.is_file() for file in pair) else ()


def looks_like(head: list[str]) -> bool:
    """Whether these are lines of a `.txt` or `.eg` file; some of them may be broken."""
    return any(2 * sum(bool(p.match(line)) for line in head) > len(head) for p in (_TXT_LINE, _EG_LINE))


def read(path: Path, options: Options) -> Iterator[Row]:
    """Yields one row per line of the `.txt`, then one per line of the `.eg` that belongs to none."""
    files = files_of(path)
    if not files:
        raise DataError(f"{path}: NAACL-2019 data needs NAME.txt and NAME.eg side by side")
    definitions, examples_file = files
    split = split_name(base_of(path).name)
    examples: dict[str, list[tuple[int, str]]] = {}
    for number, line in lines(examples_file, options):
        key, separator, example = (line or "").rstrip("\r\n").partition("\t")
        if separator:
            examples.setdefault(key, []).append((number, example))
        elif line is None or line.strip():
            yield Row(str(examples_file), number, error="broken row")
    used: set[str] = set()
    for number, line in lines(definitions, options):
        fields = [] if line is None else line.rstrip("\r\n").split("\t")
        if fields == [""]:
            continue
        if len(fields) < 4:
            yield Row(str(definitions), number, error="broken row")
            continue
        key, pos, source, definition = fields[:4]
        used.add(key)
        term = _SENSE.sub("", key).replace("_", " ")
        contexts = tuple(example.replace("<TRG>", term) for _, example in examples.get(key, ()))
        yield Row(str(definitions), number, term, definition, contexts, source or options.source, pos=pos, split=split)
    for key, found in examples.items():
        if key not in used:
            for number, _ in found:
                yield Row(str(examples_file), number, error="example without an entry")
