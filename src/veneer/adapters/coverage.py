"""What an adapter covers, as a table to look at before training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.adapters.fused_experts import stack_of
from veneer.adapters.slots import base_modules
from veneer.adapters.structure import is_product, left_out
from veneer.adapters.targets import Plan, inside
from veneer.quant import QuantizedLinear
from veneer.quant.stack import QuantizedStack


@dataclass(frozen=True)
class CoverageRow:
    """One kind of module."""

    module: str  # last name of the path, as in q_proj
    layer: str  # class name
    how: str  # "lora r=16", "rows", "whole", or "" where nothing is adapted
    matched: int
    total: int
    parameters: int  # trained


@dataclass(frozen=True)
class Coverage:
    """The kinds of modules of a base, and how many of each an adapter changes."""

    rows: tuple[CoverageRow, ...]
    base_parameters: int
    unmatched: tuple[str, ...] = ()  # what else there is to say
    left_out: tuple[str, ...] = ()  # what all-linear does not choose and the adapter does not change: a line for each

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        table = [("module", "layer", "adapted", "how", "trained parameters")]
        table += [(r.module, r.layer, f"{r.matched}/{r.total}", r.how or "-", f"{r.parameters:,}") for r in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(
                cell.rjust(w) if column in (2, 4) else cell.ljust(w)
                for column, (cell, w) in enumerate(zip(line, widths))
            )
            for line in table
        ]
        share = 100 * self.parameters / max(self.base_parameters, 1)
        lines.append(f"{self.parameters:,} trained parameters, {share:.2f} % of the base's {self.base_parameters:,}")
        lines += [f"not adapted: {entry}" for entry in self.left_out]
        lines += [f"note: {entry}" for entry in self.unmatched]
        return "\n".join(line.rstrip() for line in lines)


def coverage(root: nn.Module, plan: Plan) -> Coverage:
    """The table of ``plan`` over ``root``: every kind of linear layer, and what else is trained."""
    modules = base_modules(root)
    how: dict[str, tuple[str, int]] = {}
    for target in plan.lora:
        numbers = 0 if target.tied_to else target.r * sum(_shape(modules[target.path]))
        how[target.path] = (f"lora r={target.r}" + " (tied)" * (target.tied_to is not None), numbers)
    for tokens in plan.tokens:
        rows, width = len(tokens.token_ids), _shape(modules[tokens.path])[1]
        how[tokens.path] = (f"{rows} rows (tied)", 0) if tokens.tied_to else (f"{rows} rows", rows * width)
    for path in plan.saved:
        how[path] = ("whole", sum(p.numel() for p in modules[path].parameters()))
    groups: dict[tuple[str, str], list[str]] = {}
    for path, names in plan.parameters:
        for name in names:
            how[f"{path}.{name}"] = ("whole", modules[path]._parameters[name].numel())  # type: ignore[union-attr]  # it has them
            groups.setdefault((name, f"a parameter of {type(modules[path]).__name__}"), []).append(f"{path}.{name}")
    for stack in plan.experts:
        _, width_out, width_in = stack_of(modules[stack.path], stack.parameter).shape
        chosen = stack.count if stack.experts is None else len(stack.experts)
        some = "" if stack.experts is None else f" on {chosen} of {stack.count}"
        how[stack.name] = (f"lora r={stack.r}{some}", chosen * stack.r * (width_out + width_in))
        groups.setdefault((_last_two(stack.name), type(modules[stack.path]).__name__), []).append(stack.name)
    stacks = {stack.name for stack in plan.experts}
    for path, module in modules.items():
        if (path in how or is_product(module)) and path not in stacks:
            groups.setdefault((_family(path), type(module).__name__), []).append(path)
    table = tuple(
        CoverageRow(
            module=name,
            layer=layer,
            how=", ".join(sorted({how[path][0] for path in paths if path in how})),
            matched=sum(path in how for path in paths),
            total=len(paths),
            parameters=sum(how[path][1] for path in paths if path in how),
        )
        for (name, layer), paths in groups.items()
    )
    held = {id(p): p.numel() for m in modules.values() for p in m._parameters.values() if p is not None}
    in_codes = sum(m.weight.numel() for m in modules.values() if isinstance(m, QuantizedLinear | QuantizedStack))
    base_parameters = sum(held.values()) + in_codes
    return Coverage(table, base_parameters, (*plan.unmatched, *plan.notes), _left_out(modules, how))


def _left_out(modules: Mapping[str, nn.Module], trained: Collection[str]) -> tuple[str, ...]:
    """One line for each family of what is left alone: what it is, how many, of which shapes, and how to have it."""
    families: dict[tuple[str, str, str], list[tuple[int, ...]]] = {}
    for part in left_out(modules).values():
        if not inside(part.path, trained):
            families.setdefault((part.family, part.why, part.how), []).append(part.shape)
    lines = []
    for (name, why, how), shapes in families.items():
        different = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        size = f"{len(shapes)} x {different}" if len(set(shapes)) <= 2 else f"{len(shapes)} matrices"
        lines.append(f"{name} ({size}): {why}" + (f"; {how}" if how else ""))
    return tuple(lines)


def _last_two(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight: Any = module.weight
    return tuple(weight.shape)


def _family(path: str) -> str:
    """The last name of the path; a number stands for its whole list."""
    parent, _, last = path.rpartition(".")
    return f"{parent.rpartition('.')[2]}.*".lstrip(".") if last.isdigit() else last
