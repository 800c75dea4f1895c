"""Self-attention with its projections and rotation as one operation, where a block is found to compute just that.

A block is four linears and no parameter of its own. What it passes to attention (scale, window, soft cap) is taken from
its own forward, run once with an attention that writes its arguments down; queries, keys, values and output have to be
ours too, at several sizes of the input (some models clamp). Its forward is then replaced on the instance, and hands
back to its own code whatever is not training or scoring rows of documents with plain projections, but for adapters.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from veneer.kernels.attention import document_attention
from veneer.kernels.qkv_rope import qkv_rope
from veneer.models.low_rank import low_rank_of, zero_update
from veneer.quant import QuantizedLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_PROBE = "veneer-probe"
_ATTRIBUTE = "_veneer_attention"  # what a fused block says to attention
_KNOWN = {"scaling", "sliding_window", "softcap", "dropout", "is_causal"}


def fuse_attention(block: nn.Module) -> bool:
    """Replaces the forward of ``block``, an instance, if it is recognised and gives the same; says whether it did."""
    if not _looks_right(block):
        return False
    arguments = _probe(block)
    if arguments is None:
        return False
    block.__dict__[_ATTRIBUTE] = arguments
    block.forward = types.MethodType(_forward, block)
    return True


def attention_arguments(block: nn.Module) -> dict[str, Any] | None:
    """What a fused block passes to attention beside the tensors, its ``scaling`` among it; None for any other block."""
    arguments: dict[str, Any] | None = block.__dict__.get(_ATTRIBUTE)
    if arguments is None:
        return None
    size: Any = block.head_dim
    return {**arguments, "scaling": arguments.get("scaling") or size**-0.5}


def _forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    x: Any = kwargs.get("hidden_states")
    turns, lengths = kwargs.get("position_embeddings"), kwargs.get("document_lengths")
    is_known = not args and x is not None and turns and lengths and kwargs.get("past_key_values") is None
    parts = low_rank_of([getattr(self, name) for name in _PROJECTIONS], x) if is_known else None
    if parts is None or not turns or not lengths:
        own: tuple[Tensor, Tensor | None] = type(self).forward(self, *args, **kwargs)
        return own
    batch, length, _ = x.shape
    # Rows become documents of one long row.
    cos, sin = (t.expand(batch, length, -1).reshape(batch * length, -1) for t in turns)
    q, k, v = qkv_rope(x, parts[0], parts[1], parts[2], cos, sin)
    arguments = self.__dict__[_ATTRIBUTE]
    scaling = arguments.get("scaling") or q.shape[-1] ** -0.5
    window, softcap = arguments.get("sliding_window"), arguments.get("softcap")
    prefix = kwargs.get("shared_prefix", 0)
    out = document_attention(q, k, v, list(lengths) * batch, scaling, window, softcap, prefix)
    return self.o_proj(out.transpose(0, 1).reshape(batch, length, -1)), None


def _looks_right(block: nn.Module) -> bool:
    children = block._modules
    return (
        set(children) == {*_PROJECTIONS, "o_proj"}
        and all(type(child) in (nn.Linear, QuantizedLinear) for child in children.values())
        and not block._parameters
        and isinstance(getattr(block, "head_dim", None), int)
        and hasattr(getattr(block, "config", None), "_attn_implementation")
        and "forward" not in block.__dict__
    )


@torch.no_grad()
def _probe(block: Any) -> dict[str, Any] | None:
    """What the block passes to attention beside the tensors, if its tensors are those that we compute; else None."""
    seen: dict[str, Any] = {}

    def write_down(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.update(qkv=(query, key, value), kwargs=kwargs)
        return query.transpose(1, 2), None

    weight = block.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    theta = 6 * torch.rand(1, 5, block.head_dim // 2, generator=generator)
    cos, sin = (f(torch.cat((theta, theta), -1)).to(weight.device, weight.dtype) for f in (torch.cos, torch.sin))
    q, k, v = (zero_update(getattr(block, name)) for name in _PROJECTIONS)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    AttentionInterface.register(_PROBE, write_down)
    config, before, training = block.config, block.config._attn_implementation, block.training
    config._attn_implementation = _PROBE
    block.eval()
    try:
        for size in (1.0, 1000.0):
            x = size * torch.randn(1, 5, weight.shape[1], generator=generator)
            x = x.to(weight.device, weight.dtype)
            found = block(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)[0]
            ours = qkv_rope(x[0], q, k, v, cos[0], sin[0])
            output = block.o_proj(ours[0].transpose(0, 1).reshape(1, 5, -1))
            for got, want in zip((*ours, output), (*(t[0] for t in seen["qkv"]), found)):
                if got.shape != want.shape or (got - want).float().norm() > tolerance * want.float().norm() + 1e-12:
                    return None
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None  # a form that is not the one known here
    finally:
        config._attn_implementation = before
        block.train(training)
    arguments: dict[str, Any] = seen["kwargs"]
    unknown = {key for key, value in arguments.items() if key not in _KNOWN and value is not None}
    return None if unknown else arguments
