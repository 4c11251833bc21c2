"""Gates that choose experts for each token or prompt, fitted to a router that chooses by the prompt's domain.

A logistic regression, in each layer, from the states that enter its FFN, or from their mean over a prompt where a gate
chooses once for all of it, to the domain of the prompt they belong to. Its
softmax is the gate's own, so that scale and mixing weights are those of greatest likelihood, and need no temperature;
it has no intercept, because a gate has none. On the first tiny base and 200 held-out entries its first choice was the
router's for 0.60 and 0.64 (layers 4 and 5) of the tokens of definitions, that of plain means for 0.44 and 0.44, of
centred means of unit length for 0.42 and 0.42.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lora_lexicon.compose.policy import DOMAIN, Level
from lora_lexicon.compose.probes import probe_entries
from lora_lexicon.compose.system import System, load_system
from lora_lexicon.data.entry import Entry
from lora_lexicon.domains.embed import FIT_BATCH, by_length
from lora_lexicon.errors import PackError
from lora_lexicon.folders import read_record

FIT_ENTRIES = 512
HELD_OUT_ENTRIES = 128
INVERSE_PENALTY = 0.1  # scikit-learn's C, for states of mean square 1
ITERATIONS = 200


def fit_gates(
    folder: Path,
    layers: Sequence[int],
    names: Sequence[str],
    data: Path | None = None,
    level: Level = "token",
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Gates for the expert layers of a MoE, fitted to its router's choices.

    Args:
        folder: the MoE, with its router beside the weights.
        layers: those that have experts.
        names: the experts to choose among, in the MoE's order, without a kept base.
        data: an entries folder; the gates are fitted on its train entries, and measured on its test entries. By default
            the sample that ships.
        level: what a gate chooses for: a token, or a sequence.

    Returns:
        {layer: (N, H) float32}, and how often a gate's first choice is the router's, as `export.json` has it.

    Raises:
        PackError: an expert that no entry is routed to.
    """
    dtype = read_record(folder / "config.json", PackError, "a MoE").get("dtype")
    # In the type that it is held in, on the CPU, transformers maps the files: the system can take the memory back.
    system = load_system(str(folder), dtype=str(dtype or "float32"), device="cpu", routing=DOMAIN)
    parts = (probe_entries(data, "train", FIT_ENTRIES), probe_entries(data, "test", HELD_OUT_ENTRIES))
    batches = _route(system, parts)
    fitted = np.concatenate([batch.fitted for batch in batches])
    domains = np.concatenate([batch.domains for batch in batches])
    written = np.concatenate([batch.written for batch in batches])
    prompts = _Prompts.of(batches) if level == "sequence" else None
    if prompts is not None:
        fitted, domains, written = fitted[prompts.starts], domains[prompts.starts], written[prompts.starts]
    served = domains[np.flatnonzero(fitted)]
    unseen = [name for i, name in enumerate(names) if i not in served]
    if unseen:
        raise PackError(
            f"no entry of {data or 'the sample that ships'} is routed to {', '.join(unseen)}, so that there is nothing "
            "to fit a gate on: give --data with entries of every domain"
        )
    if fitted.all():
        raise PackError(f"the router abstains on every test entry of {data}: give other --data")
    gates, shares = {}, {}
    for layer, states in _states(system, batches, layers):
        if prompts is not None:
            states = prompts.means(states)
        gates[layer] = fit_gate(states[torch.from_numpy(fitted)], domains[fitted], len(names))
        right = (states @ gates[layer].T).argmax(dim=1).numpy() == domains
        kinds = {"prompt": ~fitted & ~written, "definition": ~fitted & written}
        shares[str(layer)] = {kind: float(right[of].mean()) for kind, of in kinds.items() if of.any()}
    held_out = domains[~fitted]
    chance = float(np.bincount(held_out).max() / len(held_out))
    return gates, {"agreement": shares, "chance": chance, "tokens": len(held_out)}


def fit_gate(states: Tensor, domains: NDArray[np.int64], count: int) -> Tensor:
    """The weights (count, H) of a gate whose softmax over `states` (n, H) is nearest to `domains` (n,), 0 to count - 1.

    Every domain weighs the same, however many tokens it has.
    """
    if count == 1:
        return torch.zeros(1, states.shape[1])
    size = float(states.square().mean().sqrt())
    regression = LogisticRegression(
        C=INVERSE_PENALTY, fit_intercept=False, class_weight="balanced", max_iter=ITERATIONS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a gate decide nothing
        regression.fit((states / size).numpy(), domains)
    weights = torch.from_numpy(np.asarray(regression.coef_)).float() / size
    return torch.cat([-weights / 2, weights / 2]) if count == 2 else weights  # of two, it gives the difference


@dataclass(frozen=True)
class _Batch:
    """Training rows of one length T, prompt and definition together, with the experts of their prompts.

    Attributes:
        ids: (B, T).
        weights: (B, N) the routing.
        domains: (B * T,) the expert of the row that a token belongs to.
        written: (B * T,) whether the token belongs to the definition, which experts write, not to the prompt.
        fitted: (B * T,) whether gates are fitted on it; else they are measured on it.
        rows: (B * T,) which entry it is of.
    """

    ids: Tensor
    weights: Tensor
    domains: NDArray[np.int64]
    written: NDArray[np.bool_]
    fitted: NDArray[np.bool_]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _Prompts:
    """The prompts among the tokens of all batches.

    Attributes:
        tokens: (m,) the tokens that belong to prompts, by their place among all.
        owner: (m,) the prompt of each, 0 to P - 1.
        starts: (P,) a token of each prompt, by its place among all.
    """

    tokens: NDArray[np.int64]
    owner: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, batches: Sequence[_Batch]) -> "_Prompts":
        tokens = np.flatnonzero(~np.concatenate([batch.written for batch in batches]))
        rows = np.concatenate([batch.rows for batch in batches])[tokens]
        _, first, owner = np.unique(rows, return_index=True, return_inverse=True)
        return cls(tokens, owner, tokens[first])

    def means(self, states: Tensor) -> Tensor:
        """(P, H), the means over each prompt of states (tokens, H): what a sequence gate chooses by."""
        owner = torch.from_numpy(self.owner)
        sums = torch.zeros(len(self.starts), states.shape[1]).index_add_(
            0, owner, states[torch.from_numpy(self.tokens)]
        )
        return sums / torch.bincount(owner)[:, None]


def _route(system: System, parts: tuple[Sequence[Entry], Sequence[Entry]]) -> list[_Batch]:
    """The entries to fit on and those to measure on, in batches; those that the router abstains on are left out."""
    entries = [entry for part in parts for entry in part]
    routing = system.route([(entry.term, entry.context) for entry in entries])
    assert routing is not None, "a MoE has a router"
    rows = [system.encoder.row(entry.term, entry.context, entry.definition) for entry in entries]
    batches = []
    for numbers in by_length([row.ids for row in rows], FIT_BATCH):
        kept = np.array([i for i in numbers if routing.top[i] >= 0], dtype=np.int64)
        if len(kept):
            ids, prompts = torch.tensor([rows[i].ids for i in kept]), np.array([rows[i].prompt_length for i in kept])
            length = ids.shape[1]
            batches.append(
                _Batch(
                    ids,
                    torch.from_numpy(routing.weights[kept]),
                    np.repeat(routing.top[kept], length),
                    (np.arange(length) >= prompts[:, None]).ravel(),
                    np.repeat(kept < len(parts[0]), length),
                    np.repeat(kept, length),
                )
            )
    if not batches:
        raise PackError(
            "the router abstains on every entry, so that there is nothing to fit gates on: give other --data"
        )
    return batches


@torch.inference_mode()
def _states(system: System, batches: Sequence[_Batch], layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """What enters the FFN of each of `layers`, rising: (tokens, H) float32, the batches' tokens in order.

    All batches pass through one layer before the next, so that each is read once and no two are needed at a time.
    """
    decoder = cast(Any, system.model).model
    blocks, norm = decoder.layers, decoder.norm
    hidden = [decoder.embed_tokens(batch.ids) for batch in batches]
    entering: list[Tensor] = []
    try:
        decoder.norm = nn.Identity()
        for i, block in enumerate(blocks[: max(layers) + 1]):
            decoder.layers = nn.ModuleList([block])
            hook = block.post_attention_layernorm.register_forward_hook(lambda *seen: entering.append(seen[2]))
            for n, batch in enumerate(batches):
                with system.routed(batch.weights):
                    hidden[n] = decoder(inputs_embeds=hidden[n], use_cache=False).last_hidden_state
            hook.remove()
            if i in layers:
                yield i, torch.cat([states.float().flatten(0, 1) for states in entering])
            entering.clear()
    finally:
        decoder.layers, decoder.norm = blocks, norm
