"""How the rows of an optimizer step lie in memory: which process takes which, and in what micro-batches.

The rows of a step are ``per_device_train_batch_size x gradient_accumulation_steps x processes``, always. This file
only decides how they are laid out, which changes speed and memory, never the sum over their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.data.dataset import TokenDataset
from veneer.data.pack import Batch, best_fit_decreasing, collate_packed, collate_padded, shared_beginning

# Peak memory grows with the tokens, so a CPU's default is modest (SmolLM2-135M, bfloat16, all-linear r 16, about 1,700
# tokens a step: 2.15 GB at once, 1.84 GB in micro-batches of at most 1024, a tenth slower); an accelerator needs more
# tokens at once to be busy.
CPU_MICRO_BATCH_TOKENS = 2048
GPU_MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Layout:
    """The plan by which rows become micro-batches.

    Attributes:
        packing: rows lie one after another, ``micro_batch_tokens`` at most; else they are padded side by side.
        micro_batch_tokens: capacity of a packed micro-batch; a longer row gets one of its own.
        micro_batch_rows: rows of a padded micro-batch.
        pad_id: the token that fills a padded row up; it is masked by length, so any id will do.
        share_prefix: a beginning that all rows of a packed micro-batch have in common is computed once, under
            one draw of dropout. Not with noise, which each row draws for itself.
    """

    packing: bool
    micro_batch_tokens: int
    micro_batch_rows: int
    pad_id: int
    share_prefix: bool = False


def default_micro_batch_tokens(max_length: int, device: torch.device) -> int:
    """2048 tokens on a CPU, 8192 on an accelerator, and never less than one row may have."""
    return max(max_length, CPU_MICRO_BATCH_TOKENS if device.type == "cpu" else GPU_MICRO_BATCH_TOKENS)


def deal(indices: Sequence[int], lengths: Sequence[int] | NDArray[np.int64], world_size: int) -> list[list[int]]:
    """Shares the rows of a step among the processes, so that each gets about the same number of tokens.

    Longest first, there and back again (0, 1, 1, 0, ...): row counts differ by one at most. In a step with fewer rows
    than processes some get none.

    Args:
        indices: the rows of the step.
        lengths: the length in tokens of *every* row of the data set.
    """
    if world_size == 1:
        return [list(indices)]
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for place, index in enumerate(sorted(indices, key=lambda i: (-lengths[i], i))):
        turn, seat = divmod(place, world_size)
        hands[seat if turn % 2 == 0 else world_size - 1 - seat].append(index)
    return hands


def micro_batches(indices: Sequence[int], dataset: TokenDataset, layout: Layout) -> Iterator[Batch]:
    """The micro-batches of these rows, built one at a time.

    Packed, a micro-batch is as large as the tokens that are computed in it. Padded rows are sorted by length first:
    neighbours of like length waste the least.
    """
    lengths = [int(dataset.lengths[i]) for i in indices]
    if layout.packing:
        rows = [dataset.row(index) for index in indices]
        common = shared_beginning(rows) if layout.share_prefix else 0  # stands once in each micro-batch
        capacity = max(layout.micro_batch_tokens, max(lengths, default=1)) - common
        for places in best_fit_decreasing([length - common for length in lengths], capacity):
            yield collate_packed([rows[place] for place in places], share_prefix=layout.share_prefix)
        return
    order = sorted(range(len(indices)), key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), layout.micro_batch_rows):
        places = order[start : start + layout.micro_batch_rows]
        yield collate_padded([dataset.row(indices[place]) for place in places], layout.pad_id)


def most_tokens(dataset: TokenDataset, layout: Layout, rows_per_step: int) -> int:
    """The most tokens that a micro-batch can have, padding included."""
    longest = np.sort(np.asarray(dataset.lengths))[::-1]
    if not layout.packing:
        return int(longest[0]) * min(layout.micro_batch_rows, len(longest))
    return max(int(longest[0]), min(layout.micro_batch_tokens, int(longest[:rows_per_step].sum())))


def document_lengths(batch: Batch) -> list[int]:
    """The length of each row in the batch, in its order."""
    lengths = batch.document_lengths if batch.document_lengths is not None else batch.lengths
    assert lengths is not None
    return list(lengths)
