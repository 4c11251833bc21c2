"""Keys for tests of signatures, made in a moment. Not a test itself."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def make_key(
    folder: Path, name: str, *, curve: ec.EllipticCurve | None = None, password: bytes = b""
) -> tuple[Path, Path]:
    """(the file of a private key, that of its public key)."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    how = BestAvailableEncryption(password) if password else NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
