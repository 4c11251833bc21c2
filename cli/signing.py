"""`lora-lexicon pack sign` and `pack verify`, and what commands do with a policy of whom to trust."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, OverwriteOption, emit, guarded, note

if TYPE_CHECKING:
    from lora_lexicon.packs.signature import Signatory
    from lora_lexicon.packs.trust import Policy

PASSWORD = "LORA_LEXICON_KEY_PASSWORD"
TrustOption = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        metavar="FILE",
        envvar="LORA_LEXICON_TRUST",
        help="Take only packs that somebody in this policy signed (docs/trust.md).",
    ),
]


@guarded
def sign(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="A pack's folder or file, or a shipped pack's name.")],
    key: Annotated[
        Path | None,
        typer.Option(
            help=f"A private key (PEM, EC P-256, P-384 or P-521). {PASSWORD} holds an encrypted one's password."
        ),
    ] = None,
    sigstore: Annotated[bool, typer.Option("--sigstore", help="Sign by Sigstore instead, as who logs in.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a signed copy; by default the pack itself is signed.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sign every file of a pack: model.sig lies in it then. Any change of the pack takes the signature off."""
    from lora_lexicon.errors import PackError
    from lora_lexicon.resources import find_model

    if (key is None) != sigstore:
        raise typer.BadParameter("give --key FILE, or --sigstore")
    if out is None and not Path(pack).exists() and find_model(pack):
        raise PackError(f"{pack!r} is a shipped pack: add --out to write a pack of your own")
    source = Path(pack) if Path(pack).exists() else find_model(pack)
    from lora_lexicon.compose.mixture import SIGNATURE
    from lora_lexicon.packs.signature import sign_pack

    manifest = sign_pack(source, out, key=key, password=os.environ.get(PASSWORD), overwrite=overwrite)
    if as_json:
        emit({"pack": manifest.name, "out": str(out or pack), "signature": SIGNATURE, "files": len(manifest.files) + 1})
        return
    typer.echo(f"{manifest.name}: {SIGNATURE} signs {len(manifest.files) + 1} files of {out or pack}")


@guarded
def verify(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="A pack's folder or file, or a shipped pack's name.")],
    key: Annotated[Path | None, typer.Option(help="The public key that must have signed it (PEM).")] = None,
    identity: Annotated[
        str | None, typer.Option("--sigstore-identity", help="Who must have signed it by Sigstore: such as an e-mail.")
    ] = None,
    issuer: Annotated[
        str | None, typer.Option("--sigstore-issuer", help="The issuer that vouches for the identity.")
    ] = None,
    trust: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a pack against its manifest, and who signed it."""
    from lora_lexicon.resources import find_model

    folder = find_model(pack)  # first: torch takes seconds to import
    from lora_lexicon.compose.mixture import signature_of
    from lora_lexicon.packs.pack import check_pack
    from lora_lexicon.packs.signature import verify_signature

    named, policy = _signatory(key, identity, issuer), read_trust(trust)
    manifest, idle = check_pack(folder)
    signers = []
    if named is not None:
        verify_signature(folder, named)
        signers.append(str(key or identity))
    if policy is not None and (name := policy.check(folder)) is not None:
        signers.append(name)
    signed, files = signature_of(folder) is not None, len(manifest.files) + 1
    if as_json:
        found = {"pack": manifest.name, "files": files, "domains": list(manifest.domains), "intact": True}
        emit({**found, "idle": list(idle), "signed": signed, "signed_by": signers})
        return
    said = f"signed by {', '.join(signers)}" if signers else "not signed"
    said = "signed, and by whom was not asked: add --key or --trust" if signed and not signers else said
    typer.echo(f"{manifest.name}: {files} files, manifest.json and those that it lists, are intact; {said}")
    if idle:
        note(f"warning: of {', '.join(idle)} the adapter changes nothing: its factors are zero, as before any training")


def read_trust(file: Path | None) -> "Policy | None":
    """The policy that commands obey, if one is given."""
    if file is None:
        return None
    from lora_lexicon.packs.trust import read_policy

    return read_policy(file)


def check_served(model: str, trust: Path | None) -> "Policy | None":
    """The policy of a server, which the pack that it starts with obeys too, unless it came with the installation."""
    from lora_lexicon.resources import find_model

    policy = read_trust(trust)
    if policy is not None and Path(model).exists():
        from lora_lexicon.compose.mixture import MANIFEST

        folder = find_model(model)
        if (folder / MANIFEST).is_file():
            policy.check_named(folder)
    return policy


def check_expert(expert: Path, trust: Path | None) -> None:
    """Raises TrustError unless an expert lies, as `adapters/NAME`, in a pack that the policy lets in."""
    from lora_lexicon.compose.mixture import MANIFEST
    from lora_lexicon.errors import TrustError
    from lora_lexicon.packs.pack import verify_pack

    policy = read_trust(trust)
    if policy is None:
        return
    pack = expert.resolve().parent.parent
    if expert.resolve().parent.name != "adapters" or not (pack / MANIFEST).is_file():
        raise TrustError(
            f"expert {expert} lies in no pack, so nobody signed it: `pack build` and `pack sign` a pack of it and give "
            f"its adapters/{expert.name}, or leave --trust away"
        )
    policy.check(pack)
    verify_pack(pack)


def _signatory(key: Path | None, identity: str | None, issuer: str | None) -> "Signatory | None":
    from lora_lexicon.packs.signature import Identity, read_key

    if (identity is None) != (issuer is None) or (key is not None and identity is not None):
        raise typer.BadParameter("give --key FILE, or both --sigstore-identity and --sigstore-issuer")
    if key is not None:
        return read_key(key)
    return None if identity is None or issuer is None else Identity(identity, issuer)
