"""A contestant in a process of its own: a job goes in as JSON, a result with the peak memory comes out as JSON.

The process that asks stays small and imports no torch, because a child's peak begins at its parent's size.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()  # of this process, but for the interpreter's own start
Job = dict[str, Any]
Result = dict[str, Any]


def in_process(module: str, name: str, job: Job, python: str = sys.executable) -> Result:
    """What the contestant ``name`` of ``module`` makes of the job, which names its ``folder`` and ``threads``.

    Args:
        python: the interpreter, where the contestant has an environment of its own.
    """
    print(f"{name} ...", file=sys.stderr, flush=True)
    folder = Path(job["folder"])
    job_path, result_path = folder / f"{name}.job.json", folder / f"{name}.result.json"
    job_path.write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", module, name, str(job_path), str(result_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr or done.stdout}")
    result: Result = json.loads(result_path.read_text())
    return result


def serve(contestants: Mapping[str, Callable[[Job], Result]]) -> None:
    """The other end: ``python -m MODULE NAME JOB RESULT``."""
    name, job, result = sys.argv[1:]
    values = contestants[name](json.loads(Path(job).read_text()))
    Path(result).write_text(json.dumps({**values, "peak_rss_gb": peak_rss_gb()}))


def peak_rss_gb() -> float:
    """The most resident memory that this process has held so far, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def commit() -> str:
    """What the code is, where it lies in a git checkout; else nothing."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
