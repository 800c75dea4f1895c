"""Keys and values of past tokens, in buffers that are allocated once.

transformers' own cache grows by ``torch.cat``: every step copies every layer's keys and values. Here a step writes one
column. Rows that are done leave by being overwritten, so that going on with fewer rows copies next to nothing.

Names: ``B`` rows, ``K`` key heads, ``S`` positions kept, ``D`` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from veneer.errors import ModelError


class BufferLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer's keys and values, ``[B, K, S, D]`` views of buffers with room to grow.

    A layer with a sliding window keeps everything too: the mask says what is seen. Windows are longer than most
    answers, and a full history is what lets rows be left-padded and prefixes be taken up again.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(*key_states.shape[:2], self.capacity, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], self.capacity, value_states.shape[3])
        self.is_initialized = True

    def grown(self) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values, with room for one position more, which counts from now on."""
        self._make_room(self.length + 1)
        self.length += 1
        return self.keys, self.values

    def _make_room(self, end: int) -> None:
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            self.keys = _wider(self.keys, self.length, self.capacity)
            self.values = _wider(self.values, self.length, self.capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends ``[B, K, T, D]`` and returns all of ``[B, K, S + T, D]``."""
        end = self.length + key_states.shape[2]
        if not self.is_initialized:
            self.capacity = max(self.capacity, end)
            self.lazy_initialization(key_states, value_states)
        self._make_room(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was; there may be fewer rows. Copies only the rows that move."""
        rows = beam_idx.to(self.keys.device)
        moved = torch.nonzero(rows != torch.arange(len(rows), device=rows.device)).squeeze(-1)
        if len(moved):
            for buffer in (self.keys, self.values):
                buffer[moved, :, : self.length] = buffer[rows[moved], :, : self.length]
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` positions."""
        self.length += tokens_to_remove

    def repeat(self, rows: int) -> None:
        """One row becomes ``rows`` equal ones."""
        shape = (rows, *self.keys.shape[1:])
        keys, values = self.keys, self.values
        self.keys, self.values = keys.new_empty(shape), values.new_empty((rows, *values.shape[1:]))
        self.keys[:, :, : self.length] = keys[:, :, : self.length]
        self.values[:, :, : self.length] = values[:, :, : self.length]


def new_cache(module: nn.Module, capacity: int) -> Cache:
    """An empty cache for ``module`` with room for ``capacity`` positions; attention layers are buffers.

    Raises:
        ModelError: the model keeps its past in a form of its own.
    """
    config: Any = module.config
    try:
        cache: Any = DynamicCache(config=config)
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{type(module).__name__} keeps its past in a form that is not known here",
            fix="generate with transformers' own model.generate",
        ) from error
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [BufferLayer(capacity) if type(layer) in plain else layer for layer in cache.layers]
    return cache


def is_attention_only(cache: Any) -> bool:
    """Every layer's past is keys and values: padding can be masked, and the past can be cut back."""
    return all(isinstance(layer, BufferLayer) or type(layer).__name__ == "DummyLayer" for layer in cache.layers)


def has_windows(module: nn.Module) -> bool:
    """Some layer sees only a window of the past, counted in columns rather than positions."""
    config: Any = module.config
    cache: Any = DynamicCache(config=config)
    return any(type(layer) is not DynamicLayer for layer in cache.layers)


def _wider(buffer: Tensor, length: int, capacity: int) -> Tensor:
    wider = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    wider[:, :, :length] = buffer[:, :, :length]
    return wider
