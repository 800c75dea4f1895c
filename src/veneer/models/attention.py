"""Attention under our name in transformers' own interface, with document boundaries.

A packed row ``[1, T]`` holds several documents; the caller passes their lengths as ``document_lengths`` and
transformers hands them through to here. Without them (generation, users' own loops) transformers' SDPA code runs with
its usual masks.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from veneer.kernels.attention import document_attention

NAME = "veneer"
_CALLED = "attention_interface"  # what the classes of transformers call the attention that they are given


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_lengths: Sequence[int] | None = None,
    shared_prefix: int = 0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: ``[B, H, T, D]``; key: ``[B, K, S, D]``; value: ``[B, K, S, E]``, usually with ``E = D``.
        attention_mask: ``[B, 1, T, S]`` bool (True: may be seen), or None for plain causal attention; not looked at
            when ``document_lengths`` is given.
        document_lengths: the lengths of the documents in each row, summing to ``T``; every row has the same.
        shared_prefix: 0, or (with one row) the length of the first document, which all others begin with.
        s_aux: ``[H]``, gpt-oss's sinks: scores that take their part of the softmax and have no value.

    Returns:
        ``[B, T, H, E]`` and None (weights are never returned).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = document_lengths is None and softcap is None and s_aux is None
    if is_plain and query.shape[2] == 1 and not dropout:
        return _one_token(query, key, value, attention_mask, scale), None
    if is_plain:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
        )
        return output
    if document_lengths is None:
        return _masked_attention(query, key, value, attention_mask, scale, softcap, s_aux), None
    batch, heads, length, _ = query.shape
    # Rows become documents of one long row: [B, H, T, D] -> [H, B * T, D].
    q, k, v = (t.transpose(0, 1).reshape(t.shape[1], batch * length, t.shape[3]) for t in (query, key, value))
    lengths = list(document_lengths) * batch
    out = document_attention(q, k, v, lengths, scale, sliding_window, softcap, shared_prefix, s_aux)
    # In the order of the result, which is copied once either way: some models (JetMoe) view it instead of reshaping it.
    return out.view(heads, batch, length, -1).permute(1, 2, 0, 3).contiguous(), None


def _one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one new token: the query heads that share a key head are its rows, so no key is copied."""
    batch, heads, _, size = q.shape
    grouped = q.view(batch, k.shape[1], heads // k.shape[1], size)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.view(batch, 1, heads, -1)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention with a soft cap on the scores (Gemma 2) or with sinks (gpt-oss), which SDPA does not have."""
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    out = torch.softmax(scores, -1)[..., : k.shape[2]].to(q.dtype) @ v.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Makes ``attn_implementation="veneer"`` known to transformers (its documented extension point)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def is_routed(module: nn.Module) -> bool:
    """Whether the attention of a transformers model runs under our name."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def makes_its_own_mask(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class computes the mask that it hands to attention (sparse attention does).

    Read from its source: it shows only at some lengths in the numbers. Such a mask is made for the implementations
    that transformers has, by their names or in the form that one of them takes, and is lost with documents in a row.
    """
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None or _CALLED not in code.co_varnames:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False  # no source to read
    masks = {mask.id for node in ast.walk(tree) if isinstance(mask := _mask_given(node), ast.Name)}
    computed = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(name, ast.Name) and name.id in masks for target in node.targets for name in ast.walk(target))
    )
    return any(isinstance(part, ast.BinOp) or _computes(part) for value in computed for part in ast.walk(value))


def _mask_given(node: ast.AST) -> ast.expr | None:
    """The mask in a call of attention."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == _CALLED):
        return None
    named = next((keyword.value for keyword in node.keywords if keyword.arg == "attention_mask"), None)
    return node.args[4] if len(node.args) > 4 else named


def _computes(part: ast.AST) -> bool:
    """A call of anything but ``masks.get(...)``, which picks one of those that were handed in."""
    return isinstance(part, ast.Call) and not (isinstance(part.func, ast.Attribute) and part.func.attr == "get")
