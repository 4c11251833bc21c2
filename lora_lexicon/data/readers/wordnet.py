"""WordNet database files (`data.noun`, `data.verb`, ...; format: WordNet's wndb(5)).

One row per lemma of a synset. A synset's quoted examples are shared by its lemmas: each goes to
the lemmas it contains, so a context always holds its term.
"""

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from lora_lexicon.data.entry import Row
from lora_lexicon.data.readers.source import Options, lines
from lora_lexicon.data.terms import IrregularForms, contains_term

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
LEXNAMES = (  # noqa: SIM905
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location "
    "noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change "
    "verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()

_DEFAULT = Options()
_EXAMPLE = re.compile(r'"([^"]*)"')
_DATA_LINE = re.compile(r"^\d{8} \d\d [nvasr] [0-9a-f]{2} ")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")


def recognises(path: Path) -> bool:
    """Whether `path` is a WordNet folder, or one of its data files."""
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    return path.name in FILES


def looks_like_data(head: list[str]) -> bool:
    """Whether these are lines of a data file; its head is the licence, each line of which starts with two spaces."""
    if head[0].startswith("  ") and any("WordNet" in line for line in head):
        return True
    return bool(_DATA_LINE.match(head[0]))


def read(path: Path, options: Options = _DEFAULT) -> Iterator[Row]:
    """Yields one row per (synset, lemma); a malformed line becomes a row with its error."""
    files = [path / name for name in FILES if (path / name).is_file()] if path.is_dir() else [path]
    for file in files:
        forms = IrregularForms.from_file(file.with_name(file.name.replace("data.", "") + ".exc"))
        for number, line in lines(file, options):
            if line is None:
                yield Row(str(file), number, error="overlong line")
            elif line.strip() and not line.startswith("  "):  # the licence at the head of each file
                yield from _rows(str(file), number, line, forms, options.source or "WordNet")


def licence(folder: Path) -> str:
    """WordNet's licence, the head of each database file (`  NN text` lines); it goes with all that is made of it."""
    with next(folder / name for name in FILES if (folder / name).is_file()).open(encoding="utf-8") as file:
        head = takewhile(lambda line: line.startswith("  "), file)
        return "\n".join(line.strip().partition(" ")[2] for line in head) + "\n"


def _rows(file: str, number: int, line: str, forms: IrregularForms, source: str) -> Iterator[Row]:
    try:
        fields, gloss = line.split(" | ", 1)
        parts = fields.split()
        domain, count = LEXNAMES[int(parts[1])], int(parts[3], 16)
        lemmas = [_MARKER.sub("", parts[4 + 2 * i]).replace("_", " ") for i in range(count)]
    except (ValueError, IndexError):
        yield Row(file, number, error="broken row")
        return
    definition, examples = split_gloss(gloss)
    for lemma in lemmas:
        contexts = tuple(e for e in examples if contains_term(e, lemma, forms))
        yield Row(file, number, lemma, definition, contexts, source, "en", domain, domain.split(".")[0])


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """A WordNet gloss as (definition, examples)."""
    first = gloss.find('"')
    if first < 0:
        return gloss.strip().strip(";").strip(), []
    examples = [" ".join(e.split()) for e in _EXAMPLE.findall(gloss[first:])]
    return gloss[:first].strip().strip(";:,").strip(), [e for e in examples if e]
