"""What a run does and leaves: the folder, the best adapter, the frozen base, the guards in action."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Watcher, lines
from torch import Tensor

from veneer.adapters import LoraConfig, attach
from veneer.errors import DataError, StorageError, TrainError, UsageError, VeneerError
from veneer.models import load_base
from veneer.recipe import Recipe
from veneer.run import open_run
from veneer.train import session, train, train_recipe
from veneer.train.sft import ObjectiveOutput, sft


def test_the_run_folder_is_complete_and_says_what_was_done(small_run: Callable[..., Any], tmp_path: Path) -> None:
    result, watcher = small_run(eval={"samples": 2, "metrics": ["exact_match"]})
    run = open_run(tmp_path / "run")
    assert run.finished
    names = {path.name for path in run.path.iterdir()}
    assert names == {"recipe.yaml", "run.json", "metrics.jsonl", "adapter", "checkpoints", "report.html", "eval"}
    assert run.info["status"] == "finished"
    assert run.info["data"]["train"]["rows"] == 20
    assert run.info["data"]["eval"]["rows"] == 4
    assert run.info["metrics"] == result.metrics
    assert run.info["training"]["steps"] == result.steps == 6
    assert "spell" in run.info["mask_example_html"] or "follows" in run.info["mask_example_html"]
    sample = json.loads((run.path / "eval" / "step-000003.json").read_text())
    assert [set(s) >= {"row_id", "prompt", "reference", "prediction"} for s in sample["samples"]] == [True, True]
    assert watcher.started == [(6, 0, "run")]
    assert watcher.closed == 1
    assert [line["step"] for line in watcher.steps] == [1, 2, 3, 4, 5, 6]
    assert [line["rows"] for line in watcher.steps] == [8, 8, 4, 8, 8, 4], "the last step of an epoch is kept"
    assert [line["step"] for line in watcher.evaluations] == [0, 3, 6]
    assert "eval_exact_match" in watcher.evaluations[-1]
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert result.training["tokens"] == sum(line["tokens"] for line in lines(run.path) if "tokens" in line)


def test_the_same_run_twice_is_the_same_run(small_run: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"adapter": {"r": 4, "lora_dropout": 0.1}, "train": {"max_steps": 5, "neftune_noise_alpha": 5.0}}
    for name in ("one", "two"):
        small_run(name, **settings)
        torch.rand(7)  # what was drawn elsewhere in the process must not matter
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    small_run("other", **{**settings, "train": {**settings["train"], "seed": 1}})
    assert lines(tmp_path / "other") != lines(tmp_path / "one")


def test_frozen_tensors_are_unchanged_after_training(
    small_run: Callable[..., Any], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = small_run(train={"gradient_checkpointing": True, "neftune_noise_alpha": 5.0})
    fresh = dict(load_base(tiny_base, dtype="float32", device="cpu").module.named_parameters())
    ids = torch.arange(20)[None]
    with torch.no_grad(), result.model.disabled():
        logits = result.model.module(ids).logits
    trained = set(map(id, result.model.parameters()))
    frozen = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in result.model.module.named_parameters()
        if id(parameter) not in trained
    }
    assert frozen.keys() == fresh.keys()
    for name, parameter in frozen.items():
        assert torch.equal(parameter, fresh[name]), name
        assert parameter.grad is None
    with torch.no_grad():
        assert torch.equal(logits, load_base(tiny_base, dtype="float32", device="cpu").module(ids).logits)
    assert not result.model.module.training


def test_gradient_checkpointing_computes_each_layer_twice_and_leaves_no_trace(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.models.head import answer_loss, hidden_states, settle_documents
    from veneer.train.activations import gradient_checkpointing

    base = load_base(recipe().base, dtype="float32", device="cpu")
    adapted = attach(base, LoraConfig(r=2), seed=0)
    settle_documents(adapted.module)
    calls: list[str] = []
    attention = adapted.module.get_submodule("model.layers.0.self_attn")
    attention.register_forward_hook(lambda *_: calls.append("attention"))
    from veneer.data.pack import Batch

    ids = torch.arange(5, 12)[None]
    batch = Batch(ids, torch.arange(7)[None], ids.roll(-1), [7], None, ["row"], 7, 7)

    def gradients() -> list[Tensor]:
        for parameter in adapted.parameters():
            parameter.grad = None
        adapted.module.train()
        loss = answer_loss(adapted.module, hidden_states(adapted.module, batch), batch.targets).loss_sum
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return [parameter.grad.clone() for parameter in adapted.parameters() if parameter.grad is not None]

    plain = gradients()
    assert calls == ["attention"]
    with gradient_checkpointing(adapted.module, "full"):
        again = gradients()
    assert calls == ["attention"] * 3
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    gradients()
    assert calls == ["attention"] * 4
    assert not base.module.get_input_embeddings()._forward_hooks


def broken_on(row_id: str, monkeypatch: pytest.MonkeyPatch, value: float = math.nan) -> None:
    """The objective gives ``value`` for the micro-batch that holds ``row_id``."""

    def objective(module: Any, batch: Any) -> ObjectiveOutput:
        output = sft(module, batch)
        return ObjectiveOutput(output.loss_sum * (value if row_id in batch.row_ids else 1.0), output.trained)

    monkeypatch.setitem(session.OBJECTIVES, "sft", objective)


def test_a_nan_stops_before_the_step_and_names_its_rows_and_the_last_checkpoint(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.data import read, split
    from veneer.train.sampler import step_rows

    small_run("sound", train={"save_steps": 1, "packing": False, "per_device_train_batch_size": 4})
    rows, _ = split(read(json.loads((tmp_path / "sound" / "run.json").read_text())["recipe"]["data"]["train"]), 4, 0)
    indices, _ = step_rows(8, 20, 4, 0)  # the third step
    bad = rows.conversations[int(indices[0])].row_id
    broken_on(bad, monkeypatch)
    settings = {"save_steps": 1, "packing": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(TrainError) as caught:
        small_run("broken", data={"eval": 4}, train=settings)
    message = str(caught.value)
    run = tmp_path / "broken"
    # The held-out rows are judged by the same objective, and hold no broken row.
    assert "the loss is nan at step 3; the step was not taken" in message
    assert str(run / "checkpoints" / "step-000002") in message
    assert bad in str(caught.value.where)
    assert str(caught.value.where).count("tiny.jsonl:") == 2, "only the rows of its micro-batch"
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "failed"
    assert "the loss is nan at step 3" in info["error"]
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2]
    monkeypatch.undo()
    small_run("broken", resume=True, train=settings)
    whole = [line["loss"] for line in lines(tmp_path / "sound") if "loss" in line]
    assert [line["loss"] for line in lines(run) if "loss" in line] == pytest.approx(whole, abs=1e-5)


def test_an_overflowing_learning_rate_is_stopped_too(small_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"not finite|loss is (nan|inf)"):
        small_run(train={"learning_rate": 1e30, "max_steps": 10, "save_steps": 1}, data={"eval": None})
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/adapter"):
        from safetensors.torch import load_file

        assert all(bool(t.isfinite().all()) for t in load_file(path / "adapter_model.safetensors").values())


def test_a_tensor_that_no_step_can_reach_stops_the_run_before_it_begins(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(module: Any, batch: Any) -> ObjectiveOutput:
        from veneer.models.head import answer_loss

        # The last layer is left out, as in a model whose forward skips a module.
        layers = module.model.layers
        module.model.layers = layers[:1]
        try:
            hidden = module.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        finally:
            module.model.layers = layers
        loss = answer_loss(module, hidden, batch.targets)
        return ObjectiveOutput(loss.loss_sum, loss.trained)

    monkeypatch.setitem(session.OBJECTIVES, "sft", objective)
    with pytest.raises(TrainError, match="14 of 28 adapter tensors take no part in the loss") as caught:
        small_run(data={"eval": None})
    assert "layers.1" in str(caught.value.where)
    assert "layers.0" not in str(caught.value.where)
    assert not (tmp_path / "run").exists()


def test_a_tensor_whose_gradient_stays_zero_stops_the_run_by_name(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(module: Any, batch: Any) -> ObjectiveOutput:
        output = session.sft(module, batch)
        return ObjectiveOutput(output.loss_sum * 0, output.trained)

    monkeypatch.setitem(session.OBJECTIVES, "sft", objective)
    with pytest.raises(TrainError, match="28 of 28 adapter tensors had no gradient in the first two steps"):
        small_run(data={"eval": None})


def test_early_stopping_and_the_best_checkpoint_is_what_lies_in_adapter(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([5.0, 3.0, 2.0, 2.5, 2.7, 2.6, 2.5])
    monkeypatch.setattr(session, "held_out_loss", lambda *a: {"eval_loss": next(figures), "eval_perplexity": 1.0})
    settings = {"num_train_epochs": 6, "early_stopping_patience": 3, "save_total_limit": 1}
    result, watcher = small_run(train=settings)
    assert result.early_stopped
    assert not result.interrupted
    assert (result.steps, result.best_step) == (15, 6)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000006", "step-000015"]
    kept = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert kept == (checkpoints / "step-000006" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert kept != (checkpoints / "step-000015" / "adapter" / "adapter_model.safetensors").read_bytes()
    from veneer.adapters.save import read_adapter

    state = result.model.state()
    assert all(torch.equal(state[k], v) for k, v in read_adapter(tmp_path / "run" / "adapter")[1].items())
    said = [text for _, text in watcher.messages]
    assert any("stopped early at step 15: eval_loss has not improved for 3 evaluations" in text for text in said)
    assert any("holds the adapter of step 6, the best by eval_loss (2)" in text for text in said)
    assert any(
        "the held-out loss rises (2.000 -> 2.500 -> 2.700); the best checkpoint is step 6" in w
        for w in watcher.warnings
    )
    assert result.metrics["eval_loss"] == 2.0
    assert result.metrics["base_eval_loss"] == 5.0


def test_the_best_checkpoint_can_be_chosen_by_a_task_metric(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.2, 0.7, 0.5])
    monkeypatch.setattr(session, "answers", lambda *a: {"eval_exact_match": next(figures)})
    result, watcher = small_run(
        train={"num_train_epochs": 3}, eval={"metrics": ["exact_match"], "metric_for_best": "exact_match"}
    )
    assert result.best_step == 6
    assert result.metrics["eval_exact_match"] == 0.7
    assert any("the best by eval_exact_match (0.7)" in text for _, text in watcher.messages)


def test_a_run_that_does_not_help_says_so(small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(session, "held_out_loss", lambda *a: {"eval_loss": next(figures), "eval_perplexity": 1.0})
    _, watcher = small_run()
    assert any("training did not help: eval_loss is 2, and 1 for the base" in text for text in watcher.warnings)


def test_a_metric_that_cannot_grade_the_held_out_answers_is_refused_before_training(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="the reference is not JSON") as caught:
        small_run(eval={"metrics": ["json_exact"]})
    assert caught.value.where is not None
    assert not (tmp_path / "run").exists()


def test_what_was_trained_survives_an_evaluation_that_fails(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight, _ = small_run("straight")
    real, calls = session.held_out_loss, iter([False, True])

    def fails(*arguments: Any) -> dict[str, float]:
        if next(calls):
            raise MemoryError("no memory to judge with")
        return real(*arguments)

    monkeypatch.setattr(session, "held_out_loss", fails)
    with pytest.raises(MemoryError):
        small_run()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    monkeypatch.setattr(session, "held_out_loss", real)
    resumed, _ = small_run(resume=True)
    state = straight.model.state()
    assert all(torch.equal(state[key], tensor) for key, tensor in resumed.model.state().items())
    assert resumed.metrics["eval_loss"] == straight.metrics["eval_loss"]


def test_an_output_folder_with_a_run_needs_resume_or_overwrite(small_run: Callable[..., Any], tmp_path: Path) -> None:
    small_run()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainError, match="holds a run already") as caught:
        small_run()
    assert "--resume" in str(caught.value.fix)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(TrainError, match="exclude each other"):
        small_run(resume=True, overwrite=True)
    result, _ = small_run(overwrite=True, train={"max_steps": 2})
    assert result.steps == 2
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine", "only what a run writes is replaced"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_run_keeps_its_files(
    overwrite: bool, small_run: Callable[..., Any], tmp_path: Path
) -> None:
    """A careless ``output_dir: .`` must not replace the user's own recipe.yaml or eval folder."""
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "mine.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text("base: mine")
    with pytest.raises(TrainError, match=r"is no run, but holds recipe.yaml, eval, which a run would replace"):
        small_run(overwrite=overwrite)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "base: mine"
    assert (tmp_path / "run" / "eval" / "mine.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"target_modules": ["no_such_layer"]}},
        {"data": {"train": "/nowhere/rows.jsonl"}},
        {"base": "/nowhere/base"},
        {"train": {"max_length": 2}},
        {"adapter": {"trainable_token_indices": [10**6]}},
    ],
)
def test_what_is_wrong_before_training_leaves_no_folder(
    changes: dict[str, Any], small_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(VeneerError):
        small_run(**changes)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_of_the_folder_is_said_before_anything_is_loaded(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="the output folder is a file"):
        small_run("file", base="/nowhere")
    with pytest.raises(StorageError, match="a file is in the way"):
        small_run("file/run", base="/nowhere")


def test_a_disk_that_fills_up_stops_with_the_old_checkpoint_whole(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer.train.checkpoint as checkpoint

    original = checkpoint._write_tensors
    writes = []

    def write(path: Path, *arguments: Any) -> None:
        writes.append(path)
        if len(writes) > 2:  # the first checkpoint holds two such files
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, *arguments)

    monkeypatch.setattr(checkpoint, "_write_tensors", write)
    with pytest.raises(StorageError) as caught:
        small_run(train={"save_steps": 2})
    checkpoints = tmp_path / "run" / "checkpoints"
    assert "the checkpoint of step 3 could not be written: the disk is full" in caught.value.what
    assert str(checkpoints / "step-000002") in caught.value.what
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    small_run("whole", train={"save_steps": 2})
    small_run(resume=True, train={"save_steps": 2})
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_model_that_mixes_packed_rows_is_refused_where_packing_is_asked_for_and_padded_where_not(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer.train.preflight as preflight
    from veneer.models.head import hidden_states

    def leaky(module: Any, batch: Any) -> Tensor:
        """Attention over the whole packed row, as where document boundaries are ignored."""
        batch.document_lengths = [sum(batch.document_lengths)]
        return hidden_states(module, batch)

    monkeypatch.setattr(preflight, "hidden_states", leaky)
    with pytest.raises(TrainError, match="packed rows give other results than the same rows alone") as caught:
        small_run(train={"packing": True})
    assert "train.packing=false" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()
    result, watcher = small_run(train={"max_steps": 1})  # packing is only a default here
    assert any("padded side by side" in text for _, text in watcher.messages)
    assert open_run(result.path).recipe.train.packing is False


def test_the_packing_check_passes_in_bfloat16_too(small_run: Callable[..., Any]) -> None:
    result, _ = small_run(dtype="bfloat16", train={"max_steps": 3})
    assert result.steps == 3
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert result.model.module.model.layers[0].mlp.gate_proj.weight.dtype == torch.bfloat16


def test_logging_every_k_steps_gives_means_over_their_tokens(small_run: Callable[..., Any], tmp_path: Path) -> None:
    small_run("each", train={"num_train_epochs": 3})
    small_run("some", train={"num_train_epochs": 3, "logging_steps": 4})
    each = [line for line in lines(tmp_path / "each") if "loss" in line]
    some = [line for line in lines(tmp_path / "some") if "loss" in line]
    assert [line["step"] for line in some] == [4, 8, 9]
    for line, part in zip(some, (each[:4], each[4:8], each[8:])):
        tokens = sum(p["trained_tokens"] for p in part)
        assert line["trained_tokens"] == tokens
        assert line["rows"] == sum(p["rows"] for p in part)
        assert line["loss"] == pytest.approx(sum(p["loss"] * p["trained_tokens"] for p in part) / tokens, rel=1e-12)
        assert line["grad_norm"] == part[-1]["grad_norm"]


def test_held_out_rows_that_are_trained_on_are_counted_aloud(
    small_run: Callable[..., Any], tiny_rows: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    rows = tiny_rows.read_text().splitlines()
    held_out.write_text("\n".join([*rows[:2], json.dumps({"prompt": "what else?", "completion": "nothing"})]))
    _, watcher = small_run(data={"eval": str(held_out)}, train={"max_steps": 1})
    assert any(
        text.startswith("2 of 3 held-out rows have a prompt that is trained on too") for text in watcher.warnings
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["warnings"] == watcher.warnings


def test_how_the_rows_were_read_and_one_answer_are_said(small_run: Callable[..., Any]) -> None:
    _, watcher = small_run(eval={"samples": 1})
    said = [text for _, text in watcher.messages]
    assert any("24 rows" in text and "prompt" in text for text in said), "how the file was understood"
    assert any("4 of 24 rows held out" in text for text in said)
    assert any(text.startswith("20 training examples of ") for text in said)
    assert sum(text.startswith("step 3, tiny.jsonl:") for text in said) == 1


def test_a_held_out_loss_that_is_not_finite_names_its_rows(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        session.OBJECTIVES,
        "sft",
        lambda module, batch: ObjectiveOutput(sft(module, batch).loss_sum * math.inf, batch.trained_tokens),
    )
    with pytest.raises(TrainError, match="the held-out loss is not finite") as caught:
        small_run()
    assert "tiny.jsonl:" in str(caught.value.where)


def test_a_fraction_of_an_epoch_and_max_steps_decide_the_length(small_run: Callable[..., Any]) -> None:
    assert small_run("half", train={"num_train_epochs": 0.5})[0].steps == 2
    assert small_run("steps", train={"num_train_epochs": 9, "max_steps": 4})[0].steps == 4


def test_tensorboard_gets_the_metrics_when_asked(small_run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracker is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_run(train={"max_steps": 3, "report_to": ["tensorboard"]})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([line["loss"] for line in lines(tmp_path / "run") if "loss" in line])
    assert len(events.Scalars("eval_loss")) == 2


# --- the Python API --------------------------------------------------------------------------------------------------


def test_train_in_python_is_the_recipe_of_the_same_settings(
    small_run: Callable[..., Any], tiny_base: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    small_run("recipe", train={"num_train_epochs": 2, "warmup_ratio": 0.2})
    base = load_base(tiny_base, dtype="float32", device="cpu")
    model = attach(base, LoraConfig(r=4), seed=0)
    watcher = Watcher()
    result = train(
        model,
        tiny_rows,
        eval_data=4,
        output_dir=tmp_path / "python",
        progress=watcher,
        num_train_epochs=2,
        learning_rate=1e-2,
        warmup_ratio=0.2,
        max_length=64,
        samples=0,
    )
    assert lines(tmp_path / "python") == lines(tmp_path / "recipe")
    assert result.model is model
    assert Path(result) == tmp_path / "python"
    assert open_run(tmp_path / "python").recipe.train.learning_rate == 1e-2
    again = train_recipe(tmp_path / "python" / "recipe.yaml", overwrite=True)
    assert lines(again.path) == lines(tmp_path / "recipe"), "the recorded recipe trains the same adapter again"


def test_rows_in_memory_train_too_and_the_package_itself_can_be_called(tiny_base: Path, tmp_path: Path) -> None:
    import veneer
    import veneer.train

    base = load_base(tiny_base, dtype="float32", device="cpu")
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(8)]
    result = veneer.train(
        attach(base, LoraConfig(r=2), seed=0),
        rows,
        eval_data=rows[:2],
        output_dir=tmp_path / "r",
        max_steps=2,
        samples=0,
    )
    assert result.steps == 2
    assert result.metrics["eval_loss"] > 0


def test_an_unknown_setting_is_refused_with_the_nearest_name(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, dtype="float32", device="cpu")
    model = attach(base, LoraConfig(r=2), seed=0)
    with pytest.raises(UsageError, match="unknown setting 'learning_rat'") as caught:
        train(model, [{"prompt": "a", "completion": "b"}], output_dir=tmp_path / "r", learning_rat=1.0)
    assert "learning_rate" in str(caught.value.fix)
    with pytest.raises(UsageError, match="max_length"):
        train(model, [{"prompt": "a", "completion": "b"}], output_dir=tmp_path / "r", max_length=0)
    assert not (tmp_path / "r").exists()


def test_a_module_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UsageError, match="no tokenizer"):
        train(attach(module, LoraConfig(r=2)), [{"prompt": "a", "completion": "b"}], output_dir=tmp_path / "r")
