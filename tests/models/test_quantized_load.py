"""Loading into codes: the same codes as quantising the loaded weights, from every source, with the same strictness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from quantized_folders import FAMILIES, codes_of, decoded, is_transposed, some_ids, write_model
from safetensors.torch import load_file, save_file

from veneer.errors import ModelError, UsageError, VeneerError
from veneer.models import load_base
from veneer.quant import QuantConfig, QuantizedLinear, quantize

NF4 = QuantConfig("nf4")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), name, tiny_base) for name in FAMILIES}


@pytest.fixture
def folder(families: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Qwen2, which has biases, to break."""
    return Path(shutil.copytree(families["Qwen2"], tmp_path / "base"))


def refusal(spec: Path, **options: Any) -> VeneerError:
    with pytest.raises(VeneerError) as caught:
        load_base(spec, **{"dtype": "float32", "device": "cpu", "quantize": "nf4", **options})
    assert caught.value.fix, "every error says how to mend it"
    return caught.value


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_codes_are_those_of_the_loaded_weights_and_the_rest_is_as_it_was(
    name: str, scheme: str, families: dict[str, Path]
) -> None:
    folder = families[name]
    base, plain = (load_base(folder, dtype="float32", device="cpu", quantize=q) for q in (scheme, None))
    codes, parameters = codes_of(base), dict(plain.module.named_parameters())
    for path, weight in codes.items():
        original = parameters.pop(path)
        expected = quantize(original.mT if is_transposed(plain, path) else original, QuantConfig(scheme))
        assert torch.equal(weight.codes, expected.codes), path
        assert torch.equal(weight.absmax, expected.absmax), path
    rest = dict(base.module.named_parameters())
    assert rest.keys() == parameters.keys()
    assert all(torch.equal(rest[path], parameter) for path, parameter in parameters.items())
    assert not any(
        path.endswith(("lm_head.weight", "embed_tokens.weight", "gate.weight", "router.weight")) for path in codes
    )
    assert len(codes) == base.quantized.tensors >= 8
    with torch.no_grad():
        got, expected_logits = base.module(some_ids()).logits, decoded(base, folder).module(some_ids()).logits
    torch.testing.assert_close(got, expected_logits, rtol=1e-5, atol=1e-5)
    assert base.identity == plain.identity
    assert base.module.generation_config.to_dict() == plain.module.generation_config.to_dict()
    assert base.module.config.name_or_path == plain.module.config.name_or_path


def test_what_is_in_codes_and_what_is_not_is_said(families: dict[str, Path]) -> None:
    base = load_base(families["Qwen2Moe"], dtype="bfloat16", device="cpu", quantize="nf4")
    assert (base.dtype, base.quantization) == (torch.bfloat16, NF4)
    assert set(base.quantized.kept.values()) == {"output head", "router"}
    assert "model.layers.0.mlp.shared_expert_gate.weight" in base.quantized.kept
    assert base.quantized.bits_per_parameter == pytest.approx(4.127, abs=0.02)
    saved = 2 * base.quantized.parameters - base.quantized.code_bytes
    assert base.nbytes == base.quantized.bytes_after == base.quantized.bytes_before - saved
    assert str(base.quantized).startswith("18 tensors in nf4, 4.1")
    assert base.quantized.record() == {"scheme": "nf4", "block_size": 64, "double_quant": True, "skip": []}
    assert load_base(families["Llama"], device="cpu").quantization is None


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_flow_through_codes_to_the_input(mode: str, families: dict[str, Path]) -> None:
    base = load_base(families["Mixtral"], dtype="float32", device="cpu", quantize="nf4")
    plain = decoded(base, families["Mixtral"])
    found = []
    for module in (base.module, plain.module):
        getattr(module, mode)()
        x = module.get_input_embeddings()(some_ids()).detach().requires_grad_()
        module(inputs_embeds=x).logits.float().square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_configuration_with_another_block_size_is_used(families: dict[str, Path]) -> None:
    config = QuantConfig("fp4", block_size=128, double_quant=False)
    base = load_base(families["Llama"], dtype="float32", device="cpu", quantize=config)
    assert {weight.config for weight in codes_of(base).values()} == {config}
    assert base.quantized.bits_per_parameter == pytest.approx(4.25)


def test_shards_and_gguf_give_the_codes_of_the_folder(tiny_base: Path, tmp_path: Path) -> None:
    expected = codes_of(load_base(tiny_base, dtype="float32", device="cpu", quantize="nf4"))
    sharded = Path(shutil.copytree(tiny_base, tmp_path / "sharded"))
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    placed = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(placed.values()):
        save_file({n: tensors[n] for n in names if placed[n] == file}, sharded / file, metadata={"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    for source in (sharded, write_gguf(tmp_path / "model.gguf", tiny_base)):
        got = codes_of(load_base(source, dtype="float32", device="cpu", quantize="nf4"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name].codes, weight.codes) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("layers.1.mlp", [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]),
        (r"model\.layers\.0\..*(q|v)_proj", [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]),
        ("lm_head", []),
    ],
)
def test_the_skip_list_names_modules_layers_or_patterns(entry: str, kept: list[str], families: dict[str, Path]) -> None:
    base = load_base(families["Llama"], dtype="float32", device="cpu", quantize="nf4", skip=[entry])
    plain = [p for p, m in base.module.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
    assert sorted(plain) == sorted(kept)
    assert base.quantized.skip == (entry,)


def test_a_skip_list_that_names_nothing_or_everything_is_refused(families: dict[str, Path]) -> None:
    error = refusal(families["Llama"], skip=["dwon_proj"])
    assert error.what == "skip list: 'dwon_proj' matches no weight of the model"
    assert str(error.fix).startswith("Did you mean 'down_proj'")
    assert "is no regular expression" in refusal(families["Llama"], skip=["(q"]).what
    assert refusal(families["Llama"], skip=["layers"]).what == "there is no weight to quantise in this model"
    assert "says what is not quantised" in refusal(families["Llama"], quantize=None, skip=["down_proj"]).what


def test_what_cannot_be_stored_or_computed_so_is_refused(families: dict[str, Path]) -> None:
    assert refusal(families["Llama"], quantize="nf5").fix == "Did you mean 'nf4'?"
    error = refusal(families["Llama"], device=torch.device("mps"))
    assert (type(error), error.where) == (UsageError, "quantize")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(name: str, value: float, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder)
    assert "NaN or infinity" in error.what
    assert name in f"{error.what} {error.where}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "12 parameters that no tensor fills: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "12 tensors that the model has no place for: model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 64}, "6 tensors of another shape than config.json says: model.layers.0.mlp.down_proj"),
        (
            {"vocab_size": 310},
            "2 tensors of another shape than config.json says: lm_head.weight: (300, 64) in the file",
        ),
    ],
)
def test_every_tensor_is_used_and_every_parameter_filled(
    change: dict[str, Any], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | change).items() if k != "layer_types"}))
    assert refusal(folder).what.startswith(message)
    assert capfd.readouterr() == ("", ""), "the error says it all"


def test_a_weight_file_that_is_cut_short_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(folder).what.startswith("the weight file is cut short or damaged")


def test_progress_counts_every_tensor_once(folder: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    load_base(folder, dtype="float32", device="cpu", quantize="nf4", progress=lambda *call: seen.append(call))
    names = load_file(folder / "model.safetensors").keys()
    assert [done for done, _, _ in seen] == list(range(len(names) + 1))
    assert {total for _, total, _ in seen} == {len(names)}
    assert {name for _, _, name in seen} == {*names, ""}


def test_loading_says_nothing_on_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(folder, dtype="float32", device="cpu", quantize="nf4")
    assert capfd.readouterr() == ("", "")


def test_code_of_the_models_own_runs_where_it_is_allowed(families: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(families["Llama"], tmp_path / "own"))
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    assert "brings code of its own" in refusal(folder).what
    base = load_base(folder, dtype="float32", device="cpu", quantize="nf4", trust_remote_code=True)
    expected = codes_of(load_base(families["Llama"], dtype="float32", device="cpu", quantize="nf4"))
    assert type(base.module).__name__ == "OwnModel"
    assert all(torch.equal(weight.codes, expected[name].codes) for name, weight in codes_of(base).items())


def test_a_weight_that_its_module_reads_without_calling_the_layer_stays_plain(tiny_base: Path, tmp_path: Path) -> None:
    FAMILIES["Mamba"] = {}
    try:
        folder = write_model(tmp_path, "Mamba", tiny_base)
    finally:
        del FAMILIES["Mamba"]
    base = load_base(folder, dtype="float32", device="cpu", quantize="nf4")
    coded = {p.rpartition(".")[2] for p, m in base.module.named_modules() if isinstance(m, QuantizedLinear)}
    assert coded == {"in_proj"}, "the kernels take the weights of x_proj, dt_proj and out_proj"
    assert torch.isfinite(base.module(some_ids()).logits).all()


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"], ids=["first", "last"]
)
def test_a_failing_step_is_told_as_an_error_of_ours(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: torch.Tensor, config: QuantConfig, at: str, dtype: torch.dtype) -> Any:
        if at == name:
            raise RuntimeError("out of memory: tried to allocate 7 GiB")
        return quantize(weight, config, at, dtype)

    monkeypatch.setattr("veneer.models.quantized_intake.quantize", fail)
    error = refusal(folder)
    assert isinstance(error, ModelError)
    assert error.what == "the weight cannot be quantised: out of memory: tried to allocate 7 GiB"
    assert error.where == name
