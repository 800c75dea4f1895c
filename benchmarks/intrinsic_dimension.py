"""The intrinsic dimension of the demo's task (Aghajanyan et al. 2020): how few numbers have to be trained.

    python -m benchmarks.intrinsic_dimension [--results intrinsic.jsonl] [--plot intrinsic.png] [--json] [--quick]

LoRA's factors, all ``D`` of them, are held to ``theta_0 + P theta`` with a fixed random ``P [D, d]`` (Fastfood, as in
the paper), and only ``theta [d]`` is trained, for growing ``d``. ``d90`` is the smallest ``d`` that reaches 90 % of
what all ``D`` gain over the base.

The paper's ``D`` are all weights of the model. Here the base is frozen and LoRA's factors are what training can reach,
so that ``d90`` is relative to full LoRA and says how many of *its* numbers the task needs. The update is bilinear in
the factors: figures are not comparable with the paper's one to one. All layers share one subspace (the paper's DID; its
structure-aware variant would give each layer a scale of its own).

Each ``d`` takes the best of ``--rates``, by the loss on the half of the held-out rows that is not reported. A row of
``P`` has a norm of one, so that a rate means the same step of the factors at every ``d``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import in_process
from benchmarks.quantisation_page import table as markdown_table
from benchmarks.variants import Task, prepare_task, reason, say
from benchmarks.variants_methods import settings_hash
from benchmarks.variants_results import Record, Results, key_of

MODULE = "benchmarks.intrinsic_dimension_run"
FULL = 0  # the dimension that stands for all D numbers
SHARE = 0.9
QUICK: dict[str, Any] = {
    "dimensions": "64,1024",
    "rates": "2e-3",
    "steps": 12,
    "rows": 96,
    "held_out": 16,
    "answers": 0,
}


def run(options: argparse.Namespace, results: Results, folder: Path) -> None:
    """Measures what the results lack: the base, all of LoRA, then each subspace, each at every rate."""
    task = prepare_task(options, None, folder / "task")
    base = record_of(options, task, "base", FULL, 0.0)
    measure(options, results, task, base, folder, "benchmarks.variants_run", "base")
    for dimension in [FULL, *options.dimensions]:
        for rate in options.rates:
            record = record_of(options, task, "full" if dimension == FULL else str(dimension), dimension, rate)
            measure(options, results, task, record, folder, MODULE, "run")


def record_of(options: argparse.Namespace, task: Task, method: str, dimension: int, rate: float) -> Record:
    keys = ("base", "dtype", "device", "steps", "batch", "max_length", "seed")
    common = {**{key: getattr(options, key) for key in keys}, "rows": task.digest}
    own = {"dimension": dimension, "learning_rate": rate}
    return {
        "method": method,
        "task": task.label,
        "seed": options.seed,
        **own,
        "common": common,
        "settings_hash": settings_hash({**common, **own}),
    }


def measure(
    options: argparse.Namespace, results: Results, task: Task, record: Record, folder: Path, module: str, name: str
) -> None:
    """Runs what a record stands for, unless it is there, and adds it."""
    if results.get(key_of(record)) is not None:
        return
    say(f"d {record['method']}, rate {record['learning_rate']:g}")
    general = folder / "general.json"
    general.write_text("[]")  # drift is not asked for here
    job = {
        **record,
        **record["common"],
        "rows": str(task.rows),
        "held_out": str(task.held_out),
        "answers": task.answers,
        "general": str(general),
        "folder": str(folder),
        "threads": options.threads,
    }
    try:
        figures = in_process(module, name, job)
    except SystemExit as failure:
        figures = {"error": reason(failure)}
        say(f"  failed: {figures['error']}")
    results.add({**record, **figures})


# --- what follows from the records -----------------------------------------------------------------------------------


def half(values: Sequence[float], reported: bool) -> Sequence[float]:
    """The half of the held-out rows that is reported, or the one that chooses."""
    middle = len(values) // 2
    return values[middle:] if reported else values[:middle]


def loss(record: Record, reported: bool = True) -> float:
    """Nats per token."""
    return sum(half(record["nll"], reported)) / sum(half(record["tokens"], reported))


def accuracy(record: Record) -> float:
    """Per cent of the tokens."""
    return 100 * sum(half(record["correct"], True)) / sum(half(record["tokens"], True))


def exact(record: Record) -> float:
    """Per cent of the answers."""
    return 100 * sum(record["exact"]) / len(record["exact"])


METRICS: dict[str, Callable[[Record], float]] = {
    "log-likelihood": lambda record: -loss(record),
    "token accuracy": accuracy,
    "exact match": exact,
}


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Each dimension at its best rate, its share of full LoRA's gain by metric, and ``d90``.

    Returns:
        ``size`` (D), ``steps``, ``dimensions`` (a list of rows: dimension, rate, loss, and by metric its value and its
        share of the gain), and ``d90`` by metric: None where no dimension reaches it, or all of LoRA gains nothing.

    Raises:
        SystemExit: the base or all of LoRA was not measured.
    """
    last = records[-1]["common"] if records else {}
    mine = [record for record in records if record["common"] == last]
    best: dict[int, Record] = {}
    for record in mine:
        before = best.get(record["dimension"])
        if record["method"] != "base" and (before is None or loss(record, False) < loss(before, False)):
            best[record["dimension"]] = record
    base = next((record for record in mine if record["method"] == "base"), None)
    if base is None or FULL not in best:
        raise SystemExit("the base and full LoRA have to be measured first: run again, they are taken up")
    size = best[FULL]["size"]
    metrics = {name: f for name, f in METRICS.items() if name != "exact match" or "exact" in base}
    rows = []
    for dimension in sorted(best, key=lambda d: d or size):
        record = best[dimension]
        shares = {name: _share(f, record, base, best[FULL]) for name, f in metrics.items()}
        values = {name: f(record) for name, f in metrics.items()}
        rows.append(
            {
                "dimension": dimension or size,
                "rate": record["learning_rate"],
                "loss": loss(record),
                "values": values,
                "shares": shares,
            }
        )
    return {
        "size": size,
        "common": last,
        "base": {"loss": loss(base), "values": {name: f(base) for name, f in metrics.items()}},
        "dimensions": rows,
        "d90": {name: d90(rows, name) for name in metrics},
    }


def _share(metric: Callable[[Record], float], record: Record, base: Record, full: Record) -> float | None:
    whole = metric(full) - metric(base)
    return (metric(record) - metric(base)) / whole if whole > 0 else None


def d90(rows: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The smallest dimension measured with at least 90 % of the gain; None where there is none."""
    reaching = [row["dimension"] for row in rows if (row["shares"][metric] or 0.0) >= SHARE]
    return min(reaching, default=None)


def table(found: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    metrics = list(found["d90"])
    shown = [name for name in metrics if name != "log-likelihood"]
    titles = ["d", "of D", "rate", "loss", *shown, *(f"gain in {name}" for name in metrics)]
    base = found["base"]
    rows = [["the base", "", "", f"{base['loss']:.4f}", *(f"{base['values'][n]:.1f} %" for n in shown)]]
    rows[0] += [""] * len(metrics)
    for row in found["dimensions"]:
        shares = ["" if (share := row["shares"][n]) is None else f"{100 * share:.0f} %" for n in metrics]
        values = [f"{row['values'][name]:.1f} %" for name in shown]
        size = "all" if row["dimension"] == found["size"] else f"{100 * row['dimension'] / found['size']:.3g} %"
        rows.append([f"{row['dimension']:,}", size, f"{row['rate']:g}", f"{row['loss']:.4f}", *values, *shares])
    common = found["common"]
    lines = [
        f"{common['base']}, LoRA of rank 16 on all linear layers (D = {found['size']:,}), {common['steps']} steps of "
        f"{common['batch']} rows of the demo's task",
        "",
        markdown_table(titles, rows),
        "",
    ]
    for name, dimension in found["d90"].items():
        told = "not reached by a dimension that was tried" if dimension is None else f"{dimension:,}"
        lines.append(f"d90 by {name}: {told}" + (" (all of LoRA)" if dimension == found["size"] else ""))
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The share of full LoRA's gain against the dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name in found["d90"]:
        points = [
            (r["dimension"], 100 * r["shares"][name]) for r in found["dimensions"] if r["shares"][name] is not None
        ]
        axis.plot([d for d, _ in points], [share for _, share in points], "o-", markersize=4, label=name)
    axis.axhline(100 * SHARE, color="#9a9a9a", linestyle="--", linewidth=1, label=f"{100 * SHARE:.0f} %")
    axis.set_xscale("log")
    axis.set_xlabel("trained dimensions d (the last point: all of LoRA)")
    axis.set_ylabel("share of full LoRA's gain, %")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    import os

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.intrinsic_dimension", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines; what it holds is not run again")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the gain against d there (PNG)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quick", action="store_true", help="two dimensions, one rate, few steps")
    parser.add_argument("--dimensions", default="16,64,256,1024,4096,16384,65536")
    parser.add_argument("--rates", default="5e-4,2e-3,8e-3", help="learning rates; each dimension takes its best")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=128, help="half of them choose the rates, half are reported")
    parser.add_argument("--answers", type=int, default=32, help="of the reported rows, for exact match")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start, the order of rows, the subspace")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.dimensions = sorted({int(d) for d in options.dimensions.split(",")})
    options.rates = [float(rate) for rate in options.rates.split(",")]
    if options.dimensions[0] < 1 or options.held_out < 4 or options.rows < options.batch:
        parser.error("--dimensions must be at least 1, --held-out at least 4, --rows at least --batch")
    if options.answers > options.held_out - options.held_out // 2:
        parser.error("--answers cannot be more than the rows that are reported: half of --held-out")
    return options


def main() -> None:
    options = parse()
    results = Results(options.results)
    with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
        run(options, results, Path(folder))
    for failure in results.failures():
        print(f"d {failure['method']} failed: {failure['error']}", file=sys.stderr)
    found = summary(list(results))
    if options.plot is not None:
        draw(found, options.plot)
        say(f"wrote {options.plot}")
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    main()
