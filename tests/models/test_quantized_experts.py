"""Experts in codes: what their module computes over the decoded weights, forward and backward, decoded one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_folders import FAMILIES, SMALL, codes_of, decoded, some_ids, write_model
from torch import nn

from veneer.adapters.fused_experts import is_recognised
from veneer.models import load_base
from veneer.models.quantized_plan import UNKNOWN_EXPERTS
from veneer.quant import QuantizedTensor
from veneer.quant.stack import QuantizedStack

MOE = ("Mixtral", "Qwen3Moe", "Qwen2Moe", "GptOss")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), name, tiny_base) for name in MOE}


def load(folder: Path, **options: Any) -> Any:
    return load_base(folder, **{"dtype": "float32", "device": "cpu", "quantize": "nf4", **options})


@pytest.mark.parametrize("name", MOE)
def test_experts_over_codes_are_the_modules_own_over_the_decoded_weights(name: str, folders: dict[str, Path]) -> None:
    base = load(folders[name])
    assert sum(isinstance(part, QuantizedStack) for part in base.module.modules()) == 4
    plain = decoded(base, folders[name])
    assert base.module.config._experts_implementation == "veneer"
    assert plain.module.config._experts_implementation != "veneer"
    layer = next(p for p, m in plain.module.named_modules() if is_recognised(m))
    ours, theirs = base.module.get_submodule(layer), plain.module.get_submodule(layer)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(17)])
    shares = torch.rand(17, 2, generator=generator)
    found = []
    for experts in (ours, theirs):
        x = torch.randn(17, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weights = shares.clone().requires_grad_()
        y = experts(x, index, weights)
        y.square().sum().backward()
        found.append((y, x.grad, weights.grad))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_no_decoded_expert_is_kept_for_the_backward(folders: dict[str, Path]) -> None:
    base = load(folders["Mixtral"])
    layer = next(m.experts for m in base.module.modules() if type(m).__name__ == "MixtralSparseMoeBlock")
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    x = torch.randn(6, 64, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 3]] * 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, index, torch.rand(6, 2)).sum().backward()
    assert saved
    assert not any(shape in ((256, 64), (64, 128)) for shape in saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stack_moves_and_casts_without_changing_its_bits(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    base = load(folders["Qwen3Moe"], dtype="float32")
    before = {name: weight.codes.clone() for name, weight in codes_of(base).items()}
    base.module.to(dtype)
    after = codes_of(base)
    assert all(torch.equal(after[name].codes, codes) for name, codes in before.items())
    assert {weight.dtype for weight in after.values()} == {dtype}
    assert {weight.absmax.dtype for weight in after.values()} == {torch.uint8}
    assert base.module(some_ids()).logits.dtype == dtype


@pytest.mark.parametrize(
    ("name", "skip"), [("Mixtral", "down_proj"), ("GptOss", "gate_up_proj"), ("GptOss", "layers.0")]
)
def test_stacks_on_the_skip_list_stay_plain_beside_others_in_codes(
    name: str, skip: str, folders: dict[str, Path]
) -> None:
    base = load(folders[name], skip=[skip])
    stacks = {path for path, part in base.module.named_modules() if isinstance(part, QuantizedStack)}
    assert len(stacks) == 2
    assert not any(f".{skip}." in f".{path}." for path in stacks)
    plain = decoded(base, folders[name])
    torch.testing.assert_close(base.module(some_ids()).logits, plain.module(some_ids()).logits, rtol=1e-5, atol=1e-5)


def test_under_autocast_experts_compute_in_its_dtype(folders: dict[str, Path]) -> None:
    base = load(folders["Mixtral"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = base.module(some_ids()).logits
    wide = base.module(some_ids()).logits
    assert (narrow.float() - wide).norm() < 0.1 * wide.norm()


def test_experts_of_an_unknown_form_keep_their_16_bits_and_that_is_said(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4 multiplies all experts at once, outside of the interface."""
    monkeypatch.setitem(FAMILIES, "Llama4", {})
    config = transformers.Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=64,
        head_dim=16,
        num_local_experts=2,
        pad_token_id=0,
        attn_temperature_tuning=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Llama4ForCausalLM(config)
        for parameter in model.parameters():  # its router and experts start unset
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    from veneer.models import load_tokenizer

    load_tokenizer(tiny_base).save_pretrained(str(tmp_path))
    base = load(tmp_path)
    unknown = [name for name, reason in base.quantized.kept.items() if reason == UNKNOWN_EXPERTS]
    assert len(unknown) == 4
    size = sum(base.module.get_parameter(name).nbytes for name in unknown) / 1e6
    assert f"4 stacks of experts keep their 16 bits ({size:.1f} MB): down_proj, gate_up_proj" in caplog.text
    assert not any(isinstance(part, QuantizedStack) for part in base.module.modules())
    plain = decoded(base, tmp_path)
    torch.testing.assert_close(base.module(some_ids()).logits, plain.module(some_ids()).logits, rtol=1e-4, atol=1e-4)


def test_experts_that_compute_something_else_than_they_say_are_not_recognised(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))
    experts = model.model.layers[0].mlp.experts
    assert is_recognised(experts)

    class Doubled(type(experts)):  # type: ignore[misc]  # a class made of the one at hand
        def forward(self, *arguments: Any) -> torch.Tensor:
            return 2 * super().forward(*arguments)

    experts.__class__ = Doubled
    assert not is_recognised(experts)


def test_a_sentinel_of_no_expert_adds_nothing(folders: dict[str, Path]) -> None:
    base = load(folders["Mixtral"])
    experts = next(m.experts for m in base.module.modules() if type(m).__name__ == "MixtralSparseMoeBlock")
    x, shares = torch.randn(3, 64), torch.ones(3, 2)
    alone = experts(x, torch.tensor([[1, 4]] * 3), shares)
    assert isinstance(experts.down_proj.weight, QuantizedTensor)
    torch.testing.assert_close(alone, experts(x, torch.tensor([[1]] * 3), shares[:, :1]))
