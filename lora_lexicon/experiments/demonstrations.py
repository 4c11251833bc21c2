"""Which training entries a model is shown before it is asked for a definition. Knows nothing of models or prompts.

Random-ICL and Retrieval-ICL of the LM-Lexicon paper (section 4.1), the latter after Wu et al. (2023), "OpenICL".
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.data.entry import Entry, headword
from lora_lexicon.domains.embed import Embedder, Report, embed_cached
from lora_lexicon.errors import DataError

How = Literal["random", "retrieved"]
SIMILARITIES_AT_ONCE = 2**24  # float32 of them held at a time (64 MiB)


def choose(
    train: Sequence[Entry],
    tests: Sequence[Entry],
    most: int,
    how: How = "random",
    *,
    seed: int = 42,
    embedder: Embedder | None = None,
    progress: Report | None = None,
) -> list[list[Entry]]:
    """Of each test entry `most` training entries, the ones that fewer shots take first (see `shown`).

    None has the headword of the test entry, whose definition it could give away. What a test entry is shown depends on
    itself, the training entries and the seed alone: not on `most`, nor on the entries tested beside it.

    Args:
        how: `random`: in an order drawn for each test entry; `retrieved`: by the cosine of the prompts' vectors, the
            nearest first, of equally near ones the first in the split.
        embedder: makes those vectors, once for all.
        progress: is told how many more prompts are embedded.

    Raises:
        DataError: too few training entries have another headword.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, entry in enumerate(train):
        members[headword(entry.term)].append(i)
    barred = [members.get(headword(test.term), []) for test in tests]
    for test, own in zip(tests, barred, strict=True):
        if len(train) - len(own) < most:
            raise DataError(
                f"{most} shots of {test.term!r}: only {len(train) - len(own)} training entries have another headword: "
                "take fewer shots, or prepare more data"
            )
    if not (most and tests):
        return [[] for _ in tests]
    if how == "random":
        orders = (_drawn(test, len(train), own, most, seed) for test, own in zip(tests, barred, strict=True))
    else:
        if embedder is None:
            raise DataError("retrieved demonstrations need an embedder: give one, such as tfidf")
        asked, known = (
            embed_cached(embedder, [(entry.term, entry.context) for entry in entries], None, progress)
            for entries in (tests, train)
        )
        orders = _nearest(asked, known, barred, most)
    return [[train[i] for i in order] for order in orders]


def shown(chosen: Sequence[Entry], shots: int, how: How) -> list[Entry]:
    """The first of `chosen` as they stand in a prompt: of retrieved ones the most similar last, next to the question.

    So fewer shots are among more: at random, the first 2 of 4 are those of 2; retrieved, the last 2 are.
    """
    first = list(chosen[:shots])
    return first[::-1] if how == "retrieved" else first


def _drawn(test: Entry, count: int, barred: Sequence[int], most: int, seed: int) -> list[int]:
    text = f"{seed}\0{test.term}\0{test.context}"
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
    order = np.random.default_rng(int.from_bytes(digest)).permutation(count)
    return order[~np.isin(order, barred)][:most].tolist()


def _nearest(
    asked: NDArray[np.float32], known: NDArray[np.float32], barred: Sequence[Sequence[int]], most: int
) -> Iterator[list[int]]:
    """Row numbers of `known` (n, d), for each row of `asked` (m, d); both of unit length."""
    block = max(1, SIMILARITIES_AT_ONCE // len(known))
    for start in range(0, len(asked), block):
        # Rounded, so that what is as near stays so whatever a product's shape does to the last bits.
        similarities = np.round(asked[start : start + block] @ known.T, 5)
        for near, own in zip(similarities, barred[start : start + block], strict=True):
            near[own] = -np.inf
            # All that are as near as the last one are sorted, so that ties fall alike for any number of shots.
            edge = np.partition(near, len(near) - most)[len(near) - most]
            found = np.flatnonzero(near >= edge)
            yield found[np.argsort(-near[found], kind="stable")][:most].tolist()
