"""``experts: top-K``: the experts that training rows activate most, found before the adapter is attached."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.adapters import LoraConfig
from veneer.adapters.activation import ActivationTable, choose_experts
from veneer.data.conversation import Rows
from veneer.data.pack import Batch, collate_packed
from veneer.errors import UsageError
from veneer.models import Base
from veneer.models.head import hidden_states, settle_documents
from veneer.recipe import Recipe
from veneer.train.distributed import World
from veneer.train.preflight import render_rows

SAMPLE_ROWS = 64  # shares of a few percent show in some thousand tokens


def with_chosen_experts(
    config: LoraConfig, base: Base, rows: Rows, recipe: Recipe, world: World
) -> tuple[LoraConfig, ActivationTable | None]:
    """``config`` with ``experts: top-K`` replaced by the experts that a sample of ``rows`` activates most.

    The sample is spread evenly over the rows, and the same in every process and whenever a run goes on.

    Returns:
        The config and the table of the count; ``config`` itself and None where nothing is to be counted.

    Raises:
        AdapterError: K is more than a layer has. UsageError: the task is no generation.
    """
    if not (isinstance(config.experts, str) and config.experts.startswith("top-")):
        return config, None
    if recipe.is_classification:
        fix = "set experts: all, or list the indices"
        raise UsageError("experts: top-K counts on rows of conversations", where="adapter.experts", fix=fix)

    module = base.module.eval()
    settle_documents(module)
    return choose_experts(
        module, config, _sample(base, rows, recipe, world), lambda batch: hidden_states(module, batch)
    )


def _sample(base: Base, rows: Rows, recipe: Recipe, world: World) -> Iterator[Batch]:
    """Batches of one row each. Nothing is rendered before the first one is asked for: the config is checked by then."""
    dataset = render_rows(rows, base.tokenizer, recipe, world)
    step = max(1, len(dataset) // SAMPLE_ROWS)
    for index in range(0, len(dataset), step)[:SAMPLE_ROWS]:
        yield collate_packed([dataset.row(index)])
