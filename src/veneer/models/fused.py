"""Swaps recognised blocks of a loaded model for fused ones: on the instance, by structure, checked by numbers.

A block is recognised by what it is made of (a gated MLP is gate, up and down projections and an activation; an RMSNorm
is a weight and an epsilon), and taken over only when the fused block gives the same output on a random input. What is
not recognised keeps its own code and still trains. Names of children stay, so paths and files do not change.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.kernels.frozen import take_over
from veneer.models import attention
from veneer.models.fused_attention import fuse_attention, is_fused
from veneer.models.fused_layer import fuse_layer
from veneer.models.fused_mlp import FusedGatedMlp, computes_the_same, form_of, fused_mlp
from veneer.models.fused_norm import FusedRmsNorm, fused_norm

__all__ = ["Fused", "FusedGatedMlp", "FusedRmsNorm", "fuse"]

_USUALLY_FUSED = re.compile(r"Attention$|MLP$|Norm$")


@dataclass
class Fused:
    """What :func:`fuse` did, by the class names of the original blocks."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # attention, MLPs and norms in a form that is not known
    documents: bool = False  # attention runs under our name and honours document boundaries

    def __str__(self) -> str:
        left = f"; not fused: {_said(self.left)}" if self.left else ""
        packed = "isolated" if self.documents else "not supported by this model"
        return f"fused {_said(self.swapped) or 'no blocks'}{left}; packed documents {packed}"


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def fuse(module: nn.Module) -> Fused:
    """Swaps what is recognised in ``module`` (in place) and routes its attention through ours where it can be."""
    outputs: Any = getattr(module, "get_output_embeddings", lambda: None)
    head = outputs()
    for part in module.modules():
        if part is not head:
            take_over(part)
    fused = Fused(documents=_route_attention(module))
    verdicts: dict[Hashable, bool] = {}  # of MLPs by their form: those of a model are mostly of one, and large
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child)
            block: nn.Module | None = None
            if not (fused.documents and fuse_attention(child)):
                block = fused_norm(child) or _checked_mlp(child, verdicts)
            if block is not None:
                block.train(child.training)
                setattr(parent, name, block)
            if block is not None or is_fused(child):
                fused.swapped[kind.__name__] = fused.swapped.get(kind.__name__, 0) + 1
            elif _USUALLY_FUSED.search(kind.__name__):
                fused.left[kind.__name__] = fused.left.get(kind.__name__, 0) + 1
    for layer in module.modules():  # when their parts are ours
        if fused.documents and fuse_layer(layer):
            name = type(layer).__name__
            fused.swapped[name] = fused.swapped.get(name, 0) + 1
    return fused


def _checked_mlp(child: nn.Module, verdicts: dict[Hashable, bool]) -> FusedGatedMlp | None:
    block = fused_mlp(child)
    if block is None:
        return None
    form = form_of(child)
    if form not in verdicts:
        verdicts[form] = computes_the_same(child, block)
    return block if verdicts[form] else None


def _route_attention(module: nn.Module) -> bool:
    if not getattr(module, "_supports_attention_backend", False):
        return False
    decoder: nn.Module = module.get_decoder()  # type: ignore[operator]  # a transformers model has it
    if any(map(attention.makes_its_own_mask, {type(part) for part in decoder.modules()})):
        return False
    attention.register()
    module.set_attn_implementation(attention.NAME)  # type: ignore[operator]  # here too
    return attention.is_routed(module)
