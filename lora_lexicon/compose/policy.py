"""Routing policies: what chooses a MoE's experts, and how often (section 4.4 and table 4 of the LM-Lexicon paper).

A policy is one string, in a MoE's config and on the command line:

domain          the router, once for a prompt, with as many experts as the router says
domain-top-K    the router, the K nearest domains, weighted
token-top-K     each layer's gate, for each token (Jiang et al., 2024, arXiv:2401.04088)
sequence-soft   each layer's gate, once for a prompt, all experts weighted (Pham et al., 2023)
sequence-hard   each layer's gate, once for a prompt, one expert
"""

import re
from dataclasses import dataclass
from typing import Literal

from lora_lexicon.errors import RecipeError

Level = Literal["domain", "token", "sequence"]
DOMAIN = "domain"
MOE_TYPE = "lexicon_moe"  # a MoE's model_type, which `compose.moe` registers with transformers
GATE = ".mlp.gate.weight"  # how the name of a gate's tensor ends
KNOWN = "domain, domain-top-K, token-top-K, sequence-soft or sequence-hard"
_PATTERN = re.compile(r"(domain|token)-top-([1-9]\d?)|domain|sequence-(?:soft|hard)")


@dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        level: what a choice is made for; at `token` and `sequence` each expert layer's own gate makes it.
        top_k: experts with weight; None leaves it to the router.
    """

    level: Level
    top_k: int | None

    @property
    def gated(self) -> bool:
        """Whether gates choose, so that the MoE needs them."""
        return self.level != DOMAIN


def parse_policy(text: str, experts: int) -> Policy:
    """The policy that a string names, for a MoE of so many domain experts.

    Raises:
        RecipeError: no such policy, or one that asks for more experts than there are.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise RecipeError(f"routing is {text!r}; it must be {KNOWN}, such as token-top-2")
    if match[1] is None:
        kept: dict[str, Policy] = {
            DOMAIN: Policy("domain", None),
            "sequence-soft": Policy("sequence", experts),
            "sequence-hard": Policy("sequence", 1),
        }
        return kept[text]
    if int(match[2]) > experts:
        raise RecipeError(f"routing is {text!r}; there are {experts} experts to choose among")
    return Policy("token" if match[1] == "token" else "domain", int(match[2]))
