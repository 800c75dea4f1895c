"""New tokens: what is old keeps its bits, only the new rows are trained, and they travel with the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter
from veneer.errors import AdapterError, ModelError, UsageError
from veneer.models import Base, load_base
from veneer.models.vocabulary import with_new_rows
from veneer.run import load_model
from veneer.ship import merge_model

NEW = ["<price>", "<sku>"]
IDS = torch.tensor([[20, 31, 300, 44, 301, 300, 25]])
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, the same sums in another order


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, make_tiny_base: Callable[..., Path]) -> Path:
    """A tiny base of 300 tokens, its head tied to the embedding or not."""
    return make_tiny_base(tie_word_embeddings=request.param)


def load(folder: Path, **options: Any) -> Base:
    return load_base(folder, dtype="float32", device="cpu", **options)


def logits(module: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(ids).logits
    return result


def trained(base: Base, tokens: list[str] = NEW) -> AdaptedModel:
    """``base`` with new tokens and an adapter whose every tensor has been moved."""
    model = attach(base, LoraConfig(r=4, trainable_token_indices=veneer.add_tokens(base, tokens)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_old_tokens_keep_their_logits_bit_for_bit(folder: Path, quantize: str | None) -> None:
    base, old = load(folder, quantize=quantize), torch.arange(20, 40)[None]
    before = logits(base.module, old)
    state = torch.get_rng_state()
    veneer.add_tokens(base, NEW)
    assert torch.equal(logits(base.module, old)[..., :300], before)
    assert base.module.get_input_embeddings().weight.shape[0] == base.module.config.vocab_size == 302
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


def test_a_new_row_is_the_mean_of_the_old_ones_in_embedding_and_head(folder: Path) -> None:
    base = load(folder)
    veneer.add_tokens(base, NEW)
    for part in (base.module.get_input_embeddings(), base.module.get_output_embeddings()):
        mean = part.weight[:300].mean(0)
        assert torch.equal(part.weight[300], mean)
        assert torch.equal(part.weight[301], mean)


def test_the_tokenizer_reads_and_writes_the_new_tokens_as_they_stand(folder: Path) -> None:
    base = load(folder)
    veneer.add_tokens(base, NEW)
    assert base.added_tokens == {"<price>": 300, "<sku>": 301}
    ids = base.tokenizer.encode("a <price> of<sku>", add_special_tokens=False)
    assert ids.count(300) == ids.count(301) == 1
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "a <price> of<sku>"


def test_tokens_may_be_added_in_two_steps(folder: Path) -> None:
    base, other = load(folder), load(folder)
    veneer.add_tokens(base, NEW)
    veneer.add_tokens(other, NEW[:1])
    rows = veneer.add_tokens(other, NEW[1:])
    assert other.added_tokens == base.added_tokens
    assert (rows if isinstance(rows, list) else rows["lm_head"]) == [300, 301]


def test_only_the_new_rows_are_trained_and_both_matrices_of_an_untied_base(folder: Path) -> None:
    base = load(folder)
    tied = base.module.get_output_embeddings().weight is base.module.get_input_embeddings().weight
    model = trained(base)
    rows = {key: p.shape for key, p in model.named_parameters() if "trainable_tokens" in key}
    assert list(rows.values()) == [(2, 32)] * (1 if tied else 2)
    out = base.module(IDS).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if key in rows)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_adapter_brings_its_tokens_to_the_untouched_base(folder: Path, quantize: str | None, tmp_path: Path) -> None:
    model = trained(load(folder, quantize=quantize))
    model.save(tmp_path / "a")
    record = json.loads((tmp_path / "a" / "veneer.json").read_text())
    assert record["added_tokens"] == {"<price>": 300, "<sku>": 301}
    base = load(folder, quantize=quantize)
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(logits(base.module), logits(model.module))
    assert base.tokenizer.convert_tokens_to_ids("<sku>") == 301
    again.save(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    loaded = load_model(tmp_path / "a", dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.module), logits(model.module))


def test_a_base_that_has_the_tokens_already_is_taken_and_one_with_others_in_their_place_is_not(
    folder: Path, tmp_path: Path
) -> None:
    model = trained(load(folder))
    model.save(tmp_path / "a")
    base = load(folder)
    veneer.add_tokens(base, NEW)
    assert torch.equal(logits(load_adapter(base, tmp_path / "a").module), logits(model.module))
    other = load(folder)
    veneer.add_tokens(other, ["<other>"])
    with pytest.raises(AdapterError, match="was trained with '<price>' as token 300, and here it is 301"):
        load_adapter(other, tmp_path / "a")
    adapted = attach(load(folder), LoraConfig(r=4))
    with pytest.raises(AdapterError, match="brings 2 new tokens, and the base has adapters already"):
        load_adapter(adapted, tmp_path / "a", name="second")


def test_a_merged_model_has_the_rows_the_tokenizer_and_the_size(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = trained(load(folder))
    expected = logits(model.module)
    model.save(tmp_path / "a")
    merge_model(tmp_path / "a", tmp_path / "merged", dtype="float32", device="cpu")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert reopened.config.vocab_size == reopened.get_input_embeddings().weight.shape[0] == 302
    torch.testing.assert_close(logits(reopened), expected, **TOLERANCE)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("<sku>", add_special_tokens=False) == [301]
    torch.testing.assert_close(logits(load(tmp_path / "merged").module), expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peft_reads_the_rows_on_a_base_resized_by_the_adapters_tokenizer_and_its_file_is_read(
    folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = trained(load(folder))
    model.save(tmp_path / "a")
    resized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    resized.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "a")))
    theirs = peft.PeftModel.from_pretrained(resized, str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model.module), **TOLERANCE)
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    base = load(folder)
    veneer.add_tokens(base, NEW)
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "b").module), logits(model.module), **TOLERANCE)


def test_spare_rows_of_a_padded_vocabulary_are_used_before_it_grows(
    make_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = load(make_tiny_base(vocab_size=304))
    before = base.module.get_input_embeddings().weight
    kept = before.clone()
    model = trained(base)
    after = base.module.get_input_embeddings().weight
    assert torch.equal(after, kept)
    assert base.module.config.vocab_size == 304
    model.save(tmp_path / "a")
    again = load_adapter(load(Path(base.spec)), tmp_path / "a")
    assert torch.equal(logits(again.module), logits(model.module))


@pytest.mark.parametrize(
    ("tokens", "what"),
    [
        ([""], "cannot be a new token"),
        (["  "], "cannot be a new token"),
        (["<a>", "<a>"], "cannot be a new token"),
        (["<|im_end|>"], r"'<\|im_end\|>' is a token already, with the id 2"),
    ],
)
def test_a_token_that_is_none_or_not_new_is_refused_and_nothing_changes(
    tiny_base: Path, tokens: list[str], what: str
) -> None:
    base = load(tiny_base)
    with pytest.raises(UsageError, match=what):
        veneer.add_tokens(base, tokens)
    assert len(base.tokenizer) == base.module.config.vocab_size == 300


def test_tokens_are_not_added_under_an_adapter(tiny_base: Path) -> None:
    base = load(tiny_base)
    attach(base, LoraConfig(r=4))
    with pytest.raises(ModelError, match="cannot be added under an adapter"):
        veneer.add_tokens(base, NEW)


def test_new_rows_join_those_that_are_trained_anyway(folder: Path) -> None:
    base = load(folder)
    new = veneer.add_tokens(base, NEW)
    tied = isinstance(new, list)
    both = with_new_rows(base, [5, 300], ())
    assert both == ([5, 300, 301] if tied else {"model.embed_tokens": [5, 300, 301], "lm_head": [300, 301]})
    named = with_new_rows(base, {"embed_tokens": [7]}, ())
    assert named == {"embed_tokens": [7, 300, 301]} | ({} if tied else {"lm_head": [300, 301]})
    assert with_new_rows(base, None, ["embed_tokens", "lm_head"]) is None
