"""The results as table rows and as a picture. Knows the summaries' keys, nothing of how they were measured."""

from collections.abc import Collection, Sequence
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lora_lexicon.folders import write_whole

SYSTEM_COLUMNS = {
    "name": "system",
    "trained_parameters": "trained",
    "ship_megabytes": "MB to ship",
    "memory_megabytes": "MB held",
    "kl": "KL",
    "agreement": "same token",
    "loss": "loss",
    "perplexity": "ppl",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "tokens_per_second": "tokens/s",
}
COMPARISON_COLUMNS = ("comparison", "metric", "difference", "95 % interval", "p")
_DIGITS = {
    "kl": 4,
    "agreement": 3,
    "ship_megabytes": 1,
    "memory_megabytes": 1,
    "bleu": 2,
    "rouge_l": 2,
    "perplexity": 1,
    "tokens_per_second": 0,
}


def system_rows(
    systems: Sequence[dict[str, Any]], leave_out: Collection[str] = ()
) -> tuple[list[str], list[list[Any]]]:
    """(column titles, one row a system) of summaries; a value that is absent or None shows as "-"."""
    keys = [key for key in SYSTEM_COLUMNS if key not in leave_out and any(key in system for system in systems)]
    rows = [[_shown(key, system.get(key)) for key in keys] for system in systems]
    return [SYSTEM_COLUMNS[key] for key in keys], rows


def comparison_rows(comparisons: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(column titles, one row a comparison); those of one pair stand together, and its name goes over two of them."""
    pairs: dict[tuple[str, str], list[list[Any]]] = {}
    for c in comparisons:
        shown = [c["metric"], f"{c['difference']:+.4f}", f"{c['low']:+.4f} to {c['high']:+.4f}", f"{c['p']:.4f}"]
        pairs.setdefault((c["a"], c["b"]), []).append(shown)
    rows = []
    for (a, b), found in pairs.items():
        names = [a, f"- {b}"] if len(found) > 1 else [f"{a} - {b}"]
        rows += [[name, *row] for name, row in zip_longest(names, found, fillvalue="")]
    return list(COMPARISON_COLUMNS), rows


def _shown(key: str, value: Any) -> Any:
    if value is None:
        return "-"
    return f"{value:,.{_DIGITS[key]}f}" if key in _DIGITS else value


FIDELITY = {"loss": "loss (nats per definition token)", "kl": "KL divergence from the reference (nats per token)"}


def footprint_fidelity(systems: Sequence[dict[str, Any]], path: Path, measure: str = "loss") -> None:
    """Draws what `footprint_picture` does into a file."""
    write_whole(path, footprint_picture(systems, measure)[0])


def footprint_picture(systems: Sequence[dict[str, Any]], measure: str = "loss") -> tuple[bytes, str]:
    """(a PNG, its alternative text): a measure of `FIDELITY` over megabytes to ship and in memory (log scales).

    A labelled point a system. Systems without the measure are left out. What ships nothing stands at the left edge.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [system for system in systems if system.get(measure) is not None]
    figure = Figure(figsize=(12, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, shown, measure, "ship_megabytes", "MB to ship (log scale)")
    _panel(right, shown, measure, "memory_megabytes", "MB in memory (log scale)")
    left.set_ylabel(f"{FIDELITY[measure]}: lower is better")
    figure.suptitle("Footprint and fidelity")
    described = "; ".join(
        f"{s['name']}: {measure} {s[measure]:.3f}, {s['ship_megabytes']:.1f} MB to ship, "
        f"{s['memory_megabytes']:.1f} MB held"
        for s in shown
    )
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Title": "Footprint and fidelity", "Description": described})
    return picture.getvalue(), f"{FIDELITY[measure]} over megabytes to ship and in memory. {described}."


def _panel(axes: Any, systems: Sequence[dict[str, Any]], measure: str, key: str, title: str) -> None:
    """Points from left to right; labels stand right of their points, moved apart where they would overlap."""
    positive = [system[key] for system in systems if system[key] > 0] or [1.0]
    nothing = min(positive) / 4
    points = [(system[key] if system[key] > 0 else nothing, system[measure], system["name"]) for system in systems]
    axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.grid(True, which="major", alpha=0.25)
    axes.set_xlim(nothing / 1.5, max(positive) * 12)  # room for the labels
    values = [value for _, value, _ in points] or [0.0, 1.0]
    span = max(values) - min(values) or 1.0
    bottom, top = min(values) - 0.12 * span, max(values) + 0.12 * span
    axes.set_ylim(bottom, top)
    gap, last = (top - bottom) / 22, -float("inf")
    for i, (x, value, name) in enumerate(sorted(points, key=lambda point: point[1])):
        at = max(value, last + gap)
        last = at
        axes.scatter([x], [value], s=42, color=f"C{i % 10}", zorder=3)
        suffix = " (ships nothing)" if x == nothing else ""
        axes.annotate(
            name + suffix,
            (x, value),
            xytext=(x * 1.25, at),
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.7, "shrinkB": 4, "relpos": (0, 0.5)},
        )
