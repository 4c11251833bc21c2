"""Gates for experts that are chosen token by token, fitted to a router that chooses by the prompt.

A logistic regression, in each layer, from the states that enter its FFN to the domain of the prompt they belong to. Its
softmax is the gate's own, so that scale and mixing weights are those of greatest likelihood, and need no temperature;
it has no intercept, because a gate has none. On the first tiny base and 200 held-out entries its first choice was the
router's for 0.60 and 0.64 (layers 4 and 5) of the tokens of definitions, that of plain means for 0.44 and 0.44, of
centred means of unit length for 0.42 and 0.42.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lora_lexicon.compose.policy import DOMAIN
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


@dataclass(frozen=True)
class States:
    """What enters the expert layers' FFNs over the tokens of some entries, each routed to one domain.

    Attributes:
        layers: {layer: (tokens, H) float32}.
        domains: (tokens,) the domain of the prompt that a token belongs to, or follows.
        written: (tokens,) whether the token belongs to the definition, which experts write, not to the prompt.
        rows: (tokens,) which entry the token is of.
    """

    layers: dict[int, Tensor]
    domains: NDArray[np.int64]
    written: NDArray[np.bool_]
    rows: NDArray[np.int64]

    def prompts(self) -> "States":
        """The mean over the tokens of each prompt in a token's place: what a sequence gate chooses by."""
        rows, first, place = np.unique(self.rows[~self.written], return_index=True, return_inverse=True)
        kept, to = torch.from_numpy(~self.written), torch.from_numpy(place)
        counts = torch.bincount(to)[:, None]
        means = {
            layer: torch.zeros(len(rows), states.shape[1]).index_add_(0, to, states[kept]) / counts
            for layer, states in self.layers.items()
        }
        return States(means, self.domains[~self.written][first], np.zeros(len(rows), dtype=bool), rows)


def fit_gates(
    folder: Path,
    layers: Sequence[int],
    names: Sequence[str],
    data: Path | None = None,
    level: Literal["token", "sequence"] = "token",
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Gates for the expert layers of a MoE, fitted to its router's choices.

    Args:
        folder: the MoE, with its router beside the weights.
        layers: those that have experts.
        names: the experts to choose among, in the MoE's order, without a kept base.
        data: an entries folder; the gates are fitted on its train entries, and measured on its test entries. By default
            the sample that ships.
        level: what a gate chooses for: each token, or a prompt by the mean of its tokens.

    Returns:
        {layer: (N, H) float32}, and how often a gate's first choice is the router's, as `export.json` has it.

    Raises:
        PackError: an expert that no entry is routed to.
    """
    dtype = read_record(folder / "config.json", PackError, "a MoE").get("dtype")
    system = load_system(str(folder), dtype=str(dtype or "float32"), routing=DOMAIN)
    seen = collect_states(system, probe_entries(data, "train", FIT_ENTRIES), layers)
    unseen = [name for i, name in enumerate(names) if i not in seen.domains]
    if unseen:
        raise PackError(
            f"no entry of {data or 'the sample that ships'} is routed to {', '.join(unseen)}, so that there is nothing "
            "to fit a gate on: give --data with entries of every domain"
        )
    if level == "sequence":
        seen = seen.prompts()
    gates = {layer: fit_gate(states, seen.domains, len(names)) for layer, states in seen.layers.items()}
    del seen
    held_out = collect_states(system, probe_entries(data, "test", HELD_OUT_ENTRIES), layers)
    if level == "sequence":
        held_out = held_out.prompts()
    shares = {}
    for layer, gate in gates.items():
        right = (held_out.layers[layer] @ gate.T).argmax(dim=1).numpy() == held_out.domains
        kinds = {"prompt": ~held_out.written, "definition": held_out.written}
        shares[str(layer)] = {kind: float(right[of].mean()) for kind, of in kinds.items() if of.any()}
    chance = float(np.bincount(held_out.domains).max() / len(held_out.domains))
    return gates, {"agreement": shares, "chance": chance, "tokens": len(held_out.domains)}


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


@torch.inference_mode()
def collect_states(system: System, entries: Sequence[Entry], layers: Sequence[int]) -> States:
    """Runs a MoE over the training rows of entries, each by its prompt's expert; those it abstains on are left out."""
    routing = system.route([(entry.term, entry.context) for entry in entries])
    assert routing is not None, "a MoE has a router"
    rows = [system.encoder.row(entry.term, entry.context, entry.definition) for entry in entries]
    caught: dict[int, Tensor] = {}
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    domains, written, owners = [], [], []

    def catch(layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        caught[layer] = output

    blocks = cast(Any, system.model).model.layers
    hooks = [blocks[i].post_attention_layernorm.register_forward_hook(partial(catch, i)) for i in layers]
    try:
        for batch in by_length([ids for ids, _ in rows], FIT_BATCH):
            batch = [i for i in batch if routing.top[i] >= 0]
            if not batch:
                continue
            ids = torch.tensor([rows[i][0] for i in batch], device=system.model.device)
            with system.routed(torch.from_numpy(routing.weights[batch]).to(ids.device)):
                cast(Any, system.model).model(ids, use_cache=False)
            for layer, found in states.items():
                found.append(caught[layer].float().cpu().flatten(0, 1))
            length = ids.shape[1]
            domains.append(np.repeat(routing.top[batch], length))
            written += [np.arange(length) >= rows[i][1] for i in batch]
            owners.append(np.repeat(batch, length))
    finally:
        for hook in hooks:
            hook.remove()
    if not domains:
        raise PackError(
            "the router abstains on every entry, so that there is nothing to fit gates on: give other --data"
        )
    layered = {layer: torch.cat(found) for layer, found in states.items()}
    return States(layered, *(np.concatenate(parts) for parts in (domains, written, owners)))
