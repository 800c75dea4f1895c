"""Holding rows out so that nothing in them was seen in training: rows with the same prompt stay on one side."""

from __future__ import annotations

import hashlib

from veneer.data.conversation import Rows
from veneer.errors import DataError, UsageError


def split(rows: Rows, share: float | int, seed: int) -> tuple[Rows, Rows]:
    """Training rows and held-out rows.

    Rows whose prompts are the same but for case and white space (exact duplicates among them) are never torn apart.
    Which groups are held out depends on the seed and on what the rows say, not on their order: shuffling the file
    changes nothing, and a row that is added later moves few others.

    Args:
        rows: the rows to split.
        share: below 1, the share to hold out; from 1, how many rows (an int).
        seed: picks the groups.
    Returns:
        ``(train, held out)``, each in the file's order. The held-out count comes as close to ``share`` as whole
        groups allow.
    Raises:
        UsageError: a share or count that leaves one side empty.
        DataError: all rows share one prompt, so none can be held out.
    """
    total = len(rows)
    wanted = _wanted(share, total)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows.conversations):
        groups.setdefault(row.group, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"all {total:,} rows have the same prompt, so none can be held out for evaluation",
            where=rows.source,
            fix="give a file of its own as data.eval, or set data.eval: null",
        )
    held: list[int] = []
    passed: list[list[int]] = []
    for _, indices in sorted(groups.items(), key=lambda item: _rank(item[0], seed)):
        if len(held) + len(indices) <= wanted:
            held.extend(indices)
        else:
            passed.append(indices)
    # What is still missing may be less than any group left: one more group where that comes closer (or holds anything
    # at all).
    if len(held) < wanted and len(passed) > 1:
        smallest = min(passed, key=len)
        if not held or abs(len(held) + len(smallest) - wanted) < wanted - len(held):
            held.extend(smallest)
    out = set(held)
    train = [index for index in range(total) if index not in out]
    said = f"{len(held):,} of {total:,} rows held out by prompt (seed {seed})"
    return (
        rows.subset(train, f"{rows.source}: {len(train):,} rows to train on"),
        rows.subset(sorted(held), f"{rows.source}: {said}"),
    )


def _wanted(share: float | int, total: int) -> int:
    if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
        raise UsageError(
            f"{share!r} rows cannot be held out",
            where="data.eval",
            fix="use a share such as 0.1, a number of rows, or a file",
        )
    if share < 1:
        wanted = max(1, round(share * total))
    elif share == int(share):
        wanted = int(share)
    else:
        raise UsageError(
            f"{share} is neither a share below 1 nor a whole number of rows", where="data.eval", fix="use 0.1, or 200"
        )
    if wanted >= total:
        raise UsageError(
            f"holding out {wanted:,} of {total:,} rows leaves nothing to train on",
            where="data.eval",
            fix="use a smaller share or number, or more rows",
        )
    return wanted


def _rank(group: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{group}".encode()).hexdigest()
