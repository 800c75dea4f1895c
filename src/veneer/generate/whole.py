"""Decoding without a cache: every token computes its whole row again. Slow, and right for any model of text.

Some models keep their past in a form of their own (the state spaces of Mamba, RWKV, lightning attention), or keep none.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.generate.cache import new_cache
from veneer.generate.decoder import Decoder, Memory
from veneer.generate.native_step import NativeStep

_log = logging.getLogger("veneer.generate")
_VERDICT = "_veneer_takes_our_cache"  # on a module: what the first look has shown


class WholeDecoder:
    """What :class:`veneer.generate.decoder.Decoder` is, with the rows' ids for a memory."""

    attention_only = False  # rows of a batch are equally long: no padding
    cache = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._device = next(module.parameters()).device
        self._ids = torch.zeros(0)  # [B, T]

    def read(self, prompts: Sequence[Sequence[int]], room: int, memory: Memory | None = None) -> Tensor:
        """Logits ``[B, V]`` after prompts that are equally long; nothing is kept for ``room`` or in ``memory``."""
        self._ids = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
        return self._forward()

    def step(self, tokens: Tensor) -> Tensor:
        """One token ``[B]`` of every row in; logits ``[B, V]`` out."""
        self._ids = torch.cat((self._ids, tokens[:, None].to(self._device)), 1)
        return self._forward()

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, in this order."""
        self._ids = self._ids[torch.tensor(list(rows), device=self._device)]

    def _forward(self) -> Tensor:
        logits: Tensor = self.module(input_ids=self._ids, use_cache=False).logits
        return logits[:, -1]


def open_decoder(module: nn.Module) -> Decoder | WholeDecoder:
    """The decoder for ``module``: with our cache where the model takes it, else without one, which is said once."""
    if takes_our_cache(module):
        return Decoder(module)
    return WholeDecoder(module)


@torch.no_grad()
def takes_our_cache(module: nn.Module) -> bool:
    """Whether the model reads and fills our cache of keys and values: looked at once, on two tokens one by one."""
    verdict: bool | None = getattr(module, _VERDICT, None)
    if verdict is None:
        reason = _reason_against(module)
        verdict = reason is None
        setattr(module, _VERDICT, verdict)
        if reason is not None:
            _log.warning(
                "%s %s: each generated token computes its whole row again, which is slow", type(module).__name__, reason
            )
    return verdict


def _reason_against(module: Any) -> str | None:
    forward = inspect.signature(module.forward).parameters
    if "past_key_values" not in forward:
        return "takes no cache of keys and values"
    if NativeStep.of(module) is not None:
        return None
    token = torch.zeros(1, 1, dtype=torch.long, device=next(module.parameters()).device)
    try:
        cache = new_cache(module, 2)
        for place in range(2):
            positions = {"position_ids": token + place} if "position_ids" in forward else {}
            module(input_ids=token, past_key_values=cache, use_cache=True, **positions)
    except Exception as error:  # whatever a model says of a cache that is not its own
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return "keeps its past in a form of its own"
    return None
