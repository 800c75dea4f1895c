"""One run, from rows and a model to a finished run folder: what lies around the loop."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer.adapters import AdaptedModel
from veneer.adapters.conversion import conversion_of
from veneer.adapters.save import read_training_state, warnings_of
from veneer.data.classes import Classes, find_classes
from veneer.data.conversation import Rows
from veneer.data.dataset import TokenDataset
from veneer.data.label_render import LabelledDataset
from veneer.data.labelled import LabelledRow
from veneer.data.pack import pad_id_of
from veneer.data.show import show_html
from veneer.errors import VeneerError
from veneer.evaluate.report import write_report
from veneer.files import storage_errors, write_text
from veneer.generate.whole import takes_our_cache
from veneer.kernels import native
from veneer.models import Base
from veneer.models.classifier import pad_id_of_classifier
from veneer.models.head import check_head
from veneer.recipe import Recipe
from veneer.run import RunFolder, RunInfo, utc_now
from veneer.runtime import holding_heap, leaving_no_gaps, peak_rss_gb, release_memory, set_rng_state
from veneer.train.activations import choose_blocks, gradient_checkpointing, said_of
from veneer.train.checkpoint import checkpoint_path, defect, discard_after, newest_checkpoint
from veneer.train.classification import (
    check_classifier,
    class_micro_batches,
    classification,
    describe,
    held_out_classes,
    render_classes,
    write_samples,
)
from veneer.train.distributed import World
from veneer.train.explain import explanation, machine
from veneer.train.held_out import HeldOut, answers, check_metrics, first_sample, held_out_loss
from veneer.train.hooks import step_hook
from veneer.train.interrupt import StopRequest
from veneer.train.layout import Layout, default_micro_batch_tokens, micro_batches, most_tokens
from veneer.train.loop import Trainer, train_loop
from veneer.train.loraplus import multipliers
from veneer.train.optimizer import FlatAdamW, check_optimizer
from veneer.train.preflight import (
    check_new_tokens,
    make_plan,
    render_rows,
    seen_in_training,
    settle_packing,
)
from veneer.train.progress import Progress
from veneer.train.record import RunRecord, SilentRecord, clear_run, cut_metrics, read_metrics
from veneer.train.result import TrainResult
from veneer.train.resume import check_same_run, find_checkpoint, open_checkpoint
from veneer.train.self_check import check_gradients, few_tokens, self_check
from veneer.train.sft import sft
from veneer.train.start import start_from_checkpoint, start_from_rows
from veneer.train.state import Plan, TrainerState
from veneer.train.step_hook import StepHook
from veneer.train.track import open_trackers

OBJECTIVES = {"sft": sft, "classification": classification}


@dataclass
class Session:
    """A run that is about to begin, or to go on.

    Attributes:
        adapted, base: the model, its adapter attached and active.
        recipe: the settings.
        rows, held_out_rows: what to train on, and to judge by.
        world: the processes of this run.
        progress: is told how it goes; silent on every process but the first.
        strict: before the first step, compare the operations of every layer with float32, not of one.
        explain: say what runs on what.
    """

    adapted: AdaptedModel
    base: Base
    recipe: Recipe
    rows: Rows
    held_out_rows: Rows | None
    world: World
    progress: Progress
    strict: bool = False
    explain: bool = False

    def run(self, *, resume: bool, overwrite: bool) -> TrainResult:
        """Checks everything, then trains. Until all is checked nothing is written.

        Raises:
            VeneerError: see :func:`veneer.train.train_recipe`.
        """
        settings, adapted, world = self.recipe.train, self.adapted, self.world
        check_optimizer(settings.optim, self.base.device)
        check_new_tokens(adapted, self.base)
        warnings = self._say_what_was_read()
        if self.classes is not None:
            check_classifier(adapted, self.base, self.dataset, self.layout)
        else:
            check_head(adapted.module)
            if world.is_main and self.held_out is not None and (self.held_out.metrics or self.held_out.samples):
                takes_our_cache(adapted.module)  # it says now, not at the first evaluation, what decodes slowly
        if self.layout.packing:
            share = self.layout.share_prefix
            self.recipe, instead = settle_packing(self.recipe, adapted.module, self.dataset, self.base.device, share)
            if instead is not None:
                del self.layout  # made anew from the settled recipe
                self.progress.message(instead)
        self.start_adapter(resume=resume)
        rates = settings.loraplus_lr_ratio, settings.learning_rate, settings.loraplus_lr_embedding
        optimizer = FlatAdamW(
            adapted.named_parameters(),
            optim=settings.optim,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            multipliers=multipliers(adapted.named_parameters(), *rates),
        )
        if settings.optim != "adamw":
            self.progress.message(optimizer.description)
        hook = step_hook(adapted, optimizer, self.plan.total_steps)
        objective = OBJECTIVES[self.recipe.objective]
        batch = few_tokens(self.dataset, self.layout).to(self.base.device)
        watch = self_check(adapted.module, objective, batch, every=self.strict)
        kept = check_gradients(adapted, objective, batch)
        tokens = most_tokens(self.dataset, self.layout, self.plan.rows_per_step // world.size)
        twice, note = choose_blocks(settings.gradient_checkpointing, adapted.module, objective, batch, tokens, kept)
        if note is not None:
            self.progress.message(note, "warning")
        if self.explain:
            self.progress.message(explanation(self.base, said_of(adapted.module, twice), self.layout, optimizer, watch))
            self.progress.message(f"what the adapter changes\n{adapted.coverage}")
        info = self._info(warnings)
        begun = self.folder.run_json.exists() and self.folder.recipe_path.exists()
        state = self._restored(optimizer, hook, info) if resume and begun else TrainerState()
        with ExitStack() as stack:
            stack.enter_context(gradient_checkpointing(adapted.module, twice))
            record = self._open_record(info, state, overwrite) if world.is_main else SilentRecord()
            world.barrier()
            stop = StopRequest(record.message)
            trainer = Trainer(
                module=adapted.module,
                objective=objective,
                dataset=self.dataset,
                layout=self.layout,
                plan=self.plan,
                state=state,
                optimizer=optimizer,
                world=world,
                device=self.base.device,
                recorder=record,
                stop=stop,
                hook=hook,
                checkpoints=self.folder.checkpoints,
                save_adapter=lambda target: adapted.save(target, extra=self._notes(state.step), training_state=True),
                evaluate=self._evaluate if self.held_out is not None else None,
                micro_batches=micro_batches if self.classes is None else class_micro_batches,
            )
            release_memory()  # a start from data or from the weights has taken more than a step will
            self.progress.start(self.plan.total_steps, state.step, self.folder.path.name)
            try:
                with stop.listening(), holding_heap():
                    interrupted = train_loop(trainer)
                self._keep_best(state, record)
                if not interrupted:
                    adapted.trim()
            except BaseException as error:
                if isinstance(record, RunRecord):
                    record.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", _reason(error))
                raise
            finally:
                adapted.module.eval()
                for parameter in adapted.parameters():
                    parameter.grad = None
        result = self._result(state, interrupted)
        if isinstance(record, RunRecord):
            info.metrics, info.training = dict(result.metrics), dict(result.training)
            # Once more where the report looks for them.
            info.extra["train_seconds"] = result.training["seconds"]
            info.extra |= {key: result.training[key] for key in ("tokens_per_second", "peak_rss_gb")}
            record.close("interrupted" if interrupted else "finished")
            write_report(self.folder.path)
        world.barrier()
        return result

    def start_adapter(self, *, resume: bool = False) -> None:
        """Starts an adapter that waits for data, from the training rows or as in the checkpoint to go on from."""
        adapted, name = self.adapted, self.adapted.active
        assert name is not None
        if note := adapted.notes.get(name):
            self.progress.message(note)
        if name not in adapted.waiting:
            return
        own = newest_checkpoint(self.folder.checkpoints, lambda text: None) if resume and self.world.is_main else None
        if checkpoint := self.world.gather(str(own or ""))[0]:
            start_from_checkpoint(adapted, Path(checkpoint))
            return
        batches = micro_batches if self.classes is None else class_micro_batches
        objective, device = OBJECTIVES[self.recipe.objective], self.base.device
        seed = self.recipe.train.seed
        say = self.progress.message
        with leaving_no_gaps():
            say(start_from_rows(adapted, self.dataset, self.layout, batches, objective, device, seed, self.world))

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.recipe.output_dir))

    @cached_property
    def dataset(self) -> TokenDataset:
        """The rendered training rows."""
        return self._rendered(self.rows)

    def _rendered(self, rows: Rows) -> TokenDataset:
        if self.classes is not None:
            return render_classes(rows, self.base, self.recipe)
        return render_rows(rows, self.base.tokenizer, self.recipe, self.world)

    @cached_property
    def classes(self) -> Classes | None:
        """What a classifier tells apart; None for any other task."""
        if not self.recipe.is_classification:
            return None
        return find_classes(self.rows, self.held_out_rows, self.base.labels)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The held-out rows, rendered, and how they are judged."""
        if self.held_out_rows is None:
            return None
        if self.classes is None:
            check_metrics(self.held_out_rows, self.recipe, self.base)
        return HeldOut(
            dataset=self._rendered(self.held_out_rows),
            rows=self.held_out_rows,
            # The perplexity of the held-out loss comes with every evaluation.
            metrics=[name for name in self.recipe.eval.metrics if name != "perplexity"],
            max_new_tokens=self.recipe.eval.max_new_tokens,
            samples=self.recipe.eval.samples,
            max_rows=self.recipe.eval.max_rows,
            chat_template=self.recipe.data.chat_template,
        )

    @cached_property
    def layout(self) -> Layout:
        train = self.recipe.train
        packing = train.packing and self.classes is None
        return Layout(
            packing=packing,
            micro_batch_tokens=train.micro_batch_tokens
            or default_micro_batch_tokens(train.max_length, self.base.device),
            micro_batch_rows=train.per_device_train_batch_size,
            pad_id=pad_id_of(self.base.tokenizer) if self.classes is None else pad_id_of_classifier(self.base.module),
            share_prefix=packing and train.neftune_noise_alpha is None,
        )

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.recipe, self.dataset.lengths, self.world, self.held_out is not None)

    def _say_what_was_read(self) -> list[str]:
        """Says how the rows were understood and what rendering did to them; returns the warnings."""
        self.progress.message(self.rows.description)
        warnings = list(self.dataset.stats.warnings)
        if self.held_out is not None:
            self.progress.message(self.held_out.rows.description)
            warnings += self.held_out.dataset.stats.warnings
            if seen := seen_in_training(self.rows, self.held_out.rows):
                warnings.append(
                    f"{seen} of {len(self.held_out.rows)} held-out rows have a prompt that is trained on too: "
                    "their figures say nothing about new rows (veneer data check names them)"
                )
        if self.classes is not None:
            warnings += self.classes.warnings
        warnings += warnings_of(self.adapted)
        for text in warnings:
            self.progress.message(text, "warning")
        stats = self.dataset.stats
        if self.classes is not None:
            for text in describe(self.dataset, self.classes, self.base, self.recipe):
                self.progress.message(text)
        else:
            share = stats.trained_tokens / max(stats.tokens, 1)
            self.progress.message(
                f"{len(self.dataset)} training examples of {stats.tokens} tokens, "
                f"{stats.trained_tokens} of them trained ({share:.0%})"
            )
        self.progress.message(
            f"{self.plan.step_size} a step, {self.plan.steps_per_epoch} steps an epoch, "
            f"{self.adapted.trainable_count():,} trained parameters"
        )
        if self.base.device.type == "cpu" and native.library() is None:
            self.progress.message(native.description())
        return warnings

    def _info(self, warnings: list[str]) -> RunInfo:
        """What ``run.json`` says from the start."""

        def described(rows: Rows, dataset: TokenDataset) -> dict[str, Any]:
            return {
                "source": rows.source,
                "format": rows.format,
                "description": rows.description,
                "content_hash": rows.content_hash,
                "files": rows.files,
                "rows": len(rows),
                "system": rows.system,
                "single_turn": rows.single_turn,
                "stats": _without_ids(dataset.stats.to_dict()),
            }

        held_out = self.held_out
        return RunInfo(
            base=self.base.identity.to_dict(),
            data={
                "train": described(self.rows, self.dataset),
                "eval": described(held_out.rows, held_out.dataset) if held_out is not None else None,
            },
            seed=self.recipe.train.seed,
            hardware=machine(self.base),
            extra={
                "trainable_parameters": self.adapted.trainable_count(),
                "coverage": str(self.adapted.coverage),
                "recipe": self.recipe.resolved(),
                "plan": dataclasses.asdict(self.plan),
                "layout": dataclasses.asdict(self.layout),
                "processes": self.world.size,
                **(
                    {"mask_example_html": show_html(self.dataset.row(0), self.base.tokenizer)}
                    if self.classes is None
                    else {"classes": dataclasses.asdict(self.classes), "labels": list(self.classes.names)}
                ),
                "warnings": list(warnings),
            },
        )

    def _restored(self, optimizer: FlatAdamW, hook: StepHook, info: RunInfo) -> TrainerState:
        """The state, adapter, optimizer, hook and generators of the checkpoint to go on from."""
        check_same_run(self.folder, self.recipe, info)
        own = str(find_checkpoint(self.folder, self.progress.message) or "") if self.world.is_main else ""
        path = self.world.gather(own)[0]  # the first process chooses for all
        if not path:
            return TrainerState()
        checkpoint = open_checkpoint(Path(path), optimizer.layout)
        self.adapted.load_state(read_training_state(checkpoint.adapter), where=str(checkpoint.adapter))
        optimizer.load_state(checkpoint.optimizer)
        hook.load_state(checkpoint.hook)
        set_rng_state(checkpoint.rng)
        return TrainerState.from_dict(checkpoint.state)

    def _open_record(self, info: RunInfo, state: TrainerState, overwrite: bool) -> RunRecord:
        """Creates the run folder, or cuts it back to the checkpoint that is gone on from."""
        folder = self.folder
        if folder.run_json.exists() and not overwrite:
            before = RunInfo.read(folder)
            info.started = before.started
            info.extra["resumed"] = [*before.extra.get("resumed", []), {"step": state.step, "time": utc_now()}]
            info.extra["warnings"] = list(dict.fromkeys([*before.extra.get("warnings", []), *info.extra["warnings"]]))
            discard_after(folder.checkpoints, state.step if state.step else -1)
            cut_metrics(folder.metrics_path, state.step, state.evaluation_due)
            if state.step == 0:
                folder.metrics_path.unlink(missing_ok=True)
        else:
            clear_run(folder)
        with storage_errors(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        info.write(folder)  # first: it makes the folder a run, which --overwrite may replace
        write_text(folder.recipe_path, self.recipe.to_yaml())
        name = folder.path.name
        trackers = open_trackers(self.recipe.train.report_to, folder.path, name, self.recipe.resolved())
        return RunRecord(folder, info, self.progress, trackers)

    def _evaluate(self, step: int) -> dict[str, float]:
        """The held-out figures of a step: the loss by all processes, generated answers by the first one."""
        assert self.held_out is not None
        if self.classes is not None:
            return self._evaluate_classes(self.held_out, step)
        objective = OBJECTIVES[self.recipe.objective]
        dataset, device = self.held_out.dataset, self.base.device
        # Step 0 is the base; LoftQ's adapter acts from the start.
        with self.adapted.disabled() if step == 0 else nullcontext():
            values = held_out_loss(self.adapted, objective, dataset, self.layout, self.world, device)
        if step == 0:  # the base: its answers are measured after training, beside the adapter's
            return values
        own: dict[str, float] = {}
        if self.world.is_main:
            own = answers(self.adapted, self.base, self.held_out, step, self.folder.eval_folder)
            if self.recipe.eval.samples:
                self.progress.message(first_sample(self.folder.eval_folder, step))
        graded: dict[str, float] = self.world.gather(own)[0]
        return values | graded

    def _evaluate_classes(self, held_out: HeldOut, step: int) -> dict[str, float]:
        """The same for a classifier: its predictions of all held-out rows."""
        assert self.classes is not None
        dataset = held_out.dataset
        assert isinstance(dataset, LabelledDataset)
        values, predictions = held_out_classes(self.adapted, self.base, dataset, self.layout, self.world)
        if step and self.world.is_main:
            folder, count = self.folder.eval_folder, held_out.samples
            write_samples(folder, step, values, dataset, predictions, self.base, count)
            self.progress.message(
                f"step {step}: {values['eval_accuracy']:.1%} of {len(dataset)} held-out rows are right, and "
                f"{self.classes.majority_accuracy:.1%} would be with '{self.classes.majority}' for all"
            )
        return values

    def _notes(self, step: int) -> dict[str, Any]:
        """What ``veneer.json`` says of an adapter beside its base: a classifier's names, so that it can say them."""
        if self.classes is None:
            return {"step": step}
        pairs = any(isinstance(row, LabelledRow) and row.pair is not None for row in self.rows)
        return {"step": step, "labels": list(self.classes.names), "majority": self.classes.majority, "pairs": pairs}

    def _keep_best(self, state: TrainerState, record: RunRecord | SilentRecord) -> None:
        """Puts the best adapter into the model and into the run's ``adapter/``, and says which one it is."""
        step = state.step
        if state.best_step is not None and state.best_step != state.step:
            path = checkpoint_path(self.folder.checkpoints, state.best_step)
            reason = defect(path)
            if reason is None:
                self.adapted.load_state(read_training_state(path / "adapter"), where=str(path))
                step = state.best_step
            else:
                record.message(
                    f"the best checkpoint (step {state.best_step}) is lost: {reason}; the last is kept", "warning"
                )
        if self.world.is_main:
            with storage_errors(self.folder.adapter):
                self.adapted.save(self.folder.adapter, extra={**self._notes(step), "run": self.folder.path.name})
                if conversion := conversion_of(self.adapted, self.folder.adapter):
                    record.message(str(conversion))
        if state.best_step is None:
            record.message(f"{self.folder.adapter} holds the adapter of the last step, {step}")
            return
        name = self.plan.metric_for_best
        record.message(
            f"{self.folder.adapter} holds the adapter of step {step}, the best by {name} ({state.best_value:.4g})"
        )
        base, best = state.base_value, state.best_value
        if base is not None and best is not None and not (best > base if self.plan.greater_is_better else best < base):
            record.message(f"training did not help: {name} is {best:.4g}, and {base:.4g} for the base", "warning")

    def _result(self, state: TrainerState, interrupted: bool) -> TrainResult:
        lines = read_metrics(self.folder.metrics_path)
        metrics: dict[str, float] = {}
        kept = state.best_step if state.best_step is not None else state.step
        for line in lines:
            if "eval_loss" not in line:
                metrics["train_loss"] = line["loss"]
            elif line["step"] == 0:
                metrics |= {f"base_{key}": value for key, value in line.items() if key.startswith("eval_")}
            elif line["step"] == kept:
                metrics |= {key: value for key, value in line.items() if key.startswith("eval_")}
        training: dict[str, float] = {
            "steps": state.step,
            "epochs": round(state.rows_consumed / len(self.dataset), 4),
            "rows": state.rows_consumed,
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
            "peak_rss_gb": round(peak_rss_gb(), 3),
        }
        return TrainResult(
            path=self.folder.path,
            model=self.adapted,
            steps=state.step,
            epochs=training["epochs"],
            best_step=state.best_step,
            metrics=metrics,
            training=training,
            interrupted=interrupted,
            early_stopped=state.early_stopped,
        )


def _without_ids(stats: dict[str, Any]) -> dict[str, Any]:
    """The account of the rendering with dropped rows counted and not named."""
    return {**stats, "dropped": {reason: len(ids) for reason, ids in stats["dropped"].items()}}


def _reason(error: BaseException) -> str:
    if isinstance(error, VeneerError):
        return error.what
    return f"{type(error).__name__}: {error}".rstrip(": ")
