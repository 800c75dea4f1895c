"""How long a document may be whose borders a model is told by lengths instead of by a mask.

Under our attention no mask is built: it is given the lengths of the documents, and the window, by the layer that calls
it. Some models do not hand the lengths on to their layers, or put something of their own into the mask: a window that
the layer does not name, a choice of positions. They are found out by what they compute of four tokens, once with the
lengths and once with their own masks; and once more with every window set to two tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.models.attention import is_routed
from veneer.models.fused_attention import windows_set_to

_WINDOWS = ("sliding_window", "attention_chunk_size", "keep_window_size")
# Of the mean difference, relative to the mean size of a hidden state: rounding is far below, another mask far above.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_known: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def by_lengths(tokens: int | list[int], device: torch.device) -> dict[str, Any]:
    """What a model is called with for documents of these lengths: a mask that it leaves as it is, and nobody reads."""
    lengths = [tokens] if isinstance(tokens, int) else tokens
    return {"document_lengths": lengths, "attention_mask": torch.zeros(1, 1, 1, 1, device=device)}


def longest_document(module: nn.Module, body: nn.Module) -> float:
    """The most tokens of a document for which the lengths are enough: infinite, a window, or 0 where they never are.

    Args:
        module: a causal language model.
        body: the part of it that gives the hidden states.
    """
    if module not in _known:
        _known[module] = _measured(module, body)
    return _known[module]


@torch.no_grad()
def _measured(module: nn.Module, body: nn.Module) -> float:
    if not is_routed(module):
        return 0
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with _nobody_listening(module):
            if not _is_same(module, body):
                return 0
            with _small_windows(module) as found:
                return math.inf if not found or _is_same(module, body) else min(found)
    finally:
        for part in training:
            part.training = True


def _is_same(module: nn.Module, body: nn.Module) -> bool:
    device = next(module.parameters()).device
    ids = torch.arange(4, device=device)[None] % module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    arguments: dict[str, Any] = {"input_ids": ids, "position_ids": torch.arange(4, device=device)[None]}
    try:
        own: Tensor = body(**arguments, use_cache=False).last_hidden_state
        ours: Tensor = body(**arguments, **by_lengths(4, device), use_cache=False).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # what its own code cannot do either, that says when it is run
    difference = (ours.float() - own.float()).abs().mean() / own.float().abs().mean()
    return bool(difference <= _TOLERANCE.get(own.dtype, 1e-3))


@contextlib.contextmanager
def _nobody_listening(module: nn.Module) -> Iterator[None]:
    """Within it nobody's hooks see what only we ask for."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    before = [(part, kind, getattr(part, kind)) for part in module.modules() for kind in kinds]
    for part, kind, _ in before:
        setattr(part, kind, OrderedDict())
    try:
        yield
    finally:
        for part, kind, hooks in before:
            setattr(part, kind, hooks)


@contextlib.contextmanager
def _small_windows(module: nn.Module) -> Iterator[list[int]]:
    """Within it every window of the model is of two tokens; gives what the windows are."""
    config: Any = getattr(module, "config", None)
    holders: list[Any] = [config, config.get_text_config(), *module.modules()]
    holders += [part.config for part in module.modules() if hasattr(part, "config")]
    found: list[tuple[Any, str, int]] = []
    seen: set[int] = set()
    for holder in holders:
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        found += [(holder, name, vars(holder)[name]) for name in _WINDOWS if type(vars(holder).get(name)) is int]
    try:
        for holder, name, _ in found:
            setattr(holder, name, 2)
        with windows_set_to(module, 2):
            yield [value for _, _, value in found]
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)
