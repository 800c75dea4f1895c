"""Experts in PEFT's file: its layout, its names by depth, and the same logits both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_experts import MODELS, TOLERANCE, adapt, randomise, slots_of
from tiny_models import MOE
from torch import Tensor

from veneer.adapters import LoraConfig, attach, load_adapter
from veneer.errors import AdapterError

peft = pytest.importorskip("peft")
# PEFT talks about base model names on its own account.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"experts": "all"},
    "one stack": {"experts": "none", "target_parameters": ["experts.down_proj"]},
    "some experts": {"experts": [1, 0]},
    "some layers": {"experts": {"model.layers.1.mlp.experts": [1]}},
    "with attention": {"experts": "all", "target_modules": "all-linear"},
    "rslora": {"experts": "all", "use_rslora": True},
    "patterns": {"experts": "all", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"1\..*gate_up_proj": 3}},
}
CASES = [(name, "all") for name in MODELS] + [("mixtral", case) for case in CONFIGS if case != "all"]
CONFIGS["patterns, with attention"] = CONFIGS["with attention"] | {
    "rank_pattern": {"experts.down_proj": 2},
    "alpha_pattern": {"gate_up_proj": 3},
}
CASES += [("qwen2-moe", "with attention"), ("qwen2-moe", "patterns, with attention")]
CASES += [("gpt-oss", "some experts"), ("qwen3-moe", "with attention")]


def loaded_by_peft(module: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT does not stop at a missing key, it warns: here that is a failure.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(module, str(folder)).eval()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_peft_reads_what_we_write_with_the_same_logits_and_back(
    name: str, case: str, ids: Tensor, run: Any, tmp_path: Path
) -> None:
    adapted = adapt(MODELS[name](), **CONFIGS[case])
    expected = run(adapted.module, ids)
    adapted.save(tmp_path / "ours")
    theirs = loaded_by_peft(MODELS[name](), tmp_path / "ours")
    torch.testing.assert_close(run(theirs, ids), expected, **TOLERANCE)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    for folder in ("ours", "theirs"):
        torch.testing.assert_close(
            run(load_adapter(MODELS[name](), tmp_path / folder).module, ids), expected, **TOLERANCE
        )


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["mlp.experts.down_proj", "experts.gate_up_proj"]])
def test_we_read_what_peft_makes_with_the_same_logits(
    name: str, parameters: list[str], ids: Tensor, run: Any, tmp_path: Path
) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "target_parameters": parameters}
    theirs = peft.get_peft_model(MOE[name](), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path))
    adapted = load_adapter(MOE[name](), tmp_path)
    torch.testing.assert_close(run(adapted.module, ids), run(theirs, ids), **TOLERANCE)
    assert len(slots_of(adapted)) == (1 if name == "deepseek-v3" else 2)  # its first layer is dense


def test_the_file_has_lora_a_expert_slowest_lora_b_expert_fastest_and_the_first_stack_deepest(tmp_path: Path) -> None:
    adapted = adapt(MOE["gpt-oss"](), r=3)
    adapted.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.experts."
    assert {key.removeprefix(prefix): tuple(t.shape) for key, t in tensors.items() if key.startswith(prefix)} == {
        "base_layer.lora_A.weight": (12, 32),  # 4 experts of rank 3
        "base_layer.lora_B.weight": (96, 12),
        "lora_A.weight": (12, 48),
        "lora_B.weight": (32, 12),
    }
    stacks = slots_of(adapted)["model.layers.0.mlp.experts"].stacks("default")
    for end, adapter in (("base_layer.", stacks["gate_up_proj"]), ("", stacks["down_proj"])):
        A, B = tensors[f"{prefix}{end}lora_A.weight"], tensors[f"{prefix}{end}lora_B.weight"]
        for expert in range(4):
            for rank in range(3):
                assert torch.equal(A[expert * 3 + rank], adapter.A[expert, rank])
                assert torch.equal(B[:, rank * 4 + expert], adapter.B[expert, :, rank])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == []
    assert "experts" not in config


def test_a_subset_is_written_whole_with_zeros_and_remembered(ids: Tensor, run: Any, tmp_path: Path) -> None:
    adapted = adapt(MOE["mixtral"](), experts=[3, 1])
    adapted.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    B = tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].view(32, 4, 4)
    assert [bool(B[..., expert].any()) for expert in range(4)] == [False, True, False, True]
    record = json.loads((tmp_path / "a" / "veneer.json").read_text())
    assert record["experts"] == {f"model.layers.{layer}.mlp.experts": [1, 3] for layer in (0, 1)}
    back = load_adapter(MOE["mixtral"](), tmp_path / "a")
    assert {key: p.shape for key, p in back.named_parameters()} == {k: p.shape for k, p in adapted.named_parameters()}
    assert torch.equal(run(back.module, ids), run(adapted.module, ids))


def test_without_our_record_a_subset_is_read_as_all_experts_with_the_same_logits(
    ids: Tensor, run: Any, tmp_path: Path
) -> None:
    adapted = adapt(MOE["mixtral"](), experts=[3, 1])
    adapted.save(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    back = load_adapter(MOE["mixtral"](), tmp_path / "a")
    assert {len(p) for p in back.parameters()} == {4}
    torch.testing.assert_close(run(back.module, ids), run(adapted.module, ids), **TOLERANCE)


def test_a_record_of_other_experts_than_the_files_is_refused(tmp_path: Path) -> None:
    adapted = adapt(MOE["mixtral"](), experts=[3, 1])
    adapted.save(tmp_path / "a")
    path = tmp_path / "a" / "veneer.json"
    path.write_text(path.read_text().replace("3", "2"))
    base = MOE["mixtral"]()
    with pytest.raises(AdapterError, match="updates for other experts than the 2 that were chosen"):
        load_adapter(base, tmp_path / "a")
    assert not any("LoraExperts" in type(part).__name__ for part in base.modules())


@pytest.mark.parametrize("change", ["missing", "renamed", "cut"])
def test_a_file_that_does_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    adapt(MOE["mixtral"]()).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    tensor = tensors.pop(key)
    if change == "renamed":  # as if only one stack were adapted
        tensors[key.replace("experts.", "experts.base_layer.base_layer.")] = tensor
    elif change == "cut":
        tensors[key] = tensor[:, :-1].contiguous()
    save_file(tensors, path)
    message = {"missing": "missing tensor", "renamed": "unknown tensor", "cut": r"is \[32, 15\], but"}[change]
    with pytest.raises(AdapterError, match=message):
        load_adapter(MOE["mixtral"](), tmp_path / "a")


def test_training_steps_are_those_of_peft(ids: Tensor, train: Any, tmp_path: Path) -> None:
    """Same start, same gradients, three AdamW steps: the same factors. PEFT trains them as one dense update."""
    adapted = attach(MOE["qwen3-moe"](), LoraConfig(r=4, lora_alpha=8, target_modules=[], experts="all"), seed=0)
    randomise(adapted)
    adapted.save(tmp_path / "start")
    theirs: Any = peft.PeftModel.from_pretrained(MOE["qwen3-moe"](), str(tmp_path / "start"), is_trainable=True).eval()
    train(adapted, ids, steps=3)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        out = theirs(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    theirs.save_pretrained(str(tmp_path / "end"))
    adapted.save(tmp_path / "ours")
    ours, end = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "end"))
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, end[key], rtol=1e-3, atol=1e-4)
        assert not torch.equal(tensor, start[key])
