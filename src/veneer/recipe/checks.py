"""What single keys cannot tell: values that contradict each other, and names that only a list knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from veneer.errors import did_you_mean
from veneer.recipe.schema import CLASS_METRICS, LOSS, METRICS, REGEX_METRIC, QuantizeRecipe, Recipe, TrainRecipe


@dataclass(frozen=True)
class Contradiction:
    """A problem of one key, or of one key in the light of ``others``; ``what`` goes on after the key's name."""

    path: tuple[str, ...]
    what: str
    fix: str
    others: tuple[tuple[str, ...], ...] = ()


def contradictions(recipe: Recipe) -> list[Contradiction]:
    """All of them; empty for a sound recipe."""
    parts = (_task, _quantize, _adapter, _batches, _optimizer, _loraplus, _evaluation, _metrics)
    return [found for part in parts for found in part(recipe)]


def _task(recipe: Recipe) -> Iterator[Contradiction]:
    data, task = recipe.data, (("task",),)
    if not recipe.is_classification:
        if data.format == "labelled" or data.labels is not None:
            key = "labels" if data.labels is not None else "format"
            fix = "set task: classification, or remove this key"
            yield Contradiction(("data", key), "is for classification, and task is generation", fix, task)
        return
    idle = [
        (("quantize", "scheme"), recipe.quantize.scheme != "none"),
        (("data", "chat_template"), data.chat_template is not None),
        (("data", "train_on"), data.train_on != "all"),
        (("train", "micro_batch_tokens"), recipe.train.micro_batch_tokens is not None),
        (("eval", "max_rows"), recipe.eval.max_rows is not None),
        # These start from the loss or the activations of rows that are answers.
        (("adapter", "init_lora_weights"), recipe.adapter.init_lora_weights in ("eva", "lora_ga")),
        (("adapter", "experts"), str(recipe.adapter.experts).startswith("top")),
    ]
    for path, given in idle:
        if given:
            yield Contradiction(path, "does not go with task: classification", "remove this key", task)
    if data.format != "labelled":
        fix = "remove it, and say under data.columns which columns hold text and label"
        yield Contradiction(
            ("data", "format"), f"is '{data.format}', and classification reads labelled rows", fix, task
        )
    if data.labels is not None and len(set(data.labels)) < len(data.labels):
        yield Contradiction(("data", "labels"), "names a class twice", "keep one of them")


def _quantize(recipe: Recipe) -> Iterator[Contradiction]:
    wanted, usual = recipe.quantize, QuantizeRecipe()
    idle = {
        "none": ("block_size", "double_quant", "skip", "keep"),
        "int8": ("block_size", "double_quant"),
    }
    for name in idle.get(wanted.scheme, ()):
        if getattr(wanted, name) != getattr(usual, name):
            yield Contradiction(
                ("quantize", name),
                f"does nothing with quantize.scheme {wanted.scheme}",
                "remove it, or set quantize.scheme to nf4",
                (("quantize", "scheme"),),
            )
    if wanted.scheme != "none" and recipe.device.split(":")[0] not in ("auto", "cpu", "cuda"):
        yield Contradiction(
            ("quantize", "scheme"),
            f"is {wanted.scheme}, which is computed on cpu and cuda, and the device is {recipe.device}",
            "set device to cpu, or quantize to none",
            (("device",),),
        )
    for pattern in wanted.skip:
        if problem := _regex_problem(pattern):
            yield Contradiction(
                ("quantize", "skip"), f"holds '{pattern}', no regular expression: {problem}", "mend the expression"
            )


def _adapter(recipe: Recipe) -> Iterator[Contradiction]:
    adapter = recipe.adapter
    targets, exclude = adapter.target_modules, adapter.exclude_modules
    patterns = [("target_modules", targets), ("exclude_modules", exclude)]
    patterns += [(name, key) for name in ("rank_pattern", "alpha_pattern") for key in getattr(adapter, name)]
    for name, pattern in patterns:
        if isinstance(pattern, str) and pattern != "all-linear":
            problem = _regex_problem(pattern)
            if problem:
                yield Contradiction(("adapter", name), f"is no regular expression: {problem}", "mend the expression")
    if isinstance(targets, str) and targets != "all-linear" and adapter.layers_to_transform is not None:
        yield Contradiction(
            ("adapter", "layers_to_transform"),
            "goes with a list of target_modules, not with a regular expression",
            "name the layers in the expression, or list the modules",
            (("adapter", "target_modules"),),
        )
    if adapter.init_lora_weights == "orthogonal":
        for name, rank in [("r", adapter.r), *(("rank_pattern", rank) for rank in adapter.rank_pattern.values())]:
            if rank % 2:
                yield Contradiction(
                    ("adapter", name),
                    f"holds the odd rank {rank}, and orthogonal initialisation splits it in two",
                    "use an even rank",
                    (("adapter", "init_lora_weights"),),
                )


def _batches(recipe: Recipe) -> Iterator[Contradiction]:
    train = recipe.train
    tokens = train.micro_batch_tokens
    if tokens is not None and not train.packing:
        yield Contradiction(
            ("train", "micro_batch_tokens"),
            "does nothing without packing",
            "set train.packing to true, or remove it: per_device_train_batch_size sizes a padded batch",
            (("train", "packing"),),
        )
    elif tokens is not None and tokens < train.max_length:
        yield Contradiction(
            ("train", "micro_batch_tokens"),
            f"is {tokens}, less than train.max_length ({train.max_length}): the longest rows would not fit",
            f"raise it to {train.max_length} or more, or lower train.max_length",
            (("train", "max_length"),),
        )
    if train.tokens_per_step is not None:
        counted = ["gradient_accumulation_steps", *(["per_device_train_batch_size"] if train.packing else [])]
        for name in sorted(train.model_fields_set & set(counted)):
            if getattr(train, name) != type(train).model_fields[name].default:
                yield Contradiction(
                    ("train", name),
                    "counts the rows of a step, and train.tokens_per_step its tokens",
                    "remove one of them",
                    (("train", "tokens_per_step"),),
                )


def _optimizer(recipe: Recipe) -> Iterator[Contradiction]:
    optim = recipe.train.optim
    if "bnb" in optim and recipe.device != "auto" and not recipe.device.startswith("cuda"):
        yield Contradiction(
            ("train", "optim"),
            f"is '{optim}', bitsandbytes' optimizer for CUDA, and the device is {recipe.device}",
            f"use {optim.replace('_bnb', '')}, which runs on any device",
            (("device",),),
        )


def _loraplus(recipe: Recipe) -> Iterator[Contradiction]:
    train, usual = recipe.train, TrainRecipe()
    if train.loraplus_lr_ratio is None and train.loraplus_lr_embedding != usual.loraplus_lr_embedding:
        yield Contradiction(
            ("train", "loraplus_lr_embedding"),
            "does nothing without train.loraplus_lr_ratio",
            "set the ratio too (16 is usual), or remove it",
            (("train", "loraplus_lr_ratio"),),
        )
    if train.loraplus_lr_ratio is not None and recipe.adapter.use_lora_fa:
        yield Contradiction(
            ("train", "loraplus_lr_ratio"),
            "sets the rate of B against that of A, and with adapter.use_lora_fa A is not trained",
            "remove one of them; B's rate is train.learning_rate then",
            (("adapter", "use_lora_fa"),),
        )


def _evaluation(recipe: Recipe) -> Iterator[Contradiction]:
    if recipe.data.eval is not None:
        return
    wanting = [
        (("train", "early_stopping_patience"), recipe.train.early_stopping_patience is not None),
        (("train", "eval_steps"), recipe.train.eval_steps is not None),
        (("eval", "metrics"), bool(recipe.eval.metrics)),
        (("eval", "metric_for_best"), recipe.eval.metric_for_best is not None),
    ]
    for path, given in wanting:
        if given:
            fix = "set data.eval, for example to 0.1, or remove this key"
            yield Contradiction(path, "needs held-out rows, and data.eval is null", fix, (("data", "eval"),))


def _metrics(recipe: Recipe) -> Iterator[Contradiction]:
    names = recipe.eval.metrics
    known = CLASS_METRICS if recipe.is_classification else METRICS
    for index, name in enumerate(names):
        path = ("eval", "metrics")
        if name in names[:index]:
            yield Contradiction(path, f"names '{name}' twice", "keep one of them")
        elif name.startswith(REGEX_METRIC) and known is METRICS:
            problem = _regex_problem(name.removeprefix(REGEX_METRIC))
            if problem:
                yield Contradiction(path, f"holds '{name}', whose pattern is wrong: {problem}", "mend the expression")
        elif name not in known:
            fix = did_you_mean(name, known) or f"use any of {', '.join(known)}" + ", regex:PATTERN" * (known is METRICS)
            yield Contradiction(path, f"holds an unknown metric '{name}'", fix)
    if recipe.is_classification:
        names = [*CLASS_METRICS]  # measured whether they are named or not
    best = recipe.eval.metric_for_best
    path, others = ("eval", "metric_for_best"), (("eval", "metrics"),)
    # A metric with several scores also gives one for each field: json_fields.amount.
    if best is not None and best != LOSS and best not in names and best.partition(".")[0] not in names:
        fix = did_you_mean(best, [LOSS, *names]) or f"add '{best}' to eval.metrics, or use loss"
        yield Contradiction(path, f"is '{best}', which is not in eval.metrics", fix, others)
    if recipe.eval.greater_is_better is not None and best is None:
        fix = "set eval.metric_for_best, or remove this key"
        yield Contradiction(("eval", "greater_is_better"), "says nothing without metric_for_best", fix, (path,))


def _regex_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
