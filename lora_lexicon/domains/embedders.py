"""The embedders beside the base: TF-IDF, sentence-transformers, any model of the Hub. Knows nothing of domains.

Nothing here runs code that a model repository ships, and nothing reads a pickle.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from lora_lexicon.data.prompt import PromptTemplate
from lora_lexicon.domains.embed import Embedder, Prompt, Report, by_length
from lora_lexicon.domains.vectors import Vectors, unit
from lora_lexicon.errors import MissingExtraError, RouterError
from lora_lexicon.folders import sha256_of
from lora_lexicon.resources import hub_answers, is_hub_name

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

    from lora_lexicon.domains.router import Router

MAX_WORDS = 8192  # of the TF-IDF vocabulary, the most frequent first
DIMENSIONS = 128  # the TF-IDF vectors' width after the truncated SVD
MAX_TOKENS = 512
_TEMPLATE = PromptTemplate()


class TfidfEmbedder:
    """TF-IDF of term and context, projected by a truncated SVD: the paper's lexical ablation.

    Attributes:
        tensors: `vocabulary` (uint8, UTF-8 words, one a line), `idf` (V,) float64, `projection` (V, d) float32.
    """

    name = "tfidf"

    def __init__(self, tensors: dict[str, NDArray[Any]]) -> None:
        self.tensors = tensors
        self._vectorizer = _vectorizer(tensors["vocabulary"].tobytes().decode().split("\n"))
        self._vectorizer.idf_ = tensors["idf"]
        self._projection = tensors["projection"]

    @classmethod
    def fit(cls, prompts: Sequence[Prompt]) -> "TfidfEmbedder":
        """Learns words, weights and projection from the training prompts (seed 42)."""
        from sklearn.decomposition import TruncatedSVD

        vectorizer = _vectorizer(None)
        try:
            counts = vectorizer.fit_transform(_texts(prompts))
        except ValueError as error:
            raise RouterError("the embedder 'tfidf' finds no word in the training prompts") from error
        words = vectorizer.get_feature_names_out()
        width = min(DIMENSIONS, len(words) - 1)
        reduced: Any = TruncatedSVD(width, random_state=42).fit(counts) if width else None
        projection = np.ones((1, 1)) if reduced is None else reduced.components_.T
        vocabulary = np.frombuffer("\n".join(words).encode(), dtype=np.uint8)
        return cls({"vocabulary": vocabulary, "idf": vectorizer.idf_, "projection": projection.astype(np.float32)})

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(key.encode() + np.ascontiguousarray(self.tensors[key]).tobytes())
        return {"kind": self.name, "sha256": digest.hexdigest()}

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None, batch_size: int = 1) -> Vectors:
        """(n, d) unit vectors; zeros for a prompt without a known word. Rows are independent at any batch size."""
        vectors = unit(np.asarray(self._vectorizer.transform(_texts(prompts)) @ self._projection))
        if progress:
            progress(len(prompts))
        return vectors


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    return [f"{context} {term}" for term, context in prompts]


def _vectorizer(vocabulary: list[str] | None) -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer

    limit = None if vocabulary else MAX_WORDS
    return TfidfVectorizer(sublinear_tf=True, max_features=limit, vocabulary=vocabulary)


class SentenceEmbedder:
    """A sentence-transformers model on the prompt's text."""

    def __init__(self, model: str, template: PromptTemplate = _TEMPLATE) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError(
                f"the embedder 'st:{model}'", "sentence-transformers", "sentence-transformers"
            ) from error
        self.name, self._template = f"st:{model}", template
        what = f"the embedder {self.name!r}"
        _check_name(what, model)
        try:
            self._model = SentenceTransformer(model, model_kwargs={"use_safetensors": True})
        except (OSError, ValueError, SafetensorError) as error:
            raise _unloadable(what, error) from error
        self._revision = _revision(model, self._model[0].auto_model.config)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "st", "revision": self._revision, "template": asdict(self._template)}

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None, batch_size: int = 1) -> Vectors:
        """(n, d) unit vectors, in the model's own pooling."""
        parts = []
        for start in range(0, len(prompts), 8 * batch_size):
            texts = [self._template.text(*prompt) for prompt in prompts[start : start + 8 * batch_size]]
            parts.append(np.asarray(self._model.encode(texts, batch_size=batch_size, show_progress_bar=False)))
            if progress:
                progress(len(texts))
        return unit(np.concatenate(parts))


class HubEmbedder:
    """Any transformers encoder or decoder on the prompt's text.

    States are pooled by the mean, or as the model's `1_Pooling/config.json` says (first or last token).
    """

    def __init__(self, model: str, template: PromptTemplate = _TEMPLATE) -> None:
        self.name, self._template = f"hf:{model}", template
        self._tokenizer, self._model, self._revision = load_encoder(model, f"the embedder {self.name!r}")
        self._pooling = _pooling(model)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "hf",
            "revision": self._revision,
            "pooling": self._pooling,
            "template": asdict(self._template),
        }

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None, batch_size: int = 1) -> Vectors:
        """(n, d) unit vectors of the last hidden states, pooled."""
        import torch

        texts = [self._template.text(*prompt) for prompt in prompts]
        rows: list[list[int]] = [self._tokenizer(t, truncation=True, max_length=MAX_TOKENS)["input_ids"] for t in texts]
        vectors: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
        for batch in by_length(rows, batch_size):
            with torch.no_grad():
                states = self._model(torch.tensor([rows[i] for i in batch])).last_hidden_state.float()
            pooled = {"mean": states.mean(dim=1), "first": states[:, 0], "last": states[:, -1]}[self._pooling]
            for i, vector in zip(batch, pooled.numpy(), strict=True):
                vectors[i] = vector
            if progress:
                progress(len(batch))
        return unit(np.stack(vectors))


def restore_embedder(router: "Router") -> Embedder:
    """The router's own embedder, for any kind but `base` (which needs the model it is part of).

    Raises:
        RouterError: it cannot be loaded, or has changed since.
    """
    kind, _, what = router.embedder_name.partition(":")
    try:
        if router.embedder_name == "tfidf":
            embedder: Embedder = TfidfEmbedder(router.embedder_tensors)
        elif kind == "st":
            embedder = SentenceEmbedder(what, router.template)
        elif kind == "hf":
            embedder = HubEmbedder(what, router.template)
        else:
            raise RouterError(f"the router's embedder {router.embedder_name!r} cannot be made without its base")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RouterError("the router's embedder is damaged: fit the domains again") from error
    router.check(embedder)
    return embedder


def load_encoder(model: str, what: str) -> tuple[Any, Any, str]:
    """Tokenizer, model (eval) and revision of a transformers model; `what` is its name in errors.

    Raises:
        RouterError: no such folder, the Hub is out of reach, or what lies there is no model in safetensors.
    """
    from transformers import AutoModel, AutoTokenizer

    _check_name(what, model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded: Any = AutoModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise _unloadable(what, error) from error
    return tokenizer, loaded, _revision(model, loaded.config)


def _revision(model: str, config: Any) -> str:
    """The commit of a Hub model, or a hash of a local folder's files."""
    if not Path(model).is_dir():
        return str(getattr(config, "_commit_hash", None))
    files = sorted(p for p in Path(model).rglob("*") if p.is_file())
    listing = "\n".join(f"{p.relative_to(model)} {sha256_of(p)}" for p in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _pooling(model: str) -> str:
    from transformers.utils.hub import cached_file

    file = cached_file(
        model,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    said = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    if said.get("pooling_mode_cls_token"):
        return "first"
    return "last" if said.get("pooling_mode_lasttoken") else "mean"


def _check_name(what: str, model: str) -> None:
    """Refuses at once a path that leads nowhere; of a Hub model, OWNER/NAME or NAME alone, the Hub is tried once."""
    if Path(model).is_dir():
        return
    if ("/" in model.rstrip("/") and not is_hub_name(model)) or model.startswith("."):
        raise RouterError(f"{what} cannot be loaded (no folder {model}): check its name")
    hub_answers()


def _unloadable(what: str, error: Exception) -> RouterError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RouterError(f"{what} cannot be loaded ({reason}): check its name")
