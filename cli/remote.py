"""`lora-lexicon pack push` and `pack pull`: packs that go elsewhere and come from there."""

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, OverwriteOption, bytes_text, emit, guarded, note, progress
from .signing import TrustOption, read_trust


@guarded
def push(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="A pack's folder or file, or a shipped pack's name.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="hf:OWNER/NAME, hf:OWNER/NAME@BRANCH, a folder or a .lexpack file.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="A repository that is made on the Hub is private.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send a pack to the Hugging Face Hub, or to a folder or file. Its signature goes with it."""
    from lora_lexicon.resources import find_model

    folder = find_model(pack)
    from lora_lexicon.packs.remote import push_pack

    done = push_pack(folder, target, private=private, overwrite=overwrite)
    if as_json:
        emit(done)
        return
    typer.echo(f"{done['pack']} {done['version']} is at {done.get('url', done['target'])}")


@guarded
def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="hf:OWNER/NAME, hf:OWNER/NAME@REVISION, an http(s) address, a folder or a .lexpack file.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A folder, or one file that ends in .lexpack; by default named as it is there."),
    ] = None,
    sha256: Annotated[
        str, typer.Option("--sha256", metavar="HEX", help="Of the file at an address; or ADDRESS#sha256=HEX.")
    ] = "",
    max_size: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="Refuse what is larger.")] = "50GB",
    trust: TrustOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a pack here, verified. The same command continues what broke off."""
    from lora_lexicon.errors import LexiconError
    from lora_lexicon.experts.cost import bytes_of
    from lora_lexicon.packs.remote import Web, name_of, pull_pack, read_place

    limit, policy, place = bytes_of(max_size), read_trust(trust), read_place(source, bare=True)
    if not limit:
        raise LexiconError(f"--max-size {max_size!r} is no size: give one such as 200MB or 5GB")
    named = out or name_of(place)
    if named is None:
        raise typer.BadParameter("the pack needs a name: add --out")
    with progress(of_bytes=True) as bar:
        task = bar.add_task(f"bringing {place}", total=None, visible=False)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        done = pull_pack(
            source, Path(named), sha256=sha256, policy=policy, limit=int(limit), overwrite=overwrite, progress=show
        )
    if as_json:
        emit(done)
        return
    typer.echo(
        f"{done['name']} {done['version']} lies at {done['out']}: {bytes_text(done['bytes'])}, every file verified"
    )
    if policy is None and isinstance(place, Web) and place.url.startswith("http:") and not (sha256 or place.sha256):
        note("what comes over http can be changed on its way: take https, --sha256 or --trust")
    if done["signed_by"]:
        note(f"signed by {done['signed_by']}")
