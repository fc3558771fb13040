"""Any module with encode_image, encode_text and logit_scale as a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TwoTowers
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models import GenericAdapter, load_model
from cliperase_fast.models.adapters.base import normalise


def test_features_are_the_modules_normalised() -> None:
    model = TwoTowers()
    adapter = load_model(model)
    assert isinstance(adapter, GenericAdapter)
    assert adapter.kind == "generic"
    pixels, tokens = torch.randn(4, 3, 8, 8), torch.randint(0, 50, (4, 5))
    torch.testing.assert_close(adapter.encode_image(pixels), nn.functional.normalize(model.encode_image(pixels)))
    torch.testing.assert_close(adapter.encode_text(tokens), nn.functional.normalize(model.encode_text(tokens)))
    assert adapter.logit_scale().item() == pytest.approx(torch.tensor(2.0).exp().item())
    assert adapter.transform is None
    with pytest.raises(InputError, match="pass tokenizer="):
        adapter.tokenize(["a"])


@pytest.mark.parametrize("how", ["buffer", "attribute", "one element"])
def test_the_scale_may_be_a_buffer_or_a_plain_tensor(how: str) -> None:
    model = TwoTowers()
    del model.logit_scale
    value = torch.tensor([1.5] if how == "one element" else 1.5)
    if how == "buffer":
        model.register_buffer("logit_scale", value)
    else:
        model.logit_scale = value
    assert load_model(model).logit_scale().shape == ()
    assert load_model(model).logit_scale().item() == pytest.approx(4.4817, abs=1e-4)


def test_what_is_missing_is_named() -> None:
    class Half(nn.Module):
        def encode_image(self, pixels: Tensor) -> Tensor:
            return pixels

    with pytest.raises(InputError, match=r"Half .* no encode_text\(\) and no logit_scale") as raised:
        load_model(Half())
    assert "encode_image" not in str(raised.value)
    with pytest.raises(InputError, match=r"no encode_image\(\) and no encode_text\(\) and no logit_scale"):
        load_model(nn.Linear(2, 2))


def test_features_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoTowers()
    monkeypatch.setattr(model, "encode_image", lambda pixels: (pixels, None))
    monkeypatch.setattr(model, "encode_text", lambda tokens: torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match=r"TwoTowers.encode_image must return features \[B, D\], not tuple"):
        load_model(model).encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"encode_text must return features \[B, D\], not \[2, 3, 4\]"):
        load_model(model).encode_text(torch.zeros(2, 5, dtype=torch.long))


def test_the_state_dict_is_saved_shared_weights_included(tmp_path: Path) -> None:
    model = TwoTowers()
    model.text_proj.weight = model.image_blocks[0].linear.weight
    load_model(model).save(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    twin = TwoTowers()
    twin.load_state_dict(saved)
    assert load_model(twin).identity() == load_model(model).identity()


def test_blocks_are_the_longest_stacks_of_each_tower() -> None:
    model = TwoTowers()
    image, text = load_model(model).blocks()
    assert image == list(model.image_blocks)
    assert text == list(model.text_blocks)


def test_normalising_widens_half_precision_and_keeps_double() -> None:
    features = torch.randn(5, 7)
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        rows = normalise(features.to(dtype))
        assert rows.dtype == expected
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(5, dtype=expected))
    exact = features.double().requires_grad_()
    assert torch.autograd.gradcheck(normalise, exact)
