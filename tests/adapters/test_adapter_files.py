"""Adapter folders: the same bytes every time, strict reading, the right base, and nothing half done."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.adapters import LoraConfig, attach, load_adapter, read_record
from veneer.errors import AdapterError, StorageError

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "veneer.json"


@dataclass
class Identity:
    name: str
    weight_hash: str
    revision: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "weight_hash": self.weight_hash, "revision": self.revision}


@dataclass
class Base:
    module: nn.Module
    identity: Identity = field(default_factory=lambda: Identity("tiny", "aaaa"))


@pytest.fixture
def saved(llama, ids, train, tmp_path):
    """A trained adapter with something of every kind, on disk, and its logits."""
    config = LoraConfig(r=4, modules_to_save=["model.norm"], trainable_token_indices=[5, 1, 3], lora_dropout=0.1)
    adapted = attach(Base(llama(tied=True)), config, seed=0)
    train(adapted, ids)
    folder = adapted.save(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.module(ids).logits
    return SimpleNamespace(folder=folder, adapted=adapted, logits=expected)


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder, **changes):
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(data | changes))


def test_a_loaded_adapter_gives_the_saved_logits_bit_for_bit(llama, ids, run, saved):
    adapted = load_adapter(llama(tied=True), saved.folder)
    assert torch.equal(run(adapted.module, ids), saved.logits)
    state, expected = adapted.state(), saved.adapted.state()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_two_saves_have_equal_bytes_also_after_a_load(llama, saved, tmp_path):
    files = {path.name: path.read_bytes() for path in saved.folder.iterdir()}
    assert sorted(files) == [CONFIG, WEIGHTS, RECORD]
    loaded = load_adapter(Base(llama(tied=True)), saved.folder, name="other")
    for folder in (saved.adapted.save(tmp_path / "second"), loaded.save(tmp_path / "third")):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_the_order_in_which_names_were_given_does_not_reach_the_file(llama, tmp_path):
    given = (["v_proj", "q_proj", "o_proj"], ("o_proj", "v_proj", "q_proj"), {"q_proj", "o_proj", "v_proj"})
    for number, names in enumerate(given):
        attach(llama(), LoraConfig(r=2, target_modules=names), seed=0).save(tmp_path / str(number))
    for name in (CONFIG, WEIGHTS, RECORD):
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(3)}) == 1


def test_the_file_says_that_it_is_torchs_and_holds_contiguous_float32(saved):
    with safe_open(saved.folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {t.dtype for t in load_file(saved.folder / WEIGHTS).values()} == {torch.float32}


def test_the_weights_can_be_read_by_whoever_can_read_the_config(saved):
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.folder.iterdir()}
    assert modes[WEIGHTS] == modes[CONFIG]


def test_the_record_names_the_base_and_keeps_extra_notes(llama, tmp_path):
    adapted = attach(Base(llama()), LoraConfig(r=2))
    folder = adapted.save(tmp_path / "a", extra={"recipe": "x.yaml"})
    record = read_record(folder)
    assert record["base"] == {"name": "tiny", "weight_hash": "aaaa", "revision": None}
    assert record["recipe"] == "x.yaml"
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "tiny"


def test_an_adapter_of_another_base_is_refused_with_both_hashes(llama, saved):
    module = llama(tied=True)
    other = Base(module, Identity("other", "bbbb"))
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, saved.folder)
    assert "aaaa" in caught.value.what
    assert "bbbb" in caught.value.what
    assert "allow" in caught.value.fix
    assert all(p.requires_grad for p in module.parameters())
    assert load_adapter(other, saved.folder, allow_base_mismatch=True).active == "default"


def test_saving_again_replaces_the_adapter_and_spares_other_files(saved):
    saved.adapted.save(saved.folder)
    (saved.folder / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        saved.adapted.save(saved.folder)
    assert (saved.folder / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_adapter(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("veneer.adapters.save.save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        saved.adapted.save(saved.folder)
    assert {p.name: p.read_bytes() for p in saved.folder.iterdir()} == before
    assert [p.name for p in saved.folder.parent.iterdir()] == [saved.folder.name]


def _damage(how, folder):
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if how == "truncated":
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    elif how == "empty":
        (folder / WEIGHTS).write_bytes(b"")
    elif how == "no weights":
        (folder / WEIGHTS).unlink()
    elif how == "pickle":
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    elif how == "no config":
        (folder / CONFIG).unlink()
    elif how == "config is no json":
        (folder / CONFIG).write_text('{"r": 4')
    elif how == "config is a list":
        (folder / CONFIG).write_text("[]")
    elif how == "record is no json":
        (folder / RECORD).write_text("{")
    elif how == "missing key":
        rewrite(folder, lambda t: t.pop(first))
    elif how == "renamed key":
        rewrite(folder, lambda t: t.update({first.replace("q_proj", "q_porj"): t.pop(first)}))
    elif how == "other prefix":
        rewrite(folder, lambda t: [t.update({k.removeprefix("base_model."): t.pop(k)}) for k in list(t)])
    elif how == "extra key":
        rewrite(folder, lambda t: t.update({first.replace("lora_A", "lora_C"): torch.zeros(1)}))
    elif how == "wrong shape":
        rewrite(folder, lambda t: t.update({first: t[first][:2].clone()}))
    elif how == "NaN":
        rewrite(folder, lambda t: t[first].fill_(float("nan")))
    elif how == "other rank":
        reconfigure(folder, r=8)
    elif how == "dora":
        reconfigure(folder, use_dora=True)
    elif how == "token out of range":
        reconfigure(folder, trainable_token_indices=[5, 1, 300])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "cannot read the weights"),
        ("empty", "cannot read the weights"),
        ("no weights", "the weights are missing"),
        ("pickle", "a pickle"),
        ("no config", "there is no adapter here"),
        ("config is no json", "cannot be read as JSON"),
        ("config is a list", "a JSON object"),
        ("record is no json", "cannot be read as JSON"),
        ("missing key", r"missing tensor 'base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight'"),
        ("renamed key", r"q_porj(.|\n)*Did you mean 'base_model\.model\.model\.layers\.0\.self_attn\.q_proj"),
        ("other prefix", r"unknown tensor 'model\.model(.|\n)*Did you mean 'base_model\.model"),
        ("extra key", r"unknown tensor '.*lora_C"),
        ("wrong shape", r"is \[2, 32\], but \[4, 32\] is expected"),
        ("NaN", "NaN or Inf"),
        ("other rank", r"but \[8, 32\] is expected"),
        ("dora", r"missing tensor '.*lora_magnitude_vector'"),
        ("token out of range", "there is no token 300"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_base_stays_as_it_was(llama, ids, run, saved, how, says):
    _damage(how, saved.folder)
    module = llama(tied=True)
    base, before = run(module, ids), [type(m) for m in module.modules()]
    with pytest.raises(AdapterError, match=says) as caught:
        load_adapter(Base(module), saved.folder)
    assert str(saved.folder) in str(caught.value) or "LoraConfig" in str(caught.value)
    assert [type(m) for m in module.modules()] == before
    assert torch.equal(run(module, ids), base)
    assert all(p.requires_grad for p in module.parameters())


def test_a_folder_that_is_not_there_is_said(llama, tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(llama(), tmp_path / "nowhere")


def test_a_pickle_beside_safetensors_is_not_read(llama, ids, run, saved):
    (saved.folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    adapted = load_adapter(llama(tied=True), saved.folder)
    assert torch.equal(run(adapted.module, ids), saved.logits)


def test_a_second_adapter_is_loaded_beside_the_first_or_not_at_all(llama, ids, run, saved):
    adapted = attach(Base(llama(tied=True)), LoraConfig(r=2, target_modules=["q_proj"]), name="a", seed=0)
    first = run(adapted.module, ids)
    load_adapter(adapted, saved.folder, name="b")
    assert adapted.active == "b"
    assert torch.equal(run(adapted.module, ids), saved.logits)
    adapted.use("a")
    assert torch.equal(run(adapted.module, ids), first)
    _damage("missing key", saved.folder)
    with pytest.raises(AdapterError, match="missing tensor"):
        load_adapter(adapted, saved.folder, name="c")
    assert (list(adapted.configs), adapted.active) == (["a", "b"], "a")
    assert torch.equal(run(adapted.module, ids), first)
