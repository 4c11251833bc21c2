"""Tables 1 and 5 of the LM-Lexicon paper for an entries folder. Holds eight bytes a row, not the text.

A token is what white space separates. Terms are compared as headwords, other text as it is.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.entry import headword
from lora_lexicon.data.store import Entries

Hashes = NDArray[np.uint64]


def statistics(entries: Entries) -> dict[str, Any]:
    """Statistics as a JSON object; a mean and deviation is `{"mean", "std"}` (population deviation).

    Returns:
        `splits` {name: `entries`, `terms`, `divergent`, `divergent_percent`}, where entries of one
        (term, context) are divergent if their definitions differ (table 5); over all splits
        `entries`, `terms`, `sources` {name: entries}, `glosses_per_term`, `tokens_per_term` (over
        terms), `tokens_per_context`, `tokens_per_gloss` (over entries that have one);
        `overlap` of train and test in percent of the test split: `term`, `term_and_gloss` (table 1).
    """
    columns = {name: _Columns(entries, name) for name in entries.splits}
    terms = np.concatenate([c.terms for c in columns.values()])
    glosses = np.concatenate([c.glosses for c in columns.values()])
    _, first = np.unique(terms, return_index=True)
    pairs = np.unique(np.stack([terms, glosses]), axis=1)
    sources: dict[str, int] = {}
    for each in columns.values():
        for source, count in each.sources.items():
            sources[source] = sources.get(source, 0) + count
    lengths = {key: np.concatenate([c.lengths[key] for c in columns.values()]) for key in ("term", "context", "gloss")}
    return {
        "entries": len(terms),
        "terms": len(first),
        "sources": dict(sorted(sources.items(), key=lambda item: -item[1])),
        "splits": {name: _split_statistics(c) for name, c in columns.items()},
        "glosses_per_term": _mean(np.unique(pairs[0], return_counts=True)[1]),
        "tokens_per_term": _mean(lengths["term"][first]),
        "tokens_per_context": _mean(lengths["context"][lengths["context"] > 0]),
        "tokens_per_gloss": _mean(lengths["gloss"]),
        "overlap": _overlap(columns),
    }


class _Columns:
    """Hashes and lengths of one split's rows."""

    def __init__(self, entries: Entries, split: str) -> None:
        terms, contexts, glosses = [], [], []
        lengths: dict[str, list[int]] = {"term": [], "context": [], "gloss": []}
        self.sources: dict[str, int] = {}
        for batch in entries.batches(split):
            terms.append(_hashes([headword(term) for term in batch["term"]]))
            contexts.append(_hashes(batch["context"]))
            glosses.append(_hashes(batch["definition"]))
            for key, column in (("term", "term"), ("context", "context"), ("gloss", "definition")):
                lengths[key] += [len(text.split()) for text in batch[column]]
            for source in batch["source"]:
                self.sources[source] = self.sources.get(source, 0) + 1
        self.terms, self.contexts, self.glosses = (np.concatenate(h) for h in (terms, contexts, glosses))
        self.lengths = {key: np.array(values, dtype=np.int32) for key, values in lengths.items()}


def _hashes(texts: list[str]) -> Hashes:
    digests = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.uint64)


def _split_statistics(split: _Columns) -> dict[str, Any]:
    divergent = int(_divergent(split.terms, split.contexts, split.glosses).sum())
    return {
        "entries": len(split.terms),
        "terms": len(np.unique(split.terms)),
        "divergent": divergent,
        "divergent_percent": 100 * divergent / len(split.terms),
    }


def _divergent(terms: Hashes, contexts: Hashes, glosses: Hashes) -> NDArray[np.bool_]:
    """Which rows (n,) share term and context with a row of another definition; an empty context is none."""
    empty = _hashes([""])[0]
    _, group = np.unique(np.stack([terms, contexts]), axis=1, return_inverse=True)
    group = group.reshape(-1)
    different = np.unique(np.stack([group.astype(np.uint64), glosses]), axis=1)[0]
    definitions = np.bincount(different.astype(np.int64))  # distinct definitions of each group
    return (definitions[group] > 1) & (contexts != empty)


def _overlap(columns: dict[str, _Columns]) -> dict[str, float] | None:
    if "train" not in columns or "test" not in columns:
        return None
    train, test = columns["train"], columns["test"]
    terms = np.unique(test.terms)
    pairs = np.unique(np.stack([test.terms, test.glosses]), axis=1).T.copy().view("u8,u8").reshape(-1)
    known = np.unique(np.stack([train.terms, train.glosses]), axis=1).T.copy().view("u8,u8").reshape(-1)
    return {
        "term": 100 * float(np.isin(terms, train.terms).mean()),
        "term_and_gloss": 100 * len(np.intersect1d(pairs, known)) / len(pairs),
    }


def _mean(values: NDArray[Any]) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())} if len(values) else {"mean": 0.0, "std": 0.0}
