"""Everything that can be wrong is found before the first step: rows, lengths, packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from veneer.adapters import AdaptedModel, LoraConfig
from veneer.adapters.settings import AdaLoraConfig
from veneer.adapters.structure import recurrent_parts
from veneer.adapters.targets import inside
from veneer.data.cache import prepare
from veneer.data.conversation import Rows
from veneer.data.dataset import TokenDataset
from veneer.data.pack import collate_packed
from veneer.data.read import read
from veneer.data.split import split
from veneer.errors import AdapterError, DataError, TrainError, VeneerError
from veneer.models import Base
from veneer.models.head import hidden_states
from veneer.recipe import LOSS, DataRecipe, Recipe
from veneer.train.distributed import World
from veneer.train.rank_schedule import schedule_of
from veneer.train.sampler import steps_per_epoch, token_steps_per_epoch
from veneer.train.schedule import warmup_steps
from veneer.train.state import Plan

# Of the mean difference between packed and unpacked, relative to the mean size of a hidden state: rounding is far
# below, attention across a document's border far above.
PACKING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SELF_TEST_TOKENS = 64


def check_settings(config: LoraConfig, recipe: Recipe) -> None:
    """Raises what the settings alone say against a run, before anything is loaded.

    Raises:
        AdapterError: LoftQ over a base that the run does not quantise. TrainError: too few steps for AdaLoRA.
    """
    if config.init_lora_weights == "loftq" and recipe.quantize.scheme == "none":
        raise AdapterError(
            "LoftQ starts from what the codes of a quantised weight lose, and the base is not to be quantised",
            where="adapter.init_lora_weights",
            fix="set quantize: nf4, or start with init_lora_weights: pissa",
        )
    if isinstance(config.adalora_config, AdaLoraConfig) and recipe.train.max_steps is not None:
        schedule_of(config.adalora_config, [config.r], recipe.train.max_steps)


def read_rows(
    data: DataRecipe,
    say: Callable[[str], None],
    train: Rows | Any | None = None,
    held_out: Rows | Any | None = None,
) -> tuple[Rows, Rows | None]:
    """The training and the held-out rows that a recipe names.

    Args:
        say: is told how a source was understood, where a split then says something else of its parts.
        train, held_out: rows or sources that are used in place of the recipe's.

    Raises:
        DataError: a source cannot be read.
    """
    options: dict[str, Any] = {"format": data.format, "columns": data.columns}
    source = data.train if train is None else train
    if isinstance(source, Rows):
        limited = data.max_rows is not None and data.max_rows < len(source)
        rows = source.subset(range(data.max_rows or 0), source.description) if limited else source
    else:
        rows = read(source, limit=data.max_rows, **options)
    share = data.eval if held_out is None else held_out
    if share is None:
        return rows, None
    if isinstance(share, Rows):
        return rows, share
    if isinstance(share, int | float):
        say(rows.description)
        return split(rows, share, data.split_seed)
    return rows, read(share, **options)


def seen_in_training(rows: Rows, held_out: Rows) -> int:
    """How many held-out rows have the prompt of a training row; a split keeps them apart, two files may not."""
    trained = {conversation.group for conversation in rows.conversations}
    return sum(conversation.group in trained for conversation in held_out.conversations)


def render_rows(rows: Rows, tokenizer: Any, recipe: Recipe, world: World) -> TokenDataset:
    """The rendered rows, through the cache: the main process renders, the others then find them there.

    Raises:
        DataError: no row is left to train on.
    """

    def render() -> TokenDataset:
        dataset: TokenDataset = prepare(
            rows,
            tokenizer,
            max_length=recipe.train.max_length,
            train_on=recipe.data.train_on,
            overlong=recipe.data.overlong,
            chat_template=recipe.data.chat_template,
        )
        return dataset

    if world.is_main:
        dataset = render()
    world.barrier()
    if not world.is_main:
        dataset = render()
    if len(dataset) == 0:
        raise DataError(
            "no row is left to train on after rendering",
            where=rows.source,
            fix="look at the reasons with: veneer data check",
        )
    return dataset


def make_plan(recipe: Recipe, lengths: NDArray[np.int64], world: World, has_held_out: bool) -> Plan:
    """The recipe's training settings as the loop's plain values.

    Args:
        lengths: ``[rows]`` tokens of the rendered training rows.
    """
    train = recipe.train
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * world.size
    per_epoch = steps_per_epoch(len(lengths), rows_per_step)
    total = train.max_steps or math.ceil(train.num_train_epochs * per_epoch - 1e-9)
    if train.tokens_per_step is not None:
        # The shortest rows make the largest steps.
        fitting = np.searchsorted(np.cumsum(np.sort(lengths), dtype=np.int64), train.tokens_per_step, side="right")
        rows_per_step = max(1, int(fitting))
        epochs, part = divmod(train.num_train_epochs, 1)
        each = [
            token_steps_per_epoch(lengths, train.tokens_per_step, train.seed, epoch)
            for epoch in range(1 if train.max_steps else math.ceil(train.num_train_epochs))
        ]
        per_epoch = each[0]
        total = train.max_steps or sum(each[: int(epochs)]) + math.ceil(part * each[-1] - 1e-9)
    name, greater = recipe.best_metric
    return Plan(
        total_steps=total,
        steps_per_epoch=per_epoch,
        rows_per_step=rows_per_step,
        tokens_per_step=train.tokens_per_step,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=warmup_steps(total, train.warmup_ratio),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        neftune_noise_alpha=train.neftune_noise_alpha,
        logging_steps=train.logging_steps,
        save_steps=train.save_steps or per_epoch,
        eval_steps=(train.eval_steps or per_epoch) if has_held_out else total,
        save_total_limit=train.save_total_limit,
        metric_for_best="eval_loss" if name == LOSS else f"eval_{name}",
        greater_is_better=greater,
        early_stopping_patience=train.early_stopping_patience,
    )


def check_new_tokens(adapted: AdaptedModel, base: Base) -> None:
    """Tokens that were added to the base are there to be trained.

    Raises:
        TrainError: the adapter trains neither their rows nor the whole embedding.
    """
    if not base.added_tokens or adapted.active is None:
        return
    plan, embedding = adapted.plans[adapted.active], adapted.module.get_input_embeddings()  # type: ignore[operator]  # transformers has it
    path = next(path for path, module in adapted.module.named_modules() if module is embedding)
    rows = {i for target in plan.tokens if target.path == path for i in target.token_ids}
    is_whole = inside(path, plan.saved) or any(target.path == path for target in plan.lora)
    untrained = [token for token, number in base.added_tokens.items() if number not in rows]
    if untrained and not is_whole:
        raise TrainError(
            f"{len(untrained)} tokens were added to the base and the adapter does not train them",
            where=", ".join(untrained[:6]),
            fix="attach with LoraConfig(trainable_token_indices=...), set to what veneer.add_tokens returned",
        )


def settle_packing(
    recipe: Recipe, module: nn.Module, dataset: TokenDataset, device: torch.device, share_prefix: bool
) -> tuple[Recipe, str | None]:
    """Packing is a default where :func:`check_packing` proves that rows stay apart; else rows are padded instead.

    Returns:
        The recipe as it can be run, and what to say where that is without packing.

    Raises:
        TrainError: the recipe itself asks for packing.
    """
    try:
        check_packing(module, dataset, device, share_prefix)
        return recipe, None
    except TrainError as error:
        if recipe.train.model_fields_set & {"packing", "micro_batch_tokens"} and recipe.train.packing:
            raise
        padded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"packing": False})})
        return padded, f"rows are padded side by side instead of packed, which changes speed alone: {error.what}"


@torch.no_grad()
def check_packing(module: nn.Module, dataset: TokenDataset, device: torch.device, share_prefix: bool = False) -> float:
    """Proves on two rows that a row in a packed micro-batch does not see its neighbour, and that a shared beginning
    gives what the rows give alone.

    Returns:
        The mean difference of the hidden states, relative to their mean size.

    Raises:
        TrainError: packed and unpacked differ by more than rounding, or the model carries a state from row to row.
    """
    recurrent = recurrent_parts(module)
    if recurrent:
        raise TrainError(
            f"{len(recurrent)} layers of {type(module).__name__} carry a state from each token to the next, so that a "
            "packed row would begin with the end of the row before it",
            where=f"{recurrent[0]} ({type(module.get_submodule(recurrent[0])).__name__})",
            fix="leave train.packing out, or set it to false",
        )
    rows = [dataset.row(i) for i in range(min(2, len(dataset)))]
    rows = [type(r)(r.input_ids[:SELF_TEST_TOKENS], r.trained[:SELF_TEST_TOKENS], r.row_id) for r in rows]
    if len(rows) == 1:
        rows *= 2
    training = module.training
    module.eval()
    try:
        batch = collate_packed(rows, share_prefix=share_prefix).to(device)
        packed = hidden_states(module, batch)
        alone = torch.cat(
            [
                hidden_states(module, collate_packed([row]).to(device))[:, batch.shared_prefix if number else 0 :]
                for number, row in enumerate(rows)
            ],
            dim=1,
        )
    except VeneerError as error:
        raise TrainError(
            f"packing does not work here: {error.what}", where=error.where, fix="set train.packing=false"
        ) from error
    finally:
        module.train(training)
    difference = float((packed.float() - alone.float()).abs().mean() / alone.float().abs().mean())
    if not difference <= PACKING_TOLERANCE.get(packed.dtype, 1e-4):
        raise TrainError(
            f"packed rows give other results than the same rows alone (mean difference {difference:.1e})",
            where=type(module).__name__,
            fix="set train.packing=false: this model does not keep documents apart",
        )
    return difference
