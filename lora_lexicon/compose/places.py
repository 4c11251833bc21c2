"""Where a MoE's experts lie on disk, as transformers reads it. Knows nothing of who put them there.

A MoE is composed with all experts of a layer in one fused tensor. One that joins later lies beside it, in tensors of
its own, `experts.SLOT.gate_up_proj` (2I, H) and `experts.SLOT.down_proj` (H, I), so that no byte of the others moves.
Of `config.json`, `fused_experts` counts what the fused tensors hold, and `expert_slots` says for each expert, in the
order of the routing, which place is its own: below that number in the fused tensors, from there on beside them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter


class Gathered(ConversionOps):
    """A fused tensor and what lies beside it to one with all experts in their order; as it is where none joined."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """{target: (E, ...)} of the fused tensor, first of `source_patterns`, and those beside it, by rising slot."""
        config, (fused, beside) = kwargs["config"], (input_dict.pop(name, []) for name in source_patterns)
        if config.expert_slots is None:
            return {target_patterns[0]: fused}
        numbers = sorted(slot for slot in config.expert_slots if slot >= config.fused_experts)
        places: dict[int, Tensor] = dict(enumerate(fused[0])) | dict(zip(numbers, beside, strict=True))
        whole = fused[0].new_empty((len(config.expert_slots), *fused[0].shape[1:]))
        for own, slot in zip(whole, config.expert_slots, strict=True):
            own.copy_(places[slot])
        return {target_patterns[0]: whole}

    @property
    def reverse_op(self) -> ConversionOps:
        return Kept()


class Kept(ConversionOps):
    """What is saved again: all experts in one fused tensor, as they are in memory."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: input_dict[source_patterns[0]]}

    @property
    def reverse_op(self) -> ConversionOps:
        return Gathered()


def register_places(model_type: str) -> None:
    """Lets transformers read such checkpoints of this model type."""
    converters: Any = [
        WeightConverter([f"mlp.experts.{kind}", f"mlp.experts.*.{kind}"], f"mlp.experts.{kind}", [Gathered()])
        for kind in ("gate_up_proj", "down_proj")
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)
