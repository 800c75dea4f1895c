"""The demo's rows as a source that needs no file."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.data.read import read
from veneer.demo.run import write_data
from veneer.errors import DataError
from veneer.files import sha256_file
from veneer.inbox.parts import SOURCES


def test_the_sources_are_the_files_that_the_demo_writes_down_to_the_hash(tmp_path: Path) -> None:
    written = write_data(tmp_path / "data")
    for name, part in SOURCES.items():
        made, from_file = read(name), read(written[part])
        assert [row.to_dict() for row in made.conversations] == [row.to_dict() for row in from_file.conversations]
        assert made.files == {name: sha256_file(written[part])}
        assert (made.source, made.conversations[1].row_id) == (name, f"{name}:2")
    assert [len(read(name)) for name in SOURCES] == [1200, 40, 200]
    assert len(read("demo-train", limit=5)) == 5
    assert read("demo-validation").description.startswith(
        "demo-validation: 40 rows (the demo's rows, made from a seed), read as messages"
    )


def test_a_source_read_twice_is_the_same_and_goes_with_files(tmp_path: Path) -> None:
    assert read("demo-heldout").content_hash == read("demo-heldout").content_hash
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert len(read(["demo-validation", str(tmp_path / "own.jsonl")])) == 41


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-train").mkdir()
    (tmp_path / "demo-train" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert len(read("demo-train")) == 1


def test_a_misspelt_source_names_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no such file") as caught:
        read("demo-validaton")
    assert str(caught.value.fix).startswith("Did you mean 'demo-validation'")
