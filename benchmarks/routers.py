"""What a learned router gains: routing accuracy and loss beside the centroid router's, and what a newcomer finds.

    python benchmarks/routers.py               # a few minutes on two cores
    python benchmarks/routers.py --test 200    # held-out entries of WordNet
    python benchmarks/routers.py --folds       # which penalty the projection wants, on training prompts alone

Accuracy is that of held-out headwords, against domains that are given, and each router learned from the training
prompts' own. By nearest centroid the held-out prompts' domains would be the centroid router's own answers, so the
truth is another: their part of speech; WordNet's lexicographer files of at least 100 training rows; and a balanced
clustering of training and held-out prompts together, whose labels of the former are learned from, and of the latter
guessed. `joined` leaves each domain in turn out, learns from the others, lets it join from its prompts alone, and gives
the mean; `newcomer` is how much of the one that joined is found. Both differ from `all` by what joining costs.

Losses are those of the shipped pack on held-out headwords, in nats per definition token, first with its four domains,
then with an adapter for the Jargon File as the fifth, trained here, whose domain joins (`joined`) or is learned with
the others (`refitted`). `moved` is how much of WordNet another expert serves than by the centroid router, `taken` how
much of it goes to the fifth domain, and `found` how much of held-out slang does. The oracle takes each entry's best
expert, as none can who does not know the definition. Differences are to the centroid router in the same place, with
the 95 % interval of a paired bootstrap over headwords.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupKFold

from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import Entries, load_entries
from lora_lexicon.domains import learned
from lora_lexicon.domains.cluster import cluster
from lora_lexicon.domains.embed import embed_cached, make_embedder
from lora_lexicon.domains.fit import prompts_of
from lora_lexicon.domains.router import Router
from lora_lexicon.domains.vectors import centred
from lora_lexicon.evaluation.routers import ORACLE, Fitter, Labels, Losses, Prompts, difference
from lora_lexicon.experts.base import load_base
from lora_lexicon.experts.train import Part, train_experts
from lora_lexicon.packs.pack import add_expert
from lora_lexicon.recipe import DomainsRecipe, TrainRecipe, load_recipe
from lora_lexicon.resources import find_recipe, find_system

PACK, SLANG, WORDNET = "tiny", "hacker-slang", "WordNet"
FIFTH = 4  # the number of the domain that joins the pack's four
METHODS = ("centroid", "projection", "linear")
RIDGES = (1e-1, 1e-2, 1e-3)
LEAST = 100  # training rows of a lexicographer file


def truths(train: Prompts, test: Prompts, recipe: DomainsRecipe) -> dict[str, tuple[Labels, Labels]]:
    """By name, the domains of training and held-out prompts; -1 for those that have none."""
    files = [name for name, n in Counter(row.domain for row in train.rows).most_common() if n >= LEAST]
    parts = sorted({row.pos for row in train.rows})
    named = {
        "part of speech": tuple(_numbers([row.pos for row in p.rows], parts) for p in (train, test)),
        "lexicographer file": tuple(_numbers([row.domain for row in p.rows], files) for p in (train, test)),
    }
    both = train + test
    labels = cluster(centred(both.vectors, both.vectors.mean(axis=0)), recipe)
    named["clusters of both"] = labels[: len(train.rows)], labels[len(train.rows) :]
    return {name: (a, b) for name, (a, b) in named.items()}


def _numbers(values: Sequence[str], names: Sequence[str]) -> Labels:
    number = {name: i for i, name in enumerate(names)}
    return np.array([number.get(value, -1) for value in values], dtype=np.int32)


def accuracies(train: Prompts, test: Prompts, a: Labels, b: Labels, fitter: Fitter) -> list[dict[str, Any]]:
    """A row a method, for training labels a and held-out labels b."""
    train, a, test, b = train.of(a >= 0), a[a >= 0], test.of(b >= 0), b[b >= 0]
    count, rows = int(a.max()) + 1, []
    first = np.empty(0)
    for method in METHODS:
        hit = fitter.fit(train, a, method).route(test.vectors).top == b
        joined, found = [], []
        for last in range(count):
            top = fitter.join(train, a, method, last).route(test.vectors).top
            order = np.array([*(i for i in range(count) if i != last), last])
            joined.append((order[top] == b).mean())
            found.append((order[top] == b)[b == last].mean() if (b == last).any() else np.nan)
        exact = hit.astype(np.float64)
        first = first if len(first) else exact
        recall = [hit[b == i].mean() if (b == i).any() else np.nan for i in range(count)]
        rows.append(
            {
                "router": method,
                "domains": count,
                "accuracy": float(hit.mean()),
                "difference": difference(exact, first, np.ones(len(b)), test.headwords),
                "joined": float(np.mean(joined)),
                "recall": float(np.nanmean(recall)),
                "newcomer": float(np.nanmean(found)),
            }
        )
    return rows


def folds(train: Prompts, a: Labels, fitter: Fitter, count: int = 4) -> dict[str, float]:
    """Accuracy over folds of the training headwords, by router, and for the projection by penalty."""
    train, a, found = train.of(a >= 0), a[a >= 0], {}
    parts = list(GroupKFold(count).split(train.vectors, a, train.headwords))
    for method, ridge in [("centroid", learned.RIDGE), ("linear", learned.RIDGE), *(("projection", r) for r in RIDGES)]:
        learned.RIDGE, hits = ridge, []
        for fit, test in parts:
            router = fitter.fit(train.of(np.isin(np.arange(len(a)), fit)), a[fit], method)
            hits.append((router.route(train.vectors[test]).top == a[test]).mean())
        found[f"{method} {ridge:g}" if method == "projection" else method] = float(np.mean(hits))
    return found


def losses_of(found: Losses, prompts: Prompts, routers: dict[str, Router]) -> list[dict[str, Any]]:
    """A row a router, the centroid router first, and the oracle's."""
    slang = np.array([row.source != WORDNET for row in prompts.rows])
    chosen = {name: router.route(prompts.vectors).top for name, router in routers.items()}
    before, chosen[ORACLE] = chosen["centroid"], found.best(len(routers["centroid"].names))
    return [
        {
            "router": name,
            "wordnet": found.told(top, before, ~slang),
            "slang": found.told(top, before, slang),
            "moved": float((top != before)[~slang].mean()),
            "taken": float((top == FIFTH)[~slang].mean()),
            "found": float((top == FIFTH)[slang].mean()),
        }
        for name, top in chosen.items()
    ]


def slang_system(slang: Prompts, folder: Path) -> System:
    """The shipped pack with an adapter for slang, by the recipe of the shipped ones but without their seed adapter."""
    recipe = load_recipe(TrainRecipe, find_recipe("tiny/lora"), checkpoints=0)
    train_experts(load_base(PACK), [Part(SLANG, slang.rows, folder / SLANG)], recipe)
    source = find_system(PACK)
    assert source is not None
    add_expert(source, folder / SLANG, prompts_of(slang.rows), [], out=folder / "pack")
    return load_system(str(folder / "pack"))


def compared(fitter: Fitter, train: Prompts, slang: Prompts, test: Prompts, folder: Path) -> dict[str, Any]:
    """The losses of four domains, and of five: joined, and refitted."""
    system = slang_system(slang, folder)
    labels = cluster(centred(train.vectors, train.vectors.mean(axis=0)), fitter.recipe)
    five = np.concatenate([labels, np.full(len(slang.rows), FIFTH, dtype=np.int32)])
    four = {method: fitter.fit(train, labels, method) for method in METHODS}
    if four["centroid"].names != system.experts[:FIFTH]:
        raise SystemExit(f"these domains are not those of the pack {PACK}: {', '.join(four['centroid'].names)}")
    found = Losses(system, test)
    return {
        "four": losses_of(found, test, four),
        "joined": losses_of(found, test, {m: fitter.join(train + slang, five, m, FIFTH) for m in METHODS}),
        "refitted": losses_of(found, test, {m: fitter.fit(train + slang, five, m) for m in METHODS}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=int, default=1000, help="held-out entries of WordNet")
    parser.add_argument("--folds", action="store_true", help="accuracy over folds of the training headwords; no more")
    options = parser.parse_args()
    started = time.perf_counter()
    recipe = load_recipe(DomainsRecipe, find_recipe("tiny/domains"))
    embedder = make_embedder(recipe, base=load_base(PACK))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def prompts(rows: Sequence[Entry]) -> Prompts:
            return Prompts(rows, np.array(embed_cached(embedder, prompts_of(rows), None, None, folder)))

        wordnet, jargon = (_entries(sample, folder) for sample in ("wordnet", "jargon"))
        train, test = prompts(wordnet.split("train")), prompts(wordnet.split("test")[: options.test])
        slang, unseen = (prompts(jargon.split(split)) for split in ("train", "test"))
        fitter, given = Fitter(embedder, recipe), truths(train, test, recipe)
        if options.folds:
            print(json.dumps({truth: folds(train, a, fitter) for truth, (a, _) in given.items()}))
            return
        accuracy = {truth: accuracies(train, test, a, b, fitter) for truth, (a, b) in given.items()}
        loss = compared(fitter, train, slang, test + unseen, folder)
    for truth, rows in accuracy.items():
        for row in rows:
            cells = [f"{row[key]:.3f}" for key in ("joined", "recall", "newcomer")]
            _print(truth, row["domains"], row["router"], f"{row['accuracy']:.3f}", _cell(row["difference"]), *cells)
    for domains, rows in loss.items():
        for row in rows:
            parts = [c for p in ("wordnet", "slang") for c in (f"{row[p]['loss']:.4f}", _cell(row[p]["difference"], 4))]
            _print(domains, row["router"], *parts, *(f"{row[key]:.3f}" for key in ("moved", "taken", "found")))
    four = {row["router"]: row["wordnet"]["loss"] for row in loss["four"]}
    ours = four.pop("centroid")
    result = {
        "claim": "loss on held-out headwords, routed by centroids and by learned routers",
        "unit": "nats per definition token",
        "ours": ours,
        "peers": four,
        "ratio": {name: value / ours for name, value in four.items()},
        "accuracy": accuracy,
        "loss": loss,
        "environment": {
            "cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
            "test": len(test.rows), "slang": len(unseen.rows), "seconds": round(time.perf_counter() - started),
        },
    }  # fmt: skip
    print(json.dumps(result))


def _entries(sample: str, folder: Path) -> Entries:
    prepare([f"sample:{sample}"], folder / sample)
    return load_entries(folder / sample)


def _cell(said: dict[str, float] | None, digits: int = 3) -> str:
    if said is None:
        return ""
    return "{difference:+.{d}f} [{low:+.{d}f}, {high:+.{d}f}], p {p:.4f}".format(**said, d=digits)


def _print(*cells: object) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
