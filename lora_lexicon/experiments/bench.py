"""The stages that experiments share. Each writes a folder once, and finds it there when it is asked for again.

OUT/entries                                       the data, unless the recipe names a folder of entries
OUT/domains/CUT                                   a way to cut it: `balanced-4`, `random-4-21`
OUT/models/SEED/start, dense-KIND                 an adapter that has read every row; one model on everything
OUT/models/SEED/CUT/KIND/DOMAIN, mixture, moe*    experts, and what is composed of them
OUT/EXPERIMENT/reward/SEED                         a reward model
OUT/EXPERIMENT/sizes                                         what systems take to ship and in memory
OUT/EXPERIMENT/runs, samples, rates                  what systems wrote, and what the reward model says of it (`runs`)

Knows nothing of tables.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from lora_lexicon.data.entry import Entry, spread
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import Entries, load_entries
from lora_lexicon.errors import DataError, RecipeError
from lora_lexicon.folders import read_record, write_record
from lora_lexicon.recipe import (
    DomainsRecipe,
    ExperimentRecipe,
    RewardRecipe,
    RouterRecipe,
    TrainRecipe,
    load_recipe,
)
from lora_lexicon.resources import find_base, find_recipe, find_sample

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System
    from lora_lexicon.domains.fit import Domains
    from lora_lexicon.experts.base import Base
    from lora_lexicon.experts.checkpoint import ExpertInfo
    from lora_lexicon.experts.train import Part
    from lora_lexicon.inference.reward import Reward
    from lora_lexicon.report.document import Picture

METHODS = {"semantic": "", "none": "none", "random": "random", "lexical": "lexical"}  # "": the recipe's own


class Bar(Protocol):
    """What shows how far a stage is."""

    def to(self, done: float, total: float) -> None: ...


class Step(Protocol):
    """Opens a bar for a stage of that name."""

    def __call__(self, title: str) -> AbstractContextManager[Bar]: ...


class _Unseen:
    def to(self, done: float, total: float) -> None:
        """Shows nothing."""


class Bench:
    """One experiment's workplace.

    Args:
        out: the folder that all of it lies in; other experiments may be there.
        step: shows a stage while it runs; stages that are there already are not shown.
    """

    def __init__(self, recipe: ExperimentRecipe, out: Path, step: Step | None = None) -> None:
        self.recipe, self.out, self.own = recipe, out, out / recipe.experiment
        self.step: Step = step or (lambda title: nullcontext(_Unseen()))
        self._base: tuple[tuple[str, str], Base] | None = None

    # ---- data

    @cached_property
    def data(self) -> Path:
        """The folder of entries."""
        given = self.recipe.data
        if len(given) == 1 and (Path(given[0]) / "entries.json").is_file():
            return Path(given[0])
        out = self.out / "entries"
        if not out.is_dir():
            with self.step("Preparing the data") as bar:
                prepare([find_sample(name) for name in given], out, progress=bar.to)
        return out

    @cached_property
    def entries(self) -> Entries:
        return load_entries(self.data)

    @cached_property
    def test(self) -> list[Entry]:
        """The held-out entries that systems are measured on."""
        if "test" not in self.entries.splits:
            raise DataError(f"{self.data} has no test split: prepare it with one")
        return spread(self.entries.split("test"), self.recipe.test_rows or None)

    # ---- domains

    def cut(self, partition: str, count: int | None = None, seed: int | None = None) -> Path:
        """A domains folder.

        Args:
            partition: a key of `METHODS`.
            count: how many domains; by default the recipe's.
            seed: of a random cut; others have the recipe's own.
        """
        given: dict[str, Any] = {"domains": count, "method": METHODS[partition] or None}
        if partition == "random":
            given["seed"] = seed
        recipe = load_recipe(DomainsRecipe, find_recipe(self.recipe.domains), **given)
        ending = f"-{seed}" if partition == "random" else ""
        out = self.out / "domains" / f"{recipe.method}-{recipe.domains}{ending}"
        if not out.is_dir():
            from lora_lexicon.domains.embed import embedder_name, make_embedder
            from lora_lexicon.domains.fit import fit_domains, prompts_of

            base = self.base(self.trained("lora", None)) if embedder_name(recipe) == "base" else None
            prompts = prompts_of(self.entries.split("train"))
            rows = sum(len(self.entries.split(split)) for split in self.entries.splits)
            with self.step(f"Cutting the data: {partition}, {recipe.domains}") as bar:
                done = 0

                def told(more: int) -> None:
                    nonlocal done
                    done += more
                    bar.to(done, rows)

                embedder = make_embedder(recipe, base=base, prompts=prompts)
                fit_domains(self.entries, embedder, recipe, out, base=self.recipe.base, progress=told)
        return out

    def domains(self, cut: Path) -> "Domains":
        from lora_lexicon.domains.fit import load_domains

        return load_domains(cut)

    # ---- experts

    def trained(self, kind: str, seed: int | None) -> TrainRecipe:
        """The recipe of a kind of expert."""
        name = self.recipe.lora if kind == "lora" else self.recipe.ffn
        recipe = load_recipe(TrainRecipe, find_recipe(name), seed=seed)
        if recipe.kind != kind:
            raise RecipeError(f"{kind} is {name!r}, a recipe of kind {recipe.kind}: name one of kind {kind}")
        return recipe

    def dense(self, kind: str, seed: int) -> Path:
        """One model on everything."""
        out = self._models(seed) / f"dense-{kind}"
        self._train({out: None}, kind, seed)
        return out

    def experts(self, kind: str, cut: Path, seed: int) -> list[Path]:
        """One expert a domain, in the router's order."""
        folder = self._models(seed) / cut.name / kind
        outs: dict[Path, str | None] = {folder / name: name for name in self.domains(cut).router.names}
        self._train(outs, kind, seed, cut)
        return list(outs)

    def infos(self, folders: Sequence[Path]) -> "list[ExpertInfo]":
        from lora_lexicon.experts.checkpoint import read_expert

        return [read_expert(folder) for folder in folders]

    def start(self, seed: int) -> Path | None:
        """The adapter that dense models and experts go on from, where the recipe wants one."""
        if not self.recipe.branch:
            return None
        out = self._models(seed) / "start"
        self._train({out: None}, "lora", seed, branch=False)
        return out

    def _train(
        self, outs: "dict[Path, str | None]", kind: str, seed: int, cut: Path | None = None, branch: bool = True
    ) -> None:
        """Trains those experts that are not there; `outs` names the domain of each, None is everything."""
        missing = {out: domain for out, domain in outs.items() if not out.is_dir()}
        if not missing:
            return
        start = self.start(seed) if branch else None
        from lora_lexicon.evaluation.metrics import mean_bleu
        from lora_lexicon.experts.journal import Step as Trained
        from lora_lexicon.experts.train import part_of, train_experts

        domains = self.domains(cut) if cut else None
        parts = [part_of(self.entries, domains, domain, out) for out, domain in missing.items()]
        recipe = self.trained(kind, seed)
        with self.step(f"Training {_named(parts, kind, cut)}, seed {seed}") as bar:
            done: dict[str, tuple[int, int]] = {}

            def told(step: Trained) -> None:
                done[step.expert] = (step.tokens, step.all_tokens)
                tokens, total = map(sum, zip(*done.values(), strict=True))
                bar.to(tokens, total * len(parts) // len(done))

            template = domains.router.template if domains else None
            train_experts(
                self.base(recipe), parts, recipe, score=mean_bleu, start_from=start, template=template,
                entries_fingerprint=self.entries.fingerprint, progress=told,
            )  # fmt: skip

    def base(self, recipe: TrainRecipe) -> "Base":
        """The base in memory, as a recipe wants it held; one is held at a time."""
        key = (recipe.dtype, recipe.quantize)
        if self._base is None or self._base[0] != key:
            from lora_lexicon.experts.base import load_base

            self._base = None
            self._base = key, load_base(self.recipe.base, dtype=recipe.dtype, quantize=recipe.quantize)
        return self._base[1]

    # ---- compositions

    def mixture(self, cut: Path, seed: int) -> Path:
        """A mixture of LoRA adapters: a pack."""
        experts, out = self.experts("lora", cut, seed), self._models(seed) / cut.name / "mixture"
        if not out.is_dir():
            from lora_lexicon.packs.pack import build_pack

            with self.step(f"Composing the mixture of adapters, {cut.name}, seed {seed}"):
                build_pack(self.recipe.base, experts, cut, out, name=f"{cut.name}-{seed}")
        return out

    def moe(self, cut: Path, seed: int, routing: str = "domain") -> Path:
        """A merged mixture of FFN experts, with the last training that `recipe.router` tells of."""
        from lora_lexicon.compose.policy import parse_policy

        experts = self.experts("ffn", cut, seed)
        recipe = load_recipe(RouterRecipe, find_recipe(self.recipe.router), seed=seed)
        folder = self._models(seed) / cut.name
        gated = parse_policy(routing, len(experts)).gated
        out = folder / f"moe-{routing}"
        if not out.is_dir():
            from lora_lexicon.compose.merge import compose_moe

            with self.step(f"Merging the experts, {cut.name}, {routing}, seed {seed}") as bar:
                data = self.data if gated else None
                told = _summed(bar)
                compose_moe(self.recipe.base, experts, cut, out, routing=routing, data=data, progress=told)
        if not gated and recipe.train != "experts":  # nothing is left to train
            return out
        trained = folder / f"moe-{routing}-trained"
        if not trained.is_dir():
            from lora_lexicon.compose.tune import train_router

            self._base = None
            with self.step(f"Training the merged experts, {cut.name}, {routing}, seed {seed}") as bar:
                train_router(out, self.data, trained, recipe, progress=bar.to)
        return trained

    def _reward(self, seed: int) -> "Reward":
        """A reward model that has learned from what the first trained system samples, with this seed."""
        from lora_lexicon.inference.preferences import train_reward
        from lora_lexicon.inference.reward import load_reward

        out = self.own / "reward" / str(seed)
        if not out.is_dir():
            name = next((name for name in self.recipe.systems if name != "base"), "base")
            model = self.system(name, seed)
            recipe = load_recipe(RewardRecipe, find_recipe(self.recipe.reward), seed=seed)
            self._base = None
            with self.step(f"Training a reward model on samples of {name}, seed {seed}") as bar:
                train_reward(
                    model, self.data, out, recipe, base=self.base_for(model), limit=self.recipe.reward_rows or None,
                    progress=lambda _, done, total: bar.to(done, total),
                )  # fmt: skip
        return load_reward(out, base=self.recipe.base, dtype=self.trained("lora", None).dtype)

    # ---- systems

    def system(self, name: str, seed: int, partition: str = "semantic", count: int | None = None) -> str:
        """The folder (or, of the base, the name) of a system of `recipe.systems`, made where it is not there."""
        if name == "base":
            return find_base(self.recipe.base)
        kind = "lora" if "adapter" in name else "ffn"
        one = partition == "none" or count == 1
        if one or name.startswith("dense"):
            return str(self.dense(kind, seed))
        cut = self.cut(partition, count, seed)
        return str(self.mixture(cut, seed) if kind == "lora" else self.moe(cut, seed))

    def load(self, model: str, name: str) -> "System":
        """A system in memory, in the number format of the LoRA recipe; the base that training held makes room.

        Its size is kept under the name that the experiment gives it.
        """
        from lora_lexicon.compose.system import load_system

        self._base = None
        system = load_system(model, base=self.base_for(model), dtype=self.trained("lora", None).dtype)
        size = {"ship_megabytes": system.ship_bytes / 1e6, "memory_megabytes": system.memory_bytes / 1e6}
        file = self._size(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_record(file, size)
        return system

    def size(self, name: str) -> dict[str, float]:
        """Megabytes (10^6 bytes) to ship and in memory of a system that was loaded, in this run or before."""
        return read_record(self._size(name), DataError, "a system's size")

    def _size(self, name: str) -> Path:
        return self.own / "sizes" / f"{_slug(name)}.json"

    def base_for(self, model: str) -> str | None:
        """What `load_system` is told of a model's base."""
        alone = model == find_base(self.recipe.base) or "moe-" in Path(model).name
        return None if alone else self.recipe.base

    # ---- what is kept of them

    def file(self, kind: str, name: str, seed: int) -> Path:
        """Where a system's rows lie; `kind` is runs, samples or rates."""
        return self.own / kind / f"{_slug(name)}-{seed}.jsonl"

    def rated(self, name: str, seed: int, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """What the seed's reward model says of each sample of each held-out entry."""
        from lora_lexicon.experiments.runs import SAMPLED, Row, in_blocks

        file = self.file("rates", f"{name}, {len(texts[0])}", seed)
        reward = None if file.is_file() else self._reward(seed)

        def rate(start: int, end: int) -> list[Row]:
            assert reward is not None
            entries = self.test[start:end]
            pairs = [
                (e.term, e.context, text) for e, own in zip(entries, texts[start:end], strict=True) for text in own
            ]
            found = iter(reward.rate(pairs))
            return [{"rates": [next(found) for _ in own]} for own in texts[start:end]]

        with nullcontext(_Unseen()) if reward is None else self.step(f"Rating: {name}, seed {seed}") as bar:
            return [row["rates"] for row in in_blocks(file, len(texts), SAMPLED, rate, bar.to)]

    def map(self, cut: Path) -> "Picture":
        """The map of a cut's domains."""
        from lora_lexicon.report.document import Picture

        with TemporaryDirectory() as scratch:
            file = Path(scratch, "map.png")
            alt = self.domains(cut).draw(file)
            return Picture("domains", file.read_bytes(), alt, f"Training prompts in two dimensions, {cut.name}.")

    def _models(self, seed: int) -> Path:
        return self.out / "models" / str(seed)


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower())


def _named(parts: "Sequence[Part]", kind: str, cut: Path | None) -> str:
    if cut is None:
        return parts[0].out.name
    return f"{len(parts)} {kind} experts, {cut.name}"


def _summed(bar: Bar) -> Any:
    """Progress that is told in pieces, as a sum."""
    done = 0

    def told(more: int, total: int) -> None:
        nonlocal done
        done += more
        bar.to(done, total)

    return told
