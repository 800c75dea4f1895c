"""The demo's rows in their three parts, and the names under which they are a source without a file."""

from __future__ import annotations

import json
from typing import Any

from veneer.inbox.generator import generate_rows

TRAIN_ROWS, VALIDATION_ROWS, HELDOUT_ROWS = 1200, 40, 200

# A source's name -> the part that it stands for.
SOURCES = {"demo-train": "train", "demo-validation": "validation", "demo-heldout": "heldout"}


def draw_parts(
    seed: int = 0,
    train_rows: int = TRAIN_ROWS,
    validation_rows: int = VALIDATION_ROWS,
    heldout_rows: int = HELDOUT_ROWS,
) -> dict[str, list[dict[str, Any]]]:
    """Rows to train on, for the curve, and to measure with at the end; they depend on the arguments alone.

    The validation rows follow the training rows in one draw, so that no message is in both.

    Returns:
        rows as :func:`generate_rows` gives them, under ``train``, ``validation`` and ``heldout``.
    """
    drawn = generate_rows(train_rows + validation_rows, seed, "train")
    return {
        "train": drawn[:train_rows],
        "validation": drawn[train_rows:],
        "heldout": generate_rows(heldout_rows, seed, "heldout"),
    }


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    """The text of the file that holds these rows."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
