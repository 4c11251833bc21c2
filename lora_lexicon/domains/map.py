"""Pictures: entries in the plane of their two principal components; what each number of domains gives. No models."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.vectors import Vectors
from lora_lexicon.errors import DataError
from lora_lexicon.folders import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_lexicon.domains.router import Router

POINTS = 2000  # entries drawn
# Okabe and Ito's colours, told apart by colour-blind readers too; markers change when they run out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P")


def plane(vectors: Vectors, labels: NDArray[np.int32], seed: int = 42) -> tuple[Vectors, NDArray[np.int32]]:
    """(m, 2) principal coordinates and (m,) domains of at most 2,000 of the entries (n, d), drawn at random."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:POINTS])
    return Plane(vectors[chosen]).points(vectors[chosen]), labels[chosen]


class Plane:
    """The plane of the two principal components of vectors (n, d)."""

    def __init__(self, vectors: Vectors) -> None:
        exact = vectors.astype(np.float64)
        self._mean = exact.mean(axis=0)
        self._axes = np.linalg.svd(exact - self._mean, full_matrices=False)[2][:2]

    def points(self, vectors: Vectors) -> Vectors:
        """(n, 2) where vectors (n, d) lie in it."""
        found = np.zeros((len(vectors), 2), dtype=np.float32)
        found[:, : len(self._axes)] = (vectors.astype(np.float64) - self._mean) @ self._axes.T
        return found


def router_plane(router: "Router") -> Plane:
    """The plane of a router's typical terms and centroids."""
    return Plane(np.concatenate([router.term_vectors.astype(np.float32), router.centroids]))


def draw_map(points: Vectors, labels: NDArray[np.int32], names: Sequence[str], file: Path) -> str:
    """Draws what `map_of` does into a file; returns the alternative text."""
    if file.suffix.lower() != ".png":
        raise DataError(f"{file}: the map is a PNG: give it a name that ends in .png")
    png, text = map_of(points, labels, names)
    write_whole(file, png)
    return text


def map_of(points: Vectors, labels: NDArray[np.int32], names: Sequence[str]) -> tuple[bytes, str]:
    """(a PNG, the alternative text that it holds too) of points (m, 2) coloured by domain, with names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        own = points[labels == i]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        axes.scatter(own[:, 0], own[:, 1], s=9, alpha=0.55, c=colour, marker=marker, linewidths=0, label=name)
    for i, name in enumerate(names):
        own = points[labels == i]
        if len(own):
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": COLOURS[i % len(COLOURS)], "alpha": 0.9}
            axes.annotate(name, np.median(own, axis=0).tolist(), ha="center", va="center", fontsize=9, bbox=box)
    axes.set(xlabel="first principal component", ylabel="second principal component", title="Domains")
    axes.legend(loc="best", fontsize=8, markerscale=2)
    sizes = ", ".join(f"{name} ({int((labels == i).sum())})" for i, name in enumerate(names))
    text = f"{len(points)} entries in the plane of their two principal components, coloured by domain: {sizes}."
    return _png(figure, "Domains", text), text


def draw_sweep(rows: Sequence[Mapping[str, float]], file: Path) -> str:
    """Draws cohesion, separation and silhouette over the number of domains as a PNG; returns its alternative text."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    counts = [row["domains"] for row in rows]
    measures = (("cohesion", "smaller is tighter"), ("separation", "larger is further apart"), ("silhouette", "to 1"))
    for axes, (name, meaning), colour in zip(figure.subplots(1, 3), measures, COLOURS, strict=False):
        axes.plot(counts, [row[name] for row in rows], marker="o", color=colour)
        axes.set_xscale("log", base=2)
        axes.xaxis.set(
            major_locator=FixedLocator(counts), minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:g}")
        )
        axes.set(xlabel="domains", title=f"{name} ({meaning})")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    found = [f"{row['domains']} domains: " + ", ".join(f"{n} {row[n]:.3f}" for n, _ in measures) for row in rows]
    text = f"What each number of domains gives. {'; '.join(found)}."
    write_whole(file, _png(figure, "Numbers of domains", text))
    return text


def _png(figure: "Figure", title: str, text: str) -> bytes:
    """The PNG with its alternative text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Title": title, "Description": text, "Alt-Text": text})
    return picture.getvalue()
