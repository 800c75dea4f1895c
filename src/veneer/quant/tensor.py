"""A frozen weight in 4- or 8-bit codes, and the two products that training needs of it.

Both products decode a tile, multiply with it while it is in cache, and forget it: no decoded copy of the weight is ever
kept. Every sum runs over its whole length inside one product, so the result does not depend on the size of the tile.
Names: ``T`` rows of the activations, ``E`` experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import UsageError
from veneer.quant.blockwise import NESTED_BLOCK, dequantize_blockwise
from veneer.quant.codebooks import codebook, dynamic_map
from veneer.quant.config import QuantConfig
from veneer.quant.packing import decode_4bit, decode_int8

# The decoded weights that a product works on at a time: small enough to stay in a CPU's cache, large enough that calls
# and narrow products cost nothing that shows. On other devices launching costs more than memory does, and most matrices
# are one tile; torch gives its memory to the next matrix.
TILE_BYTES = 1 << 21
TILE_BYTES_OFF_CPU = 1 << 27


@functools.cache
def triton_kernels(device_type: str) -> ModuleType | None:
    """The kernels that decode on such a device; None where torch's own operations do, to the same bits."""
    if device_type != "cuda":
        return None
    try:
        from veneer.kernels import dequantize_triton
    except ImportError:  # triton is not installed
        return None
    return dequantize_triton


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight ``[out, in]``, or a stack of them ``[E, out, in]``, in codes.

    Made by :func:`veneer.quant.quantize` or :func:`veneer.quant.from_state_dict`. Satisfies ``FrozenMatrix``.

    Args:
        codes: ``[(n + 1) // 2, 1]`` uint8, the even index in the high nibble; INT8: int8 in the weight's own shape.
        absmax: ``[blocks]`` float32, or uint8 under double quantisation; blocks run over the flat weight. INT8:
            ``[rows]`` float32.
        nested_absmax: ``[ceil(blocks / 256)]`` float32 under double quantisation, else None.
        offset: scalar float32 that was taken off the scales before they were quantised; None likewise.
        config: how the codes were made.
        shape: of the weight.
        dtype: what it computes in.
        first: 4 bits: where the weight begins in the codes, in weights; not 0 for one expert out of a stack.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    config: QuantConfig
    shape: torch.Size
    dtype: torch.dtype
    first: int = 0

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        """False: codes cannot be trained."""
        return False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """How many weights the codes stand for."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """The codes hold this weight and nothing else; False for an expert out of a stack of 4 bits."""
        stored = self.codes.numel()
        return self.first == 0 and stored == (self.numel() if self.config.scheme == "int8" else (self.numel() + 1) // 2)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, as they lie in memory; of one expert out of a stack: its share."""
        held = (self.codes, self.absmax, self.nested_absmax, self.offset)
        total = sum(t.nbytes for t in held if t is not None)
        return total if self.is_whole else round(total * self.numel() / (2 * self.codes.numel()))

    @property
    def bits_per_parameter(self) -> float:
        """Measured: 8 times :attr:`nbytes` over the number of weights."""
        return 8 * self.nbytes / self.numel()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> QuantizedTensor:
        """The same weight on ``device``, computing in ``dtype``; codes and scales keep their bits."""
        where = self.device if device is None else device
        return dataclasses.replace(
            self,
            codes=self.codes.to(where),
            absmax=self.absmax.to(where),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(where),
            offset=None if self.offset is None else self.offset.to(where),
            dtype=dtype or self.dtype,
        )

    def index(self, expert: int) -> QuantizedTensor:
        """``[out, in]``: one expert out of a stack ``[E, out, in]``; its codes are the stack's own, not a copy."""
        if self.ndim != 3 or not 0 <= expert < self.shape[0]:
            raise UsageError(f"no expert {expert} in a weight of shape {tuple(self.shape)}")
        shape = self.shape[1:]
        if self.config.scheme == "int8":
            scales = self.absmax.view(self.shape[:2])[expert]
            return dataclasses.replace(self, codes=self.codes[expert], absmax=scales, shape=shape)
        return dataclasses.replace(self, shape=shape, first=self.first + expert * shape.numel())

    def dequantize(self, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """The weight as numbers, each the float32 product of code and scale rounded once to :attr:`dtype`.

        Args:
            rows: which rows of the weight seen as ``[rows, in]`` (a stack's experts one below the other); None: all.
            out: where to write them, contiguous, of any floating dtype; None: a new tensor.

        Returns:
            ``[len(rows), in]``, or of :attr:`shape` for all rows.
        """
        height, width = self._matrix()
        start, stop, step = (rows or slice(None)).indices(height)
        if step != 1:
            raise UsageError(f"rows are decoded one after another: {rows} has steps of {step}")
        wanted = slice(start, max(start, stop))
        count = wanted.stop - start
        if out is None:
            shape = self.shape if rows is None else (count, width)
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        if self._is_odd and triton_kernels(self.device.type) is None:
            self._decode_odd(wanted, out.view(-1))
        else:
            self._decoder(wanted)(slice(0, count), slice(0, width), out.view(count, width))
        return out

    def linear(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """``x W^T + b``, outside of autograd.

        Args:
            x: ``[T, in]`` in :attr:`dtype`.
            bias: ``[out]``, or None.
            onto: ``[T, out]`` that the product is added to in place, each sum rounded once; without a bias.

        Returns:
            ``[T, out]``.
        """
        height, width = self._matrix(flat=False)
        if self._is_odd:
            return F.linear(x, self.dequantize(), bias) if onto is None else onto.addmm_(x, self.dequantize().t())
        y = torch.empty(x.shape[0], height, dtype=x.dtype, device=x.device) if onto is None else onto
        decode = self._decoder(slice(0, height))
        step = min(height, max(1, self._tile_size() // width))
        tile = torch.empty(step, width, dtype=self.dtype, device=self.device)
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            weight = tile[: rows.stop - first]
            decode(rows, slice(0, width), weight)
            if onto is not None:
                y[:, rows].addmm_(x, weight.t())
            elif bias is None:
                torch.mm(x, weight.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, weight.t(), out=y[:, rows])
        return y

    def grad_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """``dY W``, outside of autograd. Tiles are columns: tiles of rows would be summed up, and rounded every time.

        Args:
            dy: ``[T, out]`` in :attr:`dtype`.
            onto: ``[T, in]`` that the product is added to in place, each sum rounded once.

        Returns:
            ``[T, in]``.
        """
        height, width = self._matrix(flat=False)
        if self._is_odd:
            return dy @ self.dequantize() if onto is None else onto.addmm_(dy, self.dequantize())
        dx = torch.empty(dy.shape[0], width, dtype=dy.dtype, device=dy.device) if onto is None else onto
        decode = self._decoder(slice(0, height))
        step = min(width, max(1, self._tile_size() // (height * self._group)) * self._group)
        tile = torch.empty(height * step, dtype=self.dtype, device=self.device)
        for first in range(0, width, step):
            columns = slice(first, min(first + step, width))
            weight = tile[: height * (columns.stop - first)].view(height, -1)
            decode(slice(0, height), columns, weight)
            if onto is None:
                torch.mm(dy, weight, out=dx[:, columns])
            else:
                dx[:, columns].addmm_(dy, weight)
        return dx

    def _matrix(self, flat: bool = True) -> tuple[int, int]:
        """Rows and columns; of a stack its experts one below the other, which only ``flat`` allows."""
        if self.ndim != 2 and not flat:
            raise UsageError(f"a weight of shape {tuple(self.shape)} is no matrix", fix="take one expert with index(e)")
        return self.numel() // self.shape[-1], self.shape[-1]

    def _tile_size(self) -> int:
        return (TILE_BYTES if self.device.type == "cpu" else TILE_BYTES_OFF_CPU) // self.dtype.itemsize

    @property
    def _is_odd(self) -> bool:
        """4 bits in rows of odd length: every other row begins inside a byte, so there are no tiles of columns."""
        return self.config.scheme != "int8" and self.shape[-1] % 2 == 1

    @property
    def _group(self) -> int:
        """Columns that share a scale in every row, wherever blocks begin."""
        return 1 if self.config.scheme == "int8" else math.gcd(self.shape[-1], self.config.block_size)

    def _grid(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Codes and float32 scales of whole rows as matrices: the scales ``[R, in / group]``, or ``[R]`` for INT8."""
        height, width = self._matrix()
        if self.config.scheme == "int8":
            return self.codes.view(height, width)[rows], self.absmax[rows]
        begin, end = self.first + rows.start * width, self.first + rows.stop * width
        size, count = self.config.block_size, rows.stop - rows.start
        scales = self._scales(begin // size, -(-end // size))
        if self._group < size:
            skip = begin % size // self._group
            scales = scales.repeat_interleave(size // self._group)[skip : skip + (end - begin) // self._group]
        codes = self.codes.view(-1)[begin // 2 : end // 2].view(count, width // 2)
        return codes, scales.view(count, width // self._group)

    def _scales(self, begin: int, end: int) -> Tensor:
        """``[end - begin]`` float32: the scales of these blocks, with the double quantisation undone."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax[begin:end]
        nested = self.nested_absmax[begin // NESTED_BLOCK : -(-end // NESTED_BLOCK)]
        return dequantize_blockwise(self.absmax[begin:end], nested, skip=begin % NESTED_BLOCK).add_(self.offset)

    def _decoder(self, rows: slice) -> Callable[[slice, slice, Tensor], None]:
        """What writes some of these ``rows`` (counted from their first), and columns, into ``out [R, C]``."""
        kernels = triton_kernels(self.device.type)
        if kernels is not None:
            return functools.partial(self._decode_in_kernel, kernels, rows.start)
        codes, scales = self._grid(rows)

        def decode(some: slice, columns: slice, out: Tensor) -> None:
            if self.config.scheme == "int8":
                decode_int8(codes[some, columns], scales[some], out)
                return
            groups = slice(columns.start // self._group, columns.stop // self._group)
            packed = codes[some, columns.start // 2 : columns.stop // 2]
            decode_4bit(packed, scales[some, groups], self.config.scheme, out)

        return decode

    def _decode_in_kernel(self, kernels: ModuleType, start: int, rows: slice, columns: slice, out: Tensor) -> None:
        """These rows, counted from row ``start``, and columns, into ``out [R, C]``."""
        height, width = self._matrix()
        rows = slice(start + rows.start, start + rows.stop)
        if self.config.scheme == "int8":
            kernels.dequantize_int8(self.codes.view(height, width)[rows, columns], self.absmax[rows], out)
            return
        nested = None
        if self.nested_absmax is not None and self.offset is not None:
            nested = dynamic_map(True, self.device), self.nested_absmax, self.offset
        first, stride = self.first + rows.start * width + columns.start, width
        if columns == slice(0, width):  # one piece
            out, stride = out.view(1, -1), 0
        book = codebook(self.config.scheme, self.device)
        kernels.dequantize_4bit(self.codes, self.absmax, book, self.config.block_size, out, nested, first, stride)

    def _decode_odd(self, rows: slice, out: Tensor) -> None:
        """Rows of odd length into flat ``out``, byte by byte: half as fast."""
        begin, end = self.first + rows.start * self.shape[-1], self.first + rows.stop * self.shape[-1]
        codes = self.codes.view(-1)[begin // 2 : -(-end // 2)]
        per_block = self.config.block_size // 2
        block = begin // 2 // per_block
        skip = begin // 2 % per_block
        scales = self._scales(block, -(-end // self.config.block_size)).repeat_interleave(per_block)
        pairs = torch.empty(codes.numel(), 2, dtype=out.dtype, device=out.device)
        decode_4bit(codes[:, None], scales[skip : skip + codes.numel(), None], self.config.scheme, pairs)
        out.copy_(pairs.view(-1)[begin % 2 : begin % 2 + out.numel()])
