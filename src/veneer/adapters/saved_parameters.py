"""``modules_to_save`` that names parameters: small tensors that a module holds itself (``A_log``, ``D``).

They are trained in full. The module stays where it is, with the adapters inside of it: while its forward runs, the
trained tensors stand in the place of its own. PEFT's format has no place for them: they are named in ``veneer.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from veneer.adapters.layers import keep_dtype, master_dtype

CHILD = "veneer_saved"  # under which it hangs in its module
RATES = ("A_log", "time_decay")  # a module that has one of these carries a state from token to token


def leave_undecayed(owner: nn.Module, trained: Iterable[nn.Parameter | None]) -> None:
    """Marks a recurrence's own parameters for the optimizer, as Mamba's code does: weight decay is not for them.

    At zero they are no smaller, they are another speed of forgetting.
    """
    if any(name in owner._parameters for name in RATES):
        for parameter in trained:
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]  # a mark of theirs


class SavedParameters(nn.Module):
    """Trained copies of some of a module's own parameters, at most one of each acts. It hangs in that module.

    The copies are float32; they are cast to the base's dtype where they are used.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_owner"] = base_layer  # no child of ours: we are one of it
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.__dict__["_previous"] = base_layer.__dict__.get("forward")  # what others have put onto the instance
        base_layer.add_module(CHILD, self)
        base_layer.__dict__["forward"] = self.run  # a method of ours: copied and pickled, it goes with the copy

    @property
    def base_layer(self) -> nn.Module:
        """The module."""
        owner: nn.Module = self.__dict__["_owner"]
        return owner

    def add(self, name: str, keys: Iterable[str]) -> None:
        """New copies, equal to the base; not active yet."""
        own = self.base_layer._parameters
        copies = {key: own[key].detach().to(master_dtype(own[key]), copy=True) for key in keys}  # type: ignore[union-attr,arg-type]
        trained = {key: nn.Parameter(copy) for key, copy in copies.items()}
        leave_undecayed(self.base_layer, trained.values())
        self.adapters[name] = nn.ParameterDict(trained)

    def acting(self) -> dict[str, Tensor]:
        """The active copies, in the base's dtypes."""
        own = self.base_layer._parameters
        return {key: t.to(own[key].dtype) for name in self.active for key, t in self.tensors(name).items()}  # type: ignore[union-attr]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The copies, by their names in the module."""
        return dict(self.adapters[name].items()) if name in self.adapters else {}  # type: ignore[operator]  # a ParameterDict

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """A copy of the adapters' tensors in the base's dtypes."""
        own = self.base_layer._parameters
        found = {key: t.detach() for name in names for key, t in self.tensors(name).items()}
        return {key: t.to(own[key].dtype, copy=True) for key, t in found.items()}  # type: ignore[union-attr]

    def take_off(self) -> None:
        """Leaves the module as it was. A forward of ours that was wrapped since stays within, and does nothing."""
        own, previous = self.base_layer.__dict__, self.__dict__["_previous"]
        del self.base_layer._modules[CHILD]
        if own.get("forward") == self.run:
            del own["forward"]
            if previous is not None:
                own["forward"] = previous

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with the active copies in the place of its own parameters."""
        owner, previous = self.base_layer, self.__dict__["_previous"]
        acting = self.acting()
        owner.__dict__.update(acting)  # which Python looks into before torch's own tables
        try:
            return type(owner).forward(owner, *args, **kwargs) if previous is None else previous(*args, **kwargs)
        finally:
            for key in acting:
                del owner.__dict__[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SavedParameters:
        self.adapters._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self
