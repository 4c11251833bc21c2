"""Dictionary output of `lora-lexicon define`: the options of --format, and the file they lead to."""

import re
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import note

if TYPE_CHECKING:
    from lora_lexicon.inference.engine import Definition


class Format(StrEnum):
    """How a dictionary takes definitions over."""

    tei = "tei"
    ontolex = "ontolex"
    jsonl = "jsonl"
    markdown = "markdown"


FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Dictionary entries with their provenance: tei (TEI Lex-0), ontolex (OntoLex-Lemon in Turtle), jsonl or "
        "markdown (docs/dictionary-output.md).",
    ),
]
ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out if it exists.")]
LanguageOption = Annotated[
    str | None,
    typer.Option("--language", metavar="TAG", help="The definitions' language for --format (BCP 47); en by default."),
]


def check_format(format: Format | None, out: Path | None, overwrite: bool, language: str | None, as_json: bool) -> None:
    """Refuses options that do not go together, before the long work."""
    if format is None and (out or language or overwrite):
        raise typer.BadParameter("--out, --overwrite and --language are of dictionary entries: add --format")
    if format is not None and as_json:
        raise typer.BadParameter("--json and --format are two forms of the same: leave one of them out")
    if overwrite and out is None:
        raise typer.BadParameter("--overwrite is of a file: add --out")
    if language is not None and not re.fullmatch(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*", language):
        raise typer.BadParameter(f"{language!r} is no language tag such as en or pt-BR", param_hint="--language")
    if out is not None:
        from lora_lexicon.folders import check_new_file

        check_new_file(out, replace=overwrite)


def write_entries(
    format: Format,
    answers: "Iterator[Definition]",
    origin: tuple[str, str, str, str, str],
    language: str,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Dictionary entries, to a file that appears when it is whole, or to standard output as they are written.

    Args:
        origin: model, base, the base's fingerprint, decoding and chooser, see `inference.formats.Provenance`.
    """
    from datetime import UTC, datetime

    from lora_lexicon import __version__
    from lora_lexicon.folders import new_file
    from lora_lexicon.inference.formats import FORMATS, Provenance

    model, base, fingerprint, decoding, chosen_by = origin
    if Path(base).is_dir():  # of a path the end, which its fingerprint confirms: the rest is this machine's
        base = "/".join(Path(base).resolve().parts[-2:])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    made = Provenance(model, base, fingerprint, decoding, chosen_by, __version__, date, language)
    pieces = FORMATS[format.value](answers, made)
    if out is None:
        for piece in pieces:
            sys.stdout.write(piece)
        return
    with new_file(out, replace=overwrite) as file:
        file.writelines(pieces)
    note(f"written to {out}")
