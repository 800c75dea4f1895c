"""The small random models that an alias stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer.errors import ModelError, UsageError
from veneer.files import sha256_file
from veneer.models import load_base, load_tokenizer
from veneer.models.bundled import RANDOM
from veneer.models.source import find
from veneer.models.tiny import random_folder, write_random


@pytest.mark.parametrize("alias", RANDOM)
def test_a_random_model_is_the_same_bytes_each_time_and_draws_from_nobodys_generator(
    alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    folder = random_folder(alias)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert folder.parent == tmp_path / "cache" / "models"
    made = (folder / "config.json").stat().st_mtime_ns
    assert random_folder(alias) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made  # once
    (tmp_path / "again").mkdir()
    write_random(tmp_path / "again", alias)
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    for name in files:
        assert sha256_file(folder / name) == sha256_file(tmp_path / "again" / name)


def test_a_making_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(folder: Path, alias: str) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setattr("veneer.models.tiny.write_random", stopped)
    with pytest.raises(KeyboardInterrupt):
        random_folder("tiny-random-moe")
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize(("alias", "kind"), [("tiny-random-moe", "qwen3_moe"), ("tiny-random-hybrid", "bamba")])
def test_an_alias_loads_as_a_base_of_its_architecture_under_its_own_name(alias: str, kind: str) -> None:
    base = load_base(alias, dtype="float32", device="cpu")
    assert base.module.config.model_type == kind
    assert (base.identity.name, base.identity.revision, base.spec) == (alias, None, alias)
    tokenizer = load_tokenizer(alias)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Where is it?"}], return_dict=False)
    assert base.module(torch.tensor([ids])).logits.isfinite().all()


def test_an_alias_has_no_revision_and_a_misspelt_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="has no revision 'main'"):
        find("tiny-random-moe", "main", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        find("./tiny-random-mo", None, False)
    assert "'tiny-random-moe'" in str(caught.value.fix)


def test_a_missing_base_says_what_is_near_or_what_a_base_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fix(spec: str) -> str:
        with pytest.raises(ModelError) as caught:
            find(spec, None, False)
        return str(caught.value.fix)

    monkeypatch.chdir(tmp_path)
    assert fix("runs/tiny/moe") == (
        "the folder 'runs/tiny' does not exist either; name a model's folder, a .gguf file, a hub id, or one of "
        "smollm2-135m, tiny-random-moe, tiny-random-hybrid"
    )
    (tmp_path / "runs" / "tiny2" / "llama").mkdir(parents=True)
    assert fix("runs/tiny/moe").startswith("the folder 'runs/tiny' does not exist either; did you mean 'runs/tiny2'?")
    assert fix("runs/tiny2/zzz").startswith("name a model's folder")
    (tmp_path / "runs" / "tiny2" / "llama" / "config.json").write_text("{}")
    assert fix("runs/tiny2/zzz") == "models there: runs/tiny2/llama"
