"""The outcome reward model: how good a definition is for a prompt, as one number. Knows nothing of its training.

The shared base with a LoRA adapter and a linear head, which reads the last layer's state at the definition's EOS
(appendix A of the LM-Lexicon paper, after Cobbe et al., 2021, arXiv:2110.14168).

NAME/reward.json                                          the record: base, template, recipe, accuracy
NAME/adapter_config.json, adapter_model.safetensors       plain PEFT
NAME/head.safetensors                                     head.weight (1, H) float32
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.base import Quantize, load_base
from lora_lexicon.experts.checkpoint import load_adapter
from lora_lexicon.experts.lora import LoadedAdapter, Owners, adapters_in_training, check_fit
from lora_lexicon.experts.shape import shape_of
from lora_lexicon.folders import read_record
from lora_lexicon.inference.engine import Prompt
from lora_lexicon.inference.rerank import Rate

if TYPE_CHECKING:
    from lora_lexicon.compose.system import System

REWARD, HEAD = "reward.json", "head.safetensors"
HEAD_KEY = "head.weight"
Judged = tuple[str, str, str]  # term, context, definition


class Scorer(nn.Module):
    """A Llama whose head (H,) gives one number for each row."""

    def __init__(self, llama: PreTrainedModel, head: Tensor) -> None:
        super().__init__()
        self.llama, self.head = llama, nn.Parameter(head)

    def forward(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """(B,) float32 rewards of rows (B, T), padded on the right, whose last tokens stand at `last` (B,)."""
        states = cast(Any, self.llama).get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        own = states[torch.arange(len(last), device=last.device), last]
        return (own.float() * self.head).sum(dim=1)


def preference_loss(rewards: Tensor, gold: Tensor, sampled: Tensor) -> Tensor:
    """The mean of -log sigmoid(r(x, y_w) - r(x, y_l)) over pairs (equation 3 of the LM-Lexicon paper).

    Args:
        rewards: (B,) of rows.
        gold, sampled: (P,) the rows of each pair: the preferred one, y_w, and the other, y_l.
    """
    return -nn.functional.logsigmoid(rewards[gold] - rewards[sampled]).mean()


def side_by_side(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, (B, T), and where their last tokens stand, (B,)."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    return ids, torch.tensor([len(row) - 1 for row in rows])


@dataclass(frozen=True)
class Reward:
    """A reward model in memory.

    Attributes:
        model: the base; others may use it between two calls of `rate`.
        record: what `reward.json` says.
    """

    model: PreTrainedModel
    adapter: LoadedAdapter
    head: Tensor
    encoder: PromptEncoder
    record: dict[str, Any]

    @torch.inference_mode()
    def rate(self, judged: Sequence[Judged], batch_size: int = 64) -> list[float]:
        """A number for each definition, comparable among those of one prompt; higher is better."""
        rows = [self.encoder.row(*one).ids for one in judged]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [0.0] * len(rows)
        owners, embeddings = Owners(), cast(Any, self.model.get_input_embeddings())
        device, dtype = embeddings.weight.device, embeddings.weight.dtype
        lower = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with adapters_in_training(self.model, [self.adapter.factors], owners, 0.0), owners.of(0), lower:
            scorer = Scorer(self.model, self.head.to(device))
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids, last = side_by_side([rows[i] for i in batch], pad=0)
                for i, reward in zip(batch, scorer(ids.to(device), last.to(device)).tolist(), strict=True):
                    found[i] = reward
        return found

    def of(self, prompts: Sequence[Prompt]) -> Rate:
        """What `rerank.best_of` rates candidates of these prompts by."""
        return lambda pairs: self.rate([(*prompts[i], text) for i, text in pairs])


def save_head(head: Tensor, folder: Path) -> None:
    """Writes the head (H,)."""
    save_file({HEAD_KEY: head.detach().float().cpu()[None].contiguous()}, folder / HEAD)


def load_reward(
    folder: Path,
    system: "System | None" = None,
    *,
    base: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    quantize: Quantize = "none",
) -> Reward:
    """Loads a reward model.

    Args:
        system: whose base it shares, where that is there as it was: in a pack, or in a base itself.
        base: in place of the one that the record names, where none is shared.

    Raises:
        ExpertError: no reward model, a damaged file, or another base than the one it was trained on.
    """
    record = read_reward(folder)
    adapter, head = load_adapter(folder, "reward"), _head(folder)
    if system is not None and system.kind in ("mixture", "base"):
        model, tokenizer, found, name = system.model, system.tokenizer, system.base_fingerprint, system.base
    else:
        loaded = load_base(base or record["base"], dtype=dtype, device=device, quantize=quantize)
        model, tokenizer, found, name = loaded.model, loaded.tokenizer, loaded.fingerprint, loaded.name
    if found != record["base_fingerprint"]:
        raise ExpertError(
            f"reward model {folder} was trained on base {record['base']!r} ({record['base_fingerprint'][:12]}), "
            f"not on {name!r} ({found[:12]}): give the base it was trained on"
        )
    shape = shape_of(model.config.to_dict(), name)
    check_fit(shape.linear, adapter)
    if len(head) != model.config.hidden_size:
        raise ExpertError(f"{folder / HEAD}: the head reads {len(head)} numbers, the base's states have "
                          f"{model.config.hidden_size}: train the reward model again")  # fmt: skip
    encoder = PromptEncoder(tokenizer, PromptTemplate(**record["template"]), record["max_length"])
    return Reward(model, adapter, head, encoder, record)


def read_reward(folder: Path) -> dict[str, Any]:
    """Reads and checks `reward.json`; ExpertError where it is none."""
    record = read_record(folder / REWARD, ExpertError, "a reward model")
    kinds = {"base": str, "base_fingerprint": str, "template": dict, "max_length": int}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise ExpertError(f"{folder / REWARD}: {key} is {record.get(key)!r}; it must be of type {kind.__name__}")
    if set(record["template"]) != {"with_context", "without_context"}:
        raise ExpertError(f"{folder / REWARD}: template is damaged: train the reward model again")
    return record


def _head(folder: Path) -> Tensor:
    """(H,) float32."""
    file = folder / HEAD
    if not file.is_file():
        raise ExpertError(f"{folder} lacks {HEAD}: train the reward model again")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ExpertError(f"{file} is damaged ({error}): copy it or train the reward model again") from error
    head = tensors.get(HEAD_KEY)
    if len(tensors) != 1 or head is None or head.ndim != 2 or len(head) != 1 or not bool(torch.isfinite(head).all()):
        raise ExpertError(f"{file} must hold {HEAD_KEY} (1, H), of finite numbers: train the reward model again")
    return cast(Tensor, head[0].float())
