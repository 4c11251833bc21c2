"""What `newdomain.new_domain` found, as a document: sentences, tables and a picture. Measures nothing."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from lora_lexicon.report.document import Cell, Document, Figure, Picture, Section, Table, Text

FEW = 20  # held-out entries, by fewer of which a gain cannot be told from luck
SHOWN = 20  # prompts that change hands, those that lose most first; report.json has all


def document_of(report: dict[str, Any]) -> Document:
    """The whole report."""
    signature = Text(f"Loss: {report['signature']}. Intervals: paired bootstrap over headwords, 95 %.")
    found = [_picture(report), *tables(report, definitions=True)]
    sections = [Section("What it gains, and what it costs", found), Section("Signature", [signature])]
    return Document(f"{report['domain']} joins {Path(report['pack']).name}", sentences(report), sections)


def tables(report: dict[str, Any], definitions: bool = False) -> list[Table]:
    """The report, from what the new domain gains to whose files are as they were.

    Args:
        definitions: of prompts that change hands, too.
    """
    own, held, name = report["own"], report["held_out"], report["domain"]
    found: list[Table] = []
    if report["overlaps"]:
        keys = ("similarity", "old_median", "new_median")
        rows = [[o["domain"], *(Figure(o[key], digits=3) for key in keys)] for o in report["overlaps"]]
        columns = ("old domain", "similarity of centroids", "of its own members (median)", f"of {name}'s (median)")
        found.append(Table(f"{name} sits on top of", columns, rows))
    if own:
        losses = [[_system(key, own), _loss(value)] for key, value in own["losses"].items()]
        title = f"{own['entries']} held-out entries of {name} ({own['split']}), loss in nats a definition token"
        found.append(Table(title, ("system", "loss"), losses, better=("", "low")))
        rows = [[f"{c['a']} - {c['b']}", _difference(c), Figure(c["p"], digits=4)] for c in own["comparisons"]]
        columns = ("comparison", "difference in loss, 95 % interval", "p")
        found.append(Table("Differences: negative favours the first", columns, rows))
    parts = [part for part in (*held["domains"], held["moved_only"], held["all"]) if part]
    rows = [
        [p["domain"], p["entries"], p["moved"], _loss(p["before"]), _loss(p["after"]), _difference(p)] for p in parts
    ]
    columns = ("prompts of", "entries", "change hands", "loss before", "after", "difference, 95 % interval")
    found.append(Table(f"Held-out entries of the old domains ({held['source']})", columns, rows))
    keys = ["term", "from", "to", "loss_before", "loss_after", *(("before", "after") if definitions else ())]
    if moved := [[_moved(row[key]) for key in keys] for row in held["moved"][:SHOWN]]:
        title = f"Prompts that change hands ({len(moved)} of {len(held['moved'])}, those that lose most first)"
        columns = ("term", "from", "to", "loss before", "after", "definition before", "after")
        found.append(Table(title, columns[: len(keys)], moved))
    kept = [
        ["keep their expert", held["kept"]],
        ["the same definition and logits to the bit", held["unchanged"]],
        ["the same loss to the bit", held["same_loss"]],
    ]
    found.append(Table(f"Of {held['checked']} prompts of the old domains", ("what became of them", "prompts"), kept))
    found += _router_tables(report)
    if files := report.get("files"):
        rows = [
            [*f["file"].split("/")[1:], f["sha256"][:12], "as before" if f["unchanged"] else "CHANGED"] for f in files
        ]
        found.append(Table("Files of the other experts", ("expert", "file", "SHA-256", "now"), rows))
    return found


def _router_tables(report: dict[str, Any]) -> list[Table]:
    """Learned routers beside the pack's own, if they were compared."""
    compared = report.get("routers")
    if not compared:
        return []
    old, new = compared["old"], compared["new"]
    told = f"Routers on {old['entries']} held-out prompts of the old domains; right: where the pack sent them before"
    titles = [(old, told)]
    if new:
        now = report["on_conflict"]["now"]
        titles.append((new, f"Routers on {new['entries']} held-out prompts of {report['domain']}; right: {now}"))
    columns = ("router", "right", "loss", "difference", "95 % interval")
    return [Table(title, columns, [_router_row(row) for row in part["routers"]]) for part, title in titles]


def _router_row(row: dict[str, Any]) -> list[Any]:
    found = row["difference"]
    told = [f"{found['difference']:+.4f}", f"{found['low']:+.4f} to {found['high']:+.4f}"] if found else ["", ""]
    return [row["router"], row["accuracy"], row["loss"], *told]


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
        if own["entries"] < FEW:
            lines.append(f"only {own['entries']} of its entries are held out: too few to tell a gain from luck")
    else:
        lines.append(f"no entry of {name} is held out (its splits test and valid are empty): its gain is not measured")
    for method, why in report.get("routers", {}).get("refused", {}).items():
        lines.append(f"no router {method!r} to compare with: {why}")
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
        f"members are to them; {told[did]}"
    )


def _picture(report: dict[str, Any]) -> Picture:
    """The differences in loss with their 95 % intervals: on the new domain's own entries, on the old."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    own, held = report["own"], report["held_out"]
    compared = own["comparisons"] if own else []
    _intervals(left, [f"{c['a']}\n- {c['b']}" for c in compared], compared)
    left.set_title(f"{own['entries']} held-out entries of {report['domain']}" if own else "no held-out entries")
    parts = [part for part in (*held["domains"], held["all"]) if part]
    names = [f"{part['domain']}\n{part['moved']} of {part['entries']} change hands" for part in parts]
    _intervals(right, names, parts)
    right.set_title("Held-out entries of the old domains, after - before")
    told = [(f"{c['a']} - {c['b']}", c) for c in compared] + [
        (f"{part['domain']}, after - before", part) for part in parts
    ]
    described = "; ".join(f"{name} {_difference(part)}" for name, part in told)
    text = f"Differences in loss with their 95 % intervals: {described or 'none'}."
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Title": f"{report['domain']} joins", "Description": text})
    return Picture("differences", png.getvalue(), text, "Below 0 is better.")


def _intervals(axes: Any, names: Sequence[str], found: Sequence[dict[str, Any]]) -> None:
    """A point with its interval for each difference, the first on top."""
    for y, part in enumerate(found):
        axes.plot([part["low"], part["high"]], [y, y], color="C0", lw=2)
        axes.plot([part["difference"]], [y], "o", color="C0")
        axes.annotate(f"{part['difference']:+.3f}", (part["difference"], y), (0, 7), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.axvline(0, color="0.5", lw=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_xlabel("difference in loss (nats per definition token): below 0 is better")
    axes.margins(x=0.12)


def _system(key: str, own: dict[str, Any]) -> str:
    return f"{key} ({own['former_best_expert']})" if key == "former best expert" else key


def _loss(value: float) -> Figure:
    return Figure(value, digits=4)


def _difference(part: dict[str, Any]) -> Figure:
    return Figure(part["difference"], part["low"], part["high"], digits=4, signed=True)


def _moved(value: str | float) -> Cell:
    return value if isinstance(value, str) else _loss(value)
