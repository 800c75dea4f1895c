"""Classification: the cross entropy of each row's class, summed over rows.

The loop divides by the rows of the optimizer step, on all processes, as it does by tokens elsewhere. Rows are padded
side by side and never packed: an encoder sees all of a row, and a packed neighbour with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig
from veneer.data.classes import Classes, find_classes
from veneer.data.conversation import Rows
from veneer.data.dataset import TokenDataset
from veneer.data.label_batch import LabelledBatch, collate_labelled, labelled_batches
from veneer.data.label_render import LabelledDataset
from veneer.data.pack import Batch
from veneer.errors import TrainError
from veneer.evaluate.class_scores import confusion, macro_f1
from veneer.evaluate.classify import rendered
from veneer.files import write_json
from veneer.models import Base, load_base
from veneer.models.classifier import TASK_TYPE, class_logits, longest_row, unread_pooler
from veneer.models.strict import first_line
from veneer.recipe import Recipe
from veneer.train.distributed import World, local_device
from veneer.train.layout import Layout, deal
from veneer.train.sft import ObjectiveOutput

# Of the largest difference between a padded row and the same row alone, relative to the largest logit: rounding is far
# below, a pad token that is seen or pooled far above.
PADDING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def classification(module: nn.Module, batch: Batch) -> ObjectiveOutput:
    """``-sum_i log p(class_i | row_i)``; what is counted as trained are the rows.

    Args:
        module: a classifier.
        batch: padded rows with their classes.
    """
    logits, classes = _logits(module, batch)
    loss = nn.functional.cross_entropy(logits, classes, reduction="sum")
    return ObjectiveOutput(loss, len(classes), {"accuracy": float((logits.argmax(-1) == classes).sum())})


def class_micro_batches(indices: Sequence[int], dataset: TokenDataset, layout: Layout) -> Iterator[Batch]:
    """The padded micro-batches of these rows; the classifier's form of :func:`veneer.train.layout.micro_batches`."""
    assert isinstance(dataset, LabelledDataset)
    yield from labelled_batches(dataset, indices, layout.micro_batch_rows, layout.pad_id)


def load_classifier_of(recipe: Recipe, rows: Rows, held_out: Rows | None) -> tuple[Recipe, Base]:
    """The base of a recipe with a fresh head for the classes of its rows.

    Returns:
        The recipe with these classes as ``data.labels``, so that whoever reads it later has the same ids; and the base.

    Raises:
        DataError: the labels are not sound. ModelError: the base cannot be loaded.
    """
    names = list(find_classes(rows, held_out, recipe.data.labels).names)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labels": names})})
    base = load_base(
        recipe.base,
        dtype=recipe.dtype,
        device=local_device(recipe.device),
        revision=recipe.revision,
        labels=names,
        head_seed=recipe.train.seed,
    )
    return recipe, base


def for_classifier(config: LoraConfig, base: Base) -> LoraConfig:
    """``config`` with the head among what is trained and saved whole, and PEFT's name for the task.

    ``all-linear`` then leaves out a pooler that the head does not read.
    """
    saved = tuple(dict.fromkeys((*base.head, *(config.modules_to_save or ()))))
    unread = unread_pooler(base.module) if config.target_modules == "all-linear" else None
    if unread is not None and not isinstance(config.exclude_modules, str):
        within = [path for path, _ in base.module.named_modules() if f"{path}.".startswith(f"{unread}.")]
        config = dataclasses.replace(config, exclude_modules=[*(config.exclude_modules or ()), *within])
    return dataclasses.replace(config, modules_to_save=saved, task_type=TASK_TYPE)


def check_classifier(adapted: AdaptedModel, base: Base, dataset: TokenDataset, layout: Layout) -> None:
    """Proves that the head will be trained and saved, and on two rows that padding changes no logits.

    Raises:
        TrainError: a part of the head is left out, the model fails on a row, or a padded row gives other logits than
            the same row alone.
    """
    assert adapted.active is not None
    left_out = [path for path in base.head if path not in adapted.plans[adapted.active].saved]
    if left_out:
        raise TrainError(
            f"the classification head would stay as it was drawn: {', '.join(left_out)} is not in modules_to_save",
            where=type(adapted.module).__name__,
            fix=f"attach with LoraConfig(modules_to_save={list(base.head)}, task_type='{TASK_TYPE}')",
        )
    assert isinstance(dataset, LabelledDataset)
    order = sorted(range(len(dataset)), key=lambda index: int(dataset.lengths[index]))
    pair, training = [order[0], order[len(order) // 2]], adapted.module.training
    adapted.module.eval()
    try:
        with torch.no_grad():
            together = _logits(adapted.module, collate_labelled(dataset, pair, layout.pad_id))[0]
            alone = [_logits(adapted.module, collate_labelled(dataset, [index], layout.pad_id))[0] for index in pair]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrainError(
            f"{type(adapted.module).__name__} cannot classify these rows: {first_line(error)}",
            where=f"rows {dataset.row_ids[pair[0]]} and {dataset.row_ids[pair[1]]}",
            fix="use a tokenizer that frames rows as this model was trained (BART reads a row's last </s>), or another "
            "base, such as one of the BERT, ModernBERT or Llama families",
        ) from error
    finally:
        adapted.module.train(training)
    difference = float((together - torch.cat(alone)).abs().max() / together.abs().max().clamp_min(1e-6))
    if not difference <= PADDING_TOLERANCE.get(base.dtype, 1e-3):
        raise TrainError(
            f"a row filled up with padding gives other logits than the row alone (by {difference:.1e} of the largest)",
            where=f"{type(adapted.module).__name__}, rows {dataset.row_ids[pair[0]]} and {dataset.row_ids[pair[1]]}",
            fix="set train.per_device_train_batch_size: 1 and train.gradient_accumulation_steps instead",
        )


def render_classes(rows: Rows, base: Base, recipe: Recipe) -> LabelledDataset:
    """The rows as the classifier is given them."""
    return rendered(rows, base, recipe.train.max_length, recipe.data.overlong)


def describe(dataset: TokenDataset, classes: Classes, base: Base, recipe: Recipe) -> list[str]:
    """What to say of the rows before training."""
    said = [
        f"{len(dataset)} training rows of {dataset.stats.tokens} tokens, padded side by side (rows of a classifier "
        "are not packed)",
        str(classes),
    ]
    limit = longest_row(base.module)
    if limit is not None and limit < recipe.train.max_length:
        said.append(f"rows may have {limit} tokens: the model has no positions for train.max_length")
    return said


def held_out_classes(
    adapted: AdaptedModel,
    base: Base,
    dataset: LabelledDataset,
    layout: Layout,
    world: World,
) -> tuple[dict[str, float], dict[int, tuple[int, float]]]:
    """Loss, accuracy and macro F1 of the held-out rows.

    Returns:
        ``eval_loss``, ``eval_accuracy`` and ``eval_macro_f1``; and of each row the predicted class and its probability.

    Raises:
        TrainError: a loss is not finite; its rows are named.
    """
    mine = deal(range(len(dataset)), dataset.lengths, world.size)[world.rank]
    own: list[list[float]] = []  # [row, predicted class, its probability, loss]
    with torch.no_grad():
        order = sorted(mine, key=lambda index: (-int(dataset.lengths[index]), index))
        places = iter(order)
        for batch in class_micro_batches(order, dataset, layout):
            logits, classes = _logits(adapted.module, batch)
            losses = nn.functional.cross_entropy(logits, classes, reduction="none")
            best = logits.softmax(-1).max(-1)
            for predicted, probability, loss in zip(best.indices.tolist(), best.values.tolist(), losses.tolist()):
                own.append([next(places), predicted, probability, loss])
    found = sorted(row for part in world.gather(own) for row in part)
    if bad := [dataset.row_ids[int(row[0])] for row in found if not math.isfinite(row[3])]:
        raise TrainError(
            "the held-out loss is not finite",
            where="rows " + ", ".join(bad[:8]),
            fix="lower train.learning_rate, or use dtype: float32 if the base overflows",
        )
    predictions = {int(row): (int(predicted), probability) for row, predicted, probability, _ in found}
    matrix = confusion(dataset.classes.tolist(), [predictions[i][0] for i in range(len(dataset))], len(base.labels))
    values = {
        "eval_loss": sum(row[3] for row in found) / len(found),
        "eval_accuracy": float(matrix.trace() / matrix.sum()),
        "eval_macro_f1": macro_f1(matrix),
    }
    return values, predictions


def write_samples(
    folder: Path,
    step: int,
    values: dict[str, float],
    dataset: LabelledDataset,
    predictions: dict[int, tuple[int, float]],
    base: Base,
    count: int,
) -> None:
    """The first predictions of an evaluation, in ``eval/step-000123.json``."""
    samples: list[dict[str, Any]] = []
    for index in range(min(count, len(dataset))):
        row, (predicted, probability) = dataset.row(index), predictions[index]
        samples.append(
            {
                "row_id": row.row_id,
                "prompt": base.tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=True),
                "reference": base.labels[int(dataset.classes[index])],
                "prediction": f"{base.labels[predicted]} ({probability:.0%})",
            }
        )
    if samples:
        write_json(folder / f"step-{step:06d}.json", {"step": step, "metrics": values, "samples": samples})


def _logits(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """``([B, C] float32, [B] class ids)``."""
    assert isinstance(batch, LabelledBatch)
    logits = class_logits(module, batch)
    return logits, batch.classes.to(logits.device)
