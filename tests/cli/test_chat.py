"""The REPL: lines in, answers out; histories that stay apart; commands."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.cli.chat import HELP, Room
from veneer.cli.speaker import Sampling, Speaker, open_speaker
from veneer.data import Conversation, Message, render_prompt
from veneer.generate import generate

Cli = Callable[..., Any]


@pytest.fixture
def room(run_folder: Path) -> Room:
    speaker = open_speaker(str(run_folder), dtype="auto", device="cpu", base=None, allow_base_mismatch=False)
    room = Room(speaker, Sampling(max_new_tokens=4), None)
    room.hear("/single")  # the run was trained on single answers; most tests here are about longer conversations
    return room


def expected(room: Room, *messages: Message, adapter: bool) -> str:
    """What the model says to a conversation, asked without the REPL."""
    row = Conversation((*messages, Message("assistant", "")), "x")
    ids = render_prompt(row, room.speaker.base.tokenizer).prompt_ids
    model: Any = room.speaker.model
    if adapter:
        return generate(model, [ids], max_new_tokens=4)[0].text
    with model.disabled():
        return generate(model, [ids], max_new_tokens=4)[0].text


def test_lines_of_a_pipe_are_answered_until_quit(
    cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "said.jsonl"
    lines = [
        "/single",
        "spell 1",
        "",
        "/both",
        "spell 2",
        "/base",
        "/adapter",
        f"/save {saved}",
        "/quit",
        "never heard",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = cli("chat", run_folder, "--max-new-tokens", 4)
    assert done.code == 0
    assert "both, side by side" in done.out
    assert "adapter off" in done.out
    assert "Traceback" not in done.said
    (row,) = saved.read_text().splitlines()
    said = [m["content"] for m in json.loads(row)["messages"] if m["role"] == "user"]
    assert said == ["spell 1", "spell 2"]


def test_the_end_of_the_pipe_is_the_end_of_the_chat(cli: Cli, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert cli("chat", tiny_base, "--max-new-tokens", 2).code == 0


def test_answers_are_the_models_with_all_that_was_said(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    room.hear("/system be brief")
    room.hear("spell 1")
    room.hear("spell 2")
    history = room.histories["adapter"]
    system = Message("system", "be brief")
    assert history[1].content == expected(room, system, history[0], adapter=True)
    assert history[3].content == expected(room, system, *history[:3], adapter=True)
    assert history[3].content in capsys.readouterr().out


def test_the_voices_answer_by_themselves_and_keep_their_own_histories(room: Room) -> None:
    room.hear("spell 1")
    room.hear("/both")
    room.hear("spell 2")
    with_adapter, without = room.histories["adapter"], room.histories["base"]
    assert with_adapter[:2] == without[:2]
    assert with_adapter[3].content == expected(room, *with_adapter[:3], adapter=True)
    assert without[3].content == expected(room, *without[:3], adapter=False)
    assert with_adapter[3] != without[3]
    room.hear("/base")
    assert list(room.histories) == ["base"]
    assert room.histories["base"] == without
    assert room.prompt() == "[base] > "


def test_reset_and_system_begin_anew(room: Room) -> None:
    room.hear("spell 1")
    room.hear("/reset")
    assert room.histories == {"adapter": []}
    room.hear("spell 1")
    room.hear("/system be brief")
    assert room.histories == {"adapter": []}
    assert room.system == "be brief"
    room.hear("/system")
    assert room.system is None


def test_a_base_has_no_adapter_to_switch(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speaker = open_speaker(str(tiny_base), dtype="float32", device="cpu", base=None, allow_base_mismatch=False)
    alone = Room(speaker, Sampling(max_new_tokens=2), None)
    assert alone.prompt() == "> "
    assert alone.hear("/both")
    assert alone.voices == ("base",)
    assert "no adapter" in capsys.readouterr().out


def test_slips_are_answered_and_the_chat_goes_on(
    room: Room, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert room.hear("/hlp")
    assert "Did you mean '/help'?" in capsys.readouterr().out
    assert room.hear("/save x.jsonl")
    assert "nothing has been said yet" in capsys.readouterr().out
    room.hear("spell 1")
    assert room.hear("/save")
    assert "say where" in capsys.readouterr().out
    assert room.hear(f"/save {tmp_path}")
    assert "error:" in capsys.readouterr().err
    assert room.hear("long " * 1000)
    assert "error:" in capsys.readouterr().err
    assert len(room.histories["adapter"]) == 2, "a turn that failed is not remembered"
    assert room.hear("/help")
    helped = capsys.readouterr().out
    assert all(name in helped for name in HELP)
    assert not room.hear("/quit")


def test_an_answer_cut_short_says_so(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    room.hear("spell 1")
    assert "[cut at --max-new-tokens]" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_forgets_the_turn(
    room: Room, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(room.speaker, "answer", interrupt)
    assert room.hear("spell 1")
    assert "stopped" in capsys.readouterr().out
    assert room.histories["adapter"] == []


def test_a_run_of_single_answers_answers_each_message_by_itself(
    room: Room, cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("spell 1\nspell 2"))
    done = cli("chat", run_folder, "--max-new-tokens", 4)
    assert "each message is answered by itself (/single changes that)" in done.err
    assert expected(room, Message("user", "spell 2"), adapter=True) in done.out
    room.hear("/single")
    for text in ("spell 1", "spell 2"):
        room.hear(text)
    assert [message.content for message in room.histories["adapter"]][:1] == ["spell 2"]


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_the_system_message_that_all_training_rows_have_is_used_unless_another_is_given(
    cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    assert (info["data"]["train"]["system"], info["data"]["train"]["single_turn"]) == (None, True)
    info["data"]["train"]["system"] = "answer in capitals"
    (run / "run.json").write_text(json.dumps(info))
    asked: list[tuple[Message, ...]] = []
    render = Speaker.render

    def watched(self: Speaker, conversation: Conversation) -> list[int]:
        asked.append(conversation.messages)
        return render(self, conversation)

    monkeypatch.setattr(Speaker, "render", watched)
    for given in (None, "", "be brief"):
        monkeypatch.setattr("sys.stdin", io.StringIO("spell 1"))
        options = [] if given is None else ["--system", given]
        done = cli(command, run, "--max-new-tokens", 2, *options)
        assert done.code == 0
        assert ("system message of the run: answer in capitals" in done.err) is (given is None)
    firsts = [messages[0] for messages in asked]
    assert [m.content for m in firsts] == ["answer in capitals", "spell 1", "be brief"]
