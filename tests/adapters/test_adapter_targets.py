"""Which modules a config names: PEFT's rules, and an error for every entry that changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from veneer.adapters import LoraConfig, attach, resolve
from veneer.errors import AdapterError

# Not ours: what PEFT and transformers say about each other, and PEFT's warnings where we have errors.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore:.*tied layer.*")

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def paths(module, **settings):
    return [target.path for target in resolve(module, LoraConfig(**settings)).lora]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_every_linear_but_the_head(llama, tied):
    found = paths(llama(tied=tied), target_modules="all-linear")
    assert {path.rpartition(".")[2] for path in found} == PROJECTIONS
    assert len(found) == 14


def test_all_linear_finds_a_tied_head_by_its_weight_where_the_module_does_not_say():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.body, self.out = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
            self.out.weight = self.tokens.weight

    assert paths(Model()) == ["body"]


def test_all_linear_takes_conv1d_and_no_normal_convolution(gpt2):
    found = {path.rpartition(".")[2] for path in paths(gpt2())}
    assert found == {"c_attn", "c_proj", "c_fc"}
    module = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    assert paths(module) == ["1"]


def test_a_list_holds_whole_paths_or_ends_after_a_dot(llama):
    assert paths(llama(), target_modules=["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert paths(llama(), target_modules=["model.layers.1.self_attn.v_proj"]) == ["model.layers.1.self_attn.v_proj"]
    assert paths(llama(), target_modules=["1.self_attn.v_proj"]) == ["model.layers.1.self_attn.v_proj"]


def test_a_string_is_a_regular_expression_for_the_whole_path(llama):
    assert paths(llama(), target_modules=r".*\.0\..*(q|v)_proj") == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_the_head_and_the_embedding_can_be_named(llama):
    plan = resolve(llama(), LoraConfig(target_modules=["lm_head", "embed_tokens"]))
    assert [(t.path, t.kind) for t in plan.lora] == [("model.embed_tokens", "embedding"), ("lm_head", "linear")]


def test_exclude_modules_win(llama):
    found = paths(llama(), target_modules=["q_proj", "v_proj"], exclude_modules=["0.self_attn.v_proj"])
    assert "model.layers.0.self_attn.v_proj" not in found
    assert len(found) == 3
    assert len(paths(llama(), exclude_modules=r".*mlp.*")) == 8


def test_layers_to_transform_keeps_the_given_layers(llama):
    assert paths(llama(), target_modules=["q_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
    assert len(paths(llama(), layers_to_transform=[0])) == 7
    found = paths(llama(), target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")
    assert found == ["model.layers.0.self_attn.q_proj"]


def test_the_layers_index_is_the_first_number_and_not_an_experts():
    experts = nn.ModuleList([nn.ModuleDict({"w": nn.Linear(2, 2)}) for _ in range(3)])
    module = nn.ModuleDict({"m": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": experts})])})})
    assert len(paths(module, target_modules=["w"], layers_to_transform=[0])) == 3


def test_the_first_matching_pattern_sets_rank_and_alpha(llama):
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 4},
        alpha_pattern={r".*\.1\..*v_proj": 3},
    )
    found = {t.path: (t.r, t.lora_alpha) for t in resolve(llama(), config).lora}
    assert found == {
        "model.layers.0.self_attn.q_proj": (2, 8),
        "model.layers.1.self_attn.q_proj": (4, 8),
        "model.layers.0.self_attn.v_proj": (8, 8),
        "model.layers.1.self_attn.v_proj": (8, 3),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": r".*layers\.\d+\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layers"]},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": r".*down_proj"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["model.norm", "layers.1.mlp"]},
    ],
)
def test_the_matched_modules_are_pefts(llama, settings, tied):
    """The oracle: PEFT itself."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama(tied=tied), peft.LoraConfig(**settings))
    expected = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(paths(llama(tied=tied), **settings)) == expected


def test_patterns_mean_what_they_mean_in_peft(llama):
    peft = pytest.importorskip("peft")
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers.\d.self_attn.q_proj": 2, "q_proj": 3, "v_pro": 7, "1.self_attn.v_proj": 5},
        "alpha_pattern": {"_proj": 9, r"^model\.layers\.0.*": 5, "v_proj": 6},
    }
    plan = resolve(llama(), LoraConfig(**settings, r=4, lora_alpha=8), from_file=True)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings, r=4, lora_alpha=8))
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {t.path: (t.r, t.lora_alpha) for t in plan.lora} == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_porj"]}, "q_proj"),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches nothing"),
        ({"target_modules": "q_proj"}, r"\['q_proj'\]"),
        ({"target_modules": ["mlp"]}, "gate_proj, up_proj, down_proj"),
        ({"target_modules": ["norm"]}, "LlamaRMSNorm cannot be adapted"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "left with no module"),
        ({"exclude_modules": ["v_porj"]}, "v_proj"),
        ({"exclude_modules": "v_proj"}, "excluded module 'v_proj' matches nothing"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "the layers are 0 to 1"),
        ({"rank_pattern": {"q_porj": 4}}, "q_proj"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 4}}, "alpha_pattern 'v_proj' decides for no"),
        ({"rank_pattern": {"q_proj": 4, "self_attn.q_proj": 8}}, "'self_attn.q_proj' decides for no"),
        ({"modules_to_save": ["lm_haed"]}, "lm_head"),
        ({"modules_to_save": ["act_fn"]}, "'act_fn' matches nothing"),
        ({"trainable_token_indices": [64]}, "there is no token 64"),
        ({"trainable_token_indices": [1, 1]}, "each once"),
        ({"trainable_token_indices": {"embed_token": [1]}}, "embed_tokens"),
        ({"trainable_token_indices": {"norm": [1]}}, "no rows of tokens"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "not both"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "not both"),
    ],
)
def test_an_entry_that_changes_nothing_is_an_error_with_the_way_out(llama, settings, says):
    module = llama()
    before = {path: type(m) for path, m in module.named_modules()}
    with pytest.raises(AdapterError) as caught:
        attach(module, LoraConfig(**settings))
    assert re.search(says, str(caught.value)), str(caught.value)
    assert {path: type(m) for path, m in module.named_modules()} == before
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_tied_head_that_follows_trained_rows_cannot_take_factors(llama):
    with pytest.raises(AdapterError, match=r"tied to model\.embed_tokens"):
        resolve(llama(tied=True), LoraConfig(target_modules=["lm_head"], trainable_token_indices=[1]))
    plan = resolve(llama(tied=False), LoraConfig(target_modules=["lm_head"], trainable_token_indices=[1]))
    assert [t.path for t in plan.lora] == ["lm_head"]


def test_what_lies_in_a_saved_module_gets_no_factors(llama):
    found = paths(llama(), modules_to_save=["layers.0.mlp"])
    assert not any("layers.0.mlp" in path for path in found)
    assert len(found) == 11


def test_torchs_multihead_attention_is_left_out_or_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert paths(layer) == ["linear1", "linear2"]
    with pytest.raises(AdapterError, match="MultiheadAttention"):
        paths(layer, target_modules=["out_proj"])


def test_which_embedding_is_asked_when_there_are_several():
    module = nn.ModuleDict({"a": nn.Embedding(4, 2), "b": nn.Embedding(4, 2)})
    with pytest.raises(AdapterError, match="one of a, b"):
        resolve(module, LoraConfig(target_modules=[], trainable_token_indices=[1]))
    plan = resolve(module, LoraConfig(target_modules=[], trainable_token_indices={"b": [1]}))
    assert [t.path for t in plan.tokens] == ["b"]


def test_the_coverage_table_counts_modules_and_parameters(llama):
    adapted = attach(llama(tied=True), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0]))
    rows = {row.module: row for row in adapted.coverage.rows}
    assert (rows["q_proj"].matched, rows["q_proj"].total, rows["q_proj"].parameters) == (1, 2, 4 * (32 + 32))
    assert (rows["down_proj"].matched, rows["down_proj"].total, rows["down_proj"].parameters) == (0, 2, 0)
    assert adapted.coverage.parameters == adapted.trainable_count()
    assert adapted.coverage.base_parameters == sum(p.numel() for p in llama(tied=True).parameters())
    text = str(adapted.coverage)
    assert re.search(r"q_proj +Linear +1/2 +lora r=4 +256", text)
    assert "448 trained parameters" in text


def test_the_coverage_of_everything_counts_what_is_trained(llama):
    config = LoraConfig(r=4, modules_to_save=["model.norm"], trainable_token_indices=[1, 3], rank_pattern={"q_proj": 2})
    adapted = attach(llama(tied=True), config)
    assert adapted.coverage.parameters == adapted.trainable_count()
    assert torch.tensor([row.matched <= row.total for row in adapted.coverage.rows]).all()
