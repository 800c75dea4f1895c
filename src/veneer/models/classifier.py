"""Bases with a classification head: encoders (BERT, RoBERTa, ModernBERT, ...) and decoders that pool their last token.

What lies outside the body of the network is the head. It is fresh (or belongs to another task), so an adapter has to
train and save it whole: a fresh layer that is frozen and not saved would be another random one after each load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from veneer.errors import ModelError
from veneer.models.strict import first_line, quiet, raise_report

POOLER = "pooler"  # transformers' name for the part of a body that language modelling leaves untrained
TASK_TYPE = "SEQ_CLS"  # PEFT's name for the task
OUTPUT_STD = 1e-3  # of the fresh last layer: not zero, or nothing before it would have a gradient in the first step


class LabelledBatchLike(Protocol):
    """What :class:`veneer.data.label_batch.LabelledBatch` offers."""

    input_ids: Tensor  # [B, T]
    token_types: Tensor  # [B, T]

    @property
    def attention_mask(self) -> Tensor | None: ...  # [B, T] bool


def load_classifier_module(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    labels: Sequence[str],
    pad_id: int | None,
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model of a folder with a head for ``labels``, on the CPU; the body's tensors are all read from the files.

    A head in the files is kept where it is for the same labels in the same order; every other one is drawn anew.

    Args:
        config: of transformers; is changed to hold the labels and the padding token.
        pad_id: what rows are filled up with, for a config that does not say it.
        seed: of the fresh head: the same one gives the same bits.

    Returns:
        The module, and the paths of the modules that are the head.

    Raises:
        ModelError: a tensor of the body is missing, left over or of another shape; the file cannot be read; the model
            has no padding token.
    """
    same_head = _describes(config, labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    _set_pad_id(config, pad_id, folder)
    config.use_cache = False
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module, report = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # a head for other labels is drawn anew; the rest is raised below
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise ModelError(
                f"transformers cannot load this model as a classifier: {first_line(error)}",
                where=str(folder),
                fix="check config.json and the weight files against the model's source",
            ) from error
        if module.base_model is module:
            raise ModelError(
                f"{type(module).__name__} does not say which part of it is the head",
                where=str(folder),
                fix="use another base, such as one of the BERT, ModernBERT or Llama families",
            )
        head = _head(module, report, folder)
        if not same_head:
            _draw_output(module, head, len(labels))
    return module, head


def class_logits(module: nn.Module, batch: LabelledBatchLike) -> Tensor:
    """``[B, C]`` float32: the model's own forward on right-padded rows."""
    config: Any = module.config
    device = next(module.parameters()).device
    mask = batch.attention_mask
    assert mask is not None  # rows are padded side by side, never packed: an encoder sees its whole row
    arguments = {"input_ids": batch.input_ids.to(device), "attention_mask": mask.long().to(device)}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        # Elsewhere the argument may mean something else: GPT-2 adds these ids' word embeddings.
        arguments["token_type_ids"] = batch.token_types.to(device)
    logits: Tensor = module(**arguments).logits
    return logits.float()


def labels_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's classes, in the order of its logits."""
    names: Mapping[int, str] = module.config.id2label  # type: ignore[union-attr, assignment]  # transformers' config
    return tuple(names[index] for index in range(len(names)))


def pad_id_of_classifier(module: nn.Module) -> int:
    """What rows are filled up with: the id that a decoder skips when it looks for a row's last token."""
    return int(module.config.get_text_config().pad_token_id)  # type: ignore[union-attr, operator]  # set when it was loaded


def longest_row(module: nn.Module) -> int | None:
    """How many tokens the model has positions for; None where its config names no limit."""
    config: Any = module.config
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    for path, layer in module.named_modules():
        if path.endswith("position_embeddings") and isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            limit = layer.num_embeddings - layer.padding_idx - 1  # RoBERTa counts positions from behind its padding's
    return limit if limit is not None and limit > 0 else None


@torch.no_grad()
def unread_pooler(module: Any) -> str | None:
    """The path of a pooler that the logits do not depend on: BigBird's body has one, and its classifier reads none."""
    path = f"{module.base_model_prefix}.{POOLER}"
    if not any(name.startswith(f"{path}.") for name, _ in module.named_parameters()):
        return None

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.nan)

    hook, training = module.get_submodule(path).register_forward_hook(spoil), module.training
    ids = torch.arange(1, 9, device=module.device)[None] % module.config.get_text_config().vocab_size
    try:
        logits: Tensor = module.eval()(input_ids=ids).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it does not tell: whoever gives it rows of text will see
    finally:
        hook.remove()
        module.train(training)
    return None if bool(logits.isnan().any()) else path


def _describes(config: Any, labels: Sequence[str]) -> bool:
    """Whether the files hold a classifier for just these labels."""
    names = getattr(config, "architectures", None) or [""]
    return names[0].endswith("ForSequenceClassification") and list(config.id2label.values()) == list(labels)


def _set_pad_id(config: Any, pad_id: int | None, folder: Path) -> None:
    text = config.get_text_config()
    own: int | None = text.pad_token_id
    if own is None or own < 0:
        if pad_id is None:
            raise ModelError(
                "the tokenizer has no padding token and no eos token that could stand for one",
                where=str(folder),
                fix="give the tokenizer a pad_token",
            )
        own = pad_id
    text.pad_token_id = config.pad_token_id = own


def _head(module: Any, report: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The paths of the head: all children of the model but its body, and a pooler in it that the files do not have
    and the head reads.

    Raises:
        ModelError: as :func:`veneer.models.strict.raise_report`, for the body.
    """
    body = module.base_model_prefix
    outside = [
        name for name, child in module.named_children() if name != body and any(True for _ in child.parameters())
    ]
    missing = set(report.get("missing_keys", ()))
    pooler = f"{body}.{POOLER}"
    of_pooler = {name for name, _ in module.named_parameters() if name.startswith(f"{pooler}.")}
    fresh_pooler = bool(of_pooler) and of_pooler <= missing
    if fresh_pooler:
        missing -= of_pooler
        fresh_pooler = unread_pooler(module) is None

    def in_body(name: str) -> bool:
        return name.startswith(f"{body}.")

    raise_report(
        {
            "missing_keys": sorted(filter(in_body, missing)),
            "unexpected_keys": sorted(filter(in_body, report.get("unexpected_keys", ()))),
            "mismatched_keys": [entry for entry in report.get("mismatched_keys", ()) if in_body(entry[0])],
            "error_msgs": report.get("error_msgs"),
        },
        folder,
    )
    return (*([pooler] if fresh_pooler else []), *outside)


@torch.no_grad()
def _draw_output(module: Any, head: Sequence[str], classes: int) -> None:
    """Draws the last layer anew, close to zero, so that all classes are about as likely and the loss begins at ln C.

    With the usual 0.02 a decoder's large last states make logits of several units, which steps are spent to undo; and a
    layer read from the files would begin with the opinions of another task.
    """
    for path in head:
        for parameter in module.get_submodule(path).parameters():
            if parameter.shape[0] == classes and parameter.ndim == 2:
                parameter.normal_(0.0, OUTPUT_STD)
            elif parameter.shape[0] == classes:
                parameter.zero_()
