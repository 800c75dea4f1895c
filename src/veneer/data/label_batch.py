"""Batches of labelled rows: padded side by side, with a class for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from veneer.data.label_render import LabelledDataset
from veneer.data.pack import Batch, collate_padded


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class LabelledBatch(Batch):
    """A padded batch whose rows, not its tokens, are what is predicted."""

    classes: Tensor = field(default_factory=_none)  # [B] int64 ids, -1 without a label
    token_types: Tensor = field(default_factory=_none)  # [B, T] int64: 1 in the second of two texts

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The same batch with its tensors on ``device``."""
        names = ("input_ids", "position_ids", "targets", "classes", "token_types")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def collate_labelled(dataset: LabelledDataset, indices: Sequence[int], pad_id: int) -> LabelledBatch:
    """The rows at ``indices``, filled on the right with ``pad_id`` to the longest."""
    padded = collate_padded([dataset.row(index) for index in indices], pad_id)
    types = torch.zeros_like(padded.input_ids)
    for place, index in enumerate(indices):
        start, end = int(dataset.offsets[index]), int(dataset.offsets[index + 1])
        types[place, : end - start] = torch.from_numpy(dataset.token_types[start:end])
    classes = torch.from_numpy(dataset.classes[list(indices)])
    return LabelledBatch(**vars(padded), classes=classes, token_types=types)


def labelled_batches(
    dataset: LabelledDataset, indices: Sequence[int], rows: int, pad_id: int
) -> Iterator[LabelledBatch]:
    """Batches of at most ``rows``, longest first: neighbours of like length waste the least."""
    order = sorted(indices, key=lambda index: (-int(dataset.lengths[index]), index))
    for start in range(0, len(order), rows):
        yield collate_labelled(dataset, order[start : start + rows], pad_id)
