"""One module a format, and the choice between them. A reader applies no rule: it yields a `Row` per input row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers import delimited, dictd, hub, jsonl, naacl2019, wordnet
from lora_lexicon.data.readers.recognise import FORMATS, recognise
from lora_lexicon.data.readers.source import Input, Options

__all__ = ["FORMATS", "Input", "Options", "read", "read_input", "recognise"]

_READERS: dict[str, Callable[[Path, Options], Iterator[Row]]] = {
    "jsonl": jsonl.read,
    "csv": delimited.read_csv,
    "tsv": delimited.read_tsv,
    "3dex": delimited.read_3dex,
    "naacl2019": naacl2019.read,
    "wordnet": wordnet.read,
    "dictd": dictd.read,
}


def read(
    inputs: Sequence[str], format: str | None = None, *, columns: Mapping[str, str] | None = None, source: str = ""
) -> Iterator[Row]:
    """Yields one row per row of the inputs, in their order.

    Args:
        format: one of `FORMATS`; None lets each input's content decide.
        columns, source: see `Options`.

    Raises:
        DataError: an input that is missing, empty or of no known format, before any row is read.
    """
    options = Options(columns or {}, source)
    for found in recognise(inputs, format):
        yield from read_input(found, options)


def read_input(found: Input, options: Options) -> Iterator[Row]:
    """Yields the rows of one recognised input."""
    if found.format == "hub":
        yield from hub.read(found.name, options)
    else:
        yield from _READERS[found.format](found.path, options)
