"""LoRA: what it adapts, that it trains, and that folding it in changes no feature and no key."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS, TwoTowers, tiny_open_clip
from torch import nn

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model, merge_lora, set_trainable
from cliperase_fast.models.lora import SplitAttention


def features(adapter: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = {"resnet": 32, "timm": 160, "generic": 8}.get(kind, 16)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    shape = (2, adapter.context_length or 5)
    tokens = torch.randint(0, adapter.vocabulary_size or 50, shape, generator=generator)
    return adapter.encode_image(pixels), adapter.encode_text(tokens)


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_injected_trained_and_folded_in_again(kind: str) -> None:
    adapter = load_model(MODELS[kind]().eval())
    original = copy.deepcopy(adapter.module.state_dict())
    start = features(adapter, kind)

    torch.manual_seed(0)
    pairs = set_trainable(adapter, "lora", lora_rank=3, lora_alpha=6.0)

    assert type(adapter.module) is type(MODELS[kind]())
    assert all("lora_" in name for name, _ in pairs)
    assert {name for name, parameter in adapter.module.named_parameters() if parameter.requires_grad} == {
        name for name, _ in pairs
    }
    assert_same(features(adapter, kind), start)  # B starts at 0

    optimizer = torch.optim.SGD([parameter for _, parameter in pairs], lr=0.5)
    for _ in range(2):
        image, text = features(adapter, kind)
        (image * text).sum().backward()
        assert all(parameter.grad is not None for _, parameter in pairs)
        optimizer.step()
    trained = features(adapter, kind)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(trained, start, strict=True))

    merge_lora(adapter)

    assert_same(features(adapter, kind), trained)
    state = adapter.module.state_dict()
    assert list(state) == list(original)
    changed = {name for name in state if not torch.equal(state[name], original[name])}
    assert changed
    assert all(name.endswith("weight") and adapter.tower(name) in ("image", "text") for name in changed)
    assert not hasattr(adapter.module, "peft_config")
    merge_lora(adapter)  # nothing left to fold
    assert_same(features(adapter, kind), trained)


def test_every_linear_layer_of_an_open_clip_block_is_adapted() -> None:
    adapter = load_model(tiny_open_clip())
    names = [name for name, _ in set_trainable(adapter, "lora", 2, 4.0)]
    parts = {name.split("resblocks.0.")[1].split(".lora_")[0] for name in names if "resblocks.0." in name}
    assert parts == {"attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}
    assert len(names) == 2 * 2 * 4 * 2  # towers, blocks, layers, A and B


def test_the_scale_is_alpha_over_rank() -> None:
    adapter = load_model(tiny_open_clip())
    set_trainable(adapter, "lora", 2, 5.0)
    layer = adapter.module.visual.transformer.resblocks[0].attn.out_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    expected = layer.weight + 5.0 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merge_lora(adapter)
    torch.testing.assert_close(adapter.module.visual.transformer.resblocks[0].attn.out_proj.weight, expected)


def test_a_forward_pass_leaves_the_base_weights_bitwise_alone() -> None:
    adapter = load_model(tiny_open_clip())
    for name, parameter in set_trainable(adapter, "lora", 2, 4.0):
        torch.nn.init.normal_(parameter)
        assert "lora_" in name
    before = copy.deepcopy(adapter.module.state_dict())
    features(adapter, "open_clip")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.module.state_dict().items())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_computes_what_multihead_attention_does(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    split = SplitAttention(attention)
    x = torch.randn(4, 5, 12)
    length = x.shape[1 if batch_first else 0]
    batch = x.shape[0 if batch_first else 1]
    causal = torch.full((length, length), float("-inf")).triu_(1)
    per_head = torch.randn(batch * 3, length, length)
    for mask in (None, causal, per_head):
        expected = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(split(x, x, x, need_weights=False, attn_mask=mask)[0], expected)
    joined = split.to_multihead_attention()
    assert list(joined.state_dict()) == list(attention.state_dict())
    assert joined.in_proj_weight is attention.in_proj_weight
    alias = x.view(x.shape)  # as ZeRO-3 hands a module its inputs
    torch.testing.assert_close(split(x, alias, alias)[0], split(x, x, x)[0])
    for query in (x.clone(), x[:1], x[:, :1]):  # the slices begin where x does
        with pytest.raises(NotImplementedError):
            split(query, x, x)


def test_the_adapted_model_is_refused_by_save_until_folded_in(tmp_path: Path) -> None:
    adapter = load_model(tiny_open_clip())
    adapter.check_saveable()
    student = adapter.clone()
    set_trainable(student, "lora", 2, 4.0)
    with pytest.raises(InputError, match="merge_lora"):
        student.save(tmp_path / "model")
    merge_lora(student)
    student.save(tmp_path / "model")
    assert load_model(tmp_path / "model").identity() == adapter.identity()


def test_a_clone_of_an_adapted_model_can_be_folded_in_alone() -> None:
    adapter = load_model(tiny_open_clip())
    for _, parameter in set_trainable(adapter, "lora", 2, 4.0):
        nn.init.normal_(parameter, std=0.1)
    expected = features(adapter, "open_clip")
    twin = adapter.clone()
    merge_lora(twin)
    assert_same(features(twin, "open_clip"), expected)
    assert_same(features(adapter, "open_clip"), expected)
    assert any("lora_" in name for name, _ in adapter.module.named_parameters())


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = load_model(tiny_open_clip())
    identity = adapter.identity()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install '\.\[lora\]'"):
        set_trainable(adapter, "lora")
    assert adapter.identity() == identity


def test_a_tower_without_known_blocks_is_named() -> None:
    model = TwoTowers()
    model.text_blocks = nn.ModuleList()
    with pytest.raises(InputError, match="blocks of the text tower"):
        set_trainable(load_model(model), "lora")


def test_layers_that_torch_reads_past_are_not_adapted() -> None:
    """An update around a layer of nn.TransformerEncoderLayer would be left out wherever no gradient is
    needed."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
            self.adapter = nn.Linear(12, 12)

    model = TwoTowers()
    model.image_blocks = nn.ModuleList(Wide() for _ in range(2))
    names = {name.split(".lora_")[0] for name, _ in set_trainable(load_model(model), "lora", 2, 4.0)}
    assert names == {
        "image_blocks.0.adapter",
        "image_blocks.1.adapter",
        "text_blocks.0.linear",
        "text_blocks.1.linear",
    }

    model = TwoTowers()
    model.text_blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24) for _ in range(2))
    with pytest.raises(InputError, match="blocks of the text tower have no linear layer"):
        set_trainable(load_model(model), "lora")


def test_a_timm_layer_whose_weight_is_only_read_is_not_adapted() -> None:
    class ReadsWeight(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.qkv = inner, nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, *options: Any, **more: Any) -> torch.Tensor:
            return self.inner(nn.functional.linear(x, self.qkv.weight), *options, **more)

    model = MODELS["timm"]()
    block = model.visual.trunk.blocks[0]
    block.attn = ReadsWeight(block.attn)
    adapter = load_model(model.train())
    names = {name for name, _ in set_trainable(adapter, "lora", 2, 4.0)}
    assert any("blocks.0.attn.inner.qkv.lora_A" in name for name in names)
    assert not any("blocks.0.attn.qkv" in name for name in names)
    assert model.training


class Convolutions(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(12, 12, 1, groups=groups)
        self.pointwise = nn.Conv2d(12, 12, 1) if groups == 12 else nn.Identity()
        self.up = nn.ConvTranspose2d(12, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.pointwise(self.depthwise(x[:, :, None, None])))[:, :, 0, 0]


def test_grouped_and_transposed_convolutions_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = TwoTowers()
    model.image_blocks = nn.ModuleList(Convolutions(12) for _ in range(2))
    start = model.encode_image(torch.ones(2, 3, 8, 8))
    adapter = load_model(model)
    with caplog.at_level(logging.INFO, "cliperase_fast"):
        names = {name.split(".lora_")[0] for name, _ in set_trainable(adapter, "lora", 8, 16.0)}
    assert {name for name in names if "image" in name} == {"image_blocks.0.pointwise", "image_blocks.1.pointwise"}
    assert "adapts 2 layers of the image tower (Conv2d) and skips 4" in caplog.text
    torch.testing.assert_close(adapter.module.encode_image(torch.ones(2, 3, 8, 8)), start)
    merge_lora(adapter)
    assert list(adapter.module.state_dict()) == list(model.state_dict())

    model = TwoTowers()
    model.image_blocks = nn.ModuleList(Convolutions(4) for _ in range(2))
    with pytest.raises(
        InputError, match=r"blocks of the image tower have no linear layer or ungrouped 2-D convolution"
    ):
        set_trainable(load_model(model), "lora")


def test_layers_that_share_their_weights_or_compute_them_are_not_adapted() -> None:
    model = TwoTowers()
    model.image_blocks[0].linear.weight = model.text_proj.weight
    torch.nn.utils.parametrizations.weight_norm(model.image_blocks[1].linear)
    with torch.no_grad():
        torch.nn.utils.prune.random_unstructured(model.text_blocks[1].linear, "weight", 0.5)
    names = {name.split(".lora_")[0] for name, _ in set_trainable(load_model(model), "lora", 2, 4.0)}
    assert names == {"image_blocks.2.linear", "text_blocks.0.linear"}
