"""Training in one call: from a recipe, or from a model and data in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.adapters.init_data import check_waits, initialise_from
from veneer.data.conversation import Rows
from veneer.errors import UsageError, did_you_mean
from veneer.models import Base
from veneer.models.vocabulary import with_new_rows
from veneer.recipe import AdapterRecipe, DataRecipe, EvalRecipe, Recipe, TrainRecipe, load_recipe, recipe_from
from veneer.recipe.schema import CLASSIFICATION
from veneer.run import RunFolder
from veneer.train.base import load_base_of
from veneer.train.classification import for_classifier, load_classifier_of
from veneer.train.distributed import World, join_world, leave_world, local_device
from veneer.train.experts import with_chosen_experts
from veneer.train.preflight import check_settings, read_rows
from veneer.train.progress import Progress, Silent
from veneer.train.record import check_output
from veneer.train.result import TrainResult
from veneer.train.session import Session
from veneer.train.track import check_trackers

Source = Rows | str | Path | Sequence[Mapping[str, Any]]


def train_recipe(
    recipe: Recipe | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    strict: bool = False,
    explain: bool = False,
) -> TrainResult:
    """Trains what a recipe describes.

    Under torchrun every process calls this; the first one writes and speaks.

    Args:
        recipe: a recipe, or the path of one.
        resume: go on with the run in ``output_dir`` from its newest whole checkpoint.
        overwrite: replace the run in ``output_dir``.
        progress: is told how it goes; silent by default.
        strict: before the first step, compare the operations of every layer with float32, not of one.
        explain: say what runs on what.

    Raises:
        RecipeError, DataError, ModelError, AdapterError: something is wrong before training begins; nothing is written
            then.
        TrainError: the output folder holds a run, an operation does not compute what it should, or a guard stopped the
            run.
        StorageError: a file cannot be written.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    settings = {key: value for key, value in recipe.adapter.model_dump().items() if value is not None}
    config = LoraConfig(**settings)  # before anything that takes long
    check_settings(config, recipe)
    with _processes(recipe, resume, overwrite, progress) as (world, progress):
        rows, held_out = read_rows(recipe.data, progress.message)
        if recipe.is_classification:
            recipe, base = load_classifier_of(recipe, rows, held_out)
            config = for_classifier(config, base)
        else:
            recipe, base = load_base_of(recipe, rows, world, progress, resume=resume)
        if recipe.data.add_tokens:
            base.add_tokens(recipe.data.add_tokens)
            wanted = with_new_rows(base, config.trainable_token_indices, config.modules_to_save or ())
            config = replace(config, trainable_token_indices=wanted)
        config, table = with_chosen_experts(config, base, rows, recipe, world)
        if table is not None:
            progress.message(f"the experts that training rows activate most:\n{table}")
        adapted = attach(base, config, seed=recipe.train.seed)
        session = Session(adapted, base, recipe, rows, held_out, world, progress, strict, explain)
        return session.run(resume=resume, overwrite=overwrite)


def train(
    model: AdaptedModel,
    data: Source,
    *,
    eval_data: Source | float | int | None = 0.1,
    output_dir: str | Path = "runs/veneer",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    strict: bool = False,
    explain: bool = False,
    **settings: Any,
) -> TrainResult:
    """Trains the active adapter of a model that is in memory.

    Args:
        model: what :func:`veneer.attach` returned for a base from :func:`veneer.load_base`.
        data: rows, a file or what else :func:`veneer.data.read` takes.
        eval_data: held-out rows: a share of ``data``, a number of its rows, rows of their own, or None.
        output_dir: the run folder.
        resume, overwrite, progress, strict, explain: as for :func:`train_recipe`.
        settings: any key of the recipe's sections ``train``, ``eval`` and ``data``, such as ``learning_rate=2e-4``,
            ``num_train_epochs=3``, ``metrics=["exact_match"]``, ``train_on="last"``.

    Raises:
        UsageError: an unknown setting, or a model without a base. Otherwise as :func:`train_recipe`.
    """
    base = _base_of(model, "train(model, ...)")
    recipe = _recipe_of(model, base, data, eval_data, output_dir, settings)
    with _processes(recipe, resume, overwrite, progress) as (world, progress):
        rows, held_out = read_rows(recipe.data, progress.message, data, eval_data)
        session = Session(model, base, recipe, rows, held_out, world, progress, strict, explain)
        return session.run(resume=resume, overwrite=overwrite)


def initialise(
    model: AdaptedModel,
    data: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> None:
    """Starts the active adapter from data, where its ``init_lora_weights`` is ``"eva"`` or ``"lora_ga"``.

    A run does this by itself; a loop of one's own calls it before it makes its optimizer.

    Args:
        model: what :func:`veneer.attach` returned.
        data: training rows, as for :func:`train`; with ``loss`` a list of batches.
        loss: runs the model on one of these batches and returns the scalar that is minimised. Any module can be started
            in this way; without it the model has to be a base from :func:`veneer.load_base`.
        progress: is told how it goes; silent by default.
        settings: as for :func:`train`, such as ``max_length=512`` or ``train_on="last"``.

    Raises:
        AdapterError: the adapter does not wait for data, or no row reached a layer of it. Otherwise as :func:`train`.
    """
    say = progress or Silent()
    if loss is not None:
        say.message(initialise_from(model, list(data), loss))
        return
    check_waits(model)
    base = _base_of(model, "initialise(model, ...)")
    recipe = _recipe_of(model, base, data, None, "runs/veneer", settings)
    rows, _ = read_rows(recipe.data, say.message, data)
    Session(model, base, recipe, rows, None, World(), say).start_adapter()


def _base_of(model: AdaptedModel, where: str) -> Base:
    if not isinstance(model.base, Base):
        raise UsageError(
            "this model has no tokenizer to render rows with",
            where=where,
            fix="attach the adapter to what veneer.load_base returns; any other module trains in a loop of your own",
        )
    return model.base


@contextmanager
def _processes(
    recipe: Recipe, resume: bool, overwrite: bool, progress: Progress | None
) -> Iterator[tuple[World, Progress]]:
    """Joins the other processes, and checks first what costs nothing to check."""
    world = join_world(local_device(recipe.device))
    progress = progress if progress is not None and world.is_main else Silent()
    try:
        check_trackers(recipe.train.report_to)
        check_output(RunFolder(Path(recipe.output_dir)), resume=resume, overwrite=overwrite)
        world.barrier()  # the first process must not create the folder before all have looked
        yield world, progress
    finally:
        progress.close()
        leave_world(world)


def _recipe_of(
    model: AdaptedModel,
    base: Base,
    data: Source,
    eval_data: Source | float | int | None,
    output_dir: str | Path,
    settings: Mapping[str, Any],
) -> Recipe:
    """The recipe that says the same as the arguments: it is checked like any other, and recorded with the run."""
    values: dict[str, dict[str, Any]] = {"train": {}, "eval": {}, "data": {}}
    fields = {"train": TrainRecipe.model_fields, "eval": EvalRecipe.model_fields, "data": DataRecipe.model_fields}
    known = {key: name for name, keys in fields.items() for key in keys}  # max_rows is that of data
    del known["train"], known["eval"], known["add_tokens"]  # the last one is veneer.add_tokens here
    for key, value in settings.items():
        if key not in known:
            raise UsageError(
                f"unknown setting '{key}'",
                where="train(model, ...)",
                fix=did_you_mean(key, known) or "use a key of the recipe's sections train, eval and data",
            )
        values[known[key]][key] = value
    assert model.active is not None
    config = model.configs[model.active].settings()
    adapter = {key: config[key] for key in AdapterRecipe.model_fields if config.get(key) is not None}
    if base.added_tokens:
        values["data"]["add_tokens"] = list(base.added_tokens)
    dtype = str(base.dtype).removeprefix("torch.")
    stored = {"scheme": "none"} if base.quantized is None else base.quantized.record()
    if base.labels:
        values["data"].setdefault("labels", list(base.labels))
    held_out = eval_data if eval_data is None or isinstance(eval_data, float | int) else _name_of(eval_data)
    return recipe_from(
        {
            "base": base.spec,
            "task": CLASSIFICATION if base.labels else "generation",
            "revision": base.identity.revision,
            "dtype": dtype if dtype in ("bfloat16", "float32") else "auto",
            "device": str(base.device),
            "quantize": stored,
            "adapter": adapter,
            **values,
            "data": {**values["data"], "train": _name_of(data), "eval": held_out},
            "output_dir": str(Path(output_dir).expanduser().absolute()),
        }
    )


def _name_of(source: Source) -> str | list[str]:
    """What the recipe says of a source: its absolute path where it has one."""
    if isinstance(source, Rows):
        return source.source
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        return str(path.absolute()) if path.exists() else str(source)
    if source and all(isinstance(item, str | Path) for item in source):
        return [str(item) for item in source]
    return "rows in memory"
