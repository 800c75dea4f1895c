"""Generation against transformers' own, batched against one at a time, and every way a row can end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from veneer.adapters import LoraConfig, attach
from veneer.errors import UsageError, VeneerError
from veneer.generate import Generation, Memory, default_stop_ids, generate
from veneer.generate import decoder as decoder_module
from veneer.kernels import native
from veneer.models import Base, BaseIdentity

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "GPTNeoX", "GPTNeo", "GPT2", "Lfm2"]


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def one_at_a_time(base: Any, prompts: list[list[int]], **options: Any) -> list[Generation]:
    return [generate(base, [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_rows_of_a_padded_batch_are_what_transformers_generates_for_each_alone(
    name: str, family: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    base, plain = family(name)
    expected = [
        plain.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=2, pad_token_id=3)[0]
        for prompt in prompts
    ]
    expected = [row[len(prompt) :].tolist() for row, prompt in zip(expected, prompts)]
    got = generate(base, prompts, max_new_tokens=14, stop_token_ids=[2])
    assert ids_of(got) == [row[:-1] if row[-1] == 2 else row for row in expected]
    assert len({tuple(row) for row in expected}) == len(prompts), "the rows must differ for this to say anything"


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2", "Lfm2"])
@pytest.mark.parametrize("size", [1, 3, 32])
def test_sampled_rows_do_not_depend_on_the_batch_they_are_in(
    name: str, size: int, family: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    base = family(name).base
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 5}
    whole = generate(base, prompts, batch_size=2, stop_token_ids=(), **options)
    assert generate(base, prompts, batch_size=size, stop_token_ids=(), **options) == whole
    # Row 0 has the same number in both calls, and so the same chance, whoever its neighbours are.
    assert generate(base, prompts[:1], stop_token_ids=(), **options)[0] == whole[0]


def test_another_seed_and_another_row_draw_otherwise(base: Base) -> None:
    prompt = [40, 41, 42]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "stop_token_ids": ()}
    same = generate(base, [prompt] * 3, seed=0, **options)
    other = generate(base, [prompt], seed=1, **options)
    assert len({tuple(row) for row in ids_of([*same, *other])}) == 4
    assert generate(base, [prompt] * 3, seed=0, **options) == same


@pytest.mark.parametrize("name", ["Llama", "GPTNeo", "GPT2"])
def test_rows_may_go_on_to_the_models_last_position(
    name: str, family: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    """GPT-Neo keeps a mask of as many columns as it has positions: padding must not push a row past them."""
    base = family(name).base
    rows = [prompts[0], list(range(60, 180)), prompts[1]]  # of 128 positions
    options: dict[str, Any] = {"max_new_tokens": 400, "stop_token_ids": ()}
    found = generate(base, rows, **options)
    assert [len(row.token_ids) for row in found] == [128 - len(row) for row in rows]
    assert found == one_at_a_time(base, rows, **options)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX"])
def test_a_beginning_that_rows_share_is_read_once_and_changes_nothing(
    name: str, family: Callable[[str], Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family(name).base
    rows = [list(range(50, 70)) + prompt for prompt in prompts]
    expected = one_at_a_time(base, rows, max_new_tokens=8)
    read = _count_tokens(monkeypatch)
    assert generate(base, rows, max_new_tokens=8) == expected
    width = max(map(len, rows)) - 20
    assert read[:2] == [(1, 20), (len(rows), width)]


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "Lfm2"])
def test_a_shared_beginning_is_right_for_models_that_count_columns_too(
    name: str, family: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    base = family(name).base
    rows = [list(range(50, 70)) + prompt for prompt in prompts]
    assert generate(base, rows, max_new_tokens=8) == one_at_a_time(base, rows, max_new_tokens=8)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Lfm2"])
def test_long_prompts_read_in_pieces_give_the_same(
    name: str, family: Callable[[str], Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family(name).base
    whole = generate(base, prompts, max_new_tokens=6)
    monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", 21)  # three columns of seven rows at a time
    assert generate(base, prompts, max_new_tokens=6) == whole


def test_rows_that_are_done_leave_the_batch(
    base: Base, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = generate(base, prompts, max_new_tokens=12, stop_token_ids=())
    stop = free[2].token_ids[5]  # row 2 ends at its sixth token at the latest, others where they meet this id
    lengths = [row.token_ids.index(stop) if stop in row.token_ids else 12 for row in free]
    assert len(set(lengths)) > 1
    read = _count_tokens(monkeypatch)
    with native.left_out():  # native steps are not counted
        got = generate(base, prompts, max_new_tokens=12, stop_token_ids=[stop])
    assert ids_of(got) == [row.token_ids[:length] for row, length in zip(free, lengths)]
    # After the prompts: at each step exactly the rows that have not met their end.
    expected = [sum(length > step for length in lengths) for step in range(12)]
    assert [rows for rows, _ in read[1:]] == [rows for rows in expected[:11] if rows]


def test_a_row_ends_at_its_stop_token_which_is_not_part_of_it(base: Base) -> None:
    says = [50, 51, 52, 53, 54, 55]
    for limit, stops, expected, reason in (
        (6, (), says, "length"),
        (6, {54}, says[:4], "stop"),
        (5, {54}, says[:4], "stop"),
        (4, {54}, says[:4], "length"),
        (6, {50}, [], "stop"),
    ):
        got = generate(_scripted(base, says), [[40, 41]], max_new_tokens=limit, stop_token_ids=stops)[0]
        assert (got.token_ids, got.finish_reason, got.prompt_tokens) == (expected, reason, 2)
        assert got.text == base.tokenizer.decode(expected)


def test_a_stop_string_may_span_tokens_and_is_cut_off(base: Base) -> None:
    ids = base.tokenizer.encode("one, two. three, four", add_special_tokens=False)
    pieces = [base.tokenizer.decode([token]) for token in ids]
    assert "wo. t" not in pieces
    options: dict[str, Any] = {"max_new_tokens": len(ids), "stop_token_ids": (), "stop": ["wo. t", "three", "zz"]}
    got = generate(_scripted(base, ids), [[40, 41]], **options)[0]
    assert (got.text, got.finish_reason) == ("one, t", "stop")
    assert got.token_ids == ids[: len(got.token_ids)]
    assert len(got.token_ids) < len(ids)


def test_a_stop_string_that_is_a_special_token_ends_the_row(base: Base) -> None:
    special = base.tokenizer.convert_tokens_to_ids("<|pad|>")
    steered = _steered(base, special, at=3)
    got = generate(steered, [[40, 41]], max_new_tokens=8, stop_token_ids=(), stop="<|pad|>")[0]
    assert (got.finish_reason, len(got.token_ids)) == ("stop", 3)


def test_by_default_the_tokens_that_end_a_turn_end_a_row(base: Base) -> None:
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert default_stop_ids(base.module, base.tokenizer) == {end}
    assert len(generate(_steered(base, end, at=5), [[40, 41]], max_new_tokens=8)[0].token_ids) == 5


def test_streamed_text_is_the_text_in_whole_characters(base: Base) -> None:
    tokenizer = base.tokenizer
    written = "naïve 日本語 🗼 end"
    ids = tokenizer.encode(written, add_special_tokens=False)
    assert len(ids) > len(written), "characters must span tokens for this to say anything"
    heard: list[str] = []
    got = generate(_scripted(base, ids), [[40]], max_new_tokens=len(ids), stop_token_ids=(), on_text=heard.append)[0]
    assert got.text == written
    assert "".join(heard) == written
    assert not any("\ufffd" in piece for piece in heard)
    assert len(heard) > 5


def test_streamed_text_never_shows_the_beginning_of_a_stop_string(base: Base) -> None:
    ids = base.tokenizer.encode("say </ans and </answer> more", add_special_tokens=False)
    heard: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": len(ids), "stop_token_ids": (), "stop": "</answer>"}
    got = generate(_scripted(base, ids), [[40]], on_text=heard.append, **options)[0]
    assert "".join(heard) == got.text == "say </ans and "
    assert "".join(heard[:-1]) in ("say ", "say </ans and ", "say </ans and")


def test_a_row_stops_at_the_end_of_the_models_positions(base: Base) -> None:
    room = base.module.config.max_position_embeddings
    long, short = list(range(40, 140)) * 5 + [7] * 7, [40, 41]
    got = generate(base, [long, short], max_new_tokens=9, stop_token_ids=())
    assert [len(row.token_ids) for row in got] == [room - len(long), 9]
    assert got[0].finish_reason == "length"


def test_results_are_in_the_order_of_the_prompts_and_progress_counts_them(base: Base, prompts: list[list[int]]) -> None:
    seen: list[tuple[int, int]] = []
    got = generate(base, prompts, max_new_tokens=2, batch_size=3, progress=lambda *at: seen.append(at))
    assert [row.prompt_tokens for row in got] == [len(prompt) for prompt in prompts]
    assert seen == [(done, len(prompts)) for done in range(1, len(prompts) + 1)]
    assert generate(base, []) == []


def test_generation_in_the_middle_of_training_leaves_the_modes_alone(base: Base) -> None:
    adapted = attach(base, LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False), seed=0)
    try:
        adapted.module.train()
        frozen = adapted.module.get_submodule("model.layers.0").eval()
        first = generate(adapted, [[40, 41]], max_new_tokens=8, stop_token_ids=())
        assert generate(adapted, [[40, 41]], max_new_tokens=8, stop_token_ids=()) == first, "dropout was on"
        assert adapted.module.training
        assert not frozen.training
        with adapted.disabled():
            off = generate(adapted, [[40, 41]], max_new_tokens=8, stop_token_ids=())
        assert off != first
        assert all(parameter.grad is None for parameter in adapted.module.parameters())
        loss = adapted.module(input_ids=torch.tensor([[40, 41]])).logits.float().sum()
        loss.backward()  # what generation left behind must not stand in the way of a backward
    finally:
        adapted.detach()
        base.module.eval()
    assert generate(base, [[40, 41]], max_new_tokens=8, stop_token_ids=()) == off


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "the prompt is empty\nwhere: prompt 2 of 2"),
        ([[1, 300]], {}, "ids outside 0 to 299"),
        ([[-1]], {}, "ids outside 0 to 299"),
        ([[5] * 512], {}, "512 tokens and the model 512 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"batch_size": 0}, "batch_size is 0"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"stop": ["a", ""]}, "a stop string is empty"),
        ([[1], [2]], {"on_text": print}, "for one prompt, not 2"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    base: Base, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        generate(base, prompts, **options)
    assert message in str(caught.value)
    assert caught.value.fix


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
WITHOUT_OUR_CACHE: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": ({"state_size": 4}, "takes no cache of keys and values"),
    "Mamba2": (
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
        "takes no cache of keys and values",
    ),
    "FalconMamba": ({"state_size": 4}, "takes no cache of keys and values"),
    "Rwkv": ({"attention_hidden_size": 32}, "takes no cache of keys and values"),
    "MiniMax": (
        {
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 2,
            "layer_types": ["full_attention", "linear_attention"],
        },
        "keeps its past in a form of its own",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_OUR_CACHE)
def test_a_model_that_does_not_take_our_cache_computes_whole_rows_and_says_so_once(
    name: str, base: Base, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    settings, reason = WITHOUT_OUR_CACHE[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, f"{name}Config")(**SMALL, **settings)
        ).eval()
    model = Base(module, base.tokenizer, BaseIdentity("m", None, "", "", ""), "m")
    memory = Memory()
    found = generate(model, prompts, max_new_tokens=5, stop_token_ids=[], batch_size=3)
    assert generate(model, prompts[:1], max_new_tokens=5, stop_token_ids=[], memory=memory)[0] == found[0]
    for prompt, answer in zip(prompts, found):
        ids = torch.tensor([prompt])
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat((ids, module(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert answer.token_ids == ids[0, len(prompt) :].tolist()
    said = [record.message for record in caplog.records if record.name == "veneer.generate"]
    assert len(said) == 1
    assert f"{name}ForCausalLM {reason}" in said[0]


def test_a_bare_module_with_adapters_has_no_tokenizer_to_write_with(family: Callable[[str], Any]) -> None:
    adapted = attach(family("Llama").plain, LoraConfig(r=2))
    try:
        with pytest.raises(VeneerError, match="no tokenizer"):
            generate(adapted, [[1]])
    finally:
        adapted.detach()


class _Scripted(torch.nn.Module):
    """A model whose logits ask for a script: the token at a step, or what the model itself would say."""

    def __init__(self, module: Any, script: dict[int, int]) -> None:
        super().__init__()
        self.inner = module
        self.config, self.generation_config = module.config, module.generation_config
        self.script = script
        self.first: int | None = None
        self._veneer_takes_our_cache = True  # or the look at it would count as the first token

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        out = self.inner(input_ids=input_ids, past_key_values=past_key_values, position_ids=position_ids, **kwargs)
        last = int(position_ids[0, -1])
        self.first = last if self.first is None else self.first
        if last - self.first in self.script:
            out.logits[:, -1, self.script[last - self.first]] = 1e4
        return out


def _steered(base: Base, token: int, at: int) -> Base:
    """Says ``token`` as its new token number ``at`` (from 0)."""
    return Base(_Scripted(base.module, {at: token}), base.tokenizer, base.identity, base.spec)


def _scripted(base: Base, ids: list[int]) -> Base:
    return Base(_Scripted(base.module, dict(enumerate(ids))), base.tokenizer, base.identity, base.spec)


def _count_tokens(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """``(rows, columns)`` of every forward from here on."""
    shapes: list[tuple[int, int]] = []
    forward = decoder_module.Decoder._forward

    def counted(self: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return forward(self, ids, *rest)

    monkeypatch.setattr(decoder_module.Decoder, "_forward", counted)
    return shapes
