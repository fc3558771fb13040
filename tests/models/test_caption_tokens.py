"""Captions to token ids: tokenizers of every kind, captions too long, and output that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from tiny_models import TwoTowers, tiny_clip, tiny_open_clip, word_tokenizer

from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.preprocessing import CaptionTokenizer, clip_tokenizer

LONG = "a photo of a very small dog that chases two round red balls over the green grass of the park"


@pytest.fixture(scope="module")
def adapter() -> ClipAdapter:
    return load_model(tiny_open_clip(text_cfg={"layers": 1}))


def test_a_caption_longer_than_the_context_is_named_with_its_length_and_the_remedy(
    adapter: ClipAdapter,
) -> None:
    count = len(open_clip.SimpleTokenizer().encode(LONG)) + 2
    with pytest.raises(InputError) as raised:
        adapter.tokenize(["a dog", LONG])
    message = str(raised.value)
    assert LONG[:50] in message
    assert LONG not in message
    assert f"has {count} tokens" in message
    assert "context holds 16" in message
    assert "1 of 2 captions" in message
    assert 'long_captions="truncate"' in message


def test_a_caption_that_just_fits_is_kept_and_one_token_more_is_not(adapter: ClipAdapter) -> None:
    fits = " ".join(["dog"] * 14)
    assert adapter.tokenize([fits])[0, -1] == 49407
    with pytest.raises(InputError, match="has 17 tokens"):
        adapter.tokenize([fits + " dog"])


def test_long_captions_are_cut_when_asked_for_in_the_call_or_in_the_adapter(adapter: ClipAdapter) -> None:
    expected = open_clip.tokenize([LONG], context_length=16)
    assert torch.equal(adapter.tokenize([LONG], truncate=True), expected)
    willing = load_model(adapter, truncate=True)
    assert torch.equal(willing.tokenize([LONG]), expected)
    with pytest.raises(InputError):
        willing.tokenize([LONG], truncate=False)


def test_open_clips_tokenize_function_is_checked_too() -> None:
    adapter = load_model(tiny_open_clip(text_cfg={"layers": 1}), tokenizer=open_clip.tokenize)
    assert adapter.tokenize(["a dog"]).shape == (1, 16)
    with pytest.raises(InputError, match="context holds 16"):
        adapter.tokenize([LONG])


def test_a_hugging_face_tokenizer_is_padded_right_to_the_context() -> None:
    for options in ({}, {"padding_side": "left"}):
        tokenizer = CaptionTokenizer(word_tokenizer(**options), 6)
        assert tokenizer(["a dog", "a photo of a dog red"]).tolist() == [
            [8, 2, 5, 9, 0, 0],
            [8, 2, 3, 4, 2, 9],
        ]


def test_a_hugging_face_tokenizers_long_captions_are_found() -> None:
    tokenizer = CaptionTokenizer(word_tokenizer(), 6)
    captions = ["a photo of dog", "a photo of a dog", "a dog"]
    assert tokenizer.overlong(captions, tokenizer(captions)) == [("a photo of a dog", 7)]


def test_open_clips_wrapper_of_a_hugging_face_tokenizer(tmp_path: Any) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    inner = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=77)
    tokenizer = CaptionTokenizer(inner, 6)
    captions = ["a dog", "a  photo of a   dog"]
    tokens = tokenizer(captions)
    assert tokens.tolist() == [[8, 2, 5, 9, 0, 0], [8, 2, 3, 4, 2, 9]]
    assert tokenizer.overlong(captions, tokens) == [(captions[1], 7)]

    model = tiny_open_clip(text_cfg={"vocab_size": 10, "layers": 1})
    adapter = load_model(model, tokenizer=inner)
    adapter.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(again.tokenize(captions), adapter.tokenize(captions))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(captions), adapter.tokenize(captions))


def test_without_a_known_context_a_tokenizers_own_limit_holds() -> None:
    assert CaptionTokenizer(open_clip.SimpleTokenizer(context_length=9), None).context_length == 9
    assert CaptionTokenizer(word_tokenizer(model_max_length=5), None)(["a dog", "a"]).shape == (2, 5)
    free = CaptionTokenizer(word_tokenizer(), None)
    assert free.context_length is None
    assert free(["a dog", "a"]).tolist() == [[8, 2, 5, 9], [8, 2, 9, 0]]


@pytest.mark.parametrize(
    "output",
    [
        np.ones((2, 16), dtype=np.int32),
        [[1] * 16, [1] * 16],
        {"input_ids": torch.ones(2, 16, dtype=torch.int32), "attention_mask": torch.ones(2, 16)},
        torch.ones(2, 16, dtype=torch.uint8),
    ],
)
def test_functions_may_return_tables_of_several_kinds(output: Any) -> None:
    tokens = CaptionTokenizer(lambda captions: output, 16)(["a", "b"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[1] * 16] * 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.ones(2, 16), "float32 values; token ids must be integers"),
        (torch.ones(2, 16, dtype=torch.bool), "bool values"),
        (torch.ones(16, dtype=torch.long), r"shape \[16\] for 2 captions"),
        (torch.ones(3, 16, dtype=torch.long), r"must be \[2, L\]"),
        ([[1, 2], [1]], "pad its rows"),
        ("words", r"not a \[B, L\] table"),
        ({"tokens": [1]}, "tokens but no input_ids"),
        ({"input_ids": [[0, 1], [1, 1]], "attention_mask": [[0, 1], [1, 1]]}, "pads on the left"),
    ],
)
def test_tokenizer_output_that_is_not_a_token_table_is_refused(output: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CaptionTokenizer(lambda captions: output, 16)(["a", "b"])


def without_padding() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def test_a_tokenizer_without_a_padding_token_pads_with_an_id_that_a_causal_tower_never_reads() -> None:
    captions = ["a dog", "a photo of a red cat"]
    for model in (tiny_clip(pad_token_id=1), tiny_clip(eos_token_id=2, pad_token_id=1)):
        tokenizer, adapter = without_padding(), load_model(model, tokenizer=word_tokenizer())
        bare = load_model(model, tokenizer=tokenizer)
        tokens = bare.tokenize(captions)
        assert tokens.shape == (2, 16) and tokenizer.pad_token is None
        torch.testing.assert_close(bare.encode_text(tokens), adapter.encode_text(adapter.tokenize(captions)))
        with pytest.raises(InputError, match="has 18 tokens"):
            bare.tokenize(["a dog " * 8])


def test_own_towers_with_a_tokenizer_without_a_padding_token_are_told_how_to_set_one() -> None:
    tokenizer = without_padding()
    with pytest.raises(InputError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        load_model(TwoTowers(), tokenizer=tokenizer).tokenize(["a dog", "red"])
    tokenizer.pad_token = tokenizer.eos_token
    tokens = load_model(TwoTowers(), tokenizer=tokenizer).tokenize(["a dog", "red"])
    assert tokens.tolist() == [[8, 2, 5, 9], [8, 6, 9, 9]]


def test_a_folder_without_its_tokenizer_loads_once_the_files_are_put_there(tmp_path: Path) -> None:
    model = tiny_open_clip(text_cfg={"vocab_size": 10})
    load_model(model, tokenizer=word_tokenizer()).save(tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"or save its files into .*model with tokenizer\.save_pretrained"):
        load_model(f"local-dir:{tmp_path / 'model'}")
    word_tokenizer().save_pretrained(tmp_path / "model")
    tokens = load_model(f"local-dir:{tmp_path / 'model'}").tokenize(["a dog"])
    assert tokens[0, :4].tolist() == [8, 2, 5, 9]


def test_a_tokenizer_that_fails_or_is_a_class_is_named() -> None:
    adapter = load_model(tiny_open_clip(), tokenizer=lambda captions: captions.lower())
    with pytest.raises(InputError, match=r"fails for a list of 2 captions \(AttributeError: .*list of strings"):
        adapter.tokenize(["a", "b"])
    with pytest.raises(InputError, match="tokenizer is the class SimpleTokenizer; pass an instance"):
        load_model(tiny_open_clip(), tokenizer=open_clip.SimpleTokenizer)


def test_a_list_of_token_tensors_is_a_table() -> None:
    adapter = load_model(tiny_open_clip(), tokenizer=lambda captions: list(torch.ones(len(captions), 16).long()))
    assert adapter.tokenize(["a", "b"]).tolist() == [[1] * 16] * 2


def test_models_share_the_tables_of_their_tokenizers_but_not_the_context_length() -> None:
    short, long = clip_tokenizer(8), clip_tokenizer(12)
    assert short.encoder is long.encoder
    for tokenizer in (short, long):
        expected = open_clip.SimpleTokenizer(context_length=tokenizer.context_length)
        assert torch.equal(tokenizer(["a red square"]), expected(["a red square"]))
