"""Saving and reopening: the same bytes back, bitsandbytes both ways, a clear word for what is damaged or foreign."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_folders import codes_of, some_ids, write_model
from safetensors.torch import load_file, save_file

from veneer.adapters import LoraConfig, attach
from veneer.errors import ModelError, UsageError
from veneer.models import Base, load_base, load_tokenizer, save_base
from veneer.quant import QuantConfig

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "Llama", tiny_base)


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NF4 base, saved. Read only."""
    return save_base(load(llama, quantize="nf4"), tmp_path_factory.mktemp("saved") / "base")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def load(folder: Path, **options: Any) -> Base:
    return load_base(folder, **{"dtype": "float32", "device": "cpu", **options})


def opened_by_bitsandbytes(folder: Path, **options: Any) -> Any:
    # In training mode: in evaluation its CPU code packs weights anew, and rounds the scales on the way.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()


def same(one: Base, other: Base) -> bool:
    mine, its = one.module.state_dict(), other.module.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


def refusal(folder: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    assert caught.value.fix, "every error says how to mend it"
    return caught.value


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of the weight file; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "Gemma2", "Mixtral", "GptOss"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8", "int4"])
def test_a_saved_base_is_read_back_bit_for_bit(family: str, scheme: str, tiny_base: Path, tmp_path: Path) -> None:
    base = load(write_model(tmp_path / "plain", family, tiny_base), quantize=scheme)
    again = load(save_base(base, tmp_path / "saved"))
    assert same(base, again)
    assert again.quantization == base.quantization
    assert torch.equal(base.module(some_ids()).logits, again.module(some_ids()).logits)
    assert again.module.generation_config.to_dict() == base.module.generation_config.to_dict()
    assert again.tokenizer.get_vocab() == base.tokenizer.get_vocab()


@pytest.mark.parametrize("config", [QuantConfig(block_size=128), QuantConfig("fp4", 32, False)], ids=str)
def test_block_size_and_skip_list_are_in_the_file(config: QuantConfig, llama: Path, tmp_path: Path) -> None:
    base = load(llama, quantize=config, skip=["o_proj", "layers.1.mlp.up_proj"])
    folder = save_base(base, tmp_path / "saved")
    again = load(folder)
    assert same(base, again)
    assert again.quantization == config
    names = json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.1.mlp.up_proj" in names
    assert "lm_head" in names


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_transformers_opens_a_saved_base_with_bitsandbytes(
    family: str, scheme: str, tiny_base: Path, tmp_path: Path
) -> None:
    skip = ["c_proj"] if family == "GPT2" else ["layers.0.mlp.down_proj"]
    base = load(write_model(tmp_path / "plain", family, tiny_base), quantize=scheme, skip=skip)
    theirs = opened_by_bitsandbytes(save_base(base, tmp_path / "saved", max_shard_size=60_000))
    kind = bitsandbytes.nn.Linear8bitLt if scheme == "int8" else bitsandbytes.nn.Linear4bit
    assert {name for name, part in theirs.named_modules() if isinstance(part, kind)} == {
        name.removesuffix(".weight") for name in codes_of(base)
    }
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_ids()).logits, base.module(some_ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_what_transformers_saved_with_bitsandbytes_opens_here_bit_for_bit(
    family: str, scheme: str, double_quant: bool, tiny_base: Path, tmp_path: Path
) -> None:
    plain = write_model(tmp_path / "plain", family, tiny_base)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if scheme != "int8":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme, "bnb_4bit_use_double_quant": double_quant}
    theirs = opened_by_bitsandbytes(plain, quantization_config=transformers.BitsAndBytesConfig(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    load_tokenizer(plain).save_pretrained(str(tmp_path / "theirs"))
    ours = load(tmp_path / "theirs")
    assert ours.quantization == QuantConfig(scheme, double_quant=double_quant or scheme == "int8")
    assert ours.quantized.tensors == (8 if family == "GPT2" else 14)
    assert same(ours, load(plain, quantize=ours.quantization))
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_ids()).logits, ours.module(some_ids()).logits, rtol=1e-4, atol=1e-4)


def test_experts_in_codes_are_refused_by_transformers_and_not_filled_with_random_numbers(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load(write_model(tmp_path / "plain", "Mixtral", tiny_base), quantize="nf4")
    folder = save_base(base, tmp_path / "saved")
    assert "opens here alone" in caplog.text
    with pytest.raises(ValueError, match=r"veneer\.load_base opens"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_in_codes_is_decoded(llama: Path, tmp_path: Path) -> None:
    """Some repositories quantise it; whoever computes the loss reads its weight."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["no_such_module"]
    )
    theirs = opened_by_bitsandbytes(llama, quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    load_tokenizer(llama).save_pretrained(str(tmp_path / "theirs"))
    ours = load(tmp_path / "theirs")
    expected = bitsandbytes.functional.dequantize_4bit(theirs.lm_head.weight.data, theirs.lm_head.weight.quant_state)
    assert torch.equal(ours.module.lm_head.weight, expected)


def test_asking_for_the_scheme_that_is_there_is_no_conflict_and_any_other_is(saved: Path) -> None:
    assert load(saved, quantize="nf4").quantization == QuantConfig("nf4")
    error = refusal(saved, quantize="int8")
    assert error.what == "the weights are in nf4 already and cannot be put into int8"
    assert "leave quantize out or say nf4" in str(error.fix)
    error = refusal(saved, quantize="nf4", skip=["down_proj"])
    assert error.what == "the weights are in codes already: none of them can keep 16 bits that are gone"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "af4"),
    ],
)
def test_weights_in_other_codes_are_refused_by_name(settings: dict[str, Any], name: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for quantize in (None, "nf4"):
        error = refusal(folder, quantize=quantize)
        assert error.what == f"the weights are quantised already ({name}), in a format that is not read here"
        assert "16-bit model" in str(error.fix)


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (".absmax", "a part of the 4-bit weight is missing"),
        (".quant_state.bitsandbytes__nf4", "the weight is not quantised"),
        ("", "a part of the 4-bit weight is missing"),
    ],
)
def test_a_lost_part_of_a_weight_is_named(part: str, message: str, folder: Path) -> None:
    rewrite(folder, **{WEIGHT + part: None})
    error = refusal(folder)
    assert message in error.what
    assert WEIGHT in str(error.where)


def test_codes_that_are_cut_short_are_named(folder: Path) -> None:
    rewrite(folder, **{WEIGHT: load_file(folder / "model.safetensors")[WEIGHT][:-32].clone()})
    error = refusal(folder)
    assert "has 4096 bytes of codes, the file 4064" in error.what
    assert WEIGHT in str(error.where)


def test_codes_without_scales_are_never_taken_for_numbers(folder: Path, llama: Path) -> None:
    parts = [name for name in load_file(folder / "model.safetensors") if name.startswith(f"{WEIGHT}.")]
    rewrite(folder, **dict.fromkeys(parts))
    error = refusal(folder)
    assert (error.what, WEIGHT in str(error.where)) == (
        "the weight is in codes, and the file has no scales for them",
        True,
    )
    # Eight bits have the weight's own shape: it would be read as numbers from -127 to 127.
    codes = torch.ones(128, 64, dtype=torch.int8)
    other = Path(shutil.copytree(llama, folder.parent / "other"))
    rewrite(other, **{WEIGHT: codes})
    for quantize in (None, "nf4"):
        assert refusal(other, quantize=quantize).what == error.what


def test_codes_that_the_configuration_does_not_know_of_are_named(folder: Path, llama: Path) -> None:
    shutil.copy(llama / "config.json", folder / "config.json")
    for quantize in (None, "nf4"):
        error = refusal(folder, quantize=quantize)
        assert error.what == "the weight is in codes, and config.json does not say so"
        assert "_proj.weight" in str(error.where)


def test_codes_of_another_model_are_refused_by_their_shape(folder: Path, tiny_base: Path) -> None:
    narrow = load(write_model(folder.parent / "narrow", "Llama", tiny_base, intermediate_size=64), quantize="nf4")
    other = load_file(save_base(narrow, folder.parent / "saved") / "model.safetensors")
    rewrite(folder, **{name: tensor for name, tensor in other.items() if name.startswith(WEIGHT)})
    assert f"{WEIGHT}: (64, 64) in the file, (128, 64) in the model" in refusal(folder).what


def test_a_folder_that_only_says_it_is_quantised_is_refused(llama: Path, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "base"))
    shutil.copy(saved / "config.json", folder / "config.json")
    assert "no tensor of the files is" in refusal(folder).what


def test_one_weight_in_16_bits_among_codes_is_read_as_it_is(folder: Path, llama: Path) -> None:
    plain = load_file(llama / "model.safetensors")[WEIGHT]
    parts = [name for name in load_file(folder / "model.safetensors") if name.startswith(f"{WEIGHT}.")]
    rewrite(folder, **{**dict.fromkeys(parts), WEIGHT: plain})
    base = load(folder)
    assert base.quantized.tensors == 13
    assert torch.equal(base.module.get_parameter(WEIGHT), plain.float())


def test_a_taken_folder_and_a_base_without_codes_are_refused(llama: Path, tmp_path: Path) -> None:
    base = load(llama, quantize="nf4")
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="the output is taken"):
        save_base(base, tmp_path)
    with pytest.raises(UsageError, match="weights are not in codes"):
        save_base(load(llama), tmp_path / "new")
    attach(base, LoraConfig(r=2))
    with pytest.raises(UsageError, match="has an adapter attached"):
        save_base(base, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_save_leaves_nothing_behind(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("veneer.models.quantized_save.save_file", fail)
    with pytest.raises(Exception, match="the disk is full"):
        save_base(load(llama, quantize="nf4"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
