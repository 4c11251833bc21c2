"""Where domains come from, and what they are worth: a mixture beside a dense adapter at the same compute.

    python benchmarks/domains.py                                     # the shipped choice and seven others
    python benchmarks/domains.py --layers 2 3 --rates 1e-3 2e-3      # every combination of what is named
    python benchmarks/domains.py --quick                             # the shipped choice on a tenth of the rows

For each choice, with the demo's budget: a seed adapter reads every row once; from it branch a dense adapter, which
reads every row once more, and an expert a domain, which together read every row once more. Experts live in the layers
that the domains are not read from. Losses are nats per definition token on held-out headwords, differences come with
the 95 % interval of a paired bootstrap. NMI is the normalised mutual information of the training rows' domains with
their part of speech, which the base does not see. Data and base are those that ship.
"""

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import normalized_mutual_info_score

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import Entries, load_entries
from lora_lexicon.domains.embed import embedder_name, make_embedder
from lora_lexicon.domains.fit import fit_domains
from lora_lexicon.evaluation.run import Evaluation, compare, evaluate, random_weights
from lora_lexicon.experts.base import Base, load_base
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.packs.pack import build_pack
from lora_lexicon.recipe import DomainsRecipe, TrainRecipe, load_recipe
from lora_lexicon.resources import find_recipe

BASE = "tiny"
PAIRS = (("dense", "base"), ("mixture", "base"), ("mixture", "dense"), ("mixture", "random routing"))


@dataclass(frozen=True)
class Choice:
    """One way to make domains and experts."""

    layers: int  # read for the domains; experts begin above
    pool: str
    method: str
    rate: float

    def __str__(self) -> str:
        return f"{self.layers}-{self.pool}-{self.method}-{self.rate:g}"


SHIPPED = Choice(3, "last", "balanced", 1e-3)
OTHERS = (
    Choice(2, "last", "balanced", 1e-3),
    Choice(3, "last", "balanced", 2e-3),
    Choice(2, "last", "balanced", 2e-3),
    Choice(3, "mean", "balanced", 1e-3),
    Choice(3, "last", "kmeans", 1e-3),
    Choice(3, "last", "lexical", 1e-3),
    Choice(3, "last", "random", 1e-3),
)


class Trial:
    """Everything that several choices share: the entries, the base and what was trained on all rows."""

    def __init__(self, folder: Path, entries: Entries, test_rows: int) -> None:
        self.folder, self.entries, self.base = folder, entries, load_base(BASE)
        self.test = entries.split("test")[:test_rows]
        self.evaluated = {"base": self._loss(BASE, "base")}

    def run(self, choice: Choice) -> dict[str, Any]:
        """One row of the table."""
        recipe = load_recipe(TrainRecipe, find_recipe("tiny/lora"), learning_rate=choice.rate, checkpoints=0)
        recipe = load_recipe(TrainRecipe, None, **{**vars(recipe), "first_layer": choice.layers})
        everything, out = self.entries.split("train"), self.folder / str(choice)
        shared = self.folder / f"all-{choice.layers}-{choice.rate:g}"
        for name, start in (("seed", None), ("dense", shared / "seed")):
            train_experts(self.base, [Part(name, everything, shared / name)], recipe, start_from=start)
        found = self._domains(choice, out / "domains")
        parts = [Part(n, found.rows(self.entries, "train", n), out / "experts" / n) for n in found.router.names]
        train_experts(self.base, parts, recipe, start_from=shared / "seed")
        build_pack(BASE, [out / "experts" / name for name in found.router.names], out / "domains", out / "pack")
        dense = str(shared / "dense")
        if dense not in self.evaluated:
            self.evaluated[dense] = self._loss(dense, "dense")
        losses = {
            "base": self.evaluated["base"],
            "dense": self.evaluated[dense],
            "mixture": self._loss(str(out / "pack"), "mixture"),
            "random routing": self._loss(str(out / "pack"), "random routing", at_random=True),
        }
        labels = found.assignments["train"]
        return {
            **vars(choice),
            "nmi": float(normalized_mutual_info_score([row.pos for row in everything], labels)),
            "loss": {name: run.summary()["loss"] for name, run in losses.items()},
            "differences": [compare(losses[a], losses[b]) for a, b in PAIRS],
        }

    def _domains(self, choice: Choice, out: Path) -> Any:
        wanted = {"layers": choice.layers, "pool": choice.pool, "method": choice.method}
        recipe = load_recipe(DomainsRecipe, find_recipe("tiny/domains"), **wanted)
        prompts = [(row.term, row.context) for row in self.entries.split("train")]
        base: Base | None = self.base if embedder_name(recipe) == "base" else None
        return fit_domains(self.entries, make_embedder(recipe, base=base, prompts=prompts), recipe, out, base=BASE)

    def _loss(self, model: str, name: str, at_random: bool = False) -> Evaluation:
        system = load_system(model)
        weights = random_weights(len(self.test), len(system.experts)) if at_random else None
        return evaluate(system, self.test, name=name, weights=weights, defined=0)


def shown(row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    differences = [f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in row["differences"]]
    cells = [row["layers"], row["pool"], row["method"], f"{row['rate']:g}", f"{row['nmi']:.2f}", *differences]
    return f"| {' | '.join(map(str, cells))} |".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-domains"))
    parser.add_argument("--layers", type=int, nargs="+", help="of the base's four, how many the domains are read from")
    parser.add_argument("--pools", nargs="+", choices=("last", "mean"))
    parser.add_argument("--methods", nargs="+", choices=("balanced", "kmeans", "lexical", "random"))
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates")
    parser.add_argument("--rows", type=int, default=5000, help="training rows")
    parser.add_argument("--test", type=int, default=1000, help="held-out entries")
    parser.add_argument("--quick", action="store_true", help="the shipped choice, 500 rows, 100 held-out entries")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.test = 500, 100
    named = (options.layers, options.pools, options.methods, options.rates)
    defaults = ([SHIPPED.layers], [SHIPPED.pool], [SHIPPED.method], [SHIPPED.rate])
    choices = [Choice(*values) for values in product(*(a or b for a, b in zip(named, defaults, strict=True)))]
    if not any(named):
        choices = [SHIPPED] if options.quick else [SHIPPED, *OTHERS]
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    prepare(["sample:wordnet"], folder / "all")
    entries = fewer(folder, options.rows)
    trial = Trial(folder, entries, options.test)
    print(f"{options.rows} training rows, {len(trial.test)} held-out entries; base {BASE}")
    print(f"| layers | pool | method | rate | NMI | {' | '.join(f'{a} − {b}' for a, b in PAIRS)} |\n|{'---|' * 9}")
    rows = []
    for choice in choices:
        rows.append(trial.run(choice))
        print(shown(rows[-1]), flush=True)
    if not options.keep:
        shutil.rmtree(folder)
    loss = rows[0]["loss"]
    peers = {name: value for name, value in loss.items() if name != "mixture"}
    result = {
        "claim": f"loss on held-out headwords of a mixture made with {choices[0]}",
        "unit": "nats per definition token",
        "ours": loss["mixture"],
        "peers": peers,
        "ratio": {name: value / loss["mixture"] for name, value in peers.items()},
        "rows": rows,
        "environment": {
            "cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
            "training_rows": options.rows, "seconds": round(time.perf_counter() - started),
        },
    }  # fmt: skip
    print(json.dumps(result))


def fewer(folder: Path, rows: int) -> Entries:
    """The entries with the first `rows` training rows alone, prepared again from their own export."""
    entries = load_entries(folder / "all")
    export = folder / "rows.jsonl"
    with export.open("w", encoding="utf-8") as file:
        for split in entries.splits:
            for row in entries.split(split)[: rows if split == "train" else None]:
                file.write(json.dumps({**asdict(row), "split": split}) + "\n")
    prepare([str(export)], folder / "entries")
    return load_entries(folder / "entries")


if __name__ == "__main__":
    main()
