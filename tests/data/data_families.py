"""Small tokenizers and chat templates of the model families, built offline from the documented formats."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "You are a helpful assistant. You are terse.",
    "Hi there, hello! What is the weather in Rome? Name a fruit, please. 21 degrees, 345 metres.",
    "user assistant system model tool think <tool_call> name arguments parameters city",
    "the quick brown fox jumps over the lazy dog; THE END.\n\nNew paragraph, with   spaces.\n",
    "one\n\ntwo\n\nthree",  # so that two line breaks are one token, as in the real vocabularies
] * 3

# The pattern that Llama 3 and Qwen publish: newlines join the punctuation before them, digits come in threes.
_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def template_text(name: str) -> str:
    """A family's chat template."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def byte_level(
    special: Sequence[str | AddedToken], template: str | None, *, pattern: str | None = _PATTERN, **names: str
) -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens, cut by ``pattern`` (GPT-2's own where None)."""
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = (
        level
        if pattern is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), level])
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
        ),
    )
    backend.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) if isinstance(s, str) else s for s in special]
    )
    return _wrapped(backend, template, names)


def sentence_piece(special: Sequence[str], template: str | None, *, prefix_space: bool, **names: str) -> Any:
    """A BPE tokenizer in SentencePiece's manner: spaces are ▁, unknown characters fall back to bytes.

    ``prefix_space`` puts a ▁ before every text (Llama 2, Mistral); Gemma does not.
    """
    replace = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix_space else replace
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    learner.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    merges = [tuple(merge) for merge in learnt["merges"]]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return _wrapped(backend, template, names)


def _wrapped(backend: Tokenizer, template: str | None, names: dict[str, str]) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@functools.cache
def family(name: str) -> Any:
    """The tokenizer of a family, with its chat template. Shared: do not change it."""
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    llama = [
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ]
    qwen_tags = [
        AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    ]
    # Phi-3's control tokens take the white space behind them with them.
    phi3 = [
        AddedToken(token, rstrip=True, special=True, normalized=False)
        for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ]
    match name:
        case "llama3":
            return byte_level(llama, template_text("llama3"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
        case "llama31":
            return byte_level(llama, template_text("llama31"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
        case "qwen25":
            return byte_level(
                [*chatml, *qwen_tags[2:]], template_text("qwen25"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
            )
        case "qwen3":
            return byte_level(
                [*chatml, *qwen_tags], template_text("qwen3"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
            )
        case "gemma":
            special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
            return sentence_piece(
                special, template_text("gemma"), prefix_space=False, bos_token="<bos>", eos_token="<eos>"
            )
        case "mistral":
            return sentence_piece(
                ["<s>", "</s>"], template_text("mistral"), prefix_space=True, bos_token="<s>", eos_token="</s>"
            )
        case "chatml":
            return byte_level(
                chatml, template_text("chatml"), pattern=None, eos_token="<|im_end|>", pad_token="<|im_end|>"
            )
        case "chatml_generation":
            return byte_level(chatml, template_text("chatml_generation"), pattern=None, eos_token="<|im_end|>")
        case "phi3":
            return byte_level(
                ["<s>", "<|endoftext|>", *phi3], template_text("phi3"), bos_token="<s>", eos_token="<|endoftext|>"
            )
        case "phi4":
            special = [*chatml, "<|im_sep|>"]
            return byte_level(special, template_text("phi4"), bos_token="<|endoftext|>", eos_token="<|im_end|>")
        case "plain":
            return byte_level(["<|endoftext|>"], None, pattern=None, eos_token="<|endoftext|>")
    raise KeyError(name)


FAMILIES = (
    "llama3", "llama31", "qwen25", "qwen3", "gemma", "mistral", "chatml", "chatml_generation", "phi3", "phi4",
)  # fmt: skip
