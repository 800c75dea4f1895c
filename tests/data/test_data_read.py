"""Reading: every shape and file type that is promised, and the message that each kind of broken file gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.data import Message, Rows, read
from veneer.errors import DataError, UsageError


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def turns(rows: Rows, index: int = 0) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in rows.conversations[index].messages]


HELLO = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            "messages",
            HELLO,
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "sharegpt", HELLO),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            "sharegpt",
            [("system", "Be kind."), *HELLO],
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "alpaca",
            [("user", "Add\n\n1 2"), ("assistant", "3")],
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", HELLO),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt-completion", HELLO),
        ({"question": "Hi", "answer": "Hello"}, "prompt-completion", HELLO),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
            "prompt-completion",
            HELLO,
        ),
    ],
)
def test_a_shape_is_recognised_and_said(row: dict[str, Any], format: str, expected: list[tuple[str, str]]) -> None:
    rows = read([row])
    assert (rows.format, turns(rows)) == (format, expected)
    assert f"read as {format}" in rows.description


def test_raw_text_is_recognised() -> None:
    rows = read([{"text": "Once upon a time"}])
    assert (rows.format, rows.conversations[0].text, rows.conversations[0].messages) == ("text", "Once upon a time", ())


def test_columns_name_the_prompt_and_the_answer_and_the_rest_is_said_to_be_unused() -> None:
    row = {"id": 7, "ticket": "Hi", "reply": "Hello"}
    rows = read([row], columns={"prompt": "ticket", "completion": "reply"})
    assert turns(rows) == HELLO
    assert "prompt: 'ticket', completion: 'reply'" in rows.description
    assert "not used: 'id'" in rows.description


def test_a_format_that_is_given_goes_before_the_detection() -> None:
    row = {"text": "Once", "prompt": "Hi", "completion": "Hello"}
    assert read([row]).format == "prompt-completion"
    assert read([row], format="text").conversations[0].text == "Once"


def test_numbers_are_read_as_text_and_other_things_are_refused() -> None:
    assert turns(read([{"prompt": "2+2", "completion": 4}]))[1] == ("assistant", "4")
    with pytest.raises(DataError, match="column 'completion' holds dict, not text"):
        read([{"prompt": "Hi", "completion": {"a": 1}}])


def test_history_inside_a_prompt_is_not_trained_on() -> None:
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = read([{"prompt": history, "completion": [{"role": "assistant", "content": "d"}]}])
    assert [message.train for message in rows.conversations[0].messages] == [None, False, None, None]


def test_tools_and_tool_calls_survive_with_arguments_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "Rome"}'}}
    row = {
        "tools": json.dumps([{"name": "look", "parameters": {}}]),
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "look"},
            {"role": "assistant", "content": "21 degrees", "weight": 0},
        ],
    }
    conversation = read([row]).conversations[0]
    assert conversation.tools == ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    assert conversation.messages[1].tool_calls[0]["function"] == {"name": "look", "arguments": {"at": "Rome"}}
    assert conversation.messages[2] == Message("tool", "21", name="look", extra={"tool_call_id": "c1"})
    assert conversation.messages[3].train is False


def test_sharegpts_function_calls_become_tool_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "Rome"}}'},
            {"from": "observation", "value": "21"},
            {"from": "gpt", "value": "21 degrees"},
        ]
    }
    messages = read([row]).conversations[0].messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1].tool_calls[0]["function"]["arguments"] == {"at": "Rome"}


def test_content_parts_are_joined_and_pictures_refused() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    answer = {"role": "assistant", "content": "Hello"}
    assert turns(read([{"messages": [{"role": "user", "content": parts}, answer]}]))[0] == ("user", "Hi there")
    with pytest.raises(DataError, match="content part of type 'image_url'"):
        read([{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, answer]}])


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = [{"prompt": 'Hi, "you"\nthere\u2028!', "completion": "Hello"}, {"prompt": "Grüß dich", "completion": "🍇"}]
    expected = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in data]
    quoted = "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) + "\r\n" for row in data)
    files = [
        write(tmp_path, "a.jsonl", lines(*data)),
        write(tmp_path, "b.json", json.dumps(data, indent=2)),
        write(tmp_path, "c.json", json.dumps({"version": 1, "data": data})),
        write(tmp_path, "d.json", lines(*data)),
        write(tmp_path, "e.csv", "\ufeffprompt,completion\r\n" + quoted),
        write(tmp_path, "f.csv", "prompt;completion\n" + quoted.replace('","', '";"').replace("\r\n", "\n")),
        write(tmp_path, "g.tsv", "prompt\tcompletion\n" + quoted.replace('","', '"\t"').replace("\r\n", "\n")),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "h.parquet")
    for path in [*files, tmp_path / "h.parquet"]:
        rows = read(path)
        assert [turns(rows, index) for index in range(len(rows))] == expected, path.name


def test_row_ids_are_the_lines_of_the_file(tmp_path: Path) -> None:
    one, two = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}
    assert [r.row_id for r in read(write(tmp_path, "t.jsonl", lines(one) + "\n\n" + lines(two))).conversations] == [
        "t.jsonl:1",
        "t.jsonl:4",
    ]
    table = 'prompt,completion\n"a\nb",c\nd,e\n'
    assert [r.row_id for r in read(write(tmp_path, "t.csv", table)).conversations] == ["t.csv:2", "t.csv:4"]
    text = "First line\nof one text.\n\n\nSecond text.\n"
    rows = read(write(tmp_path, "t.txt", text))
    assert [(r.row_id, r.text) for r in rows.conversations] == [
        ("t.txt:1", "First line\nof one text."),
        ("t.txt:5", "Second text."),
    ]
    assert "blank lines separate the texts" in rows.description


def test_parquet_does_not_add_the_keys_of_other_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def row(**arguments: Any) -> dict[str, Any]:
        call = {"function": {"name": "look", "arguments": arguments}}
        return {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        }

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(city="Rome"), row(day=1)]), tmp_path / "t.parquet")
    calls = [r.messages[1].tool_calls[0]["function"]["arguments"] for r in read(tmp_path / "t.parquet").conversations]
    assert calls == [{"city": "Rome"}, {"day": 1}]


def test_a_folder_is_read_file_by_file_and_its_splits_stay_apart(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    write(tmp_path, "x/one.jsonl", lines(row))
    write(tmp_path, "x/sub/two.json", json.dumps([row]))
    write(tmp_path, "x/README.md", "About")
    write(tmp_path, "x/.hidden.jsonl", "broken")
    assert [r.row_id for r in read(tmp_path / "x").conversations] == ["one.jsonl:1", "sub/two.json:1"]
    for name in ("train", "valid", "test"):
        write(tmp_path, f"y/{name}.jsonl", lines({"prompt": name, "completion": "b"}))
    assert turns(read(tmp_path / "y"))[0] == ("user", "train")
    assert turns(read(tmp_path / "y", split="validation"))[0] == ("user", "valid")
    assert "the train split: train.jsonl" in read(tmp_path / "y").description
    with pytest.raises(DataError, match="no files of the split 'dpo'"):
        read(tmp_path / "y", split="dpo")
    (tmp_path / "z").mkdir()
    with pytest.raises(DataError, match="holds no file that can be read"):
        read(tmp_path / "z")


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    a = write(tmp_path, "a.jsonl", lines({"prompt": "a", "completion": "b"}))
    b = write(tmp_path, "b.jsonl", lines({"text": "c"}, {"text": "d"}))
    rows = read([a, b])
    assert [r.row_id for r in rows.conversations] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert (rows.format, set(rows.files)) == ("mixed", {str(a), str(b)})
    assert len(read([a, b], limit=2)) == 2


def test_a_limit_takes_the_first_rows_and_does_not_look_further(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", lines({"text": "a"}, {"text": "b"}) + "{broken\n")
    assert [r.text for r in read(path, limit=2).conversations] == ["a", "b"]
    with pytest.raises(UsageError, match="the limit of rows is 0"):
        read(path, limit=0)


GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_FILES = [
    ("t.jsonl", "", "the file is empty", "t.jsonl"),
    ("t.jsonl", "\n \n", "there are no rows", "t.jsonl"),
    ("t.json", "[]", "there are no rows", "t.json"),
    ("t.json", " \n", "the file is empty", "t.json"),
    (
        "t.jsonl",
        GOOD * 6 + '{"prompt": "a", "completion" "b"}\n',
        "broken JSON: Expecting ':' delimiter (column 30)",
        "t.jsonl:7",
    ),
    ("t.json", '[\n{"prompt": "a"},\n{"prompt" 1}]', "broken JSON", "t.json:3"),
    (
        "t.jsonl",
        GOOD + '{"prompt": "a"}\n',
        "column 'completion' is missing in this row (its columns: prompt)",
        "t.jsonl:2",
    ),
    ("t.jsonl", GOOD + '{"prompt": "a", "completion": null}\n', "column 'completion' is null", "t.jsonl:2"),
    (
        "t.jsonl",
        GOOD + '{"prompt": "a", "prompt": "c", "completion": "b"}\n',
        "the key 'prompt' stands twice",
        "t.jsonl:2",
    ),
    ("t.jsonl", GOOD + "[1, 2]\n", "this row is list, not an object", "t.jsonl:2"),
    ("t.jsonl", '{"a": 1, "b": 2}\n', "no known shape has the columns 'a', 'b'", "t.jsonl"),
    (
        "t.jsonl",
        '{"messages": [{"role": "asistant", "content": "x"}]}',
        "unknown role 'asistant'",
        "t.jsonl:1, message 1",
    ),
    (
        "t.jsonl",
        '{"messages": [{"content": "x"}]}',
        "a message has no role (its keys: content)",
        "t.jsonl:1, message 1",
    ),
    ("t.jsonl", '{"messages": [{"role": "user"}]}', "a message has no content", "t.jsonl:1, message 1"),
    (
        "t.jsonl",
        '{"messages": [{"role": "user", "content": 7}]}',
        "the content is a number, not text",
        "t.jsonl:1, message 1",
    ),
    ("t.jsonl", '{"messages": "hello"}', "the messages are text, not a list", "t.jsonl:1"),
    ("t.jsonl", '{"messages": []}', "the list of messages is empty", "t.jsonl:1"),
    ("t.jsonl", '{"messages": ["x"]}', "a message is text, not an object", "t.jsonl:1, message 1"),
    (
        "t.jsonl",
        '{"messages": [{"role": "user", "content": "x", "train": true}]}',
        "'train' is set on a user turn",
        "t.jsonl:1",
    ),
    (
        "t.jsonl",
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{bad"}}]}]}',
        "the arguments of 'f' are not valid JSON",
        "t.jsonl:1, message 1",
    ),
    (
        "t.jsonl",
        '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}',
        "a tool call has no function name",
        "t.jsonl:1",
    ),
    ("t.jsonl", '{"text": "x", "label": 1}', "a 'text' column and a 'label' column", "t.jsonl"),
    ("t.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "the file is not UTF-8: byte 0xe9 at offset 27", "t.jsonl:2"),
    ("t.jsonl", '{"text": "x"}'.encode("utf-16"), "the file is UTF-16, not UTF-8", "t.jsonl"),
    ("t.json", '{"prompt": "a", "completion": "b"}', "the JSON file is one object, not a list of rows", "t.json"),
    ("t.json", '"x"', "the JSON file is not a list of rows", "t.json"),
    ("t.csv", "prompt,completion\na,b\nc\n", "this row has 1 cells and the header has 2 columns", "t.csv:3"),
    ("t.csv", 'prompt,completion\na,"b\n', "broken CSV", "t.csv:2"),
    ("t.csv", "prompt,prompt\na,b\n", "the column 'prompt' stands twice in the header", "t.csv:1"),
    ("t.csv", "prompt,completion\n", "there are no rows", "t.csv"),
    ("t.parquet", "PAR1 not really", "the file is not Parquet, or it is cut off", "t.parquet"),
    ("t.xlsx", "x", "files of type '.xlsx' cannot be read", "t.xlsx"),
]


@pytest.mark.parametrize(
    ("name", "text", "what", "where"), BAD_FILES, ids=[f"{n}:{w[:40]}" for n, _, w, _ in BAD_FILES]
)
def test_a_bad_file_is_refused_with_the_line_and_a_way_out(
    tmp_path: Path, name: str, text: str | bytes, what: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, name, text))
    assert what in caught.value.what
    assert where in (caught.value.where or "")
    assert caught.value.fix


def test_a_misspelt_role_names_the_nearest_one() -> None:
    with pytest.raises(DataError) as caught:
        read([{"messages": [{"role": "asistant", "content": "x"}]}])
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("Did you mean 'assistant'")


def test_a_missing_file_names_the_nearest_ones(tmp_path: Path) -> None:
    write(tmp_path, "tickets.jsonl", GOOD)
    write(tmp_path, "notes.csv", "a")
    with pytest.raises(DataError, match="there is no such file") as caught:
        read(tmp_path / "tikets.jsonl")
    assert caught.value.fix == f"Did you mean '{tmp_path / 'tickets.jsonl'}'?"
    with pytest.raises(DataError) as caught:
        read(tmp_path / "zzz")
    assert caught.value.fix == "data files there: notes.csv, tickets.jsonl"
    with pytest.raises(DataError) as caught:
        read(tmp_path / "gone" / "deep.jsonl")
    assert "does not exist either; give a file that is there, or the demo's rows: demo-train" in str(caught.value)


def test_a_wrong_column_or_format_is_a_usage_error_with_the_nearest_name() -> None:
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(UsageError) as caught:
        read(rows, columns={"prompt": "qestion", "completion": "answer"})
    assert "there is no column 'qestion'" in str(caught.value)
    assert "'question'" in (caught.value.fix or "")
    with pytest.raises(UsageError) as caught:
        read(rows, columns={"promt": "question"})
    assert "'prompt'" in (caught.value.fix or "")
    with pytest.raises(UsageError, match="unknown data format 'sharegtp'") as caught:
        read(rows, format="sharegtp")
    assert "'sharegpt'" in (caught.value.fix or "")
    with pytest.raises(DataError, match="the alpaca shape needs the column 'instruction'"):
        read(rows, format="alpaca")


def test_labels_can_be_learnt_by_naming_the_columns() -> None:
    rows = read([{"text": "Great!", "label": 1}], columns={"prompt": "text", "completion": "label"})
    assert turns(rows) == [("user", "Great!"), ("assistant", "1")]


def test_a_hub_dataset_that_cannot_be_had_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="the hub dataset could not be loaded") as caught:
        read("nobody/no-such-dataset")
    assert caught.value.where == "nobody/no-such-dataset"


def test_a_hub_dataset_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("openai/gsm8k:main", split="test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [r.row_id for r in rows.conversations] == ["openai/gsm8k[test]:1", "openai/gsm8k[test]:2"]
    assert turns(rows, 1) == [("user", "c"), ("assistant", "d")]


def test_the_content_hash_follows_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "note": "x"}
    one = read(write(tmp_path, "t.jsonl", lines(row)))
    spaced = read(
        write(tmp_path, "s/t.jsonl", json.dumps({**row, "note": "other"}, indent=None, separators=(" , ", " : ")))
    )
    assert one.content_hash == spaced.content_hash
    assert one.files != spaced.files
    other = read(write(tmp_path, "o/t.jsonl", lines({**row, "completion": "c"})))
    assert one.content_hash != other.content_hash
    swapped = read(tmp_path / "t.jsonl", columns={"prompt": "completion", "completion": "prompt"})
    assert one.content_hash != swapped.content_hash


def test_the_group_is_the_prompt_without_case_and_spacing() -> None:
    rows = read([{"prompt": "What  is\nit?", "completion": "a"}, {"prompt": "what is it?", "completion": "b"}])
    assert rows.conversations[0].group == rows.conversations[1].group == "what is it?"
    assert rows.conversations[0].digest != rows.conversations[1].digest


def test_reading_and_checking_import_neither_torch_nor_transformers_nor_datasets(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", GOOD)
    code = (
        "import sys\nfrom veneer.data import check, read, split\n"
        f"print(check(read({str(path)!r})).exit_status)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["0", "[]"]


def test_a_name_of_the_package_stays_a_function_after_its_module_is_imported() -> None:
    import veneer.data
    import veneer.data.check
    import veneer.data.pack
    import veneer.data.read
    import veneer.data.render
    import veneer.data.split

    for name in ("read", "render", "check", "split", "show", "collate_packed"):
        assert callable(getattr(veneer.data, name)), name
    with pytest.raises(AttributeError, match="no attribute 'raed'"):
        veneer.data.raed  # noqa: B018 - the access is the test
