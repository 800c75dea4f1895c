"""What a chat template leaves out without a word is refused; and generation blocks are held against the real prompt."""

from __future__ import annotations

import pytest
from data_families import byte_level, family, template_text

from veneer.data import Conversation, Message, render, render_prompt, stop_token_ids
from veneer.data.show import marked_text
from veneer.errors import DataError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def row(*messages: Message, tools: tuple[dict[str, object], ...] = ()) -> Conversation:
    return Conversation(messages, "row:1", tools)


USER, ANSWER = Message("user", "Hi there"), Message("assistant", "Hello!")


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("llama3", row(USER, ANSWER, tools=(TOOL,)), r"leaves out the row's tools \(weather\)"),
        ("llama3", row(USER, Message("assistant", "", (CALL,))), r"leaves out the tool call of turn 2 \(weather\)"),
        (
            "phi3",
            row(USER, ANSWER, Message("tool", "21"), Message("assistant", "ok")),
            r"leaves out message 3 \(tool\)",
        ),
        (
            "chatml",
            row(USER, Message("assistant", "Fig.", extra={"reasoning_content": "Think."})),
            r"leaves out the reasoning of turn 2 \('reasoning_content'\)",
        ),
    ],
)
def test_a_template_that_drops_part_of_a_row_is_refused(name: str, conversation: Conversation, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        render([conversation], family(name), max_length=None)
    assert caught.value.where == "row:1"
    assert "template that knows" in (caught.value.fix or "")


def test_reasoning_that_is_dropped_from_an_earlier_turn_is_refused_too() -> None:
    thinking = Message("assistant", "Fig.", extra={"reasoning_content": "Think."})
    with pytest.raises(DataError, match="leaves out the reasoning of turn 2"):
        render([row(USER, thinking, USER, ANSWER)], family("chatml"), max_length=None)


def test_a_call_ends_like_an_answer_where_the_template_closes_the_text_with_more() -> None:
    # Phi-3 writes an eos after the last turn: that is not what ends a call.
    template = template_text("phi3").replace(
        "{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}",
        "{{- '<|assistant|>\\n' + message['content'] }}{{- message.tool_calls | tojson if message.tool_calls }}"
        "{{- '<|end|>\\n' }}",
    )
    assert template != template_text("phi3")
    tokenizer = family("phi3")
    example = render([row(USER, Message("assistant", "", (CALL,)))], tokenizer, max_length=None, chat_template=template)
    assert marked_text(example.row(0), tokenizer).endswith('"Rome"}}}]<|end|>⟧<|endoftext|>')
    assert stop_token_ids(tokenizer, template) == set(tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]))


def test_another_rendering_than_transformers_own_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template_text("chatml"), eos_token="<|im_end|>")
    assert len(render([row(USER, ANSWER)], tokenizer, max_length=None)) == 1
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: "something else")
    with pytest.raises(DataError, match="renders the chat template differently"):
        render([row(USER, ANSWER)], tokenizer, max_length=None)


def test_a_template_that_drops_the_answer_is_refused() -> None:
    # It writes answers of six characters alone: the probe for the stop token has six, this answer five.
    deaf = template_text("chatml").replace(
        "message['content'] + '<|im_end|>'",
        "(message['content'] if message.role == 'user' or message['content'] | length == 6 else '') + '<|im_end|>'",
    )
    with pytest.raises(DataError, match="leaves out the content of turn 2"):
        # The template writes only what holds QW, so its probe passes and the row's own answer is lost.
        render(
            [row(USER, Message("assistant", "Hello", name="x"))], family("chatml"), max_length=None, chat_template=deaf
        )


def test_content_that_is_written_in_another_way_is_not_left_out() -> None:
    # Llama 3.1's own template writes a tool's result through tojson, which quotes it.
    quoting = template_text("llama31").replace("{{- message.content }}", "{{- message.content | tojson }}")
    conversation = row(
        USER,
        Message("assistant", "", (CALL,)),
        Message("tool", '{"c": "21"}'),
        Message("assistant", "21"),
        tools=(TOOL,),
    )
    example = render([conversation], family("llama31"), max_length=None, chat_template=quoting).row(0)
    assert '"{\\"c\\": \\"21\\"}"<|eot_id|>' in marked_text(example, family("llama31"))


def test_a_generation_block_that_begins_before_the_prompts_end_is_cut_to_what_is_generated() -> None:
    early = template_text("chatml_generation").replace(
        "{{- '<|im_start|>assistant\\n' }}\n{%- generation %}{{-",
        "{{- '<|im_start|>' }}{%- generation %}{{- 'assistant\\n' +",
    )
    assert early != template_text("chatml_generation")
    tokenizer = family("chatml")
    dataset = render([row(USER, ANSWER)], tokenizer, max_length=None, chat_template=early)
    assert marked_text(dataset.row(0), tokenizer).endswith("assistant\n⟦Hello!<|im_end|>⟧\n")
    assert not dataset.stats.warnings


def test_a_generation_block_that_the_prompt_does_not_lead_up_to_is_trained_and_said() -> None:
    thinking = template_text("chatml_generation").replace(
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}",
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>' }}",
    )
    assert thinking != template_text("chatml_generation")
    tokenizer = family("chatml")
    dataset = render([row(USER, ANSWER)], tokenizer, max_length=None, chat_template=thinking)
    assert marked_text(dataset.row(0), tokenizer).endswith("assistant\n⟦Hello!<|im_end|>⟧\n")
    assert any("other beginnings than it will be given: 1 row (row:1)" in said for said in dataset.stats.warnings)


def test_a_turn_without_its_generation_block_is_refused() -> None:
    first_only = template_text("chatml_generation").replace(
        "{%- if message['role'] == 'assistant' %}", "{%- if message['role'] == 'assistant' and loop.index0 < 2 %}"
    )
    with pytest.raises(DataError, match=r"renders none for turn 4"):
        render([row(USER, ANSWER, USER, ANSWER)], family("chatml"), max_length=None, chat_template=first_only)


def test_marks_in_the_text_are_refused_where_they_would_move_the_mask() -> None:
    with pytest.raises(DataError, match=r"noncharacters U\+FDD0"):
        render([row(USER, Message("assistant", "a\ufdd0b"))], family("chatml_generation"), max_length=None)


def test_a_tool_call_may_end_with_a_token_of_its_own() -> None:
    # Gemma 4 quotes arguments with a control token and hands over with <|tool_response>; gpt-oss has <|call|>.
    template = (
        "{% for m in messages %}{{ '<|turn>' + m.role + '\n' }}{% for c in m.tool_calls or [] %}"
        "{{ 'call:' + c.function.name + '{<|\"|>' + c.function.arguments.values() | join + '<|\"|>}<|handover|>' }}"
        "{% else %}{{ m.content + '<turn|>\n' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
    )
    special = ["<|turn>", "<turn|>", '<|"|>', "<|handover|>", "<eos>"]
    tokenizer = byte_level(special, template, eos_token="<eos>")
    conversation = row(USER, Message("assistant", "", (CALL,)), USER, ANSWER)
    example = render([conversation], tokenizer, max_length=None).row(0)
    assert marked_text(example, tokenizer).split("assistant\n")[1:] == [
        '⟦call:weather{<|"|>Rome<|"|>}<|handover|>⟧<|turn>user\nHi there<turn|>\n<|turn>',
        "⟦Hello!<turn|>⟧\n",
    ]
    assert stop_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(["<turn|>", "<|handover|>", "<eos>"]))
    prompt = render_prompt(conversation, tokenizer).prompt_ids
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert example.trained[len(prompt) :].tolist() == [True] * (len(example) - len(prompt) - 1) + [False]


def test_prompt_too_leaves_out_a_turn_that_says_so() -> None:
    conversation = row(USER, Message("assistant", "Wrong.", train=False), USER, ANSWER)
    tokenizer = family("chatml")
    example = render([conversation], tokenizer, max_length=None, train_on="prompt-too").row(0)
    untrained = [text for text in marked_text(example, tokenizer).split("⟧") if "⟦" in text]
    assert len(untrained) == 2
    assert "assistant\n⟧Wrong.<|im_end|>⟦\n" in marked_text(example, tokenizer)
    thinking = row(USER, Message("assistant", "<think>\na\n</think>\n\nb", train=False), USER, ANSWER)
    with pytest.raises(DataError, match="rendered differently once later turns follow"):
        render([thinking], family("qwen3"), max_length=None, train_on="prompt-too")
