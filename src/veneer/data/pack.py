"""Packing rows into bins, and collating rows into batches: packed end to end, or padded side by side.

Shapes: B rows of a batch, T positions. A packed batch has B = 1 and several documents in its T positions.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.data.dataset import Example
from veneer.errors import UsageError

IGNORE_INDEX = -100


@dataclass
class Batch:
    """What the training loop feeds the model.

    ``targets[b, t]`` is the id that position t must predict, already shifted: -100 where nothing is trained, and
    never an id of another document. Packed: ``document_lengths`` sum to T. Padded: ``lengths`` are the rows' own
    lengths, padding is on the right. With ``shared_prefix`` the first document is the beginning of all rows, and each
    further document is the rest of one row; positions go on where the beginning ends.
    """

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, from 0 in each document
    targets: Tensor  # [B, T] int64
    document_lengths: list[int] | None
    lengths: list[int] | None
    row_ids: list[str]
    trained_tokens: int  # targets that are not -100
    tokens: int  # tokens of the rows, without padding
    shared_prefix: int = 0  # length of the first document, when it is the beginning that all rows share

    @property
    def attention_mask(self) -> Tensor | None:
        """``[B, T]`` bool, True on real tokens, for a padded batch; None for a packed one (it has no padding)."""
        if self.lengths is None:
            return None
        places = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return places[None, :] < torch.tensor(self.lengths, device=self.input_ids.device)[:, None]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            targets=self.targets.to(device),
        )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of row indices, each with at most ``capacity`` tokens: longest row first, into the fullest bin that still
    has room.

    Never uses more than 11/9 of the fewest possible bins, plus one (Johnson 1974). O(n log n): rows are sorted once,
    and the bins are found by bisection among the distinct amounts of room left, of which there are at most
    ``capacity``.

    Args:
        lengths: tokens per row, each from 1 to ``capacity``.
        capacity: tokens per bin.
    Returns:
        The bins in the order they were opened; every index stands in exactly one. The same input gives the same bins.
    Raises:
        UsageError: a row is longer than a bin, or empty.
    """
    if capacity < 1:
        raise UsageError(f"a bin of {capacity} tokens holds nothing", where="capacity", fix="use 1 or more")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if order and lengths[order[0]] > capacity:
        raise UsageError(
            f"row {order[0]} has {lengths[order[0]]} tokens, more than a bin of {capacity}",
            where="micro_batch_tokens",
            fix="raise micro_batch_tokens to at least max_length, or lower max_length",
        )
    if order and lengths[order[-1]] < 1:
        raise UsageError(f"row {order[-1]} has no tokens", where="lengths", fix="leave empty rows out")
    bins: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room left in open bins, rising
    with_room: dict[int, list[int]] = {}  # room -> the bins that have it
    for index in order:
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
                rooms.pop(place)
        bins[number].append(index)
        left = room - length
        if left:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(number)
    return bins


# A shared beginning is worth its own document from this many tokens saved.
LEAST_SAVED_TOKENS = 32


def shared_beginning(examples: Sequence[Example]) -> int:
    """How many first tokens all examples have in common and train nothing on; 0 where sharing them saves too little.

    The token after the beginning is not trained either: the beginning's last position would have to predict it.
    """
    if len(examples) < 2:
        return 0
    first = examples[0].input_ids
    length = min(len(example) for example in examples) - 1
    for example in examples:
        same = example.input_ids[:length] == first[:length]
        length = int(same.argmin()) if not same.all() else length
        trained = example.trained[: length + 1]
        length = min(length, int(trained.argmax()) - 1) if trained.any() else length
        if length <= 0:
            return 0
    return length if length * (len(examples) - 1) >= LEAST_SAVED_TOKENS else 0


def collate_packed(examples: Sequence[Example], *, share_prefix: bool = False) -> Batch:
    """One batch row with the examples end to end: ``[1, T]``, T the sum of their lengths, positions from 0 in each.

    Args:
        share_prefix: a beginning that all examples have in common (a system prompt) is laid down once, as the first
            document; see :class:`Batch`. The mathematics is the same, as long as nothing random differs between rows.

    Raises:
        UsageError: no examples, or one without tokens.
    """
    _check(examples)
    prefix = shared_beginning(examples) if share_prefix else 0
    ids = [_ids(example)[prefix:] for example in examples]
    labels = [_targets(example)[prefix:] for example in examples]
    positions = [torch.arange(prefix, len(example)) for example in examples]
    if prefix:
        ids.insert(0, _ids(examples[0])[:prefix])
        labels.insert(0, torch.full((prefix,), IGNORE_INDEX))
        positions.insert(0, torch.arange(prefix))
    targets = torch.cat(labels)
    return Batch(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        targets=targets[None],
        document_lengths=[len(document) for document in ids],
        lengths=None,
        row_ids=[example.row_id for example in examples],
        trained_tokens=int((targets != IGNORE_INDEX).sum()),
        tokens=sum(len(example) for example in examples),
        shared_prefix=prefix,
    )


def collate_padded(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch row per example: ``[B, T]``, T the longest, filled on the right with ``pad_id``.

    Padding is known by ``lengths`` alone: ``pad_id`` may be a token that also stands in the rows (an eos), and those
    stay trained.

    Raises:
        UsageError: no examples, or one without tokens.
    """
    _check(examples)
    rows, width = len(examples), max(len(example) for example in examples)
    input_ids = torch.full((rows, width), pad_id, dtype=torch.int64)
    targets = torch.full((rows, width), IGNORE_INDEX, dtype=torch.int64)
    for index, example in enumerate(examples):
        input_ids[index, : len(example)] = _ids(example)
        targets[index, : len(example)] = _targets(example)
    return Batch(
        input_ids=input_ids,
        position_ids=torch.arange(width).repeat(rows, 1),
        targets=targets,
        document_lengths=None,
        lengths=[len(example) for example in examples],
        row_ids=[example.row_id for example in examples],
        trained_tokens=int((targets != IGNORE_INDEX).sum()),
        tokens=sum(len(example) for example in examples),
    )


def pad_id_of(tokenizer: Any) -> int:
    """An id to fill padded batches with: the tokenizer's pad token, else 0. Its choice never reaches loss or
    attention.
    """
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def _check(examples: Sequence[Example]) -> None:
    if not examples:
        raise UsageError("a batch needs at least one example", where="collate", fix="give it examples")
    for example in examples:
        if len(example) == 0:
            raise UsageError(f"the example {example.row_id} has no tokens", where="collate", fix="leave it out")


def _ids(example: Example) -> Tensor:
    return torch.from_numpy(example.input_ids.astype("int64"))


def _targets(example: Example) -> Tensor:
    """``[T]`` the id that each position predicts: the next one where that is trained, -100 elsewhere and at the end."""
    targets = torch.full((len(example),), IGNORE_INDEX, dtype=torch.int64)
    trained = torch.from_numpy(example.trained[1:].astype("bool"))
    targets[:-1][trained] = _ids(example)[1:][trained]
    return targets
