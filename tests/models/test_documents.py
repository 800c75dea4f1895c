"""Models to whose layers the lengths of documents do not get through, or whose windows stand in their masks alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.models.documents import longest_document
from veneer.models.fused import fuse
from veneer.models.head import body_of, hidden_states

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FEW = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = 5
# Whatever the model, its class and config, and how long a document may be.
MODELS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "Nemotron drops what its layers are to get": ("NemotronForCausalLM", "NemotronConfig", {}, 0),
    "Doge has a mask of its own": ("DogeForCausalLM", "DogeConfig", {"keep_window_size": 4}, 0),
    "Llama 4's chunks": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        FEW | {"attention_chunk_size": WINDOW, "head_dim": 8, "intermediate_size_mlp": 48},
        WINDOW,
    ),
    "PhiMoE's window": ("PhimoeForCausalLM", "PhimoeConfig", FEW | {"sliding_window": WINDOW}, WINDOW),
    "Mistral's window": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}, math.inf),
    "Gemma 3's windows": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "head_dim": 8},
        math.inf,
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {}, math.inf),
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    cls, config, changes, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**TEXT | changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # fresh ones are zero or one, and hide what they do
                    parameter += 0.3 * torch.randn(parameter.shape)
    return model


def batch_of(rows: list[Tensor], *, packed: bool, prefix: int = 0) -> Any:
    lengths = [len(row) for row in rows]
    positions = [torch.arange(n) + (prefix if number else 0) for number, n in enumerate(lengths)]
    if packed:
        ids, where = torch.cat(rows)[None], torch.cat(positions)[None]
    else:
        ids, where = torch.stack(rows), torch.stack(positions)
    return SimpleNamespace(
        input_ids=ids, position_ids=where, document_lengths=lengths if packed else None, shared_prefix=prefix
    )


ROWS = [torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


@torch.no_grad()
def own_states(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = body_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state
    return found


@models
def test_rows_are_computed_as_the_models_own_code_does(name: str) -> None:
    expected = torch.cat([own_states(model_of(name), row) for row in ROWS])
    model = model_of(name)
    fuse(model)
    with torch.no_grad():
        padded = hidden_states(model, batch_of(ROWS, packed=False))
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)
    limit = MODELS[name][3]
    assert longest_document(model, body_of(model)) == limit
    if limit:
        with torch.no_grad():
            packed = hidden_states(model, batch_of(ROWS, packed=True))
        torch.testing.assert_close(packed.view_as(expected), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ModelError, match="does not let documents be isolated"):
            hidden_states(model, batch_of(ROWS, packed=True))


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][3]])
@pytest.mark.parametrize("prefix", [3, 6], ids=["short", "as long as the window"])
def test_a_beginning_that_documents_share_belongs_to_each_of_them(name: str, prefix: int) -> None:
    begin, rest = ROWS[0][:prefix], [ROWS[0][prefix:], ROWS[1][prefix:]]
    whole = [own_states(model_of(name), torch.cat((begin, part)))[:, prefix:] for part in rest]
    model = model_of(name)
    fuse(model)
    with torch.no_grad():
        packed = hidden_states(model, batch_of([begin, *rest], packed=True, prefix=prefix))
    torch.testing.assert_close(packed[:, prefix:], torch.cat(whole, 1), rtol=1e-4, atol=1e-4)


@models
def test_looking_leaves_the_model_as_it_was(name: str) -> None:
    model = model_of(name).train()
    model.get_input_embeddings().eval()  # type: ignore[operator]  # transformers has it
    fuse(model)
    settings, modes = model.config.to_dict(), [part.training for part in model.modules()]  # type: ignore[union-attr, operator]
    held = [dict(vars(part)) for part in model.modules()]
    longest_document(model, body_of(model))
    assert model.config.to_dict() == settings  # type: ignore[union-attr, operator]
    assert [part.training for part in model.modules()] == modes
    for part, before in zip(model.modules(), held):
        assert {k: v for k, v in vars(part).items() if isinstance(v, int)} == {
            k: v for k, v in before.items() if isinstance(v, int)
        }


def test_documents_within_a_window_are_told_by_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("PhiMoE's window")
    fuse(model)
    longest_document(model, body_of(model))
    body, calls = body_of(model), []
    monkeypatch.setattr(body, "forward", lambda own=body.forward, **given: (calls.append(set(given)), own(**given))[1])
    for length in (WINDOW, WINDOW + 1):
        hidden_states(model, batch_of([row[:length] for row in ROWS], packed=True))
    told, *alone = calls
    assert "document_lengths" in told
    assert len(alone) == 2
    assert not any("document_lengths" in given for given in alone)


def test_nobodys_hooks_see_the_look() -> None:
    model = model_of("PhiMoE's window")
    fuse(model)
    body, seen = body_of(model), []
    layer = body.layers[0]  # type: ignore[union-attr, index]  # transformers has it
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))  # type: ignore[union-attr]
    layer.register_forward_hook(lambda *_: seen.append("after"))  # type: ignore[union-attr]
    longest_document(model, body)
    assert not seen
    with torch.no_grad():
        hidden_states(model, batch_of([ROWS[0]], packed=False))
    assert seen == ["before", "after"]
