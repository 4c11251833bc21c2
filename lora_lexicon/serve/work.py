"""One definition to write, and what is told of it while it is written. Knows nothing of HTTP or of batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lora_lexicon.compose.system import System
from lora_lexicon.inference.batch import Row
from lora_lexicon.inference.engine import Definition
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.serve.problems import Problem

AUTO, BASE = "auto", "base"
RESERVED = (AUTO, BASE, "mixed")


@dataclass(frozen=True)
class Started:
    """Work is in the batch, routed."""

    domain: str
    similarity: float | None
    margin: float | None


@dataclass(frozen=True)
class Token:
    """Text to append, or with `replace` to put in place of all before."""

    text: str
    replace: bool = False


@dataclass(frozen=True)
class Ended:
    """Work is done.

    Attributes:
        whole: the definition ended by itself, and not at its limit.
        cut: the prompt was longer than the model reads.
    """

    definition: Definition
    prompt_tokens: int
    whole: bool
    cut: bool


Event = Started | Token | Ended | Problem


@dataclass(eq=False)
class Work:
    """One definition to write, or one text to continue.

    Attributes:
        term: or the text, which is not routed.
        domain: `auto`, `base` or a domain's name.
        ids: the text's tokens; None of a definition.
        sample: which sample of the same request it is.
        streamed: its text is told as it comes.
        tell: is called on the scheduler's thread; `Ended` or a `Problem` comes last.
        deadline: of `time.monotonic`.
        passed: how many others, that came later, were begun while it waited for room for its experts.
    """

    term: str
    context: str
    domain: str
    decoding: Decoding
    tell: Callable[[Event], object]
    sample: int = 0
    streamed: bool = False
    ids: list[int] | None = None
    deadline: float = math.inf
    cancelled: bool = False
    row: Row | None = field(default=None, init=False)
    cut: bool = field(default=False, init=False)
    told: str = field(default="", init=False)
    passed: int = field(default=0, init=False)


def check_domain(system: System, name: str) -> None:
    """Raises a Problem unless requests may name the domain."""
    if name in (AUTO, *system.experts) or (name == BASE and answers_as_base(system)):
        if name in (AUTO, BASE) or system.routing_level != "token":
            return
        raise Problem(409, "not_routed", f"{system.name!r} chooses experts for each token: leave out the domain")
    known = ", ".join([AUTO, *([BASE] if answers_as_base(system) else []), *system.experts])
    raise Problem(404, "unknown_domain", f"no domain {name!r}: use one of {known}")


def answers_as_base(system: System) -> bool:
    """Whether a request may ask for the base alone."""
    return system.kind in ("mixture", "base") or getattr(system.active, "keep_base", False)
