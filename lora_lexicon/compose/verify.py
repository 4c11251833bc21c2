"""A MoE that was written, loaded and compared with each of its experts alone. Knows nothing of how it was written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from lora_lexicon.compose.moe import LexiconMoeForCausalLM
from lora_lexicon.compose.sources import BaseFiles, ExpertSource
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.router import Router
from lora_lexicon.errors import ExpertError
from lora_lexicon.experts.checkpoint import install_ffn

TERMS = 4  # probe prompts for each domain: its most typical terms
TOLERANCE = 1e-4  # of the largest logit, where nothing was rounded or averaged


@torch.inference_mode()
def verify_moe(
    folder: Path, base: BaseFiles, experts: Sequence[ExpertSource], router: Router, *, exact: bool
) -> dict[str, Any]:
    """The largest difference in logits between the MoE, routed to one expert, and that expert alone; in float32.

    Args:
        experts: those of the router's domains to compare, by their names.
        exact: nothing was rounded or averaged, so that a difference is an error.

    Returns:
        `prompts`, their number; `largest_logit`; and `differences` by expert.

    Raises:
        ExpertError: `exact`, and the two differ by more than `TOLERANCE` of the largest logit.
    """
    tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    encoder = PromptEncoder(tokenizer, router.template)
    prompts = [torch.tensor([encoder.prompt(term, "")]) for terms in router.terms for term in terms[:TERMS]]
    moe = LexiconMoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    differences, largest = {}, 0.0
    for expert in experts:
        weights = torch.zeros(1, len(router.names))
        weights[0, router.names.index(expert.name)] = 1
        alone = _alone(expert, base)
        differences[expert.name] = 0.0
        for ids in prompts:
            with moe.active.using(weights):
                ours = cast(Tensor, moe(ids).logits)
            theirs = cast(Tensor, alone(ids).logits)
            largest = max(largest, float(theirs.abs().max()))
            differences[expert.name] = max(differences[expert.name], float((ours - theirs).abs().max()))
    for name, difference in differences.items():
        if exact and not difference <= TOLERANCE * max(largest, 1.0):
            raise ExpertError(
                f"the MoE, routed to {name!r}, differs from that expert by {difference:.3g} in a logit, though nothing "
                "was rounded or averaged: a file was changed or damaged meanwhile; compose again"
            )
    return {"prompts": len(prompts), "largest_logit": largest, "differences": differences}


def _alone(expert: ExpertSource, base: BaseFiles) -> PreTrainedModel:
    """The expert as transformers and PEFT load it, in float32."""
    path = expert.path if expert.kind == "dense" else base.path
    model = cast(PreTrainedModel, LlamaForCausalLM.from_pretrained(path, dtype=torch.float32))
    if expert.kind == "ffn":
        install_ffn(model, expert.path)
    if expert.kind == "lora":
        model = cast(PreTrainedModel, PeftModel.from_pretrained(model, str(expert.path)))
    return model.eval()
