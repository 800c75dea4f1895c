"""Folding an adapter into its base and writing a plain Hugging Face folder, read back and compared before it counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from veneer import __version__
from veneer.adapters import AdaptedModel, MergeReport, merge, merge_report
from veneer.errors import UsageError
from veneer.files import atomic_folder, write_json
from veneer.models import Base, load_base
from veneer.models.strict import quiet
from veneer.run import is_run, load_model, open_run

# What the drift is measured on: plain sentences, questions, numbers, code and another language.
PROBES = (
    "The committee will meet on Thursday at half past nine to discuss the budget for the coming year.",
    "What is the difference between a violin and a viola, and which of the two is tuned lower?",
    "If 3 boxes hold 12 apples each and 5 apples are eaten, 31 apples are left.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    '{"name": "Ada", "born": "1815-12-10", "languages": ["English", "French"]}',
    "Bitte senden Sie mir die Rechnung bis zum 3. März an die neue Adresse.",
)


@dataclass(frozen=True)
class MergedModel:
    """A merged model on disk, and how far its predictions are from those of base and adapter."""

    folder: Path
    report: MergeReport
    base: dict[str, Any]  # identity of the base
    bytes: int  # of the weight files

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"folder": str(self.folder), "drift": asdict(self.report), "base": self.base, "bytes": self.bytes}


def merge_model(
    spec: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> MergedModel:
    """Folds the adapter of ``spec`` into its base and writes weights, configuration, tokenizer and chat template.

    The folder is read back before it takes its name, and the model that was read is compared with base and adapter.

    Args:
        spec: a run folder or an adapter folder.
        output: the folder to write.
        dtype: of the merged weights; "auto" is the run's own.
        device: to compute on.
        base: the base, where it is not the one recorded.
        allow_base_mismatch: merge into a base with other weights than those the adapter was trained on.
        overwrite: replace ``output``.

    Raises:
        UsageError: ``output`` is taken, or ``spec`` is a base without an adapter.
        AdapterError: the adapter does not fit, or a merged weight is not finite.
        StorageError: the folder cannot be written.
    """
    folder = Path(output).expanduser().absolute()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the output is taken", where=str(folder), fix="choose another folder, or --overwrite")
    adapted = load_model(spec, dtype=dtype, device=device, base=base, allow_base_mismatch=allow_base_mismatch)
    if not isinstance(adapted, AdaptedModel) or not isinstance(adapted.base, Base):
        raise UsageError(f"'{spec}' is a base: there is no adapter to merge", fix="give a run or an adapter folder")
    loaded = adapted.base
    template = open_run(spec).recipe.data.chat_template if is_run(spec) else None
    with atomic_folder(folder) as temporary:
        _write(adapted, loaded, template, temporary)
        again = load_base(temporary, dtype=loaded.dtype, device=loaded.device)
        report = _drift(adapted, loaded, again)
        write_json(
            temporary / "veneer.json",
            {
                "base": loaded.identity.to_dict(),
                "merged": {"adapter": str(Path(spec).absolute()), "drift": asdict(report)},
                "veneer_version": __version__,
            },
        )
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    return MergedModel(folder, report, loaded.identity.to_dict(), size)


def _write(adapted: AdaptedModel, base: Base, template: str | None, folder: Path) -> None:
    merged: Any = merge(adapted)
    with quiet():
        merged.save_pretrained(str(folder))
    before = base.tokenizer.chat_template
    try:
        if template is not None:
            base.tokenizer.chat_template = template  # the one it was trained with has to be the one it is asked with
        base.tokenizer.save_pretrained(str(folder))
    finally:
        base.tokenizer.chat_template = before


def _drift(adapted: AdaptedModel, base: Base, merged: Base) -> MergeReport:
    ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    longest = max(len(row) for row in ids)
    filled = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=base.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=base.device)
    return merge_report(adapted, merged.module, filled, mask)
