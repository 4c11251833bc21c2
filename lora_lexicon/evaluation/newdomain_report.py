"""What `newdomain.new_domain` found, as tables, as Markdown and as a picture. Measures nothing."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from lora_lexicon.evaluation.report import comparison_rows
from lora_lexicon.folders import write_whole

SHOWN = 20  # prompts that change hands, those that lose most first; report.json has all


class Table(NamedTuple):
    """A table for a person."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def tables(report: dict[str, Any]) -> list[Table]:
    """The report, from what the new domain gains to whose files are as they were."""
    own, held, name = report["own"], report["held_out"], report["domain"]
    found: list[Table] = []
    if report["overlaps"]:
        rows = [[o["domain"], o["similarity"], o["old_median"], o["new_median"]] for o in report["overlaps"]]
        columns = ("old domain", "similarity of centroids", "of its own members (median)", f"of {name}'s (median)")
        found.append(Table(f"{name} sits on top of", columns, rows))
    if own:
        losses = [[_system(key, own), value] for key, value in own["losses"].items()]
        title = f"{own['entries']} held-out entries of {name} ({own['split']}), loss in nats a definition token"
        found.append(Table(title, ("system", "loss"), losses))
        found.append(Table("Differences: negative favours the first", *comparison_rows(own["comparisons"])))
    parts = [part for part in (*held["domains"], held["moved_only"], held["all"]) if part]
    rows = [
        [p["domain"], p["entries"], p["moved"], p["before"], p["after"], f"{p['difference']:+.4f}",
         f"{p['low']:+.4f} to {p['high']:+.4f}"]
        for p in parts
    ]  # fmt: skip
    columns = ("prompts of", "entries", "change hands", "loss before", "after", "difference", "95 % interval")
    found.append(Table(f"Held-out entries of the old domains ({held['source']})", columns, rows))
    moved = [
        [row["term"], row["from"], row["to"], row["loss_before"], row["loss_after"], row["before"], row["after"]]
        for row in held["moved"][:SHOWN]
    ]
    if moved:
        title = f"Prompts that change hands ({len(moved)} of {len(held['moved'])}, those that lose most first)"
        found.append(Table(title, ("term", "from", "to", "loss", "then", "definition", "then"), moved))
    kept = [
        ["keep their expert", held["kept"]],
        ["the same definition and logits to the bit", held["unchanged"]],
        ["the same loss to the bit", held["same_loss"]],
    ]
    found.append(Table(f"Of {held['checked']} prompts of the old domains", ("", "prompts"), kept))
    if files := report.get("files"):
        rows = [[f["file"], f["sha256"][:16], "as before" if f["unchanged"] else "CHANGED"] for f in files]
        found.append(Table("Files of the other experts", ("file", "SHA-256", ""), rows))
    return found


def sentences(report: dict[str, Any]) -> list[str]:
    """What a person should know first, a line each."""
    own, done, name = report["own"], report["on_conflict"], report["domain"]
    training = report["training"]
    lines = [f"{name}: {training['rows']:,} training entries, {training['steps']} steps, {training['seconds']} s"]
    if report["overlaps"]:
        lines.append(conflict(name, [o["domain"] for o in report["overlaps"]], done["did"]))
    if own:
        share = f"{own['routed_to_it']:.0%} of its held-out prompts go to {done['now']}"
        lines.append(f"{share}; its former best expert is {own['former_best_expert']}")
    else:
        lines.append(f"no entry of {name} is held out (its splits test and valid are empty): its gain is not measured")
    return lines


def conflict(name: str, old: Sequence[str], did: str | None = None) -> str:
    """The warning that a new domain sits on old ones, with the choice, or with what was chosen."""
    told = {
        "keep": "both are kept; --on-conflict merge makes them one, replace takes the old one out",
        "replace": f"{old[0]} was taken out",
        "merge": f"the two are one now, under the name {old[0]}",
        None: "--on-conflict says what becomes of that: keep (both), merge (one of both) or replace (the old one goes)",
    }
    return (
        f"{name} sits on top of {', '.join(old)}: their centroids are nearer to each other than half of their own "
        f"members are to them, so that few prompts tell them apart: {told[did]}"
    )


def markdown(report: dict[str, Any], picture: str) -> str:
    """The whole report as Markdown."""
    parts = [f"# {report['domain']} joins {Path(report['pack']).name}", *sentences(report), f"![Losses]({picture})"]
    for table in tables(report):
        head = "| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns)
        rows = "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in table.rows)
        parts.append(f"## {table.title}\n\n{head}\n{rows}")
    parts.append(f"Loss: {report['signature']}. Intervals: paired bootstrap over headwords, 95 %.")
    return "\n\n".join(parts) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the losses as a PNG: on the new domain's own entries by system, on the old ones before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    own, parts = report["own"], [part for part in report["held_out"]["domains"] if part]
    losses = {_system(key, own): value for key, value in own["losses"].items()} if own else {}
    _bars(left, list(losses), {"loss": list(losses.values())})
    left.set_title(f"{own['entries']} held-out entries of {report['domain']}" if own else "no held-out entries")
    names = [f"{part['domain']}\n{part['moved']} of {part['entries']} change hands" for part in parts]
    _bars(right, names, {key: [part[key] for part in parts] for key in ("before", "after")})
    right.set_title("held-out entries of the old domains")
    described = "; ".join(f"{name}: loss {value:.3f}" for name, value in losses.items())
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Title": f"{report['domain']} joins", "Description": described})
    write_whole(path, picture.getvalue())


def _bars(axes: Any, names: Sequence[str], series: dict[str, Sequence[float]]) -> None:
    """Horizontal bars with their values, a group a name, the first on top."""
    high = 0.8 / len(series)
    for n, (label, values) in enumerate(series.items()):
        places = [i + n * high for i in range(len(names))]
        drawn = axes.barh(places, values, height=high * 0.9, color=f"C{n}", label=label)
        axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks([i + 0.4 - high / 2 for i in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("loss (nats per definition token): lower is better")
    axes.margins(x=0.12)
    if len(series) > 1:
        axes.legend(loc="lower right", fontsize=8)


def _system(key: str, own: dict[str, Any]) -> str:
    return f"{key} ({own['former_best_expert']})" if key == "former best expert" else key


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("|", "\\|")
