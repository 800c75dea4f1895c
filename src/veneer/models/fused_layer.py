"""Decoder layers in which the sum of the residual and of attention, and the norm of it, are one operation.

A layer is two norms, attention and an MLP. Its forward is replaced on the instance where it computes

    u = x + attention(norm(x))        y = u + mlp(norm(u))

which is found out by running both on random rows.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.rms_norm import add_rms_norm
from veneer.models.fused_norm import FusedRmsNorm, is_plain_norm, is_same_at_each_size, rows_of_each_size

_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def fuse_layer(layer: nn.Module) -> bool:
    """Replaces the forward of ``layer``, an instance, if it is recognised and gives the same; says whether it did.

    Its norms and its attention have been looked at before: they are ours where they can be.
    """
    children = {name: c for name, c in layer._modules.items() if not (type(c) is nn.Dropout and c.p == 0)}
    if set(children) != _CHILDREN or layer._parameters or "forward" in layer.__dict__:
        return False
    norm: Any = children["post_attention_layernorm"]
    if type(norm) is not FusedRmsNorm or not _gives_the_same(layer):
        return False
    layer.forward = types.MethodType(_forward, layer)
    return True


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    norm = self.post_attention_layernorm
    checkpointed = getattr(self, "gradient_checkpointing", False) and self.training  # by the class's own forward
    if checkpointed or args or not is_plain_norm(norm):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    total, normed = add_rms_norm(out, hidden_states, norm.weight, norm.variance_epsilon, norm.offset)
    return total + self.mlp(normed)


@torch.no_grad()
def _gives_the_same(layer: Any) -> bool:
    weight = layer.post_attention_layernorm.weight
    size = getattr(layer.self_attn, "head_dim", None)
    if not isinstance(size, int):
        return False
    x = rows_of_each_size(weight)
    theta = 6 * torch.rand(1, x.shape[1], size // 2, generator=torch.Generator().manual_seed(0))
    turns = tuple(f(torch.cat((theta, theta), -1)).to(weight.device, weight.dtype) for f in (torch.cos, torch.sin))
    given = {"position_embeddings": turns, "attention_mask": None}
    training = layer.training
    layer.eval()
    try:
        want = type(layer).forward(layer, x, **given)
        got = _forward(layer, x, **given)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False  # a form that is not the one known here
    finally:
        layer.train(training)
    return isinstance(want, Tensor) and is_same_at_each_size(got, want)
