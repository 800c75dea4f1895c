"""The keys of a recipe: types, bounds, defaults and, in each ``description``, the one place that says what it does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

# The names that `veneer eval` and `eval.metrics` know; "regex:PATTERN" stands for a pattern of the user's own.
METRICS = (
    "exact_match",
    "normalized_match",
    "contains",
    "number_match",
    "json_valid",
    "json_exact",
    "json_fields",
    "token_f1",
    "rouge_l",
    "perplexity",
)
CLASS_METRICS = ("accuracy", "macro_f1")  # of a classifier: always measured
REGEX_METRIC = "regex:"
CLASSIFICATION = "classification"
LOSS = "loss"  # what metric_for_best is when nothing else is asked for
LOWER_IS_BETTER = (LOSS, "perplexity")

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Token = Annotated[int, Field(ge=0)]

_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def _scheme(value: Any) -> Any:
    """``quantize: nf4`` says the same as ``quantize: {scheme: nf4}``."""
    return {"scheme": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """TRL's habit: ``report_to: tensorboard`` is a list of one, ``report_to: none`` is an empty one."""
    if isinstance(value, str):
        return [] if value == "none" else [value]
    return value


class Section(BaseModel):
    """What all parts share: unknown keys are errors, no value is converted unasked, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class QuantizeRecipe(Section):
    """How the base's weights are stored while it is trained over: `quantize: nf4` is enough."""

    scheme: Literal["none", "nf4", "fp4", "int8", "int4"] = Field(
        default="none",
        description="4 bits (nf4, fp4, int4) or 8 (int8) instead of 16; head, norms and embeddings keep theirs",
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="4 bits: weights that share a scale"
    )
    double_quant: bool = Field(default=True, description="4 bits: the scales are stored in 8 bits too")
    skip: list[Text] = Field(
        default=[], description="modules that keep 16 bits: names, or regular expressions for whole paths"
    )
    keep: Share | None = Field(
        default=None,
        description="leave the most sensitive weights in 16 bits, measured on the training rows: a share of the size",
    )


class AdapterRecipe(Section):
    """Which layers get a LoRA update, and how large it is."""

    r: Count = Field(default=16, description="rank of the update")
    lora_alpha: Positive = Field(default=32.0, description="strength of the update; the scaling is lora_alpha / r")
    lora_dropout: Beta = Field(default=0.0, description="dropout on the adapter's input while training")
    target_modules: Text | Texts = Field(
        default="all-linear",
        description="all-linear, a list of module names, or one regular expression for whole module paths",
    )
    exclude_modules: Text | list[Text] | None = Field(
        default=None, description="names or a regular expression that win over target_modules"
    )
    layers_to_transform: Token | list[Token] | None = Field(
        default=None, description="only these layers, counted from 0"
    )
    rank_pattern: dict[str, Count] = Field(
        default={}, description="another rank for modules whose path ends in a pattern"
    )
    alpha_pattern: dict[str, Positive] = Field(default={}, description="another lora_alpha, likewise")
    use_rslora: bool = Field(default=False, description="scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = Field(default=False, description="train the size of each weight row apart from its direction")
    use_lora_fa: bool = Field(default=False, description="train B alone; A stays as it starts")
    init_lora_weights: (
        bool
        | Literal["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"]
        | Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]
    ) = Field(
        default=True,
        description="true (Kaiming), gaussian, orthogonal; from the weights pissa, pissa_niter_N, olora, loftq; "
        "from training rows eva, lora_ga; false starts from a random update (for tests)",
    )
    loftq_config: dict[str, int] | None = Field(default=None, description="loftq_iter, of init_lora_weights: loftq")
    eva_config: dict[str, bool | int | float] | None = Field(
        default=None, description="rho, tau, rows, adjust_scaling_factors, of init_lora_weights: eva"
    )
    lora_ga_config: dict[str, int | str] | None = Field(
        default=None, description="direction, scale, stable_gamma, rows, of init_lora_weights: lora_ga"
    )
    adalora_config: dict[str, int | float] | None = Field(
        default=None,
        description="AdaLoRA, from r to target_r: target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight",
    )
    target_parameters: list[Text] | None = Field(
        default=None,
        description="parameters by the ends of their paths: stacked experts, the matrix of a router or a linear",
    )
    experts: Text | list[Token] | dict[str, list[Token]] = Field(
        default="none",
        description="routed experts that are adapted: none, all, top-K by use on training rows, a list (or by layer)",
    )
    modules_to_save: list[Text] | None = Field(default=None, description="modules that are trained and saved whole")
    trainable_token_indices: list[Token] | dict[str, list[Token]] | None = Field(
        default=None, description="token ids whose embedding rows are trained"
    )


class DataRecipe(Section):
    """What is learnt from, and what is held out."""

    train: Text | Texts = Field(
        description="a file (jsonl, json, csv, parquet, txt), a folder, a hub id, a list of them, or demo-train"
    )
    eval: Share | Count | Text | Texts | None = Field(
        default=0.1, description="held-out rows: a share of train, a number of its rows, files of their own, or null"
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "labelled"] = Field(
        default="auto", description="the shape of the rows; auto looks at the first row (labelled for classification)"
    )
    columns: dict[str, Text] | None = Field(
        default=None, description="the file's column for each field, e.g. {prompt: question, completion: answer}"
    )
    labels: Annotated[list[Text], Field(min_length=2)] | None = Field(
        default=None, description="classification: the classes in the order of their ids; null is those of the rows"
    )
    train_on: Literal["all", "last", "prompt-too"] = Field(
        default="all", description="which tokens are learnt: all assistant turns, the last one, or the prompt too"
    )
    max_rows: Count | None = Field(default=None, description="use only so many training rows")
    overlong: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="what happens to a row longer than train.max_length"
    )
    chat_template: Text | None = Field(
        default=None, description="a Jinja chat template, or a file that holds one; null is the model's own"
    )
    add_tokens: Texts | None = Field(
        default=None, description="texts that each become one new token, trained and saved with the adapter"
    )
    split_seed: int = Field(default=0, description="seed of the split into training and held-out rows")


class TrainRecipe(Section):
    """How long, how fast, in what batches."""

    method: Literal["sft"] = Field(default="sft", description="the objective: supervised fine-tuning")
    learning_rate: Positive = Field(default=2e-4, description="peak learning rate of AdamW")
    num_train_epochs: Positive = Field(default=3.0, description="passes over the training rows")
    max_steps: Count | None = Field(default=None, description="optimizer steps; wins over num_train_epochs")
    per_device_train_batch_size: Count = Field(default=8, description="rows of one device in one accumulation step")
    gradient_accumulation_steps: Count = Field(
        default=1,
        description="accumulation steps of one optimizer step: rows per step = both multiplied, times the processes",
    )
    tokens_per_step: Count | None = Field(
        default=None,
        description="an optimizer step takes as many rows as this many tokens hold, over all processes, instead of a "
        "number of rows: steps of even time",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(default=1024, description="tokens of the longest row")
    packing: bool = Field(
        default=True, description="lay the rows of a step end to end without padding; the maths is the same"
    )
    micro_batch_tokens: Count | None = Field(
        default=None, description="with packing: tokens of one forward pass, at least max_length; null picks by device"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="the learning rate's course"
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.03, description="share of the steps that warm up"
    )
    optim: Literal[
        "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_bnb_8bit"
    ] = Field(
        default="adamw",
        description="AdamW with its state in 32 or 8 bits; paged_ keeps it in host memory; bnb is bitsandbytes' own",
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="LoRA+: B's learning rate is learning_rate times this, usually 16; null is plain LoRA"
    )
    loraplus_lr_embedding: Positive = Field(
        default=1e-6, description="LoRA+: the learning rate of the factors of adapted embeddings"
    )
    weight_decay: NotNegative = Field(default=0.01, description="AdamW's decoupled weight decay")
    max_grad_norm: Positive | None = Field(
        default=1.0, description="clip the gradient to this norm; null does not clip"
    )
    adam_beta1: Beta = Field(default=0.9, description="decay of AdamW's mean")
    adam_beta2: Beta = Field(default=0.999, description="decay of AdamW's variance")
    adam_epsilon: Positive = Field(default=1e-8, description="AdamW's epsilon")
    neftune_noise_alpha: Positive | None = Field(
        default=None, description="NEFTune noise on the embeddings; null is none"
    )
    gradient_checkpointing: bool | Literal["auto", "mlp"] = Field(
        default="auto",
        description="compute activations twice to keep fewer of them: true all, mlp those of gated MLPs, false none; "
        "auto takes the least that fits into the memory that is free",
    )
    seed: int = Field(default=0, description="seed of the adapter's start, the order of rows, dropout and noise")
    logging_steps: Count = Field(default=1, description="a line of metrics every so many steps")
    save_steps: Count | None = Field(
        default=None, description="a checkpoint every so many steps; null is once an epoch"
    )
    save_total_limit: Count | None = Field(
        default=2, description="newest checkpoints to keep beside the best; null keeps all"
    )
    eval_steps: Count | None = Field(
        default=None, description="an evaluation every so many steps; null is once an epoch"
    )
    early_stopping_patience: Count | None = Field(
        default=None, description="stop after so many evaluations in a row without gain; null never stops early"
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], BeforeValidator(_listed)] = Field(
        default=[], description="trackers that get the metrics too"
    )


class EvalRecipe(Section):
    """How the held-out rows are judged."""

    metrics: list[Text] = Field(
        default=[],
        description=f"any of {', '.join(METRICS)}, regex:PATTERN; classification has {' and '.join(CLASS_METRICS)}",
    )
    metric_for_best: Text | None = Field(
        default=None, description="the metric that picks the best checkpoint and stops early; null is the held-out loss"
    )
    greater_is_better: bool | None = Field(
        default=None, description="its direction; null knows it by the metric's name"
    )
    max_new_tokens: Count = Field(default=256, description="longest answer that is generated")
    samples: Annotated[int, Field(ge=0)] = Field(default=3, description="answers shown at each evaluation")
    max_rows: Count | None = Field(default=None, description="judge only so many held-out rows while training")


class Recipe(Section):
    """One fine-tuning run, whole."""

    base: Text = Field(
        description="the base model: a hub id, a folder, a .gguf file, or smollm2-135m; "
        "tiny-random-moe, tiny-random-hybrid: random weights, for trying things out"
    )
    revision: Text | None = Field(default=None, description="the hub's branch, tag or commit")
    task: Literal["generation", "classification"] = Field(
        default="generation", description="what is learnt: to write answers, or to tell classes apart (encoders too)"
    )
    quantize: Annotated[QuantizeRecipe, BeforeValidator(_scheme)] = Field(
        default=QuantizeRecipe(), description="storage of the base's weights: none, nf4, fp4, int8, or these keys"
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], BeforeValidator(_dtype)] = Field(
        default="auto", description="number format of the base; auto is bfloat16 where it is fast"
    )
    device: Text = Field(default="auto", description="auto, cpu, cuda, cuda:0, mps")
    adapter: AdapterRecipe = Field(default=AdapterRecipe(), description="the trained layer")
    data: DataRecipe = Field(description="training and held-out rows")
    train: TrainRecipe = Field(default=TrainRecipe(), description="the optimizer's work")
    eval: EvalRecipe = Field(default=EvalRecipe(), description="how the result is judged")
    output_dir: Text = Field(
        default="runs/veneer", description="the run folder; by default runs/ and the recipe's file name"
    )

    @model_validator(mode="before")
    @classmethod
    def _labelled_rows(cls, values: Any) -> Any:
        """A classifier's rows are labelled ones: whoever reads the section ``data`` alone finds it there."""
        data = values.get("data") if isinstance(values, dict) else None
        if isinstance(data, dict) and values.get("task") == CLASSIFICATION and data.get("format", "auto") == "auto":
            return {**values, "data": {**data, "format": "labelled"}}
        return values

    @model_validator(mode="after")
    def _no_contradictions(self, info: ValidationInfo) -> Recipe:
        from veneer.recipe.checks import contradictions

        if info.context is None or info.context.get("contradictions", True):
            found = contradictions(self)
            if found:
                raise ValueError("; ".join(f"{'.'.join(c.path)} {c.what}" for c in found))
        return self

    @property
    def is_classification(self) -> bool:
        """Whether classes are told apart."""
        return self.task == CLASSIFICATION

    @property
    def objective(self) -> str:
        """The name of what is minimised."""
        return CLASSIFICATION if self.is_classification else self.train.method

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that picks the best checkpoint, and whether more of it is better."""
        name = self.eval.metric_for_best or LOSS
        greater = self.eval.greater_is_better
        return name, (name not in LOWER_IS_BETTER) if greater is None else greater

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, JSON-able."""
        return self.model_dump(mode="json")

    def to_yaml(self, *, comments: bool = True) -> str:
        """The recipe as YAML that :func:`load_recipe` reads back equal, each key followed by what it does."""
        from veneer.recipe.reference import write_yaml

        return write_yaml(self, comments=comments)
