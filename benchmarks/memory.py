"""The memory of QLoRA by formula, line by line: what docs/memory.md is made of.

    python -m benchmarks.memory [--write docs/memory.md]

:func:`budget` computes it for a shape and settings, in plain Python; :mod:`benchmarks.memory_check` measures every line
on a small model, and tests hold the two together. Bytes everywhere; GB are 10^9 bytes.

Names: ``T`` tokens of a micro-batch, ``d`` width, ``q`` and ``k`` width of all query and of all key heads, ``f`` hidden
width of the MLP, ``V`` vocabulary, ``L`` layers, ``r`` rank, ``c`` bytes of a number that the model computes with.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

# Constants of the package, repeated here so that a budget needs no torch; a test compares them.
TILE_BYTES = 1 << 21  # decoded weights that a product on a CPU works on at a time
TILE_BYTES_OFF_CPU = 1 << 27  # likewise on another device
PIECE = 1 << 18  # weights decoded at a time within a tile, on a CPU
LOGITS_BYTES = 64 * 2**20  # float32 logits of one chunk of the head
ATTENTION_TILE = 256  # queries of one tile of scores
CACHED_MASKS = 32  # masks of such tiles that are held
NESTED_BLOCK = 256  # scales that share a scale of their own; moments in 8 bits that share one
ALIGNMENT = {32: 16, 8: 256}  # elements at whose multiples a tensor begins in the optimizer's buffer, by moments' bits


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's form."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool = False  # the head is the embedding

    @property
    def key_width(self) -> int:
        """All key heads together; the query heads have ``hidden``."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(out, in)`` of one layer's q, k, v, o, gate, up, down."""
        d, k, f = self.hidden, self.key_width, self.mlp
        return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and of the head where it has a matrix of its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        return self.hidden * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        linear = self.layers * sum(out * width for out, width in self.linears)
        return linear + self.embedding_parameters + self.norm_parameters


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True),
        Shape("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True),
        Shape("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000),
        Shape("Llama-3-8B", 4096, 32, 32, 8, 14336, 128256),
        Shape("Llama-2-13B", 5120, 40, 40, 40, 13824, 32000),
        Shape("LLaMA-65B", 8192, 80, 64, 64, 22016, 32000),
        Shape("Llama-3-70B", 8192, 80, 64, 8, 28672, 128256),
    )
}


@dataclass(frozen=True)
class Settings:
    """A training run, as far as its memory depends on it.

    Attributes:
        bits: of a stored weight: 4 in blocks (NF4, FP4), or 16 and 32 for a base that is not quantised.
        block_size, double_quant: of the scales of 4-bit weights.
        compute_bytes: ``c``: 2 for bfloat16, 4 for float32.
        rank: ``r``, on all linear layers.
        moment_bits: 32 or 8, of AdamW's two moments.
        tokens: ``T``, of one micro-batch, which is one document.
        trained: of them, those whose loss is taken; None: all.
        checkpointing: each layer keeps its input alone and is computed again in the backward.
        tile_bytes: decoded weights that a product works on at a time.
    """

    bits: int = 4
    block_size: int = 64
    double_quant: bool = True
    compute_bytes: int = 2
    rank: int = 16
    moment_bits: int = 32
    tokens: int = 2048
    trained: int | None = None
    checkpointing: bool = True
    tile_bytes: int = TILE_BYTES


@dataclass(frozen=True)
class Budget:
    """Bytes, by what they are for."""

    codes: int  # the linears' weights; plain numbers where they are not quantised
    scales: int
    embeddings: int  # embedding and head
    norms: int
    adapter: int  # float32 masters
    gradient: int
    moments: int
    kept: int  # by all layers, from the forward to the backward
    tables: int  # masks, cosines and sines, which the layers share
    final_norm: int  # what the norm after the last layer keeps; gone when the layers' backward begins
    layer_again: int  # what one layer keeps when it is computed again
    mlp_work: int  # on the way through the backward of an MLP
    attention_work: int  # likewise of an attention, less the layer's activations that are gone by then
    head_work: int  # the loss and the first gradients

    @property
    def resting(self) -> int:
        """What is there between steps."""
        weights = self.codes + self.scales + self.embeddings + self.norms
        return weights + self.adapter + self.gradient + self.moments

    @property
    def working(self) -> int:
        """What a step needs on top of it, at the most: in an MLP, in an attention, or at the head."""
        layer = self.layer_again + max(self.mlp_work, self.attention_work)
        return self.kept + self.tables + max(layer, self.final_norm + self.head_work)

    @property
    def peak(self) -> int:
        return self.resting + self.working


def budget(shape: Shape, run: Settings) -> Budget:
    """The memory of one training step, without the interpreter and its libraries."""
    adapter = 4 * _buffer_elements(shape, run)
    return Budget(
        codes=shape.layers * sum(_code_bytes(out * width, run) for out, width in shape.linears),
        scales=shape.layers * sum(_scale_bytes(out * width, run) for out, width in shape.linears),
        embeddings=shape.embedding_parameters * run.compute_bytes,
        norms=shape.norm_parameters * run.compute_bytes,
        adapter=adapter,
        gradient=adapter,
        moments=2 * adapter if run.moment_bits == 32 else adapter // 2 + 2 * (adapter // NESTED_BLOCK),
        kept=_kept(shape, run),
        tables=_tables(shape, run),
        final_norm=_norm(shape, run),
        layer_again=layer_activations(shape, run) if run.checkpointing else 0,
        mlp_work=_mlp_work(shape, run),
        attention_work=_attention_work(shape, run),
        head_work=_head_work(shape, run),
    )


def _kept(shape: Shape, run: Settings) -> int:
    """Each layer's input, ``T d c``, and without checkpointing its activations. The first norm keeps nothing,
    since the embeddings need no gradient, but its output is kept."""
    layer = run.tokens * shape.hidden * run.compute_bytes
    if run.checkpointing:
        return shape.layers * layer
    return shape.layers * (layer + layer_activations(shape, run)) - 4 * run.tokens


def layer_activations(shape: Shape, run: Settings) -> int:
    """What one layer keeps for its backward beside its input.

    ``T c (3d + 2k + 4r)``: q, k, v, what attention gives, the sum after it, and the rank-r rows of four linears; the
    norms' reciprocals in float32 (their outputs are computed again); and what the MLP keeps.
    """
    d, k, r, c = shape.hidden, shape.key_width, run.rank, run.compute_bytes
    return run.tokens * (c * (3 * d + 2 * k + 4 * r) + 2 * 4) + _mlp_activations(shape, run)


def _mlp_activations(shape: Shape, run: Settings) -> int:
    """``T c (2f + 3r)``: gate, up and the rank-r rows."""
    return run.tokens * run.compute_bytes * (2 * shape.mlp + 3 * run.rank)


def _mlp_work(shape: Shape, run: Settings) -> int:
    """The larger of two moments. ``T c (3f + d + r)``: the gradients of gate and of up, and the product; the incoming
    gradient; the factors' gradients of the down projection. ``T c (2f + 2d + 3r)``: the product is gone, and the
    input's gradient is made; all factors' gradients, ``c r (3f + 3d)``; and either a decoded tile or
    the factors' gradients once more in float32. In both the copies of the factors:
    every B where c is not float32, and A times its scaling."""
    d, f, r, c = shape.hidden, shape.mlp, run.rank, run.compute_bytes
    copies = r * (2 * f + d) * c if c != 4 else 0
    factors = r * (3 * f + 3 * d)
    decoding = max(_decoding(out * width, run) for out, width in shape.linears[4:])
    product = decoding if run.bits == 4 else 0
    gradients = copies + c * (run.tokens * (3 * f + d + r) + r * (2 * f + d))
    inputs = (
        copies
        + c * (run.tokens * (2 * f + 2 * d + 3 * r) + factors + 2 * r * d)
        + max(product, 4 * factors if c != 4 else 0)
    )
    return max(gradients, inputs)


def _attention_work(shape: Shape, run: Settings) -> int:
    """``T c (3d + 3k)``: the gradients of q, k and v, of the output and of the residual, and a part of k's; tiles of
    scores, ``heads * 256 * keys``: three of the largest tile, with its part of q's gradient, and where query heads
    share a key head copies of its part of the output's gradient, and of q if there are several tiles. The MLP's
    activations are gone, and two of width d."""
    d, k, c = shape.hidden, shape.key_width, run.compute_bytes
    tiles = _score_tiles(run)
    scores = 3 * max(tiles)
    rows, shares = min(ATTENTION_TILE, run.tokens), shape.heads > shape.kv_heads
    copies = 1 + shares + (shares and len(tiles) > 1)
    work = c * (run.tokens * (3 * d + 3 * k) + shape.heads * scores + copies * rows * d)
    return work - _mlp_activations(shape, run) - run.tokens * (2 * d * c + 4)


def _head_work(shape: Shape, run: Settings) -> int:
    """Two chunks of float32 logits; the final states, those of the trained positions and their gradient."""
    trained = run.tokens if run.trained is None else run.trained
    rows = min(trained, max(64, LOGITS_BYTES // (4 * shape.vocab)))
    return 2 * 4 * rows * shape.vocab + run.compute_bytes * shape.hidden * (run.tokens + 2 * trained)


def _norm(shape: Shape, run: Settings) -> int:
    """What a norm keeps: its input, and the reciprocals in float32."""
    return run.tokens * (shape.hidden * run.compute_bytes + 4)


def _tables(shape: Shape, run: Settings) -> int:
    """Cosines and sines, ``T c`` times twice the head's size, and the masks of attention's tiles: 256 queries of each
    head that shares a key head, by the keys up to theirs."""
    groups, head_size = shape.heads // shape.kv_heads, shape.hidden // shape.heads
    masks = groups * sum(_score_tiles(run)[-CACHED_MASKS:])
    return run.compute_bytes * (run.tokens * 2 * head_size + masks)


def _score_tiles(run: Settings) -> list[int]:
    """The scores of one head in each tile of attention: 256 queries, or what is left, by the keys up to the last."""
    starts = range(0, run.tokens, ATTENTION_TILE)
    return [(end - start) * end for start in starts for end in [min(start + ATTENTION_TILE, run.tokens)]]


def _code_bytes(weights: int, run: Settings) -> int:
    return (weights + 1) // 2 if run.bits == 4 else weights * run.bits // 8


def _scale_bytes(weights: int, run: Settings) -> int:
    """Float32, or under double quantisation a byte each, a float32 for 256 of them and one for the tensor."""
    if run.bits != 4:
        return 0
    blocks = -(-weights // run.block_size)
    return blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if run.double_quant else 4 * blocks


def _decoding(weights: int, run: Settings) -> int:
    """A tile, the look-up within it, and the float32 scales of the whole weight (three times, while they are made)."""
    if run.bits != 4:
        return 0
    blocks = -(-weights // run.block_size)
    tile = min(run.tile_bytes, weights * run.compute_bytes)
    look_up = 12 * min(PIECE, weights) // 2
    return max(12 * blocks, 4 * blocks + tile + look_up) if run.double_quant else tile + look_up


def _buffer_elements(shape: Shape, run: Settings) -> int:
    """Of the optimizer's flat buffer: A and B of every linear, each from an aligned place."""
    step = ALIGNMENT[run.moment_bits]
    factors = [run.rank * width for sizes in shape.linears for width in sizes]
    return shape.layers * sum(math.ceil(size / step) * step for size in factors)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there (docs/memory.md)")
    options = parser.parse_args()
    from benchmarks.memory_page import page

    text = page()
    if options.write is None:
        print(text)
    else:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
