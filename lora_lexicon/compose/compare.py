"""What answers a prompt before and after domains join or leave, compared to the bit. Knows no files and no losses."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from lora_lexicon.compose.system import System, install
from lora_lexicon.data.prompt import pad_token_id
from lora_lexicon.domains.embed import Prompt
from lora_lexicon.domains.router import Router
from lora_lexicon.domains.routing import Routing
from lora_lexicon.experts.grouped import grouped_adapters
from lora_lexicon.experts.lora import LoadedAdapter

CHECKED_TOKENS = 24  # how far each check prompt is decoded before and after
CHECKED_AT_ONCE = 32

Weights = NDArray[np.float32]


class Experts(NamedTuple):
    """What answers: a router and its domains' adapters, in its order."""

    router: Router
    adapters: list[LoadedAdapter]

    def put_on(self, system: System) -> None:
        """Makes a mixture route and answer by them."""
        install(system, self.router, self.adapters)

    def keep(self, other: "Experts", ours: Weights, theirs: Weights) -> NDArray[np.bool_]:
        """(n,) whether a row of weights, (n, N) `ours` and (n, M) `theirs`, gives the same adapters the same share."""
        mapped, lost = np.zeros_like(theirs), np.zeros(len(ours), dtype=bool)
        places = {id(adapter): i for i, adapter in enumerate(other.adapters)}
        for i, adapter in enumerate(self.adapters):
            if id(adapter) in places:
                mapped[:, places[id(adapter)]] = ours[:, i]
            else:
                lost |= ours[:, i] != 0
        return ~lost & (mapped == theirs).all(axis=1)


def held_experts(system: System) -> Experts:
    """The router and the adapters of a loaded mixture."""
    assert system.router is not None
    return Experts(system.router, grouped_adapters(system.model, system.experts))


@dataclass(frozen=True)
class _Answer:
    """What one prompt got: its domain, the text, and a hash of every logit on the way."""

    domain: str
    text: str
    logits: str


class Answers(NamedTuple):
    """What n prompts got, and how they were routed; None for no prompts."""

    each: list[_Answer]
    routing: Routing | None


def compare_experts(
    system: System,
    before: Experts,
    after: Experts,
    check: Sequence[Prompt],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Decodes every check prompt with both, in the same batches, and compares to the bit; `after` stays on the system.

    What is in both is the same object. See `differing` for what is returned.
    """
    found: list[Answers] = []
    for step, experts in enumerate((before, after)):
        experts.put_on(system)
        found.append(answers(system, check, progress and partial(_half, progress, step)))
    first, second = found
    keep = before.keep(after, first.routing.weights, second.routing.weights) if first.routing and second.routing else ()
    return differing(check, first, second, keep)


def _half(progress: Callable[[int, int], None], step: int, done: int, total: int) -> None:
    progress(step * total + done, 2 * total)


def answers(
    system: System,
    check: Sequence[Prompt],
    progress: Callable[[int, int], None] | None = None,
    at_once: int = CHECKED_AT_ONCE,
) -> Answers:
    """Decodes every check prompt with a system whose router chooses by the prompt, the short ones first.

    Args:
        at_once: prompts in a batch.
        progress: called with (prompts done, to do).
    """
    if not check:
        return Answers([], None)
    order = sorted(range(len(check)), key=lambda i: len(system.encoder.prompt(*check[i])))
    routing, found = cast(Routing, system.route(check)), {}
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        found |= dict(zip(batch, _answers(system, [check[i] for i in batch], routing, batch), strict=True))
        if progress is not None:
            progress(start + len(batch), len(check))
    return Answers([found[i] for i in range(len(check))], routing)


def differing(
    check: Sequence[Prompt], before: Answers, after: Answers, keep: "Sequence[bool] | NDArray[np.bool_]"
) -> dict[str, Any]:
    """Which prompts change hands, and which of the others (`keep`, (n,)) got other logits.

    Returns:
        `checked`, `moved` (prompts that change hands, with both texts), `kept` (the number of the others), `unchanged`
        (how many of those have the same routing weights and logits to the bit) and `changed` (those that do not).
    """
    moved, changed = [], []
    for i, (first, second) in enumerate(zip(before.each, after.each, strict=True)):
        row = {
            "term": check[i][0],
            "context": check[i][1],
            "from": first.domain,
            "to": second.domain,
            "similarity": round(float(cast(Routing, after.routing).similarities[i].max()), 4),
            "before": first.text,
            "after": second.text,
        }
        if not keep[i]:
            moved.append(row)
        elif first.logits != second.logits:
            changed.append(row)
    kept = len(check) - len(moved)
    return {"checked": len(check), "moved": moved, "kept": kept, "unchanged": kept - len(changed), "changed": changed}


@torch.inference_mode()
def _answers(system: System, prompts: Sequence[Prompt], routing: Routing, rows: Sequence[int]) -> list[_Answer]:
    """Greedy answers to `prompts`, which are rows `rows` of the routing."""
    encoded = [system.encoder.prompt(*prompt) for prompt in prompts]
    width, pad, device = max(map(len, encoded)), pad_token_id(system.tokenizer), system.model.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
    with system.routed(torch.from_numpy(routing.weights[list(rows)]).to(device)):
        made = cast(Any, system.model).generate(
            ids,
            attention_mask=mask,
            max_new_tokens=CHECKED_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
    written = made.sequences[:, width:].cpu()
    logits = torch.stack(made.logits, dim=1).float().cpu()  # (B, steps, V)
    answers = []
    for i, row in enumerate(rows):
        ended = (written[i] == system.tokenizer.eos_token_id).nonzero()
        steps = int(ended[0]) + 1 if len(ended) else written.shape[1]  # after its EOS a row only waits for the others
        text = str(system.tokenizer.decode(written[i, :steps], skip_special_tokens=True)).strip()
        answers.append(
            _Answer(routing.name(row), text, hashlib.sha256(logits[i, :steps].numpy().tobytes()).hexdigest())
        )
    return answers
