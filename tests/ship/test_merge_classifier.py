"""A classifier's adapter folded into its base: the folder is what transformers and Veneer both open as a classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classifiers import write_classifier_base
from veneer import LoraConfig, attach, load_base, load_classifier, predict
from veneer.errors import UsageError
from veneer.models import Base
from veneer.run import is_classifier, load_model
from veneer.ship import merge_model

LABELS = ["maybe", "no", "yes"]
TEXTS = ["is snow cold?", "ten is less than nine", "x", "a longer text about nothing at all"]


def adapter_of(family: str, folder: Path, **settings: Any) -> Path:
    (folder / "base").mkdir()
    write_classifier_base(family, folder / "base")
    base = load_base(folder / "base", dtype="float32", device="cpu", labels=LABELS)
    config = LoraConfig(r=4, modules_to_save=list(base.head), task_type="SEQ_CLS", init_lora_weights=False, **settings)
    adapted = attach(base, config, seed=0)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return adapted.save(folder / "adapter", extra={"labels": LABELS, "majority": "no", "pairs": False})


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "llama"])
def test_it_is_opened_as_a_classifier_with_the_same_answers(family: str, tmp_path: Path) -> None:
    adapter = adapter_of(family, tmp_path)
    expected = predict(load_classifier(adapter, dtype="float32", device="cpu"), TEXTS)
    merged = merge_model(adapter, tmp_path / "merged", dtype="float32", device="cpu")
    assert merged.labels == tuple(LABELS)
    assert merged.measured_on == "6 built-in texts"
    assert merged.report.positions == 6
    assert merged.report.max_abs_logit_difference < 1e-5
    assert len({p.label for p in expected}) > 1 or max(p.probability for p in expected) > 0.4  # the head is not flat

    model, tokenizer = (
        c.from_pretrained(tmp_path / "merged") for c in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    for text, row in zip(TEXTS, expected):
        with torch.no_grad():
            chances = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert [model.config.id2label[i] for i in range(3)] == LABELS
        torch.testing.assert_close(chances, torch.tensor(list(row.probabilities.values())), rtol=1e-4, atol=1e-5)

    assert is_classifier(tmp_path / "merged")
    opened = load_classifier(tmp_path / "merged", dtype="float32", device="cpu")
    assert isinstance(opened, Base)
    for row, again in zip(expected, predict(opened, TEXTS)):
        assert again.probabilities == pytest.approx(row.probabilities, rel=1e-4)
    record = json.loads((tmp_path / "merged" / "veneer.json").read_text())
    assert (record["labels"], record["majority"]) == (LABELS, "no")


def test_what_makes_no_sense_of_a_classifier_is_refused(tmp_path: Path) -> None:
    adapter = adapter_of("bert", tmp_path)
    with pytest.raises(UsageError, match="never quantised"):
        merge_model(adapter, tmp_path / "merged", quantize="nf4")
    assert not (tmp_path / "merged").exists()
    merge_model(adapter, tmp_path / "merged")
    with pytest.raises(UsageError, match="names classes and writes no text"):
        load_model(tmp_path / "merged")
    with pytest.raises(UsageError, match="no adapter that could be put on"):
        load_classifier(tmp_path / "merged", base="other")
