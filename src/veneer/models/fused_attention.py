"""Self-attention with projections, norms and rotation as one operation, where a block is found to compute just that.

A block is three or one linear for queries, keys and values, one for the output, perhaps a norm of queries and of keys,
and no parameter of its own. What it passes to attention (scale, window, soft cap) is taken from its own forward, run
once with an attention that writes its arguments down; queries, keys, values and output have to be ours too, at several
sizes of the input (some models clamp). Its forward is then replaced on the instance, and hands back to its own code
whatever is not training or scoring rows of documents with plain projections, but for adapters.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from veneer.kernels.attention import document_attention
from veneer.kernels.gated_mlp import LowRankLinear
from veneer.kernels.qkv_rope import qkv_rope
from veneer.models.fused_norm import fused_norm, is_plain_norm, is_same
from veneer.models.low_rank import low_rank_of, split_rows, zero_update
from veneer.quant import QuantizedLinear

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_JOINT = ("qkv_proj",)  # Phi-3's
_NORMS = ("q_norm", "k_norm")
_PROBE = "veneer-probe"
_ATTRIBUTE = "_veneer_attention"  # what a fused block is
_KNOWN = {"scaling", "sliding_window", "softcap", "dropout", "is_causal"}


@dataclass(frozen=True)
class _Block:
    """What is known of a fused block.

    Attributes:
        projections: the names of the linears that make queries, keys and values.
        sizes: the widths of the three.
        arguments: what it passes to attention beside the tensors.
    """

    projections: tuple[str, ...]
    sizes: tuple[int, int, int]
    arguments: dict[str, Any]

    def parts(self, found: list[LowRankLinear]) -> tuple[LowRankLinear, LowRankLinear, LowRankLinear]:
        """The three projections' operands, from those of the linears."""
        q, k, v = found if len(found) == 3 else split_rows(found[0], self.sizes)
        return q, k, v


def fuse_attention(block: nn.Module) -> bool:
    """Replaces the forward of ``block``, an instance, if it is recognised and gives the same; says whether it did."""
    projections = _looks_right(block)
    found = _probe(block, projections) if projections else None
    if found is None:
        return False
    block.__dict__[_ATTRIBUTE] = found
    block.forward = types.MethodType(_forward, block)
    return True


def is_fused(block: nn.Module) -> bool:
    """Whether :func:`fuse_attention` took it over."""
    return _ATTRIBUTE in block.__dict__


@contextlib.contextmanager
def windows_set_to(root: nn.Module, window: int) -> Iterator[None]:
    """Within it, fused blocks of ``root`` that have a window have this one."""
    before = {part: part.__dict__[_ATTRIBUTE] for part in root.modules() if is_fused(part)}
    try:
        for block, known in before.items():
            if known.arguments.get("sliding_window"):
                block.__dict__[_ATTRIBUTE] = replace(known, arguments={**known.arguments, "sliding_window": window})
        yield
    finally:
        for block, known in before.items():
            block.__dict__[_ATTRIBUTE] = known


def attention_arguments(block: nn.Module) -> dict[str, Any] | None:
    """What a fused block of four linears alone passes to attention beside the tensors, its ``scaling`` among it; None
    for any other block."""
    known: _Block | None = block.__dict__.get(_ATTRIBUTE)
    if known is None or len(known.projections) == 1 or _has_norms(block):
        return None
    size: Any = block.head_dim
    return {**known.arguments, "scaling": known.arguments.get("scaling") or size**-0.5}


def _forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    x: Any = kwargs.get("hidden_states")
    turns: Any = kwargs.get("position_embeddings")
    lengths: Any = kwargs.get("document_lengths")
    known: _Block = self.__dict__[_ATTRIBUTE]
    is_ours = not args and x is not None and bool(turns) and bool(lengths) and kwargs.get("past_key_values") is None
    # Some models turn a part of each head alone; a norm may have been put into a wrapper.
    is_ours = is_ours and turns[0].shape[-1] == self.head_dim
    is_ours = is_ours and (not _has_norms(self) or all(is_plain_norm(getattr(self, name)) for name in _NORMS))
    linears = low_rank_of([getattr(self, name) for name in known.projections], x) if is_ours else None
    if linears is None:
        own: tuple[Tensor, Tensor | None] = type(self).forward(self, *args, **kwargs)
        return own
    batch, length, _ = x.shape
    # Rows become documents of one long row.
    cos, sin = (t.expand(batch, length, -1).reshape(batch * length, -1) for t in turns)
    norms = (self.q_norm.norm, self.k_norm.norm) if _has_norms(self) else None
    q, k, v = qkv_rope(x, *known.parts(linears), cos, sin, norms)
    scaling = known.arguments.get("scaling") or q.shape[-1] ** -0.5
    window, softcap = known.arguments.get("sliding_window"), known.arguments.get("softcap")
    prefix = kwargs.get("shared_prefix", 0)
    out = document_attention(q, k, v, list(lengths) * batch, scaling, window, softcap, prefix)
    return self.o_proj(out.transpose(0, 1).reshape(batch, length, -1)), None


def _has_norms(block: nn.Module) -> bool:
    return _NORMS[0] in block._modules


def _looks_right(block: nn.Module) -> tuple[str, ...] | None:
    """The names of the projections, if the block is made of what is known; else None."""
    children = block._modules
    names = set(children) - set(_NORMS)
    projections = _JOINT if names == {*_JOINT, "o_proj"} else _SEPARATE
    kinds = (nn.Linear,) if projections is _JOINT else (nn.Linear, QuantizedLinear)
    is_right = (
        names == {*projections, "o_proj"}
        and len(set(_NORMS) & set(children)) != 1
        and all(type(children[name]) in kinds for name in projections)
        and type(children["o_proj"]) in (nn.Linear, QuantizedLinear)
        and not block._parameters
        and isinstance(getattr(block, "head_dim", None), int)
        and hasattr(getattr(block, "config", None), "_attn_implementation")
        and not getattr(block, "attention_dropout", 0.0)
        and "forward" not in block.__dict__
    )
    return projections if is_right else None


@torch.no_grad()
def _probe(block: Any, projections: tuple[str, ...]) -> _Block | None:
    """What the block is, if its tensors are those that we compute; else None."""
    seen: dict[str, Any] = {}

    def write_down(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.update(qkv=(query, key, value), kwargs=kwargs)
        return query.transpose(1, 2), None

    linears = [getattr(block, name) for name in projections]
    weight = linears[0].weight
    generator = torch.Generator().manual_seed(0)
    theta = 6 * torch.rand(1, 5, block.head_dim // 2, generator=generator)
    cos, sin = (f(torch.cat((theta, theta), -1)).to(weight.device, weight.dtype) for f in (torch.cos, torch.sin))
    own_norms = [fused_norm(getattr(block, name)) for name in _NORMS] if _has_norms(block) else []
    if None in own_norms:
        return None
    norms: Any = tuple(norm.norm for norm in own_norms if norm is not None) or None
    AttentionInterface.register(_PROBE, write_down)
    config, before, training = block.config, block.config._attn_implementation, block.training
    config._attn_implementation = _PROBE
    block.eval()
    try:
        for size in (1.0, 1000.0):
            x = size * torch.randn(1, 5, weight.shape[1], generator=generator)
            x = x.to(weight.device, weight.dtype)
            found = block(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)[0]
            widths = [t.shape[1] * t.shape[3] for t in seen["qkv"]]
            known = _Block(projections, (widths[0], widths[1], widths[2]), seen["kwargs"])
            parts = known.parts([zero_update(linear) for linear in linears])
            ours = qkv_rope(x[0], *parts, cos[0], sin[0], norms)
            output = block.o_proj(ours[0].transpose(0, 1).reshape(1, 5, -1))
            if not all(map(is_same, (*ours, output), (*(t[0] for t in seen["qkv"]), found))):
                return None
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None  # a form that is not the one known here
    finally:
        config._attn_implementation = before
        block.train(training)
    unknown = {key for key, value in known.arguments.items() if key not in _KNOWN and value is not None}
    return None if unknown else known
