"""The native step: the model's own numbers, for every form of adapter, and refused wherever it would not give them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.generate import generate
from veneer.generate.decoder import Decoder, inference
from veneer.generate.native_step import NativeStep
from veneer.kernels import native
from veneer.kernels.decoder_step import few_rows_linear
from veneer.models import Base, load_base
from veneer.models.fused import fuse

BF16, FLOAT = torch.bfloat16, torch.float32
NEAR = {FLOAT: 2e-5, BF16: 4e-2}  # of logits, relative to their size; the model's own rounding is about as large

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.description())


def trained(base: Base, **settings: Any) -> AdaptedModel:
    """An adapter that does something, at every linear."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})
    adapted = attach(base, config, seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return adapted


def difference(module: nn.Module, prompts: list[list[int]]) -> float:
    """Between native logits and the model's for the same three tokens after a padded batch; columns are kept."""
    worst = 0.0
    with inference(module):
        ours, theirs = Decoder(module), Decoder(module)
        step = ours._native
        assert step is not None
        step.proven, theirs._native = True, None
        first = ours.read(prompts, 3).argmax(-1)
        theirs.read(prompts, 3)
        for _ in range(3):
            a, b = ours.step(first).float(), theirs.step(first).float()
            worst = max(worst, float((a - b).norm() / b.norm()))
            first = b.argmax(-1)
    for a, b in zip(ours.cache.layers, theirs.cache.layers):
        keys, wanted = a.keys[:, :, : a.length].float(), b.keys[:, :, : b.length].float()
        assert a.length == b.length
        assert (keys - wanted).norm() <= NEAR[a.keys.dtype] * wanted.norm()
    return worst


@pytest.fixture(params=[FLOAT, BF16], ids=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, make_tiny_base: Callable[..., Path]) -> Base:
    if not native.can_take(torch.ones(2, 2, dtype=request.param), function="decoder_step"):
        pytest.skip("this processor does not multiply bfloat16 in pairs")
    return load_base(make_tiny_base(initializer_range=0.1, seed=3), dtype=str(request.param)[6:], device="cpu")


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_logits_and_cache_are_the_models_own(base: Base, prompts: list[list[int]], rows: int) -> None:
    assert difference(base.module, prompts[:rows]) <= NEAR[base.dtype]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "r": 16}, {"target_modules": ["q_proj", "down_proj"], "r": 3}],
    ids=["all", "dora", "rslora", "some"],
)
def test_with_an_adapter(base: Base, prompts: list[list[int]], settings: dict[str, Any]) -> None:
    adapted = trained(base, **settings)
    assert difference(adapted.module, prompts[:5]) <= NEAR[base.dtype]
    with adapted.disabled():
        assert difference(adapted.module, prompts[:5]) <= NEAR[base.dtype]


def test_an_update_smaller_than_the_weights_rounding_is_not_lost(make_tiny_base: Callable[..., Path]) -> None:
    """Added to a product that is rounded already, most of it would be: the adapter would write less than it learnt."""
    if not native.can_take(torch.ones(2, 2, dtype=BF16), function="decoder_step"):
        pytest.skip("this processor does not multiply bfloat16 in pairs")
    folder = make_tiny_base(initializer_range=0.1, seed=3)
    rows = torch.arange(10, 290)
    changes: dict[torch.dtype, torch.Tensor] = {}
    for dtype in (FLOAT, BF16):
        adapted = attach(
            load_base(folder, dtype=str(dtype)[6:], device="cpu"), LoraConfig(r=4, target_modules=["v_proj"])
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in adapted.parameters():
                parameter.copy_(2e-3 * torch.randn(parameter.shape))
        values = []
        for state in (adapted.disabled(), contextlib.nullcontext()):
            with state, inference(adapted.module):
                decoder = Decoder(adapted.module)
                assert decoder._native is not None
                decoder._native.proven = True
                parts = []
                for some in rows.split(20):
                    decoder.read([[5]] * len(some), 2)
                    decoder.step(some)
                    parts.append(decoder.cache.layers[0].values[:, :, 1].float())
                values.append(torch.cat(parts))
        changes[dtype] = values[1] - values[0]
    exact = changes[FLOAT]
    share = float((changes[BF16] * exact).sum() / exact.square().sum())
    assert share == pytest.approx(1.0, abs=0.2)


def test_threads_do_not_change_a_bit(base: Base, prompts: list[list[int]]) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(1)
        with inference(base.module):
            decoder = Decoder(base.module)
            assert decoder._native is not None
            decoder._native.proven = True
            tokens = torch.tensor([7, 8, 9])
            decoder.read([[5, 6], [5, 7], [5, 8]], 2)
            torch.set_num_threads(threads)
            found.append(decoder.step(tokens))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_row_gives_the_same_bits_whatever_stands_beside_it() -> None:
    for dtype in (FLOAT, BF16):
        weight, x = torch.randn(70, 50).to(dtype), torch.randn(11, 50).to(dtype)
        if not native.can_take(weight, function="few_rows"):
            continue
        whole = few_rows_linear(x, weight, bias := torch.randn(70).to(dtype))
        for rows in (1, 2, 3, 5, 8):
            assert torch.equal(few_rows_linear(x[:rows], weight, bias), whole[:rows])
        exact = x.double() @ weight.double().t() + bias.double()
        assert (whole.double() - exact).norm() <= (3e-3 if dtype == BF16 else 1e-6) * exact.norm()


def test_biases_as_qwen_has_them(family: Callable[[str], Any], prompts: list[list[int]]) -> None:
    assert difference(family("Qwen2").base.module, prompts) <= NEAR[FLOAT]


def test_the_first_step_of_all_proves_it_and_the_rest_are_native(
    base: Base, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    own, ours = Decoder._forward, NativeStep.__call__
    monkeypatch.setattr(Decoder, "_forward", lambda self, *args: (called.append("model"), own(self, *args))[1])
    monkeypatch.setattr(NativeStep, "__call__", lambda self, *args: (called.append("native"), ours(self, *args))[1])
    base.module.__dict__.pop("_veneer_step_is_right", None)
    generate(base, prompts[:2], max_new_tokens=6, stop_token_ids=())
    assert called == ["model", "native", "model", *["native"] * 4]
    called.clear()
    generate(base, prompts[:2], max_new_tokens=6, stop_token_ids=())
    assert called == ["model", *["native"] * 5]


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma2", "Gemma3", "Phi3", "GPTNeoX", "GPT2", "Lfm2"])
def test_what_is_put_together_otherwise_is_not_recognised(name: str, family: Callable[[str], Any]) -> None:
    assert Decoder(family(name).base.module)._native is None


def test_a_multiplier_that_no_part_shows_is_found_by_the_first_step(tiny_base: Path) -> None:
    """Granite has Llama's parts, and multiplies what its layers add."""
    config = transformers.GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, residual_multiplier=0.9, attention_multiplier=0.4, max_position_embeddings=64,
    )  # fmt: skip
    module = transformers.GraniteForCausalLM(config).eval().requires_grad_(False)
    fuse(module)
    assert NativeStep.of(module) is not None
    with inference(module):
        decoder, plain = Decoder(module), Decoder(module)
        plain._native = None
        prompts = [[5, 6, 7], [8, 9]]
        assert torch.equal(decoder.read(prompts, 3), plain.read(prompts, 3))
        for token in (3, 4, 5):
            tokens = torch.tensor([token, token])
            assert torch.equal(decoder.step(tokens), plain.step(tokens))
    assert NativeStep.of(module) is None


def test_what_it_cannot_take_goes_through_the_model(base: Base) -> None:
    with native.left_out():
        assert NativeStep.of(base.module) is None
    for part in (base.module.model.layers[1].mlp.up_proj, base.module.model.layers[0], base.module.model):
        with part.register_forward_hook(lambda *args: None):
            assert NativeStep.of(base.module) is None
    adapted = trained(base, lora_dropout=0.5)
    with inference(adapted.module):
        assert NativeStep.of(adapted.module) is not None  # nothing is dropped while decoding
    adapted.add(LoraConfig(r=2, target_modules=["q_proj"]), "second")
    adapted.use("default", "second")
    assert NativeStep.of(adapted.module) is None


def test_codes_go_through_the_model(make_tiny_base: Callable[..., Path], prompts: list[list[int]]) -> None:
    base = load_base(make_tiny_base(seed=3), dtype="float32", device="cpu", quantize="nf4")
    assert NativeStep.of(base.module) is None
    assert len(generate(base, prompts[:2], max_new_tokens=3, stop_token_ids=())) == 2
