"""Packages whose public names are imported when they are first used, so that ``import veneer`` costs nothing."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from typing import Any


class LazyPackage(types.ModuleType):
    """A package with lazy names, which may be called like the function of its own name.

    Importing ``veneer.train`` binds the package to ``veneer``'s attribute ``train``, in the place of the function that
    users call; so the package answers as the function would.
    """

    _where: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self._where:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return getattr(importlib.import_module(self._where[name]), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._where})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def lazy_names(package: str, where: Mapping[str, str]) -> None:
    """Makes each name of ``where`` an attribute of ``package``, imported from the module that stands beside it."""
    module = sys.modules[package]
    module.__class__ = LazyPackage
    module._where = where  # type: ignore[attr-defined]  # it is a LazyPackage now
