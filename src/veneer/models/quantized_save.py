"""A base with its weights in codes as a Hugging Face folder, in bitsandbytes' keys: transformers opens it, as we do.

Stacks of experts in codes and INT4 have no form that bitsandbytes knows. A folder with one of them is marked as ours,
so that transformers refuses it instead of filling what it cannot read with random numbers.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer import __version__
from veneer.errors import UsageError
from veneer.files import atomic_folder, write_json
from veneer.models.processor import copy_processor
from veneer.models.quantized_config import OURS
from veneer.quant import QuantConfig, QuantizedLinear
from veneer.quant.stack import QuantizedStack

if TYPE_CHECKING:
    from veneer.models.load import Base

_log = logging.getLogger("veneer.models")


def save_base(base: Base, folder: str | Path, *, overwrite: bool = False, max_shard_size: int | str = "5GB") -> Path:
    """Writes configuration, weights, generation settings and tokenizer; :func:`load_base` reads the same codes back.

    Args:
        base: with its weights in codes, and without an adapter attached.
        folder: is whole afterwards, or as it was before.
        overwrite: replace ``folder`` where it holds something.
        max_shard_size: of one weight file, in bytes or as "5GB".

    Returns:
        The folder.

    Raises:
        UsageError: the base has plain weights, or adapters; ``folder`` is taken.
        StorageError: it cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    if base.quantized is None:
        raise UsageError(
            "this base's weights are not in codes",
            where="save_base",
            fix="load it with quantize='nf4', or copy its files",
        )
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("the output is taken", where=str(target), fix="choose another folder, or overwrite=True")
    tensors = _tensors(base.module)
    foreign = any(isinstance(part, QuantizedStack) for part in base.module.modules())
    foreign = foreign or base.quantized.config.scheme == "int4"
    if foreign:
        _log.warning("experts and INT4 in codes have no form that other programs read: %s opens here alone", target)
    config: Any = copy.deepcopy(base.module.config)
    config.architectures, config.dtype = [type(base.module).__name__], base.dtype
    config.quantization_config = _ours(base.quantized.config) if foreign else _bitsandbytes(base)
    with atomic_folder(target) as temporary:
        config.save_pretrained(str(temporary))
        if base.module.generation_config is not None:
            base.module.generation_config.to_json_file(temporary / "generation_config.json")
        _copy_code(config, Path(base.module.config.name_or_path), temporary)
        base.tokenizer.save_pretrained(str(temporary))
        copy_processor(Path(base.module.config.name_or_path), temporary)
        _write_weights(tensors, temporary, max_shard_size)
        record = {"base": base.identity.to_dict(), "quantization": base.quantized.record()}
        write_json(temporary / "veneer.json", record | {"veneer_version": __version__})
    return target


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor under the name that it is read back by, each once."""
    state = module.state_dict()
    if any(".base_layer." in name or ".adapters." in name for name in state):
        raise UsageError(
            "the base has an adapter attached, which would not be saved",
            where="save_base",
            fix="detach it first, or save the adapter with its own save()",
        )
    pairs: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for name, source in pairs.items():
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr():
            del state[name]
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    mode = (folder / "config.json").stat().st_mode & 0o777
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        os.chmod(folder / name, mode)  # safetensors creates its file for the owner alone
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _bitsandbytes(base: Base) -> dict[str, Any]:
    """``quantization_config`` as transformers writes it; the block size stands with each weight."""
    assert base.quantized is not None
    module, config = base.module, base.quantized.config
    four = config.scheme != "int8"
    plain = [p for p, part in module.named_modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"]
    coded = [path for path, part in module.named_modules() if isinstance(part, QuantizedLinear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": config.scheme if four else "fp4",
        "bnb_4bit_use_double_quant": four and config.double_quant,
        "bnb_4bit_compute_dtype": str(base.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": [_exactly(path, coded) for path in plain],
    }


def _exactly(path: str, others: list[str]) -> str:
    """A name for ``path`` alone: some versions of transformers take any name that begins or ends alike for it."""
    alike = any(other.startswith(path) or other.endswith(path) for other in others)
    return f"{re.escape(path)}$" if alike else path


def _ours(config: QuantConfig) -> dict[str, Any]:
    return {"quant_method": OURS, "scheme": config.scheme, "double_quant": config.double_quant}


def _copy_code(config: Any, source: Path, folder: Path) -> None:
    """A model that brings code of its own is of no use without it."""
    if getattr(config, "auto_map", None) and source.is_dir():
        for file in source.glob("*.py"):
            shutil.copy(file, folder / file.name)
