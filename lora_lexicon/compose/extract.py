"""Full FFN experts to LoRA experts: what each FFN matrix changed, as a product of low rank.

No matrix of rank r is nearer to D, the change, than D's SVD cut off after r values (Eckart and Young, 1936), and the
share of ||D||² that it keeps is the share of the squared singular values: the energy. The factors are held in the
full expert's type, as those of a LoRA expert trained beside it would be, and what is reported of them is measured on
these. One matrix is in memory at a time, its factors wait in files; a model is built for the report alone.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn

from lora_lexicon import __version__
from lora_lexicon.compose.divergence import divergence
from lora_lexicon.compose.probes import probe_entries
from lora_lexicon.compose.sources import BaseFiles, ExpertSource, factor_names, open_expert
from lora_lexicon.data.prompt import PromptEncoder
from lora_lexicon.errors import ExpertError, RecipeError
from lora_lexicon.experts.base import EXPERT_FFN, base_folder, load_base
from lora_lexicon.experts.checkpoint import WEIGHTS, ExpertInfo, write_expert
from lora_lexicon.experts.cost import MAX_RANK
from lora_lexicon.experts.tensors import ITEM_BYTES, Checkpoint, TensorPlan, torch_dtype, write_file
from lora_lexicon.folders import new_folder, write_record

Method = Literal["auto", "exact", "randomized"]
METHODS = ("auto", "exact", "randomized")
EXTRACT_RECORD = "extract.json"
DEFAULT_RANK = 16
# On one core the randomised SVD took 0.62 s for rank 16 of 2048 x 8192, the exact one 25.0 s; 0.14 s and 0.43 s for
# rank 128 of 512 x 2048. It lost at most 0.0002 of the energy where the spectrum falls, and 0.014 where it is flat.
OVERSAMPLES = 10
POWER_ITERATIONS = 4
SMALLEST_RANDOMIZED = 384  # a matrix with fewer rows or columns is decomposed about as fast in full
PROBES = 32  # prompts that the report compares logits on


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix D.

    Attributes:
        values: (m,) float64, those that were found, falling.
        total: ||D||², the sum of all squared values.
    """

    values: Tensor
    total: float

    def energy(self, rank: int) -> float:
        """The share of ||D||² that the first `rank` values hold, between 0 and 1."""
        return min(1.0, float(self.values[:rank].square().sum()) / self.total)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of ||D||²; all values where rounding leaves none."""
        kept = self.values.square().cumsum(0) / self.total
        return min(int((kept < energy).sum()) + 1, len(kept))


def decompose(
    delta: Tensor, rank: int | None = None, method: Method = "auto", seed: int = 42
) -> tuple[Tensor, Tensor, Spectrum]:
    """The SVD of `delta` (out, in), which is not all 0, cut off after `rank` values (None: after none).

    Returns:
        a (n, in) and b (out, n), float32, each with the square roots of n singular values in it: b @ a is the best
        approximation of rank n, and their first r rows and columns are that of rank r. The spectrum holds all values,
        or n of them where the method is randomized.

    Args:
        method: `randomized` is the power-iterated range finder of Halko et al. (2011, arXiv:0909.4061); `auto` takes it
            for a rank of at most a quarter of a matrix that is large enough (see `SMALLEST_RANDOMIZED`).
        seed: of the randomised method.
    """
    full = min(delta.shape)
    kept = min(rank or full, full)
    if chosen_method(tuple(delta.shape), rank, method) == "randomized":
        left, found, right = cast(Any, randomized_svd)(
            delta.numpy(), kept, n_oversamples=OVERSAMPLES, n_iter=POWER_ITERATIONS, random_state=seed
        )
        left, values, right = (torch.from_numpy(part.copy()) for part in (left, found, right))
    else:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:kept].sqrt()
    spectrum = Spectrum(values.double(), float(delta.double().square().sum()))
    return root[:, None] * right[:kept], left[:, :kept] * root, spectrum


def chosen_method(shape: tuple[int, ...], rank: int | None, method: Method) -> str:
    """`exact` or `randomized`, for a matrix of this shape; without a rank every value is needed, hence `exact`."""
    if method != "auto":
        return method
    cheap = rank is not None and 4 * rank <= min(shape) and min(shape) >= SMALLEST_RANDOMIZED
    return "randomized" if cheap else "exact"


@dataclass(frozen=True)
class _Cut:
    """One tensor's decomposition, its factors in a file, and the rank chosen for it.

    Attributes:
        file: the factors in the type that they are written in.
        spectrum: of the change itself.
        energy: by rank, the share of ||D||² that the product of the factors in `file` keeps.
    """

    file: Checkpoint
    spectrum: Spectrum
    energy: dict[int, float]
    rank: int
    method: str

    @property
    def full(self) -> int:
        """The largest rank that is held."""
        return self.file.ref("a").shape[0]

    @property
    def dtype(self) -> str:
        return self.file.ref("a").dtype

    def a(self, rank: int, dtype: str | None = None) -> Tensor:
        """(rank, in), or with all rows that there are."""
        return self.file.tensor("a", dtype)[:rank]

    def b(self, rank: int, dtype: str | None = None) -> Tensor:
        """(out, rank), or with all columns that there are."""
        return self.file.tensor("b", dtype)[:, :rank]

    def parameters(self, rank: int) -> int:
        return min(rank, self.full) * (self.file.ref("a").shape[1] + self.file.ref("b").shape[0])


def parse_ranks(text: str) -> list[int]:
    """Ranks from a list such as `2,4,8`, rising.

    Raises:
        RecipeError: no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= MAX_RANK for part in parts):
        raise RecipeError(f"--report-ranks {text!r} is no list of ranks from 1 to {MAX_RANK}: write it as 2,4,8,16")
    return sorted({int(part) for part in parts})


def extract(
    experts: Sequence[Path],
    base: str,
    out: Path | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: Method = "auto",
    seed: int = 42,
    report_ranks: Sequence[int] = (),
    data: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a LoRA expert for each full one, as `out/NAME`; returns the record, which `out/extract.json` holds too.

    Args:
        experts: FFN experts, or whole Llamas trained on the base, of which the FFNs are taken and the rest is named.
        out: None: nothing is written, for the report alone.
        rank: of every factor, cut where a matrix has fewer values; 16 without `energy`.
        energy: in place of a rank: each tensor gets the smallest that keeps this share of its squared change, before
            the factors are rounded to the expert's type.
        report_ranks: compares these ranks with the full expert, in energy and in logits (see `report`).
        data: an entries folder whose test prompts the report probes with; by default the sample that ships.
        progress: called with (tensors just decomposed, in all).

    Raises:
        LexiconError: parts that do not fit each other, a damaged file, a full disk.
    """
    _check_options(rank, energy, method, out, report_ranks)
    own = BaseFiles.open(base, base_folder(base))
    sources = [_open_full(path, own) for path in experts]
    double = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if double:
        raise ExpertError(f"given twice: {', '.join(double)}: name each expert once")
    total = sum(len(_ffns(source, own)) for source in sources)
    prober = _Prober(own, data) if report_ranks else None
    wanted = None if energy is not None else rank or DEFAULT_RANK
    records, rows = [], []

    def tick() -> None:
        if progress is not None:
            progress(1, total)

    with _target(out, overwrite) as folder:
        for source in sources:
            parts = folder / ".parts"
            parts.mkdir()
            cuts = _decompose_all(source, own, parts, wanted, energy, method, seed, report_ranks, tick)
            if prober is not None:
                rows += [{"expert": source.name, **row} for row in prober.report(source, cuts, report_ranks)]
            record = _record(source, own, cuts, wanted, energy)
            if out is not None:
                _write_adapter(folder / source.name, source, own, cuts, record)
            records.append(record)
            shutil.rmtree(parts)
        made = {
            "base": {"name": base, "fingerprint": own.fingerprint},
            "rank": wanted,
            "energy": energy,
            "seed": seed,
            "experts": records,
            "report": rows,
            "made_by": f"lora-lexicon {__version__}",
            "versions": _versions(),
        }
        if out is not None:
            write_record(folder / EXTRACT_RECORD, made)
    return made


def _check_options(
    rank: int | None, energy: float | None, method: str, out: Path | None, report_ranks: Sequence[int]
) -> None:
    if method not in METHODS:
        raise RecipeError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    if rank is not None and energy is not None:
        raise RecipeError("--rank and --energy are two ways to say how much is kept: give one of them")
    if rank is not None and not 0 < rank <= MAX_RANK:
        raise RecipeError(f"rank is {rank}; it must lie between 1 and {MAX_RANK}")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy is {energy}; it must be above 0 and at most 1")
    if energy is not None and method == "randomized":
        raise RecipeError("--energy needs every singular value, which the randomized method does not find: use exact")
    if out is None and not report_ranks:
        raise RecipeError("nothing to do: give --out, or --report-ranks for a report alone")


@contextmanager
def _target(out: Path | None, overwrite: bool) -> Iterator[Path]:
    if out is not None:
        with new_folder(out, replace=overwrite) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _open_full(path: Path, base: BaseFiles) -> ExpertSource:
    source = open_expert(path, base)
    if source.kind == "lora":
        raise ExpertError(f"expert {source.name!r} is a LoRA expert already: give FFN experts or whole models")
    if not _ffns(source, base):
        raise ExpertError(f"expert {source.name!r}: {path} trains no FFN, which is what is extracted")
    return source


def _ffns(source: ExpertSource, base: BaseFiles) -> list[str]:
    """The FFN matrices that an expert changed, in the base's order."""
    return [name for name in base.weights.tensors if name in source.changed and EXPERT_FFN.fullmatch(name)]


def _decompose_all(
    source: ExpertSource,
    base: BaseFiles,
    folder: Path,
    rank: int | None,
    energy: float | None,
    method: Method,
    seed: int,
    report_ranks: Sequence[int],
    tick: Callable[[], None],
) -> dict[str, _Cut]:
    """Every FFN that differs from the base's, by its tensor's name."""
    cuts = {}
    for i, name in enumerate(_ffns(source, base)):
        delta = source.weights.tensor(name, "float32")
        delta -= base.weights.tensor(name, "float32")
        if delta.any():
            needed = None if rank is None else max(rank, *report_ranks, 0)
            a, b, spectrum = decompose(delta, needed, method, seed)
            own = min(rank, *delta.shape) if rank is not None else spectrum.rank_for(energy or 1.0)
            if own > MAX_RANK:
                raise ExpertError(f"{name} needs rank {own}; an adapter holds at most {MAX_RANK}: keep less --energy")
            held = min(max(own, *report_ranks, 0), len(a))
            file, dtype = folder / f"{i}.safetensors", source.weights.ref(name).dtype
            a, b = a[:held].to(torch_dtype(dtype)).contiguous(), b[:, :held].to(torch_dtype(dtype)).contiguous()
            save_file({"a": a, "b": b}, file)
            kept = {r: _kept(delta, a[:r].float(), b[:, :r].float(), spectrum) for r in {own, *report_ranks}}
            used = chosen_method(tuple(delta.shape), needed, method)
            cuts[name] = _Cut(Checkpoint(file), spectrum, kept, own, used)
        tick()
    if not cuts:
        raise ExpertError(f"expert {source.name!r}: its FFNs are the base's own, so there is nothing to extract")
    return cuts


def _kept(delta: Tensor, a: Tensor, b: Tensor, spectrum: Spectrum) -> float:
    """The share of ||delta||² that b @ a keeps."""
    return max(0.0, 1 - float(torch.addmm(delta, b, a, alpha=-1).square().sum()) / spectrum.total)


def _record(
    source: ExpertSource, base: BaseFiles, cuts: dict[str, _Cut], rank: int | None, energy: float | None
) -> dict[str, Any]:
    kept = {name: cut.energy[cut.rank] for name, cut in cuts.items()}
    return {
        "name": source.name,
        "kind": source.kind,
        "extracted_from": source.fingerprint(),
        "rank": rank,
        "energy": energy,
        "energy_mean": sum(kept.values()) / len(kept),
        "energy_min": min(kept.values()),
        "dtypes": sorted({cut.dtype for cut in cuts.values()}),
        "trained_parameters": sum(cut.parameters(cut.rank) for cut in cuts.values()),
        "bytes": sum(cut.parameters(cut.rank) * ITEM_BYTES[cut.dtype] for cut in cuts.values()),
        "left_out": sorted(source.changed - set(_ffns(source, base))),
        "tensors": {name: {"rank": cut.rank, "energy": kept[name], "method": cut.method} for name, cut in cuts.items()},
    }


def _write_adapter(
    folder: Path, source: ExpertSource, base: BaseFiles, cuts: dict[str, _Cut], record: dict[str, Any]
) -> None:
    """A plain PEFT adapter with alpha = rank, so that the scaling is 1, and its `expert.json`."""
    folder.mkdir()
    plans = []
    for tensor, cut in cuts.items():
        (rows, columns), (a, b) = base.weights.ref(tensor).shape, factor_names(tensor)
        plans.append(TensorPlan(a, (cut.rank, columns), cut.dtype, [partial(_one, cut.a, cut.rank)]))
        plans.append(TensorPlan(b, (rows, cut.rank), cut.dtype, [partial(_one, cut.b, cut.rank)]))
    write_file(folder / WEIGHTS, plans)
    config = low_rank_config({tensor.removesuffix(".weight"): cut.rank for tensor, cut in cuts.items()}, base.name)
    config.save_pretrained(str(folder))
    info = source.info or ExpertInfo(source.name, "ffn", base.name, base.fingerprint, 0)
    layers = [int(match["layer"]) for tensor in cuts if (match := EXPERT_FFN.fullmatch(tensor))]
    note = {key: value for key, value in record.items() if key not in ("name", "tensors", "trained_parameters")}
    info = replace(
        info,
        kind="lora",
        first_layer=min(layers),
        trained_parameters=record["trained_parameters"],
        training={**info.training, "extraction": note},
        versions=_versions(),
        key="",  # `train` must not take it for a run of its own
    )
    write_expert(folder, info)


def low_rank_config(ranks: Mapping[str, int], base: str) -> LoraConfig:
    """What PEFT needs to read factors of these ranks, by layer, whose product is added as it is: alpha is the rank."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != common}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=common,
        lora_alpha=common,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _one(factor: Callable[[int], Tensor], rank: int) -> Iterator[Tensor]:
    yield factor(rank)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "scikit-learn")}


class _Prober:
    """The base in memory, float32, and the prompts on which experts on it are compared."""

    def __init__(self, base: BaseFiles, data: Path | None) -> None:
        loaded = load_base(str(base.path))
        encoder = PromptEncoder(loaded.tokenizer)
        self.base, self.model = base, cast(nn.Module, loaded.model)
        self.device = loaded.model.device
        self.rows = [encoder.prompt(e.term, e.context) for e in probe_entries(data, "test", PROBES)]

    def report(self, source: ExpertSource, cuts: dict[str, _Cut], ranks: Sequence[int]) -> list[dict[str, Any]]:
        """One row a rank: how near the expert cut to that rank comes to the full one.

        `energy_mean`, `energy_min` (over its tensors), `rounding` (how much of the energy the factors' type costs, the
        mean), `parameters`, `max_abs` (the largest difference between two logits) and `kl` (nats a token, KL divergence
        of the full expert from it, the mean over the prompts' tokens). Rank 0 is the base.
        """
        changed = sorted(source.changed)
        self._set((name, source.weights.tensor(name, "float32")) for name in changed)
        wanted = [self._logits(row) for row in self.rows]
        self._set((name, self.base.weights.tensor(name, "float32")) for name in changed)
        report = []
        for rank in (0, *ranks):
            if rank:
                self._set((name, self._cut_to(name, cut, rank)) for name, cut in cuts.items())
            kept = [cut.energy[rank] if rank else 0.0 for cut in cuts.values()]
            exact = [cut.spectrum.energy(rank) for cut in cuts.values()]
            report.append(
                {
                    "rank": rank,
                    "parameters": sum(cut.parameters(rank) for cut in cuts.values()),
                    "energy_mean": sum(kept) / len(kept),
                    "energy_min": min(kept),
                    "rounding": max(0.0, sum(exact) - sum(kept)) / len(kept),
                    **_distance(wanted, [self._logits(row) for row in self.rows]),
                }
            )
        self._set((name, self.base.weights.tensor(name, "float32")) for name in cuts)
        return report

    def _cut_to(self, tensor: str, cut: _Cut, rank: int) -> Tensor:
        return self.base.weights.tensor(tensor, "float32") + cut.b(rank, "float32") @ cut.a(rank, "float32")

    @torch.no_grad()
    def _set(self, values: Iterator[tuple[str, Tensor]]) -> None:
        for name, value in values:
            self.model.get_parameter(name).copy_(value)

    @torch.inference_mode()
    def _logits(self, row: Sequence[int]) -> Tensor:
        """(T, V) float32 for the T tokens of one prompt."""
        return self.model(torch.tensor([row], device=self.device)).logits[0].float().cpu()


def _distance(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute difference and mean divergence (nats a token) of logits (T, V), prompt by prompt."""
    largest, total, tokens = 0.0, 0.0, 0
    for full, cut in zip(wanted, found, strict=True):
        p, q = full.log_softmax(dim=1), cut.log_softmax(dim=1)
        largest = max(largest, float((full - cut).abs().max()))
        total += divergence(p, q)
        tokens += len(full)
    return {"max_abs": largest, "kl": max(0.0, total / tokens)}
