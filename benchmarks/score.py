"""Predictions scored per second, beside the public packages called one sentence at a time.

    pip install rouge-score                                   # the one peer that the extra `dev` does not bring
    python benchmarks/score.py                                # 20,000 rows, seconds
    python benchmarks/score.py --rows 450000 --peer-rows 5000 # the size of the claim

Rows are definitions of the WordNet sample that ships, each against a copy with words replaced at random. Ours is
all of `lora-lexicon score`, from the start of its process to the printed JSON: reading, both metrics, 1,000 resamples.
The peers are timed for their scoring loop alone, in one process, on the first rows: sacrebleu's `sentence_bleu`, NLTK's
`sentence_bleu` (smoothing 2), rouge-score's `RougeScorer`. They compute other figures (docs/scores.md).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from lora_lexicon.data.prepare import prepare
from lora_lexicon.data.store import load_entries

Row = dict[str, str]


def made_rows(count: int) -> list[Row]:
    """Terms, definitions and worsened copies of them, the sample as often as is needed."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(["sample:wordnet"], Path(folder) / "entries")
        entries = load_entries(Path(folder) / "entries").split("train")
    rng, found = random.Random(42), []
    words = [word for entry in entries for word in entry.definition.split()]
    for i in range(count):
        entry = entries[i % len(entries)]
        guess = [word if rng.random() < 0.6 else rng.choice(words) for word in entry.definition.split()]
        found.append(
            {
                "term": entry.term,
                "context": entry.context,
                "prediction": " ".join(guess),
                "definition": entry.definition,
            }
        )
    return found


def ours(rows: list[Row]) -> tuple[float, dict[str, float]]:
    """Seconds of the command, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "lora_lexicon.cli.main",
            "score",
            str(file),
            "--metric",
            "bleu,rouge-l",
            "--json",
        ]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
    return seconds, {name: found["value"] for name, found in json.loads(done.stdout)["scores"].items()}


def peers() -> dict[str, Callable[[str, str], float]]:
    """One sentence at a time, as their documentation shows it."""
    import sacrebleu
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    smooth, rouge = SmoothingFunction().method2, RougeScorer(["rougeL"])
    return {
        "sacrebleu": lambda guess, wanted: sacrebleu.sentence_bleu(guess, [wanted]).score,
        "nltk": lambda guess, wanted: sentence_bleu([wanted.split()], guess.split(), smoothing_function=smooth),
        "rouge-score": lambda guess, wanted: rouge.score(wanted, guess)["rougeL"].fmeasure,
    }


def main() -> None:
    """Prints rows a second of each, last as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--peer-rows", type=int, default=2_000, help="rows that the peers score")
    options = parser.parse_args()
    rows = made_rows(options.rows)
    seconds, figures = ours(rows)
    print(f"ours: {len(rows):,} rows in {seconds:.1f} s: {figures}", file=sys.stderr)
    rates: dict[str, float] = {}
    few = rows[: options.peer_rows]
    for name, score in peers().items():
        started = time.perf_counter()
        total = sum(score(row["prediction"], row["definition"]) for row in few)
        rates[name] = len(few) / (time.perf_counter() - started)
        print(f"{name}: {rates[name]:,.0f} rows/s (mean {total / len(few):.3f})", file=sys.stderr)
    own = len(rows) / seconds
    both = 1 / (1 / rates["sacrebleu"] + 1 / rates["rouge-score"])
    rates["sacrebleu, then rouge-score"] = both
    record = {
        "claim": "BLEU and ROUGE-L of a file of predictions",
        "unit": "rows/s",
        "ours": round(own, 1),
        "peers": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(own / rate, 2) for name, rate in rates.items()},
        "seconds": round(seconds, 1),
        "rows": len(rows),
        "environment": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "packages": {name: version(name) for name in ("sacrebleu", "nltk", "rouge-score")},
        },
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
