"""Splits by headword. A headword's split depends on the headword, the seed and the shares alone.

So the same word lands in the same split in every data set, whatever else is in it: what one
data set trains on can never be another's test headword (as long as seed and shares agree).
"""

from hashlib import blake2b

from lora_lexicon.data.entry import headword

SHARES = {"train": 0.9, "valid": 0.05, "test": 0.05}


_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}


def split_name(name: str) -> str | None:
    """train, valid or test for any common spelling of it, else None."""
    folded = name.strip().casefold()
    return next((split for split, names in _NAMES.items() if folded in names), None)


def unit_hash(text: str, salt: str) -> float:
    """A uniform number in [0, 1) that depends only on `text` and `salt`."""
    digest = blake2b(text.encode(), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(term: str, seed: int = 42, shares: dict[str, float] | None = None) -> str:
    """The split of a term: the name in `shares` (fractions that sum to 1) whose interval its hash falls in."""
    shares = shares or SHARES
    position, edge, name = unit_hash(headword(term), f"split-{seed}"), 0.0, ""
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name
