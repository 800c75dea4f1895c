"""The pictures of docs/variants.md: each method's loss curve over LoRA's, and perplexity against drift."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

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
        axis.yaxis.set_minor_formatter(NullFormatter())
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
    for name, (x, y) in points.items():
        whiskers = [[y.value - y.low], [y.high - y.value]]
        axis.errorbar([x], [y.value], yerr=whiskers, fmt="o", color=BLUE, markersize=4, elinewidth=0.5, alpha=0.8)
        axis.annotate(METHODS[name].label, (x, y.value), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if all(x > 0 and math.isfinite(x) for x, _ in points.values()):
        axis.set_xscale("log")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set_xlabel("drift: KL from the base on its own answers, nats per token")
    axis.set_ylabel("held-out perplexity, with 95 % intervals")
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
