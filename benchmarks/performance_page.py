"""docs/performance.md and its pictures, from the records of ``benchmarks.performance`` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quantisation_page import paragraph
from benchmarks.sft import dtypes, verdict

Record = Mapping[str, Any]
# (peer, quantize): least speed, most memory; None where nothing was promised.
TARGETS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("trl", "none"): (8.0, 0.3),
    ("peft", "none"): (3.0, 0.5),
    ("peft", "nf4"): (3.0, None),
}
NAMES = {
    "veneer": "Veneer",
    "trl": "TRL's SFTTrainer, its defaults",
    "trl-nockpt": "TRL without checkpointing",
    "peft": "a loop over PEFT",
    "litgpt": "LitGPT's `finetune lora`",
    "llamafactory": "LLaMA-Factory, its defaults",
}


def write_page(records: Mapping[str, Record], path: Path) -> None:
    """Writes the page, and a picture for each comparison with peers and for growth, beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Record]] = {}
    for record in records.values():
        parts.setdefault(record["part"], []).append(record)
    sections = [_head(parts)]
    for record in parts.get("peers", []):
        picture = path.with_name(f"performance-curves-{record['settings']['quantize']}.png")
        draw_curves(record, picture)
        sections.append(_peers(record, picture.name))
    if "generation" in parts:
        sections.append(_generation(parts["generation"][0]))
    if "ratios" in parts:
        sections.append(_ratios(parts["ratios"]))
    if "growth" in parts:
        picture = path.with_name("performance-growth.png")
        draw_growth(parts["growth"], picture)
        sections.append(_growth(parts["growth"], picture.name))
    sections.append(_not_measured(parts))
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _not_measured(parts: Mapping[str, list[Record]]) -> str:
    """What the page could hold and the file of results does not."""
    wanted = {"generation": "writing against transformers", "ratios": "what settings cost", "growth": "how cost grows"}
    lacking = [text for part, text in wanted.items() if part not in parts]
    records = {record["settings"]["quantize"]: record for record in parts.get("peers", [])}
    for quantize, names in (("none", tuple(NAMES)), ("nf4", ("trl", "peft"))):
        results = records[quantize]["results"] if quantize in records else {}
        lacking += [f"training against {NAMES[n]}, quantize {quantize}" for n in names if n not in {"veneer", *results}]
    lacking += ["any other processor than the one above", "a GPU (`python -m benchmarks.gpu`)"]
    return "\n".join(["## Not measured", "", *(f"- {text}" for text in lacking)])


def _head(parts: Mapping[str, list[Record]]) -> str:
    (found,) = parts.get("machine", [{}])
    machine = (
        f"{found['processor']} with {', '.join(found['features'])}; {found['threads']} threads, "
        f"{found['memory_gb']} GB, torch {found['torch']}"
        if found
        else "unknown"
    )
    return "# Speed and memory\n\n" + paragraph(
        "Written by `python -m benchmarks.performance` from its file of results. Ratios of programs that ran in turn "
        "on one machine are what carries over to another one; absolute speeds are those of the machine and its hour. "
        f"Measured on {machine}{_commits(parts)}."
    )


def _commits(parts: Mapping[str, list[Record]]) -> str:
    """Which code was measured."""
    found: dict[str, list[str]] = {}
    for part in [part for part in parts if part != "machine"]:
        for commit in sorted({record["commit"] for record in parts[part] if record.get("commit")}):
            found.setdefault(commit, []).append(part)
    if len(found) < 2:
        return "".join(f", at commit {commit}" for commit in found)
    return ", at commits " + ", ".join(f"{commit} ({', '.join(of)})" for commit, of in found.items())


def _peers(record: Record, picture: str) -> str:
    settings, quantize = record["settings"], record["settings"]["quantize"]
    rows = []
    for name, result in record["results"].items():
        told = ""
        if name != "veneer":
            curve = result["curve"]
            told = (
                f"within {curve['relative']:.2%}" if curve["agrees"] else f"{curve['relative']:.2%}: {verdict(curve)}"
            )
        rows.append(
            f"| {NAMES[name]} | {result['tokens_per_second']:.0f} | {result['trained_tokens_per_second']:.0f} "
            f"| {result['share_of_peak']:.0%} | {result['peak_rss_gb']:.2f} | {result['first_step_seconds']:.1f} "
            f"| {_ratio(result, 'speed_ratio')} | {_ratio(result, 'memory_ratio')} | {told} |"
        )
    what = "16 bits" if quantize == "none" else "4 bits (NF4, double quantisation; the peers over bitsandbytes)"
    runs = "One run each" if settings["runs"] == 1 else f"Medians of {settings['runs']} runs in turn"
    lines = [
        f"## Training in {what}",
        "",
        paragraph(
            f"{settings['base']} in {dtypes(settings)}, rank 16 on all linear layers, {settings['batch']} rows a "
            f"step, {settings['steps']} steps of {settings['data']} ({settings['tokens']} tokens, of which Veneer "
            f"computes {settings['computed_tokens']}: what rows begin with alike it computes once); the same ids, "
            "order, start of the adapter and learning rates for everybody. "
            f"{runs}; speed from step {record['warm_up_steps'] + 1} on. The machine makes "
            f"{record['peak_flops'] / 1e12:.2f} TFLOP/s of products at most; "
            '"of peak" is the share of that which the products of the frozen weights make up.'
        ),
        "",
        "| | tokens/s | trained tokens/s | of peak | peak GB | first step, s | Veneer's speed | its memory | loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        *rows,
        "",
        *_verdicts(record, quantize),
        "",
        f"![training loss of each program]({picture})",
    ]
    return "\n".join(lines)


def _ratio(result: Record, name: str) -> str:
    return f"{result[name]:.2f} x" if name in result else ""


def _verdicts(record: Record, quantize: str) -> list[str]:
    lines = []
    for (peer, scheme), (speed, memory) in TARGETS.items():
        ratios = record["ratios"].get(peer)
        if scheme != quantize or ratios is None:
            continue
        parts = []
        if ratios.get("void"):
            lines.append(f"- Against {NAMES[peer]}: void, the loss curves part by more than rounding.")
            continue
        if speed is not None:
            parts.append(_held(f"at least {speed:g} times the speed", ratios["speed"], ratios["speed"] >= speed))
        if memory is not None:
            parts.append(_held(f"at most {memory:g} times the memory", ratios["memory"], ratios["memory"] <= memory))
        lines.append(f"- Against {NAMES[peer]}: {'; '.join(parts)}.")
    return lines


def _held(promise: str, value: float, reached: bool) -> str:
    return f"{promise}: {'reached' if reached else '**missed**'} ({value:.2f})"


def _generation(record: Record) -> str:
    settings = record["settings"]
    lines = [
        "## Generation",
        "",
        paragraph(
            f"{settings['tokens']} new tokens a row, the likeliest ones, against transformers' `generate` (PEFT's "
            "layers where there is an adapter); tokens a second over the whole call. The target is "
            f"{record['target']:g} times."
        ),
        "",
        "| rows at once | adapter | Veneer | transformers | ratio | memory | texts part after |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for entry in record["results"]:
        mark = "" if entry["ratio"] >= record["target"] else " (missed)"
        lines.append(
            f"| {entry['rows']} | {'yes' if entry['adapter'] else 'no'} | {entry['veneer']:.0f} "
            f"| {entry['transformers']:.0f} | {entry['ratio']:.2f} x{mark} | {entry['memory_ratio']:.2f} x "
            f"| {entry['same']:.0%} |"
        )
    lines += [
        "",
        "Texts part where two tokens are equally likely but for rounding in bfloat16; in float32 they are the same.",
    ]
    return "\n".join(lines)


def _ratios(records: Iterable[Record]) -> str:
    lines = [
        "## What settings cost",
        "",
        "Time of a step, the two in turn, block by block: medians of the pairs, with their quartiles.",
        "",
        "| | time | memory | limit of the time |",
        "|---|---:|---:|---|",
    ]
    for record in records:
        reached = "reached" if record["step_ratio"] <= record["limit"] else "**missed**"
        quartiles = f"{record['step_low']:.3f} to {record['step_high']:.3f}"
        lines.append(
            f"| {record['name']} | {record['step_ratio']:.3f} ({quartiles}) | {record['memory_ratio']:.3f} "
            f"| {record['limit']:.2f}: {reached} |"
        )
    return "\n".join(lines)


def _growth(records: Iterable[Record], picture: str) -> str:
    lines = [
        "## How cost grows",
        "",
        "Veneer alone; every row trained whole unless the axis says otherwise. Tokens are those of a step.",
        "",
        f"![speed and memory over each axis]({picture})",
        "",
        "| | tokens a step | trained | tokens/s | peak GB |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['axis']}: {r['value']} | {r['tokens']:.0f} | {r['trained']:.0%} | {r['tokens_per_second']:.0f} "
        f"| {r['peak_rss_gb']:.2f} |"
        for r in records
    ]
    return "\n".join(lines)


def draw_curves(record: Record, path: Path) -> None:
    """The loss of every program over the steps, one upon the other."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, result) in enumerate(reversed(record["results"].items())):
        steps = range(1, len(result["losses"]) + 1)
        axis.plot(steps, result["losses"], label=NAMES[name], linewidth=5 - number, alpha=0.75)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_growth(records: Iterable[Record], path: Path) -> None:
    """Speed above, memory below, a column for each axis."""
    axes: dict[str, list[Record]] = {}
    for record in records:
        axes.setdefault(record["axis"], []).append(record)
    figure = Figure(figsize=(2.6 * len(axes), 4.6), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for column, (name, points) in enumerate(axes.items()):
        labels = [str(point["value"]) for point in points]
        for line, key in enumerate(("tokens_per_second", "peak_rss_gb")):
            axis = grid[line][column]
            axis.plot(labels, [point[key] for point in points], marker="o", color="#1f5fa8")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=7)
        grid[1][column].set_xlabel(name, fontsize=8)
    grid[0][0].set_ylabel("tokens/s", fontsize=8)
    grid[1][0].set_ylabel("peak GB", fontsize=8)
    figure.savefig(path, dpi=110)
