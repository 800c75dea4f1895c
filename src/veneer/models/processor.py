"""What a model that reads images or sound keeps beside its tokenizer: the settings of its processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_SETTINGS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_TEMPLATE = "chat_template.json"  # where processors kept their template before tokenizers and they shared a file


def copy_processor(source: Path, folder: Path) -> None:
    """Copies the settings of a processor, as they are, from a model's folder into one that is written from it.

    A processor there reads the tokenizer's files and chat template of the new folder.
    """
    for name in _SETTINGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def processor_template(folder: Path) -> str | None:
    """The chat template that a folder gives to its processor alone, or None."""
    try:
        template = json.loads((folder / _TEMPLATE).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None
