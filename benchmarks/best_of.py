"""Best of N on the tiny pack: BLEU and ROUGE-L of held-out WordNet entries, by what chooses among N samples.

    python benchmarks/best_of.py                          # ten minutes and more on two cores
    python benchmarks/best_of.py --entries 40 --prompts 60 --counts 1 4     # a look
    python benchmarks/best_of.py --reward FOLDER          # with a reward model that is there already

Candidates are sampled as in the LM-Lexicon paper (temperature 0.6, top-k 50, top-p 0.9, penalty 1.05); those of N = 4
are the first of N = 16. `reference` chooses by the BLEU with the definition that is looked for: no system could, it is
what choosing could gain at most. `experts` has N candidates of each expert, so it sees more than the others. The reward
model is trained on what the pack samples for train entries (equation 3 of the paper), and is told nothing of these.
A difference is to one sample, with its 95 % interval over headwords. One seed decides all sampling.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from lora_lexicon.compose.system import load_system
from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import load_entries
from lora_lexicon.evaluation.run import Evaluation, compare, evaluate
from lora_lexicon.inference.preferences import train_reward
from lora_lexicon.inference.rerank import WAYS
from lora_lexicon.inference.reward import load_reward
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.recipe import RewardRecipe, load_recipe
from lora_lexicon.resources import find_recipe, find_sample

MODEL = "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200, help="held-out entries, spread over the test split")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16], help="N")
    parser.add_argument("--prompts", type=int, default=1000, help="train entries whose pairs the reward model reads")
    parser.add_argument("--reward", type=Path, help="a reward model on the tiny base, in place of a new one")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        data = Path(work, "entries")
        prepare([find_sample("sample:wordnet")], data)
        test = load_entries(data).split("test")
        chosen = [test[i * len(test) // options.entries] for i in range(options.entries)]
        folder = options.reward or Path(work, "reward")
        if options.reward is None:
            recipe = load_recipe(RewardRecipe, find_recipe("tiny/reward"))
            train_reward(MODEL, data, folder, recipe, limit=options.prompts)
        report(*measure(chosen, options.counts, folder, options.seed))


def measure(entries: list, counts: list[int], folder: Path, seed: int) -> tuple[list[Evaluation], dict]:
    """One evaluation a way to choose and number of candidates, the single sample first; what the reward model says."""
    system = load_system(MODEL)
    reward, decoding = load_reward(folder, system), Decoding("sample", seed=seed)
    found = [evaluate(system, entries, name="one sample", decoding=decoding)]
    found.append(evaluate(system, entries, name="greedy"))
    for by in WAYS:
        for count in counts:
            if count == 1:  # it is the one sample
                continue
            start, own = time.perf_counter(), reward if by == "reward" else None
            name = f"{by}, {count}"
            found.append(evaluate(system, entries, name=name, decoding=decoding, best=count, by=by, reward=own))
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return found, reward.record


def report(found: list[Evaluation], record: dict) -> None:
    first, scores = found[0], {}
    print(f"{'':16}{'BLEU':>8}{'ROUGE-L':>9}{'BLEU - one sample':>28}{'ROUGE-L - one sample':>28}{'words':>7}")
    for one in found:
        said = [compare(one, first, metric) for metric in ("bleu", "rouge_l")]
        shown = [f"{c['difference']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]" for c in said]
        words = sum(len(text.split()) for text in one.predictions) / len(one.predictions)
        summary = one.summary()
        print(f"{one.name:16}{summary['bleu']:8.2f}{summary['rouge_l']:9.2f}{shown[0]:>28}{shown[1]:>28}{words:7.1f}")
        scores[one.name] = {key: summary[key] for key in ("bleu", "rouge_l")} | {"differences": said, "words": words}
    gold = sum(len(entry.definition.split()) for entry in first.entries) / len(first.entries)
    print(f"the references have {gold:.1f} words; the reward model, of valid pairs: {record['valid']}")
    environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    print(
        json.dumps(
            {
                "claim": "what choosing among N samples is worth",
                "unit": "BLEU and ROUGE-L",
                "entries": len(first.entries),
                "scores": scores,
                "reward": {key: record[key] for key in ("train", "valid", "losses")},
                "environment": environment,
            }
        )
    )


if __name__ == "__main__":
    main()
