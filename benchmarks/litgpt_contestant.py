"""LitGPT for ``benchmarks.sft``, in an environment of its own: its ``finetune lora`` on everybody's rows and start.

What a recipe of the others has and LitGPT's command does not, it gets here: a schedule without a warm-up (its own
divides by the number of warm-up steps), gradient clipping, and a batch that is one micro-batch, as its loss is the mean
of the micro-batches' means. Merging the adapter, with which its command ends, is left out: nobody else does it.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.contestants import LORA, TRAIN
from benchmarks.processes import STARTED, serve

PARTS = {  # LitGPT's linears, and those of Hugging Face's Llama that they consist of
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def checkpoint(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the base and the adapter's start as LitGPT reads them."""
    import torch
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from safetensors.torch import load_file

    folder, source = _folder(job), Path(job["model_folder"])
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    convert_hf_checkpoint(folder, model_name=_name(config), dtype=job["dtype"])
    start = load_file(Path(job["folder"]) / "start" / "adapter_model.safetensors")
    factors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, parts in PARTS.items():
            for factor in "AB":
                found = [f"base_model.model.model.layers.{layer}.{part}.lora_{factor}.weight" for part in parts]
                factors[f"transformer.h.{layer}.{name}.lora_{factor}"] = torch.cat([start[key] for key in found])
    torch.save(factors, folder / "start.pth")
    return {}


def _folder(job: dict[str, Any]) -> Path:
    return Path(job["folder"]) / "litgpt-model"


def _name(config: dict[str, Any]) -> str:
    """The one of LitGPT's own models that has this shape."""
    from litgpt.config import configs

    shape = {
        "n_layer": config["num_hidden_layers"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_query_groups": config["num_key_value_heads"],
        "intermediate_size": config["intermediate_size"],
        "padded_vocab_size": config["vocab_size"],
    }
    for known in configs:
        if all(known.get(key) == value for key, value in shape.items()):
            return str(known["name"])
    raise SystemExit(f"LitGPT knows no model of this shape: {shape}")


def litgpt(job: dict[str, Any]) -> dict[str, Any]:
    """``litgpt finetune lora`` in its own loop."""
    import torch
    from lightning import Fabric
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.finetune import lora as program
    from litgpt.lora import Config
    from torch.utils.data import DataLoader

    folder = _folder(job)
    examples = json.loads((Path(job["folder"]) / "examples.json").read_text())
    rows = [
        {
            "input_ids": torch.tensor(example["input_ids"]),
            "labels": torch.tensor(example["labels"]),
            "token_counts": {key: len(example["input_ids"]) for key in ("raw", "raw_plus_prompt_template")},
        }
        for example in examples
    ]
    done: list[float] = []
    steps: list[dict[str, Any]] = []

    class Report(Fabric):  # type: ignore[misc]  # not in the environment of the type checks
        def log_dict(self, metrics: dict[str, Any], step: int | None = None) -> None:
            if "loss" in metrics:  # else it is the throughput
                done.append(time.perf_counter())
                steps.append(metrics)

    class Rows(DataModule):  # type: ignore[misc]
        prompt_style = None

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None: ...

        def train_dataloader(self) -> Any:
            return DataLoader(rows, batch_size=job["batch"], collate_fn=get_sft_collate_fn())  # type: ignore[arg-type]

        val_dataloader = train_dataloader

    class ClippedAdamW(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], TRAIN["max_grad_norm"])
            return super().step(closure)

    def optimizer(_: Any, parameters: Any) -> Any:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return ClippedAdamW(trained, lr=job["learning_rate"], weight_decay=TRAIN["weight_decay"])

    def schedule(optimizer: Any, warmup_steps: int, max_steps: int) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max_steps)

    load = program.load_checkpoint

    def load_with_start(fabric: Any, model: Any, path: Path, strict: bool) -> None:
        load(fabric, model, path, strict=strict)
        unexpected = model.load_state_dict(torch.load(folder / "start.pth"), strict=False).unexpected_keys
        if unexpected:
            raise SystemExit(f"LitGPT has no {unexpected[0]}")

    program.instantiate_torch_optimizer, program.get_lr_scheduler = optimizer, schedule
    program.load_checkpoint, program.merge_lora = load_with_start, lambda **_: None
    program.save_hyperparameters = program.save_prompt_style = lambda *_: None
    everywhere = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    config = Config.from_file(
        folder / "model_config.yaml",
        lora_r=LORA["r"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=LORA["lora_dropout"],
        lora_head=False,
        **everywhere,
    )
    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=job["batch"],
        micro_batch_size=job["batch"],
        lr_warmup_steps=0,
        epochs=2,  # one more than is taken: it stops at the beginning of the last one
        max_steps=job["steps"],
    )
    check = EvalArgs(
        interval=job["steps"] + 1, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False
    )
    precision = {"bfloat16": "bf16-true", "float32": "32-true"}[job["dtype"]]
    fabric = Report(accelerator="cpu", devices=1, precision=precision)
    out = Path(job["folder"]) / f"litgpt-{job['run']}"
    fabric.launch(program.main, 1, job["seed"], config, Rows(), folder, out, train, check, "AdamW", 1, precision)
    rates = [job["learning_rate"], *(metrics["learning_rate"] for metrics in steps)][: len(steps)]
    seconds = [metrics["iter_time"] for metrics in steps]
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("litgpt", "torch")},
        "losses": [metrics["loss"] for metrics in steps],
        "learning_rates": rates,
        "seconds": seconds,
        "train_seconds": sum(seconds),
        "first_step_seconds": done[0] - STARTED,
    }


CONTESTANTS = {"checkpoint": checkpoint, "litgpt": litgpt}


if __name__ == "__main__":
    serve(CONTESTANTS)
