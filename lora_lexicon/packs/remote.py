"""Packs that go elsewhere and come from there: the Hugging Face Hub, a folder or file, an http(s) address.

What comes is verified, and held against a policy, before it lies under its name. docs/trust.md tells of both.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lora_lexicon.archive import SUFFIX, extract, placed
from lora_lexicon.cache import downloads, staged
from lora_lexicon.compose.mixture import ALLOWED, MANIFEST, MAX_FILES, SIGNATURE, read_manifest, signature_of
from lora_lexicon.errors import LexiconError, PackError, show_as
from lora_lexicon.folders import folder_bytes, is_disk_full, sha256_of
from lora_lexicon.packs.layout import fill
from lora_lexicon.packs.pack import copy_pack, verify_pack
from lora_lexicon.packs.trust import Policy
from lora_lexicon.resources import find_model, hub_answers, is_hub_name

LIMIT = 50 * 10**9  # bytes of a pack that comes from elsewhere
HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
FORMS = "a folder, a .lexpack file, hf:OWNER/NAME, hf:OWNER/NAME@REVISION, or an http(s) address"
OURS = ["adapters/*", "base/*", SIGNATURE]  # what of an older pack a newer one may lack


@dataclass(frozen=True)
class Hub:
    """A repository on the Hub; its revision is a branch, a tag or a commit, "" for the main branch."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Web:
    """An http(s) address, and the file's SHA-256 if that was given with it."""

    url: str
    sha256: str = ""

    def __str__(self) -> str:
        from lora_lexicon.packs.download import shown

        return shown(self.url)


def read_place(text: str, *, bare: bool = False) -> Hub | Web | Path:
    """What a SOURCE or TARGET names; anything without a scheme is a path.

    Args:
        bare: OWNER/NAME, where no such folder is, is the Hub's.

    Raises:
        LexiconError: another scheme, or no address.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "hf":
        found = HUB.fullmatch(rest)
        if not found:
            raise LexiconError(
                f"{text!r} names nothing on the Hub: write it as hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
            )
        return Hub(found["repository"], found["revision"] or "")
    if "://" not in text:
        return Hub(text) if bare and not Path(text).exists() and is_hub_name(text) else Path(text)
    import httpx2

    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise LexiconError(f"{text[:200]!r} is no address ({error}): give {FORMS}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise LexiconError(f"{scheme[:200]!r} is no scheme that packs come by: give {FORMS}")
    return Web(str(url.copy_with(fragment=None)), _sha256(parse_qs(url.fragment).get("sha256", [""])[-1]))


def _sha256(text: str) -> str:
    if text and not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise LexiconError(f"{text[:80]!r} is no SHA-256: give its 64 hexadecimal digits")
    return text.lower()


def name_of(place: Hub | Web | Path) -> str | None:
    """How a pack from there is called here unless told otherwise; None where the place says nothing."""
    if isinstance(place, Hub):
        return place.repository.rpartition("/")[2]
    if isinstance(place, Path):
        return place.resolve().name or None
    last = urlsplit(place.url).path.rpartition("/")[2]
    return last if re.fullmatch(rf"[A-Za-z0-9][\w.-]*{re.escape(SUFFIX)}", last, re.ASCII) else None


def pull_pack(
    source: str,
    out: Path,
    *,
    sha256: str = "",
    policy: Policy | None = None,
    limit: int = LIMIT,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Brings a pack here, verified; returns what it is.

    What broke off is continued by the same call: until it is whole it lies in the user's cache.

    Args:
        source: see `FORMS`; also OWNER/NAME, see `read_place`.
        out: a folder, or one file where it ends in `.lexpack`.
        sha256: of the one file that comes from an address.
        policy: whose signature it must bear.
        limit: bytes that it may have.
        progress: called with (bytes here, bytes in all if they are known); the Hub's client shows its own.

    Returns:
        `source`, `out`, `name`, `version`, `domains`, `bytes` and `signed_by` (None where no policy asked).

    Raises:
        TrustError: the policy does not let it in.
        LexiconError: it is not there, out of reach, too large, damaged, or of another SHA-256.
    """
    place = read_place(source, bare=True)
    if sha256 and not isinstance(place, Web):
        raise LexiconError("--sha256 is of one file from an address; on the Hub give a commit: hf:OWNER/NAME@COMMIT")
    if sha256 and isinstance(place, Web) and place.sha256 not in ("", sha256.lower()):
        raise LexiconError(f"--sha256 and {place} give two hashes: leave one away")
    if isinstance(place, Path) and place.exists() and place.resolve() == out.resolve():
        raise LexiconError(f"{place} lies there already: add --out with where a copy of it is to lie")
    if _is_taken(out) and not overwrite:
        raise LexiconError(f"{out} exists: choose another --out, or add --overwrite")
    with _brought(place, _sha256(sha256), limit, progress) as found, placed(out, overwrite=overwrite) as target:
        show_as(found, place)
        show_as(target, place)
        size = found.stat().st_size if found.is_file() else folder_bytes(found)
        if size > limit:
            raise PackError(_too_large(place, size, limit))
        if found.is_file():
            extract(found, target)
        else:
            read_manifest(found)  # first: of a folder that is no pack nothing is copied
            fill(found, target, link=False)
            if signature := signature_of(found):
                shutil.copyfile(signature, target / SIGNATURE)
        manifest = verify_pack(target)
        signer = None if policy is None else policy.check(target)
    about = {"name": manifest.name, "version": manifest.version, "domains": list(manifest.domains)}
    return {"source": str(place), "out": str(out), **about, "bytes": sum(manifest.sizes.values()), "signed_by": signer}


def push_pack(pack: Path, target: str, *, private: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Sends a pack, verified, to the Hub or to a path; returns where it is.

    Args:
        pack: its folder.
        target: a folder, a `.lexpack` file, or `hf:OWNER/NAME@BRANCH`, which is made if it is not there. On the Hub,
            what is there already is not sent again, and adapters that the pack lacks are removed.
        private: a repository that is made is private.
        overwrite: what lies at a path is replaced.

    Returns:
        `pack`, `version`, `target`, and on the Hub `commit` and `url`.

    Raises:
        LexiconError: a damaged pack, a place that takes none, or no leave to write there.
    """
    place = read_place(target)
    if isinstance(place, Web):
        raise LexiconError(
            f"{place} takes no packs: push to a folder or to hf:OWNER/NAME, or copy a .lexpack file there"
        )
    if isinstance(place, Path) and private:
        raise LexiconError("--private is of repositories on the Hub: leave it away")
    if isinstance(place, Hub) and overwrite:
        raise LexiconError("--overwrite is of paths: on the Hub a push is a new commit")
    manifest = verify_pack(pack)
    found = {"pack": manifest.name, "version": manifest.version, "target": str(place)}
    if isinstance(place, Path):
        if place.resolve() == pack.resolve():
            raise LexiconError(f"{place} is the pack itself: push to another folder, file or repository")
        if _is_taken(place) and not overwrite:
            raise LexiconError(f"{place} exists: push to another folder or file, or add --overwrite")
        copy_pack(pack, place, overwrite=overwrite)
        return found
    from huggingface_hub import HfApi

    api, names = HfApi(), [*manifest.files, MANIFEST, SIGNATURE]
    with _hub_errors(place):
        api.create_repo(place.repository, private=private or None, exist_ok=True)
        if place.revision:
            api.create_branch(place.repository, branch=place.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=place.repository,
            folder_path=pack,
            revision=place.revision or None,
            commit_message=f"{manifest.name} {manifest.version}",
            allow_patterns=names,
            delete_patterns=OURS,
        )
    return {**found, "commit": commit.oid, "url": commit.commit_url}


def _is_taken(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


@contextmanager
def _brought(
    place: Hub | Web | Path, sha256: str, limit: int, progress: Callable[[int, int | None], None] | None
) -> Iterator[Path]:
    """A folder or a file with what lies at a place; what was downloaded goes when it has been used, or is of no use."""
    if isinstance(place, Path):
        yield place if place.is_file() and place.suffix == SUFFIX else find_model(str(place))
        return
    with staged(repr(place), place) as stage:
        try:
            if isinstance(place, Hub):
                yield _from_hub(place, stage, limit)
            else:
                yield _from_web(place, sha256 or place.sha256, stage, limit, progress)
        except PackError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        except LexiconError:
            if not any(stage.iterdir()):
                stage.rmdir()
            raise
        shutil.rmtree(stage, ignore_errors=True)


def _from_web(
    place: Web, sha256: str, stage: Path, limit: int, progress: Callable[[int, int | None], None] | None
) -> Path:
    from lora_lexicon.packs.download import download

    file = download(place.url, stage, limit=limit, progress=progress)
    if sha256 and sha256_of(file) != sha256:
        raise PackError(f"{place} has SHA-256 {sha256_of(file)}, not {sha256}: do not use it")
    return file


def _from_hub(place: Hub, stage: Path, limit: int) -> Path:
    """The files of a repository that are a pack's, and no others."""
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(place):
        found = HfApi().model_info(place.repository, revision=place.revision or None, files_metadata=True)
    if not COMMIT.fullmatch(found.sha or ""):
        raise PackError(f"{place}: the Hub names no commit: try again")
    files = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    files = {name: size for name, size in files.items() if ALLOWED.fullmatch(name) or name in (MANIFEST, SIGNATURE)}
    if MANIFEST not in files or len(files) > MAX_FILES:
        raise PackError(f"{place} is no pack: it has no {MANIFEST}, or too many files: choose another repository")
    size, free = sum(files.values()), shutil.disk_usage(stage).free
    if size > limit:
        raise PackError(_too_large(place, size, limit))
    if size > free:
        raise LexiconError(
            f"{stage} lacks {(size - free) / 1e9:,.2f} GB of space for {place}: "
            "free some, or name another folder in LORA_LEXICON_CACHE"
        )
    folder = stage / str(found.sha)
    with _hub_errors(place):
        snapshot_download(place.repository, revision=found.sha, allow_patterns=list(files), local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # what its client remembers
    return folder


def _too_large(place: Hub | Web | Path, size: int, limit: int) -> str:
    return f"{place} has {size:,} bytes, and {limit:,} are allowed: give a larger --max-size"


@contextmanager
def _hub_errors(place: Hub) -> Iterator[None]:
    """Turns what the Hub's client raises into one line."""
    import httpx2
    from huggingface_hub import errors

    if not hub_answers():
        raise LexiconError(f"{place}: the Hugging Face Hub is out of reach: check the network, or use another place")
    try:
        yield
    except errors.GatedRepoError as error:
        raise LexiconError(f"{place} is given to those who asked: ask on its page, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise LexiconError(f"{place}: the repository has no such revision: check its branches and tags") from error
    except errors.RepositoryNotFoundError as error:
        raise LexiconError(f"{place} is not there, or not for you: check the name, or `hf auth login`") from error
    except (errors.HFValidationError, httpx2.HTTPError, OSError) as error:
        if is_disk_full(error):
            raise LexiconError(
                f"{downloads()} has no space left for {place}: free some, or name another folder in LORA_LEXICON_CACHE"
            ) from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = "log in with `hf auth login`, as who may do that" if status in (401, 403) else "try again"
        raise LexiconError(f"{place}: the Hugging Face Hub refuses ({said}): {what}") from error
