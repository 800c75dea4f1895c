"""Tiny random encoders and a decoder in folders, as language modelling leaves them, for tests of classification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "deberta", "llama")
ENCODERS = FAMILIES[:-1]


def write_tokenizer(folder: Path, *, framed: bool) -> Any:
    """Bytes under BERT's frame (``[CLS] a [SEP]``, ``[CLS] a [SEP] b [SEP]`` with types 0 and 1), or bare ones.

    The bare kind has no padding token and no separator, as many a decoder's; its eos has the id 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if not framed:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[PAD]", unk_token="[UNK]")
        tokenizer.save_pretrained(str(folder))
        return tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def language_model(family: str, vocab_size: int, **changes: Any) -> Any:
    """A language model of two layers, width 32, without dropout; its head is not the one that is wanted."""
    import transformers as t

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    size = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    makers: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**{**size, **no_dropout, **changes})),
        "roberta": lambda: t.RobertaForMaskedLM(
            t.RobertaConfig(
                **{**size, **no_dropout, "type_vocab_size": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
                | changes
            )
        ),
        "distilbert": lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(
                vocab_size=vocab_size,
                dim=32,
                hidden_dim=48,
                n_layers=2,
                n_heads=4,
                max_position_embeddings=64,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
                initializer_range=0.1,
            )
        ),
        "modernbert": lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(
                **size,
                global_attn_every_n_layers=2,
                local_attention=8,
                pad_token_id=0,
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "deberta": lambda: t.DebertaV2ForMaskedLM(
            t.DebertaV2Config(
                **{**size, **no_dropout},
                type_vocab_size=0,
                relative_attention=True,
                position_biased_input=False,
                pos_att_type=["p2c", "c2p"],
                pad_token_id=0,
            )
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, num_key_value_heads=2, pad_token_id=None)),
    }
    return makers[family]()


def write_classifier_base(family: str, folder: Path) -> Path:
    """An encoder after masked language modelling, or a Llama after the causal kind, with its tokenizer."""
    import torch

    tokenizer = write_tokenizer(folder, framed=family != "llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model(family, len(tokenizer)).save_pretrained(str(folder))
    return folder
