"""docs/variants.md and its pictures, from the results of ``benchmarks.variants`` alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.quantisation_page import paragraph, table
from benchmarks.variants_advice import advice
from benchmarks.variants_charts import draw_drift, draw_losses
from benchmarks.variants_claims import Outcomes, against_reference, said, verdicts
from benchmarks.variants_cost import DORA_LIMITS, LIMIT, within_limits
from benchmarks.variants_figures import (
    Findings,
    Outcome,
    curve,
    drift,
    exact_match,
    median_of,
    perplexity,
    rank_rates,
    seeds_of,
    token_accuracy,
    trailing,
    window,
)
from benchmarks.variants_methods import METHODS
from benchmarks.variants_results import Record

MARKS = {-1: "better", 0: "", 1: "worse"}


def write_page(found: Findings, path: Path, note: str = "") -> None:
    """Writes the page, and its pictures beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found, path.stem, note), encoding="utf-8")
    for task, outcomes in found.tasks.items():
        draw_losses(outcomes, path.with_name(picture(path.stem, "loss", task)))
        draw_drift(outcomes, path.with_name(picture(path.stem, "drift", task)))


def picture(stem: str, what: str, task: str) -> str:
    """The file name of a picture."""
    return f"{stem}-{what}-{re.sub(r'[^a-z0-9]+', '-', task.lower()).strip('-')}.png"


def page(found: Findings, stem: str = "variants", note: str = "") -> str:
    """The whole page as Markdown; ``note`` is a paragraph on how it was measured."""
    parts = ["# The variants of LoRA, compared", *(paragraph(text) for text in (*_about(found), note) if text)]
    parts += ["## Which one should I use", *(paragraph(text) for text in advice(found))]
    parts.append(
        paragraph(
            "Percentages are of the reference's perplexity, one for each task. These sentences are derived from the "
            "tables below by fixed rules, and change with them. They are about this base, these rows and runs of this "
            "length; with so many comparisons, one or two differences may be chance after all."
        )
    )
    parts += ["## What the literature says", _claims(found)]
    for task, outcomes in found.tasks.items():
        parts += [f"## Quality: {task}", *_quality(found, task, outcomes, stem)]
    parts += ["## Speed, memory and size", *_sizes(found)]
    if found.failures:
        parts += ["## Not measured", _failures(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(found: Findings) -> list[str]:
    told = []
    for task, records in found.runs.items():
        common, machine = records[-1]["common"], records[-1]["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        if commits := sorted({record["machine"]["commit"] for record in records if record["machine"].get("commit")}):
            versions += f" at commit {', '.join(commits)}"
        half = len(records[-1]["tokens"]) // 2
        searched = any(len(outcome.by_rate) > 1 for outcome in found.tasks[task].values())
        rates = (
            f"{half} held-out rows chose each method's learning rate (seed 0), "
            if searched
            else "The learning rates were not searched here; "
        )
        told.append(
            f"{task}: {common['base']} in {machine['dtype']}, {common['steps']} steps of {common['batch']} rows on "
            f"{machine['device']} ({machine['processor']}, threads of each run: {machine['threads']}, runs at a time: "
            f"{machine['workers']}), with {versions}. {rates}{len(records[-1]['tokens']) - half} "
            f"{'others' if searched else 'held-out rows'} are reported."
        )
    return [
        "Written by `python -m benchmarks.variants` from its file of results. All linear layers, rank 16 and "
        "lora_alpha 32 unless the name says otherwise; within a seed every method sees the same rows in the same "
        "order. "
        'Intervals hold 95 % of paired resamples of the rows, of the mean over the seeds; a method is "better" or '
        '"worse" where the interval leaves out zero and every seed says the same.',
        *told,
    ]


def _claims(found: Findings) -> str:
    rows = [[v.claim, v.task, v.measured, v.verdict] for v in verdicts(found.tasks)]
    return table(["claim", "task", "measured", "verdict"], rows, left=4)


def _quality(found: Findings, task: str, outcomes: Outcomes, stem: str) -> list[str]:
    base = found.base(task)
    answered = any("exact" in outcome.records[0] for outcome in outcomes.values())
    titles = ["method", "rate", "seeds", "perplexity", "against its reference", "", "token accuracy"]
    rows = [["the base", "", "", *_scores([base], answered, None)]] if base is not None else []
    for name, outcome in outcomes.items():
        delta = against_reference(outcomes, name)
        rate = f"{outcome.rate:g}{' (edge)' if outcome.at_the_edge else ''}"
        told = None if delta is None else (said(delta), MARKS[delta.sign])
        seeds = str(len(seeds_of(outcome.records)))
        rows.append([METHODS[name].label, rate, seeds, *_scores(outcome.records, answered, told)])
    parts = [
        table([*titles, *(["exact match"] if answered else []), "KL from the base"], rows),
        paragraph(
            "The reference is LoRA of rank 16 or, for LoftQ, LoRA over NF4, and for rsLoRA of rank 64 LoRA of rank 64. "
            '"Edge": the best learning rate was the smallest or the largest that was tried. The drift is the mean KL '
            "from the base on the base's own greedy answers to general prompts, in nats per token."
        ),
        f"![training loss by method]({picture(stem, 'loss', task)})",
        f"![perplexity against drift]({picture(stem, 'drift', task)})",
        "Training loss at equal steps (mean over the seeds, smoothed over a tenth of the run):",
        _losses(outcomes),
    ]
    by_rank = rank_rates(dict(outcomes))
    if len(by_rank) > 1 and any(len(losses) > 1 for losses in by_rank.values()):
        parts += ["Loss (nats per token) of the rows that choose, by rank of plain LoRA and learning rate:"]
        parts += [_grid(by_rank)]
    return parts


def _scores(records: list[Record], answered: bool, told: tuple[str, str] | None) -> list[str]:
    value = perplexity(records).value
    cells = [f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})", *(told or ("", ""))]
    cells.append(f"{token_accuracy(records).value.value:.2f} %")
    if answered:
        exact = exact_match(records).value if all("exact" in record for record in records) else None
        cells.append("" if exact is None else f"{exact.value:.1f} % ({exact.low:.1f} to {exact.high:.1f})")
    cells.append(f"{drift(records).value.value:.4f}" if all("drift" in record for record in records) else "")
    return cells


def _losses(outcomes: Outcomes) -> str:
    shares = (0.25, 0.5, 0.75, 1.0)
    rows = []
    for name, outcome in outcomes.items():
        if METHODS[name].steps != 1.0:
            continue
        losses = curve(outcome.records)
        smooth = trailing(losses, window(len(losses)))
        cells = []
        for share in shares:
            place = round(share * len(losses)) - window(len(losses))
            cells.append(f"{smooth[place]:.4f}" if place >= 0 else "")
        rows.append([METHODS[name].label, *cells])
    return table(["method", *(f"{100 * share:.0f} % of the steps" for share in shares)], rows)


def _grid(by_rank: Mapping[int, Mapping[float, float]]) -> str:
    rates = sorted({rate for losses in by_rank.values() for rate in losses})
    rows = []
    for rank, losses in by_rank.items():
        best = min(losses.values())
        cells = [f"{losses[r]:.4f}" if r in losses else "" for r in rates]
        rows.append([f"r {rank}", *(f"**{c}**" if c == f"{best:.4f}" else c for c in cells)])
    return table(["", *(f"{rate:g}" for rate in rates)], rows)


def _sizes(found: Findings) -> list[str]:
    parts = []
    for task, outcomes in found.tasks.items():
        rows = [[METHODS[name].label, *_size(outcome)] for name, outcome in outcomes.items()]
        titles = [task, "tokens/s", "peak GB", "to the first step, s", "trained", "adapter MB"]
        parts.append(table(titles, rows))
    parts.append(
        paragraph(
            "Medians over the seeds (speed: of each run's median step), of runs at different times: small differences "
            "of speed are the machine's. Peak memory is that of the whole process, initialisation and all. The seconds "
            "to the first step are those from the loaded base on: initialisation, rendering of the rows, checks. MB "
            "and GB are 10^6 and 10^9 bytes."
        )
    )
    if found.costs:
        parts += [
            "Against the reference, in turn with it (medians of paired ratios; memory from the first step on, and of "
            "the whole process):",
            cost_table(found.costs),
            paragraph(
                f"{_costs_about(found.costs)}The targets: DoRA at most {DORA_LIMITS[0]:.2f} times LoRA's step time and "
                f"{DORA_LIMITS[1]:.2f} times its memory, every other variant at most {LIMIT:.2f} times both after "
                "initialisation."
            ),
        ]
    return parts


def _size(outcome: Outcome) -> list[str]:
    records = outcome.records
    return [
        f"{median_of(records, 'tokens_per_second'):,.0f}",
        f"{median_of(records, 'peak_gb'):.2f}",
        f"{median_of(records, 'init_seconds'):.1f}",
        f"{records[0]['trained_parameters']:,}",
        f"{median_of(records, 'adapter_mb'):.1f}",
    ]


def _costs_about(costs: Mapping[str, Record]) -> str:
    """What the costs were measured with."""
    whose: dict[str, list[str]] = {}
    for name, cost in costs.items():
        common, machine = cost["common"], cost["machine"]
        told = f"{common['base']} in {machine['dtype']} on {machine['device']} ({machine['processor']}, "
        told += f"{machine['threads']} threads), {common['batch']} rows a step, {len(cost['steps'])} pairs of blocks"
        told += f", at commit {machine['commit']}" if machine.get("commit") else ""
        whose.setdefault(told, []).append(METHODS[name].label)
    return "".join(f"{', '.join(names)}: {told}. " for told, names in whose.items())


def cost_table(costs: Mapping[str, Record]) -> str:
    """Step time and memory of each method against its reference."""
    rows = []
    for name in METHODS:
        if name not in costs:
            continue
        cost = costs[name]
        rows.append(
            [
                METHODS[name].label,
                METHODS[cost["reference"]].label,
                f"{cost['step_ratio']:.3f} ({cost['step_low']:.3f} to {cost['step_high']:.3f})",
                f"{cost['memory_ratio']:.3f}",
                f"{cost['whole_ratio']:.3f}",
                "reached" if within_limits(name, cost) else "not reached",
            ]
        )
    return table(["method", "against", "step time (quartiles)", "memory", "whole process", "target"], rows, left=2)


def _failures(found: Findings) -> str:
    labels = {name: method.label for name, method in METHODS.items()}
    told = [[labels.get(r["method"], "the base"), r["task"], r["error"]] for r in found.failures]
    rows = [row for place, row in enumerate(told) if row not in told[:place]]
    return table(["method", "task", "error"], rows, left=3)
