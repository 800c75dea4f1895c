"""Which model it is: by content, at every path, and hashed again whenever a file may have changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.errors import ModelError
from veneer.files import sha256_file
from veneer.models import BaseIdentity, load_base
from veneer.models import identity as identity_module
from veneer.models.identity import cached_sha256, hash_files, hash_template, hash_tokenizer_files


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def age(path: Path, seconds: float = 60) -> None:
    """As if the file had been written a while ago: what has just been written is not trusted to be settled."""
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were really read, with a clock that says a minute has passed since they were written."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []
    real = sha256_file

    def counted(path: Path) -> str:
        read.append(Path(path))
        return real(path)

    monkeypatch.setattr(identity_module, "sha256_file", counted)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 60 * 10**9)
    return read


def test_the_same_files_at_another_path_are_the_same_model(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    here, there = load_base(tiny_base, dtype="float32").identity, load_base(copy, dtype="float32").identity
    assert here == there
    assert (here.name, there.name) == (str(tiny_base), str(copy))
    assert here.weight_hash == digest((tiny_base / "model.safetensors").read_bytes())


def test_other_weights_another_tokenizer_and_another_template_are_told_apart(
    tiny_base: Path, make_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    first = load_base(tiny_base, dtype="float32").identity
    other = load_base(make_tiny_base(seed=5), dtype="float32").identity
    assert other == dataclasses.replace(first, weight_hash=other.weight_hash)
    assert other.weight_hash != first.weight_hash
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    template = load_base(copy, dtype="float32").identity
    assert template == dataclasses.replace(first, template_hash=digest(b"{{ messages }}"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    changed = load_base(copy, dtype="float32").identity
    assert changed.tokenizer_hash != first.tokenizer_hash
    assert changed.weight_hash == first.weight_hash


def test_the_dtype_of_a_load_does_not_change_the_model(tiny_base: Path) -> None:
    assert load_base(tiny_base, dtype="bfloat16").identity == load_base(tiny_base, dtype="float32").identity


def test_several_files_hash_to_what_sha256sum_of_their_listing_prints(tmp_path: Path) -> None:
    parts = {"b.safetensors": b"two", "a.safetensors": b"one"}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    listing = "".join(f"{digest(parts[name])}  {name}\n" for name in sorted(parts))
    assert hash_files([tmp_path / name for name in parts]) == digest(listing.encode())
    assert hash_files([tmp_path / "b.safetensors"]) == digest(b"two")


def test_a_template_inside_the_tokenizers_configuration_is_not_part_of_its_hash(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    plain = hash_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "t", "eos_token": "x"}')
    assert hash_tokenizer_files(tmp_path) == plain
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "t", "eos_token": "y"}')
    assert hash_tokenizer_files(tmp_path) != plain
    assert hash_template(None) == hash_template("") == digest(b"")
    assert hash_template("a") != hash_template({"default": "a"})


def test_an_unchanged_file_is_read_once(hashed: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100)
    assert {cached_sha256(file) for _ in range(3)} == {digest(b"x" * 100)}
    assert cached_sha256(str(tmp_path / "." / "weights")) == digest(b"x" * 100)
    assert len(hashed) == 1


def test_a_file_replaced_by_one_of_the_same_size_and_date_is_read_again(hashed: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100)
    age(file)
    stamp = file.stat()
    cached_sha256(file)
    file.write_bytes(b"y" * 100)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_mtime_ns == stamp.st_mtime_ns
    assert cached_sha256(file) == digest(b"y" * 100)
    assert len(hashed) == 2


def test_a_file_written_a_moment_ago_is_not_remembered(
    hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    monkeypatch.setattr(time, "time_ns", lambda: file.stat().st_mtime_ns + 10**9)
    cached_sha256(file)
    cached_sha256(file)
    assert len(hashed) == 2


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"path": 1}', b"\xff\xfe"])
def test_a_broken_index_only_costs_time(broken: bytes, hashed: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    cached_sha256(file)
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    entry.write_bytes(broken)
    assert cached_sha256(file) == digest(b"x")
    assert len(hashed) == 2


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(
    hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in the way").write_text("a file")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "in the way"))
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    assert cached_sha256(file) == digest(b"x")


def test_an_identity_survives_json_and_refuses_what_it_is_not() -> None:
    identity = BaseIdentity("hub/model", "abc", "w", "t", "c")
    record = json.loads(json.dumps(identity.to_dict()))
    assert BaseIdentity.from_dict(record) == identity
    assert BaseIdentity.from_dict(record).revision == "abc"
    for wrong in ({**record, "extra": 1}, {k: v for k, v in record.items() if k != "weight_hash"}):
        with pytest.raises(ModelError, match=r"not a record of a base model: (extra|weight_hash)"):
            BaseIdentity.from_dict(wrong)
