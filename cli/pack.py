"""`lora-lexicon pack`: look at a pack, check it, add a domain to it or take one out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import packing, remote, signing
from .console import (
    JsonOption,
    OverwriteOption,
    bytes_text,
    check_given,
    emit,
    guarded,
    note,
    progress,
    quiet_libraries,
    show_table,
)
from .packing import prompts_of, show_domains
from .signing import TrustOption, check_expert
from .suggest import suggest

app = typer.Typer(no_args_is_help=True, help="Build packs, look at them, check them, change them.")
app.command("build")(packing.build)
app.command("copy")(packing.copy)
app.command("suggest")(suggest)
app.command("sign")(signing.sign)
app.command("verify")(signing.verify)
app.command("push")(remote.push)
app.command("pull")(remote.pull)

Pack = Annotated[
    str, typer.Argument(metavar="PACK", help="A pack's folder or .lexpack file, or a shipped pack's name.")
]
NewOut = Annotated[Path | None, typer.Option("--out", help="Write a new pack; by default the pack itself changes.")]
SHOWN = 20


@app.command("inspect")
@guarded
def inspect(pack: Pack, as_json: JsonOption = False) -> None:
    """Show what a pack holds."""
    from lora_lexicon.resources import find_model

    folder = find_model(pack)  # first: torch takes seconds to import
    from lora_lexicon.packs.pack import describe_pack

    found = describe_pack(folder)
    if as_json:
        emit(found)
        return
    show_domains(f"{found['name']} {found['version']}", found["domains"])
    base = found["base"]
    said = [f"{d['name']}: {d['description']}" for d in found["domains"] if d["description"]]
    for line in [found["description"], *said]:
        if line:
            note(line)
    note(f"licence {found['licence'] or 'not given'}; definitions in {', '.join(found['languages'])}")
    note(f"base {base['name']} ({base['fingerprint'][:12]}), {'inside' if base['path'] else 'not inside'}")
    note(f"router reads the embedder {found['embedder']['name']}; {found['files']} files, {found['megabytes']:,} MB")
    columns = ("system", "metric", "value", "rows", "signature")
    if found["scores"]:
        show_table("Scores", columns, [[score[column] for column in columns] for score in found["scores"]])


@app.command("diff")
@guarded
def diff(
    pack: Pack,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The pack to compare with it.")],
    as_json: JsonOption = False,
) -> None:
    """Show how another pack differs from a pack."""
    from lora_lexicon.resources import find_model

    folders = find_model(pack), find_model(other)
    from lora_lexicon.packs.pack import diff_packs

    found = diff_packs(*folders)
    if as_json:
        emit(found)
        return
    rows = [(name, "only there") for name in found["added"]] + [(name, "only here") for name in found["removed"]]
    for each in found["changed"]:
        centroid = "centroids not comparable" if each["cosine"] is None else f"cosine of centroids {each['cosine']:.4f}"
        rows.append((each["name"], f"{'another adapter' if each['adapter'] else 'the same adapter'}, {centroid}"))
    rows += [(key, f"{here!r} here, {there!r} there") for key, (here, there) in found["fields"].items()]
    if rows:
        show_table(f"{pack} and {other}", ("what", "differs"), rows)
    note(f"{found['files']} files differ" if found["files"] else "all files are the same")


@app.command("list")
@guarded
def list_packs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER...", help="Folders that hold packs; by default the shipped.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the packs in folders, or those that ship."""
    from lora_lexicon.packs.listing import list_packs as found_in
    from lora_lexicon.resources import packs

    found = found_in(folders or [next(iter(packs().values())).parent])
    if as_json:
        emit({"packs": found})
        return
    columns = ("pack", "version", "domains", "base", "MB", "fault")
    show_table("Packs", columns, [[row.get(column, "") for column in columns] for row in found])


@app.command("cache")
@guarded
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what no process uses.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what was unpacked of packs in one file, and downloads that broke off, the least recently used first."""
    from datetime import datetime

    from lora_lexicon.cache import cache_folder, cache_limit, cached, clear_cache

    limit, removed = cache_limit(), clear_cache() if clear else []
    found = cached()
    whole = sum(one.bytes for one in found)
    used = [datetime.fromtimestamp(one.used).astimezone().isoformat(" ", "seconds") for one in found]
    if as_json:
        packs = [
            {"folder": one.name, "bytes": one.bytes, "used": when, "in_use": one.in_use}
            for one, when in zip(found, used, strict=True)
        ]
        gone = [one.name for one in removed]
        emit({"cache": str(cache_folder()), "limit": limit, "bytes": whole, "packs": packs, "removed": gone})
        return
    if clear:
        note(f"removed {len(removed)} folders of {bytes_text(sum(one.bytes for one in removed))}")
    if found:
        rows = [
            (one.name, bytes_text(one.bytes), when, "yes" if one.in_use else "")
            for one, when in zip(found, used, strict=True)
        ]
        show_table(str(cache_folder()), ("folder", "size", "last used", "in use"), rows)
    note(f"{bytes_text(whole)} of {bytes_text(limit)} (LORA_LEXICON_CACHE_BYTES)")


@app.command("add")
@guarded
def add(
    pack: Pack,
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="A LoRA expert, or any plain PEFT adapter.")],
    data: Annotated[
        Path, typer.Option("--data", metavar="ENTRIES", help="The new domain's entries: train gives its centroid.")
    ],
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="ENTRIES", help="Entries decoded before and after; by default --data's."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="The split of --check to decode.")] = "valid",
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most this many prompts are decoded.")] = 200,
    base: Annotated[str | None, typer.Option("--base", help="Where the pack's base lies, if elsewhere.")] = None,
    trust: TrustOption = None,
    out: NewOut = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add a domain to a pack: its adapter and its centroid.

    The report shows which validation prompts change hands, and that every other prompt's output is
    unchanged to the bit. With --trust, the expert must lie in a pack that somebody trusted signed.
    """
    folder = writable(pack, out)
    from lora_lexicon.packs.pack import add_expert

    quiet_libraries()
    check_expert(expert, trust)
    with progress() as bar:
        task = bar.add_task("decoding prompts", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        members = prompts_of(data, "train", None)
        report = add_expert(
            folder,
            expert,
            members,
            prompts_of(check or data, split, limit),
            base=base,
            out=out,
            overwrite=overwrite,
            progress=show,
        )
    if as_json:
        emit(report)
        return
    show_report(f"{report['expert']} joins {report['pack']}", report)


@app.command("vllm")
@guarded
def serve_by_vllm(
    pack: Pack,
    base: Annotated[str | None, typer.Option("--base", help="Where the pack's base lies, if elsewhere.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="What vLLM computes in: bfloat16 or float16.")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Check that vLLM can serve a pack, and print the `vllm serve` that does (docs/vllm.md)."""
    import shlex

    check_given(pack, base)
    from lora_lexicon.inference.vllm_engine import open_front, serve_command

    quiet_libraries()
    front = open_front(pack, base, dtype=dtype)
    words = serve_command(front, dtype)
    if as_json:
        emit({"command": words, "domains": list(front.router.names), "stop_token_ids": sorted(front.ends)})
        return
    typer.echo(shlex.join(words))


@app.command("remove")
@guarded
def remove(
    pack: Pack,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain to take out.")],
    out: NewOut = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take a domain and its adapter out of a pack."""
    folder = writable(pack, out)
    from lora_lexicon.packs.pack import remove_expert

    record = remove_expert(folder, domain, out=out, overwrite=overwrite)
    if as_json:
        emit(record)
        return
    show_domains(str(out or pack), record["domains"])


def show_report(title: str, report: dict[str, Any]) -> None:
    """Which prompts changed hands when an expert joined, as tables."""
    rows = [("change hands", len(report["moved"])), ("keep their expert", report["kept"])]
    rows += [("of these unchanged to the bit", report["unchanged"]), ("of these changed", len(report["changed"]))]
    show_table(title, (f"of {report['checked']} prompts", ""), rows)
    columns = ("term", "from", "to", "before", "after")
    for what, found in (("Change hands", report["moved"]), ("Changed, though their expert stays", report["changed"])):
        if found:
            show_table(what, columns, [[row[column] for column in columns] for row in found[:SHOWN]])
        if len(found) > SHOWN:
            note(f"and {len(found) - SHOWN} more: --json lists all")


def writable(pack: str, out: Path | None) -> Path:
    """The pack's folder; a shipped pack is never changed in its place."""
    from lora_lexicon.errors import PackError
    from lora_lexicon.resources import find_model

    folder = find_model(pack)
    if out is None and not Path(pack).is_dir():
        what = "one file" if Path(pack).is_file() else "a shipped pack"
        raise PackError(f"{pack!r} is {what}, which is not changed in its place: add --out to write a pack of your own")
    return folder
