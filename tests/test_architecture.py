"""The house: floors that import only downwards, few libraries per floor, short files, nothing heavy at the door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import veneer

SOURCE = Path(veneer.__file__).parent

# Package or module of veneer -> its floor. A package imports from floors below its own, and from itself.
FLOORS = {
    "errors": 0,
    "files": 0,
    "lazy": 0,
    "runtime": 0,
    "kernels": 0,
    "quant": 1,
    "inbox": 1,
    "adapters": 2,
    "models": 3,
    "data": 3,
    "generate": 4,
    "recipe": 4,
    "run": 4,
    "evaluate": 5,
    "ship": 5,
    "plan": 5,
    "train": 6,
    "serve": 6,
    "advise": 6,
    "demo": 7,
    "cli": 7,
    "__main__": 8,
}

# The neighbours on one floor that may know each other, in one direction.
NEIGHBOURS = {
    ("files", "errors"),
    ("runtime", "errors"),
    ("kernels", "errors"),
    ("kernels", "runtime"),
    ("kernels", "files"),  # the native code lies in the cache folder
    ("run", "recipe"),  # opening a run folder reads its recipe
    ("ship", "evaluate"),  # what a smaller rank costs is measured on held-out rows
    ("cli", "demo"),  # the `demo` command calls run_demo
}

# Third-party libraries by package, beyond torch and safetensors. Floors 0 to 2 must run with those two alone.
LIBRARIES: dict[str, set[str]] = {
    "kernels": {"triton"},
    "models": {"transformers", "tokenizers", "gguf", "huggingface_hub", "numpy", "filelock"},
    "data": {
        "transformers",
        "tokenizers",
        "datasets",
        "datasketch",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "pyarrow",
        "rich",
    },
    "generate": {"transformers", "numpy"},
    "recipe": {"pydantic", "yaml"},
    "run": {"pydantic", "yaml"},
    "evaluate": {"rouge_score", "sacrebleu", "jsonschema", "lm_eval", "matplotlib", "numpy", "rich"},
    "ship": {"gguf", "huggingface_hub", "transformers", "numpy", "matplotlib"},
    "train": {"numpy", "rich", "transformers", "tensorboard", "wandb", "mlflow", "trackio", "bitsandbytes"},
    "serve": {"fastapi", "uvicorn", "prometheus_client"},
    "cli": {"typer", "rich", "yaml"},
    "demo": {"rich"},
}
EVERYWHERE = {"torch", "safetensors"}

LONGEST_FILE = 500
LONGEST_LOOP = 300

# Whoever reads one of these runs the code that a stranger wrote into the file.
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

# What starts fast: none of these may import torch, transformers or datasets, at any depth.
LIGHT_MODULES = [
    "veneer",
    "veneer.cli",
    "veneer.errors",
    "veneer.files",
    "veneer.recipe",
    "veneer.run",
    "veneer.data.read",
    "veneer.data.conversation",
    "veneer.data.check",
    "veneer.demo",
    "veneer.demo.table",
    "veneer.inbox.parts",
]
HEAVY = ("torch", "transformers", "datasets")


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in ``tree``: at the top, inside functions and under TYPE_CHECKING alike.

    ``from a import b`` gives ``a.b``, since ``b`` may be a module; relative imports are resolved against ``package``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: ``data`` for veneer/data/read.py, ``run`` for veneer/run.py."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def violations(code: str, part: str, package: str) -> list[str]:
    """What the imports of ``code``, a file of ``part``, do against the rules of the house."""
    found = []
    for line, name in imported_modules(ast.parse(code), package):
        top, _, rest = name.partition(".")
        if top in sys.stdlib_module_names or top == "__future__":
            continue
        if top != "veneer":
            if top not in EVERYWHERE | LIBRARIES.get(part, set()):
                found.append(f"line {line}: {part} may not import {top}")
            continue
        target = rest.split(".")[0]
        if part == "__init__" or target in (part, "__version__"):
            continue  # the front door shows every floor; the version belongs to nobody
        if target not in FLOORS:
            found.append(f"line {line}: {name} is on no floor; import it from the module that defines it")
        elif FLOORS[target] >= FLOORS[part] and (part, target) not in NEIGHBOURS:
            found.append(f"line {line}: {part} (floor {FLOORS[part]}) imports {target} (floor {FLOORS[target]})")
    return found


def package_of(path: Path) -> str:
    return ".".join(["veneer", *path.relative_to(SOURCE).parts[:-1]])


def test_every_part_of_the_house_is_on_a_floor() -> None:
    assert {part_of(path) for path in source_files()} - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_and_stay_with_the_libraries_of_their_floor(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), part_of(path), package_of(path)) == []


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("from veneer.train import train", "imports train"),
        ("import veneer.models.base", "imports models"),
        ("def f():\n    from veneer.cli import app", "imports cli"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from veneer.evaluate import x", "imports evaluate"),
        ("from ..train.loop import run", "imports train"),
        ("from .. import train", "imports train"),
        ("from veneer import train", "imports train"),
        ("from veneer import attach", "on no floor"),
        ("import importlib\nimportlib.import_module('veneer.serve')", "imports serve"),
        ("def f():\n    import transformers", "may not import transformers"),
        ("import numpy as np", "may not import numpy"),
    ],
)
def test_the_check_sees_an_import_that_goes_up_however_it_is_written(code: str, complaint: str) -> None:
    assert len(found := violations(code, "adapters", "veneer.adapters")) == 1
    assert complaint in found[0]


def test_the_check_lets_imports_down_and_within_a_package_pass() -> None:
    code = (
        "import json\nimport torch\nfrom safetensors.torch import save_file\nfrom veneer import __version__\n"
        "from veneer.errors import AdapterError\nfrom veneer.kernels.lora_linear import lora_linear\n"
        "from . import config\n"
        "from .layers import LoraLinear\nfrom veneer.adapters.config import LoraConfig\n"
    )
    assert violations(code, "adapters", "veneer.adapters") == []


def test_neighbours_on_one_floor_do_not_know_each_other_both_ways() -> None:
    assert not {(b, a) for a, b in NEIGHBOURS} & NEIGHBOURS
    assert all(FLOORS[a] == FLOORS[b] for a, b in NEIGHBOURS)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_the_training_loop_is_read_in_one_sitting() -> None:
    assert len((SOURCE / "train" / "loop.py").read_text(encoding="utf-8").splitlines()) <= LONGEST_LOOP


def pickle_uses(code: str) -> list[str]:
    """Where ``code`` could read a pickle: the modules that do, ``torch.load``, ``allow_pickle=True``."""
    tree = ast.parse(code)
    found = [f"line {line}: {name}" for line, name in imported_modules(tree, "") if name.split(".")[0] in PICKLES]
    found += [
        f"line {line}: {name}" for line, name in imported_modules(tree, "") if name in ("torch.load", "torch.save")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.hub"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_reads_or_writes_a_pickle(path: Path) -> None:
    assert pickle_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import joblib",
    ],
)
def test_the_check_sees_a_pickle_however_it_is_read(code: str) -> None:
    assert len(pickle_uses(code)) == 1


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_what_must_start_fast_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def test_the_help_of_the_command_line_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom veneer.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as done:\n    assert not done.code\n"
        f"sys.stderr.write(str([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr == "[]"
    assert "train" in done.stdout
