"""Decoding one token of every row in native code, for a model that is found to be put together as it computes.

Recognised by structure (fused attention without window or cap, gated MLP, RMSNorm, plain linears with one adapter at
most), and taken only when a token has shown that it gives what the model gives, after one layer and after all: a
multiplier on a residual, or another order of norms, cannot be seen from the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraLinear
from veneer.generate.cache import BufferLayer
from veneer.kernels import native
from veneer.kernels.decoder_step import DecoderStep, StepLayer, StepLinear, few_rows_linear
from veneer.kernels.frozen import has_own_forward
from veneer.kernels.lora_linear import scaled
from veneer.models.fused_attention import attention_arguments
from veneer.models.fused_mlp import FusedGatedMlp
from veneer.models.fused_norm import FusedRmsNorm

MOST_ROWS = 128  # the most that was measured: there it takes 0.76 of the time
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_VERDICT = "_veneer_step_is_right"  # on a module: what the comparison has shown
# |ours - the model's| / |the model's|: after one layer, and of the logits, where the layers' rounding has added up.
_TOLERANCES = {torch.bfloat16: (0.02, 0.2), torch.float32: (1e-4, 1e-3)}


class NativeStep:
    """A model's own next-token step in native code.

    Attributes:
        proven: it was compared with the model.
    """

    def __init__(self, module: Any, step: DecoderStep) -> None:
        self._module, self._step = module, step
        self._decoder = module.get_decoder()
        self._head = module.get_output_embeddings()
        self.proven = bool(getattr(module, _VERDICT, False))

    @classmethod
    def of(cls, module: Any) -> NativeStep | None:
        """The step of ``module``; None where it is not known how it computes, or native code cannot."""
        if not getattr(module, _VERDICT, True) or not hasattr(module, "get_decoder") or _is_hooked(module):
            return None
        step = _recognised(module.get_decoder())
        return None if step is None else cls(module, step)

    def takes(self, rows: int, layers: Sequence[Any]) -> bool:
        """Whether it can go on from this cache."""
        return rows <= MOST_ROWS and all(isinstance(layer, BufferLayer) and layer.is_initialized for layer in layers)

    def __call__(self, tokens: Tensor, positions: Tensor, layers: Sequence[BufferLayer], mask: Tensor | None) -> Tensor:
        """Logits ``[B, V]`` of the tokens ``[B]`` at ``positions [B, 1]``; their keys and values join the cache."""
        hidden = self._hidden(tokens, positions, [layer.grown() for layer in layers], layers[0].length - 1, mask)
        if type(self._head) is nn.Linear and native.can_take(self._head.weight, hidden, function="few_rows"):
            return few_rows_linear(hidden, self._head.weight, self._head.bias)
        logits: Tensor = self._head(hidden)
        return logits

    def prove(
        self,
        model: Callable[[], Tensor],
        tokens: Tensor,
        positions: Tensor,
        layers: Sequence[BufferLayer],
        mask: Tensor | None,
    ) -> Tensor:
        """A step by the model and by native code: the model's logits. What it shows is noted on the model.

        Args:
            model: the step as the model takes it.
        """
        ours = self(tokens, positions, layers, mask)
        for layer in layers:
            layer.crop(-1)  # the token's column is written again, the last time by the model
        alone = self._hidden(tokens, positions, [(layers[0].keys, layers[0].values)], layers[0].length, mask)
        seen: list[Any] = []
        hook = self._decoder.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            logits = model()
        finally:
            hook.remove()
        first = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
        after_one, after_all = _TOLERANCES[ours.dtype]
        same = _difference(alone, self._decoder.norm(first)[:, -1]) <= after_one
        self.proven = same and _difference(ours, logits) <= after_all
        setattr(self._module, _VERDICT, self.proven)
        return logits

    def _hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        length: int,
        mask: Tensor | None,
    ) -> Tensor:
        x = self._module.get_input_embeddings()(tokens[:, None])
        cos, sin = (t.expand(len(tokens), -1, -1)[:, 0].contiguous() for t in self._decoder.rotary_emb(x, positions))
        return self._step(x[:, 0], cos, sin, past, length, mask)


def _difference(ours: Tensor, model: Tensor) -> float:
    return float((ours.float() - model.float()).norm() / model.float().norm())


def _is_hooked(module: Any) -> bool:
    """Somebody listens to a part that native code passes over."""
    decoder = module.get_decoder()
    inner = [part for layer in getattr(decoder, "layers", ()) for part in layer.modules()]
    return any(part._forward_hooks or part._forward_pre_hooks for part in (module, decoder, *inner))


def _recognised(decoder: Any) -> DecoderStep | None:
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if not layers or not _is_plain_norm(norm) or not hasattr(decoder, "rotary_emb"):
        return None
    if not native.can_take(norm.weight, function="decoder_step"):
        return None
    found: list[StepLayer] = []
    for layer in layers:
        parts = _layer(layer, norm) if type(layer) is type(layers[0]) else None
        if parts is None or attention_arguments(layer.self_attn) != attention_arguments(layers[0].self_attn):
            return None
        found.append(parts)
    first = layers[0].self_attn
    known = attention_arguments(first)
    if known is None or known.get("sliding_window") or known.get("softcap"):
        return None
    return DecoderStep(found, norm.weight, norm.variance_epsilon, first.head_dim, known["scaling"])


def _layer(layer: Any, last: FusedRmsNorm) -> StepLayer | None:
    if set(layer._modules) != _LAYER or not isinstance(layer.mlp, FusedGatedMlp) or layer.mlp.activation != "silu":
        return None
    if not hasattr(layer.mlp, "gate_proj"):
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(_is_plain_norm(n) and n.variance_epsilon == last.variance_epsilon for n in norms):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if attention_arguments(attention) is None:
        return None
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    linears: list[StepLinear] = []
    for part in (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        operands = _linear(part, last.weight)
        if operands is None:
            return None
        linears.append(operands)
    return StepLayer(norms[0].weight, norms[1].weight, *linears)


def _is_plain_norm(norm: Any) -> TypeGuard[FusedRmsNorm]:
    return isinstance(norm, FusedRmsNorm) and not norm.offset


def _linear(layer: Any, like: Tensor) -> StepLinear | None:
    """The operands of a linear with one adapter at most, in the model's dtype."""
    adapted = isinstance(layer, LoraLinear)
    if adapted and (layer.transposed or not layer.is_plain(like)):
        return None
    if not adapted and (type(layer) is not nn.Linear or has_own_forward(layer)):
        return None
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, Tensor) or not native.can_take(
        like, weight, *([] if bias is None else [bias]), function="decoder_step"
    ):
        return None
    factors = layer.active_factors() if adapted else []
    if not factors:
        return StepLinear(weight, bias)
    if len(factors) > 1 or factors[0].dropout:
        return None
    only, dtype = factors[0], weight.dtype
    less_one = None if only.row_scale is None else (only.row_scale - 1).detach().to(dtype).contiguous()
    A, B = scaled(only.A.detach(), only.scaling, dtype).contiguous(), only.B.detach().to(dtype).contiguous()
    return StepLinear(weight, bias, A, B, less_one)
