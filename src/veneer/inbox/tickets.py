"""The demo's messages as a task of classification: which of six things a customer wants."""

from __future__ import annotations

import json
import random
from pathlib import Path

from veneer.files import write_text
from veneer.inbox.generator import draw_ticket, write_message
from veneer.inbox.words import Split

TRAIN_ROWS, HELDOUT_ROWS = 480, 120


def labelled_rows(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """``count`` different rows ``{"text": message, "label": intent}``, the same for the same arguments.

    Args:
        split: "train" or "heldout"; they share no product, no name and no sentence that carries the intent.
    """
    rng = random.Random(f"veneer tickets {split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        ticket = draw_ticket(rng, split)
        message = write_message(rng, ticket, split)
        rows.setdefault(message, {"text": message, "label": ticket.intent})
    return list(rows.values())


def write_tickets(
    folder: Path, *, seed: int = 0, train_rows: int = TRAIN_ROWS, heldout_rows: int = HELDOUT_ROWS
) -> dict[str, Path]:
    """Writes ``tickets-train.jsonl`` and ``tickets-heldout.jsonl``, which ``recipes/classification.yaml`` reads.

    Returns:
        the paths, by split.
    """
    counts: dict[Split, int] = {"train": train_rows, "heldout": heldout_rows}
    paths = {}
    for split, count in counts.items():
        paths[str(split)] = folder / f"tickets-{split}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in labelled_rows(count, seed, split))
        write_text(paths[str(split)], "".join(lines))
    return paths
