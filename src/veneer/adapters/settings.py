"""The settings of single variants, as PEFT names them: small sections inside a :class:`~veneer.adapters.LoraConfig`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from veneer.errors import AdapterError, did_you_mean

S = TypeVar("S")


@dataclass(frozen=True)
class LoftqConfig:
    """``init_lora_weights="loftq"`` (Li et al. 2023): the factors start at what the base's codes lose.

    Args:
        loftq_iter: rounds of quantising and decomposing in turn. The first one leaves the base's codes as they are;
            more rounds give the adapter codes of its own, and a file that is for the base in 16 bits.
        loftq_bits: the width of the codes in PEFT. Here the base's ``quantize`` decides it; another value is an error.
    """

    loftq_iter: int = 1
    loftq_bits: int | None = None

    def __post_init__(self) -> None:
        _at_least("loftq_iter", self.loftq_iter, 1)


@dataclass(frozen=True)
class EvaConfig:
    """``init_lora_weights="eva"`` (Paischer et al. 2024): A starts at the main directions of each layer's input.

    Args:
        rho: a layer gets at most ``rho * r`` of the ranks, which go where they explain most; 1 leaves each layer ``r``.
        tau: a layer's directions are settled when their cosine to those from half as many batches is this at least.
        rows: training rows that are looked at, at most.
        adjust_scaling_factors: keep ``lora_alpha / r`` where a layer gets another rank.
    """

    rho: float = 2.0
    tau: float = 0.99
    rows: int = 256
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _at_least("rho", self.rho, 1.0)
        _at_least("rows", self.rows, 1)
        if not 0.0 < self.tau <= 1.0:
            raise wrong("tau", self.tau, "give a cosine above 0, at most 1")
        if not isinstance(self.adjust_scaling_factors, bool):  # any text would be taken as true
            raise wrong("adjust_scaling_factors", self.adjust_scaling_factors, "give True or False")


@dataclass(frozen=True)
class LoraGaConfig:
    """``init_lora_weights="lora_ga"`` (Wang et al. 2024): the factors start along the gradient of the full weight.

    Args:
        direction: which singular vectors of the gradient A and B take, as in the paper; "ArB2r" is its choice.
        scale: how the factors are scaled; "stable" is the paper's, "gd_scale" divides by the scaling, "weight_svd"
            gives them the size of the weight's principal part, "unit" leaves them as they are.
        stable_gamma: gamma of the stable scale.
        rows: training rows that the gradient is taken over.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16
    rows: int = 64

    def __post_init__(self) -> None:
        _one_of("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _one_of("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        _at_least("stable_gamma", self.stable_gamma, 1)
        _at_least("rows", self.rows, 1)


@dataclass(frozen=True)
class AdaLoraConfig:
    """AdaLoRA (Zhang et al. 2023): ranks go where they matter while training. The config's ``r`` is where all start.

    Args:
        target_r: mean rank at the end.
        tinit, tfinal: steps at the beginning with all ranks, and at the end with the final ones; below 1 a share of the
            run.
        deltaT: steps between two reallocations.
        beta1, beta2: smoothing of the importance and of its uncertainty.
        orth_reg_weight: weight of the term that keeps the directions orthogonal.
        total_step: steps of the run; None: known from the run.
    """

    target_r: int = 8
    tinit: float = 0.1
    tfinal: float = 0.3
    deltaT: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        _at_least("target_r", self.target_r, 1)
        _at_least("deltaT", self.deltaT, 1)
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            _at_least(name, getattr(self, name), 0)
        for name in ("tinit", "tfinal"):
            if getattr(self, name) > 1 and getattr(self, name) % 1:  # cut to whole steps, 1.5 would be one step
                fix = "give a share of the run, below 1, or a whole number of steps"
                raise wrong(name, getattr(self, name), fix)
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise wrong(name, getattr(self, name), "give a number between 0 and 1")


def section(kind: type[S], value: Any, where: str) -> S | None:
    """``value`` (an object of ``kind``, a mapping, or None) as an object of ``kind``.

    Raises:
        AdapterError: an unknown key, or a value that cannot be.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise AdapterError(f"{where} cannot be {value!r}", where=where, fix="give a mapping of its keys")
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]  # every kind is a dataclass
    for key in value:
        if key not in known:
            fix = did_you_mean(str(key), known) or f"the keys are {', '.join(known)}"
            if kind is AdaLoraConfig and key in ("init_r", "r"):
                fix = "the rank that all modules start with is the adapter's own r"
            raise AdapterError(f"unknown key '{key}'", where=where, fix=fix)
    try:
        return kind(**value)
    except AdapterError as error:
        raise AdapterError(error.what, where=f"{where}.{error.where}", fix=error.fix) from error
    except TypeError as error:
        raise AdapterError(f"a value has the wrong type: {error}", where=where) from error


def wrong(name: str, value: object, fix: str) -> AdapterError:
    """``name`` cannot be ``value``."""
    return AdapterError(f"{name} cannot be {value!r}", where=name, fix=fix)


def _at_least(name: str, value: object, least: float) -> None:
    whole = isinstance(least, int) and name not in ("tinit", "tfinal", "orth_reg_weight")
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not value >= least or math.isinf(value):  # type: ignore[operator, arg-type]  # it is a number by then
        raise wrong(name, value, f"give a {'whole ' if whole else ''}number of at least {least:g}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise wrong(name, value, did_you_mean(str(value), known) or f"use one of {', '.join(known)}")
