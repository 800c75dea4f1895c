"""Classification runs: every family against PEFT and the frozen base, batches, resuming, labels, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Watcher, lines
from torch import Tensor

from classifiers import FAMILIES, write_classifier_base
from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter
from veneer.data.label_batch import LabelledBatch, collate_labelled
from veneer.data.read import read
from veneer.errors import DataError, RecipeError, TrainError, UsageError
from veneer.evaluate.classify import evaluate_classes, predict, rendered
from veneer.models import Base, load_base
from veneer.models.classifier import class_logits, pad_id_of_classifier
from veneer.recipe import recipe_from
from veneer.run import classifier_notes, is_classifier, load_classifier, load_model, open_run
from veneer.train import train, train_recipe
from veneer.train.classification import class_micro_batches, classification, for_classifier
from veneer.train.distributed import World
from veneer.train.layout import Layout
from veneer.train.start import start_from_rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

LABELS = ["cold", "warm"]
# The same formula in float32, summed in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def examples() -> list[dict[str, Any]]:
    """24 short rows of two classes, told apart by their words."""
    return [
        {"text": f"{'sun fire' if i % 2 else 'ice snow'} {'and so on ' * (i % 4)}{i}", "label": LABELS[i % 2]}
        for i in range(24)
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = write_classifier_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture
def run(folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Any, Watcher]]:
    """``run("name", family="bert", train={...}, rows=[...])`` trains into ``tmp_path/name``."""

    def start(
        name: str = "run", family: str = "bert", *, rows: list[dict[str, Any]] | None = None, **changes: Any
    ) -> tuple[Any, Watcher]:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or examples()), encoding="utf-8")
        how = {key: changes.pop(key) for key in ("resume", "overwrite") if key in changes}
        values: dict[str, Any] = {
            "task": "classification",
            "base": str(folder(family)),
            "dtype": "float32",
            "device": "cpu",
            "adapter": {"r": 4},
            "data": {"train": str(data), "eval": 6},
            "train": {"num_train_epochs": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-4},
            "eval": {"samples": 2},
            "output_dir": str(tmp_path / name),
        }
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        watcher = Watcher()
        return train_recipe(recipe_from(values), progress=watcher, **how), watcher

    return start


def load(folder: Path) -> Base:
    return load_base(folder, dtype="float32", device="cpu", labels=LABELS)


def attached(folder: Path) -> AdaptedModel:
    """A classifier with an adapter whose every part shows in the logits."""
    base = load(folder)
    adapted = attach(base, for_classifier(LoraConfig(r=4, lora_alpha=8), base), seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def batch_of(base: Base, count: int = 6) -> LabelledBatch:
    dataset = rendered(read(examples(), format="labelled"), base, 64)
    return collate_labelled(dataset, range(count), pad_id_of_classifier(base.module))


@torch.no_grad()
def logits(module: Any, batch: LabelledBatch) -> Tensor:
    return class_logits(module, batch)


def plain(folder: Path, base: Base) -> Any:
    """transformers' model with the same body and the same fresh head."""
    from transformers import AutoModelForSequenceClassification

    module = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32, pad_token_id=pad_id_of_classifier(base.module)
    )
    module.load_state_dict(load(folder).module.state_dict())
    return module.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_a_classifier_that_we_write_with_the_same_logits(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapted = attached(folder(family))
    base = adapted.base
    assert isinstance(base, Base)
    batch = batch_of(base)
    expected = logits(adapted.module, batch)
    with adapted.disabled():
        assert (logits(adapted.module, batch) - expected).abs().max() > 1e-2
    adapted.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == sorted(base.head)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")  # PEFT goes on without them
        theirs = peft.PeftModel.from_pretrained(plain(folder(family), base), str(tmp_path / "a")).eval()
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    torch.testing.assert_close(logits(theirs.base_model.model, batch), expected, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_a_classifier_that_peft_writes_with_the_same_logits(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(folder(family))
    batch = batch_of(base)
    config = peft.LoraConfig(
        r=4, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=list(base.head), init_lora_weights=False
    )
    theirs = peft.get_peft_model(plain(folder(family), base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(theirs.base_model.model, batch)
    theirs.save_pretrained(tmp_path / "a")
    adapted = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(logits(adapted.module, batch), expected, **TOLERANCE)
    # Their folder says no names and no precision; it is a classifier all the same.
    assert is_classifier(tmp_path / "a")
    loaded = load_classifier(tmp_path / "a", base=str(folder(family)), dtype="float32", device="cpu")
    assert isinstance(loaded.base, Base)
    assert loaded.base.labels == ("LABEL_0", "LABEL_1")
    torch.testing.assert_close(logits(loaded.module, batch), expected, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_off_is_the_base_bit_for_bit_after_training(
    family: str, run: Callable[..., Any], folder: Callable[[str], Path]
) -> None:
    result, _ = run(family=family, train={"max_steps": 4})
    base = load(folder(family))
    fresh = base.module.state_dict()
    trained = set(map(id, result.model.parameters()))
    frozen = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in result.model.module.named_parameters()
        if id(parameter) not in trained
    }
    assert len(frozen) == len(list(base.module.parameters()))
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in frozen.items())
    with result.model.disabled():
        assert torch.equal(logits(result.model.module, batch_of(base)), logits(base.module, batch_of(base)))


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_8_is_1_x_8_in_loss_and_gradient_norm(family: str, run: Callable[..., Any], tmp_path: Path) -> None:
    run("eight", family)
    run("ones", family, train={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8})
    eight, ones = lines(tmp_path / "eight"), lines(tmp_path / "ones")
    assert [line["rows"] for line in eight if "loss" in line] == [8, 8, 2] * 4
    for key in ("loss", "grad_norm", "accuracy", "eval_loss", "eval_accuracy"):
        pairs = [(a[key], b[key]) for a, b in zip(eight, ones, strict=True) if key in a]
        assert len(pairs) >= 5
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=2e-4, abs=2e-5), key
    losses = [line["loss"] for line in eight if "loss" in line]
    assert max(losses) - min(losses) > 0.02, "the series must move, or it proves nothing"


def test_the_objective_is_the_cross_entropy_of_the_class_summed_over_rows(folder: Callable[[str], Path]) -> None:
    adapted = attached(folder("bert"))
    assert isinstance(adapted.base, Base)
    batch = batch_of(adapted.base)
    output = classification(adapted.module, batch)
    expected = 0.0
    for scores, label in zip(logits(adapted.module, batch).tolist(), [0, 1] * 3):
        total = sum(torch.tensor(scores).double().exp().tolist())
        expected -= scores[label] - torch.tensor(total).log().item()
    assert output.trained == 6
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    family: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"adapter": {"r": 4, "lora_dropout": 0.1}, "train": {"save_steps": 2, "eval_steps": 2}}
    run("whole", family, **settings)
    from veneer.train import loop

    original = loop.train_step

    def killed(t: Any, prepare_noise: Any) -> bool:
        if t.state.step == 5:
            raise KeyboardInterrupt
        return original(t, prepare_noise)

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("cut", family, **settings)
    monkeypatch.undo()
    run("cut", family, resume=True, **settings)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert one == two


def test_eva_starts_at_what_the_tokens_say_and_never_at_padding(folder: Callable[[str], Path]) -> None:
    started = []
    for rows in (1, 24):
        base = load(folder("bert"))
        config = LoraConfig(r=4, init_lora_weights="eva", eva_config={"rho": 1.0, "tau": 1.0})
        adapted = attach(base, for_classifier(config, base), seed=0)
        dataset = rendered(read(examples(), format="labelled"), base, 64)
        layout = Layout(False, 2048, rows, pad_id_of_classifier(base.module), False)
        device, world = torch.device("cpu"), World()
        start_from_rows(adapted, dataset, layout, class_micro_batches, classification, device, 0, world)
        started.append({path: adapter.A.detach() for path, adapter in adapted.linears().items()})
    for path, A in started[0].items():
        cosines = torch.linalg.svdvals(A @ started[1][path].t())  # of the angles between the two subspaces
        assert cosines.min() > 0.999, path


def test_the_run_is_evaluated_keeps_the_best_and_remembers_its_labels(run: Callable[..., Any], tmp_path: Path) -> None:
    result, watcher = run(family="llama", eval={"metric_for_best": "macro_f1", "samples": 2})
    assert [line["step"] for line in watcher.evaluations] == [0, 3, 6, 9, 12]
    assert set(watcher.evaluations[-1]) == {"step", "epoch", "eval_loss", "eval_accuracy", "eval_macro_f1"}
    assert result.metrics["eval_accuracy"] == 1.0 > result.metrics["base_eval_accuracy"]
    assert any("rows of a classifier are not packed" in text for _, text in watcher.messages)
    assert any("would be with" in text for _, text in watcher.messages), "the baseline beside the accuracy"
    opened = open_run(result)
    assert opened.recipe.data.labels == LABELS == opened.info["labels"]
    assert sum(opened.info["classes"]["counts"]) == 18
    sample = json.loads((result.path / "eval" / "step-000012.json").read_text())["samples"][0]
    assert sample["prediction"].startswith(sample["reference"] + " (")
    assert classifier_notes(result) == {
        "labels": LABELS,
        "majority": opened.info["classes"]["names"][0 if opened.info["classes"]["counts"][0] >= 9 else 1],
        "pairs": False,
    }
    loaded = load_classifier(result, device="cpu")
    assert isinstance(loaded.base, Base)
    batch = batch_of(loaded.base)
    assert torch.equal(logits(loaded.module, batch), logits(result.model.module, batch))
    found = predict(loaded, ["sun fire 3", "ice snow 8"])
    assert [one.label for one in found] == ["warm", "cold"]
    assert all(sum(one.probabilities.values()) == pytest.approx(1) for one in found)
    assert found[0].probability == max(found[0].probabilities.values())


def test_an_evaluation_stands_against_the_majority_class(run: Callable[..., Any], tmp_path: Path) -> None:
    result, _ = run()
    rows = read(examples(), format="labelled")
    evaluation = evaluate_classes(result.model, rows, majority="cold", resamples=200)
    assert list(evaluation.metrics) == ["accuracy", "macro_f1", "macro_f1.cold", "macro_f1.warm"]
    accuracy = evaluation.metrics["accuracy"]
    assert accuracy.base_value == 0.5
    assert accuracy.value == sum(row.prediction == row.reference for row in evaluation.rows) / 24
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert evaluation.metrics["macro_f1"].base_value == pytest.approx((2 / 3 + 0) / 2)
    assert {row.base_prediction for row in evaluation.rows} == {"cold"}
    from veneer.evaluate import write_report

    evaluation.save(result.path / "eval" / "rows.json")
    page = write_report(result.path).read_text()
    for part in ("Who is taken for whom", "Macro F1", "majority", "precision"):
        assert part in page
    assert "greedy decoding" not in page


def test_pairs_are_trained_and_their_run_says_that_it_needs_both_texts(run: Callable[..., Any]) -> None:
    rows = [{"premise": f"sun {i}", "hypothesis": "fire" if i % 2 else "snow", "label": i % 2} for i in range(24)]
    result, watcher = run(rows=rows, data={"labels": ["no", "yes"]})
    assert "pair: 'hypothesis'" in watcher.messages[0][1]
    assert classifier_notes(result)["pairs"] is True
    assert open_run(result).info["labels"] == ["no", "yes"]
    from veneer.cli.classify import predict_classes

    with pytest.raises(UsageError, match="trained on pairs of texts"):
        predict_classes(lambda: result.model, str(result.path), ["sun 1"], None, max_rows=None, batch_size=8)
    (found,) = predict(result.model, read(rows[:1], format="labelled"))
    assert found.text == "sun 0\nsnow"


def test_python_trains_what_the_recipe_trains(
    run: Callable[..., Any], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run("recipe", train={"max_steps": 3})
    base = load(folder("bert"))
    adapted = attach(base, for_classifier(LoraConfig(r=4), base), seed=0)
    settings = {"max_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "samples": 2}
    train(adapted, tmp_path / "rows.jsonl", eval_data=6, output_dir=tmp_path / "python", **settings)
    assert lines(tmp_path / "python") == lines(tmp_path / "recipe")


def test_a_head_that_would_not_be_trained_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    adapted = attach(load(folder("distilbert")), LoraConfig(r=4, modules_to_save=["classifier"]), seed=0)
    with pytest.raises(TrainError, match="pre_classifier is not in modules_to_save") as caught:
        train(adapted, examples(), eval_data=None, output_dir=tmp_path / "r")
    assert "modules_to_save=['pre_classifier', 'classifier']" in str(caught.value.fix)
    assert not (tmp_path / "r").exists()


def test_a_model_in_which_padding_is_seen_is_refused(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = LabelledBatch.attention_mask
    seen = property(lambda self: torch.ones_like(original.fget(self)))
    monkeypatch.setattr(LabelledBatch, "attention_mask", seen)
    with pytest.raises(TrainError, match="a row filled up with padding gives other logits"):
        run()
    assert not (tmp_path / "run").exists()


def test_truncation_is_counted_token_by_token(run: Callable[..., Any]) -> None:
    rows = examples()
    rows[0]["text"] = "ice " * 30  # 120 characters are 120 tokens here, and two of the frame
    result, watcher = run(rows=rows, data={"eval": None}, train={"max_length": 40, "max_steps": 1})
    stats = open_run(result).info["data"]["train"]["stats"]
    lengths = [len(row["text"]) + 2 for row in rows]
    assert stats["truncated_rows"] == sum(length > 40 for length in lengths)
    assert stats["truncated_tokens"] == sum(max(0, length - 40) for length in lengths)
    assert stats["tokens"] == sum(min(length, 40) for length in lengths)
    assert f"{stats['truncated_tokens']:,} tokens lost" in " ".join(watcher.warnings)


def test_rows_are_cut_where_the_model_has_no_positions_and_that_is_said(run: Callable[..., Any]) -> None:
    rows = examples()
    rows[0]["text"] = "ice " * 30
    _, watcher = run(rows=rows, train={"max_steps": 1})
    assert any("rows may have 64 tokens" in text for _, text in watcher.messages)


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"label": None}, "1 of 24 rows have no label", "label them"),
        ({"label": 0.5}, "a number with a fraction", "sort the values into classes"),
        ({"label": ["cold"]}, "the label is list", "one name or number"),
    ],
)
def test_labels_that_cannot_be_used_are_named_before_anything_is_written(
    change: dict[str, Any], message: str, fix: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    rows = examples()
    rows[4] |= change
    with pytest.raises(DataError, match=message) as caught:
        run(rows=rows, data={"eval": None})
    assert "rows.jsonl:5" in str(caught.value.where)
    assert fix in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "nf4"}, "quantize.scheme does not go with task: classification"),
        ({"data": {"format": "messages"}}, "classification reads labelled rows"),
        ({"data": {"labels": ["a", "a"]}}, "names a class twice"),
        ({"eval": {"metrics": ["rouge_l"]}}, "unknown metric 'rouge_l'"),
        ({"eval": {"metric_for_best": "exact_match"}}, "is 'exact_match', which is not in eval.metrics"),
        ({"task": "generation", "data": {"labels": ["a", "b"]}}, "is for classification"),
        ({"train": {"micro_batch_tokens": 4096}}, "does not go with task: classification"),
        ({"adapter": {"init_lora_weights": "eva"}}, "does not go with task: classification"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], message: str, run: Callable[..., Any]
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(**changes)


def test_a_classifier_is_not_taken_for_a_model_that_writes(run: Callable[..., Any]) -> None:
    result, _ = run(train={"max_steps": 1})
    with pytest.raises(UsageError, match="it names classes and writes no text") as caught:
        load_model(result)
    assert "veneer generate" in str(caught.value.fix)


def test_two_processes_take_the_steps_of_one(run: Callable[..., Any], tmp_path: Path) -> None:
    """The rows of a step are dealt, and losses, predictions and gradients come together again."""
    import subprocess
    import sys

    run("one")
    recipe = (tmp_path / "one" / "recipe.yaml").read_text()
    (tmp_path / "two.yaml").write_text(recipe)
    overrides = [f"output_dir={tmp_path / 'two'}", "train.per_device_train_batch_size=4"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "veneer", "train"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "two.yaml"), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        a, b = ([line[key] for line in found if key in line] for found in (one, two))
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5), key
