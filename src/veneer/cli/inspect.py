"""``veneer inspect``: what an adapter's update is made of, layer by layer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import AllowBaseMismatch, Base, Device, Json, Quiet

if TYPE_CHECKING:
    from rich.table import Table

    from veneer.ship import Inspection, LayerReport


def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")],
    layers: Annotated[bool, typer.Option("--layers", help="A line for every layer, too.")] = False,
    compare: Annotated[
        bool | None,
        typer.Option(
            "--with-base/--no-base",
            help="Compare with the base's weights.  [default: where the base can be loaded]",
            show_default=False,
        ),
    ] = None,
    directions: Annotated[
        int, typer.Option(min=0, help="Leading directions of each adapted weight that are looked for in the base's.")
    ] = 10,
    picture: Annotated[
        Path | None, typer.Option(help="The picture, a PNG.  [default: inspect.png in the folder]", show_default=False)
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Draw none.")] = False,
    device: Device = "auto",
    base: Base = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look inside an adapter: how many of its ranks are used, how large the change is, where in depth it lives.

    Of each layer's update: the effective rank (exp of the entropy of its singular values), the directions that hold 90
    and 99 % of its energy, its norm. Against the base's weight: the relative size, and how many leading directions of
    the adapted weight are new: their cosine with every singular vector of the base's is below 0.5.
    """
    from veneer.cli.output import console, print_json, short_path, stdout_reserved
    from veneer.cli.progress import Counter

    with stdout_reserved(json):
        from veneer.ship import inspect_adapter
        from veneer.ship.inspect_charts import save_picture

        counter = Counter(quiet=quiet)
        found = inspect_adapter(
            run,
            compare=compare,
            base=base,
            device=device,
            directions=directions,
            allow_base_mismatch=allow_base_mismatch,
            progress=lambda done, total: counter("compared layers", done, total),
        )
        drawn = None if no_picture else save_picture(found, picture or Path(run).expanduser() / "inspect.png")
    if json:
        print_json({**found.to_dict(), "picture": None if drawn is None else str(drawn)})
        return
    if layers:
        console().print(_layer_table(found))
    console().print(_kind_table(found))
    print(_depth_line(found))
    if found.others:
        numbers = sum(found.others.values())
        print(f"beside the updates: {numbers:,} numbers in whole modules or rows of tokens, which have no spectrum")
    for line in [*found.advice, *(f"note: {note}" for note in found.notes)]:
        print(line)
    if drawn is not None:
        print(f"picture: {short_path(drawn.absolute())}")


def _kind_table(found: Inspection) -> Table:
    """A line for each kind of module: medians over its layers, with the lowest and the highest."""
    from rich import box
    from rich.table import Table

    title = f"{found.adapter}: the ranks that are used, medians over the layers (lowest-highest)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings = ["module", "layers", "rank", "effective", "90 %", "99 %", "norm", "share %"]
    if found.base is not None:
        headings += ["% of base", "new"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "module" else "right", no_wrap=True)
    for kind, layers in found.kinds.items():
        cells = [
            kind,
            str(len(layers)),
            _span([layer.rank for layer in layers], "g"),
            _span([layer.effective_rank for layer in layers], ".1f", ".0f"),
            _span([layer.rank_90 for layer in layers], "g"),
            _span([layer.rank_99 for layer in layers], "g"),
            _span([layer.norm for layer in layers], ".2g"),
            f"{100 * sum(layer.share for layer in layers):.1f}",
        ]
        if found.base is not None:
            sizes = [size for layer in layers if (size := layer.relative_norm) is not None]
            compared = [layer.base for layer in layers if layer.base is not None and layer.base.cosines]
            new, of = sum(base.new_directions for base in compared), sum(len(base.cosines) for base in compared)
            cells += [_span(sizes, _percent) if sizes else "-", f"{new}/{of}" if of else "-"]
        table.add_row(*cells)
    return table


def _layer_table(found: Inspection) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="layer by layer", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    headings = ["layer", "rank", "effective", "90 %", "99 %", "norm", "largest", "share %"]
    if found.base is not None:
        headings += ["% of base", "largest %", "new"]
    longest = max(len(layer.path) for layer in found.layers)
    for heading in headings:
        first = heading == "layer"
        table.add_column(heading, justify="left" if first else "right", min_width=longest if first else None)
    for layer in found.layers:
        table.add_row(layer.path, *_layer_cells(layer), *(_base_cells(layer) if found.base is not None else ()))
    return table


def _layer_cells(layer: LayerReport) -> list[str]:
    return [
        str(layer.rank),
        f"{layer.effective_rank:.1f}",
        str(layer.rank_90),
        str(layer.rank_99),
        f"{layer.norm:.3g}",
        f"{layer.spectral_norm:.3g}",
        f"{100 * layer.share:.2f}",
    ]


def _base_cells(layer: LayerReport) -> list[str]:
    size, largest = layer.relative_norm, layer.relative_spectral_norm
    if layer.base is None or size is None or largest is None:
        return ["-", "-", "-"]
    new = f"{layer.base.new_directions}/{len(layer.base.cosines)}" if layer.base.cosines else "-"
    return [_percent(size), _percent(largest), new]


def _span(values: Sequence[float], form: str | Callable[[float], str], ends: str = "") -> str:
    """``median (lowest-highest)``; one number where all are the same."""

    def said(value: float, form: str | Callable[[float], str]) -> str:
        return format(value, form) if isinstance(form, str) else form(value)

    middle = said(statistics.median(values), form)
    low, high = (said(end, ends or form) for end in (min(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def _depth_line(found: Inspection) -> str:
    """The share of the change in each third of the depth, and the layer with most of it."""
    profile = found.depth_profile
    outside = sum(layer.share for layer in found.layers if layer.depth is None)
    beyond = f"; outside of the layers {100 * outside:.0f} %" if outside else ""
    if not profile:
        return f"depth: no update lies in a layer{beyond}"
    if len(profile) < 3 or not any(profile.values()):
        return "depth: " + ", ".join(f"layer {depth} {100 * share:.0f} %" for depth, share in profile.items()) + beyond
    depths = list(profile)
    cuts = [depths[len(depths) * part // 3 : len(depths) * (part + 1) // 3] for part in range(3)]
    thirds = [
        f"{f'layers {part[0]} to {part[-1]}' if len(part) > 1 else f'layer {part[0]}'} "
        f"{100 * sum(profile[d] for d in part):.0f} %"
        for part in cuts
    ]
    most = max(profile, key=profile.__getitem__)
    return f"depth: {', '.join(thirds)} of the change; most in layer {most} ({100 * profile[most]:.1f} %){beyond}"


def _percent(share: float) -> str:
    """Two digits that count; a hundred and more as whole numbers."""
    return f"{100 * share:.0f}" if share >= 0.995 else f"{100 * share:.2g}"
