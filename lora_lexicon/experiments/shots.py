"""Figure 7 of the LM-Lexicon paper: what a model writes that is shown examples in its prompt."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

from lora_lexicon.errors import LexiconError
from lora_lexicon.evaluation.run import prediction_row
from lora_lexicon.experiments.bench import Bar, Bench
from lora_lexicon.experiments.demonstrations import How, choose, shown
from lora_lexicon.experiments.runs import Row, ignore, in_blocks, never

TEMPERATURE = 0.6  # the paper's, of what samples
OURS = "lora-lexicon serve"  # what stands for our own server's address in files
SECONDS = 20  # for it to end


def shot_name(how: str, k: int) -> str:
    """What k examples, chosen in a way, are called among systems."""
    return f"{k} {how} example{'' if k == 1 else 's'}" if k else "no examples"


def asked(bench: Bench) -> tuple[dict[str, list[list[Row]]], dict[str, int]]:
    """The rows of each way and number of examples, with each seed; and how many prompts were too long, of all seeds.

    Retrieved examples are the same with each seed: where nothing is sampled, the first seed stands for all.
    """
    rows: dict[str, list[list[Row]]] = {}
    too_long: dict[str, int] = {}
    with ExitStack() as stack:
        address = ""

        def open_address() -> str:  # not before anything is to be asked
            nonlocal address
            address = address or bench.recipe.endpoint or stack.enter_context(served(bench.recipe.base))
            return address

        for how in cast(tuple[How, ...], bench.recipe.examples):
            drawn = how == "random" or bench.recipe.decoding == "sample"
            for seed in bench.recipe.seeds:
                for k, own in _curve(bench, how, seed if drawn else bench.recipe.seeds[0], open_address).items():
                    name = shot_name(how, k)
                    if k or how == bench.recipe.examples[0]:
                        rows.setdefault(name, []).append(own)
                        too_long[name] = too_long.get(name, 0) + sum(row["too_long"] for row in own)
    return rows, too_long


def _curve(bench: Bench, how: How, seed: int, address: Callable[[], str]) -> dict[int, list[Row]]:
    """The rows of each number of examples."""
    from lora_lexicon.domains.embedders import TfidfEmbedder
    from lora_lexicon.domains.fit import prompts_of
    from lora_lexicon.experiments.endpoint import Endpoint
    from lora_lexicon.experiments.incontext import run

    recipe, test = bench.recipe, bench.test
    files = {k: bench.file("runs", shot_name(how, k), seed) for k in recipe.shots}
    missing = [k for k, file in files.items() if not file.is_file()]
    if missing:
        train = bench.entries.split("train")
        embedder = TfidfEmbedder.fit(prompts_of(train)) if how == "retrieved" else None
        chosen = choose(train, test, max(missing), how, seed=seed, embedder=embedder)
        endpoint = Endpoint(
            address().rstrip("/"), recipe.model, recipe.api, TEMPERATURE if recipe.decoding == "sample" else 0.0,
            recipe.max_tokens, name="" if recipe.endpoint else OURS,
        )  # fmt: skip
        for k in missing:
            demonstrations = [shown(own, k, how) for own in chosen]
            with bench.step(f"Asking: {shot_name(how, k)}, seed {seed}") as bar:
                done = 0

                def told(more: int, bar: Bar = bar) -> None:
                    nonlocal done
                    done += more
                    bar.to(done, len(test))

                folder = bench.own / "incontext" / str(seed)
                own = run(test, demonstrations, endpoint, folder, f"{how}-{k}", progress=told)
            rows = [
                {**prediction_row(entry, text, recipe.model), "too_long": answer.too_long}
                for entry, text, answer in zip(test, own.predictions, own.answers, strict=True)
            ]
            in_blocks(files[k], len(rows), len(rows), lambda start, end, rows=rows: rows[start:end], ignore)
    return {k: in_blocks(file, len(test), len(test), never, ignore) for k, file in files.items()}


@contextmanager
def served(model: str) -> Iterator[str]:
    """Our own server with a model, as a process; yields the address of its OpenAI interface.

    Raises:
        LexiconError: it does not start.
    """
    command = [sys.executable, "-m", "lora_lexicon.cli.main", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if not said:
            _, error = process.communicate()
            last = (error.strip().splitlines() or ["it said nothing"])[-1]
            raise LexiconError(f"our own server does not start: {last}")
        yield f"{said[-1]}/v1"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
