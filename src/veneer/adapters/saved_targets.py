"""What ``modules_to_save`` names: modules, whole, or small parameters that a module holds itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from veneer.adapters.config import LoraConfig
from veneer.adapters.structure import is_product
from veneer.errors import AdapterError, did_you_mean

SINKS = "sinks"  # transformers' name for the scores of gpt-oss' attention that have no token
Parameters = tuple[tuple[str, tuple[str, ...]], ...]


def inside(path: str, parents: Collection[str]) -> bool:
    """Whether ``path`` is one of ``parents`` or lies below one."""
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def ends_with(path: str, entry: str) -> bool:
    """Whether ``entry`` is the path, or its last names."""
    return path == entry or path.endswith(f".{entry}")


def resolve_saved(
    modules: Mapping[str, nn.Module], config: LoraConfig, from_file: bool, miss: Callable[[AdapterError], None]
) -> tuple[tuple[str, ...], Parameters]:
    """The modules that are saved whole, and by module the parameters that are."""
    found: list[str] = []
    named: dict[str, list[str]] = {}
    for entry in config.modules_to_save or ():
        # PEFT compares bare ends of paths: 'norm' there also means 'input_layernorm'. A file has to be read as meant.
        matches = [
            path
            for path, module in modules.items()
            if path
            and (path.endswith(entry) if from_file else ends_with(path, entry))
            and next(module.parameters(), None) is not None
        ]
        held = [] if matches else held_parameters(entry, modules)
        for path, name in held:
            if name == SINKS and not from_file:
                raise AdapterError(
                    f"'{entry}' cannot be trained: the attention of a run reads sinks as numbers and gives no gradient",
                    where="LoraConfig.modules_to_save",
                    fix=f"remove '{entry}'; the projections beside it can be adapted",
                )
            named.setdefault(path, []).append(name)
        if not matches and not held:
            miss(_nothing_to_save(entry, modules))
        found.extend(matches)
    # What lies inside another module that is saved belongs to the outer copy.
    outer = [path for path in found if not inside(path.rpartition(".")[0], found)]
    parameters = {path: tuple(dict.fromkeys(named[path])) for path in modules if path in named}
    kept = tuple((path, names) for path, names in parameters.items() if not inside(path, outer))
    return tuple(path for path in modules if path in outer), kept


def held_parameters(entry: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """The parameters of this name, with the modules that hold them beside others: no weight or bias of a layer."""
    return [(path, name) for path, name in _all_held(modules) if ends_with(f"{path}.{name}", entry)]


def _all_held(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    return [
        (path, name)
        for path, module in modules.items()
        if path and module._modules and not is_product(module)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]


def owner_of(entry: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The first module that has a parameter of this name."""
    owners = ((path, f"{path}.{name}") for path, module in modules.items() for name in module._parameters if path)
    return next((path for path, name in owners if ends_with(name, entry)), None)


def _nothing_to_save(entry: str, modules: Mapping[str, nn.Module]) -> AdapterError:
    owner = owner_of(entry, modules)
    if owner is not None:
        kind = type(modules[owner]).__name__
        return AdapterError(
            f"'{entry}' is a parameter of {kind}, which is saved as a whole",
            where="LoraConfig.modules_to_save",
            fix=f"save the module: {owner.rpartition('.')[2]}",
        )
    paths = [path for path, module in modules.items() if path and next(module.parameters(), None) is not None]
    names = sorted({path.rpartition(".")[2] for path in paths} | {name for _, name in _all_held(modules)})
    fix = did_you_mean(entry, dict.fromkeys([*names, *paths])) or "name a module of the base that has parameters"
    what = f"module to save '{entry}' matches nothing in the base"
    return AdapterError(what, where="LoraConfig.modules_to_save", fix=fix)
