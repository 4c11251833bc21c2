"""Metrics that read an encoder's states: BERTScore, MoverScore, MAUVE. Knows texts, nothing of files or protocols.

`pip install 'lora-lexicon[scores]'` brings what MoverScore (POT) and MAUVE (mauve-text) need. The encoder is any
model that transformers loads from safetensors.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.embed import by_length
from lora_lexicon.domains.embedders import MAX_TOKENS, load_encoder
from lora_lexicon.errors import DataError, MissingExtraError

Pairs = Sequence[tuple[str, Sequence[str]]]  # a prediction and its references
Progress = Callable[[int], object]
ROWS_AT_ONCE = 256  # whose states are in memory
BASELINE_PAIRS = 2000
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@dataclass(frozen=True)
class Encoded:
    """A text's tokens: ids, states (t, d) of unit length, which are special, which begin a word."""

    ids: list[int]
    states: NDArray[np.float32]
    special: NDArray[np.bool_]
    begins: NDArray[np.bool_]
    mean: NDArray[np.float32]
    last: NDArray[np.float32]


class Encoder:
    """A transformers model by folder or name, read at one layer.

    Args:
        layer: whose states are read, from 0 (the embeddings); the last one unless given.
        baseline: a file of bert-score's (`LAYER,P,R,F`), for this model, that rescaled BERTScore takes its baseline
            from; else it is measured (see `bertscore_baseline`).

    Raises:
        RouterError: it cannot be loaded.
        DataError: it has no such layer, or the baseline none.
    """

    def __init__(self, name: str, layer: int | None = None, baseline: Path | None = None) -> None:
        self.tokenizer, self.model, revision = load_encoder(name, f"the encoder {name!r}")
        layers = int(self.model.config.num_hidden_layers)
        self.layer = layers if layer is None else layer
        if not 0 <= self.layer <= layers:
            raise DataError(f"the encoder {name!r} has layers 0 to {layers}, none of number {self.layer}")
        self.baseline = None if baseline is None else _baseline_of(baseline, self.layer)
        # A prefix that bert-score writes too: a word at the beginning is the token it is elsewhere.
        self._prefix = " " if type(self.tokenizer).__name__.startswith(("Roberta", "GPT2")) else ""
        self.signature = f"{Path(name).name}@{revision[:12]}|layer:{self.layer}|transformers-{version('transformers')}"

    @cached_property
    def is_causal(self) -> bool:
        """A decoder: a text's state is its last token's."""
        return self.tokenizer.cls_token_id is None

    def tokens(self, text: str) -> Any:
        """The tokenizer's answer for one text."""
        return self.tokenizer(
            self._prefix + text.strip(), truncation=True, max_length=MAX_TOKENS, return_special_tokens_mask=True
        )

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> dict[str, Encoded]:
        """Each distinct text's tokens and states; batches are of one length, so no text depends on another."""
        import torch

        texts = list(dict.fromkeys(texts))
        answers = [self.tokens(text) for text in texts]
        width = int(self.model.config.hidden_size)
        found = [np.zeros((0, width), np.float32)] * len(texts)  # of a text without a token
        filled = [i for i, answer in enumerate(answers) if answer["input_ids"]]
        for batch in by_length([answers[i]["input_ids"] for i in filled], batch_size):
            numbers = [filled[j] for j in batch]
            ids = torch.tensor([answers[i]["input_ids"] for i in numbers])
            with torch.no_grad():
                states = self.model(ids, output_hidden_states=True).hidden_states[self.layer].float().numpy()
            for i, own in zip(numbers, states, strict=True):
                found[i] = own
        return {text: _encoded(*both) for text, both in zip(texts, zip(answers, found, strict=True), strict=True)}

    def parts(self, pairs: Pairs, progress: Progress | None) -> Iterator[tuple[str, Sequence[str], dict[str, Encoded]]]:
        """Each pair with the states of its texts."""
        for start in range(0, len(pairs), ROWS_AT_ONCE):
            part = pairs[start : start + ROWS_AT_ONCE]
            known = self.encode([text for prediction, references in part for text in (prediction, *references)])
            for prediction, references in part:
                yield prediction, references, known
            if progress:
                progress(len(part))


def bertscore(encoder: Encoder, pairs: Pairs, progress: Progress | None = None) -> NDArray[np.float64]:
    """(n,) BERTScore's F1 (Zhang et al., 2020, section 3) times 100, without idf, of the best reference.

    As the package bert-score computes it: special tokens can be matched, but are not counted; a text without a token
    scores 0.
    """
    found = [
        max(_greedy(known[prediction], known[reference]) for reference in references)
        for prediction, references, known in encoder.parts(pairs, progress)
    ]
    return 100 * np.array(found)


def bertscore_baseline(encoder: Encoder, pairs: Pairs) -> float:
    """What unrelated definitions score: the mean F1, from 0 to 1, of references held against other rows' references.

    It depends on the references alone, so that systems scored against the same ones are rescaled alike. Up to 2,000
    pairs of distinct texts, drawn with seed 42; the encoder's own file of a baseline goes before.

    Raises:
        DataError: all references are one text.
    """
    if encoder.baseline is not None:
        return encoder.baseline
    texts = sorted({reference for _, references in pairs for reference in references})
    if len(texts) < 2:
        raise DataError("bertscore-rescaled needs unrelated definitions: all references are one text")
    order = np.random.default_rng(42).permutation(len(texts))[:BASELINE_PAIRS]
    shuffled = [(texts[i], [texts[j]]) for i, j in zip(order, np.roll(order, 1), strict=True)]
    return float(bertscore(encoder, shuffled).mean()) / 100


def moverscore(encoder: Encoder, pairs: Pairs, progress: Progress | None = None) -> NDArray[np.float64]:
    """(n,) MoverScore (Zhao et al., 2019, "MoverScore: text generation evaluating with contextualized embeddings and \
earth mover distance"), unigrams, as its authors' `moverscore_v2.py`, times 100; of the best reference.

    1 minus the earth mover's distance between the words' unit states, weighted by idf: of the predictions' tokens among
    the predictions, of the references' among the references. Continuing pieces of a word and punctuation weigh
    nothing. Where all that is left of a text weighs nothing, its tokens weigh the same; where nothing is left, the row
    scores 0.
    """
    try:
        import ot
    except ImportError as error:
        raise MissingExtraError("the metric 'moverscore'", "pot", "scores") from error

    of_predictions = _idf(encoder, [prediction for prediction, _ in pairs])
    of_references = _idf(encoder, [reference for _, references in pairs for reference in references])
    punctuation = set(encoder.tokenizer.convert_tokens_to_ids(sorted(_PUNCTUATION)))

    def score(a: Encoded, b: Encoded) -> float:
        mass = (_mass(a, of_predictions, punctuation), _mass(b, of_references, punctuation))
        if not (mass[0].any() and mass[1].any()):
            return 0.0
        kept = (mass[0] > 0, mass[1] > 0)
        x, y = _unit(a.states[kept[0]]), _unit(b.states[kept[1]])
        # Not by the cosine, of which the rounding near 1 is a distance of 1e-4.
        distances = np.linalg.norm(x[:, None] - y[None], axis=2)
        distance: Any = ot.emd2(mass[0][kept[0]], mass[1][kept[1]], distances)
        return 1 - float(distance)

    found = [
        max(score(known[prediction], known[reference]) for reference in references)
        for prediction, references, known in encoder.parts(pairs, progress)
    ]
    return 100 * np.array(found)


def mauve(encoder: Encoder, pairs: Pairs) -> float:
    """MAUVE (Pillutla et al., 2021) times 100, of all predictions against all distinct references, by mauve-text.

    A text is its last token's state for a decoder (the paper's GPT-2), the mean of its states for an encoder; the
    quantisation is drawn with seed 25, mauve-text's own.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise MissingExtraError("the metric 'mauve'", "mauve-text", "scores") from error

    predictions = [prediction for prediction, _ in pairs]
    references = list(dict.fromkeys(r for _, references in pairs for r in references))
    features = []
    for texts in (references, predictions):
        parts = []
        for start in range(0, len(texts), ROWS_AT_ONCE):
            part = texts[start : start + ROWS_AT_ONCE]
            known = encoder.encode(part)
            parts += [known[text].last if encoder.is_causal else known[text].mean for text in part]
        features.append(np.stack(parts))
    return 100 * float(compute_mauve(p_features=features[0], q_features=features[1], seed=25, verbose=False).mauve)


def signature(metric: str, encoder: Encoder) -> str:
    """Says the encoder with its revision and layer, and what was done with its states."""
    if metric == "mauve":
        features = "last-token" if encoder.is_causal else "mean"
        made = f"features:{features}|buckets:n/10|scale:5|seed:25|agg:corpus|0-100|mauve-text-{version('mauve-text')}"
        return f"mauve|{encoder.signature}|{made}"
    if metric == "moverscore":
        made = "unigram|idf:of-this-file|subwords:first|punct:no|refs:best|agg:mean|at most 100"
        return f"moverscore-2|{encoder.signature}|{made}|pot-{version('pot')}|v1"
    rescaled = ""
    if metric == "bertscore-rescaled":
        rescaled = "rescaled:" + ("other-references" if encoder.baseline is None else f"{encoder.baseline:.6f}") + "|"
    return f"bertscore-f1|{encoder.signature}|idf:no|{rescaled}refs:best|agg:mean|at most 100|v1"


def _encoded(answer: Any, states: NDArray[np.float32]) -> Encoded:
    """Of one text, from the tokenizer's answer and (t, d) states."""
    ids = list(answer["input_ids"])
    special = np.array(answer["special_tokens_mask"], dtype=bool)
    word_ids = answer.word_ids() if getattr(answer, "is_fast", False) else list(range(len(ids)))
    begins = np.array([i == 0 or word_ids[i] != word_ids[i - 1] for i in range(len(ids))], dtype=bool)
    length = np.linalg.norm(states, axis=1, keepdims=True)
    width = states.shape[1]
    return Encoded(
        ids=ids,
        states=states / np.maximum(length, 1e-30),
        special=special,
        begins=begins & ~special,
        mean=states.mean(axis=0) if len(ids) else np.zeros(width, np.float32),
        last=states[-1] if len(ids) else np.zeros(width, np.float32),
    )


def _unit(states: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = states.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)


def _greedy(a: Encoded, b: Encoded) -> float:
    """F1 of greedy matching by cosine."""
    if a.special.all() or b.special.all():
        return 0.0
    cosine = a.states @ b.states.T
    precision = float(cosine.max(axis=1)[~a.special].mean())
    recall = float(cosine.max(axis=0)[~b.special].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _idf(encoder: Encoder, texts: Sequence[str]) -> dict[int, float]:
    """log((n + 1) / (c + 1)) of a token that c of n texts hold."""
    counts = Counter(token for text in texts for token in set(encoder.tokens(text)["input_ids"]))
    return {token: math.log((len(texts) + 1) / (count + 1)) for token, count in counts.items()}


def _mass(text: Encoded, idf: dict[int, float], punctuation: set[int]) -> NDArray[np.float64]:
    """(t,) what each token weighs, summing to 1, or to 0 where none is left."""
    kept = text.begins & np.array([token not in punctuation for token in text.ids], dtype=bool)
    weights = np.where(kept, [idf[token] for token in text.ids], 0.0)
    weights = weights if weights.any() else kept.astype(np.float64)
    return weights / weights.sum() if weights.any() else weights


def _baseline_of(path: Path, layer: int) -> float:
    """F of one layer in a file of bert-score's."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [line.split(",") for line in lines[1:] if line.strip()]
        found = {int(row[0]): float(row[3]) for row in rows}[layer]
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a baseline of bert-score ({error}): a line LAYER,P,R,F, and one a layer"
        ) from error
    except KeyError as error:
        raise DataError(f"{path} has no baseline of layer {layer}") from error
    if not found < 1:
        raise DataError(f"{path}: the baseline of layer {layer} is {found}, which is not below 1")
    return found
