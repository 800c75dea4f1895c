"""Quantised weights in files: bitsandbytes reads ours, we read bitsandbytes', and damaged ones are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.quant import QuantConfig, QuantizedTensor, from_state_dict, quantize, state_dict, state_keys

State = dict[str, Tensor]
META = "p.weight.quant_state.bitsandbytes__nf4"
CONFIGS = [QuantConfig(s, b, d) for s in ("nf4", "fp4") for b in (64, 256) for d in (True, False)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="the oracle is not installed")


def description(state: State, key: str = META) -> dict[str, Any]:
    return json.loads(bytes(state[key].tolist()))  # type: ignore[no-any-return]  # JSON


def assert_same_states(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key


def assert_same_weights(got: QuantizedTensor, want: QuantizedTensor) -> None:
    assert_same_states(state_dict(got), state_dict(want))
    assert (got.shape, got.dtype, got.config) == (want.shape, want.dtype, want.config)
    assert torch.equal(got.dequantize(), want.dequantize())


def linear4bit(weight: Tensor, config: QuantConfig) -> Any:
    """bitsandbytes' layer over ``weight``, quantised by itself."""
    layer = bitsandbytes().nn.Linear4bit(
        weight.shape[1], weight.shape[0], True, compress_statistics=config.double_quant, quant_type=config.scheme
    )
    layer.weight.blocksize = config.block_size
    layer.weight.data, layer.bias.data = weight.clone(), torch.randn(weight.shape[0]).to(weight.dtype)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_our_keys_and_bytes_are_those_of_bitsandbytes_linear4bit(config: QuantConfig, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 256).to(dtype)
    theirs = linear4bit(weight, config).state_dict(prefix="p.")
    ours = state_dict(quantize(weight, config), "p.")
    del theirs["p.bias"]
    assert_same_states(ours, theirs)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_we_read_what_bitsandbytes_writes(config: QuantConfig) -> None:
    weight = torch.randn(48, 256).bfloat16()
    layer = linear4bit(weight, config)
    ours = from_state_dict(layer.state_dict(prefix="p."), "p.")
    oracle = bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(ours.dequantize(), oracle)
    assert_same_weights(ours, quantize(weight, config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bitsandbytes_reads_what_we_write(config: QuantConfig) -> None:
    ours = quantize(torch.randn(48, 256).bfloat16(), config)
    written = state_dict(ours, "p.")
    statistics = {key.removeprefix("p.weight."): value for key, value in written.items() if key != "p.weight"}
    theirs = bitsandbytes().nn.Params4bit.from_prequantized(written["p.weight"], statistics, device="cpu")
    assert theirs.quant_state.nested == config.double_quant
    assert torch.equal(bitsandbytes().functional.dequantize_4bit(theirs.data, theirs.quant_state), ours.dequantize())
    alone = bitsandbytes().functional.QuantState.from_dict(statistics, torch.device("cpu"))
    assert (alone.blocksize, alone.quant_type, alone.dtype) == (config.block_size, config.scheme, torch.bfloat16)


def test_we_read_codes_that_are_stored_as_another_dtype() -> None:
    weight = torch.randn(16, 128)
    codes, _ = bitsandbytes().functional.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    ours = quantize(weight)
    assert codes.dtype == torch.bfloat16
    assert_same_weights(from_state_dict(state_dict(ours) | {"weight": codes}), ours)


def linear8bit(weight: Tensor) -> Any:
    layer = bitsandbytes().nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight.data = weight.clone()
    return layer.to("cpu")


def test_int8_goes_to_bitsandbytes_and_back() -> None:
    weight = torch.randn(24, 40).half()
    layer, ours = linear8bit(weight), quantize(weight, QuantConfig("int8"))
    assert_same_states(state_dict(ours, "p."), layer.state_dict(prefix="p."))
    assert_same_weights(from_state_dict(layer.state_dict(prefix="p."), "p.", torch.float16), ours)
    other = linear8bit(torch.randn(24, 40).half())
    other.load_state_dict(state_dict(ours))
    assert torch.equal(other.weight.data, ours.codes)
    assert torch.equal(other.weight.SCB, ours.absmax)


@pytest.mark.parametrize("shape", [(48, 256), (7, 9), (3, 10, 6)])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "int8"])
def test_a_safetensors_file_gives_the_weights_back(scheme: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weights = {f"model.{i}.": quantize(torch.randn(shape), QuantConfig(scheme)) for i in range(2)}
    tensors: State = {}
    for prefix, weight in weights.items():
        tensors |= state_dict(weight, prefix)
    save_file(tensors, tmp_path / "model.safetensors")  # refuses tensors that share memory
    found = load_file(tmp_path / "model.safetensors")
    for prefix, weight in weights.items():
        assert_same_weights(from_state_dict(found, prefix), weight)


def test_a_description_says_everything_that_decoding_needs() -> None:
    ours = quantize(torch.randn(48, 256).bfloat16(), QuantConfig("nf4", 128))
    assert ours.offset is not None
    assert description(state_dict(ours, "p.")) == {
        "quant_type": "nf4",
        "blocksize": 128,
        "dtype": "bfloat16",
        "shape": [48, 256],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": ours.offset.item(),
    }
    assert "nested_offset" not in description(state_dict(quantize(torch.randn(4, 64), CONFIGS[1]), "p."))


def test_the_dtype_may_be_chosen_when_reading() -> None:
    written = state_dict(quantize(torch.randn(4, 64)))
    assert from_state_dict(written).dtype == torch.float32
    assert from_state_dict(written, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert from_state_dict(state_dict(quantize(torch.randn(4, 64), QuantConfig("int8")))).dtype == torch.float32


def test_the_keys_of_a_weight_are_found_among_others() -> None:
    names = [
        "a.weight",
        "a.weight.absmax",
        "a.bias",
        "aa.weight",
        "a.b.weight",
        "a.SCB",
        "a.weight_format",
        "a.weights",
    ]
    assert state_keys(names, "a.") == ["a.weight", "a.weight.absmax", "a.SCB", "a.weight_format"]


def test_an_expert_out_of_a_stack_cannot_be_saved_apart() -> None:
    with pytest.raises(ModelError, match="one expert out of a stack"):
        state_dict(quantize(torch.randn(2, 8, 64)).index(1))


Damage = Callable[[State], None]


def drop(key: str) -> Damage:
    def damage(state: State) -> None:
        del state[key]

    return damage


def change(key: str, how: Callable[[Tensor], Tensor]) -> Damage:
    def damage(state: State) -> None:
        state[key] = how(state[key].clone())

    return damage


def describe(**changes: Any) -> Damage:
    def damage(state: State) -> None:
        meta = {k: v for k, v in (description(state) | changes).items() if v is not ...}
        state[META] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    return damage


def rename(old: str, new: str) -> Damage:
    def damage(state: State) -> None:
        state[new] = state.pop(old)

    return damage


def put(key: str, tensor: Tensor) -> Damage:
    def damage(state: State) -> None:
        state[key] = tensor

    return damage


def with_nan(tensor: Tensor) -> Tensor:
    tensor[0] = float("nan")
    return tensor


DAMAGES: list[tuple[Damage, str, str]] = [
    (drop("p.weight"), "missing: p.weight", "p.weight"),
    (drop("p.weight.absmax"), "missing: p.weight.absmax", "p.weight"),
    (drop("p.weight.quant_map"), "missing: p.weight.quant_map", "p.weight"),
    (drop("p.weight.nested_absmax"), "missing: p.weight.nested_absmax", "p.weight"),
    (drop("p.weight.nested_quant_map"), "missing: p.weight.nested_quant_map", "p.weight"),
    (drop(META), "is not quantised", "p.weight"),
    (put("p.weight.zeros", torch.zeros(3)), "has no part p.weight.zeros", "p.weight"),
    (put("p.weight.quant_state.bitsandbytes__fp4", torch.zeros(3)), "described 2 times", "p.weight"),
    (rename(META, META.replace("nf4", "af4")), "unknown 4-bit type 'af4'", META.replace("nf4", "af4")),
    (rename(META, META.replace("nf4", "fp4")), "the key says 'fp4', the description 'nf4'", META.replace("nf4", "fp4")),
    (change(META, lambda t: t[:-4]), "cannot be read", META),
    (change(META, lambda t: t * 0 + 255), "cannot be read", META),
    (describe(shape=...), "cannot be read", META),
    (describe(shape=["a", 2]), "cannot be read", META),
    (describe(nested_offset=10**400), "cannot be read", META),
    (describe(dtype="int64"), "cannot be read", META),
    (describe(nested_blocksize=...), "cannot be read", META),
    (describe(shape=[48, 255]), "48x255 in blocks of 64 has 6120 bytes of codes, the file 6144", "p.weight"),
    (describe(shape=[12288]), "neither a matrix nor a stack", META),
    (describe(blocksize=128), "has 96 scales, the file 192", "p.weight.absmax"),
    (describe(blocksize=48), "a power of two from 32 to 4096", META),
    (describe(blocksize=64.0), "a power of two from 32 to 4096", META),
    (describe(nested_blocksize=4096), "not known here: blocks of 4096", META),
    (describe(nested_dtype="float16"), "not known here", META),
    (describe(nested_offset=float("nan")), "not known here", META),
    (describe(nested_offset=...), "has no part p.weight.nested_absmax, p.weight.nested_quant_map", "p.weight"),
    (change("p.weight", lambda t: t[:-1]), "has 6144 bytes of codes, the file 6143", "p.weight"),
    (change("p.weight.absmax", lambda t: t[:-1]), "has 192 scales, the file 191", "p.weight.absmax"),
    (change("p.weight.absmax", Tensor.float), "does not fit double quantisation", "p.weight.absmax"),
    (change("p.weight.nested_absmax", lambda t: t[:0]), "has 1 nested scales, the file 0", "p.weight.nested_absmax"),
    (change("p.weight.nested_absmax", with_nan), "NaN or infinity", "p.weight.nested_absmax"),
    (change("p.weight.nested_absmax", Tensor.long), "NaN or infinity, or are no numbers", "p.weight.nested_absmax"),
    (change("p.weight.quant_map", lambda t: t.flip(0)), "not the standard nf4 one", "p.weight.quant_map"),
    (change("p.weight.quant_map", lambda t: t[:8]), "not the standard nf4 one", "p.weight.quant_map"),
    (change("p.weight.nested_quant_map", lambda t: t + 1e-3), "not the standard dynamic", "p.weight.nested_quant_map"),
]


@pytest.mark.parametrize(("damage", "what", "where"), DAMAGES, ids=[what for _, what, _ in DAMAGES])
def test_a_damaged_4_bit_weight_is_refused_by_name(damage: Damage, what: str, where: str) -> None:
    state = state_dict(quantize(torch.randn(48, 256)), "p.")
    from_state_dict(state, "p.")
    damage(state)
    with pytest.raises(ModelError) as caught:
        from_state_dict(state, "p.")
    assert what in caught.value.what
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("damage", "what", "where"),
    [
        (drop("p.weight"), "missing: p.weight", "p.weight"),
        (change("p.weight", Tensor.float), "not torch.float32", "p.weight"),
        (change("p.weight", Tensor.flatten), "2 or 3 dimensions", "p.weight"),
        (change("p.SCB", lambda t: t[:-1]), "48 rows of codes have 47 scales", "p.SCB"),
        (change("p.SCB", with_nan), "NaN or infinity", "p.SCB"),
        (put("p.weight_format", torch.tensor(2, dtype=torch.uint8)), "not in format 2", "p.weight"),
        (put("p.weight.absmax", torch.zeros(3)), "has no part p.weight.absmax", "p.weight"),
    ],
)
def test_a_damaged_int8_weight_is_refused_by_name(damage: Damage, what: str, where: str) -> None:
    state = state_dict(quantize(torch.randn(48, 256), QuantConfig("int8")), "p.")
    from_state_dict(state, "p.")
    damage(state)
    with pytest.raises(ModelError) as caught:
        from_state_dict(state, "p.")
    assert what in caught.value.what
    assert caught.value.where == where
    assert caught.value.fix


def test_a_16_bit_weight_is_not_taken_for_a_quantised_one() -> None:
    with pytest.raises(ModelError, match="the weight is not quantised") as caught:
        from_state_dict(nn.Linear(8, 8).state_dict(prefix="p."), "p.")
    assert "quantize(weight" in str(caught.value.fix)


def test_scales_without_double_quantisation_must_be_finite() -> None:
    state = state_dict(quantize(torch.randn(4, 64), QuantConfig(double_quant=False)))
    state["weight.absmax"][2] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinity") as caught:
        from_state_dict(state)
    assert caught.value.where == "weight.absmax"
