"""Which column holds which field: names given by the user, else common aliases. Knows nothing of files."""

from collections.abc import Mapping, Sequence

from lora_lexicon.errors import DataError

ALIASES: dict[str, tuple[str, ...]] = {
    "term": ("term", "word", "headword", "lemma"),
    "definition": ("definition", "gloss", "meaning"),
    "context": ("context", "contexts", "example", "examples", "sentence"),
    "source": ("source", "dataset_name"),
    "split": ("split", "split_type"),
    "domain": ("domain",),
    "pos": ("pos", "part_of_speech"),
    "language": ("language", "lang"),
}


def match(names: Sequence[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """The column of each field that has one, as {field: name as the input spells it}; case does not matter.

    Raises:
        DataError: a given column or field does not exist, or no column holds the term or the definition.
    """
    by_key: dict[str, str] = {}
    for name in names:
        by_key.setdefault(name.strip().casefold(), name)
    found: dict[str, str] = {}
    for field, aliases in ALIASES.items():
        for alias in aliases:
            if alias in by_key:
                found[field] = by_key[alias]
                break
    for field, name in given.items():
        if field not in ALIASES:
            raise DataError(f"--column {field}={name}: no field {field!r}: the fields are {', '.join(ALIASES)}")
        if name.strip().casefold() not in by_key:
            raise DataError(f"{where}: no column {name!r} (--column {field}={name}): it has {', '.join(names)}")
        found[field] = by_key[name.strip().casefold()]
    for field in ("term", "definition"):
        if field not in found:
            shown = ", ".join(names)[:200]
            hint = f"name it with --column {field}=NAME, or name another --format"
            raise DataError(f"{where}: no column for the {field} among {shown}: {hint}")
    return found
