"""Which texts share nearly all their words with a given one: an exact join, over an inverted index. Knows only sets.

The similarity of two texts is Jaccard's, of the sets of their words. Prefix filtering (Chaudhuri, Ganti and Kaushik,
2006, "A primitive operator for similarity joins in data cleaning"; Bayardo, Ma and Srikant, 2007, "Scaling up all
pairs similarity search"): in one order of all words, the rarest first, two sets that are similar enough share one of
the first few words of each. So only texts that share a rare word are ever compared, and none that is similar is missed.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from math import ceil

ROUNDING = 1e-9  # 0.7 * 10 is a little over 7


class NearIndex:
    """Holds n sets of words; finds those of a Jaccard similarity of at least `least` (above 0, at most 1) to another.

    In memory are the n sets, as numbers, and the rarest words of each; not what they are compared with.
    """

    def __init__(self, texts: Sequence[Collection[str]], least: float) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"a similarity is above 0 and at most 1, not {least}")
        self.least = least
        counts = Counter(word for text in texts for word in set(text))
        ordered = sorted(counts, key=lambda word: (counts[word], word))
        self._rank = {word: rank for rank, word in enumerate(ordered)}
        self._texts = [tuple(sorted({self._rank[word] for word in text})) for text in texts]
        self._where: dict[int, dict[int, list[int]]] = {}  # rank of a word: words of a text: texts
        for number, text in enumerate(self._texts):
            for rank in text[: self._prefix(len(text))]:
                self._where.setdefault(rank, {}).setdefault(len(text), []).append(number)

    def _prefix(self, size: int) -> int:
        """How many of a set's rarest words are looked at: the others alone are too few to be similar."""
        return size - ceil(self.least * size - ROUNDING) + 1

    def of(self, text: Collection[str]) -> Iterator[tuple[int, float]]:
        """Yields (number of a held set, similarity) of all that are similar enough; sets without a word never are."""
        distinct = set(text)
        size = len(distinct)
        known = sorted(self._rank[word] for word in distinct if word in self._rank)
        looked_at = self._prefix(size) - (size - len(known))  # words that no held set has are the rarest of all
        if looked_at <= 0:
            return
        ranks, met = set(known), set()
        smallest, largest = ceil(self.least * size - ROUNDING), int(size / self.least + ROUNDING)
        for rank in known[:looked_at]:
            for other, numbers in self._where.get(rank, {}).items():
                if not smallest <= other <= largest:
                    continue
                needed = (size + other) * self.least / (1 + self.least) - ROUNDING
                for number in numbers:
                    if number in met:
                        continue
                    met.add(number)
                    shared = len(ranks.intersection(self._texts[number]))
                    if shared >= needed:
                        yield number, shared / (size + other - shared)
