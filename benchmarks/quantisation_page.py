"""docs/quantisation.md, from what ``benchmarks.quantisation`` measured."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH = 118


def page(report: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    settings = report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    machine = f"{settings['dtype']} on a CPU ({settings['cpu']}, {settings['threads']} threads)"
    parts = [
        "# What quantisation costs",
        paragraph(f"Written by `{report['command']}`, with {versions}, in {machine}."),
        "## Errors and size",
        *_about_errors(settings),
        _error_table(report["storages"]),
        "## Perplexity",
        *_about_perplexity(settings),
        _perplexity_table(report["storages"], trained=settings["steps"] > 0),
        "## What the literature says",
        table(
            ["claim", "as measured here", ""],
            [[claim["claim"], claim["measured"], claim["verdict"]] for claim in report["claims"]],
            left=3,
        ),
        "Each verdict is about this model, these rows and this short run, and no other.",
    ]
    return "\n\n".join(parts) + "\n"


def _about_errors(settings: dict[str, Any]) -> list[str]:
    rows, columns = settings["gaussian"]
    paragraphs = [
        f"Errors are relative root mean squares: of a Gaussian weight of {rows:,} x {columns:,}; of the weights of all "
        f"linear layers of {settings['base']} together; and of what these layers give for their own inputs at "
        f"{settings['positions']} positions of {settings['label']} (the root mean square over the layers). Bits per "
        "parameter are counted from the stored bytes, scales and all. Embeddings, head and norms are not quantised. "
        'INT4 is the yardstick: 15 even steps in the same blocks. "Double" is double quantisation of the scales.'
    ]
    if settings["stored_as"]:
        paragraphs.append(
            f'The bundled model\'s weights come from a file of {settings["stored_as"]}: "not quantised" means these '
            "numbers as they are, which lie on a coarse grid of their own already. The Gaussian column is free of that."
        )
    return [paragraph(text) for text in paragraphs]


def _about_perplexity(settings: dict[str, Any]) -> list[str]:
    paragraphs = [
        f"Of {settings['held_out']} held-out answers ({settings['held_out_tokens']:,} tokens) of {settings['label']}, "
        "given their prompts. Gaps are to the base that is not quantised, paired over the answers, with 95 % bootstrap "
        "intervals over them; of other seeds they say nothing."
    ]
    if settings["steps"]:
        paragraphs.append(
            f"LoRA: rank 16 on all linear layers, {settings['steps']} steps of {settings['batch']} rows, learning rate "
            f"{settings['learning_rate']:g}, seed {settings['seed']}. One short run for each storage, from the same "
            "start and over the same rows."
        )
    return [paragraph(text) for text in paragraphs]


def _error_table(storages: dict[str, Any]) -> str:
    keys = ("gaussian_error", "weight_error", "output_error")
    rows = []
    for name, row in storages.items():
        errors = [f"{100 * row[key]:.2f} %" if key in row else "" for key in keys]
        rows.append([name, *errors, f"{row['bits']:.3f}"])
    return table(["storage", "Gaussian weights", "weights", "outputs", "bits per parameter"], rows)


def _perplexity_table(storages: dict[str, Any], trained: bool) -> str:
    rows = []
    for name, row in storages.items():
        cells = [name]
        for when in ("before", "after") if trained else ("before",):
            gap = row.get(f"gap_{when}")
            cells += [f"{row[when]:.3f}", f"{gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})" if gap else ""]
        rows.append(cells)
    return table(["storage", "before", "gap", *(["after LoRA", "gap"] if trained else [])], rows)


def table(titles: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table of Markdown; the first ``left`` columns are flush left, the others right."""
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    return "\n".join(["| " + " | ".join(titles) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
