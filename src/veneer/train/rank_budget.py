"""AdaLoRA's part of a step: which triplets of the adapter are worth a rank (Zhang et al. 2023, sec. 3).

With the gradient g of a step, for every trained number p (eq. 8 to 11)

    I = |p g|        m <- b1 m + (1 - b1) I        u <- b2 u + (1 - b2) |I - m|        s = m u

and for triplet k (eq. 7)    score_k = s(E_k) + mean over j of s(A_kj) + mean over i of s(B_ik).

Now and then all triplets but the best ``budget`` ones get ``E = 0``. In between, the optimizer may bring them back, and
the next scores decide again. After the last reallocation the choice is kept until the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.adapters import LoraAdapter
from veneer.adapters.adalora import orthogonality
from veneer.adapters.settings import AdaLoraConfig
from veneer.train.optimizer import FlatAdamW
from veneer.train.rank_schedule import schedule_of
from veneer.train.step_hook import StepHook


def choose(scores: Tensor, budget: int) -> Tensor:
    """``[n]`` bool: exactly ``budget`` of the largest ``scores [n]``; of equal ones the first."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = True
    return kept


class RankBudget(StepHook):
    """Moves ranks between modules while they are trained.

    Args:
        config: AdaLoRA's settings.
        adapters: the adapter at every linear.
        optimizer: trains them.
        total_steps: of the run.

    Raises:
        TrainError: the run has too few steps for the schedule.
    """

    def __init__(
        self, config: AdaLoraConfig, adapters: Sequence[LoraAdapter], optimizer: FlatAdamW, total_steps: int
    ) -> None:
        self.schedule = schedule_of(config, [adapter.r for adapter in adapters], total_steps)
        self._config, self._adapters, self._optimizer = config, adapters, optimizer
        # Of every number that is trained, in the optimizer's layout: a step is a few operations over all of them.
        self._importance, self._uncertainty = torch.zeros_like(optimizer.flat), torch.zeros_like(optimizer.flat)
        self.kept = torch.ones(self.schedule.start, dtype=torch.bool, device=optimizer.flat.device)
        index = {id(parameter): number for number, parameter in enumerate(optimizer.parameters)}
        self._places = [[index[id(tensor)] for tensor in (a.E, a.A, a.B)] for a in adapters]

    def add_gradient(self, divisor: float) -> dict[str, float]:
        """The orthogonality of A's rows and of B's columns."""
        values, gradients = self._optimizer.views(self._optimizer.flat), self._optimizer.grad_views
        factors, their = (
            [part for _, A, B in self._places for part in (views[A], views[B].t())] for views in (values, gradients)
        )
        weight = self._config.orth_reg_weight
        return {
            "orthogonality": float(orthogonality(factors, their, weight * divisor)),
            "ranks": int(self.kept.count_nonzero()),
        }

    def before_step(self, step: int) -> None:
        """Smooths the importance of every number, and how uncertain it is, over the steps."""
        if step > self.schedule.last:
            return
        sensitivity = (self._optimizer.flat * self._optimizer.grad).abs_()
        self._importance.lerp_(sensitivity, 1 - self._config.beta1)
        self._uncertainty.lerp_(sensitivity.sub_(self._importance).abs_(), 1 - self._config.beta2)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Drops triplets: at a reallocation those of the lowest scores, after the last one the same ones again."""
        if self.schedule.reallocates(step):
            self.kept = choose(self.scores(), self.schedule.budget(step))
        elif step <= self.schedule.last:
            return
        ranks = [adapter.r for adapter in self._adapters]
        for adapter, kept in zip(self._adapters, torch.split(self.kept, ranks)):
            assert adapter.E is not None
            adapter.E.masked_fill_(~kept[:, None], 0.0)

    def scores(self) -> Tensor:
        """``[triplets]``, module by module."""
        views = self._optimizer.views(self._importance * self._uncertainty)
        return torch.cat([views[E][:, 0] + views[A].mean(1) + views[B].mean(0) for E, A, B in self._places])

    def is_final(self, step: int) -> bool:
        """Before the last reallocation an adapter has more ranks than were asked for."""
        return step >= self.schedule.last

    def state(self) -> dict[str, Tensor]:
        """Importance and uncertainty ``[n]`` in the optimizer's layout, and which triplets are kept."""
        return {"importance": self._importance, "uncertainty": self._uncertainty, "kept": self.kept}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See :class:`StepHook`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
