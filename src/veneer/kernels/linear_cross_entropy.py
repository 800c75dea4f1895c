"""The output head and the cross entropy as one operation, over trained positions only.

``nll[t] = logsumexp(z_t) - z_t[y_t]``  with  ``z_t = cap(scale * (W h_t + b))``

The full logits never exist: rows are taken in chunks, and each chunk's gradient in ``h`` is finished in the forward:
``d nll[t] / d h_t = (softmax(z_t) - onehot(y_t)) W``. A row's gradient depends on that row alone, so any weighting of
the tokens in the backward (a mean, a preference loss) is a product with it. Idea: Wijmans et al. 2024 (cut cross
entropy), here without a second pass, since the head is frozen and needs no gradient of its own.

Names: ``T`` positions, ``n`` trained positions, ``d`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.check import checked
from veneer.kernels.matmul import Plain, Turned, sum_of_products

IGNORE_INDEX = -100
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TokenLosses:
    """What the head says about the trained positions, in their order."""

    nll: Tensor  # [n] float32, differentiable in the hidden states
    correct: Tensor  # [n] bool: the target is the most likely token
    positions: Tensor  # [n] int64: where in the flattened [T] they stand


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenLosses:
    """The operation in plain PyTorch, with full logits; the oracle of :func:`linear_cross_entropy`."""
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    positions = torch.nonzero(labels != IGNORE_INDEX).squeeze(-1)
    logits = _cap(torch.nn.functional.linear(flat[positions], weight, bias), softcap, logit_scale)
    nll = torch.nn.functional.cross_entropy(logits, labels[positions], reduction="none")
    return TokenLosses(nll, logits.argmax(-1) == labels[positions], positions)


@checked("head and cross entropy", linear_cross_entropy_reference, "hidden")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenLosses:
    """Per-token losses of the trained positions.

    Args:
        hidden: ``[..., d]`` hidden states after the final norm.
        weight: ``[V, d]`` the frozen output head, same dtype as ``hidden``.
        targets: ``[...]`` int64, the id that each position must predict; -100 where nothing is trained.
        bias: ``[V]`` or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        logit_scale: factor on the logits before the cap.

    Raises:
        IndexError: a target is no row of the head.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return linear_cross_entropy_reference(hidden, weight, targets, bias, softcap, logit_scale)
    labels = targets.reshape(-1)
    positions = torch.nonzero(labels != IGNORE_INDEX).squeeze(-1)
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), labels[positions]
    if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(weight):  # native code trusts its caller
        raise IndexError(f"a target is {wanted.min()} or {wanted.max()}, and the head has {len(weight)} words")
    nll, correct = _LinearCrossEntropy.apply(rows, weight, wanted, bias, softcap, logit_scale)  # type: ignore[no-untyped-call]  # torch's own
    return TokenLosses(nll, correct, positions)


def _cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    z = logits.float() if logits.dtype != torch.float64 else logits
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        nll = torch.empty(len(rows), dtype=wide, device=rows.device)
        correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
        grad = torch.empty_like(rows) if wants_grad else None
        step = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(rows), step):
            part, label = rows[start : start + step], labels[start : start + step, None]
            logits = sum_of_products(Turned(part, weight), bias=bias)
            # The logits become their gradient in place.
            if softcap is None and native.can_take(logits, function="cross_entropy"):
                chunk = slice(start, start + step)
                outputs = nll[chunk], correct[chunk]
                native.call("cross_entropy", logits, label, *outputs, *logits.shape, logit_scale, int(wants_grad))
                if grad is not None:
                    sum_of_products(Plain(logits, weight), out=grad[chunk])
                continue
            z = _cap(logits, softcap, logit_scale)
            del logits
            slope = None
            if softcap is not None and wants_grad:
                slope = 1 - (z / softcap).square_()
            logp = torch.log_softmax(z, -1)
            del z
            target = logp.gather(1, label)
            nll[start : start + step] = -target[:, 0]
            correct[start : start + step] = logp.argmax(-1) == label[:, 0]
            if grad is not None:
                g = logp.exp_()
                g.scatter_add_(1, label, torch.full_like(target, -1.0))
                if slope is not None:
                    g.mul_(slope)
                if logit_scale != 1.0:
                    g.mul_(logit_scale)
                sum_of_products(Plain(g.to(rows.dtype), weight), out=grad[start : start + step])
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor, _dcorrect: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * dnll[:, None].to(grad.dtype), None, None, None, None, None
