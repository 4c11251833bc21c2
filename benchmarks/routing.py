"""Table 4 of the LM-Lexicon paper on what `lora-lexicon demo` made: every routing policy, merged and then trained.

    lora-lexicon demo --out demo-out
    python benchmarks/routing.py demo-out               # half an hour on two cores
    python benchmarks/routing.py demo-out --rows 100 --steps 20      # a quick look

Each policy is composed from the same four FFN experts, then trained by `train router` on the train entries of all
domains: what chooses alone, and with the experts; the same rows in the same order. Losses are nats per definition token
of held-out entries; a difference is to domain-level routing at the same stage, with its 95 % interval over headwords.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lexicon.compose.merge import compose_moe, expert_folders
from lora_lexicon.compose.policy import parse_policy
from lora_lexicon.compose.system import load_system
from lora_lexicon.compose.tune import train_router
from lora_lexicon.data.store import load_entries
from lora_lexicon.evaluation.run import Evaluation, compare, evaluate
from lora_lexicon.recipe import RouterRecipe, load_recipe
from lora_lexicon.resources import find_recipe

POLICIES = ("domain", "domain-top-2", "token-top-1", "token-top-2", "sequence-soft", "sequence-hard")
STAGES = ("merged", "gates", "experts")  # as composed; what chooses trained; it and the experts trained
COLUMNS = ("stage", "routing", "loss", "- domain", "p", "BLEU", "ROUGE-L", "tokens/s")


def recipe_of(stage: str, routing: str, learning_rate: float | None, steps: int) -> RouterRecipe:
    """One recipe for all policies; what is trained differs."""
    part = {"domain-top-2": "temperature"}.get(routing, "gates") if stage == "gates" else "experts"
    rate = learning_rate if stage == "experts" else None
    return load_recipe(RouterRecipe, find_recipe("tiny/router"), train=part, max_steps=steps, learning_rate=rate)


def main() -> None:
    """Composes, trains and evaluates every policy, and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="what `lora-lexicon demo` made")
    parser.add_argument("--rows", type=int, default=1000, help="test entries for the loss")
    parser.add_argument("--defined", type=int, default=300, help="of them, how many are defined, for BLEU and ROUGE-L")
    parser.add_argument("--steps", type=int, default=-1, help="training steps; by default one epoch")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--expert-rate", type=float, default=3e-5, help="learning rate where experts are trained")
    options = parser.parse_args()
    data, domains = options.demo / "entries", options.demo / "domains"
    entries = load_entries(data).split("test")[: options.rows]
    experts, console, rows = expert_folders([options.demo / "experts" / "ffn"]), Console(width=110), []
    with tempfile.TemporaryDirectory() as work:
        for stage in options.stages:
            first: Evaluation | None = None
            for routing in POLICIES:
                folder = Path(work, f"merged-{routing}")
                if not folder.exists():
                    compose_moe(
                        "tiny",
                        experts,
                        domains,
                        folder,
                        routing=routing,
                        verify=False,
                        data=data if parse_policy(routing, 4).gated else None,
                    )
                if stage != "merged" and not (stage == "gates" and routing == "domain"):  # which has nothing to train
                    tuned = Path(work, f"{stage}-{routing}")
                    train_router(folder, data, tuned, recipe_of(stage, routing, options.expert_rate, options.steps))
                    folder = tuned
                found = evaluate(load_system(str(folder)), entries, name=routing, defined=options.defined)
                first = first or found
                said = compare(found, first)
                summary = found.summary()
                difference = (
                    "" if found is first else f"{said['difference']:+.4f} [{said['low']:+.4f}, {said['high']:+.4f}]"
                )
                rows.append((stage, routing, f"{summary['loss']:.4f}", difference,
                             "" if found is first else f"{said['p']:.4f}",
                             *(f"{summary[key]:.2f}" for key in ("bleu", "rouge_l")),
                             f"{summary['tokens_per_second']:.0f}"))  # fmt: skip
                console.print(*rows[-1])
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
