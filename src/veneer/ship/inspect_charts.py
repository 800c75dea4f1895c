"""The picture of an inspection: each kind of module's spectrum, where in depth its change lives, and its size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from veneer.files import atomic_file
from veneer.ship.inspect import Inspection, LayerReport

_BLUE, _ORANGE, _RED, _GREY = "#2f6db3", "#c77d2a", "#c0392b", "#6b6b6b"
_ROW, _TOP = 1.75, 1.35  # inches: of one kind, and of the heading and the labels below


def save_picture(found: Inspection, path: str | Path) -> Path:
    """Writes ``found`` as a PNG: a row of charts for each kind of module.

    Raises:
        StorageError: it cannot be written.
    """
    kinds, target = found.kinds, Path(path)
    with_base = found.base is not None
    rank = max(layer.rank for layer in found.layers)
    columns = 3 if with_base else 2
    height = _TOP + _ROW * len(kinds)
    figure = Figure(figsize=(4.2 * columns, height), dpi=110, layout="constrained")
    grid = figure.subplots(len(kinds), columns, squeeze=False, sharex="col")
    depths = [layer.depth for layer in found.layers if layer.depth is not None]
    for row, (kind, layers) in zip(grid, kinds.items()):
        _spectrum(row[0], kind, layers, rank)
        _shares(row[1], layers, depths)
        if with_base:
            _against_base(row[2], layers, depths)
    most = max((share for layers in kinds.values() for share in _by_depth(layers).values()), default=1.0)
    for row in grid:
        row[1].set_ylim(0, 125 * most or 1)  # one scale: the kinds can be compared
    titles = [
        "singular values: median, lowest to highest",
        "share of the whole change (%)",
        "size against the base (%)",
    ]
    labels = ["direction", "layer", "layer"]
    for column in range(columns):
        grid[0][column].set_title(titles[column], fontsize=10, loc="left")
        grid[-1][column].set_xlabel(labels[column], fontsize=9)
    figure.align_ylabels(grid[:, 0])
    grid[0][0].set_xlim(0.5, rank + 0.5)  # of all rows
    figure.suptitle(
        f"{_name(found.adapter)}: uses {found.used_rank} of {rank} ranks", fontsize=12, x=0.01, ha="left", weight="bold"
    )
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format="png")
    return target


def _spectrum(axes: Axes, kind: str, layers: Sequence[LayerReport], rank: int) -> None:
    longest = max(len(layer.singular_values) for layer in layers)
    columns = [
        [v for layer in layers if index < len(layer.singular_values) and (v := layer.singular_values[index]) > 0]
        for index in range(longest)
    ]
    kept = [(index + 1, values) for index, values in enumerate(columns) if values]
    label = kind.replace(".", ".\n")  # a row has room for one name
    axes.set_ylabel(label, fontsize=10 if max(map(len, label.split("\n"))) <= 15 else 8, weight="bold")
    _plain(axes)
    if not kept:
        axes.text(0.5, 0.5, "no update", transform=axes.transAxes, ha="center", color=_GREY)
        return
    x = [index for index, _ in kept]
    axes.fill_between(x, [min(v) for _, v in kept], [max(v) for _, v in kept], color=_BLUE, alpha=0.2, linewidth=0)
    if len(x) == 1:  # a band of one direction has no width
        axes.vlines(x, min(kept[0][1]), max(kept[0][1]), color=_BLUE, alpha=0.2, linewidth=6)
    axes.plot(x, [statistics.median(v) for _, v in kept], color=_BLUE, marker="o" if len(x) <= 32 else "", markersize=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    used = statistics.median(layer.rank_99 for layer in layers)
    axes.axvline(used, color=_ORANGE, linestyle="--", linewidth=1.2)
    is_left = used <= rank / 2  # the text takes the side that has room
    axes.annotate(
        f"99 %: {used:g}", (used, 0.97), xycoords=("data", "axes fraction"), color=_ORANGE, fontsize=8,
        xytext=(3 if is_left else -3, 0), textcoords="offset points", ha="left" if is_left else "right", va="top",
    )  # fmt: skip


def _shares(axes: Axes, layers: Sequence[LayerReport], depths: Sequence[int]) -> None:
    shares = _by_depth(layers)
    axes.bar(list(shares), [100 * share for share in shares.values()], color=_BLUE, width=0.8)
    total = 100 * sum(layer.share for layer in layers)
    _say(axes, f"{total:.1f} % in all" + ("" if shares else ", outside of the layers"), _GREY)
    _plain(axes, depths)


def _against_base(axes: Axes, layers: Sequence[LayerReport], depths: Sequence[int]) -> None:
    _plain(axes, depths)
    points = [
        (layer.depth, layer.relative_norm, layer.base.new_directions)
        for layer in layers
        if layer.base is not None and layer.depth is not None and layer.relative_norm is not None
    ]
    if not points:
        sizes = [size for layer in layers if (size := layer.relative_norm) is not None]
        text = ", ".join(f"{100 * size:.3g} %" for size in sizes)
        _say(axes, f"{text}, outside of the layers" if sizes else "not compared", _GREY)
        axes.set_yticks([])
        return
    axes.scatter([depth for depth, _, _ in points], [100 * size for _, size, _ in points], s=14, color=_BLUE)
    fresh: dict[int, list[tuple[float, int]]] = {}
    for depth, size, new in points:
        if new:
            axes.scatter([depth], [100 * size], s=22, color=_RED)
            fresh.setdefault(depth, []).append((size, new))
    for depth, here in fresh.items():  # one number for all experts of a layer
        highest = max(size for at, size, _ in points if at == depth)
        axes.annotate(str(sum(new for _, new in here)), (depth, 100 * highest), xytext=(0, 4), fontsize=7,
                      textcoords="offset points", ha="center", color=_RED)  # fmt: skip
    axes.set_ylim(0, 135 * max(size for _, size, _ in points) or 1)
    if fresh:
        _say(axes, "red: how many directions are new", _RED)


def _by_depth(layers: Sequence[LayerReport]) -> dict[int, float]:
    """Summed: a layer may have many experts."""
    shares: dict[int, float] = {}
    for layer in layers:
        if layer.depth is not None:
            shares[layer.depth] = shares.get(layer.depth, 0.0) + layer.share
    return shares


def _say(axes: Axes, text: str, color: str) -> None:
    """In the upper left corner, on white: the lines of the grid do not run through it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.annotate(text, (0.02, 0.95), xycoords="axes fraction", fontsize=8, va="top", color=color, bbox=box)


def _plain(axes: Axes, depths: Sequence[int] = ()) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if depths:
        axes.set_xlim(min(depths) - 0.7, max(depths) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _name(adapter: Path) -> str:
    """A run's adapter lies in a folder of the same name in every run."""
    path = adapter.absolute()
    return path.parent.name if path.name == "adapter" else path.name
