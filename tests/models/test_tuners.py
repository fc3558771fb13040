"""Adapters of the caller's own (peft): folded into a copy with the same features, or refused before any work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import TwoTowers, pixels_for, tiny_clip, tiny_open_clip
from torch import nn
from transformers import CLIPModel

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model, merge_lora, set_trainable
from cliperase_fast.models.unwrapping import fold_tuners

TARGETS = ["q_proj", "v_proj", "fc1"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "a module beside": lambda: LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["visual_projection"]),
    "token rows": lambda: LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices={"token_embedding": [2, 3]}),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc1"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
}


def trained(model: nn.Module) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def features(model: Any) -> list[torch.Tensor]:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    adapter = load_model(tiny_clip())
    adapter.module = base
    tokens = torch.tensor([[8, 2, 3, 4, 5, 9] + [0] * 10])
    return [adapter.encode_image(pixels_for(tiny_clip())), adapter.encode_text(tokens)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_folded_into_a_copy_with_its_features(tmp_path: Path, kind: str) -> None:
    model = trained(get_peft_model(tiny_clip(), CONFIGS[kind]()))
    expected, state = features(model), copy.deepcopy(model.state_dict())
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(expected, features(tiny_clip()), strict=True))

    adapter = load_model(model)

    assert list(adapter.module.state_dict()) == list(tiny_clip().state_dict())
    assert_close(features(adapter.module), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    adapter.check_saveable()
    if kind == "lora":
        adapter.save(tmp_path / "model")
        assert_close(features(CLIPModel.from_pretrained(tmp_path / "model").eval()), expected)


def test_an_injected_adapter_survives_lora_training_of_the_models_own() -> None:
    model = trained(inject_adapter_in_model(CONFIGS["lora"](), tiny_clip()))
    expected = features(model)
    adapter = load_model(model).clone()
    set_trainable(adapter, "lora")
    assert_close(features(adapter.module), expected)
    merge_lora(adapter)
    assert_close(features(adapter.module), expected)
    assert list(adapter.module.state_dict()) == list(tiny_clip().state_dict())


def test_only_active_adapters_are_folded_in() -> None:
    model = get_peft_model(tiny_clip(), CONFIGS["lora"](), adapter_name="one")
    model.add_adapter("two", CONFIGS["lora"]())
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found = []
    for name in ("one", "two"):
        model.set_adapter(name)
        found.append(features(model))
        assert_close(features(load_model(model).module), found[-1])
    assert (found[0][0] - found[1][0]).abs().max() > 1e-3
    with model.disable_adapter():
        assert_close(features(load_model(model).module), features(tiny_clip()))
    model.merge_adapter()
    assert_close(features(load_model(model).module), found[1])


def test_transformers_own_adapters_are_folded_in(tmp_path: Path) -> None:
    model: Any = trained(inject_adapter_in_model(CONFIGS["lora"](), tiny_clip()))
    model._hf_peft_config_loaded = True  # as model.add_adapter leaves it; save_pretrained then writes the adapter alone
    adapter = load_model(model)
    adapter.save(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert_close(features(CLIPModel.from_pretrained(tmp_path / "model").eval()), features(model))


def test_an_adapter_of_an_open_clip_attention_is_folded_in() -> None:
    attention = LoraConfig(r=2, target_modules=["attn", "c_fc"])
    model: Any = trained(inject_adapter_in_model(attention, tiny_open_clip(text_cfg={"vocab_size": 60})))
    adapter = load_model(model)
    pixels = pixels_for(adapter.module)
    torch.testing.assert_close(adapter.module.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=0)
    adapter.check_saveable()


def test_an_adapter_of_own_towers_is_folded_in() -> None:
    model = trained(inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"]), TwoTowers()))
    pixels = torch.randn(2, 3, 8, 8)
    adapter = load_model(model)
    assert list(adapter.module.state_dict()) == list(TwoTowers().state_dict())
    torch.testing.assert_close(adapter.module.encode_image(pixels), model.encode_image(pixels))


def test_an_adapter_that_cannot_be_folded_in_exactly_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(inject_adapter_in_model(CONFIGS["lora"](), tiny_clip()))
    wrong = lambda layer, adapter: torch.zeros_like(layer.weight)  # noqa: E731
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "get_delta_weight", wrong)
    with pytest.raises(InputError, match=r"features would differ by .*merge_and_unload\(\)"):
        load_model(model)


def test_an_adapter_with_values_that_are_not_finite_is_refused_with_the_remedy() -> None:
    model = get_peft_model(tiny_clip(), CONFIGS["lora"]())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("inf"))
    with pytest.raises(InputError, match=r"peft\.tuners\.lora layers cannot be folded .*merge_and_unload\(\)"):
        load_model(model)


def test_learned_prompts_are_refused() -> None:
    class Prompted(peft.PeftModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.base_model = tiny_clip()
            self._peft_config = {"default": peft.PromptTuningConfig(num_virtual_tokens=2)}
            self.active_adapter = "default"
            self._is_prompt_learning = True

    with pytest.raises(InputError, match="learns prompts"):
        load_model(Prompted())


def test_a_model_without_adapters_is_not_copied() -> None:
    model = tiny_clip()
    assert fold_tuners(model) is model
