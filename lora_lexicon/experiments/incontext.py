"""Definitions by a model that is shown examples, and asked over an OpenAI-compatible interface.

Figure 7 and the ICL rows of table 2 of the LM-Lexicon paper (sections 4.1 and C.2). In a folder each run has

answers/NAME.jsonl      what each question depends on, then each answer as it came: written as it comes
predictions/NAME.jsonl  as `evaluate --out` writes them, when all is answered

A run that was killed goes on where it stopped and asks nothing twice.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.domains.embed import Embedder
from lora_lexicon.errors import DataError, LexiconError
from lora_lexicon.evaluation.bootstrap import numbered
from lora_lexicon.evaluation.run import prediction_row
from lora_lexicon.evaluation.scores import figure, score
from lora_lexicon.experiments.demonstrations import How, choose, shown
from lora_lexicon.experiments.endpoint import Answer, Endpoint, Prompt
from lora_lexicon.experiments.prompts import VERSION, clean, messages, text
from lora_lexicon.folders import changing, new_file

METRICS = ("bleu", "rouge-l")
MAX_LINE = 2**20  # bytes of a journal's line

Build = Callable[[int], Prompt]


@dataclass(frozen=True)
class Answered:
    """n test entries, what a model answered to each, and what of that is taken for its definition.

    Attributes:
        predictions: "" where the prompt was too long, or nothing was answered.
    """

    entries: Sequence[Entry]
    answers: Sequence[Answer]
    predictions: Sequence[str]

    def summary(self, seed: int = 42) -> dict[str, Any]:
        """Counts, tokens and scores; what was too long or empty is scored as it is, 0.

        `cut` answers came to their limit of tokens, `cleaned` ones were changed by more than the space around them.
        Where the server does not count all tokens, sums are of those answers that it counted, and `uncounted` is how
        many it did not. Scores have no value where no prompt fitted.
        """
        there = [answer for answer in self.answers if not answer.too_long]
        counted = [a for a in there if a.prompt_tokens is not None and a.completion_tokens is not None]
        pairs = zip(self.answers, self.predictions, strict=True)
        return {
            "rows": len(self.answers),
            "too_long": len(self.answers) - len(there),
            "empty": sum(not prediction and not answer.too_long for answer, prediction in pairs),
            "cleaned": sum(a.text.strip() != p for a, p in zip(self.answers, self.predictions, strict=True)),
            "cut": sum(answer.finish == "length" for answer in there),
            "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in counted),
            "completion_tokens": sum(answer.completion_tokens or 0 for answer in counted),
            "uncounted": len(there) - len(counted),
            "scores": self._scores(seed) if there else None,
        }

    def _scores(self, seed: int) -> dict[str, Any]:
        found = score(self.predictions, [(entry.definition,) for entry in self.entries], METRICS)
        member = numbered([headword(entry.term) for entry in self.entries])
        return {name: figure([found], name, member, seed=seed) for name in METRICS}


def curve(
    train: Sequence[Entry],
    tests: Sequence[Entry],
    endpoint: Endpoint,
    folder: Path,
    shots: Sequence[int],
    examples: How = "random",
    *,
    seed: int = 42,
    embedder: Embedder | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict[str, Any]]:
    """Runs `{examples}-{k}` for each number k of shots: their summaries, with `examples`, `shots` and `signature`.

    Args:
        embedder: of retrieved examples, see `demonstrations.choose`, whose errors are raised too.
        progress: is told (k, how many more are answered).
    """
    need_folder(folder)
    chosen = choose(train, tests, max(shots), examples, seed=seed, embedder=embedder)
    by = {"seed": seed} if embedder is None else {"embedder": embedder.identity}
    found = []
    for k in shots:
        told = None if progress is None else partial(progress, k)
        settings = {"examples": examples, "shots": k, **(by if k else {})}
        seen = [shown(own, k, examples) for own in chosen]
        answered = run(tests, seen, endpoint, folder, f"{examples}-{k}", settings=settings, progress=told)
        own = {"examples": examples, "shots": k, "signature": signature(endpoint, settings)}
        found.append({**own, **answered.summary(seed)})
    return found


def run(
    tests: Sequence[Entry],
    demonstrations: Sequence[Sequence[Entry]],
    endpoint: Endpoint,
    folder: Path,
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Answered:
    """Asks for a definition of each test entry, and writes answers and predictions into `folder` (see above).

    Args:
        demonstrations: of each test entry, in the order in which they are shown.
        settings: more that the journal is to say of the run; other ones than those of its start are refused.
        progress: is told how many more are answered, those of an earlier start first.

    Raises:
        LexiconError: the run of that name was begun with other settings or entries, another command works in
            `folder`, its files cannot be read, or the endpoint fails (see `Endpoint.open`): what was answered stays.
    """
    if not tests:
        raise DataError("nothing to ask: the split holds no entries")
    build: Build = partial(_prompt, tests, demonstrations, endpoint.api)
    hashed = hashlib.sha256()
    for row in range(len(tests)):
        hashed.update(json.dumps(build(row)).encode() + b"\n")
    begun = {**endpoint.settings, **(settings or {}), "version": VERSION, "questions": hashed.hexdigest()}
    with _inside(folder), _journal(folder / "answers" / f"{name}.jsonl", begun) as (file, found):

        def answered(row: int, answer: Answer) -> None:
            found[row] = answer
            _append(file, {"row": row, **asdict(answer)})
            if progress:
                progress(1)

        if progress and found:
            progress(len(found))
        left = [row for row in range(len(tests)) if row not in found]
        if left:
            asyncio.run(_ask(endpoint, left, build, answered))
        answers = [found[row] for row in range(len(tests))]
        predictions = [clean(answer.text, test.term) for test, answer in zip(tests, answers, strict=True)]
        with new_file(folder / "predictions" / f"{name}.jsonl", replace=True) as out:
            for test, prediction in zip(tests, predictions, strict=True):
                out.write(json.dumps(prediction_row(test, prediction, endpoint.model), ensure_ascii=False) + "\n")
    return Answered(tests, answers, predictions)


def signature(endpoint: Endpoint, settings: Mapping[str, Any]) -> str:
    """What scores depend on beside the metric, but for the entries: where it agrees, they can be compared."""
    parts = {"model": endpoint.model, "api": endpoint.api, **settings}
    if "embedder" in parts:
        parts["embedder"] = hashlib.sha256(json.dumps(parts["embedder"], sort_keys=True).encode()).hexdigest()[:12]
    warmth = "default" if endpoint.temperature is None else f"{endpoint.temperature:g}"
    parts |= {"temperature": warmth, "max_tokens": endpoint.max_tokens}
    return "|".join([*(f"{key}:{value}" for key, value in parts.items()), VERSION])


def need_folder(folder: Path) -> None:
    """Raises a DataError unless runs can be begun there, or were."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "answers").is_dir()):
        raise DataError(f"{folder} exists, and no answers lie in it: choose another --out")


def _prompt(tests: Sequence[Entry], demonstrations: Sequence[Sequence[Entry]], api: str, row: int) -> Prompt:
    return (messages if api == "chat" else text)(demonstrations[row], tests[row])


async def _ask(endpoint: Endpoint, rows: Sequence[int], build: Build, answered: Callable[[int, Answer], None]) -> None:
    """Asks `endpoint.concurrency` questions at a time; the first that fails ends the others."""
    waiting = iter(rows)
    async with endpoint.open() as ask:

        async def work() -> None:
            for row in waiting:
                answered(row, await ask(build(row)))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(endpoint.concurrency, len(rows))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Holds the folder, with places for answers and predictions, which go again where nothing was answered."""
    places = [folder / "answers", folder / "predictions"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    try:
        with changing(folder):
            yield
    finally:
        for place in (*places, folder):
            with suppress(OSError):
                place.rmdir()


@contextmanager
def _journal(path: Path, begun: dict[str, Any]) -> Iterator[tuple[BinaryIO, dict[int, Answer]]]:
    """Yields a journal to append to, and what it holds already. One that holds no answer is begun anew, or removed.

    Raises:
        DataError: it was begun with other settings, or is damaged.
    """
    with path.open("a+b") as file:
        old, found, whole = _held(file)
        if found:
            _need_same(path, old, begun)
        file.truncate(whole if found else 0)  # what a kill cut off
        if not found:
            _append(file, {"settings": begun})
        try:
            yield file, found
        finally:
            if not found:
                path.unlink()


def _held(file: BinaryIO) -> tuple[dict[str, Any], dict[int, Answer], int]:
    """A journal's settings and answers, and how many bytes its whole lines have."""
    settings: dict[str, Any] = {}
    found: dict[int, Answer] = {}
    number = whole = 0
    file.seek(0)
    while (line := file.readline(MAX_LINE)).endswith(b"\n") or len(line) == MAX_LINE:
        try:
            held = json.loads(line)
            if number == 0:
                settings = dict(held["settings"])
            else:
                found[held["row"]] = _checked(Answer(*(held[field.name] for field in fields(Answer))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"{file.name}:{number + 1}: damaged: delete the file to ask its questions again"
            raise DataError(message) from error
        number, whole = number + 1, whole + len(line)
    return settings, found, whole


def _checked(answer: Answer) -> Answer:
    counts = (answer.prompt_tokens, answer.completion_tokens)
    if not (type(answer.text) is type(answer.finish) is str and type(answer.too_long) is bool):
        raise ValueError("an answer's text")
    if not all(count is None or type(count) is int for count in counts):
        raise ValueError("an answer's tokens")
    return answer


def _need_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    other = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    named = [key for key in other if key != "questions"] or other
    if named == ["questions"]:
        raise DataError(f"{path} was begun with other entries or demonstrations: choose another --out")
    if named:
        said = ", ".join(f"{key} {json.dumps(old.get(key))}, not {json.dumps(new.get(key))}" for key in named)
        raise DataError(f"{path} was begun with {said}: choose another --out, or the same settings")


def _append(file: BinaryIO, line: dict[str, Any]) -> None:
    """Adds a line, which is on the disk when this returns."""
    try:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise LexiconError(f"{file.name} cannot be written: {error.strerror or error}") from error
