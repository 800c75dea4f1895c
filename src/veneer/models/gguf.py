"""A GGUF file as a Hugging Face folder: converted once, kept in the cache under the hash of its content.

The folder holds the weights in the dtype that was asked for: float32 keeps every dequantised value exactly; bfloat16
takes half the space and holds what a bfloat16 load would round to anyway. Which model it is does not depend on this:
the identity is the hash of the GGUF file itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from veneer.errors import ModelError
from veneer.files import atomic_folder, cache_dir, sha256_json, storage_errors, write_json
from veneer.models.gguf_tokenizer import alone, build_tokenizer
from veneer.models.identity import cached_sha256
from veneer.models.strict import check_finite, quiet, shortlist

CONVERTER = 1  # raise when the conversion changes: older folders are then not used any more

_RECORD = "veneer_gguf.json"
_TEMPLATE = "tokenizer.chat_template"
_ROPE_FREQS = "rope_freqs.weight"  # Llama 3's frequency factors: part of the configuration in Hugging Face's format


def gguf_folder(path: Path, dtype: torch.dtype) -> Path:
    """The Hugging Face folder of a GGUF file: config.json, model.safetensors and the tokenizer's files.

    Args:
        path: the ``.gguf`` file.
        dtype: what the model will be loaded in.

    Raises:
        ModelError: the file is cut short, holds NaN, or something that would be lost in the conversion.
        StorageError: the cache folder cannot be written.
    """
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    folder = _root(path) / str(kept).removeprefix("torch.")
    if not folder.exists():
        with _locked(folder):
            if not folder.exists():  # another process may have made it while we waited
                _convert(path, folder, kept)
    return folder


def gguf_tokenizer_folder(path: Path) -> Path:
    """A folder with the tokenizer's files of a GGUF file, made without reading its weights.

    Raises:
        ModelError: the file is cut short, or its tokenizer is of a kind that is not known.
        StorageError: the cache folder cannot be written.
    """
    folder = _root(path) / "tokenizer"
    if not folder.exists():
        with _locked(folder):
            if not folder.exists():
                metadata = _metadata(_reader(path))
                with quiet():
                    tokenizer = build_tokenizer(path, metadata)
                parts = {k: v for k, v in metadata.items() if k.startswith("tokenizer.") and k != _TEMPLATE}
                with atomic_folder(folder) as temporary:
                    tokenizer.save_pretrained(str(temporary))
                    write_json(temporary / _RECORD, {"converter": CONVERTER, "tokenizer_hash": sha256_json(parts)})
    return folder


def gguf_tokenizer_hash(folder: Path) -> str:
    """Hex SHA-256 of what the GGUF file behind a converted folder says of its tokenizer, without the chat template.

    Of the file's own values, not of the converted files, which differ between versions of the tokenizers library.
    """
    return str(json.loads((folder / _RECORD).read_text(encoding="utf-8"))["tokenizer_hash"])


def _root(path: Path) -> Path:
    return cache_dir() / "models" / f"{cached_sha256(path)[:20]}-{CONVERTER}"


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            yield


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError("not a GGUF file", where=str(path), fix="a GGUF file starts with the bytes 'GGUF'")
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(
            "the GGUF file is cut short or damaged",
            where=f"{path} ({path.stat().st_size} bytes)",
            fix="fetch it again and compare its size",
        ) from error


def _metadata(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    reader = _reader(path)
    metadata = _metadata(reader)
    config = _config(path, metadata, reader)
    tensors = _tensors(path, config, reader)
    check_finite(tensors.items(), str(path))
    tokenizer = gguf_tokenizer_folder(path)
    config.dtype = dtype
    with atomic_folder(folder) as temporary:
        shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        config.save_pretrained(str(temporary))
        stops = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        ids = list(dict.fromkeys(int(stop) for stop in stops if stop is not None))
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=ids or None, pad_token_id=config.pad_token_id
        ).save_pretrained(str(temporary))
        weights = temporary / "model.safetensors"
        save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, weights, metadata={"format": "pt"})
        os.chmod(weights, (temporary / "config.json").stat().st_mode)  # save_file lets the owner alone read


def _config(path: Path, metadata: dict[str, Any], reader: Any) -> Any:
    """transformers' configuration of the file, checked against what the file says."""
    architecture = metadata["general.architecture"]
    try:
        with quiet(), alone(path) as folder:
            config = AutoConfig.from_pretrained(str(folder), gguf_file=path.name, local_files_only=True)
            model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(
            f"a GGUF model of architecture '{architecture}' cannot be read",
            where=str(path),
            fix="use the model's Hugging Face folder",
        ) from error
    config.architectures = [model_class.__name__]
    config.__dict__.pop("_model_name_or_path", None)  # the file's title, which is no path
    rope = dict(getattr(config, "rope_parameters", None) or {})
    # float32 in the file: 9.999999747378752e-06 is 1e-05
    if isinstance(getattr(config, "rms_norm_eps", None), float):
        config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    factors = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FREQS]
    if factors:
        rope |= _llama3_rope(path, np.asarray(factors[0].data, dtype=np.float64), config, rope)
        config.rope_parameters = rope
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and rope.get("rope_type", "default") == "default":
        raise ModelError(
            f"the GGUF file stretches its positions ('{scaling}'), which would be lost in the conversion",
            where=f"{path}, {architecture}.rope.scaling.type",
            fix="use the model's Hugging Face folder",
        )
    window = metadata.get(f"{architecture}.attention.sliding_window")
    if window and hasattr(config, "sliding_window"):
        config.sliding_window = int(window)
    stated = {
        "max_position_embeddings": metadata.get(f"{architecture}.context_length"),
        "hidden_size": metadata.get(f"{architecture}.embedding_length"),
        "num_attention_heads": metadata.get(f"{architecture}.attention.head_count"),
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv"),
        "head_dim": metadata.get(f"{architecture}.attention.key_length"),
    }
    for name, value in stated.items():
        ours = getattr(config, name, None)
        if isinstance(value, int) and isinstance(ours, int) and ours != value:
            raise ModelError(
                f"{name} is {value} in the GGUF file but {ours} after the conversion",
                where=str(path),
                fix="use the model's Hugging Face folder",
            )
    return config


def _llama3_rope(path: Path, stored: np.ndarray, config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """The settings of Llama 3's stretched positions that give exactly the factors stored in the file."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta, low, high, original = float(rope["rope_theta"]), 1.0, 4.0, 8192
    factor = float(stored.max())
    frequencies = theta ** -(np.arange(0, head, 2) / head)
    turns = original * frequencies / (2 * np.pi)  # full turns of each pair within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise ModelError(
            "the GGUF file stretches its positions in a way that is not known here",
            where=f"{path}, {_ROPE_FREQS}",
            fix="use the model's Hugging Face folder",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tensors(path: Path, config: Any, reader: Any) -> dict[str, Tensor]:
    """Every tensor of the file by its Hugging Face name, dequantised to float32."""
    # The function behind transformers' own GGUF loading; from_pretrained would ask for accelerate to call it.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with quiet(), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            tensors: dict[str, Tensor] = load_gguf_checkpoint(
                str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=torch.float32
            )["tensors"]
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"the GGUF file's weights cannot be read: {error}",
            where=str(path),
            fix="use the model's Hugging Face folder",
        ) from error
    tied = set(getattr(skeleton, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    wanted = {name: parameter.shape for name, parameter in skeleton.state_dict().items()}
    missing = [name for name in wanted if name not in tensors and name not in tied]
    wrong = [name for name, tensor in tensors.items() if tensor.shape != wanted.get(name)]
    # Names differ between the two formats, so what was left behind is seen by its size.
    sizes = Counter(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != _ROPE_FREQS)
    lost = sum(sizes.elements()) - sum(tensor.numel() for tensor in tensors.values())
    unused: list[str] = []
    if lost:
        left = sizes - Counter(tensor.numel() for tensor in tensors.values())
        unused = [tensor.name for tensor in reader.tensors if int(tensor.n_elements) in left]
    for problem, names in (("are missing", missing), ("have another shape", wrong), ("would be lost", unused)):
        if names:
            raise ModelError(
                f"tensors of the GGUF file {problem}: {shortlist(names)}",
                where=str(path),
                fix="use the model's Hugging Face folder",
            )
    if lost:
        raise ModelError(
            "the GGUF file holds more weights than the model", where=str(path), fix="use its source folder"
        )
    return tensors
