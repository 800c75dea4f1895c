"""The pictures of docs/variants.md: each method's loss curve over LoRA's, and perplexity against drift."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.variants_claims import Outcomes
from benchmarks.variants_figures import curve, drift, perplexity, trailing, window
from benchmarks.variants_methods import METHODS

COLUMNS = 4
BLUE, GREY = "#1f5fa8", "#9a9a9a"


def draw_losses(outcomes: Outcomes, path: Path) -> None:
    """One small picture a method, its smoothed training loss over that of its reference in grey."""
    names = [n for n in outcomes if METHODS[n].reference in outcomes and METHODS[n].steps == 1.0]
    if not names:
        return
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(11, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_visible(False)
            continue
        name = names[place]
        reference = METHODS[name].reference
        assert reference is not None
        for method, colour in ((reference, GREY), (name, BLUE)):
            losses = curve(outcomes[method].records)
            width = window(len(losses))
            axis.plot(range(width, len(losses) + 1), trailing(losses, width), color=colour, linewidth=1.4)
        axis.set_yscale("log")
        axis.set_title(f"{METHODS[name].label} (grey: {METHODS[reference].label})", fontsize=8)
        axis.yaxis.set_major_locator(FixedLocator((0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(_plain))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("training loss", fontsize=8)
    figure.savefig(path, dpi=100)


def draw_drift(outcomes: Outcomes, path: Path) -> None:
    """A point a method: how far it drifted from the base, and the perplexity that it reached."""
    points = {
        name: (drift(o.records).value.value, perplexity(o.records).value)
        for name, o in outcomes.items()
        if all("drift" in record for record in o.records)
    }
    if not points:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for x, y in points.values():
        whiskers = [[y.value - y.low], [y.high - y.value]]
        axis.errorbar([x], [y.value], yerr=whiskers, fmt="o", color=BLUE, markersize=4, elinewidth=0.5, alpha=0.8)
    if all(x > 0 and math.isfinite(x) for x, _ in points.values()):
        axis.set_xscale("log")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(FuncFormatter(_plain))
        axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set_xlabel("drift: KL from the base on its own answers, nats per token")
    axis.set_ylabel("held-out perplexity, with 95 % intervals")
    axis.grid(alpha=0.25)
    _name_points(axis, {METHODS[name].label: (x, y.value) for name, (x, y) in points.items()})
    figure.savefig(path, dpi=100)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _name_points(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Writes each point's name beside it, above or below what stands there already, and inside the axes."""
    axis.figure.canvas.draw()  # only now it is known where things stand
    taken: list[Any] = []
    style = {"textcoords": "offset points", "va": "center", "fontsize": 7}
    for label, place in sorted(points.items(), key=lambda point: point[1]):
        for turn in range(80):
            height, right = 5.0 * ((turn // 2 + 1) // 2) * (-1 if turn & 2 else 1), turn % 2 == 0
            at = (6 if right else -6, height)
            note = axis.annotate(label, place, xytext=at, ha="left" if right else "right", **style)
            box = note.get_window_extent()
            if axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and not any(map(box.overlaps, taken)):
                taken.append(box)
                if abs(height) > 5:
                    line = {"arrowstyle": "-", "linewidth": 0.4, "color": GREY}
                    axis.annotate("", place, xytext=at, textcoords="offset points", arrowprops=line)
                break
            note.remove()
