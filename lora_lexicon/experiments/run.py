"""One experiment from its recipe to its report. What is there from an earlier run of the same recipe is kept."""

import dataclasses
import json
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lexicon import __version__
from lora_lexicon.compose.policy import parse_policy
from lora_lexicon.errors import LexiconError, RecipeError
from lora_lexicon.evaluation.run import SIGNATURES
from lora_lexicon.experiments.bench import METHODS, Bench, Step
from lora_lexicon.experiments.results import names_for
from lora_lexicon.experiments.studies import STUDIES, Found
from lora_lexicon.folders import read_record, sha256_of, write_record, write_whole
from lora_lexicon.recipe import ExperimentRecipe, load_recipe
from lora_lexicon.report import rows
from lora_lexicon.report.document import Code, Document, Section, Table, Text
from lora_lexicon.resources import find_recipe

RECORD = "experiments.json"
SHARED = {"base", "data", "domains", "lora", "ffn", "router", "branch"}  # what models that experiments share depend on
EXAMPLES = 5  # each: the best, the worst, some at random
TITLES = {
    "table-2": "Table 2: systems side by side",
    "table-3": "Table 3: how the data is cut",
    "table-4": "Table 4: what experts are chosen by",
    "table-6": "Table 6: what training takes",
    "tables-7-8": "Tables 7 and 8: how far domains lie from each other",
    "figure-4": "Figure 4: the best of N samples",
    "figure-5": "Figure 5: numbers of experts",
    "figure-7": "Figure 7: examples in the prompt",
}
# The keys that each experiment reads beside those of all.
READ_BY_ALL = {"experiment", "base", "data", "domains"}
_MEASURED = {"test_rows", "seeds", "lora", "decoding", "max_tokens", "metrics", "protocol", "drop_zeros"}
_TRAINED = {"ffn", "router", "branch", "systems"}
READS = {
    "table-2": _MEASURED | _TRAINED | {"reward", "reward_rows", "samples"},
    "table-3": _MEASURED | _TRAINED | {"partitions"},
    "table-4": _MEASURED | _TRAINED - {"systems"} | {"policies"},
    "table-6": _TRAINED | {"seeds", "lora", "watts", "carbon"},
    "tables-7-8": {"lora"},
    "figure-4": _MEASURED | _TRAINED | {"samples"},
    "figure-5": _MEASURED | _TRAINED | {"experts"},
    "figure-7": _MEASURED | _TRAINED | {"shots", "examples", "endpoint", "model", "api"},
}
SYSTEMS = ("base", "dense", "moe", "dense adapter", "mixture of adapters")
COMPOSED = ("moe", "mixture of adapters")


def run_experiment(recipe: ExperimentRecipe, out: Path, *, name: str = "", step: Step | None = None) -> Document:
    """Runs what is missing, and returns the report.

    Args:
        out: a folder that several experiments may share: what they train in common is trained once. What is there from
            an earlier run of the same recipe is kept.
        name: of the recipe, to say how it is run again.
        step: shows stages while they run.

    Raises:
        LexiconError: a recipe that cannot be run, or a folder of something else.
    """
    check_experiment(recipe)
    bench = Bench(recipe, out, step)
    with _begun(recipe, out):
        bench.entries  # noqa: B018  what is amiss with the data leaves no trace
    found = STUDIES[recipe.experiment](bench)
    shown, said = _examined(bench, found)
    sections = [*found.sections, *shown, *_about(bench, found, name, out)]
    return Document(TITLES[recipe.experiment], [*found.summary, *said], sections)


@contextmanager
def _begun(recipe: ExperimentRecipe, out: Path) -> Iterator[None]:
    """Notes what the folder is of, or refuses one that is of something else; an error inside takes the note back."""
    read = READ_BY_ALL | READS[recipe.experiment]
    settings = {key: value for key, value in json.loads(json.dumps(dataclasses.asdict(recipe))).items() if key in read}
    record = {"shared": {}, "experiments": {}, "version": __version__}
    if (out / RECORD).is_file():
        record = read_record(out / RECORD, LexiconError, "a folder of experiments")
    elif out.exists() and any(out.iterdir()):
        raise LexiconError(f"{out} is not empty and holds no experiments: choose another --out")
    before = (out / RECORD).read_bytes() if (out / RECORD).is_file() else None
    for name, content in _contents(recipe).items():
        if record.get("contents", {}).get(name, content) != content:
            raise LexiconError(f"{name} is not what {out} was begun with: choose another --out")
    own = {key: value for key, value in settings.items() if key in SHARED}
    for held, wanted in ((record["shared"], own), (record["experiments"].get(recipe.experiment, {}), settings)):
        for key, value in wanted.items():
            if held.get(key, value) != value:
                raise LexiconError(f"{out} was begun with {key} {held[key]}, not {value}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    record["shared"].update(own)
    record["experiments"][recipe.experiment] = settings
    record["contents"] = record.get("contents", {}) | _contents(recipe)
    write_record(out / RECORD, record)
    try:
        yield
    except LexiconError:
        if before is None:
            (out / RECORD).unlink()
            with suppress(OSError):
                out.rmdir()
        else:
            write_whole(out / RECORD, before)
        raise


def _contents(recipe: ExperimentRecipe) -> dict[str, str]:
    """The SHA-256 of each input that is a file of the user's."""
    return {name: sha256_of(Path(name)) for name in recipe.data if Path(name).is_file()}


def check_experiment(recipe: ExperimentRecipe) -> None:
    """Refuses before anything is run what cannot be: a value out of range, a key that the experiment does not read.

    Raises:
        LexiconError: says which.
    """
    kind, default = recipe.experiment, ExperimentRecipe()
    if kind not in STUDIES:
        raise RecipeError(f"{kind} cannot be run: there are {', '.join(STUDIES)}")
    read = READ_BY_ALL | READS[kind]
    for field in dataclasses.fields(recipe):
        if field.name not in read and getattr(recipe, field.name) != getattr(default, field.name):
            raise RecipeError(f"{field.name} is given, which {kind} does not read: leave it out")
    for key in sorted(read):
        values = getattr(recipe, key)
        if isinstance(values, tuple) and (not values or len(set(values)) != len(values)):
            raise RecipeError(f"{key} is {list(values)}: give at least one, each once")
    known = COMPOSED if kind in ("table-3", "figure-5") else SYSTEMS[1:] if kind == "table-6" else SYSTEMS
    least = {"test_rows": 0, "reward_rows": 0, "max_tokens": 1, "watts": 0, "carbon": 0}
    lowest = {"experts": 1, "samples": 1, "shots": 0, "seeds": 0}
    for key, allowed in (("systems", known), ("partitions", METHODS), ("examples", ("random", "retrieved"))):
        for value in getattr(recipe, key) if key in read else ():
            if value not in allowed:
                raise RecipeError(f"{key} names {value!r}; {kind} knows {', '.join(allowed)}")
    for key, low in least.items():
        if key in read and getattr(recipe, key) < low:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be {low} or more")
    for key, low in lowest.items():
        if key in read and min(getattr(recipe, key)) < low:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; none may be below {low}")
    if "policies" in read:
        for policy in recipe.policies:
            parse_policy(policy, 99)
    if "metrics" in read:
        if "bleu" not in recipe.metrics:
            raise RecipeError("metrics must name bleu, which the paper's figures are of")
        names_for(recipe)


def _examined(bench: Bench, found: Found) -> tuple[list[Section], list[str]]:
    """Examples side by side, definitions that say nothing, and leaks; and what a person should know of them."""
    if found.results is None:
        return [], []
    systems = found.results.evaluations()
    data = {"split": "test", "data": str(bench.data), "entries_fingerprint": bench.entries.fingerprint}
    with bench.step("Looking for leaks") as bar:
        done = 0

        def told(more: int, rows: int) -> None:
            nonlocal done
            done += more
            bar.to(done, rows)

        leaks, leaked = rows.leaks(data, told)
    sections = [Section("Leaks", leaks)]
    faulty: list[str] = []
    if systems:
        faults, faulty = rows.faults(systems)
        title = f"Examples, of seed {bench.recipe.seeds[0]}"
        sections = [
            Section(title, [*rows.examples(systems, EXAMPLES, bench.recipe.seeds[0])]),
            Section("Definitions that say nothing", faults),
            *sections,
        ]
    return sections, [*faulty, *leaked]


def _about(bench: Bench, found: Found, name: str, out: Path) -> list[Section]:
    """Settings, signatures, and how to run it again."""
    recipe = bench.recipe
    read = READ_BY_ALL | READS[recipe.experiment]
    settings = [(key, _shown(value)) for key, value in dataclasses.asdict(recipe).items() if key in read]
    splits = bench.entries.record["splits"]
    settings += [
        ("entries", ", ".join(f"{split} {count:,}" for split, count in splits.items())),
        ("entries, fingerprint", bench.entries.fingerprint),
        ("lora-lexicon", __version__),
        ("torch, transformers, peft", ", ".join(version(package) for package in ("torch", "transformers", "peft"))),
        ("machine", f"{platform.machine()}, {platform.system()}, {_device()}"),
    ]
    sections = [Section("Settings", [Table("Settings", ("key", "value"), settings)])]
    if found.results is not None:
        signed = list(found.results.signatures.items())
        if any(map(found.results.has_loss, found.results.systems)):
            signed.append(("loss", SIGNATURES["loss"]))
        sections.append(Section("Signatures", [Table("What each figure is", ("metric", "signature"), signed)]))
    shipped = name or f"tiny/{recipe.experiment}"
    default = dataclasses.asdict(load_recipe(ExperimentRecipe, find_recipe(shipped)))
    changed = [
        f"--set {shlex.quote(f'{key}={json.dumps(value)}')}"
        for key, value in dataclasses.asdict(recipe).items()
        if value != default[key]
    ]
    command = " ".join(["lora-lexicon experiment", shipped, *changed, "--out", shlex.quote(out.name)])
    text = Text("What is in the folder already is kept; an empty one runs everything again.")
    return [*sections, Section("To run it again", [Code(command), text])]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
