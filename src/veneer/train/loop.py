"""The training loop: one for every objective.

Read :func:`train_loop` for the order of events and :func:`train_step` for the mathematics. Whatever the layout of the
rows, a step is

    loss = sum over its trained tokens / number of its trained tokens
    g    = sum over micro-batches and processes of d(loss sum) / number of its trained tokens
    g    <- g * min(1, max_grad_norm / |g|),   then AdamW

All randomness is seeded by what it is for (step, micro-batch, row), so a run that is resumed from a checkpoint repeats
the one that was never stopped, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from veneer.adapters.row_norm import writes_are_counted
from veneer.data.dataset import TokenDataset
from veneer.data.pack import Batch
from veneer.errors import TrainError
from veneer.runtime import rng_state
from veneer.train.checkpoint import newest_checkpoint, rotate, save_checkpoint
from veneer.train.distributed import World
from veneer.train.guards import GRADIENT_STEPS, not_finite
from veneer.train.interrupt import EvaluationInterrupted, StopRequest
from veneer.train.layout import Layout, deal, micro_batches
from veneer.train.noise import neftune, stream_seed
from veneer.train.optimizer import FlatAdamW
from veneer.train.sampler import step_rows
from veneer.train.schedule import multiplier
from veneer.train.sft import Objective, ObjectiveOutput
from veneer.train.state import Plan, TrainerState
from veneer.train.step_hook import StepHook


class Recorder(Protocol):
    """Where the loop tells what happened; silent on every process but the first."""

    def step(self, values: Mapping[str, Any]) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def message(self, text: str, level: str = "info") -> None: ...


@dataclass
class Trainer:
    """What the loop works with.

    Attributes:
        module: the adapted language model.
        objective: see :mod:`veneer.train.sft`.
        dataset: the rendered training rows.
        layout: how a step's rows become micro-batches.
        micro_batches: builds them from row indices.
        plan: the settings.
        state: where the run stands; changed by the loop.
        optimizer: over the adapter's parameters.
        world: the processes of this run.
        device: of the module.
        recorder: metrics and messages.
        stop: the request to stop.
        checkpoints: the folder that checkpoints are written into.
        save_adapter: writes the adapter into a folder.
        hook: what the adapter's variant does in a step beside the loss.
        evaluate: ``(step) -> values`` on held-out rows, or None. Step 0 is the base before training.
    """

    module: nn.Module
    objective: Objective
    dataset: TokenDataset
    layout: Layout
    plan: Plan
    state: TrainerState
    optimizer: FlatAdamW
    world: World
    device: torch.device
    recorder: Recorder
    stop: StopRequest
    checkpoints: Path
    save_adapter: Callable[[Path], object]
    hook: StepHook = dataclasses.field(default_factory=StepHook)
    evaluate: Callable[[int], dict[str, float]] | None = None
    micro_batches: Callable[[Sequence[int], TokenDataset, Layout], Iterator[Batch]] = micro_batches


def train_loop(t: Trainer) -> bool:
    """Trains until the plan is fulfilled, patience runs out or a stop is asked for.

    The last state is always in a checkpoint when this returns.

    Returns:
        Whether the run was interrupted.

    Raises:
        TrainError: a guard stopped the run before the step was taken.
        Exception: what an evaluation raised; the steps before it are in a checkpoint.
        StorageError: a checkpoint could not be written; the earlier ones are whole.
    """
    state, plan = t.state, t.plan
    unsaved = state.step == 0
    stopping = False
    if state.step == 0:
        state.evaluation_due = t.evaluate is not None
    t.module.train()
    with neftune(t.module, plan.neftune_noise_alpha, plan.seed) as prepare_noise, writes_are_counted():
        while True:
            improved = False
            if state.evaluation_due and not stopping:
                try:
                    improved = evaluation_step(t)
                    unsaved = True
                except EvaluationInterrupted:  # it stays due: a resumed run begins with it
                    stopping = True
                except TrainError:
                    raise  # the weights themselves are at fault
                except Exception:
                    if state.step and t.world.size == 1:  # others may not have failed: they would wait for ever
                        checkpoint_step(t)  # what was trained is not lost with what went wrong in judging it
                    raise
            finished = stopping or state.early_stopped or state.step >= plan.total_steps
            if unsaved and (improved or finished or (state.step > 0 and state.step % plan.save_steps == 0)):
                checkpoint_step(t)
                unsaved = False
            if finished:
                return stopping
            stopping = train_step(t, prepare_noise)
            unsaved = True
            if t.evaluate is not None:
                state.evaluation_due = state.step % plan.eval_steps == 0 or state.step >= plan.total_steps


def train_step(t: Trainer, prepare_noise: Callable[[Batch, int], None]) -> bool:
    """One optimizer step; returns whether some process was asked to stop."""
    state, plan, world = t.state, t.plan, t.world
    began = time.perf_counter()
    lengths = t.dataset.lengths
    size = plan.rows_per_step, plan.seed, plan.tokens_per_step
    indices, epoch = step_rows(state.rows_consumed, len(t.dataset), *size, lengths)
    mine = deal(indices.tolist(), lengths, world.size)[world.rank]
    outputs: list[tuple[Batch, ObjectiveOutput]] = []
    t.optimizer.zero_grad()
    for number, batch in enumerate(t.micro_batches(mine, t.dataset, t.layout)):
        torch.manual_seed(stream_seed("dropout", plan.seed, state.step, world.rank, number))
        prepare_noise(batch, epoch)
        output = t.objective(t.module, batch.to(t.device))
        output.loss_sum.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        outputs.append((batch, dataclasses.replace(output, loss_sum=output.loss_sum.detach())))

    sums, bad_rows = _add_up(world, outputs, stop=t.stop.requested)
    world.sum_(t.optimizer.grad)
    loss = sums["loss"] / sums["trained"] if sums["trained"] else math.nan
    trained = max(sums["trained"], 1.0)
    figures = t.hook.add_gradient(trained)
    grad_norm = t.optimizer.finish_gradient(trained, plan.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise not_finite(
            step=state.step + 1,
            loss=loss,
            grad_norm=grad_norm,
            bad_rows=bad_rows,
            step_rows=[t.dataset.row_ids[i] for i in indices],
            bad_tensors=t.optimizer.nonfinite_gradients(),
            last_checkpoint=newest_checkpoint(t.checkpoints, lambda text: None),
        )
    if state.step < GRADIENT_STEPS:
        _warn(t, state.guards.gradients(state.step + 1, t.optimizer.names, t.optimizer.nonzero_gradients()))
    rate = plan.learning_rate * multiplier(plan.lr_scheduler_type, state.step, plan.total_steps, plan.warmup_steps)
    t.hook.before_step(state.step + 1)
    t.optimizer.step(rate)
    t.hook.after_step(state.step + 1)

    state.step += 1
    state.rows_consumed += len(indices)
    state.trained_tokens += int(sums["trained"])
    state.tokens += int(sums["tokens"])
    seconds = time.perf_counter() - began
    state.seconds += seconds
    stop = sums.pop("stop") > 0
    for name, value in {**sums, "rows": len(indices), "seconds": seconds}.items():
        state.window[name] = state.window.get(name, 0.0) + value
    _warn(t, state.guards.loss(state.step, loss))
    if state.step % plan.logging_steps == 0 or state.step >= plan.total_steps:
        t.recorder.step(_step_line(state, len(t.dataset), grad_norm, rate) | figures)
        state.window = {}
    return stop


def evaluation_step(t: Trainer) -> bool:
    """Evaluates on the held-out rows; returns whether this is the best checkpoint so far."""
    state, plan = t.state, t.plan
    assert t.evaluate is not None
    t.module.eval()
    try:
        # Alone, a Ctrl-C may cut the evaluation off; with others, who wait in it, it has to be finished.
        with t.stop.abandoning(allowed=t.world.size == 1):
            values = t.evaluate(state.step)
    finally:
        t.module.train()
    state.evaluation_due = False
    t.recorder.evaluation({"step": state.step, "epoch": _epoch(state, len(t.dataset)), **values})
    value = values.get(plan.metric_for_best)
    improved = False
    if state.step == 0:
        state.base_value = value
    elif value is not None and t.hook.is_final(state.step) and state.is_better(value, plan.greater_is_better):
        state.best_value, state.best_step, improved = value, state.step, True
        state.evaluations_without_gain = 0
    elif t.hook.is_final(state.step):
        state.evaluations_without_gain += 1
        patience = plan.early_stopping_patience
        state.early_stopped = patience is not None and state.evaluations_without_gain >= patience
    _warn(t, state.guards.evaluation(values["eval_loss"], state.best_step))
    if state.early_stopped and state.step < plan.total_steps:
        t.recorder.message(
            f"stopped early at step {state.step}: {plan.metric_for_best} has not improved for "
            f"{state.evaluations_without_gain} evaluations; the best is step {state.best_step}"
        )
    return improved


def checkpoint_step(t: Trainer) -> None:
    """Writes the checkpoint of this step and removes those that are no longer needed."""
    if t.world.is_main:
        save_checkpoint(
            t.checkpoints,
            t.state.step,
            state=t.state.to_dict(),
            optimizer=t.optimizer.state(),
            optimizer_layout=t.optimizer.layout,
            rng=rng_state(),
            hook=t.hook.state(),
            save_adapter=t.save_adapter,
        )
        rotate(t.checkpoints, t.plan.save_total_limit, t.state.best_step)
    t.world.barrier()


def _add_up(
    world: World, outputs: list[tuple[Batch, ObjectiveOutput]], stop: bool
) -> tuple[dict[str, float], list[str]]:
    """``(sums over all micro-batches and processes, the rows of micro-batches whose loss is not finite)``."""
    losses = torch.stack([o.loss_sum for _, o in outputs]).tolist() if outputs else []
    sums: dict[str, float] = {"loss": 0.0, "trained": 0.0, "tokens": 0.0, "stop": float(stop)}
    bad_rows: list[str] = []
    for loss, (batch, output) in zip(losses, outputs):
        if not math.isfinite(loss):
            bad_rows += batch.row_ids
        for name, value in {"loss": loss, "trained": output.trained, "tokens": batch.tokens, **output.sums}.items():
            sums[name] = sums.get(name, 0.0) + value
    total: dict[str, float] = {}
    rows: list[str] = []
    for their_sums, their_rows in world.gather([sums, bad_rows]):
        rows += their_rows
        for name, value in their_sums.items():
            total[name] = total.get(name, 0.0) + value
    return total, rows


def _step_line(state: TrainerState, rows: int, grad_norm: float, rate: float) -> dict[str, Any]:
    """A line of ``metrics.jsonl``: means over the trained tokens since the line before."""
    window = dict(state.window)
    trained, tokens = window.pop("trained"), window.pop("tokens")
    count, seconds = window.pop("rows"), window.pop("seconds")
    return {
        "step": state.step,
        "epoch": _epoch(state, rows),
        **{name: value / trained for name, value in window.items()},
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "rows": int(count),
        "trained_tokens": int(trained),
        "tokens": int(tokens),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _epoch(state: TrainerState, rows: int) -> float:
    return round(state.rows_consumed / rows, 4)


def _warn(t: Trainer, text: str | None) -> None:
    if text is not None:
        t.recorder.message(text, "warning")
