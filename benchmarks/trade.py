"""What the trade costs: one set of domains, composed in every form, each held against the merged MoE of FFN experts.

    lora-lexicon demo --out demo-out
    python benchmarks/trade.py demo-out --out trade-out

Every step is a public command, in this one process. Of the demo's folder it reads entries, domains, FFN experts and
the MoE; it trains LoRA experts of each rank as the demo does (a seed on everything, from which the domains' experts
branch, alpha twice the rank, one random seed for all), extracts adapters of the same ranks from the FFN experts, and
composes both. The last line on standard output is one JSON object; OUT/compare.json and OUT/trade.png hold table and
picture. Experts and packs that an earlier run left in OUT are used again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lexicon.cli.console import show_table
from lora_lexicon.cli.main import app

from lora_lexicon.errors import LexiconError
from lora_lexicon.evaluation.report import footprint_fidelity, system_rows
from lora_lexicon.folders import read_record, write_record
from lora_lexicon.resources import find_base

RANKS = (2, 4, 8, 16, 32, 64)
BOTH = 16  # the rank whose mixtures are measured on a 4-bit base too, and whose LoRA experts are merged


def main() -> None:
    parser = argparse.ArgumentParser(description="What each form of a composition costs, and what it loses.")
    parser.add_argument("demo", type=Path, help="what `lora-lexicon demo` made")
    parser.add_argument("--out", type=Path, default=Path("trade-out"))
    parser.add_argument("--limit", type=int, default=300, help="held-out entries to compare on")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    arguments = parser.parse_args()
    demo, out, ranks = arguments.demo, arguments.out, arguments.ranks
    base = str(read_record(demo / "demo.json", LexiconError, "a demo")["base"])
    packs = {rank: compose(demo, out, base, rank) for rank in sorted({*ranks, BOTH})}
    merged = once(out / f"moe-of-lora-{BOTH}", "compose", "moe", out / f"lora-{BOTH}-experts", *router(demo, base))
    everything = [pack for pair in packs.values() for pack in pair]
    forms = [demo / "moe", merged, *everything, find_base(base)]
    plain = compare(out / "plain", forms, demo, arguments.limit)
    quantised = compare(out / "quantised", [demo / "moe", *packs[BOTH]], demo, arguments.limit, "nf4")
    systems = [*plain["systems"], *(system for system in quantised["systems"] if system["name"].endswith("-nf4"))]
    report = {**plain, "models": [str(form) for form in forms], "systems": systems}
    write_record(out / "compare.json", report)
    footprint_fidelity(systems, out / "trade.png", "kl")
    show_table(
        f"{plain['rows']} entries, {plain['tokens']:,} tokens", *system_rows(systems, without=("perplexity", "rouge_l"))
    )
    print(json.dumps(report))


def compose(demo: Path, out: Path, base: str, rank: int) -> tuple[Path, Path]:
    """The packs of trained and of extracted adapters of one rank."""
    seeds, experts, extracted = (out / f"{kind}-{rank}{part}" for kind, part in
                                 (("lora", "-seed"), ("lora", "-experts"), ("extracted", "-experts")))  # fmt: skip
    data = ("--data", demo / "entries", "--base", base)
    settings = [word for key, value in (("rank", rank), ("alpha", 2 * rank), ("checkpoints", 0))
                for word in ("--set", f"{key}={value}")]  # fmt: skip
    run("train", *data, "--domain", "none", "--name", "seed", "--out", seeds, *settings)
    branch = ("--domains", demo / "domains", "--domain", "all", "--from", seeds / "seed", "--out", experts)
    run("train", *data, *branch, *settings)
    once(extracted, "compose", "extract", demo / "experts" / "ffn", "--base", base, "--rank", rank)
    packs = [
        once(out / f"{kind}-{rank}", "compose", "adapters", source, *router(demo, base))
        for kind, source in (("lora", experts), ("extracted", extracted))
    ]
    return packs[0], packs[1]


def router(demo: Path, base: str) -> tuple[object, ...]:
    return ("--base", base, "--router", demo / "domains")


def compare(out: Path, forms: Sequence[object], demo: Path, limit: int, quantize: str | None = None) -> dict[str, Any]:
    """What `compose compare` measures; the first form is the reference."""
    more = ["--quantize", quantize] if quantize else []
    words = ("--data", demo / "entries", "--limit", limit, "--out", out, "--overwrite", *more)
    run("compose", "compare", *forms, *words)
    return read_record(out / "compare.json", LexiconError, "a comparison")


def once(out: Path, *words: object) -> Path:
    """Runs a command that makes the folder `out`, unless it is there; returns it."""
    if not out.is_dir():
        run(*words, "--out", out)
    return out


def run(*words: object) -> None:
    """One command of lora-lexicon, in this process; where it fails, so does this."""
    if failed := app([str(word) for word in words], standalone_mode=False):
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
