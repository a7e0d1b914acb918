"""Results as a table in the terminal and in Markdown, as JSON, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.results import Comparison

_HEADINGS = ("workload", "condition", "ours", "peer", "ratio", "target", "reached")


def markdown_table(comparisons: Sequence[Comparison]) -> str:
    """All comparisons, a row each, columns of equal width so that it reads as plain text too."""
    rows = [_HEADINGS, *(_row(comparison) for comparison in comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(comparison: Comparison) -> tuple[str, ...]:
    variant = "" if comparison.variant == "default" else f", {comparison.variant}"
    peer = comparison.peer_median
    target = comparison.target
    sign = "≥" if comparison.better == "higher" else "≤"
    bound = "" if target is None else f"{sign} {target.limit:g}"
    if target is not None and target.aim is not None:
        bound += f" (aim {target.aim:g})"
    return (
        f"{comparison.workload}{variant}",
        comparison.condition,
        f"{_number(comparison.ours_median)} {comparison.unit}",
        comparison.note if peer is None else f"{_number(peer)} {comparison.unit} ({comparison.peer_name})",
        "" if comparison.ratio is None else f"{comparison.ratio:.2f}",
        bound,
        {True: "yes", False: "no", None: ""}[comparison.reached],
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_json(
    path: Path, when: str, machine: Mapping[str, object], versions: Mapping[str, str], comparisons: Sequence[Comparison]
) -> None:
    """Everything that was measured, every single run of it."""
    document = {
        "date": when,
        "machine": machine,
        "versions": versions,
        "results": [comparison.to_json() for comparison in comparisons],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def draw(path: Path, title: str, comparisons: Sequence[Comparison]) -> None:
    """One bar for every comparison with a peer: how many times as fast ours is, and a mark where the target lies."""
    # Imported late: it is large, and measured commands must not start from a large process.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [comparison for comparison in comparisons if comparison.ratio is not None]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.32 * len(shown)), layout="constrained")
    places = range(len(shown), 0, -1)
    speeds = [_times_as_fast(comparison, comparison.ratio) for comparison in shown]
    colours = ["#b9473a" if comparison.reached is False else "#2f7f86" for comparison in shown]
    bars = axes.barh(places, speeds, color=colours, height=0.7)
    axes.bar_label(bars, [f"{speed:.2f}×" for speed in speeds], padding=4, fontsize=8)
    for place, comparison in zip(places, shown, strict=True):
        if comparison.target is not None:
            mark = _times_as_fast(comparison, comparison.target.limit)
            axes.plot([mark, mark], [place - 0.42, place + 0.42], color="black", linewidth=1.5)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yticks(places, [_label(comparison) for comparison in shown], fontsize=8)
    axes.set_xlabel("times as fast as the peer (log scale); black marks: targets")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.12, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _times_as_fast(comparison: Comparison, ratio: float | None) -> float:
    assert ratio is not None
    return ratio if comparison.better == "higher" else 1 / ratio


def _label(comparison: Comparison) -> str:
    variant = "" if comparison.variant == "default" else f", {comparison.variant}"
    return f"{comparison.workload}{variant} — {comparison.condition} (vs {comparison.peer_name})"
