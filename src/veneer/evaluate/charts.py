"""Small line charts as inline SVG, with their labels in HTML: the drawing stretches with the page, the text does not.

An SVG with text inside shrinks its text on a phone. Here the SVG holds lines alone and is stretched without keeping its
shape (strokes keep their width), and the labels around it are ordinary text placed by percentages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.evaluate.markup import Html, tag

Point = tuple[float, float]
MAX_POINTS = 600  # of one line: more cannot be seen and only make the file heavy
_SIZE = 1000  # of the drawing, in its own units, both ways


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its points by rising x, and how it is drawn.

    ``style`` names a colour class of the page's style sheet; a ``faint`` line has no legend of its own; ``dots`` mark
    each point, for the few points of evaluations; ``note`` stands behind the name in the legend.
    """

    name: str
    points: Sequence[Point]
    style: str
    note: str = ""
    faint: bool = False
    dots: bool = False


def line_chart(title: str, series: Sequence[Series], *, x_label: str = "step", from_zero: bool = False) -> Html:
    """A chart as a ``<figure>``; empty where no series has a finite point.

    Args:
        title: stands above the chart.
        series: drawn in their order, the last one on top.
        x_label: what the horizontal axis counts.
        from_zero: the vertical axis begins at 0 whatever the values.
    """
    kept = [(one, points) for one in series if (points := _finite(one.points))]
    if not kept:
        return Html("")
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    bottom, top, y_ticks = _axis(min(ys), max(ys), from_zero)
    left, right = min(xs), max(xs)
    x_ticks = [tick for tick in nice_ticks(left, right, 6, whole=True) if left <= tick <= right] or [left]

    def x_of(x: float) -> float:
        return 0.5 if right == left else (x - left) / (right - left)

    def y_of(y: float) -> float:
        return (y - bottom) / (top - bottom)

    drawing = [tag("path", class_="grid", d=f"M0 {_unit(1 - y_of(tick))}H{_SIZE}") for tick in y_ticks]
    for one, points in kept:
        places = [f"{_unit(x_of(x))} {_unit(1 - y_of(y))}" for x, y in thinned(points)]
        look = f"line {one.style}" + (" faint" if one.faint else "")
        drawing.append(tag("path", class_=look, d="M" + "L".join(places)))
        if one.dots or len(places) == 1:
            # A line of no length with round ends is a dot that stays round when the drawing is stretched.
            drawing.append(tag("path", class_=f"dot {one.style}", d="".join(f"M{place}h0" for place in places)))
    named = [one for one, _ in kept if not one.faint]
    keys = [
        tag("span", one.name, tag("span", one.note, class_="note") if one.note else None, class_=f"key {one.style}")
        for one in named
    ]
    spoken = "; ".join(f"{one.name} {one.note}".strip() for one in named)
    svg = tag(
        "svg",
        *drawing,
        viewBox=f"0 0 {_SIZE} {_SIZE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title} by {x_label}: {spoken}",
    )
    y_labels = [tag("span", number(t, y_ticks), style=f"bottom:{100 * y_of(t):.2f}%") for t in y_ticks]
    x_labels = [tag("span", number(t, x_ticks), style=f"left:{100 * x_of(t):.2f}%") for t in x_ticks]
    return tag(
        "figure",
        tag("figcaption", tag("span", title, class_="chart-title"), tag("span", *keys, class_="legend")),
        tag(
            "div",
            tag("div", *y_labels, class_="y-labels", aria_hidden="true"),
            svg,
            tag("div", *x_labels, class_="x-labels", aria_hidden="true"),
            class_="plot",
        ),
        tag("div", x_label, class_="x-title"),
        class_="chart",
    )


def smoothed(points: Sequence[Point], half: int | None = None) -> list[Point]:
    """The mean over ``half`` neighbours on either side (a fortieth of the points by default); fewer towards the ends.

    A window that looks both ways does not lag behind a falling loss, as an exponential mean does.
    """
    kept = _finite(points)
    half = max(1, len(kept) // 40) if half is None else half
    sums = list(itertools.accumulate((y for _, y in kept), initial=0.0))
    out = []
    for index, (x, _) in enumerate(kept):
        reach = min(half, index, len(kept) - 1 - index)
        out.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return out


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about :data:`MAX_POINTS` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    buckets = MAX_POINTS // 2
    out: list[Point] = []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        lowest, highest = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        out += sorted({lowest, highest})
    return out


def nice_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) that span ``low`` to ``high``."""
    if high <= low:
        return [low]
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float, ticks: Sequence[float] = ()) -> str:
    """A value as a label: among ticks with as many decimals as their distance asks for, alone with three figures."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(value))
    if value == 0:
        return "0"
    if min(abs(value), step) < 1e-3 or abs(value) >= 1e7:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if not ticks:  # three significant figures of a value that stands alone
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    decimals = next((d for d in range(7) if math.isclose(round(step, d), step, rel_tol=1e-6)), 7)
    return f"{value:,.{decimals}f}"


def _axis(low: float, high: float, from_zero: bool) -> tuple[float, float, list[float]]:
    if from_zero or 0 <= low < 0.4 * high:
        low = 0.0
    if high == low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    ticks = nice_ticks(low, high, 5)
    return ticks[0], ticks[-1], ticks


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _unit(share: float) -> str:
    return f"{share * _SIZE:.1f}".rstrip("0").rstrip(".")
