"""What an adapter is made of: :class:`LoraConfig`, and its way to and from PEFT's ``adapter_config.json``.

Field names and meanings are PEFT's, the defaults are not: every linear layer is adapted, with rank 16.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.adapters.combinations import check_combination
from veneer.adapters.settings import AdaLoraConfig, EvaConfig, LoftqConfig, LoraGaConfig, section
from veneer.errors import AdapterError, did_you_mean

ALL_LINEAR = "all-linear"
# By what an initialisation needs: nothing, the weight, or rows of data.
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
WEIGHT_INITS = ("pissa", "olora", "loftq")  # and pissa_niter_N
DATA_INITS = ("eva", "lora_ga")
INITS = (*PLAIN_INITS, *WEIGHT_INITS, *DATA_INITS)
PISSA_NITER = re.compile(r"pissa_niter_(\d+)")

# PEFT's keys that change the maths and that we do not compute, with the values under which they do nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "bias": ("none",),
    "ensure_weight_tying": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Notes of the writer, and settings of initialisations or variants that another key switches on.
_NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}


_SEQUENCES = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "experts",
)
_SECTIONS: dict[str, type] = {
    "loftq_config": LoftqConfig,
    "eva_config": EvaConfig,
    "lora_ga_config": LoraGaConfig,
    "adalora_config": AdaLoraConfig,
}
# Fields that say how an adapter starts or is trained, not what it computes.
_OF_TRAINING = (*_SECTIONS, "use_lora_fa", "experts")


@dataclass(frozen=True)
class LoraConfig:
    """One adapter: which modules it changes, how strongly, and how it starts.

    The adapted linear computes ``W x + s B (A x)`` with ``s = lora_alpha / r`` (Hu et al. 2021, eq. 3).

    A list given for a field is copied into a tuple, and nothing changes a config afterwards.

    Args:
        r: rank of the update.
        lora_alpha: strength of the update, divided by ``r`` (by ``sqrt(r)`` under ``use_rslora``).
        target_modules: ``"all-linear"`` (every linear but the output head, and every router), a list of names (a whole
            path, or its end after a dot), or one regular expression that has to match the whole path. An embedding may
            be named too; where the output head is tied to it, the adapter acts on the input side only, as PEFT's does.
        exclude_modules: names or a regular expression, as above, that win over ``target_modules``.
        lora_dropout: probability of dropping an element of the adapter's input while training; the base sees all of it.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023).
        layers_to_transform: only these layer indices; not together with a regular expression.
        layers_pattern: name of the list of layers, where the first number in a path is not the layer's index.
        rank_pattern: ``{pattern: r}`` for single modules; a pattern is a regular expression for the end of a path,
            from a dot on; the first one that matches, in order, wins.
        alpha_pattern: ``{pattern: lora_alpha}``, likewise.
        modules_to_save: modules that get a trained copy of their own, saved whole.
        trainable_token_indices: ids of tokens whose rows of the input embedding are trained (a tied output head
            follows), or ``{module: ids}``.
        init_lora_weights: ``True`` (Kaiming A, zero B), ``"gaussian"``, ``"orthogonal"``, or ``False`` (a random
            update, for tests); from the weights: ``"pissa"``, ``"pissa_niter_N"`` (N rounds of a randomised SVD),
            ``"olora"``, ``"loftq"`` (over codes); from rows of data: ``"eva"``, ``"lora_ga"``.
        loftq_config, eva_config, lora_ga_config: their settings, as mappings or as the dataclasses of that name.
        bias: only ``"none"``: a trained base bias would make "adapter off" something else than the base.
        fan_in_fan_out: accepted and not needed: the layer's type decides.
        use_dora: train the size of each row of the weight apart from its direction (Liu et al. 2024).
        use_lora_fa: only B is trained, A stays as it starts (Zhang et al. 2023, LoRA-FA).
        adalora_config: ranks move to where they matter while training (Zhang et al. 2023, AdaLoRA), from ``r``
            everywhere to ``target_r`` on average.
        target_parameters: parameters, by the ends of their paths: stacked weights of experts, the matrix of a router
            (``gate.weight``) or of a linear, which is read as the linear itself.
        experts: which experts of every MoE layer are adapted: ``"none"``, ``"all"``, ``"top-K"`` (the K that rows of
            data activate most), a list of indices, or such lists by the path of the layer.
        task_type: written into the file for PEFT; nothing here depends on it.

    Raises:
        AdapterError: a value is out of range, or two settings exclude each other.
    """

    r: int = 16
    lora_alpha: float = 32
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_dora: bool = False
    use_lora_fa: bool = False
    loftq_config: LoftqConfig | Mapping[str, Any] | None = None
    eva_config: EvaConfig | Mapping[str, Any] | None = None
    lora_ga_config: LoraGaConfig | Mapping[str, Any] | None = None
    adalora_config: AdaLoraConfig | Mapping[str, Any] | None = None
    target_parameters: Sequence[str] | None = None
    experts: str | Sequence[int] | Mapping[str, Sequence[int]] = "none"
    task_type: str | None = None

    def __post_init__(self) -> None:
        for name in _SEQUENCES:
            self._freeze(name)
        for name, kind in _SECTIONS.items():
            value = getattr(self, name)
            if name != "adalora_config":  # {} is AdaLoRA with its defaults
                value = value or None  # PEFT writes {} where there is nothing
            object.__setattr__(self, name, section(kind, value, f"LoraConfig.{name}"))
        self._freeze_tokens()
        if isinstance(self.experts, Mapping):
            chosen = {str(layer): tuple(indices) for layer, indices in self.experts.items()}
            object.__setattr__(self, "experts", chosen)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            object.__setattr__(self, "target_modules", ALL_LINEAR)
        if isinstance(self.init_lora_weights, str):
            object.__setattr__(self, "init_lora_weights", self.init_lora_weights.lower())
        self._check()

    def _freeze(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, (list, tuple, set, frozenset)):
            # A set has no order of its own; sorted, the same config gives the same file.
            value = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
            object.__setattr__(self, name, value)

    def _freeze_tokens(self) -> None:
        tokens = self.trainable_token_indices
        if isinstance(tokens, Mapping):
            tokens = {str(module): tuple(ids) for module, ids in tokens.items()}
        elif tokens is not None:
            tokens = tuple(tokens)
        object.__setattr__(self, "trainable_token_indices", tokens)

    def _check(self) -> None:
        _positive_int("r", self.r)
        _positive_number("lora_alpha", self.lora_alpha)
        for pattern, rank in self.rank_pattern.items():
            _positive_int(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _positive_number(f"alpha_pattern[{pattern!r}]", alpha)
        if not isinstance(self.lora_dropout, (int, float)) or not 0.0 <= self.lora_dropout < 1.0:
            raise _wrong("lora_dropout", self.lora_dropout, "give a probability from 0 to below 1")
        init = self.init_lora_weights
        known_init = isinstance(init, bool | str) and (init in INITS or PISSA_NITER.fullmatch(str(init)))
        if not known_init:
            known = [*(str(i) for i in INITS), "pissa_niter_N"]
            hint = did_you_mean(str(init), known) or f"use one of {', '.join(known)}"
            raise _wrong("init_lora_weights", init, hint)
        if self.init_lora_weights == "orthogonal":
            for rank in (self.r, *self.rank_pattern.values()):
                if rank % 2:
                    raise _wrong("r", rank, "the orthogonal initialisation splits the rank in two: give an even one")
        if self.bias != "none":
            raise _wrong("bias", self.bias, "use bias='none': with a trained bias, adapter off would not be the base")
        check_combination(self)
        self._check_targets()

    def _check_targets(self) -> None:
        if self.target_modules is None:
            raise _wrong("target_modules", None, "use 'all-linear', or a list of module names")
        if isinstance(self.target_parameters, str):
            raise _wrong("target_parameters", self.target_parameters, f"give a list: [{self.target_parameters!r}]")
        self._check_experts()
        others = (self.modules_to_save, self.trainable_token_indices, self.target_parameters, self.experts != "none")
        if not self.target_modules and not any(others):
            raise _wrong("target_modules", self.target_modules, "name at least one module, or use 'all-linear'")
        if isinstance(self.modules_to_save, str):
            raise _wrong("modules_to_save", self.modules_to_save, f"give a list: [{self.modules_to_save!r}]")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            for entry in value if isinstance(value, tuple) else ():
                if not isinstance(entry, str) or not entry:
                    raise _wrong(name, entry, "give names of modules, as text")
        regexes = [(name, getattr(self, name)) for name in ("target_modules", "exclude_modules")]
        regexes += [(name, key) for name in ("rank_pattern", "alpha_pattern") for key in getattr(self, name)]
        patterns = self.layers_pattern if isinstance(self.layers_pattern, tuple) else (self.layers_pattern,)
        regexes += [("layers_pattern", pattern) for pattern in patterns]
        for name, pattern in regexes:
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise _wrong(name, pattern, f"not a regular expression: {error}") from error
        is_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if is_regex and self.layers_to_transform is not None:
            fix = "say the layers in the regular expression, or give target_modules as a list"
            raise _wrong("layers_to_transform", self.layers_to_transform, fix)
        if self.layers_pattern and self.layers_to_transform is None:
            raise _wrong("layers_pattern", self.layers_pattern, "give layers_to_transform too")

    def _check_experts(self) -> None:
        known = "use none, all, top-K (as in top-8), or a list of indices"
        if isinstance(self.experts, str):
            if not re.fullmatch(r"none|all|top-\d+", self.experts):
                raise _wrong("experts", self.experts, did_you_mean(self.experts, ["none", "all", "top-8"]) or known)
            return
        lists = list(self.experts.values()) if isinstance(self.experts, Mapping) else [self.experts]
        indices = [index for entry in lists for index in entry]
        if not indices or not all(type(index) is int and index >= 0 for index in indices):
            raise _wrong("experts", self.experts, known)

    def scaling(self, r: int, lora_alpha: float) -> float:
        """The factor before ``B A``: ``alpha / r``, or ``alpha / sqrt(r)`` with rank stabilisation."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "adapter_config.json") -> LoraConfig:
        """The config that a PEFT ``adapter_config.json`` describes.

        Raises:
            AdapterError: it is no LoRA; a key that we do not compute is switched on; an unknown key has a value.
        """
        if data.get("peft_type") not in (None, "LORA"):
            raise AdapterError(
                f"this adapter is no LoRA but '{data['peft_type']}'", where=where, fix="use a LoRA adapter"
            )
        fields = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key in _UNSUPPORTED and value not in _UNSUPPORTED[key]:
                raise AdapterError(
                    f"the adapter uses '{key}' ({json.dumps(value, default=str)}), which is not available here",
                    where=f"{where}: {key}",
                    fix="merge the adapter with PEFT and use the merged model, or train one without this option",
                )
            if key in _OF_TRAINING:
                continue
            if key in fields:
                values[key] = value
            elif key not in _NOTES and key not in _UNSUPPORTED and value not in (None, False, [], {}, ""):
                raise AdapterError(
                    f"unknown key '{key}' with the value {json.dumps(value, default=str)}: it may change the result",
                    where=f"{where}: {key}",
                    fix=did_you_mean(key, fields) or "remove the key if you are sure that it changes nothing",
                )
        values["init_lora_weights"] = _init_of_file(values.get("init_lora_weights", True), where)
        values.setdefault("r", 8)  # PEFT's own defaults: an old file may lack a key that was never changed
        values.setdefault("lora_alpha", 8)
        if values.get("target_modules") is None and values.get("target_parameters"):
            values["target_modules"] = ()
        if values.get("target_modules") is None:
            raise AdapterError(
                "the adapter names no target_modules",
                where=f"{where}: target_modules",
                fix="save the adapter again with PEFT",
            )
        try:
            return cls(**values)
        except AdapterError as error:
            raise AdapterError(error.what, where=f"{where}: {error.where}", fix=error.fix) from error
        except TypeError as error:
            raise AdapterError(f"a value has the wrong type: {error}", where=where) from error

    def to_dict(self) -> dict[str, Any]:
        """This config with PEFT's keys, JSON-able, every unordered list sorted.

        How the adapter started and how it was trained is not in it: once there are weights, that matters no more.
        """
        data = self.settings()
        for name in _OF_TRAINING:
            del data[name]
        for name in (
            "target_modules",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "target_parameters",
        ):
            if isinstance(data[name], list):
                data[name] = sorted(data[name])
        if data["init_lora_weights"] not in PLAIN_INITS:
            data["init_lora_weights"] = True
        return {**data, "lora_bias": False, "peft_type": "LORA", "inference_mode": True}

    def settings(self) -> dict[str, Any]:
        """All fields, JSON-able; ``LoraConfig(**settings)`` is this config."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _init_of_file(init: Any, where: str) -> Any:
    """Initialisations that leave the base alone matter no more once there are weights; the others moved the base."""
    name = init.lower() if isinstance(init, str) else init
    if name in PLAIN_INITS:
        return name
    if name == "eva":
        return True
    raise AdapterError(
        f"the adapter was initialised by '{init}', which also changed the base's weights",
        where=f"{where}: init_lora_weights",
        fix="save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(entry) for key, entry in dataclasses.asdict(value).items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wrong(name: str, value: object, fix: str) -> AdapterError:
    return AdapterError(f"{name} cannot be {value!r}", where=f"LoraConfig.{name}", fix=fix)


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, value, "give a whole number of at least 1")


def _positive_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0 or math.isinf(value):
        raise _wrong(name, value, "give a number above 0")
