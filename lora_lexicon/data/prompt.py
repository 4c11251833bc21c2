"""The prompt template, its tokens, and the loss mask. The only place that knows how a prompt looks.

A training row is `BOS prompt EOS definition EOS`, as in section 3.2 of the LM-Lexicon paper (after
Giulianelli et al., 2023). The router and the experts read the prompt alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lora_lexicon.data.terms import find_term

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' loss leaves out


@dataclass(frozen=True)
class PromptTemplate:
    """Two format strings; `without_context` serves entries whose context is empty."""

    with_context: str = '"{context}" What is the definition of "{term}"?'
    without_context: str = 'What is the definition of "{term}"?'

    def text(self, term: str, context: str = "") -> str:
        """The prompt as text, without special tokens."""
        if context:
            return self.with_context.format(context=context, term=term)
        return self.without_context.format(term=term)


class EncodedRow(NamedTuple):
    """An entry's tokens, `BOS prompt EOS definition EOS`.

    Attributes:
        prompt_length: how many of them are the prompt's.
        cut: whether it was longer than the limit and is not whole.
    """

    ids: list[int]
    prompt_length: int
    cut: bool


@dataclass(frozen=True)
class PromptEncoder:
    """Turns entries into token ids with one tokenizer, one template and one limit.

    Args:
        tokenizer: the base's tokenizer; BOS is left out where it has none.
        template: the prompt's wording.
        max_length: the longest row in tokens, prompt and definition together (128 in the paper).
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: PromptTemplate = PromptTemplate()
    max_length: int = 128

    def prompt(self, term: str, context: str = "") -> list[int]:
        """Token ids of `BOS prompt EOS`, at most three quarters of `max_length`.

        A context too long for that is cut to the words around the term.
        """
        return self._cut(self._prompt(term, context), term, context)

    def _cut(self, ids: list[int], term: str, context: str) -> list[int]:
        """The whole prompt's ids, or fewer where they are too many."""
        limit = self.max_length * 3 // 4
        while len(ids) > limit and context:
            # Words to keep shrink in proportion, so this ends after a few rounds.
            words = int(len(context.split()) * limit / len(ids) * 0.95)
            context = window(context, term, words) if words > 0 else ""
            ids = self._prompt(term, context)
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

    def _prompt(self, term: str, context: str) -> list[int]:
        ids = self.tokenizer.encode(self.template.text(term, context), add_special_tokens=False)
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [*bos, *ids, self.tokenizer.eos_token_id]  # type: ignore[list-item]

    def row(self, term: str, context: str, definition: str) -> EncodedRow:
        """The prompt and its definition, at most `max_length` tokens."""
        whole = self._prompt(term, context)
        prompt = self._cut(whole, term, context)
        body = self.tokenizer.encode(definition, add_special_tokens=False)
        room = self.max_length - len(prompt) - 1
        ids = [*prompt, *body[:room], self.tokenizer.eos_token_id]
        return EncodedRow(ids, len(prompt), len(prompt) < len(whole) or room < len(body))  # type: ignore[arg-type]


def window(context: str, term: str, words: int) -> str:
    """At most `words` words of `context`, around the first place of `term` (else from the start)."""
    tokens = context.split()
    place = find_term(context, term)
    at = len(context[: place[0]].split()) if place else 0
    start = min(max(at - words // 2, 0), max(len(tokens) - words, 0))
    return " ".join(tokens[start : start + words])


def pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills a batch; the attention mask hides it, so EOS serves where there is no pad token."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad, int)
    return pad


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, "torch.Tensor"]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each (B, T) int64.

    A row holds `input_ids` and `prompt_length`; labels are the definition's tokens and its EOS,
    `IGNORED` on the prompt and on padding.
    """
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        n, start = len(row["input_ids"]), int(row["prompt_length"])  # type: ignore[arg-type]
        ids[i, :n] = torch.tensor(row["input_ids"])
        mask[i, :n] = 1
        labels[i, start:n] = ids[i, start:n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
