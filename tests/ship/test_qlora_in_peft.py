"""A QLoRA adapter is not Veneer's alone: PEFT over bitsandbytes' 4-bit base gives the same logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.run import load_model

IDS = torch.arange(3 * 48).view(3, 48) * 11 % 290 + 4


@pytest.fixture
def bitsandbytes_base(wide_base: Path) -> Any:
    """The base as transformers and bitsandbytes quantise it, on the CPU."""
    pytest.importorskip("bitsandbytes", reason="the other program's 4-bit base needs bitsandbytes")
    pytest.importorskip("peft", reason="the other program's adapters need PEFT")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        wide_base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    # In evaluation mode bitsandbytes' CPU layer computes in bfloat16 where the processor can, whatever was asked for;
    # in training mode in float32. There is no dropout that would tell the modes apart otherwise.
    assert model.config.attention_dropout == 0
    return model.train()


@torch.no_grad()
def logits(module: Any) -> Tensor:
    return module(IDS).logits.float()  # type: ignore[no-any-return]  # transformers' output


def test_peft_over_bitsandbytes_gives_the_logits_of_the_run(qlora_run: Path, bitsandbytes_base: Any) -> None:
    from peft import PeftModel

    ours: Any = load_model(qlora_run)
    assert ours.base.quantization is not None
    expected = logits(ours.module)
    with ours.disabled():
        bare = logits(ours.module)
    # The same codes stand for the same numbers; what is left is the order in which float32 is summed.
    torch.testing.assert_close(logits(bitsandbytes_base), bare, rtol=0, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about the base's name
        theirs = PeftModel.from_pretrained(bitsandbytes_base, qlora_run / "adapter").train()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-5)
    assert (expected - bare).abs().max() > 0.1  # the adapter does something


def test_peft_over_the_original_weights_gives_the_logits_of_the_merge_onto_them(
    qlora_run: Path, wide_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="the oracle of this test is PEFT")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from veneer.ship import merge_model

    merge_model(qlora_run, tmp_path / "m", onto="original")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, qlora_run / "adapter").eval()
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-4)
