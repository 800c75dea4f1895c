"""Folding an adapter into the base's weights, and measuring what that does to the outputs.

``W' = round(float32(W) + s B A)``: summed in float32, rounded to the base's dtype once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.model import AdaptedModel
from veneer.adapters.slots import places, slots, take_off
from veneer.errors import AdapterError
from veneer.quant import QuantizedLinear

_CHUNK_NUMBERS = 1 << 23  # logits that are compared at a time: 64 MB in float64


@dataclass(frozen=True)
class MergeReport:
    """How far the merged model's predictions are from the adapted model's, on given tokens."""

    max_abs_logit_difference: float
    mean_kl: float  # nats per position, KL(adapted || merged)
    top1_agreement: float  # share of positions with the same most likely token
    positions: int
    dtype: str  # of the merged weights
    perplexity: float | None = None  # of the merged model, where it is known which tokens came next
    perplexity_before: float | None = None  # of the adapted model, likewise

    def __str__(self) -> str:
        text = (
            f"merged in {self.dtype}: over {self.positions} positions the largest logit difference is "
            f"{self.max_abs_logit_difference:.3g}, the mean KL {self.mean_kl:.3g} nats, "
            f"the same first choice in {100 * self.top1_agreement:.2f} %"
        )
        if self.perplexity is None or self.perplexity_before is None:
            return text
        return f"{text}, the perplexity {self.perplexity:.5g} ({self.perplexity_before:.5g} before)"


@torch.no_grad()
def merge(adapted: AdaptedModel, *, name: str | None = None) -> nn.Module:
    """A plain module whose weights hold an adapter (by default: all that are in use).

    The adapted model stays as it is. Tensors that the adapter does not change are shared with the base, not copied;
    weights in codes become plain tensors, the adapter added to what their codes stand for.
    Where an embedding and a head that share one matrix come out different, they are untied, and the config says so.

    Raises:
        AdapterError: no such adapter; a merged weight is not finite (NaN, or too large for the base's dtype); a matrix
            that modules share, other than embedding and head, would come out different in two places.
    """
    names = adapted.active_names if name is None else (name,)
    for entry in names or (None,):
        adapted.named_parameters(entry)  # raises where there is no such adapter
    # The structure is copied, the tensors are not: the memo says that each tensor is its own copy.
    tensors = [*adapted.module.parameters(), *adapted.module.buffers()]
    memo = {id(tensor): tensor for tensor in tensors} | _left_behind(adapted.module)
    merged: nn.Module = copy.deepcopy(adapted.module, memo)
    hanging, found = places(merged), list(slots(merged))
    changes = [slot.merged(names) for _, slot in found]
    for (path, _), change in zip(found, changes):
        for key, tensor in change.items():
            if not _is_finite(tensor):
                raise AdapterError(
                    f"the merged weight is not finite in {tensor.dtype}",
                    where=f"{path}.{key}",
                    fix="check the adapter's training for NaN, or load the base in bfloat16 or float32",
                )
    for _, slot in found:
        take_off(slot, hanging[id(slot)])
    changed = {id(slot.base_layer): change["weight"] for (_, slot), change in zip(found, changes) if "weight" in change}
    plain = _dequantize(merged, changed)
    ties = _ties(merged)
    made: dict[int, list[nn.Parameter]] = {}
    for (_, slot), change in zip(found, changes):
        for key, tensor in change.items():
            _replace(plain.get(id(slot.base_layer), slot.base_layer), key, tensor, made)
    _settle(merged, ties)
    return merged


def _left_behind(module: nn.Module) -> dict[int, Tensor]:
    """By id, the tensors that a forward has left in attributes (RecurrentGemma's states), without their gradients.

    What belongs to a graph cannot be copied.
    """
    held = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}


@torch.no_grad()
def merge_report(
    adapted: AdaptedModel, merged: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> MergeReport:
    """Runs both models on the same tokens and compares their logits in float32.

    Args:
        adapted: with the adapters in use that were merged.
        merged: what :func:`merge` returned.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]``, zero where a position does not count.
    """
    before, after = _logits(adapted.module, input_ids, attention_mask), _logits(merged, input_ids, attention_mask)
    if attention_mask is not None:
        before, after = before[attention_mask.bool()], after[attention_mask.bool()]
    return compare_logits([(before.flatten(0, -2), after.flatten(0, -2), None)], next(merged.parameters()).dtype)


def compare_logits(parts: Iterable[tuple[Tensor, Tensor, Tensor | None]], dtype: torch.dtype) -> MergeReport:
    """How far the second logits of each part are from the first, over all parts.

    Sums are made in float64: the KL of a good merge is smaller than what float32 loses in a sum over the vocabulary.

    Args:
        parts: the adapted model's logits ``[n, V]``, the merged model's, and the tokens ``[n]`` int64 that came next,
            for the perplexity; without them in any part there is none.
        dtype: of the merged weights.
    """
    largest, kl, agreed, count = 0.0, 0.0, 0, 0
    nll_before, nll_after, has_targets = 0.0, 0.0, True
    for before, after, targets in _in_chunks(parts):
        p, q = F.log_softmax(before.double(), -1), F.log_softmax(after.double(), -1)
        largest = max(largest, float((before - after).abs().max()))
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
        count += len(before)
        has_targets = has_targets and targets is not None
        if targets is not None:
            nll_before += float(F.nll_loss(p, targets, reduction="sum"))
            nll_after += float(F.nll_loss(q, targets, reduction="sum"))
    return MergeReport(
        max_abs_logit_difference=largest,
        mean_kl=kl / count,
        top1_agreement=agreed / count,
        positions=count,
        dtype=str(dtype).removeprefix("torch."),
        perplexity=_exp(nll_after / count) if has_targets else None,
        perplexity_before=_exp(nll_before / count) if has_targets else None,
    )


def _in_chunks(
    parts: Iterable[tuple[Tensor, Tensor, Tensor | None]],
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The parts in pieces of some positions, on a device that has float64."""
    for before, after, targets in parts:
        where = torch.device("cpu") if after.device.type == "mps" else after.device
        step = max(1, _CHUNK_NUMBERS // after.shape[-1])
        for start in range(0, len(after), step):
            rows = slice(start, start + step)
            labels = None if targets is None else targets[rows].to(where)
            yield before[rows].to(where), after[rows].to(where), labels


def _exp(mean_nll: float) -> float:
    return math.exp(min(mean_nll, 700.0))  # beyond it there is no float


def _logits(module: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``[B, T, V]`` float32, in evaluation mode."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        output: Any = module(input_ids) if attention_mask is None else module(input_ids, attention_mask=attention_mask)
    finally:
        for m in training:
            m.training = True
    logits: Tensor = getattr(output, "logits", output)
    return logits.float()


def _is_finite(tensor: Tensor) -> bool:
    """One pass: the extremes are NaN where any element is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())


def _dequantize(module: nn.Module, changed: Mapping[int, Tensor]) -> dict[int, nn.Module]:
    """Puts a plain linear into the place of each quantised one; returns them by the id of what they replace.

    ``changed`` has the weights that are known already, by the layer's id: they are not decoded a second time.
    """
    plain: dict[int, nn.Module] = {}
    for layer_id, hanging in places(module).items():
        layer = getattr(*hanging[0])
        if isinstance(layer, QuantizedLinear):
            plain[layer_id] = layer.dequantized(changed.get(layer_id))
            for parent, attribute in hanging:
                setattr(parent, attribute, plain[layer_id])
    return plain


def _ties(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The parameters that hang in more than one place, with their places."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((owner, key))
    return [owners for owners in found.values() if len(owners) > 1]


def _replace(layer: nn.Module, key: str, tensor: Tensor, made: dict[int, list[nn.Parameter]]) -> None:
    """Puts ``tensor`` at ``key`` of ``layer``. Places that shared a parameter share the new one too, if it is equal."""
    path, _, attribute = key.rpartition(".")
    owner = layer.get_submodule(path)
    old = owner._parameters.get(attribute)
    if attribute in owner._modules:  # a stack of experts in codes
        delattr(owner, attribute)
        owner.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
        return
    if old is None:
        owner._buffers[attribute] = tensor
        return
    alternatives = made.setdefault(id(old), [])
    new = next((p for p in alternatives if torch.equal(p, tensor)), None)
    if new is None:
        new = nn.Parameter(tensor, requires_grad=False)
        alternatives.append(new)
    owner._parameters[attribute] = new


def _settle(merged: nn.Module, ties: list[list[tuple[nn.Module, str]]]) -> None:
    """Makes the config tell the truth about embedding and head; refuses other ties that would come apart."""
    for owners in ties:
        if len({id(owner._parameters[key]) for owner, key in owners}) == 1:
            continue
        if not all(isinstance(owner, nn.Embedding | nn.Linear) for owner, _ in owners) or not any(
            isinstance(owner, nn.Embedding) for owner, _ in owners
        ):
            kinds = ", ".join(type(owner).__name__ for owner, _ in owners)
            raise AdapterError(
                f"modules that share one parameter ({kinds}) would come out different",
                where="merge",
                fix="keep the adapter apart, or adapt all of them or none",
            )
        config: Any = getattr(merged, "config", None)
        for part in [config, *getattr(config, "__dict__", {}).values()]:
            if getattr(part, "tie_word_embeddings", None):
                part.tie_word_embeddings = False
