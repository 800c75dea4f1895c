"""Tensors of safetensors files, read one by one into memory of their own.

A memory map counts as resident what was touched once, so reading a model through one holds all of it. Here the bytes of
a tensor are read when it is asked for, and are gone when it is. Format: 8 bytes with the header's length, the header as
JSON with each tensor's dtype, shape and place, then the data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ModelError
from veneer.runtime import trim_heap

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# A module's weight with whatever bitsandbytes keeps beside it.
_PARTS = r"weight(\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))?|weight_format|SCB"
_WEIGHT = re.compile(rf"(?P<module>.*\.)({_PARTS})")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: described, not read."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory that nothing else shares.

        Raises:
            ModelError: the file ends before the tensor does.
        """
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        left = memoryview(data.numpy())  # type: ignore[arg-type]  # a buffer, which Python 3.11 has no type for
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                count = file.readinto(left)
                if not count:
                    what = f"the weight file is cut short: it ends inside of {self.name}"
                    raise ModelError(what, where=str(self.file), fix="fetch the file again and compare its size")
                left = left[count:]
        return data.view(self.dtype).view(self.shape)


class Heap:
    """Gives freed memory back to the system now and then.

    Weights of a few megabytes, read and freed between codes that stay, leave holes in the C library's heap, which it
    keeps for itself: twice the memory that the model takes.
    """

    _EVERY = 4_000_000  # bytes read between two times, each of which takes some milliseconds

    def __init__(self) -> None:
        self._read = 0

    def before(self, nbytes: int) -> None:
        """Some more bytes are about to be read, and those before are not needed any more."""
        self._read += nbytes
        if self._read > self._EVERY:
            self.give_back()

    def give_back(self) -> None:
        trim_heap()
        self._read = 0


class Lazy:
    """What transformers' loader takes for a tensor: ``[...]`` reads it."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files by its name, none of them read.

    Args:
        files: proven whole (see ``veneer.models.load.weight_files``).

    Raises:
        ModelError: a tensor of a dtype that torch does not have.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                what = f"the tensor is stored in {entry['dtype']}, which is not known here"
                raise ModelError(what, where=f"{path}, {name}", fix="use the model's 16-bit weights")
            start = 8 + length + int(entry["data_offsets"][0])
            found[name] = StoredTensor(path, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return found


def weights_in_codes(tensors: Iterable[StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The parts of each weight that is stored in codes, by its module's prefix with the dot.

    Raises:
        ModelError: a weight is of a codes' dtype and has none of the parts that say what they stand for.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        match = _WEIGHT.fullmatch(tensor.name)
        if match:
            modules.setdefault(match["module"], {})[tensor.name] = tensor
    for module, parts in modules.items():
        name = f"{module}weight"
        if len(parts) == 1 and name in parts and parts[name].dtype in (torch.uint8, torch.int8):
            raise ModelError(
                "the weight is in codes, and the file has no scales for them",
                where=f"{parts[name].file}, {name}",
                fix="the file is damaged, or another program's: fetch it again, or quantise the original weights",
            )
    return {module: parts for module, parts in modules.items() if len(parts) > 1}


def refuse_codes(files: Iterable[Path]) -> None:
    """Codes are not taken for numbers: these files hold plain weights alone.

    Raises:
        ModelError: a weight is in codes, of which config.json says nothing.
    """
    for module, parts in weights_in_codes(stored_tensors(files).values()).items():
        raise ModelError(
            "the weight is in codes, and config.json does not say so",
            where=f"{next(iter(parts.values())).file}, {module}weight",
            fix="config.json and the weights come from different versions of the model; fetch both again",
        )
