"""Models of images and text, trained on rows of text: the language model is adapted, the vision tower stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Watcher

from veneer.errors import ModelError, TrainError
from veneer.generate import generate
from veneer.models import load_base, load_tokenizer, save_base
from veneer.run import load_model
from veneer.ship import merge_model
from veneer.train import train_recipe
from vision import IMAGE, MODELS, PROCESSOR, opened, write_vision

peft = pytest.importorskip("peft")
IDS = torch.arange(20, 44).view(2, 12)
# What the processor of SmolVLM is given: content is a list of parts, and a text by itself is read as nothing.
PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def write(tiny_base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``write("Llava")``: the folder of a tiny random model."""
    return lambda name: write_vision(name, tmp_path / name, load_tokenizer(tiny_base))


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_vision_language_model_trains_on_text_and_its_adapter_is_pefts(
    name: str, write: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder, watcher = write(name), Watcher()
    settings = {"base": str(folder), "train": {"max_steps": 6}, "eval": {"samples": 2, "metrics": ["exact_match"]}}
    result = train_recipe(recipe(**settings), progress=watcher)
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert not any("padded side by side" in text for _, text in watcher.messages), "rows are packed"
    trained = logits(result.model.module)
    assert torch.equal(logits(load_model(result.path).module), trained)

    base = opened(folder)
    before = logits(base)
    by_peft = peft.PeftModel.from_pretrained(base, str(result.path / "adapter")).eval()
    torch.testing.assert_close(logits(by_peft), trained, rtol=1e-4, atol=1e-5)
    assert float((trained - before).abs().max()) > 0.1
    keys = {key for key, _ in result.model.named_parameters()}
    assert all(".language_model." in key or ".text_model." in key for key in keys)

    merged = tmp_path / "merged"
    merge_model(result.path, merged)
    whole, plain = opened(merged), opened(folder)
    torch.testing.assert_close(logits(whole), trained, rtol=1e-4, atol=1e-5)
    tower, expected = whole.state_dict(), plain.state_dict()
    kept = [key for key in expected if "vision" in key or "visual" in key]
    assert kept
    assert all(torch.equal(tower[key], expected[key]) for key in kept)
    assert json.loads((merged / "preprocessor_config.json").read_text()) == PROCESSOR


def test_layers_that_rows_of_text_pass_by_are_named_before_the_run_and_can_be_left_out(
    write: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = str(write("Mllama"))
    with pytest.raises(TrainError, match="14 of 28 adapter tensors take no part in the loss") as caught:
        train_recipe(recipe(base=folder))
    assert not (tmp_path / "run").exists()
    named = str(caught.value.fix).partition("exclude_modules: [")[2].rstrip("]").split(", ")
    assert "cross_attn.q_proj" in named
    result = train_recipe(recipe(base=folder, adapter={"exclude_modules": named}, train={"max_steps": 3}))
    assert len(result.model.parameters()) == 14


@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL", "SmolVLM"])
def test_what_is_generated_is_transformers_own_greedy_answer(name: str, write: Callable[[str], Path]) -> None:
    folder = write(name)
    base, plain = load_base(folder, dtype="float32", device="cpu"), opened(folder)
    prompts = [[5, 77, 41, 200, 8, 9, 30], [12, 99, 31]]
    for prompt, found in zip(prompts, generate(base, prompts, max_new_tokens=8, stop_token_ids=[])):
        ids = torch.tensor([prompt])
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat((ids, plain(input_ids=ids).logits[:, -1:].argmax(-1)), 1)
        assert found.token_ids == ids[0, len(prompt) :].tolist()


@torch.no_grad()
def test_images_are_read_as_before(write: Callable[[str], Path]) -> None:
    folder = write("Llava")
    ids = torch.tensor([[20, IMAGE, IMAGE, IMAGE, IMAGE, 30, 31]])
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    ours = load_base(folder, dtype="float32", device="cpu").module(**given).logits
    torch.testing.assert_close(ours, opened(folder)(**given).logits, rtol=1e-4, atol=1e-5)


def test_a_vision_language_model_in_codes_keeps_its_processor(write: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(write("SmolVLM"), dtype="float32", device="cpu", quantize="nf4")
    saved = save_base(base, tmp_path / "codes")
    assert json.loads((saved / "preprocessor_config.json").read_text()) == PROCESSOR
    assert torch.equal(logits(load_base(saved, dtype="float32", device="cpu").module), logits(base.module))


def test_a_template_that_reads_lists_of_parts_alone_gives_the_same_run(
    write: Callable[[str], Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder, losses = write("SmolVLM"), []
    for number, template in enumerate((None, PARTS)):
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        made = recipe(base=str(folder), train={"max_steps": 2}, output_dir=str(tmp_path / f"run{number}"))
        losses.append(train_recipe(made).metrics)
    assert losses[0] == losses[1]


def test_a_template_that_the_processor_alone_has_is_used(write: Callable[[str], Path]) -> None:
    folder = write("SmolVLM")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}), encoding="utf-8")
    assert load_tokenizer(folder).chat_template == PARTS


def test_a_model_that_reads_with_one_network_and_writes_with_another_is_refused(write: Callable[[str], Path]) -> None:
    folder = write("Llava")
    (folder / "config.json").write_text(json.dumps({"model_type": "florence2"}), encoding="utf-8")
    with pytest.raises(ModelError, match="'florence2' reads with one network and writes with another") as caught:
        load_base(folder)
    assert "Qwen2-VL" in str(caught.value.fix)
