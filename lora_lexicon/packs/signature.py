"""Signatures of packs, by OpenSSF's `model-signing`: with a key, or by Sigstore. Knows nothing of who is trusted.

A signature is the file `model.sig` in the pack: a Sigstore bundle over the SHA-256 of every other file. The manifest
does not list it, and whatever changes the pack leaves it out.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from lora_lexicon.archive import is_archive, placed
from lora_lexicon.cache import unpacked
from lora_lexicon.compose.mixture import SIGNATURE, Manifest, signature_of
from lora_lexicon.errors import LexiconError, MissingExtraError, PackError, TrustError
from lora_lexicon.folders import changing, plain, read_bounded, write_whole
from lora_lexicon.packs.layout import fill
from lora_lexicon.packs.pack import verify_pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model_signing.hashing import Config as Hashing

MAX_KEY_BYTES = 2**16
KINDS = "an elliptic-curve key in PEM, of P-256, P-384 or P-521"


@dataclass(frozen=True)
class PublicKey:
    """A key to check signatures with.

    Attributes:
        pem: the key itself, as its file has it.
        where: it came from, for messages.
    """

    pem: bytes
    where: str


@dataclass(frozen=True)
class Identity:
    """Who signed by Sigstore: an e-mail address or a workflow's address, and the issuer that vouches for it."""

    identity: str
    issuer: str


Signatory = PublicKey | Identity


def read_key(file: Path) -> PublicKey:
    """Reads and checks a public key.

    Raises:
        LexiconError: no file, or none of `KINDS`.
        MissingExtraError: model-signing is not installed.
    """
    key = PublicKey(_key_bytes(file), str(file))
    check_key(key)
    return key


def _key_bytes(file: Path) -> bytes:
    """What a key's file holds.

    Raises:
        LexiconError: no plain file, or one too large.
    """
    try:
        content = read_bounded(file, MAX_KEY_BYTES)
    except (OSError, ValueError) as error:  # of a zero in the name
        said = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise LexiconError(f"key {plain(str(file))} cannot be read ({said or error}): give {KINDS}") from error
    if content is None:
        raise LexiconError(f"key {file} is larger than {MAX_KEY_BYTES >> 10} KiB: give {KINDS}")
    return content


def check_key(key: PublicKey) -> None:
    """Raises LexiconError unless a public key can be used."""
    with TemporaryDirectory() as scratch:
        _verifier(key, Path(scratch))


def sign_pack(
    pack: Path, out: Path | None = None, *, key: Path | None, password: str | None = None, overwrite: bool = False
) -> Manifest:
    """Verifies a pack and signs it, in its place or as a new one; returns its manifest.

    Args:
        pack: a folder, or one file.
        out: a folder, or one file where it ends in `.lexpack`; by default the pack itself is signed.
        key: the file of a private key, one of `KINDS`; None: by Sigstore, which asks in a browser who signs, unless the
            environment says it, as GitHub's does.
        password: of an encrypted key.

    Raises:
        LexiconError: a damaged pack, or a key that cannot be used.
        MissingExtraError: model-signing is not installed.
    """
    sign = _signer(key, password)
    folder = unpacked(pack) if is_archive(pack) else pack
    if out is None and folder == pack:
        with changing(pack):
            manifest = verify_pack(pack)
            write_whole(pack / SIGNATURE, sign(pack))
            return manifest
    manifest = verify_pack(folder)
    with placed(out or pack, overwrite=overwrite or out is None) as target:
        fill(folder, target, link=False)
        (target / SIGNATURE).write_bytes(sign(target))
    return manifest


def verify_signature(pack: Path, signatory: Signatory) -> None:
    """Checks that `signatory` signed exactly the files that a pack's folder holds.

    Raises:
        TrustError: no signature, another's, or one of other files.
        LexiconError: a key that cannot be used; Sigstore is out of reach.
        MissingExtraError: model-signing is not installed.
    """
    file = signature_of(pack)
    if file is None:
        raise TrustError(f"pack {pack} is not signed (it holds no {SIGNATURE}): get a signed one, or `pack sign` it")
    with TemporaryDirectory() as scratch:
        verifier = _verifier(signatory, Path(scratch))
        try:
            with redirect_stdout(sys.stderr):  # the library prints warnings
                verifier.set_hashing_config(_all_files()).verify(pack, file)
        except Exception as error:  # of a hostile signature, whatever the library comes upon
            said = _said(error).split(": Expected ")[0]  # of digests, which tell nobody anything
            raise TrustError(f"pack {pack} is not as {_called(signatory)} signed it ({said}): do not use it") from error


def _said(error: Exception) -> str:
    first = error.args[0] if error.args and isinstance(error.args[0], list) else [error]  # some hold several faults
    return " ".join(" ".join(map(str, first)).split()) or type(error).__name__


def _called(signatory: Signatory) -> str:
    return signatory.where if isinstance(signatory, PublicKey) else f"{signatory.identity} ({signatory.issuer})"


def _verifier(signatory: Signatory, scratch: Path) -> Any:
    """The library's verifier; a key is handed over as a file in `scratch`."""
    with _library(signatory):
        from model_signing.verifying import Config

        if isinstance(signatory, Identity):
            return Config().use_sigstore_verifier(identity=signatory.identity, oidc_issuer=signatory.issuer)
        (scratch / "key.pem").write_bytes(signatory.pem)
        return Config().use_elliptic_key_verifier(public_key=scratch / "key.pem")


def _signer(key: Path | None, password: str | None) -> Callable[[Path], bytes]:
    """What makes the signature of a folder's files."""
    if key is not None:
        _key_bytes(key)  # which the library would wait for, were it a pipe
    with _library(key):
        from model_signing.signing import Config

        if key is None:
            config = Config().use_sigstore_signer(use_ambient_credentials=True)
        else:  # the library hands the password on to cryptography, which takes bytes
            secret = cast(Any, password.encode() if password else None)
            config = Config().use_elliptic_key_signer(private_key=key, password=secret)

    def sign(folder: Path) -> bytes:
        with TemporaryDirectory() as scratch, _library(key, folder):
            config.set_hashing_config(_all_files()).sign(folder, Path(scratch) / SIGNATURE)
            return (Path(scratch) / SIGNATURE).read_bytes()

    return sign


@contextmanager
def _library(given: "Signatory | Path | None", pack: Path | None = None) -> "Iterator[None]":
    """Says in one line what fails of the library, of a key or of Sigstore; of a key that is read, of the pack."""
    try:
        with redirect_stdout(sys.stderr):  # where Sigstore tells what to open in a browser
            yield
    except ModuleNotFoundError as error:
        raise MissingExtraError("signing", (error.name or "").split(".")[0].replace("_", "-"), "sign") from error
    except Exception as error:  # the library lets through what cryptography and Sigstore raise
        said = _said(error)
        if given is None or isinstance(given, Identity):
            raise LexiconError(f"Sigstore does not answer ({said}): try again, or use a key") from error
        if pack is not None:
            raise PackError(f"pack {pack} cannot be signed ({said}): check its files") from error
        where = given.where if isinstance(given, PublicKey) else given
        raise LexiconError(f"key {where} cannot be used ({said}): give {KINDS}") from error


def _all_files() -> "Hashing":
    """How files are hashed: all but the signature, whatever a signature says should be left out."""
    from model_signing.hashing import Config

    class Whole(Config):
        def add_ignored_paths(self, **_: Any) -> None:
            pass

    return Whole().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
