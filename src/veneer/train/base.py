"""The base that a recipe names, stored as the recipe says; what that means in layers is decided here, once a run."""

from __future__ import annotations

import gc
from pathlib import Path

from veneer.data.conversation import Rows
from veneer.models import Base, load_base
from veneer.models.quantized_sensitivity import sensitive_layers
from veneer.quant import QuantConfig
from veneer.recipe import QuantizeRecipe, Recipe, load_recipe
from veneer.run import RunFolder
from veneer.train.distributed import World, local_device
from veneer.train.preflight import render_rows
from veneer.train.progress import Progress

SENSITIVITY_ROWS = 32  # training rows, evenly spread, that the layers' sensitivity is measured on


def load_base_of(
    recipe: Recipe, rows: Rows, world: World, progress: Progress, *, resume: bool = False
) -> tuple[Recipe, Base]:
    """Loads the base of a recipe.

    Returns:
        The recipe, with the layers that ``quantize.keep`` left in 16 bits on its skip list, so that whoever reads it
        later gets the same weights without measuring again; and the base.

    Raises:
        ModelError: the base cannot be loaded. UsageError: the skip list names nothing.
    """
    wanted = recipe.quantize
    device = local_device(recipe.device)
    if wanted.keep is not None:
        kept = _kept_before(recipe) if resume else None
        wanted = kept or _measured(recipe, rows, world, progress)
        recipe = recipe.model_copy(update={"quantize": wanted})
    config = as_config(wanted)
    base = load_base(
        recipe.base,
        dtype=recipe.dtype,
        device=device,
        revision=recipe.revision,
        quantize=config,
        skip=wanted.skip,
        progress=None if config is None else lambda done, total, name: progress.loading(done, total),
    )
    if base.quantized is not None:
        progress.message(f"the base: {base.quantized}")
    return recipe, base


def as_config(wanted: QuantizeRecipe) -> QuantConfig | None:
    """What the recipe's section says to :func:`veneer.load_base`; None for plain weights."""
    if wanted.scheme == "none":
        return None
    return QuantConfig(wanted.scheme, wanted.block_size, wanted.double_quant)


def _measured(recipe: Recipe, rows: Rows, world: World, progress: Progress) -> QuantizeRecipe:
    """The section with the most sensitive layers on the skip list: measured on training rows, over plain weights."""
    wanted, config = recipe.quantize, as_config(recipe.quantize)
    assert config is not None  # the recipe's checks
    assert wanted.keep is not None
    base = load_base(recipe.base, dtype=recipe.dtype, device=local_device(recipe.device), revision=recipe.revision)
    dataset = render_rows(rows, base.tokenizer, recipe, world)
    chosen = range(0, len(dataset), max(1, len(dataset) // SENSITIVITY_ROWS))
    sample = [dataset.row(index).input_ids.tolist() for index in list(chosen)[:SENSITIVITY_ROWS]]
    found = sensitive_layers(base, sample, config, share=wanted.keep, skip=wanted.skip)
    progress.message(f"measured on {len(sample)} training rows: {found}")
    del base
    gc.collect()  # the plain weights go before the quantised ones come
    return wanted.model_copy(update={"skip": [*wanted.skip, *found.keep], "keep": None})


def _kept_before(recipe: Recipe) -> QuantizeRecipe | None:
    """What the run that is resumed had found, where it was asked the same."""
    path = RunFolder(Path(recipe.output_dir)).recipe_path
    if not path.is_file():
        return None
    before = load_recipe(path, check_paths=False).quantize
    asked = recipe.quantize.model_copy(update={"skip": before.skip, "keep": None})
    return before if before == asked and set(recipe.quantize.skip) <= set(before.skip) else None
