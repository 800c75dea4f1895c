"""Base models: a hub id, a local folder, a GGUF file or the bundled model, each with its identity.

Whatever was asked for becomes a local Hugging Face folder first (downloaded, or converted from GGUF), and is then read
in one way: only safetensors, every tensor used, every value finite, no code of the model's own unless that was allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from veneer.errors import ModelError, UsageError, did_you_mean
from veneer.kernels.heap import reuse_freed_memory
from veneer.kernels.precision import resolve_dtype
from veneer.models.classifier import load_classifier_module
from veneer.models.fused import Fused, fuse
from veneer.models.gguf import gguf_folder, gguf_tokenizer_folder, gguf_tokenizer_hash
from veneer.models.identity import BaseIdentity, cached_sha256, hash_files, hash_template, hash_tokenizer_files
from veneer.models.originals import each_original
from veneer.models.processor import processor_template
from veneer.models.quantized import Quantized, held_bytes
from veneer.models.quantized_config import chosen_config, declared_config
from veneer.models.quantized_load import Progress, load_quantized
from veneer.models.quantized_read import refuse_codes
from veneer.models.source import find
from veneer.models.strict import check_finite, load_module, quiet, shortlist
from veneer.models.vocabulary import add_tokens
from veneer.quant import QuantConfig
from veneer.runtime import keep_few_products, resolve_device


@dataclass
class Base:
    """A frozen base model with its tokenizer and identity."""

    module: PreTrainedModel  # eval mode, no parameter requires a gradient
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity
    spec: str  # as it was asked for
    fused: Fused = field(default_factory=Fused)  # which blocks run as fused operations
    quantized: Quantized | None = None  # which weights are in codes, measured
    labels: tuple[str, ...] = ()  # of a classifier, in the order of its logits
    head: tuple[str, ...] = ()  # of a classifier: the modules that an adapter has to train and save whole
    added_tokens: dict[str, int] = field(default_factory=dict)  # by add_tokens, with their ids

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight: torch.Tensor = next(self.module.parameters())
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are computed in, whatever they are stored in."""
        weight: torch.Tensor = next(self.module.parameters())
        return weight.dtype

    @property
    def quantization(self) -> QuantConfig | None:
        """How the weights are stored; None where they are plain tensors."""
        return None if self.quantized is None else self.quantized.config

    def each_original(self, paths: Collection[str], visit: Callable[[str, torch.Tensor], None]) -> None:
        """Calls ``visit`` with each path and its linear's weight ``[out, in]`` before it was quantised, one at a time.

        Raises:
            ModelError: the files hold codes alone, or cannot be read any more.
        """
        each_original(self.module, weight_files(Path(self.module.name_or_path)), paths, visit)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they lie now."""
        return held_bytes(self.module)

    def add_tokens(self, tokens: Sequence[str]) -> list[int] | dict[str, list[int]]:
        """New tokens, in place: :func:`veneer.models.vocabulary.add_tokens`."""
        return add_tokens(self, tokens)


def load_base(
    spec: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | QuantConfig | None = None,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    memory_check: bool = True,
    labels: Sequence[str] | None = None,
    head_seed: int = 0,
) -> Base:
    """Loads a base model, frozen and in eval mode, with its recognised blocks swapped for fused ones.

    With ``quantize`` every weight goes into codes as it is read, so that memory never holds the 16-bit model. A folder
    whose weights are in bitsandbytes' codes already is loaded as it is, with or without ``quantize``.

    Args:
        spec: a hub id, a folder, a ``.gguf`` file, or ``smollm2-135m``; ``tiny-random-moe`` and ``tiny-random-hybrid``
            have random weights, for trying things out.
        dtype: auto, bfloat16, float16 or float32: of what is computed, and of the weights that are not in codes.
        device: auto, cpu, cuda, cuda:N or mps.
        revision: a branch, tag or commit of a hub id.
        trust_remote_code: allows code that comes with the model to run. Weights are never unpickled either way.
        quantize: nf4, fp4 or int8, or a configuration with the block size; None or "none": plain tensors.
        skip: what keeps 16 bits: names of modules (``down_proj``, ``layers.0``) or regular expressions for whole paths.
        progress: is called with the tensors read so far, those in all, and the name of the next one; with ``quantize``.
        memory_check: refuse a quantised load that would not fit into the memory that is free.
        labels: names of classes: the model gets a head that tells them apart (``Base.head``, to be trained whole), in
            place of the one that continues text. Encoders can be loaded in this way alone.
        head_seed: of that head's start.

    Raises:
        ModelError: there is no such model, or its files are missing, damaged or not understood; memory does not
            suffice; the weights are in codes of another kind than asked for.
        UsageError: an unknown dtype, device or quantisation, a revision of something that has none, or an entry of
            ``skip`` that matches nothing.
        StorageError: a converted model cannot be written to the cache folder.
    """
    keep_few_products()
    where = resolve_device(device)
    if where.type == "cpu":
        reuse_freed_memory()
    kind = resolve_dtype(dtype, where)
    wanted = chosen_config(quantize, where, skip)
    source = find(spec, revision, trust_remote_code)
    folder = source.folder or gguf_folder(source.gguf_file(), kind)
    config, declared = _read_config(folder, trust_remote_code, wanted, skip, classifier=labels is not None)
    tokenizer = _read_tokenizer(folder, trust_remote_code)
    files = weight_files(folder)
    if declared is None:
        refuse_codes(files)
    quantized: Quantized | None = None
    head: tuple[str, ...] = ()
    if labels is not None:
        if wanted or declared:
            raise UsageError("a classifier's base cannot be in codes yet", where=str(spec), fix="use quantize: none")
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        module, head = load_classifier_module(
            folder, config, kind, labels, pad_id, seed=head_seed, trust_remote_code=trust_remote_code
        )
        module = module.to(where)
    elif wanted or declared:
        module, quantized = load_quantized(
            folder,
            files,
            config,
            declared or wanted or QuantConfig(),
            in_codes=declared is not None,
            skip=skip,
            dtype=kind,
            device=where,
            trust_remote_code=trust_remote_code,
            progress=progress,
            memory_check=memory_check,
        )
    else:
        module = load_module(folder, config, kind, trust_remote_code=trust_remote_code).to(where)
    module.requires_grad_(False)
    module.eval()
    check_finite([*module.named_parameters(), *module.named_buffers()], str(folder))
    _check_vocabulary(module, tokenizer, folder)
    identity = BaseIdentity(
        name=source.name,
        revision=source.revision,
        weight_hash=cached_sha256(source.gguf) if source.gguf else hash_files(files),
        tokenizer_hash=gguf_tokenizer_hash(folder) if source.gguf else hash_tokenizer_files(folder),
        template_hash=hash_template(tokenizer.chat_template),
    )
    fused = fuse(module)
    return Base(
        module=module,
        tokenizer=tokenizer,
        identity=identity,
        spec=str(spec),
        fused=fused,
        quantized=quantized,
        labels=tuple(labels or ()),
        head=head,
    )


def load_tokenizer(
    spec: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, without reading any weights.

    Raises:
        ModelError: there is no such model, or it has no tokenizer that can be read.
    """
    source = find(spec, revision, trust_remote_code, weights=False)
    return _read_tokenizer(source.folder or gguf_tokenizer_folder(source.gguf_file()), trust_remote_code)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder in name order, each proven whole.

    Raises:
        ModelError: none is there, one of the index is missing, or one is cut short or damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        _tensor_names(single)
        return [single]
    if not index.is_file():
        raise _no_weights(folder)
    try:
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "the index of the weight files cannot be read", where=str(index), fix="fetch it again"
        ) from error
    shards = [folder / name for name in sorted(set(placed.values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ModelError(
            f"{len(absent)} of {len(shards)} weight files are missing: {shortlist(absent)}",
            where=str(folder),
            fix="fetch the model again; the download was not finished",
        )
    held = {name: shard.name for shard in shards for name in _tensor_names(shard)}
    misplaced = [name for name, shard in placed.items() if held.get(name) != shard]
    misplaced += [name for name in held if name not in placed]
    if misplaced:
        raise ModelError(
            f"the weight files do not hold what their index says: {shortlist(misplaced)}",
            where=str(index),
            fix="the files come from different versions of the model; fetch all of them again",
        )
    return shards


def _tensor_names(file: Path) -> list[str]:
    """The names in a safetensors file, whose header is checked against its length on the way."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the weight file is cut short or damaged ({error})",
            where=f"{file} ({file.stat().st_size} bytes)",
            fix="fetch the file again and compare its size",
        ) from error


def _no_weights(folder: Path) -> ModelError:
    names = sorted(entry.name for entry in folder.iterdir())
    if "adapter_config.json" in names:
        return ModelError(
            "this folder holds an adapter, not a base model", where=str(folder), fix="load it with its base: load_model"
        )
    pickled = [name for name in names if re.search(r"\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?$", name)]
    if pickled:
        return ModelError(
            f"the weights are pickled ({shortlist(pickled)}), and pickle is never read: it can run code",
            where=str(folder),
            fix="use a safetensors copy of the model, or convert it where its source is trusted",
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return ModelError(
            "the folder holds GGUF files only", where=str(folder), fix=f"name one of them: {folder / ggufs[0]}"
        )
    return ModelError(
        "there are no weights in the folder",
        where=str(folder),
        fix="it must hold model.safetensors, or shards with an index",
    )


def _read_config(
    folder: Path, trust_remote_code: bool, wanted: QuantConfig | None, skip: Sequence[str], *, classifier: bool
) -> tuple[Any, QuantConfig | None]:
    """The model's configuration, and the codes that its weights are stored in already, if they are.

    Says what is missing before transformers is asked to guess.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise (
            ModelError("the folder has no config.json", where=str(folder), fix="a base model's folder must hold one")
            if not (folder / "adapter_config.json").is_file()
            else _no_weights(folder)
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model_type = str(values["model_type"])
    except (ValueError, TypeError) as error:
        raise ModelError(f"config.json is not JSON: {error}", where=str(path), fix="fetch it again") from error
    except KeyError as error:
        raise ModelError("config.json has no model_type", where=str(path), fix="fetch it again") from error
    writers = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if classifier else writers
    own_code = "auto_map" in values and model_type not in known
    if own_code and not trust_remote_code:
        raise ModelError(
            f"the model '{model_type}' brings code of its own, which is not run unless you say so",
            where=str(path),
            fix="read the code; if you trust it, set trust_remote_code",
        )
    if not own_code and model_type not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"transformers does not know the model type '{model_type}'",
            where=str(path),
            fix=did_you_mean(model_type, CONFIG_MAPPING_NAMES) or "a newer version of transformers may know it",
        )
    if not own_code and model_type not in known and classifier:
        raise ModelError(
            f"transformers has no classifier on a model of type '{model_type}'",
            where=str(path),
            fix="use an encoder such as BERT or ModernBERT, or a decoder such as smollm2-135m",
        )
    if not own_code and model_type not in known:
        encoder = model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        raise ModelError(
            f"a model of type '{model_type}' is not a causal language model",
            where=str(path),
            fix="use a model that continues text, such as smollm2-135m"
            + (", or task: classification, which this one is made for" if encoder else ""),
        )
    declared = declared_config(values, path, wanted, skip)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value in config.json: any of many errors of transformers' validators
        raise ModelError(
            f"transformers cannot read config.json: {str(error).strip().splitlines()[0]}",
            where=str(path),
            fix="fetch it again",
        ) from error
    if not classifier and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        raise ModelError(
            f"a model of type '{model_type}' reads with one network and writes with another, which is not known here",
            where=str(path),
            fix="use a model whose language model reads text by itself, such as those of Qwen2-VL, Gemma 3 or SmolVLM",
        )
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # the codes are read here, not by transformers
    return config, declared


def _read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
            if tokenizer.chat_template is None:
                tokenizer.chat_template = processor_template(folder)
            return tokenizer
    except Exception as error:  # missing files, broken JSON, an unknown class: many kinds of error
        raise ModelError(
            f"the tokenizer cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=str(folder),
            fix="the folder must hold the model's own tokenizer files (tokenizer.json, tokenizer_config.json)",
        ) from error


def _check_vocabulary(module: Any, tokenizer: Any, folder: Path) -> None:
    rows = module.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {largest}, the model {rows} embeddings",
            where=str(folder),
            fix="the tokenizer belongs to another model",
        )
