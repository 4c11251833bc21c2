"""The demo's stages, in order, each on the same public functions that the other commands call."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note, step

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System
    from lora_lexicon.data.entry import Entry
    from lora_lexicon.data.store import Entries
    from lora_lexicon.domains.fit import Domains
    from lora_lexicon.evaluation.run import Evaluation
    from lora_lexicon.experts.base import Base
    from lora_lexicon.recipe import TrainRecipe

FIFTH = "hacker-slang"
SYSTEMS = {
    "base": "",
    "dense adapter": "experts/dense",
    "mixture of adapters": "mixture",
    "merged MoE": "moe",
}
RANDOM = {"mixture of adapters": "mixture, random routing"}
DEFINED = 300  # of the held-out entries are defined too, which takes longer than their loss
METRICS = ("loss", "bleu", "rouge_l")
COMPARED = (
    ("mixture of adapters", "base"),
    ("mixture of adapters", "mixture, random routing"),
    ("mixture of adapters", "dense adapter"),
    ("merged MoE", "base"),
    ("merged MoE", "dense adapter"),
    ("merged MoE", "mixture of adapters"),
)
WORDS = (
    ("brazenly", "he brazenly asked her for money"),
    ("glacial", "a glacial wind swept the valley"),
    ("hoodwink", "they hoodwinked the old man out of his savings"),
    ("fishery", "the fishery supports two hundred families"),
    ("cruft", "there is a lot of cruft in that old program"),
)


@dataclass
class Tour:
    """One run of the demo. A stage that a killed run finished is not done again."""

    out: Path
    base_name: str
    limit: int | None
    seed: int
    runs: "dict[str, Evaluation]" = field(default_factory=dict)

    def run(self, overwrite: bool) -> dict[str, Any]:
        """All stages; returns what `results.json` holds."""
        from lora_lexicon.folders import write_record

        started = time.time()
        self._open(overwrite)
        self.domains.draw(self.out / "domains.png")
        self._train()
        self._compose()
        self._evaluate()
        added = self._hot_add()
        results = {**self._results(added), "seconds": round(time.time() - started, 1)}
        write_record(self.out / "results.json", results)
        return results

    # ---- data and domains

    def _open(self, overwrite: bool) -> None:
        from lora_lexicon.errors import LexiconError
        from lora_lexicon.folders import read_record, write_record

        settings = {"base": self.base_name, "limit": self.limit, "seed": self.seed}
        record = self.out / "demo.json"
        if overwrite and record.is_file():
            shutil.rmtree(self.out)
        if record.is_file():
            if read_record(record, LexiconError, "a demo") != settings:
                raise LexiconError(
                    f"{self.out} holds a demo with other settings: choose another --out, or add --overwrite"
                )
            note(f"{self.out} exists: going on where it stopped")
        elif self.out.exists() and any(self.out.iterdir()):
            raise LexiconError(f"{self.out} is not empty and no demo: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_record(record, settings)

    @cached_property
    def entries(self) -> "Entries":
        return self._prepared("sample:wordnet", "entries")

    @cached_property
    def slang(self) -> "Entries":
        return self._prepared("sample:jargon", "slang-entries")

    def _prepared(self, sample: str, name: str) -> "Entries":
        from lora_lexicon.data.prepare import prepare
        from lora_lexicon.data.store import load_entries

        if not (self.out / name).is_dir():
            with step(f"Preparing {sample}"):
                report = prepare([sample], self.out / name, seed=self.seed, limit=self.limit)
            splits = ", ".join(f"{split} {count:,}" for split, count in report["splits"].items())
            note(f"  {report['read']:,} rows read, {report['kept']:,} kept: {splits}")
        return load_entries(self.out / name)

    @cached_property
    def base(self) -> "Base":
        from lora_lexicon.experts.base import load_base

        return load_base(self.base_name)

    @cached_property
    def domains(self) -> "Domains":
        from lora_lexicon.domains.embed import make_embedder
        from lora_lexicon.domains.fit import fit_domains, load_domains
        from lora_lexicon.recipe import DomainsRecipe, load_recipe
        from lora_lexicon.resources import find_recipe

        folder = self.out / "domains"
        if not folder.is_dir():
            recipe = load_recipe(DomainsRecipe, find_recipe("tiny/domains"), seed=self.seed)
            embedder = make_embedder(recipe, base=self.base)
            prompts = sum(len(self.entries.split(name)) for name in self.entries.splits)
            with step("Cutting the entries into domains", prompts) as advance:
                fit_domains(self.entries, embedder, recipe, folder, base=self.base_name, progress=advance)
        found = load_domains(folder)
        note(f"  domains: {', '.join(found.router.names)}")
        return found

    # ---- experts: one budget of rows for each way

    def _train(self) -> None:
        """A seed reads every row; from it branch a dense adapter, on every row again, and the experts, each on its own.

        So the dense adapter and the experts together differ in nothing but the domains.
        """
        from lora_lexicon.recipe import TrainRecipe, load_recipe
        from lora_lexicon.resources import find_recipe

        # A stage takes less than a minute, so it is begun again rather than resumed.
        lora, ffn = (
            load_recipe(TrainRecipe, find_recipe(f"tiny/{kind}"), seed=self.seed, checkpoints=0)
            for kind in ("lora", "ffn")
        )
        everything = self.entries.split("train")
        self._experts("seed", {"seed": everything}, lora)
        self._experts("dense", {"dense": everything}, lora, branch=True)
        members = {name: self.domains.rows(self.entries, "train", name) for name in self.domains.router.names}
        self._experts("lora", {f"lora/{name}": rows for name, rows in members.items()}, lora, branch=True)
        for name, rows in members.items():
            self._experts(f"ffn/{name}", {f"ffn/{name}": rows}, ffn, branch=True)
        self._experts("fifth", {f"lora-fifth/{FIFTH}": self.slang.split("train")}, lora, branch=True)

    def _experts(self, what: str, rows: "dict[str, list[Entry]]", recipe: "TrainRecipe", branch: bool = False) -> None:
        """Trains those experts that are not there, all together."""
        from lora_lexicon.experts.journal import Step
        from lora_lexicon.experts.train import Part, train_experts

        outs = {self.out / "experts" / path: own for path, own in rows.items()}
        parts = [Part(out.name, own, out, out.name) for out, own in outs.items() if not out.is_dir()]
        if not parts:
            return
        done: dict[str, tuple[int, int]] = {}
        seed = self.out / "experts" / "seed" if branch else None
        with step(f"Training {what}") as advance:

            def show(step: Step) -> None:
                done[step.expert] = (step.tokens, step.all_tokens)
                # One that has said nothing yet is taken to be as long as the others.
                tokens, total = map(sum, zip(*done.values(), strict=True))
                advance.to(tokens, total * len(parts) // len(done))

            train_experts(self.base, parts, recipe, start_from=seed, progress=show)

    # ---- both compositions

    def _compose(self) -> None:
        from lora_lexicon.compose.merge import compose_moe
        from lora_lexicon.packs.pack import build_pack

        domains, names = self.out / "domains", self.domains.router.names
        if not (self.out / "mixture").is_dir():
            with step("Composing the mixture of adapters"):
                folders = [self.out / "experts" / "lora" / name for name in names]
                build_pack(self.base_name, folders, domains, self.out / "mixture", name="demo")
        if not (self.out / "moe").is_dir():
            with step("Composing the merged mixture of experts"):
                folders = [self.out / "experts" / "ffn" / name for name in names]
                compose_moe(self.base_name, folders, domains, self.out / "moe")

    # ---- evaluation

    @cached_property
    def test_rows(self) -> "list[Entry]":
        return self.entries.split("test")

    def _evaluate(self) -> None:
        for name, folder in SYSTEMS.items():
            system = self._load(folder)
            self._measure(name, system, self.test_rows)
            if name in RANDOM:
                self._measure(RANDOM[name], system, self.test_rows, at_random=True)

    def _load(self, folder: str) -> "System":
        from lora_lexicon.compose.system import load_system
        from lora_lexicon.resources import find_base

        if not folder:
            return load_system(find_base(self.base_name))
        return load_system(str(self.out / folder), base=None if folder == "moe" else self.base_name)

    def _measure(self, name: str, system: "System", rows: "Sequence[Entry]", at_random: bool = False) -> None:
        from lora_lexicon.evaluation.run import evaluate, random_weights

        weights = random_weights(len(rows), len(system.experts), self.seed) if at_random else None
        with step(f"Evaluating {name}", total=len(rows) + min(DEFINED, len(rows))) as advance:
            self.runs[name] = evaluate(system, rows, name=name, weights=weights, defined=DEFINED, progress=advance)

    # ---- a fifth domain joins

    def _hot_add(self) -> dict[str, Any]:
        from lora_lexicon.packs.pack import add_expert

        members = [(entry.term, entry.context) for entry in self.slang.split("train")]
        check = [(entry.term, entry.context) for entry in self.entries.split("valid")]
        target = self.out / "mixture-5"
        with step(f"Adding {FIFTH}") as advance:
            expert = self.out / "experts" / "lora-fifth" / FIFTH
            report = add_expert(
                self.out / "mixture",
                expert,
                members,
                check,
                base=self.base_name,
                out=target,
                overwrite=True,
                progress=advance.to,
            )
        kept, moved = f"{report['unchanged']} of {report['kept']}", len(report["moved"])
        note(f"  {kept} prompts that keep their expert give the same logits to the bit; {moved} change hands")
        return report

    def _fifth(self) -> dict[str, Any]:
        """The pack with and without the fifth domain, on that domain's held-out words and on the old ones."""
        from lora_lexicon.evaluation.run import compare

        test = self.slang.split("test")
        before, after = self._load("mixture"), self._load("mixture-5")
        self._measure("mixture, fifth domain", after, self.test_rows)
        self._measure("mixture of adapters, slang", before, test)
        self._measure("mixture, fifth domain, slang", after, test)
        new, old = self.runs["mixture, fifth domain, slang"], self.runs["mixture of adapters, slang"]
        routed = new.domains.count(FIFTH) / len(test)
        note(f"  {routed:.0%} of {len(test)} held-out slang entries go to {FIFTH}")
        return {
            "test_entries": len(test),
            "routed_to_it": routed,
            "before": old.summary(),
            "after": new.summary(),
            **compare(new, old),
        }

    # ---- results

    def _results(self, added: dict[str, Any]) -> dict[str, Any]:
        from lora_lexicon.evaluation.report import footprint_fidelity
        from lora_lexicon.evaluation.run import SIGNATURES, compare
        from lora_lexicon.inference.engine import define

        fifth = self._fifth()
        shown = [name for name in self.runs if not name.endswith("slang")]
        systems = [self.runs[name].summary() for name in shown]
        footprint_fidelity(systems, self.out / "footprint-fidelity.png")
        written = define(self._load("mixture-5"), WORDS)
        return {
            "systems": systems,
            "comparisons": [
                compare(self.runs[a], self.runs[b], metric, seed=self.seed) for a, b in COMPARED for metric in METRICS
            ]
            + [{key: fifth[key] for key in ("a", "b", "metric", "difference", "low", "high", "p")}],
            "signatures": SIGNATURES,
            "test_entries": len(self.test_rows),
            "defined_entries": min(DEFINED, len(self.test_rows)),
            "domains": {n: len(self.domains.rows(self.entries, "train", n)) for n in self.domains.router.names},
            "hot_add": {key: added[key] for key in ("checked", "kept", "unchanged", "moved")}
            | {"on_its_own_words": fifth},
            "definitions": [
                {"term": d.term, "context": d.context, "definition": d.text, "domain": d.domain} for d in written
            ],
        }
