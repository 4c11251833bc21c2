"""Each table and figure of the LM-Lexicon paper as one function: what is compared, and what the paper says of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from lora_lexicon.evaluation.run import prediction_row
from lora_lexicon.experiments import paper
from lora_lexicon.experiments.bench import Bench
from lora_lexicon.experiments.pictures import curves
from lora_lexicon.experiments.results import LOSS, Claim, Difference, Results, difference_table, verdicts
from lora_lexicon.experiments.runs import Row, defined, ignore, never, sampled
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.recipe import RouterRecipe, load_recipe
from lora_lexicon.report.document import Block, Cell, Figure, Picture, Section, Table, Text
from lora_lexicon.resources import find_recipe

FIRST = "bleu"  # the metric that claims are held against
SEED_NOTE = "Mean over seeds ± deviation; brackets: 95 % of resamples of headwords."


@dataclass(frozen=True)
class Found:
    """What a study found: the first sentences of its report, the rest, and what was measured."""

    summary: Sequence[str]
    sections: Sequence[Section]
    results: Results | None = None


def table_2(bench: Bench) -> Found:
    """All systems: one definition, the best of N by the reference (oracle), and by a reward model."""
    systems = one_each(bench, bench.recipe.systems)
    best = best_of(bench, bench.recipe.systems, [max(bench.recipe.samples)], rewarded=True)
    results = Results(bench.recipe, bench.test, {**systems, **best})
    named = [name for name in bench.recipe.systems if name in systems]
    pairs = [("moe", "dense"), ("mixture of adapters", "dense adapter"), ("mixture of adapters", "moe"),
             *((name, "base") for name in named if name != "base")]  # fmt: skip
    n = max(bench.recipe.samples)
    chosen = [(f"{name}, best of {n} by reward", name) for name in named]
    found = results.differences(_there(results, [*pairs, *chosen]))
    claims = [
        Claim("Merged experts write better definitions than one dense model", "moe", "dense"),
        Claim("A mixture of adapters does better than one dense adapter", "mixture of adapters", "dense adapter"),
        Claim(f"One dense model gains by a reward model, of {n}", f"dense, best of {n} by reward", "dense"),
    ]
    return _found(results, "Systems", found, claims, [paper.table_2()], footprint(bench, results))


def table_3(bench: Bench) -> Found:
    """How the data is cut: by meaning, not at all, at random, by words."""
    systems = {
        f"{system}, {partition}": runs_of(
            bench, f"{system}, {partition}", lambda seed, s=system, p=partition: bench.system(s, seed, p)
        )
        for system in bench.recipe.systems
        for partition in bench.recipe.partitions
    }
    results = Results(bench.recipe, bench.test, systems)
    others = [partition for partition in bench.recipe.partitions if partition != "semantic"]
    pairs = [(f"{s}, semantic", f"{s}, {other}") for s in bench.recipe.systems for other in others]
    found = results.differences(_there(results, pairs))
    claims = [Claim(f"A semantic cut beats {b.split(', ')[1]} ({b.split(', ')[0]})", a, b) for a, b in pairs]
    return _found(results, "Partitions", found, claims, [paper.table_3()])


def table_4(bench: Bench) -> Found:
    """What experts are chosen by: the router once for a prompt, gates for each token, gates once for a prompt."""
    systems = {
        policy: runs_of(bench, policy, lambda seed, p=policy: str(bench.moe(bench.cut("semantic"), seed, p)))
        for policy in bench.recipe.policies
    }
    results = Results(bench.recipe, bench.test, systems)
    pairs = [("domain", policy) for policy in bench.recipe.policies if policy != "domain"]
    found = results.differences(_there(results, pairs))
    claims = [Claim(f"Routing by domain beats {b}", a, b) for a, b in pairs]
    trained = load_recipe(RouterRecipe, find_recipe(bench.recipe.router)).train
    what = "Every MoE" if trained == "experts" else "What chooses by gates"
    note = Text(f"{what} was trained once more on the train entries of all domains ({bench.recipe.router}).")
    return _found(results, "Routing policies", found, claims, [paper.table_4()], [note])


def figure_4(bench: Bench) -> Found:
    """The best of N samples by the reference, as N grows."""
    counts = sorted(bench.recipe.samples)
    results = Results(bench.recipe, bench.test, best_of(bench, bench.recipe.systems, counts))
    series = {
        system: [(n, results.figure(_best(system, n, "reference"), FIRST)) for n in counts]
        for system in bench.recipe.systems
    }
    picture = curves("best-of-n", "Best of N by the reference", "N, samples of a prompt", "BLEU", series)
    pairs = [(_best(s, counts[-1], "reference"), _best(s, counts[0], "reference")) for s in bench.recipe.systems]
    found = results.differences(_there(results, pairs))
    claims = [Claim(f"More samples hold a better one ({a.split(', ')[0]})", a, b) for a, b in pairs]
    note = Text(
        "The candidate with the highest BLEU against the reference is taken: what choosing could gain at most. "
        "Those of a smaller N are the first ones of the largest."
    )
    return _found(results, "Best of N", found, claims, [], [note, picture])


def figure_5(bench: Bench) -> Found:
    """More experts, each on fewer rows: the same rows in all."""
    counts = sorted(bench.recipe.experts)
    systems = {
        _many(system, n): runs_of(bench, _many(system, n), lambda seed, s=system, n=n: bench.system(s, seed, count=n))
        for system in bench.recipe.systems
        for n in counts
    }
    results = Results(bench.recipe, bench.test, systems)
    series = {s: [(n, results.figure(_many(s, n), FIRST)) for n in counts] for s in bench.recipe.systems}
    picture = curves("experts", "Numbers of experts", "experts", "BLEU", series)
    pairs = [(_many(s, counts[-1]), _many(s, counts[0])) for s in bench.recipe.systems]
    pairs += [(_many(s, b), _many(s, a)) for s in bench.recipe.systems for a, b in pairwise(counts)]
    found = results.differences(_there(results, list(dict.fromkeys(pairs))))
    claims = [Claim(f"{a} beats {b}", a, b) for a, b in pairs[: len(bench.recipe.systems)]]
    return _found(results, "Numbers of experts", found, claims, [paper.figure_5()], [picture])


def table_6(bench: Bench) -> Found:
    """What training takes: floating-point operations, hours, CO2."""
    rows: list[list[Cell]] = []
    for system in bench.recipe.systems:
        spent = [_spent(bench, system, seed) for seed in bench.recipe.seeds]
        flops, hours = ([one[i] for one in spent] for i in (0, 1))
        carbon = [h * bench.recipe.watts / 1000 * bench.recipe.carbon for h in hours]
        rows.append([system, statistics.fmean(flops), _mean(hours), _mean(carbon)])
    note = (
        f"Of one seed; hours of this machine, the adapter that a run goes on from included, composing and a MoE's last "
        f"training not. CO2: hours times {bench.recipe.watts:g} W times {bench.recipe.carbon:g} kg/kWh, no measurement "
        "(`train --report-to codecarbon` measures)."
    )
    table = Table("What training takes", ("system", "FLOPs", "hours", "kg CO2"), rows, note)
    return Found(
        [f"{system}: {flops:.2g} floating-point operations, {hours} hours." for system, flops, hours, _ in rows],
        [Section("Costs", [table]), Section("The paper", [paper.table_6()])],
    )


def tables_7_8(bench: Bench) -> Found:
    """How tight domains are, and how far apart."""
    record = bench.domains(bench.cut("semantic")).record
    within = [[name, Figure(value, digits=3)] for name, value in record["cohesion"].items()]
    between = [[f"{pair['a']}, {pair['b']}", Figure(pair["distance"], digits=3)] for pair in record["separation"]]
    mean = [Figure(record[key], digits=3) for key in ("mean_cohesion", "mean_separation")]
    note = "1 - cosine, in the router's own space: of members to their centroid, of centroids to each other."
    tables = [
        Table("Cohesion: small is tight", ("domain", "distance"), [*within, ["mean", mean[0]]], note),
        Table("Separation: large is far apart", ("domains", "distance"), [*between, ["mean", mean[1]]], note),
    ]
    summary = [
        f"{len(within)} domains: members lie {mean[0]} from their centroid, centroids {mean[1]} from each other; "
        "0.175 and 0.713 in the paper, in another space, which is not comparable."
    ]
    picture = bench.map(bench.cut("semantic"))
    return Found(summary, [Section("Domains", [*tables, picture]), Section("The paper", paper.tables_7_8())])


def figure_7(bench: Bench) -> Found:
    """A model that is shown k examples in its prompt, chosen at random or retrieved, beside our systems."""
    from lora_lexicon.experiments.shots import asked, shot_name

    shown, too_long = asked(bench)
    fit = {name: rows for name, rows in shown.items() if too_long[name] < len(bench.test) * len(rows)}
    results = Results(bench.recipe, bench.test, {**fit, **one_each(bench, bench.recipe.systems)})
    series = {
        how: [
            (k, results.figure(name, FIRST)) for k in sorted(bench.recipe.shots) if (name := shot_name(how, k)) in fit
        ]
        for how in bench.recipe.examples
    }
    level = {name: results.figure(name, FIRST) for name in bench.recipe.systems}
    picture = curves("shots", "Examples in the prompt", "examples", "BLEU", series, level)
    most = [[shot_name(how, k) for k in sorted(bench.recipe.shots, reverse=True)] for how in bench.recipe.examples]
    best = [next(name for name in names if name in fit) for names in most if any(name in fit for name in names)]
    pairs = [(system, name) for system in bench.recipe.systems for name in dict.fromkeys(best)]
    found = results.differences(pairs)
    claims = [Claim(f"{a} beats {b} of {bench.recipe.model}", a, b) for a, b in pairs]
    claims = [Claim(f"{a} beats {b} of {bench.recipe.model}", a, b) for a, b in {(d.a, d.b): 0 for d in found}]
    note = Text(
        f"{bench.recipe.model} at {bench.recipe.endpoint or 'our own server'}. No example has the headword that is "
        "asked for. A prompt that does not fit what the model reads scores 0."
    )
    lost = [[name, count, len(bench.test) * len(shown[name])] for name, count in too_long.items() if count]
    columns = ("examples", "prompts that do not fit", "of")
    more = [Table("Too long", columns, lost, "Where none fits, there is no figure.")] if lost else []
    return _found(results, "Examples in the prompt", found, claims, [], [note, picture, *more])


STUDIES: dict[str, Callable[[Bench], Found]] = {
    "table-2": table_2,
    "table-3": table_3,
    "table-4": table_4,
    "table-6": table_6,
    "tables-7-8": tables_7_8,
    "figure-4": figure_4,
    "figure-5": figure_5,
    "figure-7": figure_7,
}


# ---- what studies share


def one_each(bench: Bench, systems: Sequence[str]) -> dict[str, list[list[Row]]]:
    """One definition of each entry by each system, with each seed."""
    return {name: runs_of(bench, name, lambda seed, name=name: bench.system(name, seed)) for name in systems}


def footprint(bench: Bench, results: Results) -> list[Block]:
    """What systems of which the loss is known cost, beside it, as a picture."""
    from lora_lexicon.evaluation.report import footprint_picture

    shown = [
        {**bench.size(name), "name": name, "loss": results.figure(name, LOSS).value} for name in bench.recipe.systems
    ]
    png, alt = footprint_picture(shown)
    return [Picture("footprint-fidelity", png, alt, "Left: what is shipped. Right: what is held in memory.")]


def runs_of(bench: Bench, name: str, model: Callable[[int], str]) -> list[list[Row]]:
    """A system's rows with each seed; `model(seed)` makes it where rows are missing."""
    found = []
    for seed in bench.recipe.seeds:
        file = bench.file("runs", name, seed)
        if not file.is_file():
            folder = model(seed)
            with bench.step(f"Defining: {name}, seed {seed}") as bar:
                found.append(
                    defined(file, lambda f=folder: bench.load(f, name), bench.test, decoding(bench, seed), bar.to)
                )
        else:
            found.append(defined(file, never, bench.test, decoding(bench, seed), ignore))
    return found


def decoding(bench: Bench, seed: int) -> Decoding:
    return Decoding(bench.recipe.decoding, seed=seed, max_new_tokens=bench.recipe.max_tokens)


def best_of(
    bench: Bench, systems: Sequence[str], counts: Sequence[int], *, rewarded: bool = False
) -> dict[str, list[list[Row]]]:
    """The best of n samples of each system by BLEU with the reference, and by a reward model, for each n and seed."""
    from lora_lexicon.evaluation.metrics import bleu

    found: dict[str, list[list[Row]]] = {}
    if max(counts) == 1 and rewarded:
        return found
    for name in systems:
        for seed in bench.recipe.seeds:
            texts = _samples(bench, name, seed, max(counts))
            rates = [[bleu(text, [e.definition]) for text in own] for e, own in zip(bench.test, texts, strict=True)]
            ways = {"reference": rates}
            if rewarded:
                ways["reward"] = bench.rated(name, seed, texts)
            for by, rated in ways.items():
                for n in counts:
                    rows = [
                        prediction_row(entry, own[max(range(n), key=lambda k, r=rate: r[k])], name)
                        for entry, own, rate in zip(bench.test, texts, rated, strict=True)
                    ]
                    found.setdefault(_best(name, n, by), []).append(rows)
    return found


def _samples(bench: Bench, name: str, seed: int, count: int) -> list[list[str]]:
    file, wanted = bench.file("samples", f"{name}, {count}", seed), replace(decoding(bench, seed), method="sample")
    if file.is_file():
        return sampled(file, never, bench.test, count, wanted, ignore)
    folder = bench.system(name, seed)
    with bench.step(f"Sampling: {name}, {count} a prompt, seed {seed}") as bar:
        return sampled(file, partial(bench.load, folder, name), bench.test, count, wanted, bar.to)


def _spent(bench: Bench, system: str, seed: int) -> tuple[float, float]:
    """(floating-point operations, hours) of a system's training."""
    bench.system(system, seed)
    kind = "lora" if "adapter" in system else "ffn"
    folders = (
        [bench.dense(kind, seed)] if system.startswith("dense") else bench.experts(kind, bench.cut("semantic"), seed)
    )
    start = bench.start(seed)
    infos = bench.infos([*([start] if start else []), *folders])
    runs = {tuple(sorted(info.training["together"])): float(info.training["seconds"]) for info in infos}
    return sum(float(info.training["flops"]) for info in infos), sum(runs.values()) / 3600


def _mean(values: Sequence[float]) -> Figure:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.fmean(values), deviation=deviation, digits=5)


def _best(system: str, n: int, by: str) -> str:
    return f"{system}, best of {n} by {'the reference' if by == 'reference' else by}"


def _many(system: str, n: int) -> str:
    return f"{system}, {n} expert{'s' if n > 1 else ''}"


def _there(results: Results, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in pairs if a != b and a in results.systems and b in results.systems]


def _found(
    results: Results,
    title: str,
    found: Sequence[Difference],
    claims: Sequence[Claim],
    theirs: Sequence[Table],
    more: Sequence[Block] = (),
) -> Found:
    blocks = [*more, results.table(title, SEED_NOTE), *([difference_table(found)] if found else [])]
    sections = [Section("Results", blocks)]
    if theirs:
        sections.append(Section("The paper", list(theirs)))
    there = {(one.a, one.b) for one in found}
    return Found(verdicts([claim for claim in claims if (claim.a, claim.b) in there], found), sections, results)
