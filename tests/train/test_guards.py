"""Every guard: when it speaks, what it says, and that it is silent otherwise."""

import math
from pathlib import Path

import pytest

from veneer.errors import TrainError
from veneer.train.guards import Guards, not_finite

NAMES = ["layers.0.q.A", "layers.0.q.B", "layers.1.q.A"]


def test_a_tensor_without_gradient_after_two_steps_stops_the_run_by_name() -> None:
    guards = Guards()
    assert guards.gradients(1, NAMES, [False, True, False]) is None, "LoRA's A has no gradient while B is zero"
    with pytest.raises(TrainError) as caught:
        guards.gradients(2, NAMES, [True, True, False])
    assert caught.value.what == "1 of 3 adapter tensors had no gradient in the first two steps"
    assert caught.value.where == "layers.1.q.A"
    assert "adapter.exclude_modules" in str(caught.value.fix)


def test_a_gradient_in_either_of_the_two_steps_is_enough() -> None:
    guards = Guards()
    assert guards.gradients(1, NAMES, [False, True, True]) is None
    assert guards.gradients(2, NAMES, [True, False, False]) is None


def test_many_dead_tensors_are_counted_and_not_all_listed() -> None:
    names = [f"t{i}" for i in range(20)]
    guards = Guards()
    guards.gradients(1, names, [False] * 20)
    with pytest.raises(TrainError) as caught:
        guards.gradients(2, names, [False] * 20)
    assert caught.value.where == "t0, t1, t2, t3, t4, t5 and 14 more"


def test_a_router_whose_choices_were_certain_is_a_warning_and_not_an_error() -> None:
    names = ["layers.0.q.lora_A.weight", "layers.0.mlp.gate.lora_A.weight", "layers.0.mlp.gate.lora_B.weight"]
    guards = Guards()
    assert guards.gradients(1, names, [True, False, False]) is None
    said = guards.gradients(2, names, [True, False, False])
    assert said is not None
    assert "2 of the routers' tensors had no gradient" in said
    assert "layers.0.mlp.gate.lora_A.weight" in said


def test_rare_trainable_tokens_are_a_warning_and_not_an_error() -> None:
    guards = Guards()
    names = [*NAMES, "embed_tokens.trainable_tokens_delta"]
    guards.gradients(1, names, [True, True, True, False])
    warning = guards.gradients(2, names, [True, True, True, False])
    assert warning is not None
    assert "trainable_token_indices" in warning


def test_a_loss_that_has_not_moved_in_50_steps_is_said_once_with_the_remedy() -> None:
    guards = Guards()
    said = [guards.loss(step, 2.0 + 0.01 * (step % 2)) for step in range(1, 80)]
    assert [i + 1 for i, text in enumerate(said) if text] == [50]
    assert said[49] is not None
    assert "has not moved in 50 steps (2.005 -> 2.005)" in said[49]
    assert "veneer data show" in said[49]
    assert "3e-4 to 5e-4" in said[49]


def test_a_loss_that_has_risen_asks_for_a_lower_rate() -> None:
    guards = Guards()
    said = [guards.loss(step, 1.0 + step / 50) for step in range(1, 51)]
    assert said[-1] is not None
    assert "has risen" in said[-1]
    assert "lower train.learning_rate" in said[-1]


def test_a_falling_loss_is_no_news() -> None:
    guards = Guards()
    assert not any(guards.loss(step, 2.0 - step / 100) for step in range(1, 80))


def test_a_held_out_loss_that_rises_twice_in_a_row_is_said_with_the_best_step() -> None:
    guards = Guards()
    said = [guards.evaluation(value, 20) for value in (2.0, 1.5, 1.6, 1.4, 1.45, 1.5)]
    assert [text is not None for text in said] == [False, False, False, False, False, True]
    assert said[-1] is not None
    assert "1.400 -> 1.450 -> 1.500" in said[-1]
    assert "the best checkpoint is step 20" in said[-1]
    assert "lora_dropout" in said[-1]


def test_the_memory_of_the_guards_survives_a_resume() -> None:
    from veneer.train.state import TrainerState

    state = TrainerState()
    for step in range(1, 30):
        state.guards.loss(step, 2.0)
    state.guards.gradients(1, NAMES, [False, True, True])
    state.guards.evaluation(1.0, None)
    state.guards.evaluation(1.1, None)
    again = TrainerState.from_dict(state.to_dict())
    assert again == state
    assert again.guards.evaluation(1.2, None) is not None
    assert [step for step in range(30, 60) if again.guards.loss(step, 2.0)] == [50]


def error(**changes: object) -> TrainError:
    arguments: dict[str, object] = {
        "step": 7,
        "loss": math.nan,
        "grad_norm": math.nan,
        "bad_rows": ["a.jsonl:3", "a.jsonl:9"],
        "step_rows": ["a.jsonl:1", "a.jsonl:3", "a.jsonl:9"],
        "bad_tensors": ["layers.0.q.A"],
        "last_checkpoint": Path("runs/x/checkpoints/step-000005"),
    }
    return not_finite(**(arguments | changes))  # type: ignore[arg-type]


def test_a_nan_loss_names_the_rows_of_its_micro_batch_and_the_last_checkpoint() -> None:
    message = str(error())
    assert "the loss is nan at step 7; the step was not taken" in message
    assert "runs/x/checkpoints/step-000005" in message
    assert "rows a.jsonl:3, a.jsonl:9\n" in message
    assert "veneer data show" in message


def test_an_infinite_gradient_names_all_rows_of_the_step_and_the_first_bad_tensor() -> None:
    message = str(error(loss=1.5, grad_norm=math.inf, bad_rows=[]))
    assert "the gradient is not finite (norm inf) at step 7" in message
    assert "rows a.jsonl:1, a.jsonl:3, a.jsonl:9; first bad gradient: layers.0.q.A" in message


def test_without_a_checkpoint_that_is_said() -> None:
    assert "there is no checkpoint yet" in str(error(last_checkpoint=None))
