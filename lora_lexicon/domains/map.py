"""A picture of the domains: entries in the plane of their two principal components. Knows nothing of models."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_lexicon.domains.vectors import Vectors
from lora_lexicon.errors import DataError
from lora_lexicon.folders import write_whole

POINTS = 2000  # entries drawn
# Okabe and Ito's colours, told apart by colour-blind readers too; markers change when they run out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P")


def plane(vectors: Vectors, labels: NDArray[np.int32], seed: int = 42) -> tuple[Vectors, NDArray[np.int32]]:
    """(m, 2) principal coordinates and (m,) domains of at most 2,000 of the entries (n, d), drawn at random."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:POINTS])
    centred = vectors[chosen].astype(np.float64) - vectors[chosen].mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(chosen), 2), dtype=np.float32)
    points[:, : len(axes[:2])] = centred @ axes[:2].T
    return points, labels[chosen]


def draw_map(points: Vectors, labels: NDArray[np.int32], names: Sequence[str], file: Path) -> str:
    """Draws points (m, 2) coloured by domain, with names, as a PNG; returns the alternative text it holds too."""
    if file.suffix.lower() != ".png":
        raise DataError(f"{file}: the map is a PNG: give it a name that ends in .png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    FigureCanvasAgg(figure)
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Title": "Domains", "Description": text, "Alt-Text": text})
    write_whole(file, picture.getvalue())
    return text
