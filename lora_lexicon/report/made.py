"""How what a report shows was made: settings, signatures, and the commands that make it again."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lexicon.evaluation.run import Evaluation
from lora_lexicon.evaluation.saved import Saved
from lora_lexicon.report.document import Block, Code, Table, Text

TITLES = {"loss": "loss", "bleu": "BLEU", "rouge_l": "ROUGE-L"}
SETTINGS = {
    "version": "lora-lexicon",
    "models": "models",
    "data": "entries",
    "entries_fingerprint": "fingerprint of the entries",
    "split": "split",
    "limit": "limit",
    "rows": "rows",
    "base": "base, if given",
    "dtype": "number format",
    "quantize": "quantisation of the base",
    "expert_memory": "memory for experts",
    "random_routing": "random routing too",
    "seed": "seed",
    "decoding": "decoding",
    "best_of": "best of",
    "encoder": "encoder",
    "environment": "ran on",
}


def settings(saved: Sequence[Saved]) -> Table:
    """A column an evaluation."""
    rows = [[title, *(_setting(of.report.get(key)) for of in saved)] for key, title in SETTINGS.items()]
    bases = [", ".join(dict.fromkeys(filter(None, map(_base, of.evaluations)))) or None for of in saved]
    return Table(
        "How it was run", ["setting", *(of.path.name for of in saved)], [*rows, ["bases, with fingerprint", *bases]]
    )


def _base(each: Evaluation) -> str:
    """Its name, of a path the end, and its fingerprint."""
    name = "/".join(Path(each.base).parts[-2:])
    return f"{name} ({each.base_fingerprint[:12]})" if each.base_fingerprint else name


def _setting(value: Any) -> str | None:
    if isinstance(value, dict):
        drawn = ("temperature", "top_k", "top_p", "seed") if value.get("method") == "greedy" else ()
        value = {key.replace("_", " "): part for key, part in value.items() if key not in drawn}
        return ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else str(value)


def signatures(saved: Sequence[Saved]) -> Table:
    """What each score is, in one line that two papers can compare."""
    found: list[tuple[str, str]] = []
    for of in saved:
        signed = of.report["signatures"] | {
            name: each["signature"] for scores in of.report["scores"].values() for name, each in scores.items()
        }
        found += [(str(TITLES.get(name, name)), text) for name, text in signed.items()]
    note = "Figures can be compared with those of another paper only where whole signatures agree."
    return Table("What each score is", ("score", "signature"), list(dict.fromkeys(found)), note)


def _command(of: Saved) -> str:
    """The command line of an evaluation, if it is one that `evaluate` writes: people paste it into a shell."""
    said = str(of.report.get("command") or "")
    try:
        plain = shlex.join(shlex.split(said)) == said and said.startswith("lora-lexicon evaluate ")
    except ValueError:
        plain = False
    return said if plain and said.isprintable() else f"# {shlex.quote(str(of.path))} does not say how it was made"


def again(saved: Sequence[Saved]) -> Iterator[Block]:
    """The commands."""
    commands = [_command(of) for of in saved]
    folders = shlex.join(str(of.path) for of in saved)
    version = saved[0].report["version"]
    yield Text(f"With lora-lexicon {version}, in the folder that these paths are relative to:")
    yield Code("\n".join([*commands, f"lora-lexicon report {folders} --out NEW"]))
    yield Text("On the same machine, with the same libraries, the figures are the same, but for tokens/s.")
