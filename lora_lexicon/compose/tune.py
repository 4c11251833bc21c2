"""The last stage of the LM-Lexicon paper (sections 3.3 and 4.1): a merged MoE's choices, trained on all domains.

Knows a MoE's folder and the training loop. What may be trained is what chooses (the gates of token and sequence
policies, the temperature of a weighted domain policy), or that and the experts' FFNs; all else stays as it was merged.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lora_lexicon.compose.collapse import PLACES, MoeFiles
from lora_lexicon.compose.gates import fit_gates
from lora_lexicon.compose.merge import MOE_RECORD, SPARE_BYTES, check_written, copy_companions, moe_card
from lora_lexicon.compose.moe import LexiconMoeForCausalLM, settled
from lora_lexicon.compose.policy import DOMAIN, GATE, Policy, parse_policy
from lora_lexicon.compose.system import System, load_moe
from lora_lexicon.data.entry import Entry
from lora_lexicon.data.prompt import pad_token_id
from lora_lexicon.data.store import load_entries
from lora_lexicon.domains.embed import FIT_BATCH
from lora_lexicon.domains.router import Router, load_router
from lora_lexicon.errors import DivergedError, PackError, RecipeError
from lora_lexicon.experts.base import contents_hash
from lora_lexicon.experts.loop import (
    Progress,
    Run,
    TokenRow,
    check_finite,
    check_loop,
    collate_for_loss,
    encode,
    trained,
)
from lora_lexicon.experts.state import last_checkpoint, state_folder
from lora_lexicon.experts.tensors import TensorPlan, torch_dtype, whole, write_checkpoint
from lora_lexicon.folders import new_folder, read_record, sha256_of, write_record
from lora_lexicon.recipe import RouterRecipe

ROUTER_FILES = ("router.json", "router.safetensors")
TEMPERATURE = "log_temperature"  # the name of the parameter that is its logarithm
EXPERTS = ".mlp.experts."


class RoutedRow(TokenRow):
    """One encoded entry, with the cosines of its prompt to the N centroids; [] where gates choose."""

    similarities: list[float]


def train_router(
    moe: Path,
    data: Path,
    out: Path,
    recipe: RouterRecipe,
    *,
    routing: str | None = None,
    measure: Callable[[System], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains how a MoE chooses its experts, and writes it as a new MoE; returns the record.

    One that is already there from the same call is kept; a run that was stopped goes on.

    Args:
        data: an entries folder, whose train entries are trained on.
        routing: the policy to train for; by default the MoE's own. Gates that the MoE lacks begin as `fit_gates`
            makes them.
        measure: called before and after training, with the MoE in memory (a loss on validation entries, say).
        progress: called with (rows done, rows in all).

    Raises:
        LexiconError: a recipe that does not fit the policy, no MoE, no entries, a full disk, or training diverged.
    """
    files, router = MoeFiles.open(moe), load_router(moe)
    policy = files.policy if routing is None else parse_policy(routing, len(files.domains))
    routing = routing or str(files.config.get("routing", DOMAIN))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_loop(recipe, torch.device(device))
    _check(recipe, routing, policy, (policy.top_k or router.top_k) > 1, bool(files.config.get("keep_base")))
    if moe.resolve() in out.resolve().parents:
        raise RecipeError(f"{out} lies in {moe}, which must stay as it is: choose another --out")
    entries = load_entries(data)
    read = [contents_hash(files.weights), *(sha256_of(moe / file) for file in ROUTER_FILES), entries.fingerprint]
    settings = [read, asdict(recipe), routing]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    record = read_record(moe / MOE_RECORD, PackError, "a MoE made by `compose moe`")
    if (out / MOE_RECORD).is_file():
        there = read_record(out / MOE_RECORD, PackError, "a MoE")
        if (there.get("router_training") or {}).get("key") == key:
            return there
    needs = sum(ref.bytes for ref in files.weights.tensors.values()) + SPARE_BYTES
    with new_folder(out, replace=overwrite, needs=needs) as folder, state_folder(out, key, recipe, overwrite) as state:
        gates, agreement = {}, record.get("gates")
        if policy.gated and files.policy.level != policy.level:
            gates, agreement = fit_gates(moe, files.layers, files.domains, data, policy.level)
        system = load_moe(moe, dtype=recipe.dtype, device=device, routing=routing, gates=gates, kernel="eager")
        system.encoder = replace(system.encoder, max_length=recipe.max_length)
        model = cast(LexiconMoeForCausalLM, system.model)
        _thaw(model, recipe, policy)
        before = _measured(system, measure, recipe)
        set_seed(recipe.seed)
        run = _Run(system, _rows(system, entries.split("train")), recipe, state, Progress(progress))
        run.train(resume_from_checkpoint=last_checkpoint(state))
        run.close()
        check_finite(out.name, trained(model))
        _set_temperature(system)
        after = _measured(system, measure, recipe)
        temperature = cast(Router, system.router).temperature
        if not all(math.isfinite(x) for x in (*(loss for _, loss in run.losses), after or 0, temperature)):
            raise DivergedError(f"training of {out.name!r} diverged: lower its learning_rate")
        changed = trained(model)
        record = {
            **record,
            "routing": routing,
            "gates": agreement,
            "verified": None,
            "trained_parameters": int(record.get("trained_parameters", 0)) + _added(changed),
            "router_training": {
                "key": key,
                "trained": recipe.train,
                "parameters": sum(parameter.numel() for parameter in changed.values()),
                "temperature": temperature,
                "entries": entries.fingerprint,
                "rows": len(run.order),
                "losses": run.losses,
                "before": before,
                "after": after,
                "recipe": asdict(recipe),
            },
        }
        config = {key: value for key, value in files.config.items() if key not in PLACES}
        _write(folder, out.name, files, changed, {**config, "routing": routing}, record)
        cast(Router, system.router).save(folder)
        copy_companions(moe, folder)
    shutil.rmtree(state)
    return record


class _Run(Run):
    """The shared loop, with the routing of each batch set from outside where a router makes it."""

    def __init__(
        self, system: System, rows: Sequence[RoutedRow], recipe: RouterRecipe, state: Path, watch: Progress
    ) -> None:
        self.moe, self.recipe = cast(LexiconMoeForCausalLM, system.model), recipe
        self.router = cast(Router, system.router)
        self._open = ExitStack()
        super().__init__(self.moe, rows, recipe, state, watch, partial(_collate, pad=pad_token_id(system.tokenizer)))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The definitions' loss and, for token gates, that of their balance.

        The routing stays set until the next batch: recomputation, in the backward pass, needs it again.
        """
        self.close()
        similarities, real = inputs.pop("similarities"), inputs.pop("real")
        if similarities.shape[1]:
            self._open.enter_context(self.moe.active.using(self._weights(similarities)))
        elif self.moe.policy.level == "sequence":
            self._open.enter_context(self.moe.active.choosing_by(self.moe.prompts_of(inputs["input_ids"])))
        gates = self._open.enter_context(self.moe.active.recording())
        loss = cast(Tensor, super().compute_loss(model, inputs, *args, **kwargs))
        if self.moe.policy.level == "token" and self.recipe.balance:
            logits = cast(Any, tuple(gate.flatten(0, 1) for gate in gates))
            count, k = len(self.moe.experts), cast(int, self.moe.policy.top_k)
            balance = cast(Tensor, load_balancing_loss_func(logits, count, k, real))
            loss = loss + self.recipe.balance / self.recipe.gradient_accumulation * balance
        return loss

    def close(self) -> None:
        """Takes the last batch's routing back."""
        self._open.close()

    def _weights(self, similarities: Tensor) -> Tensor:
        """(B, N) the router's weights, as a function of the temperature where that is trained."""
        best, index = similarities.topk(self.router.top_k, dim=1)
        log_temperature = getattr(self.moe, TEMPERATURE, None)
        temperature = self.router.temperature if log_temperature is None else log_temperature.exp()
        return torch.zeros_like(similarities).scatter(1, index, (best / temperature).softmax(dim=1))


def _check(recipe: RouterRecipe, routing: str, policy: Policy, weighted: bool, keep_base: bool) -> None:
    if recipe.balance < 0:
        raise RecipeError(f"balance is {recipe.balance}; it must not be negative")
    if recipe.train == "gates" and not policy.gated:
        raise RecipeError(
            f"routing {routing!r} has no gates to train: choose another --routing (token-top-2, say), or --train "
            "temperature (with domain-top-2), or --train experts"
        )
    if recipe.train == "temperature" and (policy.gated or not weighted):
        raise RecipeError(f"routing {routing!r} weighs no experts by a temperature: use --routing domain-top-2")
    if recipe.train == "experts" and keep_base:
        raise RecipeError("this MoE keeps the base's FFN as one of its experts, which must stay as it is: no experts")


def _thaw(model: LexiconMoeForCausalLM, recipe: RouterRecipe, policy: Policy) -> None:
    """Lets what the recipe names be trained, and nothing else; in float32, or AdamW's small steps would be lost."""
    model.requires_grad_(False)
    router = cast(Router, model.router)
    if not policy.gated and router.top_k > 1:
        value = torch.tensor(math.log(router.temperature), dtype=torch.float32, device=model.device)
        model.register_parameter(TEMPERATURE, nn.Parameter(value))
    for name, parameter in model.named_parameters():
        chooses = name.endswith(GATE) or name == TEMPERATURE
        if chooses or (recipe.train == "experts" and EXPERTS in name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _rows(system: System, entries: Sequence[Entry]) -> list[RoutedRow]:
    """The entries encoded; those on which a router abstains to the base, which no expert serves, are left out."""
    encoded = [encode(system.encoder, entry) for entry in entries]
    if system.routing_level != DOMAIN:
        return [{**row, "similarities": []} for row in encoded]
    vectors = system.embed([(entry.term, entry.context) for entry in entries], FIT_BATCH)
    assert vectors is not None
    assert system.router is not None
    routing = settled(system.router.route(vectors), cast(LexiconMoeForCausalLM, system.model).active.keep_base)
    return [
        {**row, "similarities": routing.similarities[i].tolist()}
        for i, row in enumerate(encoded)
        if routing.weights[i].any()
    ]


def _collate(rows: list[Any], pad: int) -> dict[str, Tensor]:
    """`collate_for_loss` of routed rows, the cosines (B, N), and which of the (B, T) tokens are no padding."""
    batch = collate_for_loss(rows, pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    real = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return {**batch, "similarities": torch.tensor([row["similarities"] for row in rows]), "real": real}


def _measured(system: System, measure: Callable[[System], float] | None, recipe: RouterRecipe) -> float | None:
    """What `measure` says of the MoE in memory, where what is trained is float32 and the rest may not be."""
    if measure is None:
        return None
    system.model.eval()
    with torch.autocast(system.model.device.type, torch_dtype(recipe.dtype), enabled=recipe.dtype != "float32"):
        return measure(system)


def _set_temperature(system: System) -> None:
    """Gives the router the temperature that was trained."""
    model = cast(LexiconMoeForCausalLM, system.model)
    logarithm = getattr(model, TEMPERATURE, None)
    if logarithm is not None:
        temperature = float(logarithm.detach().exp())
        system.router = model.router = replace(cast(Router, model.router), temperature=temperature)


def _added(changed: dict[str, nn.Parameter]) -> int:
    """Parameters that the experts' training did not count."""
    return sum(parameter.numel() for name, parameter in changed.items() if EXPERTS not in name)


def _write(
    folder: Path,
    name: str,
    files: MoeFiles,
    changed: dict[str, nn.Parameter],
    config: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """The MoE's files again, with the parameters that were trained in the place of theirs."""
    dtype = str(record["dtype"])
    new = {key: parameter.detach().to(torch_dtype(dtype)) for key, parameter in changed.items() if key != TEMPERATURE}
    plans = [
        replace(plan, pieces=[partial(whole, new[plan.name])]) if plan.name in new else plan for plan in files.plans()
    ]
    added = [key for key in new if key not in files.weights.tensors]
    plans += [TensorPlan(key, tuple(new[key].shape), dtype, [partial(whole, new[key])]) for key in added]
    write_checkpoint(folder, plans)
    check_written(folder, plans)
    write_record(folder / "config.json", config)
    write_record(folder / MOE_RECORD, record)
    (folder / "README.md").write_text(moe_card(name, record), encoding="utf-8")
