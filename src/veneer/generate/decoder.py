"""One batch of rows through a model with a cache: prompts in, one token of every row at a time, done rows out.

Names: ``B`` rows, ``T`` columns of the padded prompts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.generate.cache import BufferLayer, has_windows, is_attention_only, new_cache
from veneer.generate.native_step import NativeStep

# Tokens that go through the model at once while prompts are read: bounds the memory of long prompts.
PREFILL_TOKENS = 4096

# A beginning that all rows of a batch share is computed once if it is at least this long.
SHORTEST_SHARED = 8


class Memory:
    """The past of one row, kept from one call to the next: what the next prompt begins with is not computed again.

    Good only while the model's weights, and which adapters are on, stay as they are.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: Any = None

    def take(self, prompt: Sequence[int]) -> tuple[int, Any]:
        """How many tokens of ``prompt`` are known already (never all), and the cache that holds just them."""
        known = common_prefix([self.ids, list(prompt[:-1])]) if self.cache is not None else 0
        # From here on the cache is written to: should the call be interrupted, what is noted here still holds.
        self.ids = self.ids[:known]
        if known:
            for layer in self.cache.layers:
                if isinstance(layer, BufferLayer):
                    layer.crop(known - layer.length)
        return known, self.cache if known else None

    def put(self, ids: Sequence[int], cache: Any) -> None:
        """Keeps ``cache``, which holds the first of ``ids``, unless its past cannot be cut back."""
        usable = cache is not None and is_attention_only(cache)
        self.cache = cache if usable else None
        self.ids = list(ids[: cache.get_seq_length()]) if usable else []


class Decoder:
    """A batch on its way. After each forward ``logits [B, V]`` predict the next token of every row."""

    def __init__(self, module: nn.Module) -> None:
        forward = inspect.signature(module.forward).parameters
        if "past_key_values" not in forward:
            raise ModelError(
                f"{type(module).__name__} takes no cache of keys and values",
                fix="generate with transformers' own model.generate",
            )
        self.module = module
        self._device = next(module.parameters()).device
        self._takes_positions = "position_ids" in forward
        self._takes_kept = "logits_to_keep" in forward
        probe = new_cache(module, 0)
        self.attention_only = is_attention_only(probe)  # else rows of a batch must be equally long: no padding
        # Padding between a shared beginning and the rest is right only where distance is told by positions.
        self._may_share = self.attention_only and self._takes_positions and not has_windows(module)
        self._native = NativeStep.of(module) if self.attention_only and not has_windows(module) else None
        self.cache: Any = None
        self._mask: Tensor | None = None  # [B, columns] int64, None while nothing is masked
        self._positions = torch.zeros(0)
        self._length = 0

    def read(self, prompts: Sequence[Sequence[int]], room: int, memory: Memory | None = None) -> Tensor:
        """Reads the prompts of a batch.

        Args:
            prompts: ids; equally long unless ``attention_only``.
            room: how many tokens will follow.
            memory: of a single row, where its past is taken from.

        Returns:
            logits ``[B, V]`` of the last position.
        """
        known, self.cache = memory.take(prompts[0]) if memory else (0, None)
        if self.cache is None:
            longest = max(map(len, prompts))
            self.cache = new_cache(self.module, longest + room)
            shared = common_prefix([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else 0
            if self._may_share and shared >= SHORTEST_SHARED:
                self._prefill(torch.tensor([list(prompts[0][:shared])]), torch.arange(shared)[None], None, 0)
                for layer in self.cache.layers:
                    if isinstance(layer, BufferLayer):
                        layer.repeat(len(prompts))
                known = shared
        rest = [list(prompt[known:]) for prompt in prompts]
        width = max(map(len, rest))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rest])
        # Padding stands to the left, so that the last column is every row's last token.
        lengths = torch.tensor([len(row) for row in rest])[:, None]
        positions = torch.arange(width)[None] - (width - lengths)
        mask = None
        if int(lengths.min()) < width:
            mask = torch.ones(len(rest), known + width + room, dtype=torch.long)
            mask[:, known : known + width] = (positions >= 0).long()
        self._mask = mask.to(self._device) if mask is not None else None
        logits = self._prefill(ids, positions.clamp(min=0) + known, self._mask, known)
        self._length = known + width
        self._positions = (lengths + known).to(self._device)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """One token ``[B]`` of every row in; logits ``[B, V]`` out."""
        self._length += 1
        mask = None if self._mask is None else self._mask[:, : self._length]
        native = self._native if self._native and self._native.takes(len(tokens), self.cache.layers) else None
        past = (tokens, self._positions, self.cache.layers, mask)
        if native is None:
            logits = self._forward(tokens[:, None], self._positions, mask)
        elif native.proven:
            logits = native(*past)
        else:
            logits = native.prove(lambda: self._forward(tokens[:, None], self._positions, mask), *past)
            self._native = native if native.proven else None
        self._positions = self._positions + 1
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, in this order."""
        index = torch.tensor(list(rows), device=self._device)
        self.cache.reorder_cache(index)
        self._positions = self._positions[index]
        if self._mask is not None:
            self._mask = self._mask[index]

    def _prefill(self, ids: Tensor, positions: Tensor, mask: Tensor | None, known: int) -> Tensor:
        ids, positions = ids.to(self._device), positions.to(self._device)
        width = max(1, PREFILL_TOKENS // len(ids)) if self.attention_only else ids.shape[1]
        logits = ids.new_zeros(0)
        for start in range(0, ids.shape[1], width):
            end = min(start + width, ids.shape[1])
            seen = None if mask is None else mask[:, : known + end]
            logits = self._forward(ids[:, start:end], positions[:, start:end], seen)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._takes_kept:
            # As an index, not as the number 1: a slice is not contiguous, and torch then copies the whole head per row.
            arguments["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        logits: Tensor = self.module(input_ids=ids, **arguments).logits
        return logits[:, -1]


@contextlib.contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every part is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        # Not inference_mode: what a model keeps from a forward (rotary tables) must be usable in training afterwards.
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading ids all rows share."""
    low, high = min(map(list, rows)), max(map(list, rows))  # in order, everything else lies between these two
    for place, (a, b) in enumerate(zip(low, high)):
        if a != b:
            return place
    return min(len(low), len(high))
