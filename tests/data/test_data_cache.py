"""The cache of rendered rows: hit when nothing changed, missed when anything did, rebuilt when damaged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_families import family, template_text

from veneer.data import TokenDataset, cache, prepare, read, render
from veneer.errors import UsageError

ROWS = [{"prompt": f"Question {n}", "completion": f"Answer {n}"} for n in range(5)]


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often rows were really rendered."""
    count = [0]

    def counting(*arguments: Any, **options: Any) -> TokenDataset:
        count[0] += 1
        return render(*arguments, **options)

    monkeypatch.setattr(cache, "render", counting)
    return count


def same(a: TokenDataset, b: TokenDataset) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "trained", "offsets"))
    types = all(getattr(a, n).dtype == getattr(b, n).dtype for n in ("input_ids", "trained", "offsets"))
    return arrays and types and a.row_ids == b.row_ids and a.stats == b.stats


def test_the_second_time_comes_from_the_cache_and_is_the_same(tmp_path: Path, rendered: list[int]) -> None:
    rows, tokenizer = read([*ROWS, {"prompt": "long " * 50, "completion": "cut away"}]), family("chatml")
    first = prepare(rows, tokenizer, max_length=60, folder=tmp_path)
    second = prepare(rows, tokenizer, max_length=60, folder=tmp_path)
    assert rendered == [1]
    assert same(first, second)
    assert second.stats.dropped
    assert second.stats.warnings
    assert same(first, render(rows, tokenizer, max_length=60))


def test_whatever_shapes_the_rows_makes_another_entry(tmp_path: Path, rendered: list[int]) -> None:
    base: dict[str, Any] = {"max_length": 60, "train_on": "all", "overlong": "truncate", "chat_template": None}
    rows, tokenizer = read(ROWS), family("chatml")
    other_rows = read([*ROWS[:-1], {"prompt": "Question 4", "completion": "Answer 4!"}])
    other_tokenizer = copy.deepcopy(tokenizer)
    other_tokenizer.add_tokens(["Question"])
    other_template = copy.deepcopy(tokenizer)
    other_template.chat_template = template_text("chatml").replace("helpful", "kind")
    other_special = copy.deepcopy(tokenizer)
    other_special.pad_token = "<|endoftext|>"
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (rows, tokenizer, base),
        (other_rows, tokenizer, base),
        (read(ROWS[::-1]), tokenizer, base),
        (rows, other_tokenizer, base),
        (rows, other_template, base),
        (rows, other_special, base),
        (rows, tokenizer, {**base, "max_length": 61}),
        (rows, tokenizer, {**base, "train_on": "prompt-too"}),
        (rows, tokenizer, {**base, "overlong": "drop"}),
        (rows, tokenizer, {**base, "chat_template": template_text("phi4").replace("<|im_sep|>", ":")}),
    ]
    for number, (some_rows, some_tokenizer, options) in enumerate(calls, 1):
        prepare(some_rows, some_tokenizer, folder=tmp_path, **options)
        assert rendered == [number]
    for some_rows, some_tokenizer, options in calls:
        prepare(some_rows, some_tokenizer, folder=tmp_path, **options)
    assert rendered == [len(calls)]


def test_other_rendering_code_makes_another_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_length": 60, "train_on": "all", "overlong": "truncate", "chat_template": None}
    before = cache.cache_key(read(ROWS), family("chatml"), **options)
    monkeypatch.setattr(cache, "_code_hash", lambda: "other")
    assert cache.cache_key(read(ROWS), family("chatml"), **options) != before


@pytest.mark.parametrize("name", ["input_ids.npy", "trained.npy", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_entry_is_rendered_again_and_mended(
    tmp_path: Path, rendered: list[int], name: str, damage: str
) -> None:
    rows, tokenizer = read(ROWS), family("chatml")
    first = prepare(rows, tokenizer, max_length=60, folder=tmp_path)
    (entry,) = tmp_path.iterdir()
    path = entry / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data.replace(b"row:2", b"row:7") if name == "meta.json" else data[:-1] + bytes([data[-1] ^ 1]))
        assert path.read_bytes() != data
    assert same(prepare(rows, tokenizer, max_length=60, folder=tmp_path), first)
    assert rendered == [2]
    assert same(prepare(rows, tokenizer, max_length=60, folder=tmp_path), first)
    assert rendered == [2]


def test_a_cache_that_cannot_be_written_costs_a_warning_not_the_run(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    dataset = prepare(read(ROWS), family("chatml"), max_length=60, folder=blocked)
    assert len(dataset) == 5
    assert any("were not kept for the next run" in said for said in dataset.stats.warnings)


def test_the_default_folder_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    prepare(read(ROWS), family("chatml"), max_length=60)
    assert len(list((tmp_path / "rendered").iterdir())) == 1


def test_bad_options_are_refused_before_the_cache_is_asked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_length is 0"):
        prepare(read(ROWS), family("chatml"), max_length=0, folder=tmp_path)
