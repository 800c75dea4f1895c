"""The tokenizer that a GGUF file describes, split into words exactly as its merges were learned.

A GGUF file stores vocabulary, merges and the *name* of the rule that splits text into words (``tokenizer.ggml.pre``).
A wrong rule still gives ids, only not the ones that the model was trained on, and nothing fails; so a name that is not
known here is refused. Source of the names: llama.cpp, ``src/llama-vocab.cpp``; of the rules: each model's own
tokenizer.json.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from veneer.errors import ModelError, did_you_mean

_SCORED = frozenset({"llama", "t5", "gemma4"})  # tokenizer.ggml.model: SentencePiece and Unigram
_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# rule -> the names that files give it. "gpt-2" splits as GPT-2 does; "digits" takes every digit apart first.
_NAMES: dict[str, tuple[str, ...]] = {
    "gpt-2": ("gpt-2", "phi-2", "mpt", "olmo", "trillion", "granite-docling"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    _LLAMA3: ("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"),
    _QWEN2: ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
    _TEKKEN: ("tekken",),
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names}
_NFC = frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"})
# A word that is in the vocabulary is one token even where no merges lead to it.
_IGNORE_MERGES = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of a GGUF file as a transformers tokenizer.

    Args:
        path: the file.
        metadata: its key-value pairs (arrays as lists).

    Raises:
        ModelError: the file holds no tokenizer, or a kind or a splitting rule that is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise ModelError(
            "the GGUF file holds no tokenizer", where=str(path), fix="use a file that was converted with its tokenizer"
        )
    backend = _byte_level(path, metadata) if kind == "gpt2" else _scored(path, metadata)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    named = {role: tokens[int(metadata[key])] for role, key in _ROLES.items() if metadata.get(key) is not None}
    # llama.cpp puts the first token before every text of these families unless the file says otherwise.
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _IGNORE_MERGES
    if kind in ("gpt2", "llama"):
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # which changes no ids
        if metadata.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in named:
            bos = named["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
            )
    # A class of the model's own would build its tokenizer anew from the saved files, by rules that are not the file's.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    if len(tokenizer) != len(tokens):
        raise ModelError(
            f"the GGUF file names {len(tokens)} tokens but its tokenizer has {len(tokenizer)}",
            where=str(path),
            fix="use the model's Hugging Face folder",
        )
    template = metadata.get("tokenizer.chat_template")
    if template:
        tokenizer.chat_template = template
    context = metadata.get(f"{metadata['general.architecture']}.context_length")
    if context:
        tokenizer.model_max_length = int(context)
    return tokenizer


def _scored(path: Path, metadata: Mapping[str, Any]) -> Any:
    """A SentencePiece or Unigram tokenizer: it carries scores, which transformers turns into merges, and no rule."""
    kind = metadata["tokenizer.ggml.model"]
    try:
        if kind not in _SCORED:
            raise NotImplementedError(f"known are gpt2, {', '.join(sorted(_SCORED))}")
        with alone(path) as folder:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(
            f"a tokenizer of kind '{kind}' cannot be read from GGUF: {error}",
            where=str(path),
            fix="use the model's Hugging Face folder",
        ) from error
    backend = tokenizer.backend_tokenizer
    if kind == "llama":
        # Spaces are a letter like any other, and one more may stand before the text; the versions of transformers
        # differ in whether it also does before a text that begins with a space. Here it does, as in llama.cpp.
        first = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        before = [normalizers.Prepend("\u2581")] if first else []
        after = [decoders.Strip(" ", 1, 0)] if first else []
        backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
        )
    return backend


@contextlib.contextmanager
def alone(path: Path) -> Iterator[Path]:
    """A folder in which the file is alone: transformers would rather read a tokenizer.json that lies beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def _byte_level(path: Path, metadata: Mapping[str, Any]) -> Any:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _RULES:
        raise ModelError(
            f"the GGUF file splits text by the rule '{pre}', which is not known here",
            where=f"{path}, tokenizer.ggml.pre",
            fix=did_you_mean(pre, _RULES) or "use the model's Hugging Face folder",
        )
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    pairs = [str(merge).split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", [])]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in pairs],
            ignore_merges=pre in _IGNORE_MERGES,
        )
    )
    rule = _RULES[pre]
    if rule in ("gpt-2", "digits"):
        by_word = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if rule == "digits" else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, by_word]) if digits else by_word
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rule), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == _CONTROL]
    plain = [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, types) if k == _USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    return backend
