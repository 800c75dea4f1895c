"""One new token of every row through all layers of a Llama-like decoder, in native code.

A layer is ``x + o(attention(norm(x)))`` and then ``x + down(silu(gate(norm(x))) * up(norm(x)))``, each linear perhaps
with a low-rank update. A token costs little more than reading the weights: there is no Python between the layers.

Names: ``B`` rows, ``d`` width, ``H`` query heads, ``K`` key heads, ``D`` head size, ``S`` positions of the past.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from veneer.kernels import native

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias", "a", "b", "less_one")),
        ("out", _INT),
        ("rank", _INT),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm", _POINTER),
        ("mlp_norm", _POINTER),
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("keys", _POINTER),
        ("values", _POINTER),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("layer", "x", "norm", "cos", "sin", "mask")),
        *((name, _INT) for name in ("layers", "rows", "width", "heads", "key_heads", "head", "hidden", "length")),
        *((name, _INT) for name in ("key_row", "key_head", "mask_row")),
        ("eps", _FLOAT),
        ("scaling", _FLOAT),
    )


@dataclass(frozen=True)
class StepLinear:
    """``y = g (x W^T + (x A^T) B^T) + b``; every tensor contiguous and of one dtype."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]
    A: Tensor | None = None  # [r, in], with the scaling in it
    B: Tensor | None = None  # [out, r]
    less_one: Tensor | None = None  # [out], g - 1


@dataclass(frozen=True)
class StepLayer:
    """The weights of a layer."""

    norm: Tensor  # [d], before attention
    mlp_norm: Tensor  # [d]
    q: StepLinear
    k: StepLinear
    v: StepLinear
    o: StepLinear
    gate: StepLinear
    up: StepLinear
    down: StepLinear


@dataclass
class DecoderStep:
    """All layers, ready to be called once for every token.

    Attributes:
        norm: ``[d]``, after the last layer.
        head: ``D``.
        scaling: factor on the scores of attention.
    """

    layers: Sequence[StepLayer]
    norm: Tensor
    eps: float
    head: int
    scaling: float
    _structs: ctypes.Array[_Layer] = field(init=False)

    def __post_init__(self) -> None:
        self._structs = (_Layer * len(self.layers))(*map(_layer, self.layers))

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        length: int,
        mask: Tensor | None,
    ) -> Tensor:
        """The hidden states of the new tokens, after the final norm; their keys and values join the past.

        Args:
            x: ``[B, d]`` embeddings.
            cos, sin: ``[B, D]`` of each row's position.
            past: the buffers of keys and values, ``[B, K, more than S, D]``, contiguous but for B, of each layer; with
                those of the first layers alone, these are what is computed.
            length: ``S``.
            mask: ``[B, at least S + 1]`` int64, 1 where a column is seen; None: all are.

        Returns:
            ``[B, d]``.
        """
        for struct, (keys, values) in zip(self._structs, past):
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
        first, keys = self.layers[0], past[0][0]
        out = x.contiguous().clone()
        step = _Step(
            layer=ctypes.addressof(self._structs),
            x=out.data_ptr(),
            norm=self.norm.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            layers=len(past),
            rows=len(x),
            width=x.shape[1],
            heads=len(first.q.weight) // self.head,
            key_heads=len(first.k.weight) // self.head,
            head=self.head,
            hidden=len(first.gate.weight),
            length=length,
            key_row=keys.stride(0),
            key_head=keys.stride(1),
            mask_row=0 if mask is None else mask.stride(0),
            eps=self.eps,
            scaling=self.scaling,
        )
        native.call_struct("decoder_step", x.dtype, step)
        return out


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b [B, out]`` of a few rows ``x [B, in]``: as fast as the weight can be read."""
    y = x.new_empty(len(x), len(weight))
    native.call("few_rows", x, weight, bias, y, len(x), len(weight), x.shape[1])
    return y


def _layer(layer: StepLayer) -> _Layer:
    names = ("q", "k", "v", "o", "gate", "up", "down")
    linears = {name: _linear(getattr(layer, name)) for name in names}
    return _Layer(norm=layer.norm.data_ptr(), mlp_norm=layer.mlp_norm.data_ptr(), **linears)


def _linear(p: StepLinear) -> _Linear:
    def at(t: Tensor | None) -> int | None:
        return None if t is None else t.data_ptr()

    rank = 0 if p.A is None else len(p.A)
    tensors = {"weight": p.weight, "bias": p.bias, "a": p.A, "b": p.B, "less_one": p.less_one}
    return _Linear(**{name: at(t) for name, t in tensors.items()}, out=len(p.weight), rank=rank)
