"""An adapter on disk, in PEFT's format, and back: strict both ways, same adapter same bytes, never a pickle.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's), and ``veneer.json`` (which base the
adapter belongs to, and how that was quantised; PEFT does not read it). Keys are ``base_model.model.<path>.<tensor>``,
without the adapter's name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer import __version__
from veneer.adapters.adalora import as_plain, is_adalora
from veneer.adapters.config import ALL_LINEAR, LoraConfig
from veneer.adapters.dora import KEY as MAGNITUDE
from veneer.adapters.model import KEY_PREFIX, AdaptedModel, BaseLike, IdentityLike
from veneer.adapters.new_tokens import TOKENIZER_FILES, add_recorded, added_to, write_tokenizer
from veneer.adapters.peft_names import (
    compact_parameters,
    compact_targets,
    has_stacks,
    named_as_parameters,
    not_in_peft,
    stable_patterns,
)
from veneer.adapters.precision import Precision, precision_of
from veneer.adapters.slots import base_modules
from veneer.adapters.targets import Plan, inside, output_heads, resolve
from veneer.errors import AdapterError, StorageError
from veneer.files import atomic_folder, write_json

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "veneer.json"
TRAINING = "training_state.safetensors"  # of a variant that trains other tensors than those that its file holds
_OURS = {CONFIG, WEIGHTS, RECORD, TRAINING, "README.md", "inspect.png", *TOKENIZER_FILES}

_log = logging.getLogger("veneer.adapters")


def save_adapter(
    adapted: AdaptedModel,
    folder: str | Path,
    *,
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
    training_state: bool = False,
) -> Path:
    """Writes an adapter (the active one) as a folder that is whole or absent.

    Args:
        extra: JSON-able notes for ``veneer.json``, beside the base's identity and precision and Veneer's version.
        training_state: also what training goes on from, where a variant trains other tensors than the file holds.

    Returns:
        The folder.

    Raises:
        AdapterError: no such adapter. StorageError: the folder holds something else, or cannot be written.
    """
    config, plan, tensors = adapted.portable(name)
    tensors = _for_file(tensors)
    own = _for_file(adapted.state(name)) if training_state else {}
    is_same = own.keys() == tensors.keys() and all(own[key].shape == tensors[key].shape for key in own)
    target = Path(folder)
    if target.is_dir():
        strangers = sorted(set(os.listdir(target)) - _OURS)
        if strangers:
            # The folder is replaced as a whole: whatever else lies in it would be lost.
            what = f"the folder holds other files ({', '.join(strangers[:3])})"
            raise StorageError(what, where=str(target), fix="save the adapter in a folder of its own")
    identity = None if adapted.base is None else adapted.base.identity.to_dict()
    # Trained over codes of its own, an adapter is for the weights that they were made from.
    has_own_codes = any(adapter.own is not None for adapter in adapted.linears(name).values())
    quantization = None if has_own_codes else precision_of(adapted.base).to_dict()
    record = {**(extra or {}), "base": identity, "quantization": quantization, "veneer_version": __version__}
    if any(stack.experts is not None for stack in plan.experts):  # PEFT's layout has zeros for the others
        record["experts"] = {t.path: list(t.experts or range(t.count)) for t in plan.experts}
    if config.lora_dropout:
        record["lora_dropout"] = config.lora_dropout
    if plan.parameters:  # PEFT's format has no place for them
        record["parameters_to_save"] = [f"{path}.{name}" for path, names in plan.parameters for name in names]
    if beyond := not_in_peft(adapted.module, config, plan):
        record["not_in_peft"] = beyond
        for line in beyond:
            _say_once(line)
    if added := added_to(adapted.base):
        record["added_tokens"] = added
    with atomic_folder(target) as temporary:
        write_tokenizer(adapted.base, temporary)
        write_json(temporary / CONFIG, _file_config(adapted, config, plan))
        for file, held in ((WEIGHTS, tensors), (TRAINING, {} if is_same else own)):
            if held or file == WEIGHTS:
                save_file(held, temporary / file, metadata={"format": "pt"})
                # safetensors creates its file for the owner alone, whatever the umask says.
                os.chmod(temporary / file, (temporary / CONFIG).stat().st_mode & 0o777)
        write_json(temporary / RECORD, record)
    return target


def load_adapter(
    target: nn.Module | BaseLike | AdaptedModel,
    folder: str | Path,
    *,
    name: str = "default",
    allow_base_mismatch: bool = False,
    allow_other_precision: bool = False,
) -> AdaptedModel:
    """Puts a saved adapter on a base and makes it the active one.

    Every tensor of the file is used and every tensor that the config asks for is in the file, else nothing is changed.
    A base in another precision than the one that the adapter was trained over is taken, with a warning.

    Args:
        target: a module, a base, or an adapted model that gets one more adapter.
        folder: written by Veneer or by PEFT.
        allow_base_mismatch: load even where the file was trained on a base with other weights.
        allow_other_precision: the other precision is meant: no warning.

    Raises:
        AdapterError: a file is missing, broken or a pickle; it belongs to another base; a tensor does not fit.
    """
    folder = Path(folder)
    config, tensors = read_adapter(folder)
    adapted = target if isinstance(target, AdaptedModel) else AdaptedModel(target)
    if adapted.base is not None and not allow_base_mismatch:
        _check_base(folder, adapted.base.identity)
    warning = None if allow_other_precision else _other_precision(folder, adapted.base)
    where = str(folder / WEIGHTS)
    recorded = read_record(folder).get("added_tokens") or {}
    add_recorded(adapted.base, recorded, is_adapted=bool(adapted.configs), where=str(folder / RECORD))
    plan = resolve(adapted.module, config, from_file=True)
    tensors = _without_base_copies(adapted.module, plan, tensors, where)
    before = adapted.active_names
    adapted.install(name, config, plan)
    try:
        adapted.start(name)
        adapted.load_state(tensors, name, where=where)
        adapted.use(name)
    except BaseException:
        adapted.remove(name)
        if before:
            adapted.use(*before)
        elif not adapted.configs:
            adapted.detach()
        raise
    if warning:
        _log.warning("%s", warning)
    return adapted


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors (on the CPU, by key) of an adapter folder, without a model.

    Raises:
        AdapterError: a file is missing, broken or a pickle, or its config is not supported.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        what = "there is no adapter here" if folder.is_dir() else "there is no such folder"
        raise AdapterError(what, where=str(folder), fix=f"give the folder that holds {CONFIG}")
    data = _read_json(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                "the weights are a pickle, which can run code when it is read",
                where=str(folder / "adapter_model.bin"),
                fix=f"convert it where you trust it: load it with PEFT and save it again, which writes {WEIGHTS}",
            )
        raise AdapterError("the weights are missing", where=str(path), fix="copy the whole adapter folder")
    tensors = {_key(key): tensor for key, tensor in _read_weights(path).items()}
    if is_adalora(data):
        data, tensors = as_plain(data, tensors, where=str(path))
    config = LoraConfig.from_dict(data, where=str(folder / CONFIG))
    recorded = read_record(folder)
    kept: dict[str, Any] = {key: recorded[key] for key in ("experts", "lora_dropout") if key in recorded}
    if "parameters_to_save" in recorded:
        kept["modules_to_save"] = [*(config.modules_to_save or ()), *recorded["parameters_to_save"]]
    return (dataclasses.replace(config, **kept) if kept else config), tensors


def read_training_state(folder: str | Path) -> dict[str, Tensor]:
    """The tensors that training goes on from: those of :func:`read_adapter` for most adapters.

    Raises:
        AdapterError: as :func:`read_adapter`.
    """
    path = Path(folder) / TRAINING
    return _read_weights(path) if path.is_file() else read_adapter(folder)[1]


def read_record(folder: str | Path) -> dict[str, Any]:
    """What ``veneer.json`` says of an adapter folder; empty where another program wrote it."""
    path = Path(folder) / RECORD
    return _read_json(path) if path.is_file() else {}


def recorded_precision(folder: str | Path) -> Precision | None:
    """How the base was stored that an adapter was trained over; None where its folder does not say (another program's).

    Raises:
        AdapterError: ``veneer.json`` is broken, or says it in a way that is not understood.
    """
    record = read_record(folder)
    if "quantization" not in record:
        return None
    return Precision.from_dict(record["quantization"], where=str(Path(folder) / RECORD))


def warnings_of(adapted: AdaptedModel) -> list[str]:
    """What to say of the active adapter before it is trained: where it is not as asked, and where PEFT will differ."""
    name = adapted.active
    if name is None:
        return []
    plan = adapted.plans[name]
    return [*plan.notes, *not_in_peft(adapted.module, adapted.configs[name], plan)]


@functools.cache
def _say_once(text: str) -> None:
    """A run saves many checkpoints of one adapter."""
    _log.warning("%s", text)


def _for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cpu().contiguous() for key, value in tensors.items()}


def _key(key: str) -> str:
    """Some programs write DoRA's magnitude as the weight of a module, which it is inside PEFT."""
    return key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE}.weight") else key


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        fix = "the file is cut off or damaged: copy it again, or use another checkpoint"
        raise AdapterError(f"cannot read the weights: {error}", where=str(path), fix=fix) from error


def _file_config(adapted: AdaptedModel, config: LoraConfig, plan: Plan) -> dict[str, Any]:
    module = adapted.module
    data = config.to_dict()
    modules = base_modules(module)
    parameters = named_as_parameters(modules, config, plan)
    is_cut = isinstance(config.target_modules, str) and has_stacks(modules)
    if config.target_modules == ALL_LINEAR or parameters or config.target_parameters or is_cut:
        # PEFT would resolve it by its own rules for the head, on whatever model it is given: say what was meant. Beside
        # experts it keeps of a regular expression only the last names.
        data["target_modules"] = compact_targets(module, config, plan, parameters)
    names = [*(f"{path}.weight" for path in parameters), *(stack.name for stack in plan.experts)]
    data["target_parameters"] = compact_parameters(modules, names) or None
    data["rank_pattern"], data["alpha_pattern"] = stable_patterns(config, plan, parameters)
    if parameters:
        data["lora_dropout"] = 0  # PEFT refuses any beside target_parameters; veneer.json has what was trained with
    # Whole paths mean the same to PEFT, which would take 'norm' for every module whose name ends in it.
    data["modules_to_save"] = sorted(plan.saved) or None
    if isinstance(config.trainable_token_indices, Mapping):
        data["trainable_token_indices"] = {t.path: list(t.token_ids) for t in plan.tokens if t.tied_to is None}
    data["fan_in_fan_out"] = any(target.kind == "conv1d" for target in plan.lora)
    if config.task_type is None and type(module).__name__.endswith("ForCausalLM"):
        data["task_type"] = "CAUSAL_LM"
    identity = None if adapted.base is None else adapted.base.identity
    data["base_model_name_or_path"] = None if identity is None else identity.name
    data["revision"] = None if identity is None else identity.revision
    return data


def _check_base(folder: Path, identity: IdentityLike) -> None:
    recorded = read_record(folder).get("base") or {}
    expected, actual = recorded.get("weight_hash"), identity.weight_hash
    if expected and actual and expected != actual:
        raise AdapterError(
            f"the adapter was trained on '{recorded.get('name')}' with weights {expected}, "
            f"but this base is '{identity.name}' with weights {actual}",
            where=str(folder / RECORD),
            fix="load the adapter's own base, or pass --allow-base-mismatch (allow_base_mismatch=True)",
        )


def _other_precision(folder: Path, base: BaseLike | None) -> str | None:
    """What to say where a base is stored in another way than the adapter was trained over."""
    trained, present = recorded_precision(folder), precision_of(base)
    if base is None or trained is None or trained.is_same(present):
        return None
    return (
        f"{folder}: this adapter was trained over {trained}, and here the base has {present}: its answers will differ "
        f"a little from those of the run. To have the same ones, load the base {trained.how_to_load}"
    )


def _without_base_copies(module: nn.Module, plan: Plan, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """PEFT adds an embedding's or head's whole matrix when one is targeted. It may go only if it is the base's own."""
    modules = base_modules(module)
    heads = output_heads(modules)
    kept = dict(tensors)
    for key in tensors:
        path = key.removeprefix(KEY_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        layer = modules.get(path)
        if not isinstance(layer, nn.Embedding) and not (isinstance(layer, nn.Linear) and path in heads):
            continue
        if not key.endswith(".weight") or inside(path, plan.saved):
            continue
        value, own = tensors[key], layer.weight.detach()
        if value.shape != own.shape or not torch.equal(value.to(own.device, own.dtype), own):
            raise AdapterError(
                f"the file brings its own weights for '{path}' ({list(value.shape)}), and they are not the base's",
                where=f"{where}: {key}",
                fix="use the base that the adapter was trained on (with its resized vocabulary)",
            )
        del kept[key]
    return kept


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"cannot be read as JSON: {error}", where=str(path), fix="copy the file again") from error
    if not isinstance(data, dict):
        raise AdapterError("this should be a JSON object", where=str(path), fix="copy the file again")
    return data
