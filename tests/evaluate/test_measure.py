"""``evaluate`` end to end on a tiny random model: what is generated and measured, and that nothing is left changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.data import read, render_prompt
from veneer.errors import DataError, ModelError, UsageError
from veneer.evaluate import Evaluation, evaluate, measure
from veneer.generate import generate
from veneer.models import Base, load_base
from veneer.run import RunFolder, RunInfo

ROWS = [
    {"prompt": "spell one", "completion": "one"},
    {"prompt": "what follows two?", "completion": "three, as everybody knows who has learnt to count"},
    {"prompt": "what is the colour of the sky? the sky is", "completion": "blue"},
    {"prompt": "the capital of France", "completion": "Paris"},
    {"prompt": "five", "completion": "six"},
]
FAST: dict[str, Any] = {"max_new_tokens": 4, "resamples": 200}


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base, dtype="float32", device="cpu")


@pytest.fixture
def adapted(base: Base) -> AdaptedModel:
    """An adapter that changes what the model says."""
    model = attach(base, LoraConfig(r=4, lora_alpha=8), seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def perplexity_by_hand(base: Base, rows: list[dict[str, str]]) -> float:
    """One row at a time, full logits, the answer's tokens and the stop token after them."""
    total, count = 0.0, 0
    for row in read(rows).conversations:
        prompt = render_prompt(row, base.tokenizer).prompt_ids
        answer = base.tokenizer(row.messages[-1].content + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = base.module(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        logprobs = torch.log_softmax(logits, -1)
        for place, token in enumerate(answer):
            total -= float(logprobs[len(prompt) + place - 1, token])
        count += len(answer)
    return math.exp(total / count)


def test_answers_scores_and_perplexity_are_those_of_one_row_at_a_time(base: Base) -> None:
    found = evaluate(base, ROWS, metrics=["exact_match", "token_f1", "perplexity"], **FAST)
    assert list(found.metrics) == ["exact_match", "token_f1", "perplexity"]
    assert not found.compared
    for row, conversation in zip(found.rows, read(ROWS).conversations):
        alone = generate(base, [render_prompt(conversation, base.tokenizer).prompt_ids], max_new_tokens=4)[0]
        assert row.prediction == alone.text
        assert row.finish_reason == alone.finish_reason
        assert row.reference == conversation.messages[-1].content
        assert row.prompt == conversation.messages[0].content
        assert row.base_prediction is None
        assert row.base_scores is None
    # Fused float32 kernels against a double softmax over plain logits.
    assert found.metrics["perplexity"].value == pytest.approx(perplexity_by_hand(base, ROWS), rel=1e-5)
    assert found.metrics["perplexity"].rows == len(ROWS)
    assert found.base == base.identity.to_dict()
    assert found.cut == sum(row.finish_reason == "length" for row in found.rows)


def test_the_base_beside_an_adapter_is_the_base_alone(base: Base, adapted: AdaptedModel, tiny_base: Path) -> None:
    names = ["exact_match", "perplexity"]
    alone = evaluate(load_base(tiny_base, dtype="float32", device="cpu"), ROWS, metrics=names, **FAST)
    both = evaluate(adapted, ROWS, metrics=names, **FAST)
    assert both.compared
    assert [row.base_prediction for row in both.rows] == [row.prediction for row in alone.rows]
    assert [row.base_answer_nll for row in both.rows] == [row.answer_nll for row in alone.rows]
    assert [row.base_scores for row in both.rows] == [row.scores for row in alone.rows]
    assert both.metrics["perplexity"].base_value == alone.metrics["perplexity"].value
    # The adapter was on for its own half: it says something else.
    assert all(row.answer_nll != row.base_answer_nll for row in both.rows)
    assert any(row.prediction != row.base_prediction for row in both.rows)
    difference = both.metrics["perplexity"].difference
    assert difference == pytest.approx(both.metrics["perplexity"].value - alone.metrics["perplexity"].value)


def test_without_compare_the_base_is_not_measured(adapted: AdaptedModel) -> None:
    found = evaluate(adapted, ROWS, metrics=["exact_match"], compare=False, **FAST)
    assert not found.compared
    assert found.rows[0].base_prediction is None


def test_weights_active_adapter_and_training_mode_are_left_as_they_were(adapted: AdaptedModel) -> None:
    before = {name: tensor.clone() for name, tensor in adapted.module.state_dict().items()}
    adapted.module.train()
    evaluate(adapted, ROWS[:2], metrics=["exact_match", "perplexity"], **FAST)
    assert adapted.module.training
    assert adapted.active == "default"
    after = adapted.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_does_not_disturb_a_measurement_in_the_midst_of_training(base: Base) -> None:
    model = attach(base, LoraConfig(r=4, lora_dropout=0.5), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.05)
    model.module.train()
    first = evaluate(model, ROWS[:2], metrics=["perplexity"], compare=False, **FAST)
    second = evaluate(model, ROWS[:2], metrics=["perplexity"], compare=False, **FAST)
    assert first.metrics == second.metrics


def test_the_adapter_is_on_again_when_measuring_the_base_fails(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(measure, "generate", fail_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(adapted, ROWS[:1], metrics=["exact_match"], **FAST)
    assert adapted.active == "default"


def test_perplexity_alone_generates_nothing(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "generate", None)
    found = evaluate(base, ROWS, metrics=["perplexity"], **FAST)
    assert found.rows[0].prediction is None
    assert found.rows[0].prompt == "spell one"
    assert found.rows[0].scores == {
        "perplexity": pytest.approx(math.exp(found.rows[0].answer_nll / found.rows[0].answer_tokens))  # type: ignore[operator]
    }


def test_perplexity_does_not_depend_on_how_rows_are_batched(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    together = evaluate(base, ROWS, metrics=["perplexity"], **FAST)
    monkeypatch.setattr(measure, "BATCH_TOKENS", 1)
    apart = evaluate(base, ROWS, metrics=["perplexity"], **FAST)
    for left, right in zip(together.rows, apart.rows):
        assert left.answer_nll == pytest.approx(right.answer_nll, rel=1e-6)


def test_perplexity_is_of_the_last_answer_whatever_the_turns_flags_say(base: Base) -> None:
    def row(**flags: Any) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two", **({"train": True} if flags else {})},
                {"role": "user", "content": "three"},
                {"role": "assistant", "content": "four", **({"train": False} if flags else {})},
            ]
        }

    plain = evaluate(base, [row()], metrics=["perplexity"], **FAST)
    flagged = evaluate(base, [row(flags=True)], metrics=["perplexity"], **FAST)
    assert plain.metrics["perplexity"].value == flagged.metrics["perplexity"].value
    assert plain.rows[0].prompt == "user: one\n\nassistant: two\n\nuser: three"


def test_a_row_beyond_the_context_is_left_out_of_the_perplexity_and_counted(base: Base) -> None:
    rows = [ROWS[0], {"prompt": "count", "completion": "one two three " * 300}, ROWS[3]]
    found = evaluate(base, rows, metrics=["exact_match", "perplexity"], **FAST)
    assert found.too_long == 1
    assert found.metrics["perplexity"].rows == 2
    assert found.metrics["exact_match"].rows == 3
    assert found.metrics["perplexity"].value == pytest.approx(perplexity_by_hand(base, [ROWS[0], ROWS[3]]), rel=1e-5)
    assert "1 row too long" in str(found)


def test_raw_text_has_a_perplexity_and_no_answer(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("the sky is blue and the capital of France is Paris\n", encoding="utf-8")
    found = evaluate(base, file, metrics=["perplexity"], **FAST)
    assert found.metrics["perplexity"].value > 1
    assert found.rows[0].reference.startswith("the sky")
    with pytest.raises(DataError, match="raw text") as caught:
        evaluate(base, file, metrics=["exact_match"], **FAST)
    assert caught.value.where == found.rows[0].row_id


def test_a_sample_of_rows_is_drawn_by_seed_and_keeps_the_datas_order(base: Base) -> None:
    rows = [{"prompt": f"row {n}", "completion": str(n)} for n in range(30)]

    def ids(seed: int) -> list[str]:
        found = evaluate(base, rows, metrics=["perplexity"], max_rows=6, seed=seed, **FAST)
        return [row.reference for row in found.rows]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(1) != [str(n) for n in range(6)]
    assert [int(n) for n in ids(1)] == sorted(int(n) for n in ids(1))
    assert len(ids(1)) == 6


def test_fields_that_not_all_rows_have_are_averaged_over_those_that_do(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "completion": '{"x": 1, "y": 2}'}, {"prompt": "b", "completion": '{"x": 3}'}]
    answers = iter(['{"x": 1, "y": 0}', '{"x": 3}'])

    def say(model: Any, prompts: Any, **kwargs: Any) -> list[Any]:
        from veneer.generate import Generation

        return [Generation([], next(answers), "stop", len(prompt)) for prompt in prompts]

    monkeypatch.setattr(measure, "generate", say)
    found = evaluate(base, rows, metrics=["json_fields", "json_exact"], **FAST).metrics
    assert list(found) == ["json_fields", "json_fields.x", "json_fields.y", "json_exact"]
    assert [found[name].value for name in found] == [0.75, 1.0, 0.0, 0.5]
    assert [found[name].rows for name in found] == [2, 2, 1, 2]


def test_a_reference_that_does_not_fit_is_named_before_anything_is_generated(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "generate", None)
    rows = [{"prompt": "a", "completion": "#### 1"}, {"prompt": "b", "completion": "none"}]
    with pytest.raises(DataError, match="no number") as caught:
        evaluate(base, rows, metrics=["number_match"], **FAST)
    assert caught.value.where == read(rows).conversations[1].row_id


def test_a_row_without_an_answer_is_named(base: Base) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(DataError, match="no assistant turn"):
        evaluate(base, rows, metrics=["exact_match"], **FAST)


def test_a_wrong_metric_or_number_is_told_before_the_model_is_looked_for() -> None:
    with pytest.raises(UsageError, match="unknown metric"):
        evaluate("no/such/model", "no/such/file", metrics=["exactmatch"])
    for option in ("max_new_tokens", "max_rows", "batch_size"):
        with pytest.raises(UsageError, match=option):
            evaluate("no/such/model", "no/such/file", metrics=["exact_match"], **{option: 0})


def test_no_rows_are_an_error(base: Base) -> None:
    rows = read(ROWS).subset([], "nothing")
    with pytest.raises(DataError, match="no rows"):
        evaluate(base, rows, metrics=["exact_match"])


def test_a_model_without_a_tokenizer_is_refused(base: Base) -> None:
    bare = attach(base.module, LoraConfig(r=2))
    with pytest.raises(UsageError, match="tokenizer"):
        evaluate(bare, ROWS, metrics=["exact_match"])


def test_a_likelihood_that_is_not_finite_names_the_row(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, batch: Any) -> Any:
        return torch.full((len(batch.row_ids),), math.nan), torch.ones(len(batch.row_ids), dtype=torch.int64)

    monkeypatch.setattr(measure, "answer_logprobs", broken)
    with pytest.raises(ModelError, match="nan") as caught:
        evaluate(base, ROWS[:1], metrics=["perplexity"], **FAST)
    assert caught.value.where == read(ROWS).conversations[0].row_id


def test_progress_counts_every_part_to_its_end(adapted: AdaptedModel) -> None:
    heard: dict[str, tuple[int, int]] = {}
    evaluate(
        adapted,
        ROWS,
        metrics=["exact_match", "perplexity"],
        progress=lambda what, done, total: heard.__setitem__(what, (done, total)),
        **FAST,
    )
    assert heard == dict.fromkeys(
        ("adapter: answers", "adapter: perplexity", "base: answers", "base: perplexity"), (len(ROWS), len(ROWS))
    )


def test_a_run_folder_brings_its_adapter_and_its_chat_template(
    adapted: AdaptedModel, tiny_base: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    path = tmp_path / "other.jinja"
    path.write_text(template, encoding="utf-8")
    folder = RunFolder(tmp_path / "run")
    adapted.save(folder.adapter)
    recipe = {
        "base": str(tiny_base),
        "dtype": "float32",
        "data": {"train": str(tiny_rows), "chat_template": str(path)},
        "output_dir": str(folder.path),
    }
    folder.recipe_path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    RunInfo(status="finished").write(folder)
    from_run = evaluate(folder.path, ROWS, metrics=["perplexity"], **FAST)
    by_hand = evaluate(adapted, ROWS, metrics=["perplexity"], chat_template=str(path), **FAST)
    other = evaluate(adapted, ROWS, metrics=["perplexity"], **FAST)
    assert from_run.metrics == by_hand.metrics
    assert from_run.metrics != other.metrics
    assert from_run.model == str(folder.path)


def test_the_same_evaluation_twice_is_the_same(base: Base) -> None:
    runs = [evaluate(base, ROWS, metrics=["token_f1", "perplexity"], **FAST).to_dict() for _ in range(2)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1]


def test_an_evaluation_of_the_tiny_rows_comes_back_from_its_file(base: Base, tiny_rows: Path, tmp_path: Path) -> None:
    found = evaluate(base, tiny_rows, metrics=["perplexity", "exact_match"], max_rows=8, **FAST)
    again = Evaluation.load(found.save(tmp_path / "eval.json"))
    assert again == found
    assert again.headline() == "perplexity"
    assert again.data_source == found.data_source != ""
