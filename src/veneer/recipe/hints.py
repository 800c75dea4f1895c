"""What other trainers call our keys and values: a recipe copied from a tutorial is answered with the names here."""

from __future__ import annotations

from veneer.errors import nearest

# their name -> our key. Names that are the same here are not listed: they are found by themselves.
_THEIRS: dict[str, tuple[str, ...]] = {
    "base": (
        "base_model",
        "base_model_name_or_path",
        "model",
        "model_id",
        "model_name",
        "model_name_or_path",
        "pretrained_model_name_or_path",
    ),
    "revision": ("base_model_revision", "model_revision", "revision_of_model"),
    "quantize": ("bits", "load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "quantization_config"),
    "quantize.scheme": ("bnb_4bit_quant_type", "quant_type", "quantization_method"),
    "quantize.double_quant": ("bnb_4bit_use_double_quant", "double_quantization", "use_double_quant"),
    "quantize.skip": ("llm_int8_skip_modules", "modules_to_not_convert"),
    "dtype": ("bf16", "compute_dtype", "fp16", "fp32", "model_dtype", "precision", "torch_dtype"),
    "device": ("device_map",),
    "output_dir": ("adapter_path", "out_dir", "output", "output_path", "save_dir"),
    "adapter": ("lora", "lora_config", "lora_parameters", "peft", "peft_config"),
    "adapter.r": ("lora_r", "lora_rank", "rank"),
    "adapter.lora_alpha": ("alpha", "peft_lora_alpha"),
    "adapter.lora_dropout": ("dropout",),
    "adapter.target_modules": ("lora_layers", "lora_target", "lora_target_linear", "lora_target_modules", "targets"),
    "adapter.modules_to_save": ("additional_target", "lora_modules_to_save"),
    "adapter.layers_to_transform": ("peft_layers_to_transform",),
    "adapter.use_rslora": ("peft_use_rslora", "rslora"),
    "adapter.init_lora_weights": ("init_weights", "peft_init_lora_weights"),
    "data": ("dataset_config",),
    "data.train": (
        "data_path",
        "dataset",
        "dataset_name",
        "dataset_path",
        "datasets",
        "train_data",
        "train_dataset",
        "train_file",
        "train_files",
        "training_file",
    ),
    "data.eval": (
        "eval_data",
        "eval_dataset",
        "eval_file",
        "eval_size",
        "test_datasets",
        "test_size",
        "val_data",
        "val_file",
        "val_set_size",
        "val_size",
        "validation",
        "validation_file",
        "validation_split",
    ),
    "data.format": ("dataset_format", "dataset_type", "formatting", "type"),
    "data.columns": ("column_mapping", "field_mapping", "message_property_mappings"),
    "data.train_on": (
        "assistant_only_loss",
        "completion_only_loss",
        "mask_history",
        "mask_prompt",
        "masking_strategy",
        "roles_to_train",
        "train_on_inputs",
        "train_on_prompt",
    ),
    "data.max_rows": ("max_samples", "max_train_samples"),
    "data.overlong": ("excess_length_strategy", "truncation"),
    "data.chat_template": ("chat_template_jinja", "chat_template_path", "template"),
    "data.split_seed": ("data_seed", "dataset_shuffle_seed"),
    "train": ("optimization", "trainer", "training", "training_arguments"),
    "train.method": ("loss_type", "rl", "stage", "trainer_type", "training_type"),
    "train.learning_rate": ("lr", "max_lr", "peak_lr"),
    "train.num_train_epochs": ("epoch", "epochs", "max_epochs", "n_epochs", "num_epochs"),
    "train.max_steps": (
        "iterations",
        "iters",
        "max_iters",
        "max_train_steps",
        "num_steps",
        "num_training_steps",
        "steps",
    ),
    "train.per_device_train_batch_size": (
        "batch_size",
        "device_batch_size",
        "micro_batch_size",
        "per_device_batch_size",
        "per_gpu_train_batch_size",
        "train_batch_size",
    ),
    "train.gradient_accumulation_steps": (
        "accumulate_grad_batches",
        "accumulation_steps",
        "grad_accum",
        "grad_accumulation_steps",
        "gradient_accumulation",
    ),
    "train.max_length": (
        "context_length",
        "cutoff_len",
        "max_seq_len",
        "max_seq_length",
        "max_sequence_length",
        "model_max_length",
        "seq_len",
        "seq_length",
        "sequence_len",
        "sequence_length",
    ),
    "train.packing": ("neat_packing", "pack", "sample_packing"),
    "train.tokens_per_step": ("batch_tokens", "max_tokens_per_step", "tokens_per_optimizer_step"),
    "train.micro_batch_tokens": ("max_tokens_per_batch", "tokens_per_batch"),
    "train.lr_scheduler_type": ("lr_schedule", "lr_scheduler", "schedule", "scheduler"),
    "train.warmup_ratio": ("lr_warmup_steps", "num_warmup_steps", "warmup", "warmup_iters", "warmup_steps"),
    "train.optim": ("optim_type", "optimizer", "optimizer_name", "optimizer_type"),
    "train.loraplus_lr_ratio": ("loraplus", "lora_plus", "loraplus_ratio", "lora_plus_lr_ratio"),
    "train.weight_decay": ("decay",),
    "train.max_grad_norm": ("clip_grad_norm", "gradient_clip_val", "gradient_clipping", "grad_clip", "max_norm"),
    "train.adam_beta1": ("beta1",),
    "train.adam_beta2": ("beta2",),
    "train.adam_epsilon": ("adam_eps", "eps", "epsilon"),
    "train.neftune_noise_alpha": ("neftune", "neftune_alpha", "noisy_embedding_alpha"),
    "train.gradient_checkpointing": ("activation_checkpointing", "enable_activation_checkpointing", "grad_checkpoint"),
    "train.seed": ("random_seed",),
    "train.logging_steps": ("log_every_n_steps", "log_interval", "log_steps", "steps_per_report"),
    "train.save_steps": ("checkpoint_every", "save_every", "save_interval", "save_strategy", "saves_per_epoch"),
    "train.save_total_limit": ("keep_checkpoints", "max_checkpoints"),
    "train.eval_steps": ("eval_every", "eval_interval", "eval_strategy", "evals_per_epoch", "steps_per_eval"),
    "train.early_stopping_patience": ("early_stop_interval", "early_stopping", "early_stopping_steps", "patience"),
    "train.report_to": ("log_with", "logger", "mlflow_tracking_uri", "use_wandb", "wandb_project"),
    "eval": ("evaluate", "evaluation"),
    "eval.metrics": ("compute_metrics", "eval_metrics", "metric"),
    "eval.metric_for_best": ("best_metric", "load_best_model_at_end", "metric_for_best_model"),
    "eval.max_new_tokens": ("eval_max_new_tokens", "max_tokens", "max_tokens_to_generate"),
    "eval.samples": ("num_samples", "sample_prompts"),
    "eval.max_rows": ("eval_max_rows", "max_eval_samples"),
}
FOREIGN = {theirs: ours for ours, names in _THEIRS.items() for theirs in names}

# Their settings that have no key here, and why none is needed.
NEEDLESS = {
    "use_peft": "an adapter is always trained; remove the key",
    "use_lora": "an adapter is always trained; remove the key",
    "bias": "biases of the base are never trained, so that adapter off is the base; remove the key",
    "task_type": "it changes nothing in training; remove the key",
    "fan_in_fan_out": "the layer's type decides; remove the key",
    "gradient_checkpointing_kwargs": "checkpointing is always non-reentrant; remove the key",
    "group_by_length": "packing leaves no padding to save; remove the key",
    "flash_attention": "attention is chosen by device; remove the key",
    "flash_attn": "attention is chosen by device; remove the key",
    "attn_implementation": "attention is chosen by device; remove the key",
    "per_device_eval_batch_size": "evaluation sizes its own batches; remove the key",
    "remove_unused_columns": "unused columns are ignored, and said; remove the key",
    "dataloader_num_workers": "rows are rendered once, before training; remove the key",
}

# (key, value that others use) -> the answer.
VALUES: dict[tuple[str, str | int], str] = {
    ("data.format", "chat"): "use messages",
    ("data.format", "chat_template"): "use messages",
    ("data.format", "chatml"): "use messages",
    ("data.format", "openai"): "use messages",
    ("data.format", "conversations"): "use sharegpt",
    ("data.format", "instruction"): "use alpaca",
    ("data.format", "completion"): "use text for raw text, prompt-completion for pairs",
    ("data.format", "pretraining"): "use text",
    ("data.format", "jsonl"): "this key names the rows' shape, not the file's type: use auto",
    ("data.format", "json"): "this key names the rows' shape, not the file's type: use auto",
    ("data.format", "csv"): "this key names the rows' shape, not the file's type: use auto",
    ("data.format", "parquet"): "this key names the rows' shape, not the file's type: use auto",
    ("dtype", "float16"): "float16 overflows in training: use bfloat16 or float32",
    ("dtype", "fp16"): "float16 overflows in training: use bfloat16 or float32",
    ("dtype", "half"): "float16 overflows in training: use bfloat16 or float32",
    ("train.lr_scheduler_type", "constant_with_warmup"): "use constant: train.warmup_ratio gives it its warm-up",
    **{("train.optim", v): "use adamw" for v in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")},
    ("train.optim", "adamw_torch_8bit"): "use adamw_8bit",
    ("train.optim", "paged_adamw_32bit"): "use paged_adamw",
    ("train.max_grad_norm", 0): "write null to turn clipping off",
    ("train.max_steps", -1): "write null for no limit",
    ("data.eval", 0): "write null for no held-out rows",
    ("train.early_stopping_patience", 0): "write null to never stop early",
    ("train.neftune_noise_alpha", 0): "write null for no noise",
    **{("quantize.scheme", v): "use nf4" for v in ("4bit", "bnb", "bitsandbytes", "qlora")},
    **{("quantize.scheme", v): "use int8" for v in ("8bit", "llm_int8")},
    ("quantize", True): "say how: nf4, fp4 or int8",
    ("quantize", 4): "use nf4",
    ("quantize", 8): "use int8",
    **{
        ("train.method", v): f"'{v}' is not available yet: use sft"
        for v in ("dpo", "orpo", "kto", "grpo", "ppo", "cpo")
    },
}


def key_hint(path: tuple[str, ...], keys: list[str]) -> str:
    """What to do about the unknown key ``path``; ``keys`` are all dotted keys and sections of a recipe."""
    name, here = path[-1], ".".join(path[:-1])
    siblings = [key for key in keys if key.rpartition(".")[0] == here]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    lower = name.lower().replace("-", "_")
    same = [key for key in siblings if key.rpartition(".")[2] == lower]
    if same:
        return _called(same)
    if elsewhere:
        return f"it belongs to another place: {_or(elsewhere)}"
    if lower in FOREIGN:
        return f"it is called '{FOREIGN[lower]}' here"
    if lower in NEEDLESS:
        return NEEDLESS[lower]
    close = nearest(lower, [key.rpartition(".")[2] for key in siblings])
    if close:
        return _called([f"{here}.{c}" if here else c for c in close])
    far = nearest(lower, {key.rpartition(".")[2] for key in keys}, count=1)
    if far:
        return _called([key for key in keys if key.rpartition(".")[2] == far[0]])
    return f"the keys here are {', '.join(key.rpartition('.')[2] for key in siblings)}"


def _called(keys: list[str]) -> str:
    return f"Did you mean {_or(keys)}?"


def _or(keys: list[str]) -> str:
    return " or ".join(f"'{key}'" for key in keys)
