"""Curves as pictures, each with its alternative text."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

from lora_lexicon.report.document import Figure, Picture, number_of


def curves(
    name: str,
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Sequence[tuple[int, Figure]]],
    level: Mapping[str, Figure] | None = None,
) -> Picture:
    """Lines over whole numbers, on a logarithmic axis with 0 at its left end; bars are deviations over seeds.

    Args:
        x, y: what the axes show.
        series: label -> (place, figure) of each point; points without a value are left out.
        level: figures that do not depend on the axis, as horizontal lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    places = sorted({place for points in series.values() for place, _ in points})
    marks = ("o", "s", "^", "D", "v", "P", "X", "*")
    said = []
    for i, (label, points) in enumerate(series.items()):
        known = [(place, point) for place, point in points if point.value is not None]
        if not known:
            continue
        values = [number_of(point) or 0.0 for _, point in known]
        bars = [point.deviation or 0.0 for _, point in known]
        at = [_place(place) for place, _ in known]
        axes.errorbar(at, values, yerr=bars, marker=marks[i % len(marks)], capsize=3, label=label)
        said.append(f"{label}: " + ", ".join(f"{point.number(point.value or 0)} at {place}" for place, point in known))
    for i, (label, point) in enumerate((level or {}).items()):
        if point.value is not None:
            axes.axhline(point.value, linestyle=("--", ":", "-.")[i % 3], color=f"C{7 + i % 3}", label=label)
            said.append(f"{label}: {point.number(point.value)} throughout")
    axes.set_xticks([_place(place) for place in places], [str(place) for place in places])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(True, alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    data = BytesIO()
    canvas.savefig(data, format="png")
    return Picture(name, data.getvalue(), f"{title}. {y} by {x}. {'; '.join(said)}.")


def _place(number: int) -> float:
    """Where a number stands: 0 one doubling left of 1."""
    return math.log2(number) if number else -1.0
