"""Rendered rows: token ids and their loss mask in flat arrays, and the account of what was cut, dropped or split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """One rendered document of T tokens.

    ``trained[t]`` says that token t is predicted and scored (by position t - 1); the first token never is.
    """

    input_ids: Int32  # [T]
    trained: Bool  # [T]
    row_id: str

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class RenderStats:
    """What rendering did, in rows and tokens; ``warnings`` are the sentences to say aloud.

    ``rows`` came in, ``examples`` came out. ``dropped`` maps a reason to the ids of the rows that were left out for it.
    ``split_rows`` are rows that became several examples, because the template renders an earlier turn differently once
    later turns follow it.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    truncated_trained_tokens: int = 0
    split_rows: int = 0
    empty_turns: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def dropped_rows(self) -> int:
        """How many rows were left out, for whatever reason."""
        return sum(len(ids) for ids in self.dropped.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RenderStats:
        """The inverse of :meth:`to_dict`."""
        return cls(**value)


@dataclass
class TokenDataset:
    """Rendered rows, concatenated.

    Row i is ``input_ids[offsets[i]:offsets[i + 1]]``, with ``trained`` beside it.
    """

    input_ids: Int32  # [N] all tokens
    trained: Bool  # [N]
    offsets: Int64  # [rows + 1]
    row_ids: list[str]
    stats: RenderStats

    @classmethod
    def from_examples(cls, examples: Sequence[Example], stats: RenderStats) -> TokenDataset:
        """Concatenates examples, in order."""
        lengths = np.array([len(example) for example in examples], dtype=np.int64)
        return cls(
            np.concatenate([e.input_ids for e in examples]) if examples else np.zeros(0, np.int32),
            np.concatenate([e.trained for e in examples]) if examples else np.zeros(0, np.bool_),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            [example.row_id for example in examples],
            stats,
        )

    def __len__(self) -> int:
        return len(self.row_ids)

    def __iter__(self) -> Iterator[Example]:
        return (self.row(index) for index in range(len(self)))

    def row(self, index: int) -> Example:
        """Example ``index`` (views, not copies). Raises IndexError outside ``0 <= index < len``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return Example(self.input_ids[start:end], self.trained[start:end], self.row_ids[index])

    @cached_property
    def lengths(self) -> Int64:
        """``[rows]`` tokens per row."""
        return np.diff(self.offsets)

    @cached_property
    def trained_counts(self) -> Int64:
        """``[rows]`` trained tokens per row."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.trained, dtype=np.int64)])
        counts: Int64 = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return counts
