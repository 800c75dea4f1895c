"""From hidden states to the loss: the output head of any causal language model, on trained positions only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.errors import ModelError
from veneer.kernels.linear_cross_entropy import IGNORE_INDEX, TokenLosses, linear_cross_entropy
from veneer.models.documents import by_lengths, longest_document
from veneer.models.strict import first_line

_CHUNK_ROWS = 512


class BatchLike(Protocol):
    """What :class:`veneer.data.Batch` offers; named here because floors of one height do not import each other."""

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]
    targets: Tensor  # [B, T], shifted; -100 where nothing is trained
    document_lengths: list[int] | None
    shared_prefix: int  # 0, or the length of the first document, which all others begin with


@dataclass(frozen=True)
class LossOutput:
    """Sums over the trained tokens of a batch; whoever knows the whole optimizer step divides."""

    loss_sum: Tensor  # scalar float32, differentiable
    trained: int
    correct: int


@dataclass(frozen=True)
class _Logits:
    """How this model turns head outputs into logits."""

    softcap: float | None
    scale: float


def body_of(module: nn.Module) -> nn.Module:
    """The part that reads ids and gives the last hidden states: what ``get_decoder`` says, where that is such a part.

    Some classes say the whole model there (Llama 4), or a linear that happens to be called ``decoder`` (ModernBERT's).

    Raises:
        ModelError: there is no such part.
    """
    asked: Any = module
    embedding = asked.get_input_embeddings()
    for part in (asked.get_decoder(), asked.base_model, getattr(asked, "model", None)):
        if isinstance(part, nn.Module) and part is not module and any(inner is embedding for inner in part.modules()):
            return part
    raise ModelError(
        f"{type(module).__name__} does not say which part of it gives the hidden states",
        fix="use a causal language model of another family",
    )


def hidden_states(module: nn.Module, batch: BatchLike) -> Tensor:
    """The last hidden states ``[B, T, d]`` (after the final norm) of a packed or right-padded batch.

    No dense mask is built: packed documents are isolated by their lengths, and right padding cannot be seen under a
    causal mask. Where lengths are not enough for a model, its own masks are built, of one document after the other.
    """
    body = body_of(module)
    device = next(module.parameters()).device
    ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
    lengths, prefix = batch.document_lengths or [ids.shape[1]], batch.shared_prefix
    arguments: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    limit = longest_document(module, body)
    if max(lengths) + prefix <= limit:
        arguments |= by_lengths(lengths, device) | ({"shared_prefix": prefix} if prefix else {})
    elif len(lengths) > 1:
        if not limit:
            raise ModelError(
                f"{type(module).__name__} does not let documents be isolated in a packed row",
                fix="set packing: false",
            )
        return _one_by_one(body, ids, positions, lengths, prefix)
    states: Tensor = body(**arguments).last_hidden_state
    return states


def settle_documents(module: nn.Module) -> None:
    """Finds out what :func:`hidden_states` has to know of a model, ahead of whoever watches its layers at work."""
    longest_document(module, body_of(module))


def _one_by_one(body: nn.Module, ids: Tensor, positions: Tensor, lengths: list[int], prefix: int) -> Tensor:
    """The hidden states of a packed row's documents, each computed by itself under the model's own masks."""
    found: list[Tensor] = []
    start = 0
    for number, length in enumerate(lengths):
        part = torch.arange(start, start + length, device=ids.device)
        before = prefix if number else 0  # the first document is what the others begin with
        part = torch.cat((torch.arange(before, device=ids.device), part))
        output: Any = body(input_ids=ids[:, part], position_ids=positions[:, part], use_cache=False)
        found.append(output.last_hidden_state[:, before:])
        start += length
    return torch.cat(found, 1)


def answer_loss(module: nn.Module, hidden: Tensor, targets: Tensor) -> LossOutput:
    """The cross entropy of the trained positions, summed.

    Args:
        module: the causal language model that ``hidden`` comes from.
        hidden: ``[B, T, d]``.
        targets: ``[B, T]`` int64, already shifted, -100 where nothing is trained.
    """
    losses = token_losses(module, hidden, targets.to(hidden.device))
    return LossOutput(losses.nll.sum(), len(losses.nll), int(losses.correct.sum()))


def token_losses(module: nn.Module, hidden: Tensor, targets: Tensor) -> TokenLosses:
    """Per-token losses of the trained positions, through the plain head where it is plain, else through its module."""
    head = module.get_output_embeddings()  # type: ignore[operator]  # every transformers causal model has it
    how = _logits_of(module)
    if type(head) is nn.Linear:
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, how.softcap, how.scale)
    # An adapted head: through its own forward, chunk by chunk, the logits computed again in the backward.
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    positions = torch.nonzero(labels != IGNORE_INDEX).squeeze(-1)
    rows, labels = flat[positions], labels[positions]

    def chunk(part: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        z = head(part).float() * how.scale
        if how.softcap is not None:
            z = how.softcap * torch.tanh(z / how.softcap)
        return nn.functional.cross_entropy(z, label, reduction="none"), z.argmax(-1) == label

    pairs = [
        checkpoint(chunk, rows[i : i + _CHUNK_ROWS], labels[i : i + _CHUNK_ROWS], use_reentrant=False)
        for i in range(0, max(len(rows), 1), _CHUNK_ROWS)
    ]
    return TokenLosses(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]), positions)


@torch.no_grad()
def answer_logprobs(module: nn.Module, batch: BatchLike) -> tuple[Tensor, Tensor]:
    """``(negative log-likelihood [documents] float64, trained tokens [documents] int64)`` of each document's answer.

    Documents are those of the packed row, or the rows of a padded batch, in their order.
    """
    losses = token_losses(module, hidden_states(module, batch), batch.targets.to(next(module.parameters()).device))
    rows, length = batch.input_ids.shape
    lengths = batch.document_lengths or [length] * rows
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[losses.positions.cpu()]
    nll = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, document, losses.nll.double().cpu())
    return nll, torch.bincount(document, minlength=len(lengths))


def _logits_of(module: nn.Module) -> _Logits:
    """Reads the model's own scale and cap from its config; :func:`check_head` proves them."""
    config = module.config.get_text_config()  # type: ignore[union-attr, operator]  # transformers' config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    if model_divides := getattr(config, "logits_scaling", None):  # Granite divides
        scale /= float(model_divides)
    return _Logits(softcap, scale)


@torch.no_grad()
def check_head(module: nn.Module) -> None:
    """Proves on four tokens that our head gives the model's own logits, so that no unknown scaling is missed.

    Raises:
        ModelError: the model does something to its logits that is not known here, or does not run on text alone.
    """
    device = next(module.parameters()).device
    head = module.get_output_embeddings()  # type: ignore[operator]  # every transformers causal model has it
    if head is None:
        raise ModelError(f"{type(module).__name__} has no output head", fix="use a causal language model")
    ids = torch.arange(4, device=device)[None] % module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    settle_documents(module)
    try:
        z = head(body_of(module)(input_ids=ids, use_cache=False).last_hidden_state).float()
        how = _logits_of(module)
        z = z * how.scale
        if how.softcap is not None:
            z = how.softcap * torch.tanh(z / how.softcap)
        expected = module(input_ids=ids, use_cache=False).logits.float()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{type(module).__name__} cannot be run on text the way causal language models are: {first_line(error)}",
            where="the check before the first step, on four tokens",
            fix="use a causal language model of another family, or report the model's name",
        ) from error
    tolerance = 1e-3 if expected.dtype == torch.float32 else 2e-2
    largest = float(expected.abs().max())
    if z.shape != expected.shape or not torch.allclose(z, expected, rtol=tolerance, atol=tolerance * largest * 10):
        raise ModelError(
            f"{type(module).__name__} changes its logits after the head in a way that is not known here",
            fix="report the model's name; its loss would be wrong",
        )
