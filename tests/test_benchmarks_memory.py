"""The memory's formula against published sizes, the package's own constants, and what small models measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from benchmarks import memory
from benchmarks.memory import SHAPES, Settings, Shape, budget
from benchmarks.memory_check import LiveBytes, measure
from benchmarks.memory_page import CHECKS, LINES, budgets, page

ROOT = Path(__file__).parents[1]
RESTING = ("codes", "scales", "embeddings", "norms", "adapter", "gradient", "moments")
SMALL = Shape("small", 256, 2, 8, 2, 512, 1000)
RUN = Settings(tokens=128, rank=8, trained=64)

RUNS = {
    **{place: (shape, run) for place, shape, run in CHECKS},
    "no checkpointing": (SMALL, dataclasses.replace(RUN, checkpointing=False)),
    "float32": (SMALL, dataclasses.replace(RUN, compute_bytes=4)),
    "tiles": (Shape("tiles", 1024, 1, 8, 2, 4096, 300), dataclasses.replace(RUN, tokens=32)),
    "not quantised": (SMALL, dataclasses.replace(RUN, bits=16)),
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-2-13B", 13_015_864_320),
        ("LLaMA-65B", 65_285_660_672),
        ("Llama-3-70B", 70_553_706_496),
    ],
)
def test_each_shape_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert SHAPES[name].parameters == parameters


def test_the_repeated_constants_are_the_packages_own() -> None:
    from veneer.kernels import attention, linear_cross_entropy
    from veneer.quant import packing, tensor
    from veneer.quant.blockwise import NESTED_BLOCK
    from veneer.train.optimizer_update import Update8bit, Update32bit

    assert memory.TILE_BYTES == tensor.TILE_BYTES
    assert memory.TILE_BYTES_OFF_CPU == tensor.TILE_BYTES_OFF_CPU
    assert memory.PIECE == packing.PIECE
    assert memory.LOGITS_BYTES == linear_cross_entropy.CHUNK_BYTES
    assert memory.ATTENTION_TILE == attention.TILE
    assert attention._mask.cache_info().maxsize == memory.CACHED_MASKS
    assert memory.NESTED_BLOCK == NESTED_BLOCK
    assert {32: Update32bit.alignment, 8: Update8bit.alignment} == memory.ALIGNMENT


@pytest.mark.parametrize("case", RUNS)
def test_every_line_is_what_a_small_model_measures(case: str) -> None:
    shape, run = RUNS[case]
    computed, found = budget(shape, run), measure(shape, run)
    for line in RESTING:
        assert getattr(computed, line) == getattr(found, line), line
    forward = computed.kept + computed.tables + computed.final_norm
    assert forward == pytest.approx(found.kept, abs=64)  # a mask of one number, and the like
    # Rank-r rows and other small things that come and go are not followed to the byte.
    assert computed.working == pytest.approx(found.working, rel=0.02)


@pytest.mark.parametrize("place", [place for place, *_ in CHECKS])
def test_the_runs_of_the_page_need_the_most_where_it_says(place: str) -> None:
    shape, run = RUNS[place]
    result = budget(shape, run)
    at_the_head = result.final_norm + result.head_work
    needs = {
        "an MLP": result.layer_again + result.mlp_work,
        "an attention": result.layer_again + result.attention_work,
        "the head": at_the_head,
    }
    assert max(needs, key=lambda name: needs[name]) == place


def test_a_last_tile_of_attention_that_is_short_costs_no_more_than_computed() -> None:
    shape, run = Shape("short", 64, 2, 8, 8, 64, 300), dataclasses.replace(RUN, tokens=300)
    computed, found = budget(shape, run), measure(shape, run)
    assert found.working <= computed.working <= 1.25 * found.working


def test_the_peak_is_the_sum_of_the_lines_where_the_mlp_needs_the_most() -> None:
    result = budget(SHAPES["Llama-2-7B"], Settings())
    assert result.peak == sum(line(result) for _, _, line in LINES)


@pytest.mark.parametrize(
    "more",
    [
        {"tokens": 4096},
        {"rank": 64},
        {"double_quant": False},
        {"checkpointing": False},
        {"compute_bytes": 4},
        {"bits": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_costs_memory_raises_the_peak(more: dict[str, int | bool]) -> None:
    shape = SHAPES["Llama-3-8B"]
    changed = dataclasses.replace(Settings(), **more)  # type: ignore[arg-type]  # each of its field's type
    assert budget(shape, changed).peak > budget(shape, Settings()).peak


def test_moments_in_8_bits_take_two_bytes_and_a_scale_for_256() -> None:
    result = budget(SHAPES["Llama-2-7B"], Settings(moment_bits=8))
    parameters = result.adapter // 4
    assert result.moments == 2 * parameters + 2 * 4 * parameters // 256


def test_live_bytes_counts_what_is_held_and_forgets_what_is_freed() -> None:
    import torch

    with LiveBytes() as counted:
        kept = torch.zeros(100)
        view = kept.view(10, 10)
        view.add_(1)
        assert counted.live == 400
        other = kept + 1
        assert counted.live == 800
        del other
        assert counted.live == 400
    assert counted.peak == 800


def test_the_page_in_the_repository_is_the_one_that_is_computed_now() -> None:
    written = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(budgets()) in written
    assert written.split("## Computed and measured")[0] == page().split("## Computed and measured")[0]
