"""What a run looks at while it trains: the held-out loss, the task metrics, a few answers to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.adapters import AdaptedModel
from veneer.data.conversation import Conversation, Rows
from veneer.data.dataset import TokenDataset
from veneer.data.prompts import render_prompt, stop_token_ids
from veneer.errors import DataError, TrainError
from veneer.evaluate import check_rows, evaluate
from veneer.files import write_json
from veneer.generate import generate
from veneer.models import Base
from veneer.recipe import Recipe
from veneer.train.distributed import World
from veneer.train.layout import Layout, deal, micro_batches
from veneer.train.sft import Objective


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows and how they are looked at.

    Attributes:
        dataset: the rendered rows, for the loss.
        rows: the conversations, for generation.
        metrics: task metrics by generation; none means the loss alone.
        max_new_tokens: of a generated answer.
        samples: answers that are written down at each evaluation.
        max_rows: rows to generate for; None takes all.
        chat_template: as in training.
    """

    dataset: TokenDataset
    rows: Rows
    metrics: Sequence[str] = ()
    max_new_tokens: int = 256
    samples: int = 3
    max_rows: int | None = None
    chat_template: str | None = None


@torch.no_grad()
def held_out_loss(
    adapted: AdaptedModel,
    objective: Objective,
    dataset: TokenDataset,
    layout: Layout,
    world: World,
    device: torch.device,
) -> dict[str, float]:
    """The mean loss over all trained tokens of the held-out rows, its perplexity and the share of tokens that are most
    likely.

    Returns:
        ``eval_loss``, ``eval_perplexity`` and the objective's further figures as ``eval_...``.

    Raises:
        TrainError: a loss is not finite; its rows are named.
    """
    mine = deal(range(len(dataset)), dataset.lengths, world.size)[world.rank]
    sums = {"loss": 0.0, "trained": 0.0}
    bad_rows: list[str] = []
    for batch in micro_batches(mine, dataset, layout):
        output = objective(adapted.module, batch.to(device))
        loss = output.loss_sum.item()
        if not math.isfinite(loss):
            bad_rows += batch.row_ids
        for name, value in {"loss": loss, "trained": output.trained, **output.sums}.items():
            sums[name] = sums.get(name, 0.0) + value
    total: dict[str, float] = {}
    for their_sums, their_rows in world.gather([sums, bad_rows]):
        bad_rows += [row for row in their_rows if row not in bad_rows]
        for name, value in their_sums.items():
            total[name] = total.get(name, 0.0) + value
    if bad_rows:
        raise TrainError(
            "the held-out loss is not finite",
            where="rows " + ", ".join(bad_rows[:8]) + (f" and {len(bad_rows) - 8} more" if len(bad_rows) > 8 else ""),
            fix="lower train.learning_rate, or use dtype: float32 if the base overflows",
        )
    trained = total.pop("trained")
    means = {f"eval_{name}": value / trained for name, value in total.items()}
    return {"eval_loss": means["eval_loss"], "eval_perplexity": math.exp(min(means["eval_loss"], 700.0)), **means}


def answers(adapted: AdaptedModel, base: Base, held_out: HeldOut, step: int, folder: Path) -> dict[str, float]:
    """Generates answers, grades them, and writes a few to ``eval/step-000123.json``.

    Returns:
        ``eval_NAME`` for every task metric; a metric with several scores also gives ``eval_NAME.FIELD``.
    """
    values: dict[str, float] = {}
    if held_out.metrics:
        found = evaluate(
            adapted,
            held_out.rows,
            metrics=list(held_out.metrics),
            max_new_tokens=held_out.max_new_tokens,
            max_rows=held_out.max_rows,
            compare=False,
            chat_template=held_out.chat_template,
        )
        values = {f"eval_{name}": result.value for name, result in found.metrics.items()}
        samples = [
            {
                "row_id": r.row_id,
                "prompt": r.prompt,
                "reference": r.reference,
                "prediction": r.prediction,
                "scores": r.scores,
            }
            for r in found.rows[: held_out.samples]
        ]
    else:
        samples = _samples(adapted, base, held_out)
    if samples:
        write_json(folder / f"step-{step:06d}.json", {"step": step, "metrics": values, "samples": samples})
    return values


def _samples(adapted: AdaptedModel, base: Base, held_out: HeldOut) -> list[dict[str, Any]]:
    prompts = [
        render_prompt(conversation, base.tokenizer, held_out.chat_template)
        for conversation in _askable(held_out.rows)[: held_out.samples]
    ]
    generations = generate(
        adapted,
        [prompt.prompt_ids for prompt in prompts],
        max_new_tokens=held_out.max_new_tokens,
        stop_token_ids=stop_token_ids(base.tokenizer, held_out.chat_template),
    )
    return [
        {"row_id": p.row_id, "prompt": _last_user(p.conversation), "reference": p.reference, "prediction": g.text}
        for p, g in zip(prompts, generations)
    ]


def first_sample(folder: Path, step: int) -> str:
    """The first answer written down at ``step``, in one line to say aloud."""
    path = folder / f"step-{step:06d}.json"
    if not path.exists():
        return f"step {step}: no held-out row has an answer to show"
    sample = json.loads(path.read_text(encoding="utf-8"))["samples"][0]
    answer, expected = (json.dumps(_shortened(sample[key]), ensure_ascii=False) for key in ("prediction", "reference"))
    return f"step {step}, {sample['row_id']}: {answer} for {expected}"


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _askable(rows: Rows) -> list[Conversation]:
    """Rows with an assistant's answer to predict; raw text has none."""
    return [c for c in rows.conversations if any(m.role == "assistant" for m in c.messages)]


def _last_user(conversation: Conversation) -> str:
    users = [message.content for message in conversation.messages if message.role == "user"]
    return users[-1] if users else ""


def check_metrics(rows: Rows, recipe: Recipe, base: Base) -> None:
    """Raises before training begins what the first evaluation would: task metrics need answers that they can grade.

    Raises:
        DataError: no held-out row has an assistant turn, or a metric cannot use a row's answer.
    """
    metrics = recipe.eval.metrics
    if not metrics:
        return
    if not _askable(rows):
        raise DataError(
            "task metrics need an assistant turn to compare with, and the held-out rows have none",
            where=rows.source,
            fix="take eval.metrics out of the recipe, or evaluate on chat rows",
        )
    check_rows(base, rows, metrics, max_rows=recipe.eval.max_rows, chat_template=recipe.data.chat_template)
