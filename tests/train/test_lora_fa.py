"""LoRA-FA: B alone is trained, with the gradient that a step of the whole update would have; nothing of x is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import stop_after
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.adapters.frozen_a import preconditioner
from veneer.errors import AdapterError
from veneer.train.lora_fa import FrozenAStep
from veneer.train.optimizer import FlatAdamW

# PEFT talks on its own account.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

TOKENS = 37  # no other dimension has this size
EPS = 1e-12  # PEFT adds it before the correction of the bias, torch after it: so small that this does not show


def tiny_llama(tiny_base: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    module: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    return module


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for the backward while it is open."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize(("use_lora_fa", "copies"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_no_activation_as_wide_as_the_input_is_kept(kind: str, use_lora_fa: bool, copies: int) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = nn.Linear(24, 40) if kind == "linear" else Conv1D(40, 24)
    module = nn.Sequential(layer)
    adapted = attach(module, LoraConfig(r=4, use_lora_fa=use_lora_fa), seed=0)
    x = torch.randn(1, TOKENS, 24, requires_grad=True)
    with kept() as tensors:
        adapted.module(x)
    wide = [tensor for tensor in tensors if TOKENS in tensor.shape and tensor.shape[-1] == 24]
    assert len(wide) == copies
    assert any(tensor.shape == (TOKENS, 4) for tensor in tensors), "h = A x is what dB needs"


def test_a_model_keeps_less_by_the_inputs_of_its_linears(tiny_base: Path) -> None:
    """Of a layer's inputs only those stay that something else keeps as well: norms, attention, the activation."""

    def size(**changes: bool) -> int:
        adapted = attach(tiny_llama(tiny_base), LoraConfig(r=4, target_modules=["o_proj", "q_proj"], **changes), seed=0)
        with kept() as tensors:
            adapted.module(torch.arange(TOKENS)[None])
        own = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if TOKENS in tensor.shape}
        return sum(tensor.untyped_storage().nbytes() for tensor in own.values())

    layers, width, bytes_of_a_number = 2, 32, 4
    # q_proj's input is kept by nothing else: its norm keeps its own input.
    assert size() - size(use_lora_fa=True) >= layers * TOKENS * width * bytes_of_a_number


def test_the_gradient_of_b_is_the_closest_step_of_the_whole_update() -> None:
    """Least squares: s dB' A is the projection of the weight's gradient G onto the rows of A."""
    generator = torch.Generator().manual_seed(0)
    A, G = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 8), (5, 8)))
    s = 1.7
    dB = s * G @ A.t()  # what the backward gives
    found = dB @ preconditioner(A, s)
    expected = torch.linalg.lstsq(s * A.t(), G.t()).solution.t()
    torch.testing.assert_close(found, expected)


def steps(adapted: AdaptedModel, ids: Tensor, count: int, max_norm: float | None) -> None:
    """As the loop does them."""
    optimizer = FlatAdamW(adapted.named_parameters(), eps=EPS, weight_decay=0.0)
    hook = FrozenAStep(list(adapted.linears().values()))
    for step in range(1, count + 1):
        optimizer.zero_grad()
        out = adapted.module(ids).logits[:, :-1]
        loss: Any = nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.finish_gradient(1.0, max_norm)
        hook.before_step(step)
        optimizer.step(1e-2)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_three_steps_equal_pefts_optimizer_in_float32(
    max_norm: float | None, use_rslora: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    lorafa = pytest.importorskip("peft.optimizers.lorafa")
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # PEFT multiplies in bfloat16 where it can
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    settings["use_rslora"] = use_rslora
    adapted = attach(tiny_llama(tiny_base), LoraConfig(**settings, use_lora_fa=True), seed=0)
    theirs = peft.get_peft_model(tiny_llama(tiny_base), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    state = adapted.state()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(state[name.replace(".default", "")])
    optimizer = peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2)
    optimizer.param_groups[0]["eps"] = EPS
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    steps(adapted, ids, 3, max_norm)
    for _ in range(3):
        optimizer.zero_grad()
        out = theirs(ids).logits[:, :-1]
        nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], max_norm)
        optimizer.step()
    others = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if "lora_" in name}
    for key, tensor in adapted.state().items():
        # Adam divides by the size of the gradient, so that where it is tiny, rounding is seen whole.
        torch.testing.assert_close(tensor, others[key].detach(), rtol=1e-3, atol=1e-6, msg=key)
        assert key.endswith("lora_A.weight") or tensor.abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_run_moves_b_alone_and_its_file_opens_in_peft(
    settings: dict[str, Any], small_run: Callable[..., Any], tiny_base: Path
) -> None:
    peft = pytest.importorskip("peft")
    adapter = {"r": 4, "use_lora_fa": True, **settings}
    result, _ = small_run(adapter=adapter, train={"max_steps": 4, "learning_rate": 1e-2, "max_length": 64})
    fresh = attach(tiny_llama(tiny_base), LoraConfig(**adapter), seed=0).state()
    moved = {key: not torch.equal(fresh[key], tensor) for key, tensor in result.model.state().items()}
    assert all(hit != key.endswith(("lora_A.weight", ".start")) for key, hit in moved.items())
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tiny_base), str(result.adapter)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, result.model.module(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_multiplies_by_the_a_of_the_checkpoint(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer.train.api as api

    settings = {"adapter": {"r": 4, "use_lora_fa": True}, "train": {"max_steps": 8, "learning_rate": 1e-2}}
    small_run("whole", **settings)
    stop_after(3, monkeypatch)
    small_run("stopped", **settings)
    monkeypatch.undo()
    # Another A than the run's is attached first, and replaced by the checkpoint's.
    monkeypatch.setattr(api, "attach", lambda base, config, **_: attach(base, config, seed=77))
    small_run("stopped", resume=True, **settings)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_an_embedding_is_refused(tiny_base: Path) -> None:
    with pytest.raises(AdapterError, match="an embedding's starts at zero: nothing would be trained"):
        attach(tiny_llama(tiny_base), LoraConfig(use_lora_fa=True, target_modules=["q_proj", "embed_tokens"]))
