"""A run over codes merged in both ways: each gives what it promises, and the drift told is the drift there is."""

from __future__ import annotations

import errno
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, read_adapter
from veneer.errors import StorageError, UsageError
from veneer.evaluate import evaluate
from veneer.models import load_base
from veneer.models.quantized_save import save_base
from veneer.quant import QuantConfig
from veneer.run import held_out_rows
from veneer.ship import drift as drift_module
from veneer.ship import merge as merge_module
from veneer.ship import merge_model

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 290 + 4


def unmerged(base: Path, adapter: Path, quantization: str | QuantConfig | None = "nf4") -> AdaptedModel:
    return load_adapter(load_base(base, dtype="float32", device="cpu", quantize=quantization), adapter)


@torch.no_grad()
def answers(module: Any) -> Tensor:
    logits: Tensor = module(IDS).logits
    return logits


def opened(folder: Path) -> Any:
    """The folder as any user of transformers opens it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "veneer.json").read_text())
    return found["merged"]  # type: ignore[no-any-return]


def test_onto_the_dequantised_weights_the_merged_model_is_the_run(
    qlora_run: Path, wide_base: Path, tmp_path: Path
) -> None:
    merged = merge_model(qlora_run, tmp_path / "m", onto="dequantized")
    assert (merged.onto, merged.report) == ("dequantized", merged.drifts["dequantized"])
    # float32 throughout: the sum W + s B A is rounded where two products were
    torch.testing.assert_close(
        answers(opened(tmp_path / "m")), answers(unmerged(wide_base, qlora_run / "adapter").module), rtol=0, atol=2e-5
    )
    assert merged.report.max_abs_logit_difference < 2e-5
    assert 0 <= merged.report.mean_kl < 1e-10
    assert merged.report.top1_agreement == 1.0
    assert merged.report.perplexity == pytest.approx(merged.report.perplexity_before, rel=1e-6)
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert written.keys() == load_file(wide_base / "model.safetensors").keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_onto_the_original_weights_the_adapter_is_added_to_them(
    qlora_run: Path, wide_base: Path, tmp_path: Path
) -> None:
    merge_model(qlora_run, tmp_path / "m", onto="original")
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", wide_base))
    config, factors = read_adapter(qlora_run / "adapter")
    changed = 0
    for name, weight in original.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in factors:
            update = factors[f"{path}.lora_B.weight"].double() @ factors[f"{path}.lora_A.weight"].double()
            weight = (weight.double() + config.lora_alpha / config.r * update).float()
            changed += 1
        torch.testing.assert_close(written[name], weight, rtol=1e-6, atol=1e-7)
    assert changed == 14


def test_what_was_trained_is_the_default_and_both_drifts_are_told(qlora_run: Path, tmp_path: Path) -> None:
    merged = merge_model(qlora_run, tmp_path / "m")
    assert merged.onto == "dequantized"
    assert merged.report == merged.drifts["dequantized"]
    near, far = merged.drifts["dequantized"], merged.drifts["original"]
    # What sets them apart is the error of the codes, which is no rounding.
    assert near.mean_kl < 1e-10 < 1e-4 < far.mean_kl
    assert near.max_abs_logit_difference < 1e-4 < 1e-2 < far.max_abs_logit_difference
    assert far.top1_agreement <= near.top1_agreement
    said = record(tmp_path / "m")
    assert said["onto"] == "dequantized"
    assert said["quantization"] == {"scheme": "nf4", "block_size": 64, "double_quant": True, "skip": []}
    assert said["drift"] == said["drifts"]["dequantized"]
    assert said["drifts"].keys() == {"original", "dequantized"}
    assert said["drifts"]["dequantized"]["mean_kl"] == near.mean_kl
    assert said["measured_on"] == "the answers of the run's 6 held-out rows"
    assert json.loads(json.dumps(merged.to_dict()))["drifts"] == said["drifts"]


def test_both_ways_are_measured_alike_whichever_is_written(qlora_run: Path, tmp_path: Path) -> None:
    """What was read back from the disk and what was in memory are the same model."""
    first = merge_model(qlora_run, tmp_path / "a", onto="original").drifts
    second = merge_model(qlora_run, tmp_path / "b", onto="dequantized").drifts
    for way in first:
        assert first[way].mean_kl == pytest.approx(second[way].mean_kl, rel=1e-6, abs=1e-13)
        assert first[way].perplexity == pytest.approx(second[way].perplexity, rel=1e-6)


def test_the_perplexities_are_those_that_eval_prints(
    qlora_run: Path, wide_base: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    merged = merge_model(qlora_run, tmp_path / "m")
    rows = held_out_rows(merge_module.open_run(qlora_run).recipe.data)
    for model, expected in (
        (unmerged(wide_base, qlora_run / "adapter"), merged.report.perplexity_before),
        (load_base(tmp_path / "m", dtype="float32"), merged.report.perplexity),
    ):
        found = evaluate(model, rows, metrics=["perplexity"]).metrics["perplexity"].value
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_kl_is_that_of_the_models_on_the_positions_before_the_answers(
    qlora_run: Path, wide_base: Path, tmp_path: Path
) -> None:
    merged = merge_model(qlora_run, tmp_path / "m")
    run = merge_module.open_run(qlora_run)
    adapted = unmerged(wide_base, qlora_run / "adapter")
    probe = drift_module.probe_of(adapted.base, run)  # type: ignore[arg-type]  # a Base
    plain, total, count = opened(tmp_path / "m"), 0.0, 0
    for row in probe.rows:
        text = adapted.base.tokenizer.decode(row.targets)  # type: ignore[union-attr]  # a Base
        assert text.endswith("<|im_end|>")
        with torch.no_grad():
            p, q = (m(row.input_ids).logits[0, row.positions].double().log_softmax(-1) for m in (adapted.module, plain))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    assert merged.report.positions == count
    assert merged.report.mean_kl == pytest.approx(total / count, rel=1e-4)


def test_the_codes_are_gone_from_memory_before_the_original_weights_are_loaded(
    qlora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = merge_module.load_base

    def watched(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(module() is not None for module in seen))
        base = load(*arguments, **options)
        seen.append(weakref.ref(base.module))
        return base

    for place in ("veneer.models.load_base", "veneer.models.load.load_base"):
        monkeypatch.setattr(place, watched)
    monkeypatch.setattr(merge_module, "load_base", watched)
    gc.collect()
    merge_model(qlora_run, tmp_path / "m", onto="original")
    # The codes; the original; the folder, read back while the original is still there.
    assert alive[-3:] == [0, 0, 1]


def test_no_more_positions_are_compared_than_memory_is_set_aside_for(
    qlora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_module, "POSITIONS", 7)
    few = merge_model(qlora_run, tmp_path / "few")
    assert few.report.positions == 7
    assert "of the run's 6 held-out rows" in few.measured_on
    assert not few.measured_on.startswith("the answers of the run's")
    monkeypatch.setattr(drift_module, "BYTES", 3 * 4 * 300)
    assert merge_model(qlora_run, tmp_path / "fewer").report.positions == 3


def copy_of(run: Path, folder: Path, change: Callable[[str], str]) -> Path:
    shutil.copytree(run, folder)
    recipe = folder / "recipe.yaml"
    changed = change(recipe.read_text())
    assert changed != recipe.read_text()
    recipe.write_text(changed)
    return folder


def test_without_its_data_a_run_is_measured_on_built_in_texts_and_says_why(
    qlora_run: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    moved = copy_of(
        qlora_run, tmp_path / "run", lambda text: text.replace(str(tiny_rows), str(tmp_path / "gone.jsonl"))
    )
    merged = merge_model(moved, tmp_path / "m")
    assert merged.measured_on.startswith("6 built-in texts (the run's held-out rows cannot be used: ")
    assert "gone.jsonl" in merged.measured_on
    assert merged.report.perplexity is not None
    assert merged.drifts["dequantized"].mean_kl < merged.drifts["original"].mean_kl


def test_data_that_have_changed_since_the_run_are_said_to_have(
    qlora_run: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(tiny_rows.read_text().replace("eleven", "elf").replace("two", "zwei").replace("spell", "say"))
    moved = copy_of(qlora_run, tmp_path / "run", lambda text: text.replace(str(tiny_rows), str(other)))
    assert "have changed since the run" in merge_model(moved, tmp_path / "m").measured_on


def test_an_adapter_folder_is_measured_on_built_in_texts(qlora_run: Path, tmp_path: Path) -> None:
    merged = merge_model(qlora_run / "adapter", tmp_path / "m", dtype="float32")
    assert merged.measured_on == "6 built-in texts"
    assert merged.drifts["dequantized"].mean_kl < 1e-10 < merged.drifts["original"].mean_kl


def test_a_run_over_plain_weights_has_one_way_and_its_perplexity(lora_run: Path, tmp_path: Path) -> None:
    for onto in (None, "original"):
        merged = merge_model(lora_run, tmp_path / str(onto), onto=onto)
        assert merged.drifts == {"original": merged.report}
        assert merged.report.max_abs_logit_difference < 1e-4
        assert merged.report.perplexity == pytest.approx(merged.report.perplexity_before, rel=1e-5)
        assert record(tmp_path / str(onto))["quantization"] is None


def test_a_way_that_there_is_not_is_refused_before_anything_is_written(
    lora_run: Path, qlora_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="over weights that are not quantised") as caught:
        merge_model(lora_run, tmp_path / "m", onto="dequantized")
    assert "leave --onto out" in str(caught.value)
    with pytest.raises(UsageError, match="'dequantised'") as caught:
        merge_model(qlora_run, tmp_path / "m", onto="dequantised")
    assert "'dequantized'" in str(caught.value.fix)
    assert list(tmp_path.iterdir()) == []


def test_of_a_base_that_is_stored_in_codes_only_they_can_be_merged_onto(wide_base: Path, tmp_path: Path) -> None:
    saved = save_base(load_base(wide_base, dtype="float32", device="cpu", quantize="nf4"), tmp_path / "coded")
    adapted = attach(load_base(saved, dtype="float32", device="cpu"), LoraConfig(r=4, init_lora_weights=False), seed=0)
    adapter = adapted.save(tmp_path / "adapter")
    expected = answers(adapted.module)
    with pytest.raises(UsageError, match="holds its weights in codes") as caught:
        merge_model(adapter, tmp_path / "m", onto="original", dtype="float32")
    assert "--onto dequantized" in str(caught.value.fix)
    merged = merge_model(adapter, tmp_path / "m", dtype="float32")
    assert merged.onto == "dequantized"
    assert merged.drifts.keys() == {"dequantized"}
    # A random update is larger than a trained one, and so is its rounding.
    torch.testing.assert_close(answers(opened(tmp_path / "m")), expected, rtol=0, atol=5e-4)
    # Its original is another base to the adapter, and can be named.
    named = merge_model(
        adapter, tmp_path / "o", onto="original", dtype="float32", base=str(wide_base), allow_base_mismatch=True
    )
    assert named.drifts.keys() == {"original", "dequantized"}


@pytest.mark.parametrize("onto", ["original", "dequantized"])
@pytest.mark.parametrize("failing", ["drift", "write_json"])
def test_a_merge_that_fails_leaves_nothing_behind(
    onto: str, failing: str, qlora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge_module, failing, full)
    with pytest.raises(StorageError, match="the disk is full"):
        merge_model(qlora_run, tmp_path / "m", onto=onto)
    assert list(tmp_path.iterdir()) == []


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_embd=64, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1,
            initializer_range=0.1,
        )
    )  # fmt: skip


def moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=300, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=128, initializer_range=0.1, pad_token_id=None, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, moe])
def test_codes_of_other_forms_are_written_as_the_model_has_them(
    make: Callable[[], Any], wide_base: Path, tmp_path: Path
) -> None:
    """GPT-2's linears are stored the other way round; experts are stacks, and their files hold them one by one."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    shutil.copytree(wide_base, folder)
    (folder / "model.safetensors").unlink()
    make().save_pretrained(folder)
    adapted = attach(
        load_base(folder, dtype="float32", device="cpu", quantize="nf4"),
        LoraConfig(r=4, init_lora_weights=False),
        seed=0,
    )
    adapter = adapted.save(tmp_path / "adapter")
    expected = answers(adapted.module)
    merged = merge_model(adapter, tmp_path / "m", onto="dequantized", dtype="float32")
    assert merged.drifts["original"].mean_kl > 1e-5 > 1e-9 > merged.report.mean_kl
    torch.testing.assert_close(answers(opened(tmp_path / "m")), expected, rtol=0, atol=5e-4)
    written, original = (load_file(f / "model.safetensors") for f in (tmp_path / "m", folder))
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in original.items()}


def test_in_bfloat16_the_sum_is_rounded_once(wide_base: Path, tmp_path: Path) -> None:
    adapted = attach(
        load_base(wide_base, dtype="bfloat16", device="cpu", quantize="int8"), LoraConfig(r=4, lora_alpha=4), seed=0
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapter = adapted.save(tmp_path / "adapter")
    merge_model(adapter, tmp_path / "m", onto="dequantized", dtype="bfloat16")
    name = "model.layers.0.self_attn.q_proj"
    got = load_file(tmp_path / "m" / "model.safetensors")[f"{name}.weight"]
    layer: Any = adapted.module.get_submodule(name)
    factors = read_adapter(adapter)[1]
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    expected = (layer.base_layer.weight.dequantize().double() + b @ a).bfloat16()
    assert got.dtype == torch.bfloat16
    # float32 against double before the rounding: a value on the edge may fall to the other side
    assert (got != expected).float().mean() < 1e-2
