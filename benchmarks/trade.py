"""What the trade costs: one set of domains, composed in every form, each held against the merged MoE of FFN experts.

    lora-lexicon demo --out demo-out
    python benchmarks/trade.py demo-out --out trade-out

Every step is a public command, in this one process. Of the demo's folder it reads entries, domains, FFN experts and
the MoE; it trains LoRA experts of each rank as the demo does (a seed on everything, from which the domains' experts
branch, alpha twice the rank, one random seed for all), extracts adapters of the same ranks from the FFN experts, and
composes both. The last line on standard output is one JSON object; OUT/compare.json and OUT/trade.svg hold table and
picture. Experts and packs that an earlier run left in OUT are used again.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lexicon.cli.console import show_table
from lora_lexicon.cli.main import app
from matplotlib.figure import Figure

from lora_lexicon.errors import LexiconError
from lora_lexicon.evaluation.report import FIDELITY, system_rows
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
    draw({system["name"]: system for system in systems}, out / "trade.svg")
    show_table(
        f"{plain['rows']} entries, {plain['tokens']:,} tokens",
        *system_rows(systems, leave_out=("perplexity", "rouge_l")),
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


def draw(systems: dict[str, dict[str, Any]], path: Path) -> None:
    """KL divergence over megabytes to ship, a line for each kind of adapter, with its ranks."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()

    def point(name: str) -> tuple[float, float]:
        return systems[name]["ship_megabytes"], systems[name]["kl"]

    kinds = {"lora": "trained LoRA experts", "extracted": "adapters extracted from the FFN experts"}
    for i, (kind, label) in enumerate(kinds.items()):
        names = sorted((n for n in systems if re.fullmatch(rf"{kind}-\d+", n)), key=lambda n: point(n)[0])
        axes.plot(*zip(*map(point, names), strict=True), "o-", color=f"C{i}", label=label)
        for name in names:
            above = {"xytext": (0, 7 if kind == "lora" else -13), "textcoords": "offset points", "ha": "center"}
            axes.annotate(name.rpartition("-")[2], point(name), fontsize=8, color=f"C{i}", **above)
        axes.plot(*point(f"{kind}-{BOTH}-nf4"), "s", color=f"C{i}", fillstyle="none", label=f"rank {BOTH}, 4-bit base")
    axes.plot(*point(f"moe-of-lora-{BOTH}"), "D", color="C0", label=f"MoE merged from LoRA, rank {BOTH}")
    axes.axhline(next(s["kl"] for n, s in systems.items() if n.startswith("base")), color="0.5", ls="--", label="base")
    axes.set(xscale="log", yscale="log", xlabel="MB to ship, beside the base where there is one", ylabel=FIDELITY["kl"])
    axes.yaxis.label.set_size(9)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path)


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
