"""Swaps recognised blocks of a loaded model for fused ones: on the instance, by structure, checked by numbers.

A block is recognised by what it is made of (a gated MLP is gate, up and down projections and an activation; an RMSNorm
is a weight and an epsilon), and taken over only when the fused block gives the same output on a random input. What is
not recognised keeps its own code and still trains. Names of children stay, so paths and files do not change.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.frozen import take_over
from veneer.kernels.gated_mlp import gated_mlp
from veneer.kernels.rms_norm import rms_norm
from veneer.models import attention
from veneer.models.fused_attention import fuse_attention
from veneer.models.low_rank import low_rank_of, zero_update
from veneer.quant import QuantizedLinear

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELU": "gelu", "GELUActivation": "gelu"}
_ACTIVATIONS |= {"PytorchGELUTanh": "gelu_tanh", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh"}


class FusedRmsNorm(nn.Module):
    """An RMSNorm whose backward skips the frozen weight; shares the original's parameter."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class FusedGatedMlp(nn.Module):
    """A gated MLP that runs as one operation where its three linears are plain but for adapters; else as its parts."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act_fn: nn.Module, act: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn
        self.activation = act
        self.recompute = False  # in the backward, instead of keeping what lies between

    def forward(self, x: Tensor) -> Tensor:
        first, last = low_rank_of([self.gate_proj, self.up_proj], x), low_rank_of([self.down_proj], x)
        if first is None or last is None:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return out
        return gated_mlp(x, first[0], first[1], last[0], self.activation, self.recompute)


@dataclass
class Fused:
    """What :func:`fuse` did, by the class names of the original blocks."""

    swapped: dict[str, int] = field(default_factory=dict)
    documents: bool = False  # attention runs under our name and honours document boundaries

    def __str__(self) -> str:
        blocks = ", ".join(f"{count} {name}" for name, count in sorted(self.swapped.items())) or "no blocks"
        return f"fused {blocks}; packed documents {'isolated' if self.documents else 'not supported by this model'}"


def fuse(module: nn.Module) -> Fused:
    """Swaps what is recognised in ``module`` (in place) and routes its attention through ours where it can be."""
    outputs: Any = getattr(module, "get_output_embeddings", lambda: None)
    head = outputs()
    for part in module.modules():
        if part is not head:
            take_over(part)
    fused = Fused(documents=_route_attention(module))
    verdicts: dict[type, bool] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if fused.documents and fuse_attention(child):
                fused.swapped[type(child).__name__] = fused.swapped.get(type(child).__name__, 0) + 1
                continue
            block = _fused_block(child)
            if block is None:
                continue
            kind = type(child)
            if kind not in verdicts:
                verdicts[kind] = _same_output(child, block)
            if verdicts[kind]:
                block.train(child.training)
                setattr(parent, name, block)
                fused.swapped[kind.__name__] = fused.swapped.get(kind.__name__, 0) + 1
    return fused


def _route_attention(module: nn.Module) -> bool:
    if not getattr(module, "_supports_attention_backend", False):
        return False
    attention.register()
    module.set_attn_implementation(attention.NAME)  # type: ignore[operator]  # a transformers model has it
    return True


def _fused_block(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    if len(inspect.signature(type(block).forward).parameters) != 2:  # self and x; a state space's norm takes a gate too
        return None
    if set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        act = _ACTIVATIONS.get(type(children["act_fn"]).__name__)
        gate, up, down = (children[name] for name in ("gate_proj", "up_proj", "down_proj"))
        if act is None or any(type(layer) not in (nn.Linear, QuantizedLinear) for layer in (gate, up, down)):
            return None
        return FusedGatedMlp(gate, up, down, children["act_fn"], act)
    parameters = dict(block.named_parameters())
    if not children and set(parameters) == {"weight"} and "RMSNorm" in type(block).__name__:
        eps = getattr(block, "variance_epsilon", getattr(block, "eps", None))
        if isinstance(eps, float) and parameters["weight"].dim() == 1:
            return FusedRmsNorm(parameters["weight"], eps)
    return None


@torch.no_grad()
def _same_output(original: nn.Module, block: nn.Module) -> bool:
    """Whether both give the same on a random input, the MLP through its fused path with a zero update."""
    weight: Any = block.gate_proj.weight if isinstance(block, FusedGatedMlp) else block.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    expected = original(x)
    if isinstance(block, FusedGatedMlp):
        gate, up, down = (zero_update(layer) for layer in (block.gate_proj, block.up_proj, block.down_proj))
        got = gated_mlp(x, gate, up, down, block.activation)
    else:
        got = block(x)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return bool((got - expected).float().norm() <= tolerance * expected.float().norm() + 1e-12)
