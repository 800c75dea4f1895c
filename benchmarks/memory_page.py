"""docs/memory.md: the budget of well-known shapes, and each line of it measured on a small model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.memory import PIECE, SHAPES, TILE_BYTES, TILE_BYTES_OFF_CPU, Budget, Settings, Shape, budget

TABLE = ("Llama-3.2-1B", "Llama-2-7B", "Llama-3-8B", "Llama-2-13B", "LLaMA-65B", "Llama-3-70B")
RUN = Settings()
# Small runs that need the most memory at three different places.
CHECKS: tuple[tuple[str, Shape, Settings], ...] = (
    ("an MLP", Shape("small", 256, 3, 8, 2, 512, 1000), Settings(tokens=128, rank=8, trained=64)),
    (
        "an attention",
        Shape("long", 64, 2, 8, 8, 64, 300),
        Settings(tokens=1024, rank=8, trained=64, compute_bytes=4, checkpointing=False),
    ),
    (
        "the head",
        Shape("wide", 64, 2, 8, 2, 128, 30000, tied=True),
        Settings(tokens=256, rank=8, moment_bits=8, double_quant=False),
    ),
)

LINES: tuple[tuple[str, str, Callable[[Budget], int]], ...] = (
    ("codes", "half a byte for each weight of a linear", lambda b: b.codes),
    (
        "scales",
        "per matrix of n weights: n / 64 bytes, 4 bytes for each 256 of those, and 4",
        lambda b: b.scales,
    ),
    ("embedding and head", "c V d, twice where the head is not tied", lambda b: b.embeddings),
    ("norms", "c d (2L + 1)", lambda b: b.norms),
    ("adapter", "4 bytes for each of r (in + out) of a linear", lambda b: b.adapter),
    ("gradient", "the same again", lambda b: b.gradient),
    ("moments of AdamW", "twice that; with 8 bits 2 bytes and 1/32 for each parameter", lambda b: b.moments),
    ("kept by all layers", "their inputs: L T d c", lambda b: b.kept),
    ("masks, cosines and sines", "c (256 (H / K) T (T / 256 + 1) / 2 + 2 T d / H)", lambda b: b.tables),
    ("one layer, computed again", "T c (5d + 2k + 2f + 7r), copies of its factors", lambda b: b.layer_again),
    ("backward of an MLP", "T c (3f + 3d + 3r), its factors' gradients, a decoded tile", lambda b: b.mlp_work),
)


def page() -> str:
    """The whole page; the small models are measured on the way (seconds)."""
    return "\n".join([_INTRODUCTION, *budgets(), *peaks(), *_formulas(), *_checks()]) + "\n"


_EXACT = (
    ("codes", "codes"),
    ("scales", "scales"),
    ("embedding and head", "embeddings"),
    ("norms", "norms"),
    ("adapter", "adapter"),
    ("gradient", "gradient"),
    ("moments of AdamW", "moments"),
)

_INTRODUCTION = f"""# The memory of QLoRA

Written by `python -m benchmarks.memory --write docs/memory.md`; the formulas are in `benchmarks/memory.py`, and
`tests/test_benchmarks_memory.py` holds them to what small models measure.

NF4 in blocks of {RUN.block_size} with double quantisation, rank {RUN.rank} on all linear layers, bfloat16, AdamW in
{RUN.moment_bits} bits, one row of {RUN.tokens:,} tokens with a loss on every one of them, gradient checkpointing.
GB are 10^9 bytes, GiB are 2^30. The interpreter and its libraries come on top, and so does what an allocator sets
aside."""


def budgets() -> list[str]:
    """The table of lines by shapes, in GB."""
    results = [budget(SHAPES[name], RUN) for name in TABLE]
    lines = ["", "## The budget", "", _row(["GB", *TABLE]), _rule(len(TABLE))]
    parameters = [f"{SHAPES[name].parameters / 1e9:.2f}" for name in TABLE]
    lines.append(_row(["parameters, in billions", *parameters]))
    lines += [_row([name, *(_gb(line(result)) for result in results)]) for name, _, line in LINES]
    lines.append(_row(["**peak**", *(f"**{result.peak / 1e9:.2f}**" for result in results)]))
    lines.append(_row(["peak, in GiB", *(f"{result.peak / 2**30:.2f}" for result in results)]))
    bits = 8 * (results[0].codes + results[0].scales) / _linear_parameters(SHAPES[TABLE[0]])
    at_the_head = [name for name, result in zip(TABLE, results) if result.working > _in_mlp(result)]
    lines += ["", f"A weight in codes takes {bits:.3f} bits with its scales. The peak is the sum of the lines above"]
    if at_the_head:
        lines[-1] += f", or for {', '.join(at_the_head)} higher: there another part of the step needs more than the MLP"
    lines[-1] += "."
    return lines


def peaks() -> list[str]:
    """The peaks of other settings, in GB."""
    others: list[tuple[str, Settings]] = [
        ("as above", RUN),
        ("512 tokens", dataclasses.replace(RUN, tokens=512)),
        ("8,192 tokens", dataclasses.replace(RUN, tokens=8192)),
        ("rank 64", dataclasses.replace(RUN, rank=64)),
        ("rank 64, AdamW in 8 bits", dataclasses.replace(RUN, rank=64, moment_bits=8)),
        ("without double quantisation", dataclasses.replace(RUN, double_quant=False)),
        ("without checkpointing", dataclasses.replace(RUN, checkpointing=False)),
        ("512 tokens, no checkpointing, float32", Settings(tokens=512, checkpointing=False, compute_bytes=4)),
        ("on CUDA: a larger tile", dataclasses.replace(RUN, tile_bytes=TILE_BYTES_OFF_CPU)),
        ("LoRA over the base in 16 bits", dataclasses.replace(RUN, bits=16)),
    ]
    lines = ["", "## The peak under other settings", "", _row(["GB", *TABLE]), _rule(len(TABLE))]
    lines += [_row([n, *(f"{budget(SHAPES[name], run).peak / 1e9:.2f}" for name in TABLE)]) for n, run in others]
    return lines


def _formulas() -> list[str]:
    lines = [
        "",
        "## The lines",
        "",
        "`T` tokens of a micro-batch, `d` width, `k` width of all key heads, `H` query heads, `K` key heads, `f` width",
        "of the MLP, `V` vocabulary, `L` layers, `r` rank, `c` bytes of a number that the model computes with.",
        "",
        "| line | bytes |",
        "|---|---|",
    ]
    lines += [f"| {name} | {formula} |" for name, formula, _ in LINES]
    lines += [
        "",
        "The last two lines are the most that a step needs at a time, in most runs. In their place stands, where it is "
        "more:",
        "",
        "- in the backward of an attention: tiles of scores, `3 c H 256 T`, and the gradients of q, k, v;",
        "- at the head: two chunks of logits of 64 MiB each (at least 64 rows of them), and `c d` for the states, the",
        "  trained positions and their gradient.",
        "",
        f"On a CPU a decoded tile is {TILE_BYTES >> 20} MiB, with {12 * PIECE / 2 / 2**20:.1f} MiB to look codes up",
        "and the scales of the matrix at hand in float32. On CUDA it is up to "
        f"{TILE_BYTES_OFF_CPU >> 20} MiB, for most the whole matrix.",
    ]
    return lines


def _checks() -> list[str]:
    """Each line of the small runs, computed and measured."""
    from benchmarks.memory_check import measure

    lines = ["", "## Computed and measured", "", "Random models that train one step:", ""]
    columns: list[list[int]] = []
    for place, shape, run in CHECKS:
        lines.append(f"- {_described(shape, run)}: it needs the most in {place}.")
        computed, found = budget(shape, run), measure(shape, run)
        forward = computed.kept + computed.tables + computed.final_norm
        columns.append([*(getattr(computed, field) for _, field in _EXACT), forward, computed.working])
        columns.append([*(getattr(found, field) for _, field in _EXACT), found.kept, found.working])
    names = [*(name for name, _ in _EXACT), "there after the forward", "at the most in a step"]
    lines += [
        "",
        "What lies there between steps is read off the tensors. The last two lines are what a step adds: every",
    ]
    lines += [
        "storage that an operation makes is counted until it is freed. Tests hold these runs and others to the",
        "formulas: what lies there between steps to the byte, the most in a step within 2 %, because rank-r rows and",
        "other small things that come and go within an operation are not followed one by one.",
        "",
    ]
    head = [cell for place, *_ in CHECKS for cell in (f"{place}: computed", "measured")]
    lines += [_row(["bytes", *head]), _rule(len(head))]
    return lines + [_row([name, *(f"{column[i]:,}" for column in columns)]) for i, name in enumerate(names)]


def _described(shape: Shape, run: Settings) -> str:
    numbers = "bfloat16" if run.compute_bytes == 2 else "float32"
    checkpointing = "checkpointing" if run.checkpointing else "no checkpointing"
    trained = run.tokens if run.trained is None else run.trained
    return (
        f"{shape.layers} layers, width {shape.hidden}, {shape.heads} query and {shape.kv_heads} key heads, MLP "
        f"{shape.mlp}, vocabulary {shape.vocab:,}, rank {run.rank}, {run.tokens:,} tokens with {trained:,} trained, "
        f"{numbers}, AdamW in {run.moment_bits} bits, {checkpointing}"
    )


def _in_mlp(result: Budget) -> int:
    return result.kept + result.tables + result.layer_again + result.mlp_work


def _linear_parameters(shape: Shape) -> int:
    return shape.parameters - shape.embedding_parameters - shape.norm_parameters


def _gb(value: int) -> str:
    return f"{value / 1e9:.3f}" if value < 1e8 else f"{value / 1e9:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|---|" + "---:|" * columns
