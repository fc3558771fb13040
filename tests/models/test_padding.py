"""Captions are encoded without their padding, with the features and gradients they have with it."""

import copy

import open_clip
import pytest
import torch
from tiny_models import CAPTIONS, MODELS, TwoTowers, tiny_clip, tiny_hugging_face, tiny_open_clip, word_tokenizer

from cliperase_fast.models import load_model, merge_lora, set_trainable

EOS = {"text_cfg": {"pool_type": "eos", "eos_id": 49407}}
SAFE = {
    "open_clip": tiny_open_clip,
    "open_clip, eos": lambda: tiny_open_clip(**EOS),
    "open_clip, custom text": lambda: tiny_open_clip(custom_text=True),
    "open_clip, custom text, eos": lambda: tiny_open_clip(custom_text=True, **EOS),
    "open_clip, linear projection": lambda: tiny_open_clip(text_cfg={"proj_bias": True}),
    "open_clip, no projection": lambda: tiny_open_clip(embed_dim=32, text_cfg={"proj_type": "none"}),
    "open_clip, custom blocks": lambda: tiny_open_clip(text_cfg={"qk_norm": True, "scale_attn": True}),
    "text tower of transformers, mean": tiny_hugging_face,
    "text tower of transformers, RoBERTa": lambda: tiny_hugging_face("roberta", "mean_pooler", "mlp"),
    "text tower of transformers, first token": lambda: tiny_hugging_face("bert", "cls_last_hidden_state_pooler"),
    "text tower of transformers, pooler": lambda: tiny_hugging_face("bert", "cls_pooler"),
    "transformers": tiny_clip,
    "transformers, old end mark": lambda: tiny_clip(eos_token_id=2),
}


def with_padding_mask(model):
    model.text.use_pad_mask = True
    return model


def with_tokens(model):
    model.text.output_tokens = True
    return model


def with_other_pooling(model):
    model.text.pooler.__class__ = type("Own", (type(model.text.pooler),), {})
    return model


UNSAFE = {
    "not causal": lambda: tiny_open_clip(text_cfg={"no_causal_mask": True}),
    "reads the last position": lambda: tiny_open_clip(text_cfg={"pool_type": "last"}),
    "class token behind the padding": lambda: tiny_open_clip(custom_text=True, text_cfg={"embed_cls": True}),
    "padding mask": lambda: with_padding_mask(tiny_open_clip(custom_text=True)),
    "tower of transformers that returns its tokens": lambda: with_tokens(tiny_hugging_face()),
    "tower of transformers with unknown pooling": lambda: with_other_pooling(tiny_hugging_face()),
    "unknown towers": TwoTowers,
}


def adapter_of(make):
    model = make().double()
    native = isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)) and not hasattr(
        getattr(model, "text", None), "config"
    )
    tokenizer = None if native else word_tokenizer()
    return load_model(model, tokenizer=tokenizer)


def tokens_of(adapter):
    words = CAPTIONS if adapter.vocabulary_size > 99 else ["a photo of a dog", "red", "a red cat"]
    return adapter.tokenize(words)


def lengths_seen(adapter, tokens, monkeypatch):
    """What `_text_features` is handed."""
    seen, inner = [], adapter._text_features
    monkeypatch.setattr(adapter, "_text_features", lambda given: (seen.append(given.shape[1]), inner(given))[1])
    features = adapter.encode_text(tokens)
    return seen, features


@pytest.mark.parametrize("make", SAFE.values(), ids=SAFE.keys())
def test_without_padding_features_and_gradients_are_the_same(make, monkeypatch):
    adapter = adapter_of(make)
    tokens = tokens_of(adapter)
    whole = load_model(copy.deepcopy(adapter.module), tokenizer=adapter.tokenize)
    expected = torch.nn.functional.normalize(whole._text_features(tokens), dim=-1)
    seen, features = lengths_seen(adapter, tokens, monkeypatch)
    assert seen[0] < tokens.shape[1]
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(expected)
    (features * direction).sum().backward()
    (expected * direction).sum().backward()
    for (name, parameter), reference in zip(adapter.module.named_parameters(), whole.module.parameters(), strict=True):
        if reference.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_lora_is_trained_without_padding_too():
    pytest.importorskip("peft")
    adapter = load_model(tiny_open_clip().double())
    tokens = tokens_of(adapter)
    expected = adapter.encode_text(tokens).detach()
    set_trainable(adapter, "lora", 2)
    assert adapter._read_length(tokens) < tokens.shape[1]
    torch.testing.assert_close(adapter.encode_text(tokens), expected, rtol=1e-9, atol=1e-12)
    merge_lora(adapter)


@pytest.mark.parametrize("make", UNSAFE.values(), ids=UNSAFE.keys())
def test_towers_that_may_read_the_padding_get_all_of_it(make, monkeypatch):
    adapter = load_model(make())
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[:, 1] = 40
    seen, _ = lengths_seen(adapter, tokens, monkeypatch)
    assert seen == [16]


def test_a_changed_encoder_or_mask_is_noticed():
    adapter = load_model(tiny_open_clip())
    tokens = tokens_of(adapter)
    assert adapter._read_length(tokens) < 16
    adapter.module.attn_mask = torch.zeros_like(adapter.module.attn_mask)
    assert adapter._read_length(tokens) == 16

    class Other(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            return super().encode_text(text, normalize) + text.float().mean()

    changed = tiny_open_clip()
    changed.__class__ = Other
    assert load_model(changed)._read_length(tokens) == 16


def test_every_kind_of_model_still_encodes_captions_that_fill_its_context():
    for make in (MODELS["open_clip"], MODELS["custom_text"]):
        adapter = load_model(make())
        tokens = torch.randint(1, 400, (2, 16))
        tokens[0, -1] = 49407
        assert adapter.encode_text(tokens).shape == (2, 24)
