"""Adapters on a model: attach, name, switch, take off.

:class:`AdaptedModel` is the handle; the model's own layers are swapped in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapters.adalora import trim
from veneer.adapters.combinations import check_fit
from veneer.adapters.config import DATA_INITS, LoraConfig
from veneer.adapters.coverage import Coverage, coverage
from veneer.adapters.experts import LoraExperts
from veneer.adapters.layers import LoraAdapter, LoraEmbedding, LoraLinear
from veneer.adapters.mixed import BASE, mixed_rows
from veneer.adapters.nesting import check_places, check_together
from veneer.adapters.ranks import with_plan_ranks, with_ranks
from veneer.adapters.read_weight import let_read
from veneer.adapters.router import LoraRouter
from veneer.adapters.saved import SavedModule
from veneer.adapters.saved_parameters import SavedParameters
from veneer.adapters.slots import SLOTS, Slot, base_modules, places, take_off
from veneer.adapters.start import Originals, fill_factors
from veneer.adapters.targets import Plan, resolve
from veneer.adapters.tokens import TokenEmbedding, TokenHead, TokenRows
from veneer.adapters.variants import variants_of
from veneer.errors import AdapterError, did_you_mean

KEY_PREFIX = "base_model.model."
S = TypeVar("S", bound=Slot)


class IdentityLike(Protocol):
    """Which base it is; recorded beside every adapter."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def weight_hash(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class BaseLike(Protocol):
    """A loaded base model: a module that knows which base it is."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def identity(self) -> IdentityLike: ...


class QuantizedBaseLike(BaseLike, Protocol):
    """A base that knows what its codes were made from."""

    def each_original(self, paths: Collection[str], visit: Callable[[str, Tensor], None]) -> None:
        """Calls ``visit`` with each path and its weight ``[out, in]`` before it was quantised, one at a time."""


def attach(
    target: nn.Module | BaseLike,
    config: LoraConfig,
    *,
    name: str = "default",
    seed: int | None = None,
    originals: Originals | None = None,
) -> AdaptedModel:
    """Freezes ``target`` and puts a fresh adapter on it, active and ready to train.

    With ``init_lora_weights`` ``"eva"`` or ``"lora_ga"`` it waits for data: :func:`veneer.initialise`, or a run.

    Args:
        target: any module, or a base that knows its identity.
        config: is read and never changed.
        seed: of the adapter's start; without one, drawn from torch's generator.
        originals: for LoftQ: gives the weights before they were quantised; a base in codes knows them itself.

    Raises:
        AdapterError: an entry of the config matches nothing; the module has adapters already. Nothing is changed then.
    """
    adapted = AdaptedModel(target)
    adapted.add(config, name, seed=seed, originals=originals)
    adapted.use(name)
    return adapted


class AdaptedModel:
    """A base with named adapters, at most one of which is trained.

    Attributes:
        module: the model itself, to be called as before.
        base: what :func:`attach` got, where it was more than a module.
        configs: each adapter's config, by name.
        active: the adapter that acts and is trained, or None.
        waiting: adapters that start from data and have not seen any yet, with their seeds.
        notes: what there is to say of how an adapter started, by name.
    """

    def __init__(self, target: nn.Module | BaseLike) -> None:
        self.base: BaseLike | None = None
        module: Any = target
        if not isinstance(target, nn.Module):
            self.base, module = target, target.module
        self.module: nn.Module = module
        self.configs: dict[str, LoraConfig] = {}
        self.plans: dict[str, Plan] = {}
        self.waiting: dict[str, int] = {}
        self.notes: dict[str, str] = {}
        self._slots: dict[str, Slot] = {}  # by path in the base, in the order of its modules
        self._names: tuple[str, ...] = ()  # adapters in use; the first one is trained
        self._off = 0  # depth of disabled()
        for path, module in self.module.named_modules():
            if isinstance(module, SLOTS) or type(module).__module__.startswith("peft."):
                fix = "add another one with adapted.add(...), or take the first off with detach()"
                raise AdapterError("this model has adapters already", where=path or type(module).__name__, fix=fix)
        self._trained_before: list[tuple[nn.Parameter, bool]] = []

    @property
    def active(self) -> str | None:
        return self._names[0] if self._names else None

    @property
    def active_names(self) -> tuple[str, ...]:
        """All adapters that act, the trained one first."""
        return self._names

    @property
    def coverage(self) -> Coverage:
        """What the active adapter covers; ``print`` it."""
        return coverage(self.module, self.plans[self._known(None)])

    def add(
        self, config: LoraConfig, name: str = "default", seed: int | None = None, originals: Originals | None = None
    ) -> None:
        """One more adapter, fresh; not in use yet. See :func:`attach`.

        Raises:
            AdapterError: the name is taken or cannot be a name; the config does not fit the base or the adapters on it.
        """
        plan = resolve(self.module, config)
        check_fit(config, plan, base_modules(self.module))
        self.install(name, config, plan)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        with self._or_as_it_was(name):
            self._fill(name, seed, originals)
        if config.init_lora_weights in DATA_INITS:
            self.waiting[name] = seed

    def _fill(self, name: str, seed: int, originals: Originals | None = None) -> None:
        base: Any = self.base
        if originals is None and self.configs[name].init_lora_weights == "loftq" and base is not None:
            originals = base.each_original  # check_fit has seen that it is in codes
        with self.disabled():
            config, plan = self.configs[name], self.plans[name]
            self.notes[name] = fill_factors(self._slots, name, config, plan, seed, KEY_PREFIX, originals)
            self.start(name)

    def set_ranks(self, name: str, ranks: Mapping[str, int], *, keep_scaling: bool = True) -> None:
        """Gives an adapter that has not been trained other ranks, and starts it anew. Its parameters are new ones.

        Args:
            ranks: by path; a module that is not in it keeps its own.
            keep_scaling: change ``lora_alpha`` with the rank, so that what multiplies ``B A`` stays.
        """
        name, in_use, trained_before = self._known(name), self._names, self._trained_before
        config, waiting = self.configs[name], self.waiting.get(name)
        plan = with_plan_ranks(config, self.plans[name], ranks, keep_scaling=keep_scaling)
        self.remove(name)
        self.install(name, config, plan)
        self._trained_before = trained_before
        self._fill(name, waiting or 0)
        if waiting is not None:
            self.waiting[name] = waiting
        if in_use:
            self.use(*in_use)

    def started(self, name: str) -> None:
        """An adapter that waited for data has its factors."""
        del self.waiting[name]
        self.start(name)

    def install(self, name: str, config: LoraConfig, plan: Plan) -> None:
        """Places the adapter that ``plan`` describes, with zero factors. All is checked before anything is changed.

        Whoever fills them then starts its variants: :meth:`LoraLinear.start`.
        """
        self._check_name(name)
        modules = base_modules(self.module)
        check_places(plan, modules, self._slots)
        if not self.configs:
            self._trained_before = [(p, p.requires_grad) for p in self.module.parameters()]
            self.module.requires_grad_(False)
        self.configs[name], self.plans[name] = config, plan
        with self._or_as_it_was(name):
            self._place(name, config, plan, modules)

    @contextlib.contextmanager
    def _or_as_it_was(self, name: str) -> Iterator[None]:
        """Takes the adapter off again where what is within fails."""
        try:
            yield
        except BaseException:
            self.remove(name)
            if not self.configs:
                self.detach()
            raise

    def _place(self, name: str, config: LoraConfig, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        hanging = places(self.module)

        def slot_at(path: str, kind: type[S], **options: bool) -> S:
            """The slot at ``path``, put in place (wherever the module hangs) if there is none."""
            slot = self._slots.get(path)
            if slot is None:
                module = modules[path]
                slot = kind(module, **options)  # type: ignore[arg-type]  # check_places has seen that the kinds fit
                slot.train(module.training)
                self._slots[path] = slot
                for parent, attribute in () if kind is SavedParameters else hanging[id(module)]:  # which hangs in it
                    setattr(parent, attribute, slot)
                    let_read(parent, attribute)
            assert isinstance(slot, kind)
            return slot

        for target in plan.lora:
            scaling = config.scaling(target.r, target.lora_alpha)
            if target.kind == "embedding":
                slot_at(target.path, LoraEmbedding).add(name, target.r, scaling, config.lora_dropout)
            else:
                layer = LoraRouter if target.kind == "router" else LoraLinear
                linear = slot_at(target.path, layer, transposed=target.kind == "conv1d")
                if target.tied_to is None:
                    linear.add(name, target.r, scaling, config.lora_dropout, variants_of(config))
                else:
                    factors = self._slots[target.tied_to].adapters[name]
                    assert isinstance(factors, LoraAdapter)
                    linear.follow(name, factors)
        for stack in plan.experts:
            slot_at(stack.path, LoraExperts).add(name, stack, config.scaling(stack.r, stack.lora_alpha))
        # Embeddings first: a tied head reads their rows.
        for token in sorted(plan.tokens, key=lambda token: token.tied_to is not None):
            if isinstance(modules[token.path], nn.Embedding):
                slot_at(token.path, TokenEmbedding).add(name, token.token_ids)
            elif token.tied_to is None:
                slot_at(token.path, TokenHead).add(name, token.token_ids)
            else:
                rows = self._slots[token.tied_to].adapters[name]
                assert isinstance(rows, TokenRows)
                slot_at(token.path, TokenHead).follow(name, rows)
        for path in plan.saved:
            slot_at(path, SavedModule).add(name)
        for path, keys in plan.parameters:
            slot_at(path, SavedParameters).add(name, keys)
        order = {path: index for index, path in enumerate(modules)}
        self._slots = dict(sorted(self._slots.items(), key=lambda item: order[item[0]]))
        self._refresh()

    def use(self, name: str, *more: str) -> None:
        """Makes ``name`` the adapter that acts and is trained; ``more`` act too (their updates add up) and stay frozen.

        Raises:
            AdapterError: an unknown adapter, or two that replace the same module, parameter or token rows.
        """
        names = tuple(dict.fromkeys(self._known(n) for n in (name, *more)))
        check_together(names, self._slots)
        self._names = names
        self._refresh()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model is the base, bit for bit. It nests; what was in use comes back, also after an error."""
        self._off += 1
        self._refresh()
        try:
            yield
        finally:
            self._off -= 1
            self._refresh()

    @contextlib.contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[None]:
        """Within it, row ``i`` of a batch goes through the adapter ``names[i]``; ``"__base__"`` stands for none.

        For answers, not for training. It is the model itself that has to be called, each time with ``len(names)`` rows.

        Raises:
            AdapterError: an unknown adapter, or one that changes something that all rows share.
        """
        names = [name if name == BASE else self._has_started(name) for name in names]
        try:
            with mixed_rows(self.module, self._slots, names, lambda: bool(self._off)):
                yield
        finally:
            self._refresh()

    def named_parameters(self, name: str | None = None) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters of an adapter (the active one) in a fixed order, by their keys in PEFT's file.

        Raises:
            AdapterError: the adapter waits for data to start from.
        """
        return self._trained(self._has_started(name))

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the active adapter, in the order of :meth:`named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def trainable_count(self) -> int:
        """How many numbers the active adapter trains."""
        return sum(parameter.numel() for _, parameter in self._trained(self._known(None)))

    def state(self, name: str | None = None) -> dict[str, Tensor]:
        """A copy of an adapter's tensors (the active one's), by their keys in PEFT's file."""
        return {key: tensor.detach().clone() for key, tensor in self._tensors(self._known(name)).items()}

    def start(self, name: str) -> None:
        """Lets the variants of an adapter whose factors have been filled in make what they need beside them."""
        for slot in self._slots.values():
            if isinstance(slot, LoraLinear) and name in slot.adapters:
                slot.start(name)
        self._refresh()

    def portable(self, name: str | None = None) -> tuple[LoraConfig, Plan, dict[str, Tensor]]:
        """An adapter (the active one) as what acts: plain factors as PEFT has them, of the ranks that this takes.

        Returns:
            The config and the plan of those factors, and a copy of the tensors by their keys in PEFT's file.

        Raises:
            AdapterError: the adapter waits for data to start from.
        """
        name = self._has_started(name)
        config, plan = self.configs[name], self.plans[name]
        tensors = {
            f"{KEY_PREFIX}{path}.{end}": tensor.detach().clone()
            for path, slot in self._slots.items()
            for end, tensor in (
                slot.portable(name) if isinstance(slot, LoraLinear | LoraExperts) else slot.tensors(name)
            ).items()
        }
        ranks = {
            t.path: len(tensors[f"{KEY_PREFIX}{t.path}.lora_A.weight"]) for t in plan.lora if t.kind != "embedding"
        }
        return *with_ranks(config, plan, ranks), tensors

    def linears(self, name: str | None = None) -> dict[str, LoraAdapter]:
        """What an adapter (the active one) has at every linear, by path; factors that are shared, where they belong."""
        name = self._known(name)
        found: dict[str, LoraAdapter] = {}
        for path, slot in self._slots.items():
            if isinstance(slot, LoraLinear) and name in slot.adapters and name not in slot.followed:
                adapter = slot.adapters[name]
                assert isinstance(adapter, LoraAdapter)
                found[path] = adapter
        return found

    def trim(self, name: str | None = None) -> None:
        """Removes the ranks that AdaLoRA has dropped: the adapter is then the plain LoRA that its file holds."""
        name = self._known(name)
        if self.configs[name].adalora_config is None:
            return
        config, plan, _ = self.portable(name)
        for adapter in self.linears(name).values():
            trim(adapter)
        self.configs[name], self.plans[name] = dataclasses.replace(config, adalora_config=None), plan
        self._refresh()

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], name: str | None = None, *, where: str = "adapter state") -> None:
        """Fills an adapter (the active one) from :meth:`state` or a file, in place. All is checked before a write.

        Raises:
            AdapterError: a key is missing, unknown or of another shape, or a value is not finite.
        """
        name = self._known(name)
        tensors = self._tensors(name)
        for path, slot in self._slots.items():
            if isinstance(slot, LoraExperts):
                state = {**state, **slot.from_file(name, state, f"{KEY_PREFIX}{path}.")}
        missing, extra = [k for k in tensors if k not in state], [k for k in state if k not in tensors]
        for kind, keys, others in (("unknown", extra, missing or tensors), ("missing", missing, extra)):
            if keys:
                close = did_you_mean(keys[0], others)
                count = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                fix = close or "this is another base, or another config than the adapter was made with"
                raise AdapterError(f"{kind} tensor '{keys[0]}'{count}", where=where, fix=fix)
        for key, tensor in tensors.items():
            if state[key].shape != tensor.shape:
                raise AdapterError(
                    f"tensor '{key}' is {list(state[key].shape)}, but {list(tensor.shape)} is expected",
                    where=where,
                    fix="this is another base, or another rank than the adapter was made with",
                )
            if not state[key].isfinite().all():
                raise AdapterError(f"tensor '{key}' has NaN or Inf in it", where=where, fix="use an earlier checkpoint")
        for key, tensor in tensors.items():
            tensor.copy_(state[key])
        self.waiting.pop(name, None)

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        extra: Mapping[str, Any] | None = None,
        training_state: bool = False,
    ) -> Path:
        """Writes an adapter (the active one) as :func:`veneer.adapters.save.save_adapter` does."""
        from veneer.adapters.save import save_adapter

        return save_adapter(self, folder, name=name, extra=extra, training_state=training_state)

    def remove(self, name: str) -> None:
        """Takes one adapter off. Layers without adapters are the base's own again."""
        name = self._known(name)
        self._names = tuple(n for n in self._names if n != name)
        where = places(self.module)
        for path, slot in list(self._slots.items()):
            if name in slot.adapters:
                del slot.adapters[name]
            if isinstance(slot, (TokenHead, LoraLinear)):
                slot.followed.discard(name)
            if not slot.adapters:
                take_off(slot, where.get(id(slot), []))
                del self._slots[path]
        del self.configs[name], self.plans[name]
        self.waiting.pop(name, None)
        self.notes.pop(name, None)
        self._refresh()

    def detach(self) -> nn.Module:
        """Takes all adapters off and returns the base as it was, bit for bit. The handle holds nothing afterwards."""
        for name in list(self.configs):
            self.remove(name)
        for parameter, trained in self._trained_before:
            parameter.requires_grad_(trained)
        self._trained_before = []
        return self.module

    def _trained(self, name: str) -> list[tuple[str, nn.Parameter]]:
        tensors = self._tensors(name).items()
        return [(key, t) for key, t in tensors if isinstance(t, nn.Parameter) and t.is_floating_point()]

    def _has_started(self, name: str | None) -> str:
        name = self._known(name)
        if name in self.waiting:
            raise AdapterError(
                f"this adapter starts from data ({self.configs[name].init_lora_weights}) and has not seen any yet",
                where=f"adapter '{name}'",
                fix="call veneer.initialise(model, rows) first, before its parameters go to an optimizer",
            )
        return name

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return {
            f"{KEY_PREFIX}{path}.{end}": tensor
            for path, slot in self._slots.items()
            for end, tensor in slot.tensors(name).items()
        }

    def _refresh(self) -> None:
        """Tells every layer which adapters act, and torch which one is trained."""
        for slot in self._slots.values():
            slot.active = () if self._off else tuple(name for name in self._names if name in slot.adapters)
            for name, adapter in slot.adapters.items():
                for parameter in adapter.parameters():
                    parameter.requires_grad_(name == self.active and parameter.is_floating_point())

    def _known(self, name: str | None) -> str:
        if name is None:
            name = self.active
            if name is None:
                raise AdapterError("no adapter is in use", fix="attach one, or choose one with use(name)")
        if name not in self.configs:
            fix = did_you_mean(name, self.configs) or f"there are: {', '.join(self.configs) or 'none'}"
            raise AdapterError(f"there is no adapter '{name}'", where="AdaptedModel", fix=fix)
        return name

    def _check_name(self, name: str) -> None:
        if name in self.configs:
            raise AdapterError(f"there is an adapter '{name}' already", fix="give this one another name")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
            raise AdapterError(
                f"'{name}' cannot be an adapter's name",
                fix="use letters, digits, - and _, and no name of torch's own (keys, type, ...)",
            )
