"""The buffers against transformers' own growing cache, and a prompt's past taken up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from veneer.generate import Memory, generate
from veneer.generate import decoder as decoder_module
from veneer.generate.cache import BufferLayer, has_windows, is_attention_only, new_cache
from veneer.generate.decoder import common_prefix
from veneer.models import Base


def states(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, columns, 3)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("capacity", [0, 3, 4, 50])
def test_the_buffer_holds_what_the_growing_cache_holds(capacity: int) -> None:
    ours, theirs = BufferLayer(capacity), DynamicLayer()
    for step, columns in enumerate([3, 1, 1, 4, 1]):
        new = states(4, columns, step)
        for mine, other in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(mine, other)
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
        assert ours.get_seq_length() == theirs.get_seq_length()
    rows = torch.tensor([0, 3, 2])  # row 1 left, row 3 took its place
    ours.reorder_cache(rows)
    theirs.reorder_cache(rows)
    ours.crop(-2)
    theirs.crop(-2)
    new = states(3, 1, 9)
    for mine, other in zip(ours.update(*new), theirs.update(*new)):
        assert torch.equal(mine, other)


def test_one_row_becomes_many() -> None:
    layer = BufferLayer(6)
    keys, values = states(1, 4, 0)
    layer.update(keys, values)
    layer.repeat(3)
    new = states(3, 1, 1)
    got = layer.update(*new)
    assert torch.equal(got[0], torch.cat([keys.expand(3, -1, -1, -1), new[0]], 2))
    assert torch.equal(got[1], torch.cat([values.expand(3, -1, -1, -1), new[1]], 2))


def test_what_a_model_keeps_is_recognised(family: Callable[[str], Any]) -> None:
    found = {}
    for name in ("Llama", "GPT2", "Mistral", "Gemma3", "Lfm2"):
        module = family(name).base.module
        found[name] = (is_attention_only(new_cache(module, 8)), has_windows(module))
    assert found == {
        "Llama": (True, False),
        "GPT2": (True, False),
        "Mistral": (True, True),
        "Gemma3": (True, True),
        "Lfm2": (False, True),
    }
    # A layer that is not attention keeps transformers' own form.
    lfm = family("Lfm2").base.module
    ours, theirs = new_cache(lfm, 8).layers, DynamicCache(config=lfm.config).layers
    assert [type(layer) for layer in ours] == [type(theirs[0]), BufferLayer]


@pytest.mark.parametrize(
    ("rows", "expected"), [([[1, 2], [1, 3]], 1), ([[1, 2], [1, 2, 3]], 2), ([[], [1]], 0), ([[1, 2], [2], [1, 2]], 0)]
)
def test_the_common_beginning(rows: list[list[int]], expected: int) -> None:
    assert common_prefix(rows) == expected


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Lfm2"])
def test_a_prompt_that_goes_on_reads_only_what_is_new(
    name: str, family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family(name).base
    memory = Memory()
    read: list[int] = []
    forward = decoder_module.Decoder._forward

    def counted(self: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return forward(self, ids, *rest)

    monkeypatch.setattr(decoder_module.Decoder, "_forward", counted)
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_token_ids": ()}
    first = list(range(40, 60))
    answer = generate(base, [first], memory=memory, **options)[0].token_ids
    for prompt, new in (
        ([*first, *answer, 70, 71, 72], 4),  # the last token of an answer was chosen, not read
        ([*first, 80, 81], 2),  # another answer than the one that was given
        ([*first, 80, 81], 1),  # the same again: at least one token must be read
        ([90, *first], 21),  # nothing in common
        (first[:5], 5),
    ):
        read.clear()
        got = generate(base, [prompt], memory=memory, **options)
        assert read[0] == (new if name != "Lfm2" else len(prompt)), "a state that cannot be cut back is not reused"
        assert got == generate(base, [prompt], **options)


def test_an_interrupted_answer_leaves_no_wrong_past(base: Base) -> None:
    memory = Memory()
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_token_ids": ()}
    common = list(range(40, 50))
    generate(base, [[*common, 60, 61, 62]], memory=memory, **options)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(base, [[*common, 70, 71, 72, 73]], memory=memory, on_text=interrupt, **options)
    # The interrupted prompt's keys lie where those of the first prompt were.
    again = [[*common, 60, 61, 62, 63]]
    assert generate(base, again, memory=memory, **options) == generate(base, again, **options)
