"""Settings together, through the recipe: what goes together trains, what makes no sense is refused by its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines
from torch import Tensor, nn

from pairs import Choice, covering
from veneer.adapters import LoraConfig, attach
from veneer.errors import VeneerError
from veneer.models import Base, load_base
from veneer.recipe import recipe_from
from veneer.run import load_model
from veneer.train import api, train_recipe

OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, True),
    "use_rslora": (False, True),
    "scheme": ("none", "nf4"),  # double quantisation is the default
    "init": (True, "pissa", "loftq"),
    "optim": ("adamw", "LoRA+", "adamw_8bit", "paged_adamw"),
}
# The same eight rows in every step, so that the loss has to fall.
TRAIN = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "max_length": 64, "warmup_ratio": 0.0}
ROWS = {"max_rows": 8, "eval": None}


def is_sound(choice: Choice) -> bool:
    return choice[2:4] != ("none", "loftq")  # which starts from what codes lose


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(input_ids=torch.arange(5, 29).view(2, 12)).logits
    return found


@pytest.mark.parametrize(tuple(OPTIONS), covering(OPTIONS, is_sound))
def test_any_two_of_the_usual_settings_train_together(
    use_dora: bool,
    use_rslora: bool,
    scheme: str,
    init: Any,
    optim: str,
    small_run: Callable[..., Any],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    adapter = {"r": 4, "lora_alpha": 8, "use_dora": use_dora, "use_rslora": use_rslora, "init_lora_weights": init}
    how = {"loraplus_lr_ratio": 4.0} if optim == "LoRA+" else {"optim": optim}
    result, _ = small_run(
        adapter=adapter, quantize=scheme, dtype="bfloat16", data=ROWS, train=TRAIN | how, eval={"samples": 0}
    )
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.01

    def base() -> Base:
        quantize = None if scheme == "none" else scheme
        return load_base(tiny_base, dtype="bfloat16", device="cpu", quantize=quantize)

    # The run itself stops where a tensor gets no gradient within two steps; here all of them have moved.
    untouched = base()
    before, weights = logits(untouched.module), {k: v.clone() for k, v in untouched.module.state_dict().items()}
    began = attach(untouched, LoraConfig(**adapter), seed=0).state()
    assert all(not torch.equal(began[key], value) for key, value in result.model.named_parameters())
    frozen = {
        key.replace(".base_layer", ""): value
        for key, value in result.model.module.state_dict().items()
        if ".adapters." not in key
    }
    assert frozen.keys() == weights.keys()
    assert all(torch.equal(frozen[key], weights[key]) for key in weights)
    after = logits(result.model.module)
    with result.model.disabled():
        assert torch.equal(logits(result.model.module), before)
    assert not torch.equal(after, before)
    # The file holds what acts, in float32: the same products of the same numbers.
    loaded: Any = load_model(result.path, device="cpu")
    assert torch.equal(logits(loaded.module), after)


# What makes no sense

BASES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
}


def write_base(name: str, tokens_of: Path, folder: Path) -> Path:
    """A random model of two layers of another architecture, with the tokenizer of the tiny base."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens_of)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{name}Config")(**size, **BASES[name])
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ADALORA = {"adalora_config": {"target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2}}
# The base has to be there to know it.
AFTER: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA on an embedding": (
        {"adapter": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}},
        "DoRA scales the rows of a weight, and an embedding's rows are its tokens",
    ),
    "AdaLoRA on an embedding": ({"adapter": {**ADALORA, "target_modules": ["embed_tokens"]}}, "embedding"),
    "a rank larger than the matrix": (
        {"adapter": {"r": 17, "target_modules": ["k_proj"]}},
        "rank 17 is larger than this matrix, 16 x 32",
    ),
    "top-500 of 4 experts": ({"base": "Mixtral", "adapter": {"experts": "top-500"}}, "top-500 of 4"),
    "experts of a base without any": ({"adapter": {"experts": "top-2"}}, "experts"),
    "DoRA on experts": (
        {"base": "Mixtral", "adapter": {"experts": "all", "use_dora": True}},
        "does not act on experts",
    ),
    "a convolution alone": ({"base": "Bamba", "adapter": {"target_modules": ["conv1d"]}}, "convolution"),
    "a name for nothing": ({"adapter": {"target_modules": ["q_porj"]}}, "'q_porj' matches nothing"),
    "AdaLoRA in too few steps of the rows": (
        {"adapter": {**ADALORA, "adalora_config": {"target_r": 2, "tinit": 9}}, "train": {"num_train_epochs": 1}},
        "AdaLoRA cannot move ranks in this run",
    ),
    "LoftQ of other bits": (
        {
            "quantize": "nf4",
            "adapter": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1, "loftq_bits": 8}},
        },
        "loftq_bits is 8, and the base is in codes of 4 bits",
    ),
}
# The settings alone say it.
BEFORE: dict[str, tuple[dict[str, Any], str]] = {
    "LoftQ over 16 bits": ({"adapter": {"init_lora_weights": "loftq"}}, "LoftQ .*quantised"),
    "AdaLoRA with DoRA": ({"adapter": {**ADALORA, "use_dora": True}}, "adalora_config and use_dora do not go together"),
    "AdaLoRA with LoRA-FA": ({"adapter": {**ADALORA, "use_lora_fa": True}}, "adalora_config and use_lora_fa do not go"),
    **{
        f"AdaLoRA with {init}": (
            {"adapter": {**ADALORA, "init_lora_weights": init}, "quantize": "nf4"},
            f"adalora_config and init_lora_weights: {init} do not go together",
        )
        for init in ("pissa", "olora", "loftq", "eva", "lora_ga", "orthogonal")
    },
    "AdaLoRA in too few steps": ({"adapter": ADALORA, "train": {"max_steps": 4}}, "AdaLoRA cannot move ranks"),
    "AdaLoRA up to a higher rank": ({"adapter": {"r": 4, "adalora_config": {"target_r": 8}}}, "from rank 4 up to 8"),
    "LoRA-FA with LoRA-GA": ({"adapter": {"use_lora_fa": True, "init_lora_weights": "lora_ga"}}, "do not go together"),
    "DoRA over codes of its own": (
        {
            "quantize": "nf4",
            "adapter": {"use_dora": True, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
        },
        "use_dora and loftq_iter: 2 do not go together",
    ),
    "settings of another start": ({"adapter": {"init_lora_weights": "pissa", "eva_config": {"rho": 2}}}, "eva_config"),
    "LoRA+ with LoRA-FA": (
        {"adapter": {"use_lora_fa": True}, "train": {"loraplus_lr_ratio": 16.0}},
        "A is not trained",
    ),
}


def refuse(changes: dict[str, Any], said: str, values: Callable[..., dict[str, Any]]) -> None:
    """Trains by a recipe and sees that it is refused by its reason, with a way out, and that nothing is written."""
    made = values(**changes)
    with pytest.raises(VeneerError, match=said) as caught:
        train_recipe(recipe_from(made))
    assert caught.value.fix
    assert not Path(made["output_dir"]).exists()


@pytest.mark.parametrize(("changes", "said"), BEFORE.values(), ids=list(BEFORE))
def test_what_the_settings_say_is_refused_before_the_base_is_loaded(
    changes: dict[str, Any], said: str, values: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_base_of", lambda *_, **__: pytest.fail("the base was loaded"))
    refuse(changes, said, values)


@pytest.mark.parametrize(("changes", "said"), AFTER.values(), ids=list(AFTER))
def test_what_the_base_says_is_refused_before_training_starts(
    changes: dict[str, Any],
    said: str,
    values: Callable[..., dict[str, Any]],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("veneer.train.session.train_loop", lambda *_: pytest.fail("training started"))
    if "base" in changes:
        changes = {**changes, "base": str(write_base(changes["base"], tiny_base, tmp_path / "base"))}
    refuse(changes, said, values)


def test_without_the_refused_setting_the_loop_is_reached(
    values: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the two above can fail."""
    for place in (api, "load_base_of"), ("veneer.train.session", "train_loop"):
        with monkeypatch.context() as patch:
            target = place[0] if isinstance(place[0], str) else place[0].__name__

            def reached(*_: Any, **__: Any) -> None:
                raise KeyError("reached")

            patch.setattr(f"{target}.{place[1]}", reached)
            with pytest.raises(KeyError, match="reached"):
                train_recipe(recipe_from(values()))


def test_loftq_of_several_rounds_trains_beside_layers_that_keep_16_bits_and_goes_on(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "adapter": {"r": 4, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
        "quantize": {"scheme": "nf4", "skip": ["down_proj"]},
        "train": {"max_steps": 4, "save_steps": 2, "max_length": 64, "save_total_limit": None},
    }
    whole, _ = small_run("whole", **settings)
    codes = {path: adapter.own is not None for path, adapter in whole.model.linears().items()}
    assert {path for path, own in codes.items() if not own} == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    cut, _ = small_run("cut", resume=True, **settings)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert torch.equal(logits(cut.model.module), logits(whole.model.module))
