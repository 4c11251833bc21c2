"""Prompts to vectors of unit length, float32 (n, d). Knows nothing of domains.

Only the prompt is embedded, never the definition. An embedder's `identity` holds all that its
vectors depend on; a router remembers it and refuses any other. With `batch_size=1` each prompt is
computed on its own, so that its vector does not depend, not even in the last bit, on the prompts
beside it; larger batches are for fitting. They hold prompts of one length, so nothing is padded.
"""

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.domains.vectors import Vectors, unit
from lora_lexicon.errors import DataError, RouterError
from lora_lexicon.recipe import DomainsRecipe
from lora_lexicon.tasks import OnRay

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = tuple[str, str]  # (term, context)
Pool = Literal["mean", "last"]
Report = Callable[[int], None]  # told how many prompts were just embedded
FIT_BATCH = 64  # prompts computed together where many are embedded
SHARD = 16_384  # prompts embedded before their vectors are put on the disk
STALE_SECONDS = 3600  # a shard is written in far less


class Embedder(Protocol):
    """Anything that turns prompts into vectors."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for two vectors to be comparable; holds JSON values only."""
        ...

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a fitted embedder learned; empty for the others."""
        ...

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None, batch_size: int = 1) -> Vectors:
        """(n, d) float32, rows of unit length, in the order of `prompts`."""
        ...


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `batch_size` rows of one length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[len(row)].append(i)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def embed_cached(
    embedder: Embedder,
    prompts: Sequence[Prompt],
    cache: Path | None,
    progress: Report | None = None,
    scratch: Path | None = None,
) -> Vectors:
    """Vectors of many prompts as a writable memory map of a file without a name, which goes when the map does.

    They are embedded in shards of 16,384 prompts. With a folder `cache`, each shard is kept there, and
    read from it where it holds exactly these prompts: a run that was killed goes on at its last whole shard.

    Args:
        scratch: the folder of the nameless file, 4 * n * d bytes; by default the system's for temporary files.
    """
    with TemporaryFile(dir=scratch) as file:
        width = 0
        for start in range(0, max(1, len(prompts)), SHARD):
            vectors = embed_shard(embedder, prompts[start : start + SHARD], cache, progress)
            width = vectors.shape[1]
            file.write(np.ascontiguousarray(vectors).data)
        file.flush()
        if not len(prompts):
            return np.empty((0, width), dtype=np.float32)
        return np.asarray(np.memmap(file, np.float32, "r+", shape=(len(prompts), width)))


def embed_shard(
    embedder: Embedder, prompts: Sequence[Prompt], cache: Path | None, progress: Report | None = None
) -> Vectors:
    """Vectors of one shard of prompts, in batches; read from the folder `cache` where it holds exactly these.

    The key is the content: the embedder's identity and the prompts.

    Raises:
        DataError: the embedder gives NaN or infinity.
        RouterError: the cache cannot be written.
    """
    if cache is None:
        return _embedded(embedder, prompts, progress)
    content = json.dumps([embedder.name, embedder.identity, prompts], sort_keys=True)
    file = cache / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"
    try:
        vectors = load_file(file)["vectors"]
        if vectors.ndim == 2 and len(vectors) == len(prompts) and vectors.dtype == np.float32:
            if progress:
                progress(len(prompts))
            return vectors
    except (FileNotFoundError, SafetensorError, KeyError):
        pass  # not there, or cut short by a kill: it is written again
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)  # before the long work
        for left in cache.glob("*.partial"):  # by a run that was killed while it wrote
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink(missing_ok=True)
    vectors = _embedded(embedder, prompts, progress)
    partial = file.with_suffix(f".{threading.get_native_id()}.partial")
    try:
        with _writing(cache):
            save_file({"vectors": vectors}, partial)
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return vectors


def _embedded(embedder: Embedder, prompts: Sequence[Prompt], progress: Report | None) -> Vectors:
    vectors = embedder.embed(prompts, progress, FIT_BATCH)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise DataError(
            f"the embedder {embedder.name!r} gives NaN or infinity for {len(wrong)} of {len(prompts)} prompts, such as "
            f"{prompts[wrong[0]]!r}: give another --embedder, or a base with finite weights"
        )
    return vectors


def embed_apart(
    ray: OnRay,
    lists: Sequence[Sequence[Prompt]],
    cache: Path,
    recipe: DomainsRecipe,
    base: str,
    load: Callable[[str], "LoadedBase"],
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Fills the cache with the shards of lists of prompts, so that `embed_cached` of a list has but to read them.

    Each task makes the recipe's embedder and takes its share of the shards. One whose process dies goes on at its last
    whole shard.

    Args:
        cache: on a file system that all machines share.
        load: loads the base of that name, which the embedder `base` needs.
        progress: told (prompts embedded, prompts in all).

    Raises:
        RouterError: the embedder is fitted on the prompts, or the cache is on one machine's own disk.
    """
    if embedder_name(recipe) == "tfidf":
        raise RouterError("the embedder 'tfidf' is fitted on all prompts, in seconds: leave out --on ray")
    shards = [prompts[i : i + SHARD] for prompts in lists for i in range(0, len(prompts), SHARD)]
    count = min(ray.slots, len(shards))
    done, total = [0] * count, sum(map(len, shards))

    def report(task: int, so_far: int, _: int) -> None:
        done[task] = so_far
        if progress:
            progress(sum(done), total)

    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".shared.", dir=cache) as seen:
        tasks = [(shards[i::count], cache, recipe, base, load, Path(seen)) for i in range(count)]
        ray.run(_embed, tasks, [f"embedding, part {i + 1} of {count}" for i in range(count)], report)


def _embed(
    shards: Sequence[Sequence[Prompt]],
    cache: Path,
    recipe: DomainsRecipe,
    base: str,
    load: Callable[[str], "LoadedBase"],
    seen: Path,
    report: Callable[[int, int], object],
) -> None:
    if not seen.is_dir():
        raise RouterError(f"{cache} is not shared by all machines: with --on ray, give a --cache that is")
    embedder = make_embedder(recipe, base=load(base) if embedder_name(recipe) == "base" else None)
    done, total = 0, sum(map(len, shards))

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    for shard in shards:
        embed_shard(embedder, shard, cache, advance)


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RouterError(
            f"the cache {cache} cannot be written ({error}): free some space, or give another --cache"
        ) from error


class _Reached(Exception):
    """Carries the hidden state out of a forward pass that has gone far enough."""

    def __init__(self, states: "torch.Tensor") -> None:
        super().__init__()
        self.states = states


class BaseEmbedder:
    """Pooled hidden states of the shared base: no second model to ship.

    It reads the states after the bottom `layers` decoder layers (0: the token embeddings) and runs
    no further. Experts live above, so the vectors are the same in the base, the mixture and the MoE.

    Args:
        model: any Hugging Face decoder (`get_decoder()`), with or without experts.
        encoder: turns prompts into the base's tokens.
        layers: how many bottom layers to read.
        fingerprint: the base's, whatever model it is part of now.
        pool: `last` reads the prompt's last token, which has seen all others and stands where the
            definition begins; `mean` averages the tokens between the special ones.
    """

    name = "base"

    def __init__(
        self,
        model: "PreTrainedModel",
        encoder: PromptEncoder,
        layers: int,
        fingerprint: str,
        pool: Pool = "last",
    ) -> None:
        self.encoder, self.layers, self.pool, self.fingerprint = encoder, layers, pool, fingerprint
        self.decoder: Any = model.get_decoder()
        if not 0 <= layers <= len(self.decoder.layers):
            raise RouterError(f"layers is {layers}; this base has {len(self.decoder.layers)} layers")

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.name,
            "base": self.fingerprint,
            "layers": self.layers,
            "pool": self.pool,
            "template": asdict(self.encoder.template),
            "max_length": self.encoder.max_length,
        }

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def embed(self, prompts: Sequence[Prompt], progress: Report | None = None, batch_size: int = 1) -> Vectors:
        """(n, d) unit vectors of (term, context) prompts; d is the hidden size."""
        return self.embed_ids([self.encoder.prompt(*prompt) for prompt in prompts], progress, batch_size)

    def embed_ids(self, rows: Sequence[Sequence[int]], progress: Report | None = None, batch_size: int = 1) -> Vectors:
        """(n, d) unit vectors of prompts already encoded as `PromptEncoder.prompt` does (no padding)."""
        vectors = np.empty((len(rows), self.decoder.config.hidden_size), dtype=np.float32)
        for batch in by_length(rows, batch_size):
            some = [rows[i] for i in batch]
            vectors[batch] = self.pooled(some, self.hidden(some))
            if progress:
                progress(len(batch))
        return vectors

    def pooled(self, rows: Sequence[Sequence[int]], states: "torch.Tensor") -> Vectors:
        """(B, d) unit vectors of B encoded prompts, of whose states (B, T, H) the last ones are theirs."""
        if self.pool == "last":
            return unit(states[:, -1].float().cpu().numpy().astype(np.float64))
        found = np.empty((len(rows), states.shape[-1]))
        for i, (ids, own) in enumerate(zip(rows, states.float().cpu().numpy().astype(np.float64), strict=True)):
            first = int(list(ids[:1]) == [self.encoder.tokenizer.bos_token_id])
            own = own[-len(ids) :]
            found[i] = own[first:-1].mean(axis=0) if len(ids) > first + 1 else own.mean(axis=0)
        return unit(found)

    def hidden(self, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
        """(B, T, H) float32: the states of B prompts of T tokens after the bottom `layers` layers.

        With all layers read they are those after the final norm, as `output_hidden_states` has them.
        """
        import torch

        thread = threading.get_ident()

        def stop(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            # Another thread may be decoding with the same model.
            if threading.get_ident() == thread:
                raise _Reached(arguments[0] if arguments else keywords["hidden_states"])

        decoder = self.decoder
        tokens = torch.tensor([list(row) for row in rows], device=decoder.embed_tokens.weight.device)
        above = decoder.layers[self.layers :][:1]  # none when all layers are read
        hooks = [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in above]
        try:
            with torch.no_grad():
                states = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        except _Reached as reached:
            states = reached.states
        finally:
            for hook in hooks:
                hook.remove()
        return states.float()


class LoadedBase(Protocol):
    """What is needed of a loaded base (`experts.base.Base` has it)."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str


def make_embedder(recipe: DomainsRecipe, *, base: LoadedBase | None = None, prompts: Sequence[Prompt] = ()) -> Embedder:
    """The embedder that a recipe asks for: `base`, `st:NAME`, `hf:NAME` or `tfidf` (always for method `lexical`).

    Args:
        base: needed by `base` alone.
        prompts: the training prompts that `tfidf` is fitted on.

    Raises:
        RouterError: an unknown name, a model that cannot be loaded, or prompts without a word.
        MissingExtraError: `st:NAME` without sentence-transformers.
    """
    from lora_lexicon.domains.embedders import HubEmbedder, SentenceEmbedder, TfidfEmbedder

    name = embedder_name(recipe)
    kind, _, what = name.partition(":")
    if name == "base":
        if base is None:
            raise RouterError("the embedder 'base' needs a base: give --base")
        encoder = PromptEncoder(base.tokenizer)
        return BaseEmbedder(base.model, encoder, recipe.layers, base.fingerprint, recipe.pool)
    if name == "tfidf":
        return TfidfEmbedder.fit(prompts)
    if kind == "st" and what:
        return SentenceEmbedder(what)
    if kind == "hf" and what:
        return HubEmbedder(what)
    raise RouterError(f"unknown embedder {name!r}: use base, tfidf, st:NAME or hf:NAME")


def embedder_name(recipe: DomainsRecipe) -> str:
    """The recipe's embedder; the method `lexical` means TF-IDF vectors."""
    return "tfidf" if recipe.method == "lexical" else recipe.embedder
