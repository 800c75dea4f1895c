"""LLaMA-Factory for ``benchmarks.sft``, in an environment of its own: its ``train`` on everybody's rows and start.

Its defaults, gradient checkpointing among them, but for what the others' recipe says: the rows are read as it stores
them after tokenising, in their order.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from benchmarks.contestants import LORA, TRAIN, trainer_report
from benchmarks.processes import serve


def checkpoint(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the rows as LLaMA-Factory stores what it has tokenised."""
    from datasets import Dataset, DatasetDict

    examples = json.loads((Path(job["folder"]) / "examples.json").read_text())
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(_rows(job))
    return {}


def _rows(job: dict[str, Any]) -> str:
    return str(Path(job["folder"]) / "llamafactory-rows")


def llamafactory(job: dict[str, Any]) -> dict[str, Any]:
    """``llamafactory-cli train``."""
    from llamafactory.train.tuner import run_exp

    report, figures = trainer_report()
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": job["model_folder"],
            "adapter_name_or_path": str(Path(job["folder"]) / "start"),
            "finetuning_type": "lora",
            "lora_rank": LORA["r"],
            "lora_alpha": LORA["lora_alpha"],
            "lora_dropout": LORA["lora_dropout"],
            "lora_target": "all",
            "template": "default",
            "dataset": "rows",  # has to be named, and is not read
            "tokenized_path": _rows(job),
            "disable_shuffling": True,
            "cutoff_len": job["max_length"],
            "per_device_train_batch_size": job["batch"],
            "gradient_accumulation_steps": 1,
            "learning_rate": job["learning_rate"],
            "max_steps": job["steps"],
            "bf16": job["dtype"] == "bfloat16",
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": job["seed"],
            "output_dir": str(Path(job["folder"]) / f"llamafactory-{job['run']}"),
            **TRAIN,
        },
        callbacks=[report],
    )
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("llamafactory", "transformers", "peft")},
        **figures(),
    }


CONTESTANTS = {"checkpoint": checkpoint, "llamafactory": llamafactory}


if __name__ == "__main__":
    serve(CONTESTANTS)
