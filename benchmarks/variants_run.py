"""What runs in a process of its own for ``benchmarks.variants``: one training run, and what is measured of it.

``python -m benchmarks.variants_run NAME JOB RESULT``, as in ``benchmarks.processes``. The training is the command
line's own: a recipe and ``train_recipe``.

Names: ``N`` held-out rows, ``P`` prompts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import Curve
from benchmarks.processes import Job, Result, serve
from benchmarks.sft import WARM_UP
from benchmarks.variants_cost import peak_gb

# Of everyday use, with answers that any base knows how to begin.
GENERAL_PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Name three uses of a paper clip.",
    "What is the capital of Italy, and what is it known for?",
    "Explain to a child what a volcano is.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Write a polite e-mail that declines an invitation.",
    "What is the difference between weather and climate?",
    "Write a Python function that reverses a list.",
    "How do plants make their food?",
    "Give three tips for better sleep.",
    "What happened in the French Revolution?",
    "Tell me a short story about a fox and a crow.",
    "How many days are there in a leap year, and why?",
    "Translate 'good morning, my friend' into Spanish.",
)
GENERAL_TOKENS = 48  # of an answer, at most
TRAIN: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0}


class Stopwatch(Curve):
    """The curve, with the tokens of each step and the moment at which the first one began."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.started = 0.0

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        self.started = time.perf_counter()
        super().start(total_steps, resumed_step, description)

    def step(self, values: Any) -> None:
        super().step(values)
        self.tokens.append(values["tokens"])


def recipe_of(job: Job) -> Any:
    """The recipe of a run."""
    from veneer.recipe import recipe_from

    return recipe_from(
        {
            "base": job["base"],
            "dtype": job["dtype"],
            "device": job["device"],
            "quantize": job["quantize"],
            "adapter": job["adapter"],
            "data": {"train": job["rows"], "eval": None},
            "train": {
                **TRAIN,
                **job["train"],
                "learning_rate": job["learning_rate"],
                "max_steps": job["steps"],
                "save_steps": job["steps"],
                "per_device_train_batch_size": job["batch"],
                "max_length": job["max_length"],
                "seed": job["seed"],
            },
            "output_dir": str(Path(job["folder"]) / "run"),
        }
    )


def note_loading(when: dict[str, float]) -> None:
    """From now on ``train_recipe`` of this process notes when it has loaded the base."""
    from veneer.train import api, base

    load = base.load_base_of

    def loaded(*arguments: Any, **options: Any) -> Any:
        result = load(*arguments, **options)
        when["loaded"] = time.perf_counter()
        return result

    setattr(api, "load_base_of", loaded)  # noqa: B010  # a plain assignment to a function is an error of types


def run(job: Job) -> Result:
    """Trains by the job's recipe and measures the adapter: curve, speed, memory, held-out rows, drift from the base."""
    from veneer.train import train_recipe

    when: dict[str, float] = {}
    note_loading(when)
    watch = Stopwatch()
    result = train_recipe(recipe_of(job), overwrite=True, progress=watch)
    peak = peak_gb(job["device"])  # before the measurements, which hold other things
    figures = watch.figures()
    speeds = [tokens / seconds for tokens, seconds in zip(watch.tokens, figures["seconds"], strict=True)]
    return {
        "losses": figures["losses"],
        "train_seconds": figures["train_seconds"],
        "tokens_per_second": statistics.median(speeds[WARM_UP:] or speeds),
        "init_seconds": watch.started - when["loaded"],
        "peak_gb": peak,
        "adapter_mb": (result.adapter / "adapter_model.safetensors").stat().st_size / 1e6,
        "trained_parameters": result.model.trainable_count(),
        **measure(result.model, job),
    }


def untrained(job: Job) -> Result:
    """The same measurements of the base as it is."""
    from veneer.models import load_base

    return measure(load_base(job["base"], dtype=job["dtype"], device=job["device"]), job)


def measure(model: Any, job: Job) -> Result:
    """Held-out likelihoods, held-out answers where the task has short ones, and the drift."""
    from veneer.adapters import AdaptedModel
    from veneer.data import read, render
    from veneer.evaluate import evaluate

    base: Any = model.base if isinstance(model, AdaptedModel) else model
    base.module.eval()
    dataset = render(read(job["held_out"]), base.tokenizer, max_length=job["max_length"], train_on="last")
    found: Result = held_out(base.module, [dataset.row(index) for index in range(len(dataset))])
    if job["answers"]:
        told = evaluate(model, job["answers"], metrics=["exact_match"], max_new_tokens=96, compare=False, resamples=1)
        found["exact"] = [row.scores["exact_match"] for row in told.rows]
    if isinstance(model, AdaptedModel):
        found["drift"] = drift(model, json.loads(Path(job["general"]).read_text()))
    return found


@torch.no_grad()
def held_out(module: nn.Module, examples: Sequence[Any], rows: int = 16) -> Result:
    """What the model gives to held-out answers.

    Returns:
        ``nll`` ``[N]`` summed nats, ``correct`` ``[N]`` tokens that are the model's first choice, ``tokens`` ``[N]``.
    """
    from veneer.data import collate_packed
    from veneer.models.head import hidden_states, token_losses

    found: dict[str, list[Any]] = {"nll": [], "correct": [], "tokens": []}
    device = next(module.parameters()).device
    for start in range(0, len(examples), rows):
        batch = collate_packed(examples[start : start + rows], share_prefix=True).to(device)
        losses = token_losses(module, hidden_states(module, batch), batch.targets)
        documents = torch.split(batch.targets[0], batch.document_lengths or [])
        counts = [int((document != -100).sum()) for document in documents[batch.shared_prefix > 0 :]]
        found["nll"] += [float(part.double().sum()) for part in torch.split(losses.nll, counts)]
        found["correct"] += [int(part.sum()) for part in torch.split(losses.correct, counts)]
        found["tokens"] += counts
    return found


@torch.no_grad()
def drift(model: Any, general: Sequence[dict[str, Any]]) -> list[float]:
    """``KL(base || adapted)`` (nats) on the base's own greedy answers.

    Args:
        general: for each prompt its ``ids`` with the answer's, and at which of them the answer ``begins``.

    Returns:
        ``[P]`` means over the tokens of each answer.
    """

    def logprobs(ids: Sequence[int], begins: int) -> torch.Tensor:
        device = next(model.module.parameters()).device
        logits: torch.Tensor = model.module(input_ids=torch.tensor([list(ids)], device=device)).logits
        return logits[0, begins - 1 : -1].float().log_softmax(-1)

    found = []
    for text in general:
        adapted = logprobs(text["ids"], text["begins"])
        with model.disabled():
            base = logprobs(text["ids"], text["begins"])
        found.append(float((base.exp() * (base - adapted)).sum(-1).mean()))
    return found


def general_answers(job: Job) -> Result:
    """Writes the base's greedy answers to the general prompts, as token ids."""
    from veneer.data import render_prompt
    from veneer.data.read import read
    from veneer.generate import generate
    from veneer.models import load_base

    base = load_base(job["base"], dtype=job["dtype"], device=job["device"])
    rows = read([{"messages": [{"role": "user", "content": prompt}]} for prompt in GENERAL_PROMPTS])
    prompts = [render_prompt(row, base.tokenizer).prompt_ids for row in rows.conversations]
    answers = generate(base, prompts, max_new_tokens=GENERAL_TOKENS)
    texts = [
        {"ids": [*prompt, *answer.token_ids], "begins": len(prompt)}
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.token_ids
    ]
    Path(job["general"]).write_text(json.dumps(texts))
    return where(job)


def where(job: Job) -> Result:
    """What the runs compute in and on."""
    from veneer.kernels.precision import resolve_dtype

    on_cpu = torch.device(job["device"]).type == "cpu"
    processor = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name()
    return {"dtype": str(resolve_dtype(job["dtype"], job["device"])).removeprefix("torch."), "processor": processor}


CONTESTANTS = {"general": general_answers, "where": where, "base": untrained, "run": run}

if __name__ == "__main__":
    serve(CONTESTANTS)
