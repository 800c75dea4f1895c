"""Which adapters need more in a step than the gradient of the loss: AdaLoRA, and LoRA-FA.

A run does it by itself. In a loop of one's own:

    from veneer.train.hooks import step_hook
    from veneer.train.optimizer import FlatAdamW

    optimizer = FlatAdamW(model.named_parameters())
    hook = step_hook(model, optimizer, total_steps)
    for step in range(1, total_steps + 1):
        optimizer.zero_grad()
        loss(model.module).backward()
        hook.add_gradient(1.0)  # what the gradient is divided by next
        optimizer.finish_gradient(1.0, max_norm=1.0)
        hook.before_step(step)
        optimizer.step(learning_rate)
        hook.after_step(step)
    model.trim()  # AdaLoRA: the ranks that are left
"""

from __future__ import annotations

from veneer.adapters import AdaptedModel
from veneer.adapters.settings import AdaLoraConfig
from veneer.train.lora_fa import FrozenAStep
from veneer.train.optimizer import FlatAdamW
from veneer.train.rank_budget import RankBudget
from veneer.train.step_hook import StepHook


def step_hook(adapted: AdaptedModel, optimizer: FlatAdamW, total_steps: int) -> StepHook:
    """What the active adapter does in a step beside the loss.

    Raises:
        TrainError: the run has too few steps for AdaLoRA's schedule.
    """
    assert adapted.active is not None
    config, adapters = adapted.configs[adapted.active], list(adapted.linears().values())
    if isinstance(config.adalora_config, AdaLoraConfig):
        return RankBudget(config.adalora_config, adapters, optimizer, total_steps)
    return FrozenAStep(adapters) if config.use_lora_fa else StepHook()
