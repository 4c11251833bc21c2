"""How far one model's predictions lie from another's, token by token. Knows logits, nothing of models.

The reference's distributions over the definition tokens lie in a file, so that only one model is in memory
at a time; the others are held against it in the same order.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lora_lexicon.compose.divergence import divergence
from lora_lexicon.errors import DataError


class Reference:
    """Records a reference's log-probabilities (float32) into `file`; its methods are observers for `evaluate`.

    Use it as a context manager; the file is removed at the end.

    Attributes:
        shape: (tokens, vocabulary) of what was recorded.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shape = (0, 0)
        self._sink = file.open("wb")

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *cause: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._sink.close()
        self.file.unlink(missing_ok=True)

    def record(self, logits: Tensor) -> None:
        """Appends the distributions of (m, V) logits."""
        self._sink.write(logits.log_softmax(dim=1).cpu().numpy().data)
        self.shape = (self.shape[0] + len(logits), logits.shape[1])

    def compare(self) -> "Comparison":
        """An observer that holds another model's logits, seen in the same order, against the recorded ones."""
        self._sink.flush()
        return Comparison(np.memmap(self.file, np.float32, "r", shape=self.shape))


@dataclass
class Comparison:
    """Sums over the tokens seen so far; `recorded` is the reference's (tokens, V) log-probabilities."""

    recorded: np.ndarray
    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0

    def observe(self, logits: Tensor) -> None:
        """Takes (m, V) logits of the next m tokens.

        Raises:
            DataError: more tokens, or another vocabulary, than the reference had.
        """
        end = self.tokens + len(logits)
        if end > len(self.recorded) or logits.shape[1] != self.recorded.shape[1]:
            raise DataError(
                f"the reference predicts {self.recorded.shape[0]:,} tokens of a vocabulary of "
                f"{self.recorded.shape[1]:,}; this model cuts definitions into others: compare models of one tokenizer"
            )
        theirs = torch.from_numpy(np.array(self.recorded[self.tokens : end]))
        ours = logits.cpu().log_softmax(dim=1)
        self.divergence += divergence(theirs, ours)
        self.agreed += int((theirs.argmax(dim=1) == ours.argmax(dim=1)).sum())
        self.tokens = end

    def summary(self) -> dict[str, float]:
        """`kl`, KL(reference || model) in nats per definition token, and `agreement`, how often the most likely \
token is the same."""
        if self.tokens != len(self.recorded):
            raise DataError(f"{self.tokens:,} tokens were compared, the reference has {len(self.recorded):,}")
        return {"kl": self.divergence / self.tokens, "agreement": self.agreed / self.tokens}
