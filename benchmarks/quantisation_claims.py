"""What the literature says of 4-bit storage, held against what was measured. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]


def claims(rows: Rows, trained: bool) -> list[dict[str, Any]]:
    """Each claim with its figures and a verdict: true or false as measured here.

    Args:
        rows: what was measured, by the storage's name.
        trained: there was a LoRA run over each storage.
    """
    return [*_nf4_under_int4(rows), *_double_quantisation(rows), _cost(rows), *([_won_back(rows)] if trained else [])]


def _nf4_under_int4(rows: Rows) -> list[dict[str, Any]]:
    """Blocks of 64 without double quantisation on either side. Which mean is meant is not said, so both are judged."""
    nf4, int4 = rows["NF4, blocks of 64"], rows["INT4, blocks of 64"]
    found = []
    for key, where in (
        ("gaussian_error", "Gaussian weights"),
        ("weight_error", "the model's weights"),
        ("output_error", "the layers' outputs"),
    ):
        ratio = nf4[key] / int4[key]
        less = {"mean square": 1 - ratio**2, "root mean square": 1 - ratio}
        figures = ", ".join(f"{100 * share:.1f} % as {mean}" for mean, share in less.items())
        verdicts = {mean: 0.20 <= share <= 0.30 for mean, share in less.items()}
        found.append(
            {
                "claim": f"NF4's error is about 25 % (20 to 30) under INT4's, on {where}",
                "measured": f"{figures}; root mean squares {nf4[key]:.4f} and {int4[key]:.4f}",
                "verdict": ", ".join(f"{_said(holds)} as {mean}" for mean, holds in verdicts.items())
                if len(set(verdicts.values())) > 1
                else _said(all(verdicts.values())),
            }
        )
    return found


def _double_quantisation(rows: Rows) -> list[dict[str, Any]]:
    once, twice = rows["NF4, blocks of 64"], rows["NF4, blocks of 64, double"]
    saved = once["bits"] - twice["bits"]
    more = twice["weight_error"] / once["weight_error"] - 1
    return [
        _claim(
            "double quantisation saves 0.37 bit per parameter",
            round(saved, 2) == 0.37,
            f"{saved:.3f} bits: {once['bits']:.3f} without it, {twice['bits']:.3f} with it; it raises the error of the "
            f"weights by {100 * more:.2f} %",
        ),
        _claim(
            "NF4 with double quantisation takes 4.127 bits per parameter",
            abs(twice["bits"] - 4.127) < 0.001,
            f"{twice['bits']:.4f}, from the bytes that are stored",
        ),
    ]


def _cost(rows: Rows) -> dict[str, Any]:
    plain, row = rows["not quantised"], rows["NF4, blocks of 64, double"]
    gap = row["gap_before"]
    return _claim(
        "QLoRA's base, in NF4, costs 1 to 3 points of perplexity",
        1.0 <= gap[0] <= 3.0,
        f"{_gap(gap)} points, {100 * gap[0] / plain['before']:+.1f} %: {plain['before']:.3f} becomes "
        f"{row['before']:.3f}",
    )


def _won_back(rows: Rows) -> dict[str, Any]:
    """In points a gap shrinks with the perplexity itself, so the share is taken of its logarithm: nats per token."""
    plain, row = rows["not quantised"], rows["NF4, blocks of 64, double"]
    gap = row["gap_after"]
    before, after = (math.log(row[when] / plain[when]) for when in ("before", "after"))
    share = f", {100 * (1 - after / before):.0f} % less" if before > 0 else ""
    return _claim(
        "training wins it back (what is left is not above zero by more than chance)",
        gap[1] <= 0.0,
        f"{_gap(gap)} points are left: {plain['after']:.3f} over the plain base, {row['after']:.3f} over NF4; in nats "
        f"per token the gap was {before:+.4f} and is {after:+.4f}{share}",
    )


def _gap(gap: list[float]) -> str:
    return f"{gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})"


def _claim(text: str, holds: bool, measured: str) -> dict[str, Any]:
    return {"claim": text, "measured": measured, "verdict": _said(holds)}


def _said(holds: bool) -> str:
    return "true" if holds else "false"
