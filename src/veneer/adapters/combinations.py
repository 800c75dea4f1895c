"""Which settings of an adapter go together. One that makes no sense is refused by its reason, before anything long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.adapters.settings import AdaLoraConfig, LoftqConfig
from veneer.errors import AdapterError
from veneer.quant import QuantizedLinear

if TYPE_CHECKING:
    from veneer.adapters.config import LoraConfig
    from veneer.adapters.targets import Plan


def check_combination(config: LoraConfig) -> None:
    """Raises where two settings of ``config`` exclude each other.

    Raises:
        AdapterError: names both settings and the reason.
    """
    init = str(config.init_lora_weights)
    adalora = config.adalora_config
    assert adalora is None or isinstance(adalora, AdaLoraConfig)  # the config has made a section of it
    if adalora is not None:
        why = "AdaLoRA trains a singular value for every direction and starts all of them at zero"
        if config.init_lora_weights is not True:
            raise _apart("adalora_config", f"init_lora_weights: {init}", why)
        if config.use_dora:
            raise _apart("adalora_config", "use_dora", "AdaLoRA drops directions, and DoRA's norm would jump with each")
        if config.use_lora_fa:
            raise _apart(
                "adalora_config", "use_lora_fa", "AdaLoRA ranks directions by how A moves, and A would be frozen"
            )
        if adalora.target_r > config.r:
            raise AdapterError(
                f"AdaLoRA cannot go from rank {config.r} up to {adalora.target_r}",
                where="LoraConfig.adalora_config.target_r",
                fix="give r, the rank that all modules start with, a larger value: 1.5 times target_r is usual",
            )
    for section, name in (("loftq_config", "loftq"), ("eva_config", "eva"), ("lora_ga_config", "lora_ga")):
        if getattr(config, section) is not None and init != name:
            raise AdapterError(
                f"{section} is given, but the adapter starts with init_lora_weights {init}",
                where=f"LoraConfig.{section}",
                fix=f"set init_lora_weights: {name}, or remove {section}",
            )
    if config.use_dora and isinstance(config.loftq_config, LoftqConfig) and config.loftq_config.loftq_iter > 1:
        why = "the saved adapter is for the weights in 16 bits, whose rows have other norms than the codes that act"
        raise _apart("use_dora", f"loftq_iter: {config.loftq_config.loftq_iter}", why)
    if config.use_lora_fa and init == "lora_ga":
        raise _apart(
            "use_lora_fa", "init_lora_weights: lora_ga", "LoRA-GA aligns the first step of A, which never moves"
        )


def _apart(one: str, other: str, why: str) -> AdapterError:
    return AdapterError(f"{one} and {other} do not go together: {why}", where=f"LoraConfig.{one}", fix="remove one")


def no_router(config: LoraConfig) -> str:
    """Why a router can have no factors under ``config``; "" where it can."""
    if config.use_dora:
        return "DoRA scales rows, and PEFT's format has no scales for a router"
    if config.init_lora_weights in ("eva", "lora_ga"):
        return f"{config.init_lora_weights} looks at what linear layers read and give, and a router gives more"
    return ""


def check_fit(config: LoraConfig, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Raises where a variant cannot act on a module of the plan, before the module is touched.

    Args:
        modules: the base's modules by path.

    Raises:
        AdapterError: names the module, the reason and the way out.
    """
    from veneer.adapters.config import ALL_LINEAR  # which imports this module

    shapes = [tuple(modules[target.path].weight.shape) for target in plan.lora]  # type: ignore[arg-type]  # matrices
    most = max(map(min, shapes), default=config.r)
    if config.target_modules == ALL_LINEAR and config.r > most:  # a few smaller ones, routers, get what they can have
        what = f"rank {config.r} is larger than every matrix of the model: no update of them has more than {most}"
        raise AdapterError(what, where="LoraConfig.r", fix=f"give r: {most} or less; 8 to 64 is usual")
    for target in plan.lora:
        layer: Any = modules[target.path]
        if target.kind == "router" and (why := no_router(config)):
            raise AdapterError(f"a router cannot be adapted here: {why}", where=target.path, fix="leave it out")
        smaller = min(layer.weight.shape)
        if target.r > smaller:
            raise AdapterError(
                f"rank {target.r} is larger than this matrix, {' x '.join(map(str, layer.weight.shape))}: "
                f"no update of it has more than {smaller}",
                where=target.path,
                fix=f"give r: {smaller} or less, or rank_pattern for this module",
            )
        for is_on, why in (
            (config.use_dora, "DoRA scales the rows of a weight, and an embedding's rows are its tokens"),
            (config.adalora_config is not None, "AdaLoRA has no form for embeddings"),
            (config.use_lora_fa, "LoRA-FA freezes A, and an embedding's starts at zero: nothing would be trained"),
        ):
            if is_on and target.kind == "embedding":
                fix = "remove the embedding from target_modules, or train its rows with trainable_token_indices"
                raise AdapterError(why, where=target.path, fix=fix)
    if config.init_lora_weights == "loftq":
        _check_loftq(config, [modules[target.path] for target in plan.lora])


def _check_loftq(config: LoraConfig, layers: list[nn.Module]) -> None:
    """Some weight is in codes, of the width that was asked for."""
    in_codes = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if not in_codes:
        raise AdapterError(
            "LoftQ starts from what the codes of a quantised weight lose, and no weight of the adapter is quantised",
            where="LoraConfig.init_lora_weights",
            fix="load the base with quantize: nf4, or start with init_lora_weights: pissa",
        )
    wanted = None if config.loftq_config is None else config.loftq_config.loftq_bits  # type: ignore[union-attr]  # the config has made a section of it
    bits = 8 if in_codes[0].config.scheme == "int8" else 4
    if wanted is not None and wanted != bits:
        raise AdapterError(
            f"loftq_bits is {wanted}, and the base is in codes of {bits} bits ({in_codes[0].config.scheme})",
            where="LoraConfig.loftq_config.loftq_bits",
            fix="leave loftq_bits out: quantize of the base decides it",
        )
