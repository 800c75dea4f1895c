"""The run folder: what is written is read back, and what is no run, or not a whole one, is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.errors import AdapterError, ModelError, StorageError, UsageError
from veneer.models import Base, load_base
from veneer.recipe import recipe_from
from veneer.run import RunFolder, RunInfo, is_run, load_model, open_run, package_versions, recorded_base

IDS = torch.tensor([[1, 88, 86, 296, 202]])


def write_run(folder: Path, base: Path, *, status: str = "finished") -> RunFolder:
    """A run as training leaves it, with an adapter that does something."""
    run = RunFolder(folder)
    loaded = load_base(base, dtype="float32")
    adapted = attach(loaded, LoraConfig(r=2, init_lora_weights=False), seed=1)
    adapted.save(run.adapter)
    recipe = recipe_from(
        {
            "base": str(base),
            "dtype": "float32",
            "data": {"train": "/gone/rows.jsonl", "chat_template": "{{ messages }}"},
            "output_dir": str(folder),
        }
    )
    run.recipe_path.write_text(recipe.to_yaml())
    RunInfo(status=status, base=loaded.identity.to_dict(), seed=7, metrics={"loss": 1.5}).write(run)  # type: ignore[arg-type]  # any text, for the tests of unknown ones
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("runs") / "done", tiny_base)


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A finished run that a test may break."""
    shutil.copytree(finished.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def set_status(run: RunFolder, **values: Any) -> None:
    info = json.loads(run.run_json.read_text())
    run.run_json.write_text(json.dumps({**info, **values}))


# --- run.json --------------------------------------------------------------------------------------------------------


def test_run_json_is_read_back_as_it_was_written_with_the_keys_of_later_versions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    info = RunInfo(status="interrupted", base={"name": "b"}, seed=3, training={"steps": 5}, extra={"later": [1]})
    info.write(folder)
    assert RunInfo.read(folder) == info
    assert json.loads(folder.run_json.read_text())["later"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_json_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(StorageError):
        RunInfo().write(RunFolder(in_the_way / "run"))
    assert in_the_way.read_text() == ""


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_run_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        open_run(tmp_path)
    assert "run.json" in str(caught.value)
    assert str(tmp_path / "run.json") in str(caught.value.where)


def test_the_versions_that_decide_numbers_are_recorded() -> None:
    assert set(package_versions()) == {"python", "veneer", "torch", "transformers", "tokenizers", "safetensors"}
    assert package_versions()["torch"] == torch.__version__


def test_an_opened_run_has_its_recipe_though_the_data_are_gone(finished: RunFolder) -> None:
    run = open_run(finished.path)
    assert is_run(finished.path)
    assert run.finished
    assert run.recipe.data.train == "/gone/rows.jsonl"
    assert run.recipe.data.chat_template == "{{ messages }}"
    assert run.info["metrics"] == {"loss": 1.5}
    assert run.info["seed"] == 7


# --- load_model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_a_run_and_its_adapter_folder_load_the_same_model(finished: RunFolder, tiny_base: Path, what: str) -> None:
    model = load_model(finished.path if what == "run" else finished.adapter, dtype="float32")
    expected = attach(load_base(tiny_base, dtype="float32"), LoraConfig(r=2, init_lora_weights=False), seed=1)
    assert isinstance(model, AdaptedModel)
    with torch.no_grad():
        got, wanted = model.module(input_ids=IDS).logits, expected.module(input_ids=IDS).logits
        with model.disabled():
            base = model.module(input_ids=IDS).logits
    assert torch.equal(got, wanted)
    assert not torch.equal(got, base)


def test_a_base_loads_as_a_base(tiny_base: Path) -> None:
    assert isinstance(load_model(tiny_base, dtype="float32"), Base)


def test_a_run_keeps_the_dtype_of_its_recipe_unless_another_is_asked_for(finished: RunFolder) -> None:
    of_the_run, asked = load_model(finished.path), load_model(finished.path, dtype="bfloat16")
    assert isinstance(of_the_run.base, Base)  # type: ignore[union-attr]  # an AdaptedModel, as above
    assert of_the_run.base.dtype == torch.float32  # type: ignore[union-attr]
    assert asked.base.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_another_base_is_refused_with_both_hashes_unless_allowed(
    finished: RunFolder, tiny_base: Path, make_tiny_base: Callable[..., Path]
) -> None:
    other = make_tiny_base(seed=5)
    with pytest.raises(AdapterError) as caught:
        load_model(finished.path, base=str(other))
    hashes = [load_base(folder).identity.weight_hash for folder in (tiny_base, other)]
    assert all(value[:12] in str(caught.value) for value in hashes)
    assert isinstance(load_model(finished.path, base=str(other), allow_base_mismatch=True), AdaptedModel)


def test_a_base_that_has_moved_is_told_and_can_be_named(copied: RunFolder, tiny_base: Path) -> None:
    text = copied.recipe_path.read_text().replace(str(tiny_base), "/gone/base")
    copied.recipe_path.write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model(copied.path)
    assert "the base of this adapter cannot be loaded" in caught.value.what
    assert "--base" in str(caught.value.fix)
    assert isinstance(load_model(copied.path, base=str(tiny_base)), AdaptedModel)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("running", "is not finished: it is still training, or was killed"),
        ("interrupted", "was interrupted before its end"),
        ("failed", "failed: the loss is nan"),
        ("odd", "unknown status 'odd'"),
    ],
)
def test_a_run_that_is_not_finished_is_refused_with_the_way_to_go_on(copied: RunFolder, status: str, said: str) -> None:
    set_status(copied, status=status, error="the loss is nan" if status == "failed" else None)
    with pytest.raises(UsageError) as caught:
        load_model(copied.path)
    assert said in caught.value.what
    assert str(caught.value.fix).endswith(f"veneer train {copied.recipe_path} --resume")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_run_whose_adapter_lacks_a_file_is_refused_by_the_files_name(copied: RunFolder, name: str) -> None:
    (copied.adapter / name).unlink()
    with pytest.raises(AdapterError, match=name):
        load_model(copied.path)


def test_folders_that_are_nothing_say_what_was_expected(copied: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is not a run folder, nor an adapter or a model"):
        load_model(tmp_path / "empty")
    with pytest.raises(UsageError) as caught:
        load_model(tmp_path)  # the folder that the runs lie in
    assert caught.value.fix == f"did you mean {copied.path}?"
    with pytest.raises(UsageError) as caught:
        load_model(tmp_path / "ran")
    assert "no folder" in caught.value.what
    assert caught.value.fix == "Did you mean 'run'?"
    copied.run_json.unlink()
    with pytest.raises(UsageError, match="training never began here"):
        load_model(copied.path)


def test_a_base_is_not_put_on_a_base(tiny_base: Path) -> None:
    with pytest.raises(UsageError, match="is no adapter"):
        load_model(tiny_base, base="smollm2-135m")


def test_the_base_of_a_foreign_adapter_is_the_one_that_peft_recorded(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "revision": "abc"}')
    assert recorded_base(tmp_path) == ("org/base", "abc")
    (tmp_path / "veneer.json").write_text('{"base": {"name": "ours", "revision": null}}')
    assert recorded_base(tmp_path) == ("ours", None)
    (tmp_path / "veneer.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="does not say which base") as caught:
        recorded_base(tmp_path)
    assert "--base" in str(caught.value.fix)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is broken"):
        recorded_base(tmp_path)
