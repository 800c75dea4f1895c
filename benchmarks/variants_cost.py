"""Step time and memory of a variant against its reference: two processes that train in turn, block by block.

Both hold their whole run and take the same rows; while one trains a block of steps the other waits. Each pair of blocks
gives a ratio, in the order A B, B A, A B, so that a machine that warms up or slows down favours neither. The first
block of each warms up and is not counted. Both are started anew a few times, as a peak depends on chance.

``python -m benchmarks.variants_cost JOB`` is such a process: it answers each line of its input with a block.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import Job, peak_rss_gb

DORA_LIMITS = (1.15, 1.10)  # step time, memory
LIMIT = 1.10  # of every other variant, both
Block = dict[str, float]


class Contestant:
    """The parent's end of a process that trains block by block."""

    def __init__(self, job: Job) -> None:
        folder = Path(job["folder"])
        folder.mkdir(parents=True)
        path = folder / "job.json"
        path.write_text(json.dumps(job))
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        self._errors = open(folder / "errors.txt", "w+")  # noqa: SIM115  # closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.variants_cost", str(path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def block(self) -> Block:
        """Lets it train a block; returns its seconds and peak memories.

        Raises:
            SystemExit: it failed, with what it said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            line = ""  # it has ended; its error says why
        else:
            line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise SystemExit(self._errors.read())
        block: Block = json.loads(line)
        return block

    def close(self) -> None:
        """Ends it, wherever it is."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def compare(job: Job, reference: Job, rounds: int, starts: int = 3) -> dict[str, Any]:
    """The ratios of two jobs, ``job`` over ``reference``.

    Args:
        rounds: pairs of blocks, dealt out to the starts.
        starts: of both processes anew, each with a seed, and so an order of the rows, of its own: where the heap gets
            its gaps, a few percent of the peak, is a matter of chance.

    Returns:
        ``step_ratio`` (the median of the pairs), ``step_low`` and ``step_high`` (their quartiles), ``memory_ratio`` of
        the peaks from the first step on, ``whole_ratio`` of the peaks of the whole processes (medians over the starts),
        ``memories`` of each start, and the pairs.

    Raises:
        SystemExit: one of them failed.
    """
    starts = min(starts, rounds)
    return ratios(
        [_in_turn(job, reference, start, rounds // starts + (start < rounds % starts)) for start in range(starts)]
    )


def _in_turn(job: Job, reference: Job, start: int, rounds: int) -> list[tuple[Block, Block]]:
    folder = Path(job["folder"]) / f"start-{start}"
    both: list[Contestant] = []
    try:
        for name, each in (("variant", job), ("reference", reference)):
            own = {"folder": str(folder / name), "seed": each["seed"] + start, "steps": each["block"] * (rounds + 1)}
            both.append(Contestant({**each, **own}))
            both[-1].block()
        pairs = []
        for number in range(rounds):
            order = (0, 1) if (number + start) % 2 else (1, 0)
            blocks = {place: both[place].block() for place in order}
            pairs.append((blocks[0], blocks[1]))
    finally:
        for contestant in both:
            contestant.close()
    return pairs


def ratios(starts: list[list[tuple[Block, Block]]]) -> dict[str, Any]:
    """What the pairs of blocks of each start come to; see :func:`compare`."""
    pairs = [pair for start in starts for pair in start]
    steps = [one["seconds"] / other["seconds"] for one, other in pairs]
    low, _, high = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3
    memories = [start[-1][0]["training_gb"] / start[-1][1]["training_gb"] for start in starts]
    return {
        "step_ratio": statistics.median(steps),
        "step_low": low,
        "step_high": high,
        "memory_ratio": statistics.median(memories),
        "whole_ratio": statistics.median(start[-1][0]["whole_gb"] / start[-1][1]["whole_gb"] for start in starts),
        "memories": memories,
        "steps": steps,
        "blocks": [[one["seconds"], other["seconds"]] for one, other in pairs],
    }


def within_limits(name: str, cost: Mapping[str, Any]) -> bool:
    """Whether a variant costs no more than it may."""
    step, memory = DORA_LIMITS if name == "dora" else (LIMIT, LIMIT)
    return bool(cost["step_ratio"] <= step and cost["memory_ratio"] <= memory)


# --- the process that trains -----------------------------------------------------------------------------------------


class Gate:
    """A ``Progress`` that waits for a line of input before each block of steps and answers it after."""

    def __init__(self, block: int, device: str) -> None:
        self._block, self._device = block, device
        self._began = 0.0
        self._steps = 0
        self._whole = 0.0

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        self._whole = peak_gb(self._device)
        forget_peak(self._device)
        self._wait()

    def step(self, values: Mapping[str, Any]) -> None:
        self._steps += 1
        if self._steps % self._block:
            return
        seconds = time.perf_counter() - self._began
        training = peak_gb(self._device)
        whole = max(training, self._whole)
        print(json.dumps({"seconds": seconds, "training_gb": training, "whole_gb": whole}), flush=True)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self._began = time.perf_counter()

    def loading(self, done: int, total: int) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def message(self, text: str, level: str = "info") -> None: ...

    def close(self) -> None: ...


def forget_peak(device: str) -> None:
    """The peak begins anew, where the machine can: what is measured from now on is what training needs."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # Linux's high-water mark, ru_maxrss too


def peak_gb(device: str) -> float:
    """The most memory so far: of the process on a CPU, of torch's allocator on CUDA."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    return peak_rss_gb()


def main() -> None:
    from benchmarks.variants_run import recipe_of
    from veneer.train import train_recipe

    job = json.loads(Path(sys.argv[1]).read_text())
    train_recipe(recipe_of(job), progress=Gate(job["block"], job["device"]))


if __name__ == "__main__":
    main()
