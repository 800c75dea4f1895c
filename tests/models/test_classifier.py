"""Bases with a classification head: the body from the files, the head fresh, the logits transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from classifiers import ENCODERS, FAMILIES, language_model, write_classifier_base, write_tokenizer
from veneer.data.label_batch import LabelledBatch, collate_labelled
from veneer.data.label_render import render_labelled
from veneer.data.read import read
from veneer.errors import ModelError, UsageError
from veneer.evaluate import evaluate
from veneer.models import Base, load_base
from veneer.models.classifier import class_logits, labels_of, longest_row, pad_id_of_classifier

LABELS = ["bad", "good", "so so"]
HEADS = {
    "bert": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "modernbert": ("head", "classifier"),
    "deberta": ("pooler", "classifier"),
    "llama": ("score",),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = write_classifier_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


def load(folder: Path, labels: list[str] | None = None, seed: int = 0) -> Base:
    return load_base(folder, dtype="float32", device="cpu", labels=labels or LABELS, head_seed=seed)


def louder(base: Base) -> Base:
    """The same with the output layer 200 times as large, so that whatever is wrong before it shows in the logits."""
    for parameter in base.module.parameters():
        if parameter.ndim == 2 and parameter.shape[0] == len(base.labels):
            parameter.mul_(200.0)
    return base


def batch_of(base: Base, *texts: str | tuple[str, str]) -> LabelledBatch:
    rows = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]
    pad_id = pad_id_of_classifier(base.module)
    dataset = render_labelled(read(rows, format="labelled"), base.tokenizer, base.labels, max_length=64, pad_id=pad_id)
    return collate_labelled(dataset, range(len(dataset)), pad_id)


@torch.no_grad()
def logits(base: Base, *texts: str | tuple[str, str]) -> Tensor:
    return class_logits(base.module, batch_of(base, *texts))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_comes_from_the_files_and_the_logits_are_transformers_own(
    family: str, folder: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForSequenceClassification

    base = louder(load(folder(family)))
    assert base.head == HEADS[family]
    assert labels_of(base.module) == base.labels == tuple(LABELS)
    saved, own = load_file(folder(family) / "model.safetensors"), base.module.state_dict()
    body = f"{base.module.base_model_prefix}."
    read_from_files = [name for name in own if name in saved and name.startswith(body)]
    assert len(read_from_files) >= 14
    assert all(torch.equal(saved[name], own[name]) for name in read_from_files)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder(family), num_labels=3, dtype=torch.float32, pad_token_id=pad_id_of_classifier(base.module)
    ).eval()
    theirs.load_state_dict(own)
    batch = batch_of(base, "short", "a longer one, so that the first is padded")
    arguments = {"token_type_ids": batch.token_types} if family == "bert" else {}
    assert batch.attention_mask is not None
    with torch.no_grad():
        expected = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), **arguments).logits
    # The order of sums differs between the attention implementations.
    torch.testing.assert_close(class_logits(base.module, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_has_the_logits_that_it_has_alone(family: str, folder: Callable[[str], Path]) -> None:
    base = louder(load(folder(family)))
    texts = ["x", "good morning", "the longest of these three texts"]
    alone = torch.cat([logits(base, text) for text in texts])
    torch.testing.assert_close(logits(base, *texts), alone, rtol=1e-5, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3, "the text must matter"


def test_a_decoder_pools_the_last_token_of_the_text_also_where_padding_is_its_eos(
    folder: Callable[[str], Path],
) -> None:
    base = louder(load(folder("llama")))
    assert base.tokenizer.pad_token_id is None
    assert pad_id_of_classifier(base.module) == base.tokenizer.eos_token_id == 0
    batch = batch_of(base, "one", "another text")
    body = base.module.base_model(input_ids=batch.input_ids).last_hidden_state
    assert batch.lengths == [3, 12]
    last = body[torch.arange(2), torch.tensor([2, 11])]
    torch.testing.assert_close(base.module.score(last), class_logits(base.module, batch), rtol=1e-5, atol=1e-6)
    # A text that ends in the eos itself would be pooled one token earlier: its end is taken off, and all agree.
    assert torch.equal(batch_of(base, "one[PAD]").input_ids, batch_of(base, "one").input_ids)


def test_the_fresh_head_is_the_same_bits_for_the_same_seed(folder: Callable[[str], Path]) -> None:
    torch.rand(3)  # what was drawn before must not matter
    one, again, other = (load(folder("bert"), seed=seed).module.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"bert.pooler.dense.weight", "classifier.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_head_finds_all_classes_about_equally_likely(family: str, folder: Callable[[str], Path]) -> None:
    chances = logits(load(folder(family)), "one", "and another text").softmax(-1)
    assert (chances - 1 / 3).abs().max() < 0.02
    assert (chances - 1 / 3).abs().max() > 0.0, "an output layer of zeros would leave the rest without a gradient"


def test_a_head_in_the_files_is_kept_for_its_own_labels_alone(folder: Callable[[str], Path], tmp_path: Path) -> None:
    trained = load(folder("distilbert"), seed=7)
    trained.module.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    weight = trained.module.classifier.weight
    assert torch.equal(load(tmp_path).module.classifier.weight, weight)
    other_order = load(tmp_path, ["good", "bad", "so so"]).module
    assert not torch.equal(other_order.classifier.weight, weight)
    assert torch.equal(other_order.pre_classifier.weight, trained.module.pre_classifier.weight)
    two = load(tmp_path, ["no", "yes"])
    assert two.module.classifier.weight.shape == (2, 32)
    assert two.head == HEADS["distilbert"]


def test_segment_ids_reach_the_models_that_have_an_embedding_for_them(folder: Callable[[str], Path]) -> None:
    base = louder(load(folder("bert")))
    batch = batch_of(base, ("first", "second"))
    assert batch.token_types[0].tolist() == [0] * 7 + [1] * 7
    with_types = class_logits(base.module, batch)
    batch.token_types.zero_()
    assert (class_logits(base.module, batch) - with_types).abs().max() > 1e-4
    for family in ("roberta", "llama"):
        assert torch.isfinite(logits(load(folder(family)), ("first", "second"))).all()


def test_rows_may_be_as_long_as_the_model_has_positions(folder: Callable[[str], Path]) -> None:
    found = {family: longest_row(load(folder(family)).module) for family in ("bert", "roberta", "llama")}
    assert found == {"bert": 64, "roberta": 63, "llama": 64}  # RoBERTa's positions begin behind its padding's
    base = load(folder("roberta"))
    rows = read([{"text": "x" * 200}], format="labelled")
    dataset = render_labelled(rows, base.tokenizer, base.labels, max_length=63)
    assert torch.isfinite(class_logits(base.module, collate_labelled(dataset, [0], 0))).all()


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused_as_a_language_model_and_told_what_it_is_for(
    family: str, folder: Callable[[str], Path]
) -> None:
    if family in ("bert", "roberta"):
        pytest.skip("transformers has causal models of this type")
    with pytest.raises(ModelError, match="not a causal language model") as caught:
        load_base(folder(family))
    assert "task: classification" in str(caught.value.fix)


def test_a_tensor_of_the_body_that_is_missing_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for path in folder("bert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor fills: bert\.encoder\.layer\.1\.attention\.self\.query\.weight"):
        load(tmp_path)


def test_a_model_without_a_padding_token_or_a_classifier_is_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, framed=False)
    language_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "eos_token"}))
    with pytest.raises(ModelError, match="no padding token and no eos token"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="no classifier on a model of type 'vit'"):
        load(tmp_path)


def test_a_base_in_codes_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="cannot be in codes"):
        load_base(folder("llama"), labels=LABELS, quantize="nf4", device="cpu")


def test_a_classifier_in_memory_is_told_where_it_is_measured(folder: Callable[[str], Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UsageError, match="is a classifier: it writes no answers"):
        evaluate(load(folder("bert")), rows, metrics=["exact_match"])
