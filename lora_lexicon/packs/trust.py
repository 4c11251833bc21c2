"""A policy: whose signatures count. Knows nothing of how a signature is made or checked (`packs.signature`).

docs/trust.md describes the file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lexicon.compose.mixture import signature_of
from lora_lexicon.errors import LexiconError, TrustError
from lora_lexicon.folders import shown
from lora_lexicon.packs.signature import Identity, PublicKey, Signatory, check_key, read_key, verify_signature
from lora_lexicon.recipe import read_yaml
from lora_lexicon.resources import packs

WHAT = "trust policy"
FORMS = "{name, key} or {name, identity, issuer}"


@dataclass(frozen=True)
class Policy:
    """Who may have signed a pack.

    Attributes:
        file: where it was read.
        require: a pack without a signature is refused.
        trusted: {name: who}, in the file's order.
    """

    file: Path
    require: bool
    trusted: dict[str, Signatory]

    def check_named(self, pack: Path) -> None:
        """As `check`, of a pack that somebody names to use it: those that came with the installation pass."""
        if pack.resolve() not in {path.resolve() for path in packs().values()}:
            self.check(pack)

    def check(self, pack: Path) -> str | None:
        """Who signed the pack in a folder, by name; None for an unsigned one where that may be.

        Raises:
            TrustError: it is not signed, or by nobody trusted, or not as it lies there.
            LexiconError: as `verify_signature`.
        """
        signature = signature_of(pack)
        if not self.require and signature is None:
            return None
        refusals = []
        for name in sorted(self.trusted, key=lambda name: isinstance(self.trusted[name], Identity)):  # keys ask nobody
            try:
                verify_signature(pack, self.trusted[name])
                return name
            except TrustError as error:
                refusals.append(error)
        if len(refusals) == 1 or signature is None:
            raise refusals[0]
        names = ", ".join(self.trusted)
        raise TrustError(f"pack {pack} is not as any that {self.file} trusts ({names}) signed it: do not use it")


def read_policy(file: Path) -> Policy:
    """Reads and checks a policy and its keys.

    Raises:
        LexiconError: a malformed policy, or a key that cannot be read.
        MissingExtraError: model-signing is not installed.
    """
    record = read_yaml(file, LexiconError, WHAT)
    unknown = [key for key in record if key not in ("require", "trusted")]
    if unknown:
        raise LexiconError(f"{WHAT} {file}: unknown key {shown(unknown[0])}: it may hold require and trusted")
    require, rows = record.get("require", True), record.get("trusted")
    if not isinstance(require, bool):
        raise LexiconError(f"{WHAT} {file}: require is {shown(require)}: it must be true or false")
    if not isinstance(rows, list) or not rows:
        raise LexiconError(f"{WHAT} {file}: trusted must be a list of {FORMS}, of one at least")
    trusted: dict[str, Signatory] = {}
    for number, row in enumerate(rows, 1):
        name, signatory = _row(row, f"{WHAT} {file}, row {number} of trusted", file.parent)
        if name in trusted:
            raise LexiconError(f"{WHAT} {file} names {name!r} twice: give each a name of its own")
        trusted[name] = signatory
    return Policy(file, require, trusted)


def _row(row: Any, where: str, folder: Path) -> tuple[str, Signatory]:
    if not isinstance(row, dict) or not all(isinstance(value, str) and value for value in row.values()):
        raise LexiconError(f"{where} must be {FORMS}, all of text")
    if row.keys() == {"name", "identity", "issuer"}:
        return row["name"], Identity(row["identity"], row["issuer"])
    if row.keys() != {"name", "key"}:
        raise LexiconError(f"{where} has {', '.join(map(shown, row)) or 'nothing'}: it must be {FORMS}")
    if not row["key"].lstrip().startswith("-----BEGIN"):
        return row["name"], read_key(folder / row["key"])
    key = PublicKey(row["key"].encode(), f"{row['name']!r} of {folder}")
    check_key(key)
    return row["name"], key
