"""Loading a base: as transformers computes it, frozen, and with a clear word for everything that is wrong."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

import veneer.models.bundled as bundled_module
from veneer.errors import ModelError, UsageError
from veneer.models import find_bundled, load_base, load_tokenizer
from veneer.models.strict import quiet

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Phi3": {"pad_token_id": 0},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to break."""
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    return copy


def refusal(spec: str | Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_base(spec, **{"dtype": "float32", "device": "cpu", **options})
    assert caught.value.fix, "every error says how to mend it"
    return caught.value


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def shard(folder: Path) -> list[str]:
    """Splits the weights into two files with an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[::2], names[1::2]]
    for file, half in zip(files, halves):
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    placed = {name: file for file, half in zip(files, halves) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return files


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, tiny_base: Path, tmp_path: Path) -> None:
    config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    model_class = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config_class(**{**SMALL, **FAMILIES[name]})).save_pretrained(tmp_path)
    load_tokenizer(tiny_base).save_pretrained(str(tmp_path))
    base = load_base(tmp_path, dtype="float32", device="cpu")
    # eager is the reference: older versions' SDPA leaves Gemma 2's soft cap out without a word.
    plain = model_class.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    for arguments in ({}, {"attention_mask": mask}):
        expected = plain(input_ids=ids, **arguments).logits
        got = base.module(input_ids=ids, **arguments).logits
        seen = mask.bool() if arguments else torch.ones_like(mask).bool()
        torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert base.module.config.use_cache == plain.config.use_cache


def test_a_base_is_frozen_in_eval_mode_where_and_as_it_was_asked_for(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), dtype="bf16", device="cpu")
    assert (base.dtype, base.device, base.spec) == (torch.bfloat16, torch.device("cpu"), str(tiny_base))
    assert not any(part.training for part in base.module.modules())
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert base.module.config._attn_implementation == "veneer"
    assert base.fused.swapped == {"LlamaAttention": 2, "LlamaDecoderLayer": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}


def test_sharded_weights_are_the_same_model(folder: Path, tiny_base: Path) -> None:
    shard(folder)
    ours, whole = load_base(folder, dtype="float32").module, load_base(tiny_base, dtype="float32").module
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_a_missing_folder_names_its_nearest_neighbours(folder: Path) -> None:
    error = refusal(folder.parent / "bsae")
    assert error.what == f"there is no folder '{folder.parent / 'bsae'}'"
    assert error.fix == f"Did you mean '{folder}'?"
    assert "does not exist either" in str(refusal("/nowhere/at/all").fix)
    assert refusal("./model.gguf").what == "there is no file './model.gguf'"


def test_a_hub_model_that_cannot_be_reached_says_so_and_names_what_is_near(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    error = refusal("my-modle")
    assert "the hub cannot be reached" in error.what
    assert error.fix == "Did you mean 'my-model'?"
    assert refusal("smollm2-153m").fix == "Did you mean 'smollm2-135m'?"


@pytest.mark.parametrize(
    ("error", "message", "fix"),
    [
        (RepositoryNotFoundError, "no folder and no public hub model 'some/model'", "hf auth login"),
        (GatedRepoError, "asks for its licence to be accepted", "hf auth login"),
        (RevisionNotFoundError, "has no revision 'v9'", "use a branch, tag or commit"),
        (TimeoutError, "the hub cannot be reached", "name a local folder"),
    ],
)
def test_what_the_hub_says_is_passed_on(
    error: type[Exception], message: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused = refusal("some/model", revision="v9")
    assert message in refused.what
    assert fix in str(refused.fix)


def test_a_hub_model_is_read_from_its_snapshot_and_records_its_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder.rename(folder.parent / commit)
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    identity = load_base("some/model", revision="main", dtype="float32").identity
    assert (identity.name, identity.revision) == ("some/model", commit)
    assert asked[0]["revision"] == "main"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked[0]["allow_patterns"])
    load_tokenizer("some/model")
    assert "*.safetensors" not in asked[1]["allow_patterns"]
    load_base("some/model", dtype="float32", trust_remote_code=True)
    assert "*.py" in asked[2]["allow_patterns"]


def test_the_alias_is_the_packages_file_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carrier_of_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(bundled_module.ALIASES, "smollm2-135m", ("carrier_of_a_model", "hub/id"))
    assert find_bundled("smollm2-135m") == package / "model.gguf"


def test_without_its_package_the_alias_means_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundled_module.ALIASES, "smollm2-135m", ("no_such_package", "hub/id"))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **_: str(folder) if repo == "hub/id" else None
    )
    identity = load_base("smollm2-135m", dtype="float32").identity
    assert identity.name == "smollm2-135m"

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert refusal("smollm2-135m").fix == "install the package no_such_package, which carries it"


def test_pickled_weights_are_never_read(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    error = refusal(folder)
    assert error.what.startswith("the weights are pickled (pytorch_model.bin), and pickle is never read")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there are no weights in the folder"),
        (["a.gguf"], "the folder holds GGUF files only"),
        (["adapter_config.json"], "this folder holds an adapter, not a base model"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(names: list[str], message: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_text("{}")
    assert refusal(folder).what == message


def test_an_adapter_folder_alone_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path).what == "this folder holds an adapter, not a base model"


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_weight_file_that_is_cut_short_is_named(keep: float, folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    error = refusal(folder)
    assert error.what.startswith("the weight file is cut short or damaged")
    assert str(file) in str(error.where)


def test_a_missing_shard_is_named(folder: Path) -> None:
    files = shard(folder)
    (folder / files[1]).unlink()
    assert refusal(folder).what == f"1 of 2 weight files are missing: {files[1]}"


def test_shards_of_two_versions_are_refused(folder: Path) -> None:
    files = shard(folder)
    (folder / files[1]).write_bytes((folder / files[0]).read_bytes())
    assert "do not hold what their index says" in refusal(folder).what
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "index of the weight files cannot be read" in refusal(folder).what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "9 parameters that no tensor fills: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "9 tensors that the model has no place for: model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 32}, "6 tensors of another shape than config.json says: model.layers.0.mlp.down_proj"),
        ({"tie_word_embeddings": False}, "1 parameters that no tensor fills: lm_head.weight"),
    ],
)
def test_every_tensor_is_used_and_every_parameter_filled(
    change: dict[str, Any], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_config(folder, **change)
    assert refusal(folder).what.startswith(message)
    assert capfd.readouterr() == ("", ""), "the error says it all"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(value: float, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert refusal(folder).what == "NaN or infinity in the weights: model.layers.1.mlp.up_proj.weight"


def test_a_weight_too_large_for_the_dtype_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 70000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(folder, dtype="float16").what
    load_base(folder, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"model_type": None}, "config.json has no model_type", "fetch it again"),
        ({"model_type": "lama"}, "transformers does not know the model type 'lama'", "Did you mean 'llama'"),
        ({"model_type": "t5"}, "a model of type 't5' is not a causal language model", "smollm2-135m"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised already (gptq)", "16-bit"),
        ({"hidden_size": "wide"}, "transformers cannot read config.json", "fetch it again"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}},
            "the model 'mine' brings code of its own, which is not run unless you say so",
            "set trust_remote_code",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    change: dict[str, Any], message: str, fix: str, folder: Path
) -> None:
    set_config(folder, **change)
    error = refusal(folder)
    assert error.what.startswith(message)
    assert fix in str(error.fix)


def test_a_configuration_that_is_missing_or_broken_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")
    assert refusal(folder).what.startswith("config.json is not JSON")
    (folder / "config.json").unlink()
    assert refusal(folder).what == "the folder has no config.json"


def test_a_missing_or_foreign_tokenizer_is_refused(folder: Path, make_tiny_base: Callable[..., Path]) -> None:
    set_config(folder)
    small = make_tiny_base(vocab_size=200)
    assert refusal(small).what == "the tokenizer has ids up to 299, the model 200 embeddings"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refusal(folder).what.startswith("the tokenizer cannot be read")


def test_a_revision_of_something_local_is_refused(tiny_base: Path) -> None:
    with pytest.raises(UsageError, match="has no revision 'main'"):
        load_base(tiny_base, revision="main")


def test_a_file_that_is_not_gguf_is_refused(tiny_base: Path) -> None:
    error = refusal(tiny_base / "model.safetensors")
    assert (error.what, error.fix) == ("a base model is a folder or a .gguf file", f"name the folder: {tiny_base}")


def test_loading_says_nothing_on_the_terminal(tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(tiny_base, dtype="float32")
    load_tokenizer(tiny_base)
    assert capfd.readouterr() == ("", "")


def test_a_warning_of_transformers_is_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("transformers")
    handlers, level = library.handlers[:], library.level
    with caplog.at_level(logging.WARNING, logger="veneer.models"), quiet():
        logging.getLogger("transformers.tokenization").warning("the regex of this tokenizer is wrong")
        logging.getLogger("transformers.tokenization").warning("`torch_dtype` is deprecated")
    assert [record.getMessage() for record in caplog.records] == ["the regex of this tokenizer is wrong"]
    assert (library.handlers, library.level) == (handlers, level)
